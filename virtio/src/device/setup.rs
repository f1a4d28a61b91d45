//! What a ring is started with, and why starting it can fail.

use std::sync::Arc;

use crate::memory::split::DESC_WRITE;
use crate::memory::{DirtyLog, GuestMemory, HostRange};

/// Memory layout of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Descriptor table, avail ring, used ring (section 2.7).
    Split,
    /// One descriptor ring and two event areas (section 2.8).
    Packed,
}

/// What the device does with the buffers of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Reads them: the guest transmits.
    Read,
    /// Writes them: the guest receives.
    Write,
    /// Reads the first buffers of a chain and writes the others (section 2.6.4.2): requests and their answers.
    Both,
}

impl Direction {
    /// Flags of a chain of one buffer that needs no walk. A request and its answer always do: no descriptor has all flags
    /// among those that this is compared with.
    pub(super) fn plain(self) -> u16 {
        match self {
            Direction::Read => 0,
            Direction::Write => DESC_WRITE,
            Direction::Both => u16::MAX,
        }
    }
}

/// A packed ring's part of the inflight region (vhost-user, "Inflight I/O tracking"), which outlives a crash of the
/// back end: position and wrap counter of the next used descriptor are written to it once a burst.
#[derive(Clone)]
pub struct InflightArea {
    /// This queue's part of the region.
    pub range: HostRange,
    /// Keeps the region mapped.
    pub mapping: Arc<dyn std::any::Any + Send + Sync>,
}

/// Everything that a device-side ring needs. The three ranges come from [`GuestMemory::user_range`]; `memory` keeps them
/// mapped.
#[derive(Clone)]
pub struct RingSetup {
    /// Split or packed.
    pub layout: Layout,
    /// Read (the guest's transmit ring) or write (its receive ring).
    pub direction: Direction,
    /// Number of descriptors: for split rings a power of two up to 32,768, for packed ones 1 to 32,768.
    pub size: u16,
    /// Descriptor table, or the packed ring.
    pub descriptors: HostRange,
    /// Avail ring, or the driver's event suppression area.
    pub driver: HostRange,
    /// Used ring, or the device's event suppression area.
    pub device: HostRange,
    /// Where to go on: for split rings the next avail index; for packed ones as VHOST_USER_SET_VRING_BASE has it (bits
    /// 0..15 next avail position and wrap counter, bits 16..31 the same of used). `None` for a packed ring means: as the
    /// inflight area says.
    pub base: Option<u32>,
    /// Negotiated features (masks of [`crate::features`]).
    pub features: u64,
    /// The guest's memory.
    pub memory: Arc<GuestMemory>,
    /// Where to log writes, while the guest migrates.
    pub log: Option<Arc<DirtyLog>>,
    /// Guest-physical address under which writes to the used ring are logged, if they are.
    pub log_used: Option<u64>,
    /// Where the position is kept across a crash (packed rings).
    pub inflight: Option<InflightArea>,
}

/// What is wrong with a ring. The port stops and shows this.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// A size that the layout does not allow.
    #[error("ring size {0} is not possible")]
    Size(u16),
    /// One of the three areas is too small or misaligned.
    #[error("{area} area of {len} bytes at guest {guest:#x} is too small or misaligned")]
    Area {
        /// "descriptor", "driver" or "device".
        area: &'static str,
        /// Bytes.
        len: usize,
        /// Guest-physical address.
        guest: u64,
    },
    /// Two of the three areas share bytes.
    #[error("ring areas overlap")]
    AreasOverlap,
    /// The starting position lies outside the ring.
    #[error("ring base {0:#x} lies outside the ring")]
    Base(u32),
    /// A packed ring without a position and without an inflight area to take it from.
    #[error(
        "packed ring cannot be resumed: the front end gave neither a position nor an inflight region; restart the guest's driver"
    )]
    NoPosition,
    /// The avail index is more than the ring size ahead.
    #[error("avail index {avail} is more than {size} ahead of {next}")]
    AvailIndex {
        /// What was read.
        avail: u16,
        /// What would come next.
        next: u16,
        /// Ring size.
        size: u16,
    },
    /// An avail ring entry or next field names a descriptor that does not exist.
    #[error("descriptor index {index} is outside a table of {size}")]
    Index {
        /// What was read.
        index: u32,
        /// Table size.
        size: u32,
    },
    /// A buffer outside guest memory, or across the edge of a region.
    #[error("descriptor {index}: {len} bytes at address {address:#x} outside guest memory")]
    Address {
        /// Descriptor that has it.
        index: u16,
        /// Guest-physical address.
        address: u64,
        /// Bytes.
        len: u32,
    },
    /// A chain that does not end.
    #[error("descriptor {index}: chain does not end within the ring")]
    Loop {
        /// Where it began.
        index: u16,
    },
    /// An indirect table that is empty, odd-sized, too long, nested or mixed with a chain.
    #[error("descriptor {index}: indirect table of {len} bytes is malformed")]
    Indirect {
        /// Descriptor that refers to it.
        index: u16,
        /// Its length field.
        len: u32,
    },
    /// The memory behind the port went away (its file was truncated).
    #[error("guest memory was truncated by its owner")]
    MemoryGone,
}

impl RingSetup {
    /// The three areas must not share bytes: the device would read its own writes.
    pub(super) fn check_overlap(&self) -> Result<(), RingError> {
        let ranges =
            [self.descriptors, self.driver, self.device].map(|r| (r.ptr as usize, r.ptr as usize + r.len));
        let disjoint = |a: (usize, usize), b: (usize, usize)| a.1 <= b.0 || b.1 <= a.0;
        let [d, a, u] = ranges;
        if disjoint(d, a) && disjoint(d, u) && disjoint(a, u) { Ok(()) } else { Err(RingError::AreasOverlap) }
    }
}
