//! A burst: frames lent by a receive queue, with a private copy of the first bytes of each.
//!
//! Owns no packet memory: a [`Frame`] points into the memory of the port it came in on, which may be rewritten by its
//! owner at any time. Whoever copies from it treats the bytes as untrusted, and takes the first [`HEAD`] bytes from the
//! private copy, so that what was judged is what is sent.

use crate::{DropReason, Gso, MAX_FRAME, Offload};

/// Bytes of each frame that are copied before it is judged: Ethernet, two VLAN tags, IPv6 and the ports of TCP or UDP.
pub const HEAD: usize = 64;

/// The largest burst: one bit each in a [`FrameSet`].
pub const MAX_BURST: usize = 64;

/// Segments beyond the first that the frames of one burst may have together.
pub const MAX_SEGMENTS: usize = 1024;

/// Shortest frame: an Ethernet header.
pub const MIN_FRAME: u32 = 14;

/// Longest frame that is not left for segmentation: jumbo with two VLAN tags.
const MAX_WHOLE: u32 = 9_216 + 8;

/// The private copy of a frame's first bytes. Bytes past the frame's end are zero.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Head(pub [u8; HEAD]);

/// A contiguous piece of a frame in the sender's memory: `len` bytes at `ptr`, mapped for as long as the burst lives,
/// changeable by the sender at any time.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// First byte.
    pub ptr: *const u8,
    /// Length in bytes, never 0.
    pub len: u32,
}

/// One frame of a burst, as its receive queue described it. All lengths exclude the FCS and the virtio-net header.
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    /// The frame's first bytes: at least `min(len, first_len)` of them lie here.
    pub ptr: *const u8,
    /// Bytes at `ptr`; the rest of the frame is in `more` segments of the burst.
    pub first_len: u32,
    /// The whole frame's length in bytes.
    pub len: u32,
    /// Index of the second segment in the burst's table.
    pub more_at: u16,
    /// Number of segments after the first.
    pub more: u16,
    /// What the sender left undone: checksum, segmentation.
    pub offload: Offload,
}

impl Frame {
    /// A frame of no bytes; what an unused slot of a [`BurstBuffer`] holds.
    pub const EMPTY: Frame =
        Frame { ptr: std::ptr::null(), first_len: 0, len: 0, more_at: 0, more: 0, offload: Offload::NONE };

    /// Whether this can be a frame. What its sender left undone is checked here, once, against the frame that it is about.
    ///
    /// # Errors
    /// The reason under which it is dropped.
    #[inline(always)]
    pub fn check(&mut self) -> Result<(), DropReason> {
        if self.len < MIN_FRAME {
            return Err(DropReason::Runt);
        }
        if self.offload.is_none() {
            self.offload = Offload::NONE;
            return if self.len <= MAX_WHOLE { Ok(()) } else { Err(DropReason::Oversize) };
        }
        self.offload.check(self.len).map_err(|_| DropReason::BadOffload)?;
        let segmented = self.offload.gso().is_ok_and(|g| g != Gso::None);
        if self.len <= if segmented { MAX_FRAME } else { MAX_WHOLE } {
            Ok(())
        } else {
            Err(DropReason::Oversize)
        }
    }
}

/// A set of frames of one burst, by index.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrameSet(pub u64);

impl FrameSet {
    /// No frame.
    pub const EMPTY: FrameSet = FrameSet(0);

    /// The first `n` frames (`n` at most [`MAX_BURST`]).
    #[inline(always)]
    pub fn first(n: usize) -> Self {
        if n >= MAX_BURST { FrameSet(u64::MAX) } else { FrameSet((1 << n) - 1) }
    }

    /// Adds frame `i`.
    #[inline(always)]
    pub fn insert(&mut self, i: usize) {
        self.0 |= 1 << i;
    }

    /// Removes frame `i`.
    #[inline(always)]
    pub fn remove(&mut self, i: usize) {
        self.0 &= !(1 << i);
    }

    /// Whether frame `i` is in the set.
    #[inline(always)]
    pub fn contains(self, i: usize) -> bool {
        self.0 >> i & 1 == 1
    }

    /// How many frames.
    #[inline(always)]
    pub fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// Whether there is none.
    #[inline(always)]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The frames of both sets.
    #[inline(always)]
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        FrameSet(self.0 & other.0)
    }

    /// The frames of this set that are not in `other`.
    #[inline(always)]
    #[must_use]
    pub fn without(self, other: Self) -> Self {
        FrameSet(self.0 & !other.0)
    }
}

impl Iterator for FrameSet {
    type Item = usize;

    /// Takes the lowest index out of the set.
    #[inline(always)]
    fn next(&mut self) -> Option<usize> {
        if self.0 == 0 {
            return None;
        }
        let i = self.0.trailing_zeros() as usize;
        self.0 &= self.0 - 1;
        Some(i)
    }
}

/// Where a worker keeps the burst at hand. One per worker, allocated once, reused for every poll.
pub struct BurstBuffer {
    /// Private heads, one per frame.
    pub heads: Box<[Head; MAX_BURST]>,
    /// Frames, in the order in which they came in.
    pub frames: Box<[Frame; MAX_BURST]>,
    /// Segments after the first, of all frames.
    pub segments: Box<[Segment; MAX_SEGMENTS]>,
}

// SAFETY: the pointers in frames and segments are only meaningful inside a `Burst`, which cannot leave the poll that made
// it; between polls the buffer is plain data.
unsafe impl Send for BurstBuffer {}

impl Default for BurstBuffer {
    fn default() -> Self {
        Self {
            heads: Box::new([Head([0; HEAD]); MAX_BURST]),
            frames: Box::new([Frame::EMPTY; MAX_BURST]),
            segments: Box::new([Segment { ptr: std::ptr::null(), len: 0 }; MAX_SEGMENTS]),
        }
    }
}

/// What a receive queue does when a burst ends: the frames go back to their sender, in one publish.
pub trait Release {
    /// Returns the burst's frames to the sender. All memory writes before it are ordered before all reads after it, so that
    /// those to whom the frames were sent can be notified at the price of one fence for all.
    fn release(&mut self);

    /// Counts the frames of `set` (`bytes` in all) as dropped on the way in.
    fn dropped(&mut self, set: FrameSet, reason: DropReason);
}

/// Lends frames of the caller's own making, which nobody wants back.
pub struct Nobody;

impl Release for Nobody {
    fn release(&mut self) {}
    fn dropped(&mut self, _: FrameSet, _: DropReason) {}
}

/// Frames lent by a receive queue; released when dropped.
pub struct Burst<'q> {
    queue: &'q mut dyn Release,
    buffer: &'q BurstBuffer,
    len: usize,
}

impl<'q> Burst<'q> {
    /// The first `len` frames of `buffer`, lent by `queue`.
    #[inline(always)]
    pub fn new(queue: &'q mut dyn Release, buffer: &'q BurstBuffer, len: usize) -> Self {
        debug_assert!(len <= MAX_BURST);
        Self { queue, buffer, len: len.min(MAX_BURST) }
    }

    /// Number of frames.
    #[inline(always)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing came in.
    #[inline(always)]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All frames.
    #[inline(always)]
    pub fn all(&self) -> FrameSet {
        FrameSet::first(self.len)
    }

    /// The frames, in order of arrival.
    #[inline(always)]
    pub fn frames(&self) -> &[Frame] {
        // `len` is at most MAX_BURST (see `new`): the bound is known here, the check costs nothing per frame.
        &self.buffer.frames[..self.len]
    }

    /// The private heads, one per frame.
    #[inline(always)]
    pub fn heads(&self) -> &[Head] {
        &self.buffer.heads[..self.len]
    }

    /// The segments of `frame` after its first.
    #[inline(always)]
    pub fn more(&self, frame: &Frame) -> &[Segment] {
        let at = usize::from(frame.more_at);
        self.buffer.segments.get(at..at + usize::from(frame.more)).unwrap_or_default()
    }

    /// Counts the frames of `set` as dropped for `reason`. They are released with the burst, and not sent by anyone.
    #[inline(always)]
    pub fn drop_frames(&mut self, set: FrameSet, reason: DropReason) {
        if !set.is_empty() {
            self.queue.dropped(set, reason);
        }
    }

    /// Returns the frames to their sender now.
    #[inline(always)]
    pub fn release(self) {}
}

impl Drop for Burst<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        if self.len > 0 {
            self.queue.release();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Counting(usize, usize);
    impl Release for Counting {
        fn release(&mut self) {
            self.0 += 1;
        }
        fn dropped(&mut self, set: FrameSet, _: DropReason) {
            self.1 += set.len();
        }
    }

    #[test]
    fn a_set_yields_its_frames_in_order_of_arrival() {
        let mut set = FrameSet::EMPTY;
        for i in [63, 0, 17] {
            set.insert(i);
        }
        assert_eq!(set.collect::<Vec<_>>(), [0, 17, 63]);
        assert_eq!(FrameSet::first(64).len(), 64);
        assert_eq!(FrameSet::first(3).0, 7);
    }

    #[test]
    fn a_burst_is_released_once_when_dropped_and_an_empty_one_never() {
        let buffer = BurstBuffer::default();
        let mut queue = Counting(0, 0);
        let mut burst = Burst::new(&mut queue, &buffer, 5);
        burst.drop_frames(FrameSet(0b101), DropReason::Hairpin);
        burst.release();
        drop(Burst::new(&mut queue, &buffer, 0));
        assert_eq!((queue.0, queue.1), (1, 2));
    }
}
