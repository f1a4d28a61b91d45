//! A console without a serial port: virtio-console with one port (virtio 1.3, 5.3), hvc0 in a Linux guest.
//!
//! Owns the two queues. What the guest prints goes into the bounded queue of [`crate::console`], what is typed comes through a
//! pipe of bounded size: neither end waits for the other.

use std::io::{self, PipeReader, PipeWriter, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use virtio::features;

use crate::buffers::Request;
use crate::console::Output;
use crate::control::report::QueueReport;
use crate::lifecycle::Lifecycle;
use crate::machine::StartError;
use crate::memory::{GuestMemory, GuestMemoryError};
use crate::sandbox::ThreadKind;
use crate::virtio_pci::{Activation, VirtioDevice};
use crate::worker::{Serve, Served, Workers};

/// virtio's number of a console, and PCI's class of one (communication, other).
const KIND: (u16, u16) = (3, 0x0780);
const QUEUE_SIZE: u16 = 64;
/// Receive and transmit queue.
const QUEUES: usize = 2;
/// Bytes of a request that are printed; Linux has at most a page in one.
const MOST: usize = 64 << 10;

/// The device.
pub(crate) struct VirtioConsole(Workers);

/// Where what is typed goes in.
pub(crate) struct Typed(PipeWriter);

impl Typed {
    /// Bytes for the guest; returns how many there was room for.
    pub(crate) fn receive(&self, bytes: &[u8]) -> usize {
        (&self.0).write(bytes).unwrap_or(0)
    }
}

impl VirtioConsole {
    /// A console that prints to `output`.
    ///
    /// # Errors
    /// No more threads or descriptors.
    pub(crate) fn new(output: Output, memory: &Arc<GuestMemory>) -> Result<(Self, Typed), StartError> {
        let memory = memory.for_rings().map_err(GuestMemoryError::from)?;
        let (serve, typed) = Self::servers(output).map_err(StartError::Device)?;
        let workers = Workers::new("console", &memory, serve).map_err(StartError::Device)?;
        Ok((Self(workers), typed))
    }

    /// What works on its queues.
    ///
    /// # Errors
    /// No more descriptors.
    pub(crate) fn servers(output: Output) -> io::Result<(Vec<impl Serve>, Typed)> {
        let (typed, into) = std::io::pipe()?;
        for end in [typed.as_fd(), into.as_fd()] {
            fcntl(end, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        }
        Ok((vec![Server::Receive(Some(typed)), Server::Transmit(output)], Typed(into)))
    }
}

impl VirtioDevice for VirtioConsole {
    fn kind(&self) -> (u16, u16) {
        KIND
    }

    fn features(&self) -> u64 {
        features::VERSION_1 | features::RING_INDIRECT_DESC | features::RING_EVENT_IDX
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; QUEUES]
    }

    /// Size, ports and emergency output (5.3.4) are there with features that are not offered.
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

/// What works on one of the queues.
enum Server {
    /// `None`: nothing will be typed any more.
    Receive(Option<PipeReader>),
    Transmit(Output),
}

impl Serve for Server {
    const KIND: ThreadKind = ThreadKind::Queue;

    fn start(&mut self, _: u64) {}

    fn serve(&mut self, mut request: Request<'_>) -> Served {
        match self {
            Server::Transmit(output) => {
                let mut buffer = [0; 1024];
                let mut left = request.readable.len().min(MOST as u64) as usize;
                while left > 0 {
                    let bytes = buffer.get_mut(..left.min(1024)).unwrap_or_default();
                    request.readable.read(bytes);
                    // It takes all, and counts what it has no room for.
                    let _ = output.write(bytes);
                    left -= bytes.len();
                }
                Served::Done(0)
            }
            Server::Receive(typed) => {
                let pieces = request.writable.pieces();
                if pieces.is_empty() {
                    return Served::Done(0);
                }
                let Some(pipe) = typed else { return Served::Kept };
                // SAFETY: the pieces lie in guest memory that is mapped while the request is borrowed; the kernel writes
                // there.
                let got =
                    unsafe { libc::readv(pipe.as_raw_fd(), pieces.as_ptr(), pieces.len() as libc::c_int) };
                match u32::try_from(got) {
                    Ok(0) => *typed = None,
                    Ok(got) => return Served::Done(got),
                    Err(_) if io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock => {}
                    Err(_) => *typed = None,
                }
                Served::Kept
            }
        }
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Server::Receive(typed) => typed.as_ref().map(AsFd::as_fd),
            Server::Transmit(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console::Console;
    use crate::test_driver::{DATA, Driver};

    #[test]
    fn what_is_printed_arrives_and_what_is_typed_waits_for_a_buffer() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (console, output) = Console::new(Box::new(file.reopen().unwrap()), &Arc::default()).unwrap();
        let mut driver = Driver::new();
        let (mut device, typed) = VirtioConsole::new(output, driver.memory()).unwrap();
        device.activate(driver.activation(&[1], features::VERSION_1));
        driver.write(DATA, b"Hello, world");
        assert_eq!(driver.chain(&[(DATA, 5, false), (DATA + 5, 7, false)]), 0);
        assert_eq!(driver.chain(&[(DATA, 5, true)]), 0, "nothing to print");
        device.reset();
        driver.until("let go", |_| device.is_reset());

        device.activate(driver.activation(&[0], features::VERSION_1));
        assert_eq!(driver.chain(&[(DATA, 5, false)]), 0, "no room to type");
        driver.put(&[(DATA, 4, true), (DATA + 8, 100, true)]);
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!(driver.used(), 1, "kept until something is typed");
        assert_eq!(typed.receive(b"abcdef"), 6);
        assert_eq!(driver.wait(), 6);
        assert_eq!((driver.read(DATA, 4), driver.read(DATA + 8, 3)), (b"abcd".to_vec(), b"efl".to_vec()));
        let full = std::iter::repeat_with(|| typed.receive(&[0; 4096])).take(100).filter(|n| *n == 0).count();
        assert!(full > 0, "nobody waits for a guest that does not read");
        device.reset();
        driver.until("let go of a kept buffer", |_| device.is_reset());
        drop(device);
        console.close();
        assert_eq!(std::fs::read(file.path()).unwrap(), b"Hello, world");
    }

    #[test]
    fn a_buffer_is_kept_when_nobody_types_any_more() {
        let (console, output) = Console::new(Box::new(io::sink()), &Arc::default()).unwrap();
        let mut driver = Driver::new();
        let (mut device, typed) = VirtioConsole::new(output, driver.memory()).unwrap();
        device.activate(driver.activation(&[0], features::VERSION_1));
        driver.put(&[(DATA, 4, true)]);
        drop(typed);
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!(driver.used(), 0);
        device.reset();
        driver.until("let go", |_| device.is_reset());
        drop(device);
        console.close();
    }
}
