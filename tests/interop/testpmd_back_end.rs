//! Our virtio-user driver with DPDK's vhost library as back end: testpmd moves frames between two `net_vhost` ports, and two
//! devices of ours send numbered frames through it and compare each that arrives with the one that was sent, to the last
//! byte.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pmd::virtio_user::{Buffer, Options, QueuePair, Reconnected, SocketMode, VirtioUser};
use virtio::device::Layout;
use virtio::features;

use crate::testpmd::Testpmd;

/// Frames each way.
const FRAMES: u64 = 5_000_000;

/// Buffers on their way in one direction; fewer than a receive ring holds, so that no frame has to be dropped.
const IN_FLIGHT: u64 = 128;

const BURST: usize = 32;

#[test]
#[ignore = "needs DPDK, huge pages and two cores: ./check testpmd"]
fn split_rings_carry_every_frame_unchanged() {
    both_ways(FRAMES, 60..=124, Options::default());
}

#[test]
#[ignore = "needs DPDK, huge pages and two cores: ./check testpmd"]
fn packed_rings_carry_every_frame_unchanged() {
    both_ways(FRAMES, 60..=124, Options { layout: Layout::Packed, ..Options::default() });
}

#[test]
#[ignore = "needs DPDK, huge pages and two cores: ./check testpmd"]
fn rings_without_any_feature_beyond_version_1_carry_every_frame_unchanged() {
    for layout in [Layout::Split, Layout::Packed] {
        both_ways(
            FRAMES / 10,
            60..=1514,
            Options { layout, features: features::VERSION_1, ..Options::default() },
        );
    }
}

#[test]
#[ignore = "needs DPDK, huge pages and two cores: ./check testpmd"]
fn frames_larger_than_a_buffer_arrive_in_one_piece() {
    for layout in [Layout::Split, Layout::Packed] {
        for indirect in [0, features::RING_INDIRECT_DESC] {
            let few = Options::default().features & !features::RING_INDIRECT_DESC;
            let options =
                Options { layout, features: few | indirect, buffer_size: 1024, ..Options::default() };
            both_ways(100_000, 60..=9000, options);
        }
    }
}

#[test]
#[ignore = "needs DPDK, huge pages and two cores: ./check testpmd"]
fn a_back_end_that_connects_to_us_is_served() {
    let folder = tempfile::tempdir().unwrap();
    let options =
        Options { mode: SocketMode::Listen, timeout: Duration::from_secs(60), ..Options::default() };
    let devices = std::thread::scope(|scope| {
        let opening = sockets(folder.path()).map(|path| {
            scope.spawn({
                let o = options.clone();
                move || VirtioUser::open(&path, o)
            })
        });
        let testpmd = back_end(folder.path(), ",client=1", 1);
        (opening.map(|o| o.join().unwrap().unwrap()), testpmd)
    });
    let (mut devices, _testpmd) = devices;
    exchange(&mut devices, 0, 100_000, 60..=124);
}

#[test]
#[ignore = "needs DPDK, huge pages and two cores: ./check testpmd"]
fn each_queue_pair_carries_its_own_frames() {
    let folder = tempfile::tempdir().unwrap();
    let _testpmd = back_end(folder.path(), "", 2);
    let options = Options { queue_pairs: 2, ..Options::default() };
    let mut devices = sockets(folder.path()).map(|path| VirtioUser::open(&path, options.clone()).unwrap());
    exchange(&mut devices, 0, 100_000, 60..=124);
    exchange(&mut devices, 1, 100_000, 60..=124);
}

#[test]
#[ignore = "needs DPDK, huge pages and two cores: ./check testpmd"]
fn a_back_end_that_was_killed_and_started_again_is_taken_into_service() {
    for layout in [Layout::Split, Layout::Packed] {
        let folder = tempfile::tempdir().unwrap();
        let testpmd = back_end(folder.path(), "", 1);
        let options = Options { layout, timeout: Duration::from_secs(60), ..Options::default() };
        let mut devices =
            sockets(folder.path()).map(|path| VirtioUser::open(&path, options.clone()).unwrap());
        exchange(&mut devices, 0, 10_000, 60..=124);
        drop(testpmd);
        assert!(devices.iter().all(|d| !d.connected()));
        for path in sockets(folder.path()) {
            let _ = std::fs::remove_file(path);
        }
        let _testpmd = back_end(folder.path(), "", 1);
        for device in &mut devices {
            assert_eq!(device.reconnect().unwrap(), Reconnected::Resumed);
            assert!(device.connected());
        }
        exchange(&mut devices, 0, 10_000, 60..=124);
    }
}

pub(crate) fn sockets(folder: &Path) -> [PathBuf; 2] {
    ["v0.sock", "v1.sock"].map(|name| folder.join(name))
}

/// testpmd between two `net_vhost` ports on the sockets in `folder`, forwarding.
pub(crate) fn back_end(folder: &Path, options: &str, queue_pairs: u64) -> Testpmd {
    let mut port = 0;
    let devices = sockets(folder).map(|path| {
        port += 1;
        format!("net_vhost{},iface={},queues={queue_pairs}{options}", port - 1, path.display())
    });
    let mut testpmd = Testpmd::with_devices(devices, "0@0,1@1", queue_pairs, &["--forward-mode=io"]);
    testpmd.say("start");
    testpmd
}

fn both_ways(frames: u64, lens: std::ops::RangeInclusive<usize>, options: Options) {
    let folder = tempfile::tempdir().unwrap();
    let _testpmd = back_end(folder.path(), "", 1);
    let layout = options.layout;
    let mut devices = sockets(folder.path()).map(|path| VirtioUser::open(&path, options.clone()).unwrap());
    let begin = Instant::now();
    exchange(&mut devices, 0, frames, lens);
    let rate = 2.0 * frames as f64 / begin.elapsed().as_secs_f64() / 1e6;
    println!("{layout:?}, features {:#x}: {frames} frames each way, {rate:.1} Mpps", devices[0].features());
}

/// One direction of an exchange.
struct Flow {
    sent: u64,
    seen: u64,
    frames: u64,
    lens: std::ops::RangeInclusive<usize>,
    pending: Vec<Buffer>,
    got: Vec<Buffer>,
    bytes: Vec<u8>,
}

impl Flow {
    /// The length of frame `n`.
    fn len(&self, n: u64) -> usize {
        let span = (self.lens.end() - self.lens.start() + 1) as u64;
        self.lens.start() + (n.wrapping_mul(0x9e37_79b9) % span) as usize
    }

    /// Word `i` of frame `n`.
    fn word(n: u64, i: usize) -> u64 {
        (n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(i as u32 % 64) ^ i as u64
    }

    fn fill(&mut self, n: u64) {
        self.bytes.resize(self.len(n), 0);
        for (i, chunk) in self.bytes.chunks_mut(8).enumerate() {
            chunk.copy_from_slice(&Self::word(n, i).to_le_bytes()[..chunk.len()]);
        }
    }

    fn send(&mut self, pair: &mut QueuePair) {
        let pieces = self.lens.end().div_ceil(960) as u64;
        let most = if *self.lens.end() > 1514 { IN_FLIGHT / pieces } else { IN_FLIGHT };
        while self.sent < self.frames && self.sent - self.seen < most && self.pending.len() < BURST {
            self.fill(self.sent);
            let first = self.pending.len();
            let mut rest = &self.bytes[..];
            while !rest.is_empty() {
                let mut b = pair.allocate().expect("a free buffer");
                let (now, later) = rest.split_at(rest.len().min(pair.capacity(&b)));
                pair.write(&mut b, 0, now);
                pair.set_len(&mut b, now.len());
                rest = later;
                self.pending.push(b);
            }
            let follows = self.pending.len() - first - 1;
            self.pending[first].set_follows(follows as u16);
            self.sent += 1;
        }
        pair.transmit(&mut self.pending);
    }

    /// Compares what came in.
    fn receive(&mut self, pair: &mut QueuePair) -> bool {
        pair.receive(&mut self.got, BURST);
        let mut got = std::mem::take(&mut self.got);
        let any = !got.is_empty();
        let mut buffers = got.drain(..);
        while let Some(first) = buffers.next() {
            self.fill(self.seen);
            let mut at = 0;
            let mut part = [0; 2048];
            let follows = first.follows();
            for b in std::iter::once(first).chain(buffers.by_ref().take(follows)) {
                let part = &mut part[..b.len()];
                pair.read(&b, 0, part);
                let want = self.bytes.get(at..at + part.len());
                assert!(want == Some(&*part), "frame {} differs behind byte {at}", self.seen);
                at += part.len();
                pair.free(b);
            }
            assert_eq!(at, self.bytes.len(), "length of frame {}", self.seen);
            self.seen += 1;
        }
        drop(buffers);
        self.got = got;
        any
    }
}

/// DPDK answers that a ring is enabled before its port sends to it, and drops frames until then: probes each direction until
/// frames arrive, then lets the last of the probes come in.
fn wait_until_ready(devices: &mut [VirtioUser; 2], index: usize) {
    let (mut arrived, mut got) = ([false; 2], Vec::new());
    let begin = Instant::now();
    let mut last = begin;
    while !arrived.iter().all(|a| *a) || last.elapsed() < Duration::from_millis(50) {
        assert!(begin.elapsed() < Duration::from_secs(60), "testpmd forwards nothing: {arrived:?}");
        for i in [0, 1] {
            let pair = &mut devices[i].queue_pairs()[index];
            if !arrived[1 - i] {
                let mut b = pair.allocate().expect("a free buffer");
                pair.write(&mut b, 0, &[0xff; 60]);
                pair.set_len(&mut b, 60);
                pair.transmit(&mut vec![b]);
            }
            if pair.receive(&mut got, BURST) > 0 {
                (arrived[i], last) = (true, Instant::now());
            }
            got.drain(..).for_each(|b| pair.free(b));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Sends `frames` frames each way over pair `index`, and waits for all of them.
fn exchange(devices: &mut [VirtioUser; 2], index: usize, frames: u64, lens: std::ops::RangeInclusive<usize>) {
    let flow = || Flow {
        sent: 0,
        seen: 0,
        frames,
        lens: lens.clone(),
        pending: Vec::new(),
        got: Vec::new(),
        bytes: Vec::new(),
    };
    let mut flows = [flow(), flow()];
    wait_until_ready(devices, index);
    let mut last = Instant::now();
    while flows.iter().any(|f| f.seen < frames) {
        let mut any = false;
        for (i, flow) in flows.iter_mut().enumerate() {
            flow.send(&mut devices[i].queue_pairs()[index]);
            any |= flow.receive(&mut devices[1 - i].queue_pairs()[index]);
        }
        if any {
            last = Instant::now();
        }
        let seen = flows.each_ref().map(|f| f.seen);
        assert!(last.elapsed() < Duration::from_secs(60), "nothing for a minute after {seen:?} of {frames}");
    }
    for device in devices {
        let pair = &device.queue_pairs()[index];
        let c = pair.counters();
        assert_eq!((c.malformed, c.unsendable, pair.fault()), (0, 0, None));
    }
}
