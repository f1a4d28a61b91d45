//! The first bytes of a frame, as a decision needs them.

use super::mac;
use port::Head;

/// The first 16 bytes of a frame: addresses, type, and what may be the rest of a tag.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Lead(pub(super) u64, pub(super) u64);

impl Lead {
    #[inline(always)]
    pub(super) fn of(head: &Head) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, ..] = head.0;
        Self(u64::from_le_bytes([a, b, c, d, e, f, g, h]), u64::from_le_bytes([i, j, k, l, m, n, o, p]))
    }

    #[inline(always)]
    pub(super) fn and(self, bits: Self) -> Self {
        Self(self.0 & bits.0, self.1 & bits.1)
    }

    #[inline(always)]
    pub(super) fn destination(self) -> u64 {
        self.0 & mac::MASK
    }

    #[inline(always)]
    pub(super) fn source(self) -> u64 {
        self.0 >> 48 | (self.1 & 0xffff_ffff) << 16
    }

    #[inline(always)]
    pub(super) fn kind(self) -> u16 {
        (self.1 >> 32) as u16
    }

    #[inline(always)]
    pub(super) fn tci(self) -> u16 {
        (self.1 >> 48) as u16
    }
}
