//! A source of randomness: virtio-rng (virtio 1.3, 5.4).
//!
//! Owns one queue whose requests are filled by the host's kernel, directly. A request gets at most [`MOST`] bytes, and says
//! how many: none takes long.

use std::io;
use std::sync::Arc;

use virtio::features;
use virtio::memory::GuestMemory;

use crate::buffers::Request;
use crate::control::report::QueueReport;
use crate::lifecycle::Lifecycle;
use crate::sandbox::ThreadKind;
use crate::virtio_pci::{Activation, VirtioDevice};
use crate::worker::{Serve, Served, Workers};

/// virtio's number of it, and PCI's class for what has none.
const KIND: (u16, u16) = (4, 0x00ff);
/// Linux asks for 64 bytes at a time.
const QUEUE_SIZE: u16 = 16;
/// Bytes that a request gets at most.
const MOST: u64 = 4096;

/// The device.
pub(crate) struct Rng(Workers);

impl Rng {
    /// # Errors
    /// No more threads or descriptors.
    pub(crate) fn new(memory: &Arc<GuestMemory>) -> io::Result<Self> {
        Workers::new("rng", memory, vec![Self::server()]).map(Self)
    }

    /// What works on its queue.
    pub(crate) fn server() -> impl Serve {
        Server
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> (u16, u16) {
        KIND
    }

    fn features(&self) -> u64 {
        features::VERSION_1 | features::RING_INDIRECT_DESC | features::RING_EVENT_IDX
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn activate(&mut self, activation: Activation) {
        self.0.activate(activation);
    }

    fn reset(&mut self) {
        self.0.reset();
    }

    fn lifecycle(&self) -> &dyn Lifecycle {
        &self.0
    }

    fn queue_reports(&self) -> Vec<QueueReport> {
        self.0.reports()
    }

    fn is_reset(&self) -> bool {
        self.0.are_idle()
    }

    fn is_broken(&self) -> bool {
        self.0.are_broken()
    }
}

struct Server;

impl Serve for Server {
    const KIND: ThreadKind = ThreadKind::Queue;

    fn start(&mut self, _: u64) {}

    fn serve(&mut self, mut request: Request<'_>) -> Served {
        let room = request.writable.take(MOST);
        let mut written = 0;
        for piece in room.pieces() {
            // SAFETY: the piece lies in guest memory that is mapped while the request is borrowed; the kernel writes there.
            let got = unsafe { libc::getrandom(piece.iov_base, piece.iov_len, 0) };
            written += u32::try_from(got).unwrap_or(0);
            // What was written is what the first bytes are.
            if usize::try_from(got) != Ok(piece.iov_len) {
                break;
            }
        }
        Served::Done(written)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_driver::{DATA, Driver};

    #[test]
    fn what_comes_while_it_rests_is_served_when_it_goes_on() {
        let mut driver = Driver::new();
        let mut rng = Rng::new(&driver.for_rings()).unwrap();
        rng.activate(driver.activation(&[0], features::VERSION_1));
        assert_eq!(driver.chain(&[(DATA, 30, true)]), 30);
        for _ in 0..3 {
            rng.lifecycle().pause();
            driver.until("it rests", |_| rng.lifecycle().is_paused());
            let before = driver.used();
            driver.put(&[(DATA, 8, true)]);
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert_eq!(driver.used(), before, "it worked while it rested");
            rng.lifecycle().resume();
            assert_eq!(driver.wait(), 8);
        }
        let report = &rng.queue_reports()[0];
        assert_eq!((report.requests, report.bytes, report.errors), (4, 54, 0));
        rng.lifecycle().pause();
        rng.reset();
        driver.until("let go although it rests", |_| rng.is_reset());
    }

    #[test]
    fn requests_are_filled_up_to_a_bound_and_buffers_to_be_read_are_left_alone() {
        let mut driver = Driver::new();
        let mut rng = Rng::new(&driver.for_rings()).unwrap();
        rng.activate(driver.activation(&[0], features::VERSION_1));
        assert_eq!(driver.chain(&[(DATA, 30, true), (DATA + 100, 34, true)]), 64);
        let (first, second) = (driver.read(DATA, 100), driver.read(DATA + 100, 100));
        assert!(first[..30].iter().any(|byte| *byte != 0) && second[..34].iter().any(|byte| *byte != 0));
        assert!(first[30..].iter().chain(&second[34..]).all(|byte| *byte == 0), "beyond the buffers");
        assert_eq!(driver.chain(&[(DATA, 1 << 20, true)]), MOST as u32);
        assert_eq!(driver.chain(&[(DATA, 64, false)]), 0);
        assert_eq!(driver.chain(&[(DATA, 64, false), (DATA, 8, true)]), 8);
    }
}
