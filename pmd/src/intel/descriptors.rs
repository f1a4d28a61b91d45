//! What the descriptors of Intel's gigabit cards have in common: the 82574L's extended ones (82574 datasheet 7.1 and 7.2) and the
//! advanced ones of the 82576 (82576 datasheet 7.1.5 and 7.2.2) differ in a few bits, which a [`super::Card`] knows. All are
//! 16 bytes, two little-endian words.
//!
//! What the device writes is read in one load, and only that copy is judged.

use port::Offload;

use super::Card;

/// A descriptor as both sides see it. Accessed with volatile loads and stores only.
#[derive(Clone, Copy)]
#[repr(C, align(16))]
pub(super) struct Descriptor(pub(super) [u64; 2]);

/// Bytes of one.
pub(super) const BYTES: usize = 16;

const _: () = assert!(size_of::<Descriptor>() == BYTES);

/// The second word of a receive descriptor as the device has written it: status and errors, length, VLAN tag.
#[derive(Clone, Copy, Debug)]
pub(super) struct Received(pub(super) u64);

impl Received {
    /// The descriptor is done. Bit 0 of the status.
    const DD: u64 = 1 << 0;
    /// The frame ends here.
    const EOP: u64 = 1 << 1;
    /// A VLAN tag was taken off.
    const VP: u64 = 1 << 3;
    /// The TCP or UDP checksum was calculated.
    const TCPCS: u64 = 1 << 5;
    /// TCP or UDP checksum.
    const TCPE: u64 = 1 << 29;
    /// IP checksum.
    const IPE: u64 = 1 << 30;

    /// Status bits of a whole frame in one descriptor, without errors.
    pub(super) const WHOLE: u64 = Self::DD | Self::EOP;
    /// The bits to look at for that, besides [`super::Card::DAMAGED`].
    pub(super) const WHOLE_MASK: u64 = Self::WHOLE | Self::TCPE | Self::IPE;

    #[inline(always)]
    pub(super) fn done(self) -> bool {
        self.0 & Self::DD != 0
    }

    #[inline(always)]
    pub(super) fn ends(self) -> bool {
        self.0 & Self::EOP != 0
    }

    /// Bytes in this descriptor's buffer, as the device claims.
    #[inline(always)]
    pub(super) fn len(self) -> u32 {
        u32::from((self.0 >> 32) as u16)
    }

    /// The tag that was taken off.
    #[inline(always)]
    pub(super) fn tag(self) -> Option<u16> {
        (self.0 & Self::VP != 0).then_some((self.0 >> 48) as u16)
    }

    /// The error bits, from bit 0.
    pub(super) fn errors(self) -> u8 {
        (self.0 >> 24) as u8
    }

    /// As [`Received::offload`], of a descriptor without errors.
    #[inline(always)]
    pub(super) fn offload_of_whole<C: Card>(self) -> Offload {
        let low = if C::IGNORE_CHECKSUM == 0 {
            self.0 >> 4 & 2
        } else {
            // Of TCPCS (0x20) and IXSM (0x04), the first must be set and the second not: shifted by the two, bit 33 only then
            // becomes the flag. Bit 34 never does; with it, the compiler leaves this a shift, and makes no comparison of it.
            (3 << 33) >> (self.0 & (Self::TCPCS | C::IGNORE_CHECKSUM)) & 2
        };
        Offload { low, csum_offset: 0 }
    }

    /// DATA_VALID if the device found the checksum of TCP or UDP right, and nothing else.
    #[inline(always)]
    pub(super) fn offload<C: Card>(self) -> Offload {
        const _: () = assert!(Offload::DATA_VALID == 2 && Received::TCPCS == 1 << 5);
        if self.0 & (Self::TCPE | Self::IPE) == 0 { self.offload_of_whole::<C>() } else { Offload::NONE }
    }
}

/// A checksum that the device is to calculate: over everything from `start`, stored at `at`, both from the frame's first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checksum {
    /// First byte that is summed.
    pub start: u8,
    /// Where the sum goes.
    pub at: u8,
}

/// How a frame that the device has to finish is described to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ask {
    /// For each of its data descriptors.
    pub flags: u64,
    /// The context descriptor that comes before it, unless the device was told the same last.
    pub context: Option<[u64; 2]>,
}

/// In a data descriptor: the frame ends here, and the device adds the FCS (EOP, IFCS).
pub(super) const LAST: u64 = 1 << 24 | 1 << 25;
/// Report status: the device sets [`SENT`] when it is done with this descriptor and those before.
pub(super) const REPORT: u64 = 1 << 27;
/// Insert a VLAN tag (VLE).
pub(crate) const INSERT_TAG: u64 = 1 << 30;
/// Calculate the TCP or UDP checksum as the context says (POPTS.TXSM).
pub(crate) const CHECKSUM: u64 = 1 << 41;
/// Descriptor done (STA.DD).
pub(super) const SENT: u64 = 1 << 32;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::e1000e::I82574;
    use crate::igb::I82576;

    #[test]
    fn a_written_descriptor_tells_length_tag_and_what_is_wrong() {
        let d = Received(0x0123_05dc_2000_002b);
        assert_eq!((d.done(), d.ends(), d.len(), d.tag()), (true, true, 1500, Some(0x123)));
        assert!(d.offload::<I82574>() == Offload::NONE && d.errors() == 0x20, "TCPE");
        let good = Received(0x0123_05dc_0000_0023);
        assert!(good.offload::<I82574>().flags() == Offload::DATA_VALID && good.tag().is_none());
        assert_eq!(good.offload::<I82576>().flags(), Offload::DATA_VALID);
        for bad in [1 << 2, 1 << 29, 1 << 30] {
            assert_eq!(Received(good.0 | bad).offload::<I82574>(), Offload::NONE, "IXSM, TCPE, IPE");
        }
        for unchecked in [0, 4, 8, 16, 20, 28, 64] {
            assert_eq!(Received(3 | unchecked).offload::<I82574>(), Offload::NONE, "{unchecked:#b}");
        }
    }
}
