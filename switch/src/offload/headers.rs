//! Finding the headers of a frame: Ethernet with up to two VLAN tags, IPv4 with options, IPv6 with extension headers.
//!
//! Only says where things are and what lengths they claim. Every walk is bounded, every byte is looked up with a check.

use super::OffloadRefused;

/// EtherTypes of VLAN tags: customer (802.1Q) and service (802.1ad).
const TAGS: [u16; 2] = [0x8100, 0x88a8];
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;

pub(super) const PROTOCOL_TCP: u8 = 6;
pub(super) const PROTOCOL_UDP: u8 = 17;
pub(super) const PROTOCOL_FRAGMENT: u8 = 44;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const DESTINATION: u8 = 60;

/// Extension headers that are walked: RFC 8200 (4.1) knows four that may stand here, one of them twice.
const MAX_EXTENSIONS: usize = 8;

/// The two bytes at `at`, as a number.
pub(super) fn number_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().copied().map(u16::from_be_bytes)
}

/// The Ethernet header and its tags.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ethernet {
    /// What follows the tags.
    pub(super) ethertype: u16,
    /// Where it begins.
    pub(super) payload_at: usize,
}

impl Ethernet {
    pub(super) fn parse(frame: &[u8]) -> Result<Self, OffloadRefused> {
        let mut at = 12;
        for _ in 0..=2 {
            let ethertype = number_at(frame, at).ok_or(OffloadRefused::Truncated("Ethernet"))?;
            if !TAGS.contains(&ethertype) {
                return Ok(Self { ethertype, payload_at: at + 2 });
            }
            at += 4;
        }
        Err(OffloadRefused::Malformed("the frame has more than two VLAN tags"))
    }
}

/// Version of IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    V4,
    V6,
}

/// The IP header with its options or extension headers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Network {
    pub(super) version: Version,
    /// Where the IP header begins.
    pub(super) at: usize,
    /// The protocol behind all extension headers that are walked.
    pub(super) protocol: u8,
    /// Where that begins.
    pub(super) payload_at: usize,
    /// Whether it is one fragment of a bigger packet.
    pub(super) fragment: bool,
    /// The packet's length by its header, from `at`; `None` where that is left 0, as some senders do before segmentation.
    pub(super) claimed_len: Option<usize>,
    /// IPv6: where a fragment header would go, and where the byte is that would announce it (RFC 8200, 4.5).
    pub(super) fragment_header_at: usize,
    pub(super) fragment_announced_at: usize,
}

impl Network {
    /// `None` if the frame carries no IP.
    pub(super) fn parse(frame: &[u8], ethernet: &Ethernet) -> Result<Option<Self>, OffloadRefused> {
        match ethernet.ethertype {
            ETHERTYPE_IPV4 => Self::parse_v4(frame, ethernet.payload_at).map(Some),
            ETHERTYPE_IPV6 => Self::parse_v6(frame, ethernet.payload_at).map(Some),
            _ => Ok(None),
        }
    }

    /// RFC 791, 3.1.
    fn parse_v4(frame: &[u8], at: usize) -> Result<Self, OffloadRefused> {
        let truncated = OffloadRefused::Truncated("IPv4");
        let header: &[u8; 20] = frame.get(at..).and_then(|f| f.first_chunk()).ok_or(truncated)?;
        let len = usize::from(header[0] & 0x0f) * 4;
        if header[0] >> 4 != 4 || len < 20 {
            return Err(OffloadRefused::Malformed("the IPv4 header's version or length is impossible"));
        }
        let payload_at = at + len;
        if payload_at > frame.len() {
            return Err(truncated);
        }
        let claimed = usize::from(u16::from_be_bytes([header[2], header[3]]));
        // More fragments, or not the first.
        let fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0;
        Ok(Self {
            version: Version::V4,
            at,
            protocol: header[9],
            payload_at,
            fragment,
            claimed_len: (claimed != 0).then_some(claimed),
            fragment_header_at: payload_at,
            fragment_announced_at: at + 9,
        })
    }

    /// RFC 8200, 3 and 4. Stops at the first header that is none of hop-by-hop, routing and destination options.
    fn parse_v6(frame: &[u8], at: usize) -> Result<Self, OffloadRefused> {
        let header: &[u8; 40] =
            frame.get(at..).and_then(|f| f.first_chunk()).ok_or(OffloadRefused::Truncated("IPv6"))?;
        if header[0] >> 4 != 6 {
            return Err(OffloadRefused::Malformed("the IPv6 header's version is not 6"));
        }
        let claimed = usize::from(u16::from_be_bytes([header[4], header[5]]));
        let mut network = Self {
            version: Version::V6,
            at,
            protocol: header[6],
            payload_at: at + 40,
            fragment: false,
            claimed_len: (claimed != 0).then_some(claimed + 40),
            fragment_header_at: at + 40,
            fragment_announced_at: at + 6,
        };
        for _ in 0..MAX_EXTENSIONS {
            let kind = network.protocol;
            match kind {
                HOP_BY_HOP if claimed == 0 => {
                    return Err(OffloadRefused::Malformed("IPv6 jumbograms are not supported"));
                }
                HOP_BY_HOP if network.payload_at != at + 40 => {
                    return Err(OffloadRefused::Malformed("an IPv6 hop-by-hop header is not the first"));
                }
                HOP_BY_HOP | ROUTING | DESTINATION => {}
                _ => {
                    network.fragment = kind == PROTOCOL_FRAGMENT;
                    return Ok(network);
                }
            }
            let truncated = OffloadRefused::Truncated("IPv6 extension");
            let begin = network.payload_at;
            let &[next, len] = frame.get(begin..).and_then(|f| f.first_chunk()).ok_or(truncated)?;
            network.payload_at = begin + 8 + usize::from(len) * 8;
            if network.payload_at > frame.len() {
                return Err(truncated);
            }
            network.protocol = next;
            if kind != DESTINATION {
                network.fragment_header_at = network.payload_at;
                network.fragment_announced_at = begin;
            }
        }
        Err(OffloadRefused::Malformed("the frame has more than 8 IPv6 extension headers"))
    }

    /// Refuses a packet whose length is not what its header says (bytes behind it would become part of it).
    pub(super) fn check_len(&self, frame: &[u8]) -> Result<(), OffloadRefused> {
        let len = frame.len() - self.at;
        if self.claimed_len.is_some_and(|claimed| claimed != len) {
            return Err(OffloadRefused::Malformed("the IP header's length is not that of the packet"));
        }
        Ok(())
    }
}
