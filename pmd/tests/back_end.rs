//! The virtio-user driver over a socket, with our own back end in the same process: negotiation, back ends that come back, and
//! what a user is told when one does not fit.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use host::memory::Pages;
use pmd::virtio_user::{Buffer, OpenError, Options, QueuePair, Reconnected, SocketMode, VirtioUser};
use vhost_user::backend::{self, Endpoint, SessionHandle};
use vhost_user::{Device, Mode, QueueStart};
use virtio::device::{DeviceRing, Layout, Ring, RingError};
use virtio::memory::{DirtyLog, GuestMemory, HostRange};
use virtio::{features as f, with_ring};

const PAIRS: u16 = 2;
const FEATURES: u64 = f::VERSION_1
    | f::NET_MRG_RXBUF
    | f::IN_ORDER
    | f::RING_EVENT_IDX
    | f::RING_INDIRECT_DESC
    | f::RING_PACKED
    | f::NET_MQ;

/// The rings of a back end, and where their used areas are.
#[derive(Default)]
struct Rings([Option<(DeviceRing, HostRange)>; 2 * PAIRS as usize]);

/// A back end that returns each frame on the pair on which it came, when the test says so.
struct Hairpin {
    rings: Arc<Mutex<Rings>>,
    features: u64,
}

impl Device for Hairpin {
    fn features(&self) -> u64 {
        self.features
    }
    fn max_queue_pairs(&self) -> u16 {
        PAIRS
    }
    fn start_queue(&mut self, index: u16, start: QueueStart) -> Result<(), RingError> {
        let used = start.ring.device;
        let ring = DeviceRing::start(start.ring)?;
        self.rings.lock().unwrap().0[usize::from(index)] = Some((ring, used));
        Ok(())
    }
    fn stop_queue(&mut self, index: u16) -> Option<u32> {
        self.rings.lock().unwrap().0[usize::from(index)].take().map(|(ring, _)| ring.base())
    }
    fn connected(&mut self) {}
    fn negotiated(&mut self, _: u64) {}
    fn memory(&mut self, _: Option<Arc<GuestMemory>>) {}
    fn enable_queue(&mut self, _: u16, _: bool) {}
    fn set_call(&mut self, _: u16, _: Option<std::os::fd::OwnedFd>) {}
    fn set_log(&mut self, _: u16, _: Option<Arc<DirtyLog>>, _: Option<u64>) {}
    fn set_mtu(&mut self, _: u16) -> Result<(), String> {
        Ok(())
    }
    fn announce(&mut self, _: [u8; 6]) {}
    fn set_status(&mut self, _: u8) {}
    fn disconnected(&mut self, _: &str) {}
}

impl Rings {
    /// Takes up to `want` frames of pair `pair` and returns them.
    fn turn(&mut self, pair: usize, want: usize) -> usize {
        let [receive, transmit] = self.0.get_disjoint_mut([2 * pair, 2 * pair + 1]).unwrap();
        let (Some((receive, _)), Some((transmit, _))) = (receive, transmit) else { return 0 };
        with_ring!(transmit, tx => with_ring!(receive, rx => {
            let n = tx.fetch(want).unwrap().min(want);
            for i in 0..n {
                assert!(rx.fetch(1).unwrap() > 0);
                let (from, to) = (*tx.stock().get(i), *rx.stock().get(0));
                assert!(from.more == 0 && from.len <= to.len);
                // SAFETY: both buffers were checked against the memory; the header of 12 bytes comes first.
                unsafe {
                    to.ptr.copy_from(from.ptr, from.len as usize);
                    to.ptr.add(10).write(1);
                    to.ptr.add(11).write(0);
                }
                rx.use_written(from.len);
            }
            tx.use_read(n);
            tx.publish();
            rx.publish();
            n
        }))
    }
}

struct World {
    _folder: tempfile::TempDir,
    path: PathBuf,
    rings: Arc<Mutex<Rings>>,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("port.sock");
        Self { _folder: folder, path, rings: Arc::default() }
    }

    fn serve(&self, mode: Mode, features: u64) -> SessionHandle {
        let endpoint = Endpoint { path: self.path.clone(), mode };
        let device = Hairpin { rings: self.rings.clone(), features };
        backend::serve(endpoint, backend::Options::new("test"), Box::new(device)).unwrap()
    }
}

fn options(layout: Layout) -> Options {
    Options {
        layout,
        queue_size: 64,
        buffers: 1024,
        pages: Pages::Ordinary,
        timeout: Duration::from_secs(60),
        ..Options::default()
    }
}

/// Numbered frames, sent and expected back.
#[derive(Default)]
struct Flow {
    sent: u32,
    seen: u32,
    pending: Vec<Buffer>,
}

impl Flow {
    fn send(&mut self, pair: &mut QueuePair, n: usize) {
        for _ in 0..n {
            let mut b = pair.allocate().unwrap();
            pair.write(&mut b, 0, &[0x55; 60]);
            pair.write(&mut b, 12, &self.sent.to_le_bytes());
            pair.set_len(&mut b, 60 + self.sent as usize % 100);
            self.pending.push(b);
            self.sent += 1;
        }
        pair.transmit(&mut self.pending);
    }

    fn expect(&mut self, pair: &mut QueuePair) {
        let mut got = Vec::new();
        pair.receive(&mut got, 64);
        for b in got {
            let mut number = [0; 4];
            pair.read(&b, 12, &mut number);
            assert_eq!((u32::from_le_bytes(number), b.len()), (self.seen, 60 + self.seen as usize % 100));
            self.seen += 1;
            pair.free(b);
        }
    }

    /// Sends and returns `n` frames.
    fn exchange(&mut self, world: &World, device: &mut VirtioUser, pair: usize, n: usize) {
        for _ in 0..n {
            let queue = &mut device.queue_pairs()[pair];
            self.send(queue, 3);
            world.rings.lock().unwrap().turn(pair, 3);
            self.expect(queue);
        }
        assert_eq!(self.seen, self.sent);
    }
}

fn gone(device: &VirtioUser) {
    let end = Instant::now() + Duration::from_secs(60);
    while device.connected() {
        assert!(Instant::now() < end, "still connected");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn frames_go_out_and_come_back_over_each_queue_pair() {
    for layout in [Layout::Split, Layout::Packed] {
        let world = World::new();
        let _back_end = world.serve(Mode::server(), FEATURES);
        let options = Options { queue_pairs: 2, ..options(layout) };
        let mut device = VirtioUser::open(&world.path, options).unwrap();
        assert_eq!(device.features() & f::RING_PACKED != 0, layout == Layout::Packed);
        assert_eq!(device.features() & f::IN_ORDER, f::IN_ORDER);
        assert_eq!(device.pages(), Pages::Ordinary);
        Flow::default().exchange(&world, &mut device, 0, 200);
        Flow::default().exchange(&world, &mut device, 1, 200);
    }
}

#[test]
fn a_back_end_in_client_mode_is_waited_for() {
    let world = World::new();
    let _back_end = world.serve(Mode::client(), FEATURES);
    let options = Options { mode: SocketMode::Listen, ..options(Layout::Split) };
    let mut device = VirtioUser::open(&world.path, options).unwrap();
    Flow::default().exchange(&world, &mut device, 0, 10);
}

#[test]
fn a_back_end_that_comes_back_loses_and_repeats_nothing_that_was_not_in_its_hands() {
    for layout in [Layout::Split, Layout::Packed] {
        let world = World::new();
        let mut back_end = world.serve(Mode::server(), FEATURES);
        let mut device = VirtioUser::open(&world.path, options(layout)).unwrap();
        let mut flow = Flow::default();
        for lap in 1..20 {
            flow.exchange(&world, &mut device, 0, lap * 3);
            // Seven frames on the ring: the old back end returns four of them, which are not received yet.
            flow.send(&mut device.queue_pairs()[0], 7);
            assert_eq!(world.rings.lock().unwrap().turn(0, 4), 4);
            drop(back_end);
            gone(&device);
            back_end = world.serve(Mode::server(), FEATURES);
            assert_eq!(device.reconnect().unwrap(), Reconnected::Resumed);
            assert!(device.connected());
            assert_eq!(world.rings.lock().unwrap().turn(0, 64), 3);
            let pair = &mut device.queue_pairs()[0];
            flow.expect(pair);
            assert_eq!((flow.seen, pair.counters().abandoned), (flow.sent, 0));
        }
    }
}

#[test]
fn a_ring_that_the_back_end_broke_stops_with_a_reason_and_begins_anew_with_the_next_back_end() {
    let world = World::new();
    let back_end = world.serve(Mode::server(), FEATURES);
    let mut device = VirtioUser::open(&world.path, options(Layout::Split)).unwrap();
    let mut flow = Flow::default();
    flow.exchange(&world, &mut device, 0, 10);
    let used = world.rings.lock().unwrap().0[0].as_ref().unwrap().1;
    // SAFETY: the used ring, which begins with flags and index, is mapped as long as the ring runs.
    unsafe { used.ptr.cast::<u16>().add(1).write_volatile(30_000) };
    let pair = &mut device.queue_pairs()[0];
    assert_eq!(pair.receive(&mut Vec::new(), 32), 0);
    let fault = pair.fault().expect("a fault").to_string();
    assert!(fault.contains("used index 30000"), "{fault}");
    flow.send(pair, 3);
    assert_eq!(flow.pending.len(), 3, "a pair at rest takes no frames");
    drop(back_end);
    gone(&device);
    let _back_end = world.serve(Mode::server(), FEATURES);
    assert_eq!(device.reconnect().unwrap(), Reconnected::Afresh);
    let pair = &mut device.queue_pairs()[0];
    assert_eq!(pair.fault(), None);
    pair.transmit(&mut flow.pending);
    world.rings.lock().unwrap().turn(0, 3);
    flow.expect(pair);
    flow.exchange(&world, &mut device, 0, 100);
}

#[test]
fn a_back_end_with_other_features_begins_anew() {
    let world = World::new();
    let back_end = world.serve(Mode::server(), FEATURES);
    let mut device = VirtioUser::open(&world.path, options(Layout::Split)).unwrap();
    let mut flow = Flow::default();
    flow.exchange(&world, &mut device, 0, 10);
    flow.send(&mut device.queue_pairs()[0], 5);
    drop(back_end);
    gone(&device);
    let _back_end = world.serve(Mode::server(), FEATURES & !f::IN_ORDER);
    assert_eq!(device.reconnect().unwrap(), Reconnected::Afresh);
    assert_eq!(device.queue_pairs()[0].counters().abandoned, 5);
    Flow::default().exchange(&world, &mut device, 0, 100);
}

#[test]
fn what_does_not_fit_is_said_in_words() {
    let message = |path: &Path, options: Options| VirtioUser::open(path, options).err().unwrap().to_string();
    let world = World::new();
    let short = Options { timeout: Duration::from_millis(50), ..options(Layout::Split) };
    let text = message(&world.path, short.clone());
    assert!(text.contains("port.sock") && text.contains("is a switch serving that socket?"), "{text}");
    let text = message(&world.path, Options { mode: SocketMode::Listen, ..short.clone() });
    assert!(text.contains("no back end connected to"), "{text}");

    let _back_end = world.serve(Mode::server(), FEATURES & !f::RING_PACKED);
    let text = message(&world.path, options(Layout::Packed));
    assert_eq!(
        text,
        "the back end does not offer packed rings; use split ones, or enable packed rings there"
    );
    let text = message(&world.path, Options { queue_pairs: 3, ..options(Layout::Split) });
    assert!(text.starts_with("the back end has 2 queue pairs, 3 are wanted"), "{text}");

    for (wrong, part) in [
        (Options { queue_pairs: 0, ..short.clone() }, "0 queue pairs: a device has 1 to 128"),
        (Options { buffers: 100, ..short.clone() }, "give at least 128"),
        (Options { buffer_size: 100, ..short.clone() }, "buffers of 100 bytes"),
        (Options { queue_size: 48, ..short.clone() }, "ring size 48 is not possible"),
    ] {
        let text = message(&world.path, wrong);
        assert!(text.contains(part), "{text}");
    }
    assert!(matches!(
        VirtioUser::open(&world.path, Options { queue_pairs: 129, ..short }),
        Err(OpenError::Pairs(129))
    ));
}
