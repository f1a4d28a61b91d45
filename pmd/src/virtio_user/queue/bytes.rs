//! What is in a buffer that the caller holds: bytes, length, header.

use virtio::memory::copy::{copy, prefetch_read, read_net_header, write_net_header};
use virtio::net::NetHeader;

use super::QueuePair;
use crate::virtio_user::buffer::Buffer;
use crate::virtio_user::memory::HEADROOM;

impl QueuePair {
    /// Bytes that the buffer can hold.
    #[inline(always)]
    pub fn capacity(&self, b: &Buffer) -> usize {
        self.buffers.size as usize - usize::from(b.offset)
    }

    /// Makes the frame's part in this buffer `len` bytes long, or as many as fit.
    #[inline]
    pub fn set_len(&self, b: &mut Buffer, len: usize) {
        b.len = len.min(self.capacity(b)) as u32;
    }

    /// The `len` bytes at `offset` of the frame's part in this buffer.
    #[inline(always)]
    fn bytes_at(&self, b: &Buffer, offset: usize, len: usize) -> *mut u8 {
        assert!(b.owner == self.owner, "a buffer of another device");
        let end = offset.checked_add(len);
        assert!(
            end.is_some_and(|end| end <= self.capacity(b)),
            "{len} bytes at {offset} are outside the buffer"
        );
        self.buffers.ptr(b.index).wrapping_add(usize::from(b.offset) + offset)
    }

    /// Copies bytes out, from `offset` of the frame's part in this buffer. What lies behind its length is unspecified.
    ///
    /// # Panics
    /// The range lies outside the buffer, or the buffer belongs to another device.
    #[inline(always)]
    pub fn read(&self, b: &Buffer, offset: usize, to: &mut [u8]) {
        let from = self.bytes_at(b, offset, to.len());
        // SAFETY: the range is inside the buffer (`bytes_at`), which the memory keeps mapped; the copy is in assembly, so a
        // back end that writes meanwhile changes only what is read.
        unsafe { copy(to.as_mut_ptr(), from, to.len()) }
    }

    /// Copies bytes in, at `offset` of the frame's part in this buffer. Does not change its length.
    ///
    /// # Panics
    /// As [`QueuePair::read`].
    #[inline(always)]
    pub fn write(&mut self, b: &mut Buffer, offset: usize, from: &[u8]) {
        let to = self.bytes_at(b, offset, from.len());
        // SAFETY: as in `read`; `b` is held exclusively, so nobody on this side reads the bytes meanwhile.
        unsafe { copy(to, from.as_ptr(), from.len()) }
    }

    /// Exchanges the Ethernet source and destination addresses.
    #[inline]
    pub fn swap_macs(&mut self, b: &mut Buffer) {
        let mut macs = [0u8; 12];
        self.read(b, 0, &mut macs);
        macs.rotate_left(6);
        self.write(b, 0, &macs);
    }

    /// Starts fetching the first bytes of the frame.
    #[inline(always)]
    pub fn prefetch(&self, b: &Buffer) {
        prefetch_read(self.buffers.ptr(b.index).wrapping_add(HEADROOM));
    }

    /// The virtio-net header of a frame that was received: what the sender left undone. Meaningful for the first buffer of
    /// a frame.
    #[inline]
    pub fn header(&self, b: &Buffer) -> NetHeader {
        assert!(b.owner == self.owner, "a buffer of another device");
        let mut header = NetHeader::PLAIN;
        let len = usize::from(self.header_len);
        let from = self.buffers.ptr(b.index).wrapping_add(usize::from(b.offset) - len);
        // SAFETY: the header lies in the headroom; `len` is at most `HEADER_LEN`.
        unsafe { copy(header.0.as_mut_ptr(), from, len) };
        header
    }

    /// Sets the virtio-net header with which the frame is transmitted. Without this it goes out whole: nothing to segment, no
    /// checksum to fill in.
    #[inline]
    pub fn set_header(&mut self, b: &mut Buffer, header: NetHeader) {
        assert!(b.owner == self.owner, "a buffer of another device");
        let len = usize::from(self.header_len);
        let to = self.buffers.ptr(b.index).wrapping_add(usize::from(b.offset) - len);
        // SAFETY: as in `header`; `b` is held exclusively.
        unsafe { copy(to, header.0.as_ptr(), len) };
        b.header_set = true;
    }
}

/// `num_buffers` of the 12-byte header that ends where the frame begins.
///
/// # Safety
/// `buffer` is the first byte of a mapped packet buffer.
#[inline(always)]
pub(super) unsafe fn num_buffers(buffer: *const u8) -> u16 {
    let at = buffer.wrapping_add(HEADROOM - 2).cast::<u16>();
    // SAFETY: 2 bytes of the headroom, which is mapped; buffers are aligned to 64.
    u16::from_le(unsafe { at.read_volatile() })
}

/// Zeroes the header unless its first ten bytes are zero. `num_buffers` means nothing on a transmit ring and is left as the
/// back end set it: to clear it, only for the back end to set it again, would move the line across twice a frame.
///
/// # Safety
/// `len` (10 or 12) bytes at `header` are mapped, in a packet buffer that the caller holds.
#[inline(always)]
pub(super) unsafe fn clear_header(header: *mut u8, len: u16) {
    // SAFETY: `len` bytes (caller); both are assembly, so that the back end may write at the same time.
    unsafe {
        if read_net_header(header) != (0, 0) {
            write_net_header(header, 0, 0, 0, usize::from(len));
        }
    }
}
