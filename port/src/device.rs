//! What the driver of a network device does for a port: the half of the contract below all policy.
//!
//! A [`Source`] lends frames out of buffers that the driver owns, a [`Sink`] takes them one by one. Counting, judging, tags and
//! unfinished checksums are the business of whoever makes a [`crate::RxQueue`] and a [`crate::TxQueue`] of them. Neither ever
//! waits: where the kernel or the hardware has nothing, or no room, they say so.

use std::io;
use std::os::fd::BorrowedFd;

use crate::{Frame, Offload, Segment};

/// Where a device's frames come from: one receive queue.
pub trait Source {
    /// How many frames are here, at most `limit`; fetches them if it takes a system call to know.
    ///
    /// # Errors
    /// The device is gone, or was never meant for this; it is not asked again.
    fn look(&mut self, limit: usize) -> io::Result<usize>;

    /// Describes the frames that [`Self::look`] found, oldest first, and returns how many. Each is one run of bytes
    /// (`first_len` is `len`), which stays as it is until [`Self::take_back`].
    fn lend(&mut self, frames: &mut [Frame]) -> usize;

    /// The frames lent last are not looked at any more.
    fn take_back(&mut self);

    /// Its worker is about to sleep: what comes from now on must make the waker readable anew.
    fn before_sleep(&mut self) {}

    /// Becomes readable when frames come in; `None`: none ever will.
    fn waker(&self) -> Option<BorrowedFd<'_>>;
}

/// Why a device did not take a frame.
#[derive(Debug)]
pub enum PutError {
    /// It has no room now.
    Full,
    /// It is switched off.
    Down,
    /// It has no use for this one.
    Refused,
    /// It is gone; it is not given anything any more.
    Gone(io::Error),
}

/// Where a device's frames go: one transmit queue.
pub trait Sink {
    /// Takes one frame of `len` bytes that lies in `pieces`, in order, and asks for `offload` to be done. When it returns, the
    /// pieces are not looked at any more.
    ///
    /// # Errors
    /// Why not. Nothing of the frame goes out then.
    fn put(
        &mut self,
        offload: Offload,
        len: usize,
        pieces: impl Iterator<Item = Segment>,
    ) -> Result<(), PutError>;

    /// What was put may wait no longer.
    ///
    /// # Errors
    /// The device is gone.
    fn flush(&mut self) -> io::Result<()>;
}
