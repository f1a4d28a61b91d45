//! Frames built from their parts, and a slow verifier that shares no code with what it verifies.

mod checksum;
mod fields;
mod segments;
mod vectors;

use super::*;
use proptest::prelude::*;

pub(super) const TCP4: u8 = 1;
pub(super) const UFO: u8 = 3;
pub(super) const TCP6: u8 = 4;
pub(super) const USO: u8 = 5;

/// A frame as a guest would leave it to its device: with the pseudo-header's sum in the checksum field.
#[derive(Clone, Debug)]
pub(super) struct Build {
    /// EtherTypes of the tags, outermost first.
    pub(super) tags: Vec<u16>,
    pub(super) v6: bool,
    /// IPv4 options, a multiple of four bytes.
    pub(super) options: Vec<u8>,
    /// IPv6 extension headers: protocol number and bytes, of which the first (next header) is filled in.
    pub(super) extensions: Vec<(u8, Vec<u8>)>,
    pub(super) id: u16,
    /// TCP, or UDP.
    pub(super) tcp: bool,
    pub(super) flags: u8,
    pub(super) sequence: u32,
    pub(super) tcp_options: Vec<u8>,
    pub(super) payload: Vec<u8>,
}

impl Default for Build {
    fn default() -> Self {
        Self {
            tags: vec![],
            v6: false,
            options: vec![],
            extensions: vec![],
            id: 0xfffe,
            tcp: true,
            flags: 0x18,
            sequence: 0xffff_ff00,
            tcp_options: vec![],
            payload: (0..3000).map(|i| (i * 7 + i / 256) as u8).collect(),
        }
    }
}

impl Build {
    pub(super) fn ip_at(&self) -> usize {
        14 + 4 * self.tags.len()
    }

    pub(super) fn transport_at(&self) -> usize {
        let extensions: usize = self.extensions.iter().map(|e| e.1.len()).sum();
        self.ip_at() + if self.v6 { 40 + extensions } else { 20 + self.options.len() }
    }

    pub(super) fn protocol(&self) -> u8 {
        if self.tcp { 6 } else { 17 }
    }

    pub(super) fn frame(&self) -> Vec<u8> {
        let mut f = vec![0x52, 0x54, 0, 0, 0, 1, 0x52, 0x54, 0, 0, 0, 2];
        for (i, tag) in self.tags.iter().enumerate() {
            f.extend(tag.to_be_bytes());
            f.extend((0x2000 + 100 + i as u16).to_be_bytes());
        }
        f.extend(if self.v6 { [0x86, 0xdd] } else { [0x08, 0x00] });
        let transport = self.transport();
        if self.v6 {
            let extensions: usize = self.extensions.iter().map(|e| e.1.len()).sum();
            f.extend([0x6a, 0xbc, 0xde, 0xf0]);
            f.extend(((extensions + transport.len()) as u16).to_be_bytes());
            f.extend([self.extensions.first().map_or(self.protocol(), |e| e.0), 64]);
            f.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
            f.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xbe, 0xef]);
            for (i, (_, bytes)) in self.extensions.iter().enumerate() {
                f.push(self.extensions.get(i + 1).map_or(self.protocol(), |e| e.0));
                f.extend(&bytes[1..]);
            }
        } else {
            let len = 20 + self.options.len();
            let mut h = vec![0x40 | (len / 4) as u8, 0x03];
            h.extend(((len + transport.len()) as u16).to_be_bytes());
            h.extend(self.id.to_be_bytes());
            h.extend([0x40, 0, 64, self.protocol(), 0, 0, 10, 0, 0, 1, 10, 200, 255, 2]);
            h.extend(&self.options);
            let checksum = !slow_sum(&h);
            h[10..12].copy_from_slice(&checksum.to_be_bytes());
            f.extend(h);
        }
        let at = f.len();
        f.extend(transport);
        let pseudo = slow_sum(&pseudo_header(&f, self.ip_at(), self.protocol(), f.len() - at));
        let field = at + usize::from(self.csum_offset());
        f[field..field + 2].copy_from_slice(&pseudo.to_be_bytes());
        f
    }

    fn transport(&self) -> Vec<u8> {
        let mut t = vec![0x30, 0x39, 0x00, 0x50];
        if self.tcp {
            t.extend(self.sequence.to_be_bytes());
            t.extend([1, 2, 3, 4, (((20 + self.tcp_options.len()) / 4) << 4) as u8, self.flags, 0x7f, 0xff]);
            t.extend([0, 0, 0, 0]);
            t.extend(&self.tcp_options);
        } else {
            t.extend(((8 + self.payload.len()) as u16).to_be_bytes());
            t.extend([0, 0]);
        }
        t.extend(&self.payload);
        t
    }

    pub(super) fn csum_offset(&self) -> u16 {
        if self.tcp { 16 } else { 6 }
    }

    pub(super) fn offload(&self, gso: u8, size: u16) -> Offload {
        Offload::new(1, gso, 0, size, self.transport_at() as u16, self.csum_offset())
    }

    pub(super) fn gso(&self) -> u8 {
        match (self.tcp, self.v6) {
            (true, false) => TCP4,
            (true, true) => TCP6,
            (false, _) => USO,
        }
    }
}

/// RFC 1071, word by word.
pub(super) fn slow_sum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) * 256 + pair.get(1).map_or(0, |&b| u32::from(b));
        sum = sum % 65_536 + sum / 65_536;
    }
    sum as u16
}

/// RFC 9293 3.1 and RFC 8200 8.1, for a packet whose IP header begins at `ip`.
pub(super) fn pseudo_header(frame: &[u8], ip: usize, protocol: u8, len: usize) -> Vec<u8> {
    let addresses = if frame[ip] >> 4 == 4 { ip + 12..ip + 20 } else { ip + 8..ip + 40 };
    let mut p = frame[addresses].to_vec();
    p.extend((len as u32).to_be_bytes());
    p.extend([0, 0, 0, protocol]);
    p
}

/// A frame taken apart, after everything in it that can be checked was checked.
pub(super) struct Packet<'a> {
    /// Up to the EtherType of IP.
    pub(super) ethernet: &'a [u8],
    pub(super) ip: &'a [u8],
    /// What follows the IPv4 header with its options, or the fixed IPv6 header.
    pub(super) rest: &'a [u8],
}

impl<'a> Packet<'a> {
    pub(super) fn verified(frame: &'a [u8], tags: usize) -> Self {
        let (ethernet, packet) = frame.split_at(14 + 4 * tags);
        let be = |at: usize| usize::from(packet[at]) * 256 + usize::from(packet[at + 1]);
        let (ip, rest) = if packet[0] >> 4 == 4 {
            assert_eq!(be(2), packet.len(), "IPv4 total length");
            let (ip, rest) = packet.split_at(usize::from(packet[0] & 15) * 4);
            assert_eq!(slow_sum(ip), 0xffff, "IPv4 header checksum");
            (ip, rest)
        } else {
            assert_eq!(be(4) + 40, packet.len(), "IPv6 payload length");
            packet.split_at(40)
        };
        Self { ethernet, ip, rest }
    }

    /// Checks the TCP or UDP checksum of what `skip` bytes of extension headers precede, and returns it.
    pub(super) fn transport(&self, skip: usize, protocol: u8) -> &'a [u8] {
        let transport = &self.rest[skip..];
        let mut sum = pseudo_header(self.ip, 0, protocol, transport.len());
        sum.extend(transport);
        assert_eq!(slow_sum(&sum), 0xffff, "checksum of protocol {protocol}");
        if protocol == 17 {
            assert_eq!(usize::from(u16::from_be_bytes([transport[4], transport[5]])), transport.len());
            assert_ne!(transport[6..8], [0, 0], "a UDP checksum of 0 means none");
        }
        transport
    }
}

/// All segments of a frame, by value.
pub(super) fn cut(frame: &[u8], offload: &Offload) -> Result<Vec<Vec<u8>>, OffloadRefused> {
    let mut segments = Segments::new(frame, offload, 70_000)?;
    let mut all = Vec::new();
    let mut out = vec![0xaa; segments.longest()];
    while let Some(len) = segments.write_next(&mut out)? {
        assert!(len <= segments.longest());
        all.push(out[..len].to_vec());
        out.fill(0xaa);
    }
    assert_eq!(all.len(), segments.count());
    Ok(all)
}

/// Extension headers that may precede TCP and UDP, in the order of RFC 8200.
fn extensions() -> impl Strategy<Value = Vec<(u8, Vec<u8>)>> {
    let header = |kind: u8, units: usize| {
        let mut bytes = vec![0; 8 + 8 * units];
        bytes[1] = units as u8;
        if kind != 43 {
            // One PadN option fills it.
            bytes[2..4].copy_from_slice(&[1, (8 * units + 4) as u8]);
        }
        (kind, bytes)
    };
    let one = move |kind: u8| prop::option::of((0usize..4).prop_map(move |u| header(kind, u)));
    (one(0), one(60), one(43), one(60)).prop_map(|(a, b, c, d)| [a, b, c, d].into_iter().flatten().collect())
}

/// Any frame: TCP or UDP, either IP, tags, options.
pub(super) fn any_build() -> impl Strategy<Value = Build> {
    let options = prop::sample::select(vec![
        vec![],
        vec![0x94, 4, 0, 0],          // router alert: copied into fragments
        vec![7, 7, 4, 1, 2, 3, 4, 0], // record route: not copied; end of list
        vec![1, 0x44, 8, 5, 0, 9, 9, 9, 9, 1, 0x94, 4, 0, 0, 0, 0], // timestamp: not copied, then router alert
    ]);
    let tags = prop::sample::select(vec![vec![], vec![0x8100], vec![0x88a8, 0x8100], vec![0x8100, 0x8100]]);
    let tcp_options =
        prop::sample::select(vec![vec![], vec![1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8], vec![1; 40]]);
    let payload = prop::collection::vec(any::<u8>(), 0..4000);
    let ip = (any::<bool>(), options, extensions(), any::<u16>());
    let tcp = (any::<bool>(), any::<u8>(), any::<u32>(), tcp_options);
    (tags, ip, tcp, payload).prop_map(
        |(tags, (v6, options, extensions, id), (tcp, flags, sequence, tcp_options), payload)| {
            Build {
                tags,
                v6,
                options: if v6 { vec![] } else { options },
                extensions: if v6 { extensions } else { vec![] },
                id,
                tcp,
                // No SYN (refused), no URG (its pointer has a test of its own).
                flags: flags & !0x22,
                sequence,
                tcp_options,
                payload,
            }
        },
    )
}
