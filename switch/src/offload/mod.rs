//! Finishing in software what a sender left to be done: checksums and segmentation, for receivers that did not
//! negotiate to take frames as they are.
//!
//! Works on a private, contiguous copy of a frame and never on guest memory; allocates nothing. Believes no length and no
//! offset that the frame or its virtio-net header gives before it has been checked against the bytes that are there.
//! Nothing that the pipeline has judged (addresses, tags, IP headers, ports) is ever written over: a checksum field
//! that would lie there is refused.

mod cut;
mod headers;
mod sum;

#[cfg(test)]
mod tests;

use port::{DropReason, Gso, Offload, OffloadError};
use virtio::features;

pub use cut::Segments;

use headers::{Ethernet, Network, PROTOCOL_TCP, PROTOCOL_UDP};
use sum::Sum;

bitflags::bitflags! {
    /// What a receiver takes unfinished. None of the others means anything without `CHECKSUM` (virtio 1.3, 5.1.3.1).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Accepts: u8 {
        /// Frames without their checksum.
        const CHECKSUM = 1;
        /// TCP over IPv4, unsegmented.
        const TSO4 = 1 << 1;
        /// TCP over IPv6, unsegmented.
        const TSO6 = 1 << 2;
        /// Unsegmented TCP whose first segment says "congestion window reduced".
        const ECN = 1 << 3;
        /// UDP datagrams, unfragmented.
        const UFO = 1 << 4;
        /// Runs of UDP datagrams over IPv4, unsegmented.
        const USO4 = 1 << 5;
        /// Runs of UDP datagrams over IPv6, unsegmented.
        const USO6 = 1 << 6;
    }
}

/// What is to be done to a frame before its receiver can have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Nothing: it goes out as it came, with its virtio-net header.
    Nothing,
    /// [`finish_checksum`].
    Checksum,
    /// [`Segments`].
    Cut,
}

impl Accepts {
    /// What a guest that negotiated `features` (masks of [`virtio::features`]) takes.
    pub fn of_features(features: u64) -> Self {
        let bits = [
            (features::NET_GUEST_CSUM, Self::CHECKSUM),
            (features::NET_GUEST_TSO4, Self::TSO4),
            (features::NET_GUEST_TSO6, Self::TSO6),
            (features::NET_GUEST_ECN, Self::ECN),
            (features::NET_GUEST_UFO, Self::UFO),
            (features::NET_GUEST_USO4, Self::USO4),
            (features::NET_GUEST_USO6, Self::USO6),
        ];
        let all =
            bits.iter().filter(|(mask, _)| features & mask != 0).fold(Self::empty(), |a, &(_, b)| a | b);
        if all.contains(Self::CHECKSUM) { all } else { Self::empty() }
    }

    /// What is to be done to a frame with this virtio-net header. Decided once a frame, so without looking into it: runs
    /// of UDP datagrams go unsegmented only to a receiver that takes them over both versions of IP.
    #[inline]
    pub fn work(self, offload: &Offload) -> Work {
        if offload.is_none() {
            return Work::Nothing;
        }
        let needed = match offload.gso() {
            Ok(Gso::None) if !offload.needs_csum() => return Work::Nothing,
            Ok(Gso::None) if self.contains(Self::CHECKSUM) => return Work::Nothing,
            Ok(Gso::None) => return Work::Checksum,
            Ok(Gso::Tcp4) => Self::TSO4,
            Ok(Gso::Tcp6) => Self::TSO6,
            Ok(Gso::UdpFragment) => Self::UFO,
            Ok(Gso::UdpSegment) => Self::USO4 | Self::USO6,
            Err(_) => return Work::Cut, // which refuses it, with the reason
        };
        let ecn = if offload.ecn() { Self::ECN } else { Self::empty() };
        if self.contains(needed | ecn) { Work::Nothing } else { Work::Cut }
    }
}

/// Why a frame cannot be finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OffloadRefused {
    /// The virtio-net header makes no sense for a frame of this length.
    #[error(transparent)]
    Header(#[from] OffloadError),
    /// The frame ends inside a header.
    #[error("the frame ends inside its {0} header")]
    Truncated(&'static str),
    /// A header has a field that cannot be.
    #[error("{0}")]
    Malformed(&'static str),
    /// The checksum field is not where the frame's headers have one.
    #[error(
        "checksum of the bytes from {start} at offset {offset}: the frame's headers have no checksum there"
    )]
    ChecksumPlace {
        /// csum_start.
        start: u16,
        /// csum_offset.
        offset: u16,
    },
    /// More segments than the caller allows.
    #[error("{count} segments, of which {limit} are allowed")]
    TooManySegments {
        /// How many it would be.
        count: usize,
        /// How many may be.
        limit: usize,
    },
    /// The space given is shorter than the next segment.
    #[error("a segment of {needed} bytes does not fit into {given}")]
    NoRoom {
        /// The segment's length.
        needed: usize,
        /// The space given.
        given: usize,
    },
}

impl OffloadRefused {
    /// The reason under which a frame so refused is counted.
    pub fn reason(&self) -> DropReason {
        match self {
            Self::Header(_) => DropReason::BadOffload,
            Self::TooManySegments { .. } => DropReason::SegmentBudget,
            Self::Truncated(_) | Self::Malformed(_) | Self::ChecksumPlace { .. } | Self::NoRoom { .. } => {
                DropReason::CannotFinish
            }
        }
    }
}

/// Fills in the checksum that `offload` asks for (virtio 1.3, 5.1.6.2): the sum of everything from csum_start on,
/// which includes the pseudo-header's sum that the sender left in the field. `frame` is whole, from its first Ethernet byte;
/// segmentation is [`Segments`]' task and is not looked at.
///
/// # Errors
/// The field lies outside the frame, or in a header that was judged before: nothing was changed.
pub fn finish_checksum(frame: &mut [u8], offload: &Offload) -> Result<(), OffloadRefused> {
    offload.check(u32::try_from(frame.len()).unwrap_or(u32::MAX))?;
    if !offload.needs_csum() {
        return Ok(());
    }
    let (start, offset) = (offload.csum_start(), offload.csum_offset);
    let misplaced = OffloadRefused::ChecksumPlace { start, offset };
    let (from, field) = (usize::from(start), usize::from(start) + usize::from(offset));
    if field < judged_bytes(frame, from, field)? {
        return Err(misplaced);
    }
    let udp = usize::from(offset) == UDP_CHECKSUM;
    let sum = frame.get(from..).ok_or(misplaced)?;
    let checksum = if udp { Sum::of(sum).checksum_of_udp() } else { Sum::of(sum).checksum() };
    // The field was part of the sum; now it is replaced.
    frame.get_mut(field..field + 2).ok_or(misplaced)?.copy_from_slice(&checksum);
    Ok(())
}

/// How many bytes at the frame's start may not be written over: all headers up to TCP's or UDP's, except for that
/// header's own checksum.
fn judged_bytes(frame: &[u8], from: usize, field: usize) -> Result<usize, OffloadRefused> {
    let ethernet = Ethernet::parse(frame)?;
    let Some(network) = Network::parse(frame, &ethernet)? else { return Ok(ethernet.payload_at) };
    let transport = network.payload_at;
    if network.fragment {
        return Err(OffloadRefused::Malformed("a fragment has no checksum of its own"));
    }
    let (own, header) = match network.protocol {
        PROTOCOL_TCP => (TCP_CHECKSUM, 20),
        PROTOCOL_UDP => (UDP_CHECKSUM, 8),
        _ => return Ok(transport),
    };
    Ok(if from == transport && field == transport + own { field } else { transport + header })
}

/// Offset of the checksum in a TCP header (RFC 9293, 3.1).
const TCP_CHECKSUM: usize = 16;
/// Offset of the checksum in a UDP header (RFC 768).
const UDP_CHECKSUM: usize = 6;
