//! How one learnt address is packed into two 64-bit words.
//!
//! The *key* word is the address and its VLAN, or [`EMPTY`], or [`CLAIMED`] while an entry is being written. The *value*
//! word is everything else. Each is read and written whole.

use super::super::mac::{self, Mac};

/// The key word of a slot that holds nothing.
pub(super) const EMPTY: u64 = 0;
/// The key word of a slot that its new owner is about to fill; equal to no [`Key`].
pub(super) const CLAIMED: u64 = 1 << 62;

const VALID: u64 = 1 << 63;

/// An address in a VLAN (0 where VLANs are not looked at).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key(pub(super) u64);

impl Key {
    /// `mac` in VLAN `vid`, of which the low 12 bits count.
    pub fn new(mac: Mac, vid: u16) -> Self {
        Self::from_wire(mac.wire(), vid)
    }

    /// From six bytes of a frame, as a little-endian load gives them.
    #[inline(always)]
    pub(in super::super) fn from_wire(wire: u64, vid: u16) -> Self {
        Self(wire & mac::MASK | u64::from(vid & 0xfff) << 48 | VALID)
    }

    /// The address.
    pub fn mac(self) -> Mac {
        Mac::from_wire(self.0)
    }

    /// The VLAN.
    pub fn vid(self) -> u16 {
        (self.0 >> 48) as u16 & 0xfff
    }

    /// The key in a slot's key word, if it holds one.
    pub(super) fn from_word(word: u64) -> Option<Self> {
        (word & VALID != 0).then_some(Self(word))
    }
}

/// The value word: bits 0..16 port, 16 static, 17 chain mark (of the bucket, not of the entry), 18..32 generation of the slot,
/// 32..64 the second in which it was last seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Value(pub(super) u64);

const STATIC: u64 = 1 << 16;
const GENERATION: u64 = 0x3fff << 18;

impl Value {
    /// What a look-up without a branch gives for an address that is not there: no port has this number.
    pub(in super::super) const ABSENT: Self = Self(0xffff);

    /// In the first slot of a bucket: entries that belong here may also lie in the next bucket.
    pub(super) const CHAINED: u64 = 1 << 17;

    /// A slot's value for its next owner: the generation goes on, the chain mark stays.
    pub(super) fn next_owner(self, port: u16, fixed: bool, seen: u32) -> Self {
        let generation = (self.0 & GENERATION).wrapping_add(1 << 18) & GENERATION;
        let kept = self.0 & Self::CHAINED;
        Self(u64::from(port) | if fixed { STATIC } else { 0 } | kept | generation | u64::from(seen) << 32)
    }

    /// The same slot owner, at `port`, seen at `seen`.
    pub(super) fn seen_at(self, port: u16, seen: u32) -> Self {
        Self(self.0 & 0xffff_0000 | u64::from(port) | u64::from(seen) << 32)
    }

    /// The same slot owner, made static at `port`.
    pub(super) fn fixed_at(self, port: u16) -> Self {
        Self(self.0 & !0xffff | u64::from(port) | STATIC)
    }

    /// Whether both were read from one owner of the slot.
    #[inline(always)]
    pub(super) fn same_owner(self, other: Self) -> bool {
        (self.0 ^ other.0) & GENERATION == 0
    }

    /// Whether the entry is at `port` and was seen in second `now`: nothing to write.
    #[inline(always)]
    pub(in super::super) fn is_fresh_at(self, port: u16, now: u32) -> bool {
        self.0 & 0xffff_ffff_0000_ffff == (u64::from(port) | u64::from(now) << 32)
    }

    /// The port it was learnt on, or was given to.
    #[inline(always)]
    pub fn port(self) -> u16 {
        self.0 as u16
    }

    /// Whether the configuration put it there: it never moves and never ages.
    pub fn is_static(self) -> bool {
        self.0 & STATIC != 0
    }

    /// The second in which a frame from it was last seen.
    pub fn seen(self) -> u32 {
        (self.0 >> 32) as u32
    }
}
