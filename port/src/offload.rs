//! What a sender left for others to do: checksum and segmentation, as the virtio-net header carries it
//! (virtio 1.3, section 5.1.6).
//!
//! Holds the ten bytes of that header as they were read, once; decides whether they make sense. Knows no packet.

/// The kind of segmentation that a frame still needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gso {
    /// None: the frame is whole.
    None,
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP fragmentation (UFO): one datagram, cut into IP fragments.
    UdpFragment,
    /// UDP segmentation (USO): several datagrams of `gso_size` bytes.
    UdpSegment,
}

/// The first ten bytes of a virtio-net header, in little-endian as on the ring.
///
/// `low` holds flags, gso_type, hdr_len, gso_size and csum_start; `csum_offset` is the field of that name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Offload {
    /// Bytes 0..8: flags (u8), gso_type (u8), hdr_len (u16), gso_size (u16), csum_start (u16).
    pub low: u64,
    /// Bytes 8..10.
    pub csum_offset: u16,
}

/// The least csum_start of a frame that has a checksum to fill in: behind an Ethernet and an IPv4 header. A receiver that takes
/// checksums unfinished fills this one in itself; it must not land in what the bridge has judged (addresses, type, tag).
const LEAST_CSUM_START: u16 = 14 + 20;

/// Why a virtio-net header was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OffloadError {
    /// The checksum field lies outside the frame.
    #[error("checksum field at {start}+{offset} lies outside a frame of {len} bytes")]
    ChecksumOutside {
        /// csum_start.
        start: u16,
        /// csum_offset.
        offset: u16,
        /// Frame length.
        len: u32,
    },
    /// The checksum would begin inside the headers that come before any that has one.
    #[error("csum_start {0} lies inside the Ethernet or IP header")]
    ChecksumInHeaders(u16),
    /// gso_type is none that the specification has.
    #[error("unknown gso_type {0:#x}")]
    UnknownGso(u8),
    /// Segmentation without a segment size.
    #[error("gso_size is 0")]
    ZeroGsoSize,
    /// Segmentation without the checksum that it implies.
    #[error("segmentation asked for without a checksum")]
    GsoWithoutChecksum,
}

impl Offload {
    /// Nothing left to do.
    pub const NONE: Offload = Offload { low: 0, csum_offset: 0 };

    /// VIRTIO_NET_HDR_F_NEEDS_CSUM.
    pub const NEEDS_CSUM: u8 = 1;
    /// VIRTIO_NET_HDR_F_DATA_VALID.
    pub const DATA_VALID: u8 = 2;
    /// VIRTIO_NET_HDR_GSO_ECN, a flag in gso_type.
    pub const GSO_ECN: u8 = 0x80;

    /// Builds one from its fields.
    pub fn new(
        flags: u8,
        gso_type: u8,
        hdr_len: u16,
        gso_size: u16,
        csum_start: u16,
        csum_offset: u16,
    ) -> Self {
        let low = u64::from(flags)
            | u64::from(gso_type) << 8
            | u64::from(hdr_len) << 16
            | u64::from(gso_size) << 32
            | u64::from(csum_start) << 48;
        Self { low, csum_offset }
    }

    /// Whether the frame is complete as it stands: no checksum to fill in, nothing to cut.
    #[inline(always)]
    pub fn is_none(&self) -> bool {
        // hdr_len without GSO means nothing; DATA_VALID asks for nothing.
        self.low & 0xff01 == 0
    }

    /// The flags byte.
    pub fn flags(&self) -> u8 {
        self.low as u8
    }

    /// gso_type with its ECN bit.
    pub fn gso_type(&self) -> u8 {
        (self.low >> 8) as u8
    }

    /// hdr_len, which the specification calls a hint.
    pub fn hdr_len(&self) -> u16 {
        (self.low >> 16) as u16
    }

    /// Payload bytes of each segment.
    pub fn gso_size(&self) -> u16 {
        (self.low >> 32) as u16
    }

    /// Where the checksummed bytes begin, from the frame's first byte.
    pub fn csum_start(&self) -> u16 {
        (self.low >> 48) as u16
    }

    /// Whether a checksum is to be filled in.
    pub fn needs_csum(&self) -> bool {
        self.flags() & Self::NEEDS_CSUM != 0
    }

    /// Whether the sender asked for the ECN rule of segmentation (CWR on the first segment only).
    pub fn ecn(&self) -> bool {
        self.gso_type() & Self::GSO_ECN != 0
    }

    /// The kind of segmentation.
    ///
    /// # Errors
    /// [`OffloadError::UnknownGso`].
    pub fn gso(&self) -> Result<Gso, OffloadError> {
        match self.gso_type() & !Self::GSO_ECN {
            0 => Ok(Gso::None),
            1 => Ok(Gso::Tcp4),
            3 => Ok(Gso::UdpFragment),
            4 => Ok(Gso::Tcp6),
            5 => Ok(Gso::UdpSegment),
            _ => Err(OffloadError::UnknownGso(self.gso_type())),
        }
    }

    /// Checks the fields against a frame of `len` bytes (CVE-2024-11614: a checksum field beyond the packet).
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self, len: u32) -> Result<(), OffloadError> {
        if self.needs_csum() {
            let field_end = u32::from(self.csum_start()) + u32::from(self.csum_offset) + 2;
            if field_end > len {
                let (start, offset) = (self.csum_start(), self.csum_offset);
                return Err(OffloadError::ChecksumOutside { start, offset, len });
            }
            if self.csum_start() < LEAST_CSUM_START {
                return Err(OffloadError::ChecksumInHeaders(self.csum_start()));
            }
        }
        let gso = self.gso()?;
        if gso != Gso::None {
            if self.gso_size() == 0 {
                return Err(OffloadError::ZeroGsoSize);
            }
            if !self.needs_csum() && gso != Gso::UdpFragment {
                return Err(OffloadError::GsoWithoutChecksum);
            }
        }
        Ok(())
    }

    /// The same request for a frame whose bytes behind the Ethernet addresses moved by `by` (a VLAN tag pushed or popped);
    /// `None` if the checksum would then begin outside the frame.
    #[must_use]
    pub fn moved(&self, by: i16) -> Option<Self> {
        if self.is_none() {
            return Some(*self);
        }
        let start =
            if self.needs_csum() { self.csum_start().checked_add_signed(by)? } else { self.csum_start() };
        let hdr_len = if self.hdr_len() != 0 { self.hdr_len().saturating_add_signed(by) } else { 0 };
        Some(Self::new(self.flags(), self.gso_type(), hdr_len, self.gso_size(), start, self.csum_offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_come_back_as_they_were_given() {
        let o = Offload::new(1, 0x81, 54, 1448, 34, 16);
        assert_eq!((o.flags(), o.gso_type(), o.hdr_len(), o.gso_size()), (1, 0x81, 54, 1448));
        assert_eq!((o.csum_start(), o.csum_offset, o.ecn()), (34, 16, true));
        assert_eq!(o.gso(), Ok(Gso::Tcp4));
    }

    #[test]
    fn cve_2024_11614_checksum_fields_at_over_and_far_beyond_the_end() {
        assert_eq!(Offload::new(1, 0, 0, 0, 34, 16).check(52), Ok(()));
        for (start, offset) in [(34, 17), (36, 16), (0xffff, 0xffff), (0, 51), (51, 0)] {
            assert!(Offload::new(1, 0, 0, 0, start, offset).check(52).is_err(), "{start}+{offset}");
        }
    }

    #[test]
    fn a_checksum_never_lands_in_the_addresses_or_tag_that_a_bridge_judged() {
        for start in [0, 6, 12, 14, 33] {
            let refused = Offload::new(1, 0, 0, 0, start, 0).check(100);
            assert_eq!(refused, Err(OffloadError::ChecksumInHeaders(start)));
            assert_eq!(Offload::new(0, 0, 0, 0, start, 0).check(100), Ok(()), "nobody asks for a checksum");
        }
        // A tag that is taken away moves it by four bytes, and no further.
        let least = Offload::new(1, 0, 0, 0, 34, 0);
        assert_eq!((least.check(100), least.moved(-4).unwrap().csum_start()), (Ok(()), 30));
    }

    #[test]
    fn a_tag_moves_the_checksum_and_header_fields_and_nothing_else() {
        let o = Offload::new(1, 1, 54, 1448, 34, 16);
        let m = o.moved(4).unwrap();
        assert_eq!((m.hdr_len(), m.csum_start(), m.csum_offset, m.gso_size()), (58, 38, 16, 1448));
        assert_eq!(m.moved(-4), Some(o));
        assert_eq!(Offload::NONE.moved(4), Some(Offload::NONE));
    }

    #[test]
    fn a_checksum_that_would_begin_outside_the_frame_does_not_move_there() {
        let at = |start| Offload::new(1, 0, 0, 0, start, 0);
        assert_eq!((at(3).moved(-4), at(0xfffc).moved(4)), (None, None));
        assert_eq!((at(4).moved(-4), at(0xfffb).moved(4)), (Some(at(0)), Some(at(0xffff))));
    }

    #[test]
    fn segmentation_of_size_zero_or_without_checksum_is_refused() {
        assert_eq!(Offload::new(1, 1, 54, 0, 34, 16).check(2000), Err(OffloadError::ZeroGsoSize));
        assert_eq!(Offload::new(0, 1, 54, 1, 34, 16).check(2000), Err(OffloadError::GsoWithoutChecksum));
        assert_eq!(Offload::new(0, 2, 54, 1, 34, 16).check(2000), Err(OffloadError::UnknownGso(2)));
    }
}
