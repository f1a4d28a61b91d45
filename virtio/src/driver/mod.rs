//! The driver side of a virtqueue: offers buffers, takes back the used ones.
//!
//! The memory is ours; the device at the other end is another process and is not trusted. What it writes (used indices,
//! ids, lengths, flags, event areas) is read once and checked against a private table of what was offered; a device that
//! lies yields a [`DriverFault`], never a panic or an access out of range. Never allocates after the start, never blocks,
//! never knows what the buffers are for: a `token` that the caller chose names each of them.
//!
//! A burst is offered with [`DriverRing::offer`] (one descriptor a buffer, the fast path) or buffer by buffer with
//! [`DriverRing::offer_chain`] and [`DriverRing::offer_indirect`]; nothing is visible to the device before
//! [`DriverRing::publish`].

mod area;
#[cfg(all(test, loom))]
mod loom_tests;
mod packed;
#[cfg(test)]
#[cfg(not(loom))]
mod packed_tests;
mod split;

use std::any::Any;
use std::sync::Arc;

use crate::device::{Direction, Layout};
use crate::memory::HostRange;

pub use packed::PackedDriver;
pub use split::SplitDriver;

/// Descriptor flag: the chain goes on.
const NEXT: u16 = 1;
/// Descriptor flag: the device writes the buffer.
const WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors.
const INDIRECT: u16 = 4;

/// Bytes that the three areas of a ring need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AreaSizes {
    /// Descriptor table, or the packed ring.
    pub descriptors: usize,
    /// Avail ring, or the driver's event suppression area.
    pub driver: usize,
    /// Used ring, or the device's event suppression area.
    pub device: usize,
}

impl AreaSizes {
    /// For a ring of `size` descriptors (sections 2.7 and 2.8).
    pub fn of(layout: Layout, size: u16) -> Self {
        let n = usize::from(size);
        match layout {
            Layout::Split => Self { descriptors: 16 * n, driver: 6 + 2 * n, device: 6 + 8 * n },
            Layout::Packed => Self { descriptors: 16 * n, driver: 4, device: 4 },
        }
    }
}

/// Memory for indirect tables: one of `entries` descriptors for each descriptor of the ring.
#[derive(Clone, Copy, Debug)]
pub struct IndirectTables {
    /// `16 * entries * ring size` bytes.
    pub range: HostRange,
    /// Longest chain that fits into a table.
    pub entries: u16,
}

/// Everything that a driver-side ring needs. `guest` of each range is the address under which the device knows it.
pub struct DriverSetup {
    /// Split or packed.
    pub layout: Layout,
    /// Whether the device reads the buffers (transmit), writes them (receive), or reads the first pieces of a chain and
    /// writes the others (requests and their answers, [`DriverRing::offer_request`]).
    pub direction: Direction,
    /// Number of descriptors: for split rings a power of two, at most 32,768.
    pub size: u16,
    /// Negotiated features (masks of [`crate::features`]).
    pub features: u64,
    /// Descriptor table, or the packed ring.
    pub descriptors: HostRange,
    /// Avail ring, or the driver's event suppression area.
    pub driver: HostRange,
    /// Used ring, or the device's event suppression area.
    pub device: HostRange,
    /// Where indirect tables go; `None` if none will be offered.
    pub indirect: Option<IndirectTables>,
    /// Keeps all of it mapped.
    pub mapping: Arc<dyn Any + Send + Sync>,
}

/// A buffer of one descriptor.
#[derive(Clone, Copy, Debug)]
pub struct Single {
    /// Its address as the device knows it.
    pub address: u64,
    /// Bytes.
    pub len: u32,
    /// Comes back with it.
    pub token: u32,
}

/// A piece of a buffer that takes several descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Its address as the device knows it.
    pub address: u64,
    /// Bytes.
    pub len: u32,
}

/// Why a ring could not be set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SetupError {
    /// A size that the layout does not allow.
    #[error(
        "ring size {0} is not possible: a split ring has a power of two of descriptors, any ring 1 to 32768"
    )]
    Size(u16),
    /// An area is too small or not aligned to 16 bytes.
    #[error("{0} area is too small, or not aligned to 16 bytes")]
    Area(&'static str),
}

/// Why a buffer was not offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OfferError {
    /// Not now: too few free descriptors. Reclaim used buffers first.
    #[error("the ring has too few free descriptors at the moment")]
    Full,
    /// Never: more pieces than the ring or an indirect table holds, or none.
    #[error("{0} pieces do not fit into a chain of this ring")]
    Pieces(usize),
    /// Indirect tables were not negotiated, or no memory was set aside for them.
    #[error("the ring has no indirect tables")]
    NoTables,
    /// A request on a ring that the device only reads, or only writes.
    #[error("the ring is not one of requests and their answers")]
    OneWay,
}

/// What the device did wrong. The ring is of no use any more: reset the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DriverFault {
    /// The used index is further ahead than buffers are outstanding.
    #[error("used index {used} is {ahead} ahead, but only {outstanding} buffers are outstanding")]
    UsedIndex {
        /// What was read.
        used: u16,
        /// Its distance to what was reclaimed last.
        ahead: u16,
        /// Buffers that the device has.
        outstanding: u16,
    },
    /// A used element names a buffer that the device does not have.
    #[error("used element names buffer {id}, which the device does not have")]
    UsedId {
        /// What was read.
        id: u32,
    },
    /// More bytes were written than the buffer has.
    #[error("used element of buffer {id} claims {len} bytes written; it has {capacity}")]
    UsedLen {
        /// The buffer.
        id: u16,
        /// What was read.
        len: u32,
        /// Bytes that the device may write.
        capacity: u32,
    },
}

/// What is known of an outstanding buffer, by its id (split: its first descriptor).
#[derive(Clone, Copy, Default)]
struct Slot {
    /// The caller's name for the buffer.
    token: u32,
    /// Bytes that the device may write.
    writable: u32,
    /// Descriptors of the ring that it takes; 0 if the device does not have it.
    span: u16,
}

/// A run of buffers that an in-order device returned with one used element.
#[derive(Clone, Copy, Default)]
struct Batch {
    /// Buffers of it not yet handed to the caller.
    left: u16,
    /// Bytes written to the last of them; the others were filled whole (section 2.7.9).
    last_len: u32,
}

/// Checks sizes and alignment, which both layouts need.
#[cfg(not(loom))]
fn check(setup: &DriverSetup) -> Result<(), SetupError> {
    let possible = match setup.layout {
        Layout::Split => setup.size.is_power_of_two() && setup.size <= 32_768,
        Layout::Packed => (1..=32_768).contains(&setup.size),
    };
    if !possible {
        return Err(SetupError::Size(setup.size));
    }
    let sizes = AreaSizes::of(setup.layout, setup.size);
    let fits =
        |r: &HostRange, len| r.len >= len && r.ptr.addr().is_multiple_of(16) && r.guest.is_multiple_of(16);
    if !fits(&setup.descriptors, sizes.descriptors) {
        return Err(SetupError::Area("descriptor"));
    }
    if !fits(&setup.driver, sizes.driver) {
        return Err(SetupError::Area("driver"));
    }
    if !fits(&setup.device, sizes.device) {
        return Err(SetupError::Area("device"));
    }
    match &setup.indirect {
        Some(t) if !fits(&t.range, 16 * usize::from(t.entries) * usize::from(setup.size)) => {
            Err(SetupError::Area("indirect table"))
        }
        _ => Ok(()),
    }
}

/// The second half of a descriptor: length and two 16-bit fields (split: flags and next; packed: id and flags).
#[inline(always)]
fn word(len: u32, a: u16, b: u16) -> u64 {
    u64::from(len) | u64::from(a) << 32 | u64::from(b) << 48
}

/// A driver-side ring of either layout. The layout is looked up once a burst.
pub enum DriverRing {
    /// Section 2.7.
    Split(SplitDriver),
    /// Section 2.8.
    Packed(PackedDriver),
}

macro_rules! either {
    ($self:expr, $ring:ident => $call:expr) => {
        match $self {
            DriverRing::Split($ring) => $call,
            DriverRing::Packed($ring) => $call,
        }
    };
}

impl DriverRing {
    /// A ring on zeroed areas, with nothing offered yet. Notifications by the device are suppressed.
    ///
    /// # Safety
    /// The ranges of `setup` stay mapped readable and writable as long as its `mapping` lives, do not overlap, no Rust
    /// reference to them exists, and no device runs on them yet.
    ///
    /// # Errors
    /// Sizes or areas that cannot be.
    #[cfg(not(loom))]
    pub unsafe fn new(setup: DriverSetup) -> Result<Self, SetupError> {
        check(&setup)?;
        // SAFETY: passed on; `check` saw that the areas are as large as the layout needs, and aligned.
        Ok(unsafe {
            match setup.layout {
                Layout::Split => Self::Split(SplitDriver::new(setup)),
                Layout::Packed => Self::Packed(PackedDriver::new(setup)),
            }
        })
    }

    /// Offers buffers of one descriptor each, in order, as many as there are free descriptors for; returns how many. For rings
    /// that go one way.
    #[inline(always)]
    pub fn offer(&mut self, buffers: impl Iterator<Item = Single>) -> usize {
        either!(self, ring => ring.offer(buffers))
    }

    /// Offers one buffer as a chain of descriptors in the ring.
    ///
    /// # Errors
    /// See [`OfferError`].
    pub fn offer_chain(&mut self, pieces: &[Piece], token: u32) -> Result<(), OfferError> {
        let readable = if self.direction() == Direction::Write { 0 } else { pieces.len() };
        either!(self, ring => ring.offer_chain(pieces, readable, token))
    }

    /// Offers one buffer as an indirect table, which takes one descriptor of the ring. For rings that go one way.
    ///
    /// # Errors
    /// See [`OfferError`].
    pub fn offer_indirect(&mut self, pieces: &[Piece], token: u32) -> Result<(), OfferError> {
        either!(self, ring => ring.offer_indirect(pieces, token))
    }

    /// Offers one request: a chain in the ring whose first `readable` pieces the device reads, and whose others it writes
    /// (section 2.6.4.2). For rings of [`Direction::Both`].
    ///
    /// # Errors
    /// See [`OfferError`].
    pub fn offer_request(&mut self, pieces: &[Piece], readable: usize, token: u32) -> Result<(), OfferError> {
        if self.direction() != Direction::Both {
            return Err(OfferError::OneWay);
        }
        either!(self, ring => ring.offer_chain(pieces, readable, token))
    }

    fn direction(&self) -> Direction {
        either!(self, ring => ring.direction)
    }

    /// Makes everything offered so far visible to the device. Returns whether the device wants to be notified of it.
    #[inline(always)]
    pub fn publish(&mut self) -> bool {
        either!(self, ring => ring.publish())
    }

    /// Takes back up to `max` buffers that the device has used: for each, `each` gets its token and the number of bytes
    /// written (0 on a transmit ring; of a request, those of its answer). Writes nothing to shared memory.
    ///
    /// # Errors
    /// The device broke the ring; buffers for which `each` was called are back.
    #[inline(always)]
    pub fn reclaim(&mut self, max: usize, each: impl FnMut(u32, u32)) -> Result<usize, DriverFault> {
        either!(self, ring => ring.reclaim(max, each))
    }

    /// Free descriptors.
    #[inline(always)]
    pub fn free(&self) -> u16 {
        either!(self, ring => ring.free())
    }

    /// Whether the device has used something that was not reclaimed yet.
    pub fn is_ready(&self) -> bool {
        either!(self, ring => ring.is_ready())
    }

    /// Asks the device to notify us of the next used buffer. Look once more before you sleep: `true` if there was something
    /// already.
    pub fn request_notification(&mut self) -> bool {
        either!(self, ring => ring.request_notification())
    }

    /// Tells the device that we poll.
    pub fn suppress_notifications(&mut self) {
        either!(self, ring => ring.suppress_notifications())
    }

    /// Where a device that starts anew on this ring goes on, as VHOST_USER_SET_VRING_BASE wants it: behind the last buffer
    /// that the old one published as used. Buffers that it had taken but not returned are processed again. Exact for devices
    /// that use buffers in order.
    ///
    /// # Errors
    /// The old device left the ring broken.
    pub fn resume_position(&self) -> Result<u32, DriverFault> {
        either!(self, ring => ring.resume_position())
    }

    /// Gives up the ring: `each` gets the tokens of everything that the device had. For a ring whose device is gone.
    pub fn abandon(self, each: impl FnMut(u32)) {
        either!(self, ring => ring.abandon(each))
    }
}
