//! Handles of packet buffers.
//!
//! A [`Buffer`] is the right to one buffer of a device: whoever holds it is the only one on this side who touches the
//! bytes. The other side is another process that maps the same memory and may misbehave, so the bytes are copied in and out
//! ([`super::QueuePair::read`], [`super::QueuePair::write`]); no reference to them is ever handed out.

/// The right to one packet buffer. Not `Clone`; give it back with [`super::QueuePair::free`] or by transmitting it. A handle
/// that is dropped instead takes its buffer out of circulation.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a buffer that is dropped is lost to its device: transmit or free it"]
pub struct Buffer {
    pub(super) index: u32,
    pub(super) len: u32,
    /// Where the frame's bytes begin in the buffer.
    pub(super) offset: u16,
    pub(super) follows: u16,
    pub(super) owner: u16,
    /// The header was set by the caller and goes out as it is.
    pub(super) header_set: bool,
}

// A burst of 32 is 8 cache lines.
const _: () = assert!(size_of::<Buffer>() == 16);

impl Buffer {
    /// Bytes of the frame in this buffer.
    #[inline(always)]
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// How many buffers after this one, in the same list, belong to the same frame: 0 unless the frame is larger than a
    /// buffer. Only the first buffer of a frame says so.
    #[inline(always)]
    pub fn follows(&self) -> usize {
        usize::from(self.follows)
    }

    /// Makes this buffer the first of a frame that goes on in the next `n` buffers of the list.
    pub fn set_follows(&mut self, n: u16) {
        self.follows = n;
    }
}
