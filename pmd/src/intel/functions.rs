//! What a card that is shared with virtual functions does for them, as an adapter sees it.

use crate::access::{Bar, Regs};

/// Bits of the multicast table: a bit for each of 4,096 hashes.
pub type Groups = [u32; 128];

/// The virtual functions of an adapter. A card without them does nothing: `()`.
pub trait Functions: Send + 'static {
    /// The first queue that is the adapter's own.
    fn first_queue(&self) -> u32 {
        0
    }

    /// The pools (a function's share of the device) that the adapter's own addresses are for, a bit each; 0: it has none.
    fn pools(&self) -> u32 {
        0
    }

    /// Whether there still are as many as the adapter was shared out among, by what STATUS reads.
    fn are_those_of(&self, _status: u32) -> bool {
        true
    }

    /// The adapter is ready: its functions may begin.
    fn begin<B: Bar>(&mut self, _: &Regs<B>) {}

    /// Does what they asked for, at most one thing for each, and tells them of a `link` that went or came back. True if other groups
    /// are to be taken than before.
    fn serve<B: Bar>(&mut self, _: &Regs<B>, _link: bool) -> bool {
        false
    }

    /// Adds the groups that they take; `all`: the adapter takes every one.
    fn groups<B: Bar>(&self, _: &Regs<B>, _all: bool, _: &mut Groups) {}
}

impl Functions for () {}
