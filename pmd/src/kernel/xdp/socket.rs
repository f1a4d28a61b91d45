//! An AF_XDP socket and the memory behind it: the calls that move frames along, and who has which chunk.
//!
//! Owns the descriptor and the book of chunks. Every call returns at once.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use host::memory::SharedMemory;
use libc::xdp_statistics;

use crate::kernel::interface::check;

/// Bytes of a chunk: one frame's room. The most that the kernel takes: a page.
pub(super) const CHUNK: usize = 4096;

/// Bytes that the kernel keeps free before a received frame (XDP_PACKET_HEADROOM).
const HEADROOM: usize = 256;

/// The longest frame that the kernel gives.
pub(super) const LONGEST: usize = CHUNK - HEADROOM;

/// How often one burst calls the kernel: it sends 32 frames a call, of at most 64.
const CALLS: usize = 4;

/// The socket.
pub(super) struct Socket {
    fd: OwnedFd,
    /// Frames are left in the transmit ring: the kernel had no room.
    unsent: AtomicBool,
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Socket {
    pub(super) fn new() -> io::Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // SAFETY: no memory is involved.
        let fd = unsafe { libc::socket(libc::AF_XDP, kind, 0) };
        check(fd)?;
        // SAFETY: just opened, and nobody else's.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { fd, unsent: AtomicBool::new(false) })
    }

    /// Fails if the interface is gone or down.
    pub(super) fn alive(&self) -> io::Result<()> {
        let error = match self.receive() {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        if gone(&error) { Err(error) } else { Ok(()) }
    }

    /// The driver looks for buffers to fill again.
    pub(super) fn fill_again(&self) {
        // What is wrong is found by `alive`.
        let _ = self.receive();
    }

    fn receive(&self) -> io::Result<()> {
        let nothing = std::ptr::null_mut();
        let (len, flags) = (0, libc::MSG_DONTWAIT);
        // SAFETY: no memory is involved.
        let called = unsafe {
            libc::recvfrom(self.fd.as_raw_fd(), nothing, len, flags, nothing.cast(), nothing.cast())
        };
        if called < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// The kernel sends what is in the transmit ring; `waiting` says how much that is.
    ///
    /// # Errors
    /// The interface is gone or down, or `waiting` fails.
    pub(super) fn send(&self, waiting: impl Fn() -> io::Result<u32>) -> io::Result<()> {
        let mut calls = 0;
        while waiting()? > 0 && calls < CALLS {
            calls += 1;
            match self.call_send() {
                Ok(()) => {}
                // A call sends a part.
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
                Err(error) if passes(&error) => break,
                Err(error) => return Err(error),
            }
        }
        self.unsent.store(waiting()? > 0, Ordering::Relaxed);
        Ok(())
    }

    pub(super) fn has_unsent(&self) -> bool {
        self.unsent.load(Ordering::Relaxed)
    }

    /// The kernel tries again; the next burst knows what became of it.
    pub(super) fn send_rest(&self) {
        if self.call_send().is_ok() {
            self.unsent.store(false, Ordering::Relaxed);
        }
    }

    fn call_send(&self) -> io::Result<()> {
        let (nothing, len, flags) = (std::ptr::null(), 0, libc::MSG_DONTWAIT);
        // SAFETY: no memory is involved.
        let called = unsafe { libc::sendto(self.fd.as_raw_fd(), nothing, len, flags, std::ptr::null(), 0) };
        if called < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// What the kernel counted.
    pub(super) fn statistics(&self) -> io::Result<xdp_statistics> {
        self.option(libc::XDP_STATISTICS)
    }

    /// Reads an option. One that an older kernel knows shorter is filled up with zeros.
    pub(super) fn option<T: Plain>(&self, option: libc::c_int) -> io::Result<T> {
        let mut len = size_of::<T>() as libc::socklen_t;
        // SAFETY: plain numbers, for which zeros are valid.
        let mut value: T = unsafe { std::mem::zeroed() };
        // SAFETY: the option writes at most `len` bytes of a value that outlives the call.
        check(unsafe {
            let to = (&raw mut value).cast();
            libc::getsockopt(self.fd.as_raw_fd(), libc::SOL_XDP, option, to, &raw mut len)
        })?;
        Ok(value)
    }

    /// Any socket, for tests that call no kernel.
    #[cfg(test)]
    pub(super) fn of_test() -> Self {
        let (fd, _) = std::os::unix::net::UnixDatagram::pair().unwrap();
        Self { fd: fd.into(), unsent: AtomicBool::new(false) }
    }
}

/// Numbers only: any bytes are a value.
///
/// # Safety
/// It is true.
pub(super) unsafe trait Plain {}
// SAFETY: `u64`s.
unsafe impl Plain for xdp_statistics {}
// SAFETY: `u64`s.
unsafe impl Plain for libc::xdp_mmap_offsets {}
// SAFETY: a `u32`.
unsafe impl Plain for libc::xdp_options {}

/// Whether an error says that there is no interface any more, or that it is down (net/xdp/xsk.c, `xsk_check_common`).
fn gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENETDOWN | libc::ENXIO | libc::ENODEV))
}

/// Whether an error of sending says that there is no room now.
fn passes(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBUSY | libc::ENOBUFS | libc::ENOMEM | libc::EINTR))
}

/// A run of chunks of the memory, for one direction, and which of them the kernel has.
pub(super) struct Chunks {
    memory: Arc<SharedMemory>,
    first: u32,
    with_kernel: Box<[bool]>,
}

impl Chunks {
    /// `count` chunks from number `first`; the memory has as many.
    pub(super) fn new(memory: Arc<SharedMemory>, first: u32, count: u32) -> Self {
        debug_assert!((first + count) as usize * CHUNK <= memory.len());
        Self { memory, first, with_kernel: vec![false; count as usize].into() }
    }

    pub(super) fn numbers(&self) -> Range<u32> {
        0..self.with_kernel.len() as u32
    }

    /// Where a chunk begins, as the kernel knows it.
    #[inline(always)]
    pub(super) fn address(&self, chunk: u32) -> u64 {
        u64::from(self.first + chunk) * CHUNK as u64
    }

    /// Where a chunk begins.
    #[inline(always)]
    pub(super) fn ptr(&self, chunk: u32) -> *mut u8 {
        // Numbers come from `numbers` and `take_back`: the chunk is part of the memory.
        self.memory.as_ptr().wrapping_add((self.first + chunk) as usize * CHUNK)
    }

    /// The kernel has it from now on.
    #[inline(always)]
    pub(super) fn give(&mut self, chunk: u32) {
        if let Some(with_kernel) = self.with_kernel.get_mut(chunk as usize) {
            *with_kernel = true;
        }
    }

    /// The chunk that `address` lies in, if the kernel had it. It is ours from now on.
    #[inline(always)]
    pub(super) fn take_back(&mut self, address: u64) -> Option<u32> {
        let chunk = u32::try_from(address / CHUNK as u64).ok()?.checked_sub(self.first)?;
        let with_kernel = self.with_kernel.get_mut(chunk as usize)?;
        std::mem::take(with_kernel).then_some(chunk)
    }

    /// In memory of their own.
    #[cfg(test)]
    pub(super) fn of_test(first: u32, count: u32) -> Self {
        use host::memory::Pages;
        let memory = SharedMemory::new((first + count) as usize * CHUNK, Pages::Ordinary, None).unwrap();
        Self::new(Arc::new(memory), first, count)
    }
}
