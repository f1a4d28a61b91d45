//! The virtio-net header (virtio 1.3, section 5.1.6), as bytes on the wire: little-endian, 12 bytes, or 10 where a device
//! before 1.0 does without `num_buffers`.
//!
//! Only reads and writes the fields of a private copy; what they mean for a packet is decided elsewhere.

use crate::features;

/// Bytes of the header, when VERSION_1 or MRG_RXBUF was negotiated.
pub const HEADER_LEN: usize = 12;

/// Bytes of the header of a legacy device without mergeable buffers.
pub const LEGACY_HEADER_LEN: usize = 10;

/// Bytes that precede each frame on a ring with these features.
pub fn header_len(negotiated: u64) -> usize {
    if negotiated & (features::VERSION_1 | features::NET_MRG_RXBUF) != 0 {
        HEADER_LEN
    } else {
        LEGACY_HEADER_LEN
    }
}

/// `flags`: the checksum at `csum_start + csum_offset` is still to be filled in.
pub const NEEDS_CSUM: u8 = 1;
/// `flags`: the device vouches for the checksums.
pub const DATA_VALID: u8 = 2;

/// `gso_type`: not segmented.
pub const GSO_NONE: u8 = 0;
/// `gso_type`: TCP over IPv4.
pub const GSO_TCPV4: u8 = 1;
/// `gso_type`: UDP fragmentation.
pub const GSO_UDP: u8 = 3;
/// `gso_type`: TCP over IPv6.
pub const GSO_TCPV6: u8 = 4;
/// `gso_type`: UDP segmentation.
pub const GSO_UDP_L4: u8 = 5;
/// `gso_type`, or-ed in: the TCP segment has ECN set.
pub const GSO_ECN: u8 = 0x80;

/// A private copy of a virtio-net header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(4))]
pub struct NetHeader(pub [u8; HEADER_LEN]);

impl NetHeader {
    /// A frame that is whole: all fields zero, as a driver sends it.
    pub const PLAIN: NetHeader = NetHeader([0; HEADER_LEN]);

    /// The header in `bytes`, which hold 10 or 12 of them; `None` if there are fewer than 10. A missing `num_buffers`
    /// reads as 0.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let mut header = Self::PLAIN;
        let len = if bytes.len() >= HEADER_LEN { HEADER_LEN } else { LEGACY_HEADER_LEN };
        header.0.get_mut(..len)?.copy_from_slice(bytes.get(..len)?);
        Some(header)
    }

    /// The first ten bytes as one little-endian number, for comparing headers at one stroke.
    #[inline(always)]
    pub fn offload_bits(&self) -> u128 {
        let [a, b, c, d, e, f, g, h, i, j, _, _] = self.0;
        u128::from_le_bytes([a, b, c, d, e, f, g, h, i, j, 0, 0, 0, 0, 0, 0])
    }

    /// [`NEEDS_CSUM`], [`DATA_VALID`].
    pub fn flags(&self) -> u8 {
        self.0[0]
    }

    /// [`GSO_NONE`] and its kin, with [`GSO_ECN`].
    pub fn gso_type(&self) -> u8 {
        self.0[1]
    }

    /// Bytes of all headers, which are repeated before each segment (a hint).
    pub fn hdr_len(&self) -> u16 {
        u16::from_le_bytes([self.0[2], self.0[3]])
    }

    /// Payload bytes of each segment.
    pub fn gso_size(&self) -> u16 {
        u16::from_le_bytes([self.0[4], self.0[5]])
    }

    /// Where the bytes to be summed begin, from the frame's first byte.
    pub fn csum_start(&self) -> u16 {
        u16::from_le_bytes([self.0[6], self.0[7]])
    }

    /// Where the sum goes, from `csum_start`.
    pub fn csum_offset(&self) -> u16 {
        u16::from_le_bytes([self.0[8], self.0[9]])
    }

    /// Receive buffers that the frame spans.
    pub fn num_buffers(&self) -> u16 {
        u16::from_le_bytes([self.0[10], self.0[11]])
    }

    /// Sets `flags`.
    #[must_use]
    pub fn with_flags(mut self, flags: u8) -> Self {
        self.0[0] = flags;
        self
    }

    /// Asks for a checksum over everything from `start` on, to be stored `offset` bytes behind `start`.
    #[must_use]
    pub fn with_checksum(mut self, start: u16, offset: u16) -> Self {
        self.0[0] |= NEEDS_CSUM;
        self.0[6..8].copy_from_slice(&start.to_le_bytes());
        self.0[8..10].copy_from_slice(&offset.to_le_bytes());
        self
    }

    /// Asks for segmentation into pieces of `size` payload bytes behind `hdr_len` bytes of headers.
    #[must_use]
    pub fn with_gso(mut self, gso_type: u8, hdr_len: u16, size: u16) -> Self {
        self.0[1] = gso_type;
        self.0[2..4].copy_from_slice(&hdr_len.to_le_bytes());
        self.0[4..6].copy_from_slice(&size.to_le_bytes());
        self
    }

    /// Sets `num_buffers`.
    #[must_use]
    pub fn with_num_buffers(mut self, n: u16) -> Self {
        self.0[10..12].copy_from_slice(&n.to_le_bytes());
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lie_where_the_specification_puts_them() {
        let h = NetHeader::PLAIN
            .with_checksum(34, 16)
            .with_gso(GSO_TCPV4 | GSO_ECN, 54, 1448)
            .with_num_buffers(3);
        assert_eq!(h.0, [1, 0x81, 54, 0, 0xa8, 5, 34, 0, 16, 0, 3, 0]);
        assert_eq!((h.flags(), h.gso_type(), h.hdr_len(), h.gso_size()), (NEEDS_CSUM, 0x81, 54, 1448));
        assert_eq!((h.csum_start(), h.csum_offset(), h.num_buffers()), (34, 16, 3));
    }

    #[test]
    fn the_header_has_ten_bytes_only_where_neither_version_1_nor_mergeable_buffers_were_negotiated() {
        assert_eq!(header_len(0), 10);
        assert_eq!(header_len(features::VERSION_1), 12);
        assert_eq!(header_len(features::NET_MRG_RXBUF), 12);
    }

    #[test]
    fn parsing_takes_ten_or_twelve_bytes_and_refuses_fewer() {
        let h = NetHeader::PLAIN.with_checksum(14, 2).with_num_buffers(9);
        assert_eq!(NetHeader::parse(&h.0), Some(h));
        assert_eq!(NetHeader::parse(&h.0[..11]), Some(h.with_num_buffers(0)));
        assert_eq!(NetHeader::parse(&h.0[..9]), None);
    }
}
