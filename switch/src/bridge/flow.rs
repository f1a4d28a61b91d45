//! Which frames belong together: a hash that is the same for all frames of one flow.
//!
//! Chooses the receive queue of a guest with several: what has one hash stays in order. Decides nothing about who may talk
//! to whom, so that a header made to mislead it (a length that lies, ports that are padding) costs its sender the spread over
//! queues and nobody anything else.

use port::{Frame, HEAD, Head};

/// Where layer 3 begins without a VLAN tag.
const ETHERNET: usize = 14;
const TAG: usize = 4;

/// Layer-4 protocols whose first four bytes are two ports: TCP, UDP, DCCP, SCTP, UDP-Lite.
const WITH_PORTS: [u8; 5] = [6, 17, 33, 132, 136];

/// A hash of the addresses, protocol and ports of `frame` (IPv4 or IPv6, with at most one VLAN tag). Fragments, protocols
/// without ports, IPv6 extension headers and ports beyond the head count by addresses and protocol; what is not IP, by its
/// Ethernet addresses and type.
///
/// Not symmetric: the two directions of a connection may get different queues.
pub fn flow_hash(head: &Head, frame: &Frame) -> u32 {
    // Bytes past the frame's end are zero in the head already; the length keeps ports from being read out of them.
    let bytes = &head.0[..HEAD.min(frame.len as usize)];
    let layer3 = match bytes.get(12..14) {
        Some([0x81, 0x00]) => ETHERNET + TAG,
        _ => ETHERNET,
    };
    let kind = bytes.get(layer3 - 2..layer3);
    let packet = bytes.get(layer3..).unwrap_or_default();
    let hash = match kind {
        Some([0x08, 0x00]) => ipv4(packet),
        Some([0x86, 0xdd]) => ipv6(packet),
        _ => None,
    };
    hash.unwrap_or_else(|| {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, ..] = head.0;
        let high = u64::from_le_bytes([i, j, k, l, m, n, 0, 0]);
        mix(mix(0, u64::from_le_bytes([a, b, c, d, e, f, g, h])), high)
    })
}

fn ipv4(packet: &[u8]) -> Option<u32> {
    let [start, _, _, _, _, _, flags, fragment, _, protocol, _, _, addresses @ ..] =
        packet.first_chunk::<20>()?;
    let header = usize::from(start & 0xf) * 4;
    // More fragments to come, or not the first: ports are in the first only, so they count for none.
    let is_fragment = flags & 0x3f != 0 || *fragment != 0;
    let ports = if header < 20 || is_fragment { None } else { ports(packet, header, *protocol) };
    let hash = mix(u32::from(*protocol), u64::from_le_bytes(*addresses));
    Some(mix(hash, ports.unwrap_or(0)))
}

fn ipv6(packet: &[u8]) -> Option<u32> {
    let (start, addresses) = packet.first_chunk::<40>()?.split_at(8);
    let next = *start.get(6)?;
    let hash = addresses
        .as_chunks::<8>()
        .0
        .iter()
        .fold(u32::from(next), |hash, word| mix(hash, u64::from_le_bytes(*word)));
    Some(mix(hash, ports(packet, 40, next).unwrap_or(0)))
}

/// Both ports, if `protocol` has them and they are there.
fn ports(packet: &[u8], at: usize, protocol: u8) -> Option<u64> {
    let ports = packet.get(at..)?.first_chunk::<4>()?;
    WITH_PORTS.contains(&protocol).then(|| u64::from(u32::from_le_bytes(*ports)))
}

#[inline(always)]
fn mix(hash: u32, word: u64) -> u32 {
    // SAFETY: SSE4.2 is in x86-64-v3, which this is compiled for and `cableway` checks at start.
    unsafe { std::arch::x86_64::_mm_crc32_u64(u64::from(hash), word) as u32 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What a flow is made of.
    #[derive(Clone, Copy)]
    struct Flow {
        from: u8,
        to: u8,
        protocol: u8,
        ports: [u16; 2],
    }

    const FLOW: Flow = Flow { from: 1, to: 2, protocol: 6, ports: [1000, 80] };

    fn ip4(flow: Flow) -> Vec<u8> {
        let mut bytes = vec![
            0x45,
            0,
            0,
            40,
            0x12,
            0x34,
            0x40,
            0,
            64,
            flow.protocol,
            0,
            0,
            10,
            0,
            0,
            flow.from,
            10,
            0,
            0,
            flow.to,
        ];
        flow.ports.iter().for_each(|port| bytes.extend(port.to_be_bytes()));
        bytes.resize(40, 0);
        bytes
    }

    fn ip6(flow: Flow) -> Vec<u8> {
        let mut bytes = vec![0x60, 0, 0, 0, 0, 20, flow.protocol, 64];
        for last in [flow.from, flow.to] {
            bytes.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
        }
        flow.ports.iter().for_each(|port| bytes.extend(port.to_be_bytes()));
        bytes.resize(60, 0);
        bytes
    }

    fn ethernet(kind: u16, packet: &[u8]) -> Vec<u8> {
        [&[2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1], &kind.to_be_bytes()[..], packet].concat()
    }

    fn in_vlan(tci: u16, frame: &[u8]) -> Vec<u8> {
        [&frame[..12], &[0x81, 0], &tci.to_be_bytes(), &frame[12..]].concat()
    }

    fn hash(frame: &[u8]) -> u32 {
        let mut head = Head([0; HEAD]);
        let seen = frame.len().min(HEAD);
        head.0[..seen].copy_from_slice(&frame[..seen]);
        flow_hash(&head, &Frame { len: frame.len() as u32, ..Frame::EMPTY })
    }

    fn hash4(flow: Flow) -> u32 {
        hash(&ethernet(0x0800, &ip4(flow)))
    }

    fn hash6(flow: Flow) -> u32 {
        hash(&ethernet(0x86dd, &ip6(flow)))
    }

    #[test]
    fn flows_that_differ_in_any_part_differ_in_hash_and_a_tag_changes_nothing() {
        let others = [
            Flow { from: 3, ..FLOW },
            Flow { to: 3, ..FLOW },
            Flow { protocol: 17, ..FLOW },
            Flow { ports: [1001, 80], ..FLOW },
            Flow { ports: [1000, 81], ..FLOW },
        ];
        for other in others {
            assert_ne!(hash4(FLOW), hash4(other));
            assert_ne!(hash6(FLOW), hash6(other));
        }
        for frame in [ethernet(0x0800, &ip4(FLOW)), ethernet(0x86dd, &ip6(FLOW))] {
            assert_eq!(hash(&frame), hash(&in_vlan(0x600a, &frame)));
        }
    }

    #[test]
    fn a_thousand_connections_spread_over_eight_queues() {
        let mut queues = [0; 8];
        (0..1000).for_each(|n| queues[hash4(Flow { ports: [20_000 + n, 80], ..FLOW }) as usize % 8] += 1);
        assert!(queues.iter().all(|n| (60..200).contains(n)), "{queues:?}");
    }

    #[test]
    fn all_fragments_of_a_datagram_have_one_hash() {
        let fragment = |flags: u16, first_bytes: [u16; 2]| {
            let mut packet = ip4(Flow { ports: first_bytes, protocol: 17, ..FLOW });
            packet[6..8].copy_from_slice(&flags.to_be_bytes());
            hash(&ethernet(0x0800, &packet))
        };
        let first = fragment(0x2000, [1000, 80]);
        assert_eq!(first, fragment(0x2000 | 185, [7, 7]));
        assert_eq!(first, fragment(370, [9, 9]));
        assert_ne!(first, fragment(0x4000, [1000, 80]), "not a fragment: its ports count");
        let of_6 = |inside: [u16; 2]| hash6(Flow { protocol: 44, ports: inside, ..FLOW });
        assert_eq!(of_6([17, 0]), of_6([17, 185]));
    }

    #[test]
    fn cve_2023_1668_ip_protocol_0_and_protocols_without_ports_count_by_addresses() {
        for protocol in [0, 1, 50, 58, 59, 255] {
            let with = |ports| Flow { protocol, ports, ..FLOW };
            assert_eq!(hash4(with([1, 2])), hash4(with([3, 4])));
            assert_eq!(hash6(with([1, 2])), hash6(with([3, 4])));
        }
    }

    #[test]
    fn cve_2016_10377_header_lengths_of_0_1_and_the_maximum_read_no_port_that_is_not_there() {
        for length in [0, 1, 4, 15] {
            let of = |ports| {
                let mut packet = ip4(Flow { ports, ..FLOW });
                packet[0] = 0x40 | length;
                hash(&ethernet(0x0800, &packet))
            };
            assert_eq!(of([1, 2]), of([3, 4]), "header length {length}");
        }
    }

    #[test]
    fn cve_2020_35498_total_lengths_of_0_1_and_the_maximum_change_nothing() {
        let of = |length: u16| {
            let (mut v4, mut v6) = (ip4(FLOW), ip6(FLOW));
            v4[2..4].copy_from_slice(&length.to_be_bytes());
            v6[4..6].copy_from_slice(&length.to_be_bytes());
            (hash(&ethernet(0x0800, &v4)), hash(&ethernet(0x86dd, &v6)))
        };
        assert!([1, 20, u16::MAX].iter().all(|length| of(*length) == of(0)));
    }

    #[test]
    fn a_frame_truncated_at_every_byte_has_a_hash_that_depends_on_no_byte_behind_it() {
        for whole in [
            ethernet(0x0800, &ip4(FLOW)),
            ethernet(0x86dd, &ip6(FLOW)),
            in_vlan(5, &ethernet(0x86dd, &ip6(FLOW))),
        ] {
            for len in 0..whole.len() {
                let cut = hash(&whole[..len]);
                assert_eq!(cut, hash(&whole[..len]));
                let ports_at = if whole[12] == 0x08 {
                    34
                } else if whole[12] == 0x86 {
                    54
                } else {
                    58
                };
                assert_eq!(cut == hash(&whole), len >= ports_at + 4, "{len}");
            }
        }
    }

    #[test]
    fn nested_tags_and_what_is_not_ip_count_by_ethernet_addresses() {
        let inner = ethernet(0x0800, &ip4(FLOW));
        let nested = in_vlan(10, &in_vlan(20, &inner));
        let other_ports = in_vlan(10, &in_vlan(20, &ethernet(0x0800, &ip4(Flow { ports: [5, 6], ..FLOW }))));
        assert_eq!(hash(&nested), hash(&other_ports));
        let mut arp = ethernet(0x0806, &[0; 28]);
        let before = hash(&arp);
        arp[30] = 9;
        assert_eq!(hash(&arp), before);
        arp[5] = 9;
        assert_ne!(hash(&arp), before);
    }

    proptest! {
        #[test]
        fn any_bytes_of_any_length_have_a_hash(bytes in prop::collection::vec(any::<u8>(), HEAD), len in 0u32..70_000) {
            let head = Head(bytes.try_into().unwrap());
            flow_hash(&head, &Frame { len, ..Frame::EMPTY });
        }
    }
}
