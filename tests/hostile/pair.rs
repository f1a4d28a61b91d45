//! The well-behaved pair beside the attack: numbered frames one way, closed loop, none of which may be lost, changed or kept
//! waiting.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use host::memory::Pages;
use pmd::virtio_user::{Options, VirtioUser};

/// Frames in flight.
const WINDOW: u64 = 32;

/// Bytes of a frame.
const LEN: usize = 300;

/// The longest that the pair may wait for a frame while nobody is meant to notice anything. The machine may stand still for seconds;
/// a worker that an attacker holds, it holds until the session ends.
const PATIENCE: Duration = Duration::from_secs(5);

/// Of frames that are none of the pair's business (there should be none).
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];

/// The pair's thread.
pub(crate) struct Pair {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    forwarded: AtomicU64,
}

fn frame(number: u64) -> [u8; LEN] {
    let mut frame: [u8; LEN] = std::array::from_fn(|i| (number as u8).wrapping_mul(31).wrapping_add(i as u8));
    frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, 0xb]);
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 0xa]);
    frame[12..14].copy_from_slice(&ETHERTYPE);
    frame[14..22].copy_from_slice(&number.to_be_bytes());
    frame
}

impl Pair {
    pub(crate) fn start(from: &Path, to: &Path) -> Self {
        let options = |mac| Options {
            mac: [2, 0, 0, 0, 0, mac],
            buffers: 1_024,
            pages: Pages::Ordinary,
            timeout: Duration::from_secs(60),
            ..Options::default()
        };
        let mut sender = VirtioUser::open(from, options(0xa)).unwrap();
        let mut receiver = VirtioUser::open(to, options(0xb)).unwrap();
        let shared = Arc::new(Shared::default());
        let theirs = shared.clone();
        let thread = std::thread::spawn(move || forward(&mut sender, &mut receiver, &theirs));
        Self { shared, thread: Some(thread) }
    }

    pub(crate) fn forwarded(&self) -> u64 {
        self.shared.forwarded.load(Ordering::Relaxed)
    }

    /// Ends; fails the test if anything was lost, changed or late.
    pub(crate) fn end(mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Err(panic) = self.thread.take().unwrap().join() {
            std::panic::resume_unwind(panic);
        }
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn forward(sender: &mut VirtioUser, receiver: &mut VirtioUser, shared: &Shared) {
    let (out, into) = (&mut sender.queue_pairs()[0], &mut receiver.queue_pairs()[0]);
    let (mut sent, mut received) = (0_u64, 0_u64);
    let (mut last, mut waiting, mut got) = (Instant::now(), Vec::new(), Vec::new());
    while !shared.stop.load(Ordering::Relaxed) || received < sent {
        let go_on = !shared.stop.load(Ordering::Relaxed);
        while go_on && sent - received < WINDOW {
            let mut buffer = out.allocate().expect("buffers come back");
            out.set_len(&mut buffer, LEN);
            out.write(&mut buffer, 0, &frame(sent));
            waiting.push(buffer);
            sent += 1;
        }
        out.transmit(&mut waiting);
        into.receive(&mut got, 32);
        for buffer in got.drain(..) {
            let mut bytes = [0; LEN];
            assert_eq!(buffer.len(), LEN);
            into.read(&buffer, 0, &mut bytes);
            into.free(buffer);
            assert_eq!(bytes, frame(received), "frame {received} of the well-behaved pair");
            received += 1;
            last = Instant::now();
        }
        shared.forwarded.store(received, Ordering::Relaxed);
        assert!(last.elapsed() < PATIENCE, "frame {received} of the well-behaved pair did not come");
        if sent - received == WINDOW {
            // The attacker and the switch need the cores, too.
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}
