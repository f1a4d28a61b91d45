//! Pieces of guest memory that a request consists of, or of our own in between.
//!
//! Owns the arithmetic on them; every byte is read or written at most as often as it is asked for, and only within what the
//! ring checked. Never knows what the bytes mean.

use std::marker::PhantomData;

use virtio::device::{Buffer, Stock};
use virtio::memory::copy::copy;

/// Bytes of guest memory in several pieces, while the ring that they came from is borrowed.
#[derive(Default)]
pub(crate) struct Buffers<'r> {
    pieces: Vec<libc::iovec>,
    ring: PhantomData<&'r Stock>,
}

/// A chain: what the driver wrote for the device to read, and where the device may answer.
pub(crate) struct Request<'r> {
    pub(crate) readable: Buffers<'r>,
    pub(crate) writable: Buffers<'r>,
}

impl<'r> Request<'r> {
    /// The oldest chain in stock.
    pub(crate) fn oldest(stock: &'r Stock) -> Self {
        let (readable, writable) = stock.request(0);
        Self { readable: Buffers::new(readable), writable: Buffers::new(writable) }
    }
}

/// Memory of our own that is aligned for any device.
#[derive(Clone)]
#[repr(align(4096))]
pub(crate) struct Page(pub(crate) [u8; Page::LEN]);

impl Page {
    pub(crate) const LEN: usize = 4096;
}

impl<'r> Buffers<'r> {
    /// The first `length` bytes of `pages`, for as long as they are borrowed.
    pub(crate) fn of_pages(pages: &'r mut [Page], length: u64) -> Self {
        let piece =
            |page: &mut Page| libc::iovec { iov_base: page.0.as_mut_ptr().cast(), iov_len: Page::LEN };
        Self { pieces: pages.iter_mut().map(piece).collect(), ring: PhantomData }.take(length)
    }

    fn new(buffers: impl Iterator<Item = Buffer>) -> Self {
        let piece = |b: Buffer| libc::iovec { iov_base: b.ptr.cast(), iov_len: b.len as usize };
        Self { pieces: buffers.map(piece).collect(), ring: PhantomData }
    }

    /// Bytes; a chain has fewer than 4 GiB.
    pub(crate) fn len(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.iov_len as u64).sum()
    }

    /// Takes the first `bytes` off, or all if there are fewer.
    pub(crate) fn take(&mut self, bytes: u64) -> Buffers<'r> {
        let mut left = bytes;
        let mut taken = Vec::new();
        while let Some(piece) = self.pieces.first_mut().filter(|_| left > 0) {
            let n = (piece.iov_len as u64).min(left) as usize;
            taken.push(libc::iovec { iov_base: piece.iov_base, iov_len: n });
            left -= n as u64;
            if n < piece.iov_len {
                piece.iov_base = piece.iov_base.wrapping_byte_add(n);
                piece.iov_len -= n;
            } else {
                self.pieces.remove(0);
            }
        }
        Buffers { pieces: taken, ring: PhantomData }
    }

    /// Reads the first bytes into `to`, once. Returns whether there were as many.
    pub(crate) fn read(&mut self, to: &mut [u8]) -> bool {
        let from = self.take(to.len() as u64);
        let whole = from.len() == to.len() as u64;
        let mut at = 0;
        for piece in &from.pieces {
            let Some(to) = to.get_mut(at..at + piece.iov_len) else { return false };
            // SAFETY: the ring checked that the piece lies in guest memory, and its borrow keeps that mapped; `to` is as long.
            unsafe { copy(to.as_mut_ptr(), piece.iov_base.cast(), piece.iov_len) };
            at += piece.iov_len;
        }
        whole
    }

    /// Writes `from` to the first bytes, as far as there is room. Returns how many were written.
    pub(crate) fn write(&mut self, from: &[u8]) -> u32 {
        let to = self.take(from.len() as u64);
        let mut at = 0;
        for piece in &to.pieces {
            let Some(from) = from.get(at..at + piece.iov_len) else { break };
            // SAFETY: as in `read`, the other way round.
            unsafe { copy(piece.iov_base.cast(), from.as_ptr(), piece.iov_len) };
            at += piece.iov_len;
        }
        at as u32
    }

    /// The same, for longer than the ring is borrowed.
    ///
    /// # Safety
    /// What they were made of stays mapped until the last use of them, or of what is taken off them.
    pub(crate) unsafe fn kept(self) -> Buffers<'static> {
        Buffers { pieces: self.pieces, ring: PhantomData }
    }

    /// The pieces, for a system call that reads or writes them.
    pub(crate) fn pieces(&self) -> &[libc::iovec] {
        &self.pieces
    }
}
