//! Frames to send, and what RFC 1071 has to say about those that arrive.

use virtio::net::{GSO_NONE, NetHeader};

/// The address of guest `i`.
pub(super) fn mac(i: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, i]
}

/// A frame of `len` bytes from guest `from` to guest `to`: addresses, then bytes that `salt` makes different from those of
/// other frames.
pub(super) fn frame(from: u8, to: u8, len: usize, salt: u32) -> Vec<u8> {
    let mut bytes = [&mac(to)[..], &mac(from), &[0x88, 0xb5]].concat();
    bytes.extend((bytes.len()..len).map(|i| {
        let i = i as u32;
        (salt.wrapping_mul(31).wrapping_add(i).wrapping_mul(2_654_435_761) >> 24) as u8
    }));
    bytes
}

/// An 802.1Q tag behind the addresses of `frame`.
pub(super) fn tagged(frame: &[u8], tci: u16) -> Vec<u8> {
    let [hi, lo] = tci.to_be_bytes();
    [&frame[..12], &[0x81, 0, hi, lo], &frame[12..]].concat()
}

/// The ones' complement sum, folded.
pub(super) fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|c| u32::from(c[0]) << 8 | u32::from(*c.get(1).unwrap_or(&0)));
    let mut sum: u64 = words.map(u64::from).sum();
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

/// The pseudo-header of a packet's transport part, as far as it is the same for all: addresses, protocol, length.
fn pseudo(ip: &[u8], protocol: u8, len: usize) -> Vec<u8> {
    let addresses = if ip[0] >> 4 == 4 { &ip[12..20] } else { &ip[8..40] };
    let [hi, lo] = (len as u16).to_be_bytes();
    [addresses, &[0, protocol, hi, lo]].concat()
}

/// What carries a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Over {
    pub(super) ipv6: bool,
    pub(super) tcp: bool,
}

impl Over {
    pub(super) const TCP4: Self = Self { ipv6: false, tcp: true };
    pub(super) const TCP6: Self = Self { ipv6: true, tcp: true };
    pub(super) const UDP4: Self = Self { ipv6: false, tcp: false };
    pub(super) const UDP6: Self = Self { ipv6: true, tcp: false };

    pub(super) fn network(self) -> usize {
        if self.ipv6 { 40 } else { 20 }
    }

    pub(super) fn transport(self) -> usize {
        if self.tcp { 20 } else { 8 }
    }

    /// Where the checksum is in the transport header.
    pub(super) fn checksum(self) -> usize {
        if self.tcp { 16 } else { 6 }
    }

    fn protocol(self) -> u8 {
        if self.tcp { 6 } else { 17 }
    }
}

/// A packet from guest 0 to guest 1 as a sender leaves it that wants its checksum filled in: the field holds the sum of the
/// pseudo-header.
pub(super) fn unfinished(over: Over, source_port: u16, payload: &[u8]) -> Vec<u8> {
    let transport = over.transport() + payload.len();
    let mut ip = if over.ipv6 {
        let [hi, lo] = (transport as u16).to_be_bytes();
        let mut ip = vec![0x60, 0, 0, 0, hi, lo, over.protocol(), 64];
        ip.extend([0xfd; 15].iter().chain(&[1]).chain(&[0xfd; 15]).chain(&[2]));
        ip
    } else {
        let [hi, lo] = ((20 + transport) as u16).to_be_bytes();
        let mut ip = vec![0x45, 0, hi, lo, 0x12, 0x34, 0x40, 0, 64, over.protocol(), 0, 0];
        ip.extend([10, 0, 0, 1, 10, 0, 0, 2]);
        let check = (!sum(&ip)).to_be_bytes();
        ip[10..12].copy_from_slice(&check);
        ip
    };
    let [hi, lo] = source_port.to_be_bytes();
    let mut header = vec![hi, lo, 0x20, 0];
    if over.tcp {
        header.extend([0, 0, 0x10, 0, 0, 0, 0, 9, 0x50, 0x18, 0x20, 0, 0, 0, 0, 0]);
    } else {
        let [hi, lo] = (transport as u16).to_be_bytes();
        header.extend([hi, lo, 0, 0]);
    }
    let at = over.checksum();
    header[at..at + 2].copy_from_slice(&sum(&pseudo(&ip, over.protocol(), transport)).to_be_bytes());
    ip.extend(header);
    ip.extend(payload);
    let kind = if over.ipv6 { [0x86, 0xdd] } else { [8, 0] };
    [&mac(1)[..], &mac(0), &kind, &ip].concat()
}

/// The virtio-net header of such a packet: the checksum is to be filled in, and it is to be cut to `size`, unless `gso` says
/// that it is not.
pub(super) fn header(over: Over, gso: u8, size: u16) -> NetHeader {
    let at = 14 + over.network();
    let header = NetHeader::PLAIN.with_checksum(at as u16, over.checksum() as u16);
    if gso == GSO_NONE { header } else { header.with_gso(gso, (at + over.transport()) as u16, size) }
}

/// `len` bytes, no two neighbours alike.
pub(super) fn payload(len: usize) -> Vec<u8> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// The datagram that IP fragments make up: asserts that they are all there, in order.
pub(super) fn put_together<'f>(over: Over, fragments: impl ExactSizeIterator<Item = &'f [u8]>) -> Vec<u8> {
    let (mut front, mut together, count) = (Vec::new(), Vec::new(), fragments.len());
    for (i, fragment) in fragments.enumerate() {
        let ip = &fragment[14..];
        let (place, unit, more, behind) = if over.ipv6 {
            assert_eq!((ip[6], ip[40]), (44, 17), "a fragment header, and UDP behind it");
            let place = u16::from_be_bytes([ip[42], ip[43]]);
            (place >> 3, 8, place & 1, 48)
        } else {
            assert_eq!(sum(&ip[..20]), 0xffff, "IPv4 header checksum");
            let place = u16::from_be_bytes([ip[6], ip[7]]);
            (place & 0x1fff, 8, place >> 13, 20)
        };
        assert_eq!((usize::from(place) * unit, more), (together.len(), u16::from(i + 1 < count)));
        together.extend(&ip[behind..]);
        if i == 0 {
            front = fragment[..14 + over.network()].to_vec();
        }
    }
    if over.ipv6 {
        front[14 + 6] = 17;
        front[14 + 4..14 + 6].copy_from_slice(&(together.len() as u16).to_be_bytes());
    } else {
        front[14 + 2..14 + 4].copy_from_slice(&(20 + together.len() as u16).to_be_bytes());
        front[14 + 6..14 + 8].fill(0);
        front[14 + 10..14 + 12].fill(0);
        let check = (!sum(&front[14..34])).to_be_bytes();
        front[14 + 10..14 + 12].copy_from_slice(&check);
    }
    [front, together].concat()
}

/// Asserts that the checksums of `frame` are right and its lengths agree; returns its payload.
pub(super) fn verified(over: Over, frame: &[u8]) -> Vec<u8> {
    let ip = &frame[14..];
    if over.ipv6 {
        assert_eq!(usize::from(u16::from_be_bytes([ip[4], ip[5]])), ip.len() - 40);
    } else {
        assert_eq!(usize::from(u16::from_be_bytes([ip[2], ip[3]])), ip.len());
        assert_eq!(sum(&ip[..20]), 0xffff, "IPv4 header checksum");
    }
    let transport = &ip[over.network()..];
    let mut summed = pseudo(ip, over.protocol(), transport.len());
    summed.extend(transport);
    assert_eq!(sum(&summed), 0xffff, "transport checksum");
    transport[over.transport()..].to_vec()
}
