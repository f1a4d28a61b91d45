//! Room for frames that cannot be copied straight from sender to receiver, because the sender left work undone.
//!
//! One per worker, allocated once. Its budget bounds what one burst may cost: a guest that sends 64 KiB frames to be cut into
//! one-byte segments gets no more of the worker's time than others.

use crate::MAX_FRAME;

/// Segments that may be cut for one burst.
const SEGMENTS: u32 = 1024;

/// Bytes that may be gathered or cut for one burst: eight of the largest frames.
const BYTES: u32 = 8 * 65_536;

/// A worker's private memory for software segmentation and checksums.
pub struct Scratch {
    /// Where a frame is gathered.
    pub frame: Box<[u8]>,
    /// Where a segment is put together.
    pub segment: Box<[u8]>,
    segments: u32,
    bytes: u32,
}

impl Default for Scratch {
    fn default() -> Self {
        let room = || vec![0; MAX_FRAME as usize + 128].into();
        Self { frame: room(), segment: room(), segments: SEGMENTS, bytes: BYTES }
    }
}

impl Scratch {
    /// A new burst: the budget is whole again.
    #[inline(always)]
    pub fn refill(&mut self) {
        self.segments = SEGMENTS;
        self.bytes = BYTES;
    }

    /// Takes `segments` segments and `bytes` bytes from the budget, or nothing if it does not hold them.
    #[must_use]
    pub fn spend(&mut self, segments: u32, bytes: u32) -> bool {
        let (Some(s), Some(b)) = (self.segments.checked_sub(segments), self.bytes.checked_sub(bytes)) else {
            return false;
        };
        (self.segments, self.bytes) = (s, b);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_that_is_spent_stays_spent_until_the_next_burst() {
        let mut scratch = Scratch::default();
        assert!(scratch.spend(SEGMENTS, 1));
        assert!(!scratch.spend(1, 1) && scratch.spend(0, BYTES - 1) && !scratch.spend(0, 1));
        scratch.refill();
        assert!(scratch.spend(SEGMENTS, BYTES));
    }
}
