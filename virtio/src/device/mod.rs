//! The device side of a virtqueue: takes what the driver made available, gives it back used, in the order in which it was
//! made available unless a device asks for another ([`Ring::take`]).
//!
//! [`DeviceRing`] is one of two layouts; hot code is written once over the trait [`Ring`] and matches on the layout once a
//! burst. Chains that were fetched wait in a [`Stock`] until they are used; those that were not used when a ring stops are
//! fetched again when it starts: the device holds nothing that the driver could miss.

mod chain;
mod inflight;
mod packed;
mod setup;
mod split;

use crate::memory::copy::full_fence;

pub use chain::{Buffer, Chain, MAX_CHAIN, Stock, Taken};
pub use packed::PackedRing;
pub use setup::{Direction, InflightArea, Layout, RingError, RingSetup};
pub use split::SplitRing;

/// The device side of one virtqueue, whatever its layout.
///
/// The cycle of a burst: [`Ring::peek`] (cheap, prefetches), [`Ring::fetch`], read or write the chains, then
/// [`Ring::use_read`] or [`Ring::use_written`], then one [`Ring::publish`].
pub trait Ring {
    /// How many chains could be fetched now, at most `want`; a guess for packed rings, exact enough to know whether there is
    /// none. Starts fetching descriptors from memory. Writes nothing.
    ///
    /// # Errors
    /// The avail index is impossible.
    fn peek(&mut self, want: usize) -> Result<usize, RingError>;

    /// Brings the stock up to `want` chains if that many are available. Returns how many it holds.
    ///
    /// # Errors
    /// The ring is broken, and must not be used any more. Chains fetched before are whole.
    fn fetch(&mut self, want: usize) -> Result<usize, RingError>;

    /// What it was started with; where it logs may have changed since.
    fn setup(&self) -> &RingSetup;

    /// The chains that were fetched and not used.
    fn stock(&self) -> &Stock;

    /// The first `n` chains in stock were read and are used.
    fn use_read(&mut self, n: usize);

    /// The first chain in stock is used; `written` bytes were written to it.
    fn use_written(&mut self, written: u32);

    /// Takes the first chain out of the stock, to be used later and in any order: for a device that has several requests
    /// under way. A ring that stops meanwhile forgets it, and neither finds where it was by itself when it starts again, nor by
    /// an inflight area: only for devices whose driver starts anew then. Not with IN_ORDER.
    fn take(&mut self) -> Option<Taken>;

    /// A chain that was taken is used; `written` bytes were written to it.
    fn use_taken(&mut self, chain: Taken, written: u32);

    /// Makes everything used since the last call visible to the driver; false if there is nothing. Whether the driver wants
    /// to be notified is then still to be asked.
    fn make_visible(&mut self) -> bool;

    /// Whether the driver wants to be notified of what became visible since it was last asked. To be called after a
    /// [`full_fence`]: the driver sets its wish, then looks at the ring; we the other way round (sections 2.7.7.2, 2.8.10).
    fn notification_wanted(&mut self) -> bool;

    /// Makes everything used visible. True if the driver wants to be notified.
    #[inline(always)]
    fn publish(&mut self) -> bool {
        self.make_visible() && {
            full_fence();
            self.notification_wanted()
        }
    }

    /// Asks the driver for notifications (or, with `false`, for none).
    fn set_notify(&mut self, on: bool);

    /// Starts fetching the descriptors that come after the stock: called at the end of a burst for those of the next.
    fn prefetch_ahead(&self, descriptors: u16);

    /// Where the ring would go on, as VHOST_USER_GET_VRING_BASE has it.
    fn base(&self) -> u32;
}

/// A ring of either layout.
pub enum DeviceRing {
    /// Section 2.7 of the specification.
    Split(SplitRing),
    /// Section 2.8 of the specification.
    Packed(PackedRing),
}

// SAFETY: the pointers in a ring's views are into guest memory that its `RingSetup::memory` (and `inflight`) keeps mapped,
// whichever thread runs the ring.
unsafe impl Send for DeviceRing {}

/// `match` on the layout once, then run the same code over the concrete ring.
#[macro_export]
macro_rules! with_ring {
    ($ring:expr, $r:ident => $body:expr) => {
        match $ring {
            $crate::device::DeviceRing::Split($r) => $body,
            $crate::device::DeviceRing::Packed($r) => $body,
        }
    };
}

impl DeviceRing {
    /// Starts a ring where `setup` says.
    ///
    /// # Errors
    /// What is impossible about it.
    pub fn start(setup: RingSetup) -> Result<Self, RingError> {
        match setup.layout {
            Layout::Split => SplitRing::start(setup).map(DeviceRing::Split),
            Layout::Packed => PackedRing::start(setup).map(DeviceRing::Packed),
        }
    }

    /// What it was started with, to change where it logs.
    pub fn setup_mut(&mut self) -> &mut RingSetup {
        with_ring!(self, r => r.setup_mut())
    }

    /// Asks the driver for notifications (or, with `false`, for none).
    pub fn set_notify(&mut self, on: bool) {
        with_ring!(self, r => r.set_notify(on));
    }

    /// Whether chains are waiting. A broken ring counts as waiting, so that somebody looks.
    pub fn has_work(&mut self) -> bool {
        with_ring!(self, r => !r.stock().is_empty() || r.peek(1) != Ok(0))
    }

    /// Where the ring would go on, as VHOST_USER_GET_VRING_BASE has it.
    pub fn base(&self) -> u32 {
        with_ring!(self, r => r.base())
    }
}
