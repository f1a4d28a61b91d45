//! Cutting an unsegmented frame into those that its sender meant: TCP segments, UDP datagrams, IP fragments.
//!
//! The headers are parsed here; the virtio-net header's hdr_len is a hint and is not used. All checks are done before the
//! first segment is written; writing them is copying and adding.

use std::hash::{BuildHasher, RandomState};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};

use port::{Gso, Offload};

use super::headers::{Ethernet, Network, PROTOCOL_FRAGMENT, PROTOCOL_TCP, PROTOCOL_UDP, Version, number_at};
use super::sum::Sum;
use super::{OffloadRefused, TCP_CHECKSUM, UDP_CHECKSUM};

// Bits of byte 13 of a TCP header (RFC 9293, 3.1; RFC 3168, 6.1).
const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const PSH: u8 = 0x08;
const URG: u8 = 0x20;
const CWR: u8 = 0x80;

/// Bytes of an IPv6 fragment header (RFC 8200, 4.5).
const FRAGMENT_HEADER: usize = 8;

/// How the segments of a frame differ from each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cut {
    /// TCP segments.
    Tcp,
    /// UDP datagrams.
    Datagrams,
    /// IP fragments of one UDP datagram; `checksum` belongs into the first, `id` into IPv6 fragment headers.
    Fragments { checksum: Option<[u8; 2]>, id: u32 },
}

/// The segments of one frame, written one by one.
pub struct Segments<'a> {
    frame: &'a [u8],
    network: Network,
    cut: Cut,
    /// What every segment begins with: the frame's bytes up to here.
    headers_len: usize,
    /// Bytes of the rest that a segment carries (the last one may have fewer).
    size: usize,
    /// How many segments there are.
    count: usize,
    /// How many have been written.
    written: usize,
}

impl<'a> Segments<'a> {
    /// Prepares to cut `frame`, whole and private, as `offload` says. A frame that needs no cutting after all comes out as one
    /// segment, finished.
    ///
    /// # Errors
    /// The headers are not those of such a frame, a length in them is wrong, or there would be more than `limit` segments.
    pub fn new(frame: &'a [u8], offload: &Offload, limit: usize) -> Result<Self, OffloadRefused> {
        offload.check(u32::try_from(frame.len()).unwrap_or(u32::MAX))?;
        let gso = offload.gso()?;
        let ethernet = Ethernet::parse(frame)?;
        let network =
            Network::parse(frame, &ethernet)?.ok_or(OffloadRefused::Malformed("the frame is not IP"))?;
        network.check_len(frame)?;
        if network.fragment {
            return Err(OffloadRefused::Malformed("the frame is an IP fragment already"));
        }
        let protocol = match (gso, network.version) {
            (Gso::Tcp4, Version::V4) | (Gso::Tcp6, Version::V6) => PROTOCOL_TCP,
            (Gso::UdpFragment | Gso::UdpSegment, _) => PROTOCOL_UDP,
            (Gso::None, _) => return Err(OffloadRefused::Malformed("the frame needs no segmentation")),
            _ => return Err(OffloadRefused::Malformed("gso_type names another version of IP")),
        };
        if network.protocol != protocol {
            return Err(OffloadRefused::Malformed("gso_type names another protocol"));
        }

        let size = usize::from(offload.gso_size());
        let segments = match gso {
            Gso::UdpFragment => Self::fragments(frame, network, offload, size)?,
            Gso::UdpSegment => Self::datagrams(frame, network, offload, size)?,
            _ => Self::tcp(frame, network, offload, size)?,
        };
        if segments.count > limit {
            return Err(OffloadRefused::TooManySegments { count: segments.count, limit });
        }
        // IPv6 does not count its own header.
        let longest = usize::from(u16::MAX) + if network.version == Version::V6 { 40 } else { 0 };
        if frame.len().max(segments.longest()) - network.at > longest {
            return Err(OffloadRefused::Malformed("the packet or a segment of it is longer than IP allows"));
        }
        Ok(segments)
    }

    fn tcp(
        frame: &'a [u8],
        network: Network,
        offload: &Offload,
        size: usize,
    ) -> Result<Self, OffloadRefused> {
        let truncated = OffloadRefused::Truncated("TCP");
        let at = network.payload_at;
        let header: &[u8; 20] = frame.get(at..).and_then(|f| f.first_chunk()).ok_or(truncated)?;
        let len = usize::from(header[12] >> 4) * 4;
        if len < 20 {
            return Err(OffloadRefused::Malformed("the TCP header's length is impossible"));
        }
        if at + len > frame.len() {
            return Err(truncated);
        }
        check_checksum_place(offload, at, TCP_CHECKSUM)?;
        let segments = Self::of(frame, network, Cut::Tcp, at + len, size);
        if segments.count > 1 && header[13] & SYN != 0 {
            return Err(OffloadRefused::Malformed("a TCP SYN cannot be segmented"));
        }
        Ok(segments)
    }

    fn datagrams(
        frame: &'a [u8],
        network: Network,
        offload: &Offload,
        size: usize,
    ) -> Result<Self, OffloadRefused> {
        check_udp(frame, &network)?;
        check_checksum_place(offload, network.payload_at, UDP_CHECKSUM)?;
        Ok(Self::of(frame, network, Cut::Datagrams, network.payload_at + 8, size))
    }

    fn fragments(
        frame: &'a [u8],
        network: Network,
        offload: &Offload,
        size: usize,
    ) -> Result<Self, OffloadRefused> {
        let at = network.payload_at;
        check_udp(frame, &network)?;
        // The checksum covers the datagram, so it is known before the datagram is cut. Without NEEDS_CSUM it is there.
        let checksum = if offload.needs_csum() {
            check_checksum_place(offload, at, UDP_CHECKSUM)?;
            frame.get(at..).map(|datagram| Sum::of(datagram).checksum_of_udp())
        } else {
            None
        };
        // Fragment offsets count units of 8 bytes; the first fragment holds all headers (RFC 7112).
        let size = size & !7;
        if size == 0 || network.fragment_header_at + size < at + 8 {
            return Err(OffloadRefused::Malformed(
                "gso_size has no room for the headers of a first fragment",
            ));
        }
        let cut = Cut::Fragments { checksum, id: 0 };
        let mut segments = Self::of(frame, network, cut, network.fragment_header_at, size);
        if network.version == Version::V6 && segments.count > 1 {
            segments.cut = Cut::Fragments { checksum, id: fragment_id(frame, &network) };
        }
        if network.version == Version::V4 && segments.count > 1 {
            check_options(frame, &network)?;
        }
        Ok(segments)
    }

    fn of(frame: &'a [u8], network: Network, cut: Cut, headers_len: usize, size: usize) -> Self {
        // Even a frame without payload is one segment.
        let count = frame.len().saturating_sub(headers_len).div_ceil(size).max(1);
        Self { frame, network, cut, headers_len, size, count, written: 0 }
    }

    /// How many segments there are in all.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Bytes of the longest segment, from its first Ethernet byte.
    pub fn longest(&self) -> usize {
        (self.headers_len + self.size).min(self.frame.len()) + self.inserted()
    }

    /// Bytes that segments have and the frame has not.
    fn inserted(&self) -> usize {
        let fragments = matches!(self.cut, Cut::Fragments { .. }) && self.count > 1;
        if fragments && self.network.version == Version::V6 { FRAGMENT_HEADER } else { 0 }
    }

    /// Writes the next segment, complete with all checksums, to the start of `out` and returns its length; `None` when all
    /// have been written.
    ///
    /// # Errors
    /// [`OffloadRefused::NoRoom`] if `out` is shorter; nothing that has a length of at least [`Self::longest`] is.
    pub fn write_next(&mut self, out: &mut [u8]) -> Result<Option<usize>, OffloadRefused> {
        if self.written == self.count {
            return Ok(None);
        }
        let begin = self.written * self.size;
        let rest = self.frame.get(self.headers_len + begin..).unwrap_or_default();
        let payload = rest.get(..self.size).unwrap_or(rest);
        let (needed, given) = (self.headers_len + self.inserted() + payload.len(), out.len());
        // The second error cannot be: what is written over lies in the headers that `new` found.
        let no_room = OffloadRefused::NoRoom { needed, given };
        self.write(out.get_mut(..needed).ok_or(no_room)?, begin, payload).ok_or(no_room)?;
        self.written += 1;
        Ok(Some(needed))
    }

    /// Writes the segment whose payload begins `begin` bytes into the frame's; it fills `out`.
    fn write(&self, out: &mut [u8], begin: usize, payload: &[u8]) -> Option<()> {
        put(out, 0, self.frame.get(..self.headers_len)?)?;
        put(out, self.headers_len + self.inserted(), payload)?;
        match self.cut {
            Cut::Tcp => self.finish_tcp(out, begin)?,
            Cut::Datagrams => self.finish_datagram(out)?,
            Cut::Fragments { checksum, id } => self.finish_fragment(out, begin, checksum, id)?,
        }
        match self.network.version {
            Version::V4 => self.finish_ipv4(out),
            Version::V6 => put_number(out, self.network.at + 4, out.len() - self.network.at - 40),
        }
    }

    fn is_first(&self) -> bool {
        self.written == 0
    }

    fn is_last(&self) -> bool {
        self.written + 1 == self.count
    }

    /// Sequence number, flags and urgent pointer (RFC 9293, 3.1), then the checksum.
    fn finish_tcp(&self, out: &mut [u8], begin: usize) -> Option<()> {
        let at = self.network.payload_at;
        let header: &mut [u8; 20] = out.get_mut(at..)?.first_chunk_mut()?;
        let offset = u32::try_from(begin).ok()?;
        let sequence = u32::from_be_bytes([header[4], header[5], header[6], header[7]]).wrapping_add(offset);
        put(header, 4, &sequence.to_be_bytes())?;
        if !self.is_last() {
            header[13] &= !(FIN | PSH);
        }
        if !self.is_first() {
            // Said once: the peer would reduce its window again for each (RFC 3168, 6.1.2).
            header[13] &= !CWR;
            // The pointer counts from this segment's sequence number; behind it nothing is urgent.
            let left = usize::from(u16::from_be_bytes([header[18], header[19]])).saturating_sub(begin);
            if header[13] & URG != 0 {
                put_number(header, 18, left)?;
                header[13] &= if left == 0 { !URG } else { !0 };
            }
        }
        let checksum = self.transport_sum(out)?.checksum();
        put(out, at + TCP_CHECKSUM, &checksum)
    }

    fn finish_datagram(&self, out: &mut [u8]) -> Option<()> {
        let at = self.network.payload_at;
        put_number(out, at + 4, out.len() - at)?;
        let checksum = self.transport_sum(out)?.checksum_of_udp();
        put(out, at + UDP_CHECKSUM, &checksum)
    }

    /// The sum of a segment from its transport header on, with its pseudo-header. The checksum field holds the sum of the
    /// whole frame's pseudo-header, which differs in nothing but the length. (Adding it up again from the addresses would
    /// be wrong where a routing header or a home address option replaces them.)
    fn transport_sum(&self, out: &[u8]) -> Option<Sum> {
        let at = self.network.payload_at;
        let (whole, this) = (self.frame.len() - at, out.len() - at);
        let (whole, this) = (u16::try_from(whole).ok()?, u16::try_from(this).ok()?);
        Some(Sum::of(out.get(at..)?).less_number(whole).and_number(this))
    }

    /// RFC 791, 3.2 and RFC 8200, 4.5: where in the datagram this fragment lies. A datagram that needs no fragments after all
    /// gets none of it.
    fn finish_fragment(
        &self,
        out: &mut [u8],
        begin: usize,
        checksum: Option<[u8; 2]>,
        id: u32,
    ) -> Option<()> {
        let Network { version, at, payload_at, fragment_header_at, fragment_announced_at, .. } = self.network;
        if let (true, Some(checksum)) = (self.is_first(), checksum) {
            put(out, payload_at + self.inserted() + UDP_CHECKSUM, &checksum)?;
        }
        if self.count == 1 {
            return Some(());
        }
        let more = usize::from(!self.is_last());
        if version == Version::V4 {
            // DF goes: the sender asked for fragments.
            put_number(out, at + 6, (begin / 8) | (more << 13))?;
            return if self.is_first() { Some(()) } else { blank_options(out.get_mut(at + 20..payload_at)?) };
        }
        let announced = std::mem::replace(out.get_mut(fragment_announced_at)?, PROTOCOL_FRAGMENT);
        put(out, fragment_header_at, &[announced, 0])?;
        put_number(out, fragment_header_at + 2, begin | more)?;
        put(out, fragment_header_at + 4, &id.to_be_bytes())
    }

    /// Total length, identification and checksum (RFC 791, 3.1). Fragments keep the identification: they are put together
    /// by it.
    fn finish_ipv4(&self, out: &mut [u8]) -> Option<()> {
        let at = self.network.at;
        put_number(out, at + 2, out.len() - at)?;
        if !matches!(self.cut, Cut::Fragments { .. }) {
            let id = usize::from(number_at(out, at + 4)?) + self.written;
            put_number(out, at + 4, id & 0xffff)?;
        }
        put(out, at + 10, &[0, 0])?;
        let checksum = Sum::of(out.get(at..self.network.payload_at)?).checksum();
        put(out, at + 10, &checksum)
    }
}

fn put(out: &mut [u8], at: usize, bytes: &[u8]) -> Option<()> {
    out.get_mut(at..at + bytes.len())?.copy_from_slice(bytes);
    Some(())
}

/// Two bytes, most significant first; nothing if the number has more.
fn put_number(out: &mut [u8], at: usize, number: usize) -> Option<()> {
    put(out, at, &u16::try_from(number).ok()?.to_be_bytes())
}

fn check_checksum_place(offload: &Offload, transport: usize, field: usize) -> Result<(), OffloadRefused> {
    let (start, offset) = (offload.csum_start(), offload.csum_offset);
    if usize::from(start) != transport || usize::from(offset) != field {
        return Err(OffloadRefused::ChecksumPlace { start, offset });
    }
    Ok(())
}

fn check_udp(frame: &[u8], network: &Network) -> Result<(), OffloadRefused> {
    let at = network.payload_at;
    let header: &[u8; 8] =
        frame.get(at..).and_then(|f| f.first_chunk()).ok_or(OffloadRefused::Truncated("UDP"))?;
    if usize::from(u16::from_be_bytes([header[4], header[5]])) != frame.len() - at {
        return Err(OffloadRefused::Malformed("the UDP header's length is not that of the packet"));
    }
    Ok(())
}

/// The length of the IPv4 option that `options` begins with (RFC 791, 3.1), or `None` if it does not fit. The end of the
/// list reaches to the end.
fn option_len(options: &[u8]) -> Option<usize> {
    match options {
        [0, ..] => Some(options.len()),
        [1, ..] => Some(1),
        [_, len, ..] => Some(usize::from(*len)).filter(|&len| len >= 2 && len <= options.len()),
        _ => None,
    }
}

fn check_options(frame: &[u8], network: &Network) -> Result<(), OffloadRefused> {
    let mut options = frame.get(network.at + 20..network.payload_at).unwrap_or_default();
    while !options.is_empty() {
        let rest = option_len(options).and_then(|len| options.get(len..));
        options = rest.ok_or(OffloadRefused::Malformed("an IPv4 option's length is impossible"))?;
    }
    Ok(())
}

/// Replaces options that only the first fragment carries (those without the copied flag) by ones that say nothing.
fn blank_options(mut options: &mut [u8]) -> Option<()> {
    while !options.is_empty() {
        let (option, rest) = options.split_at_mut_checked(option_len(options)?)?;
        if option.first().is_some_and(|kind| kind & 0x80 == 0 && *kind != 0) {
            option.fill(1);
        }
        options = rest;
    }
    Some(())
}

/// An identification for the fragments of a datagram: unlike that of any other datagram of late between the same two
/// addresses, and not to be guessed by others (RFC 7739, 5.3: a secret function of the addresses plus a counter).
fn fragment_id(frame: &[u8], network: &Network) -> u32 {
    static SECRET: LazyLock<RandomState> = LazyLock::new(RandomState::new);
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let addresses = frame.get(network.at + 8..network.at + 40);
    (SECRET.hash_one(addresses) as u32).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed))
}
