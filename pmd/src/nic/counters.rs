//! What the queues count. Each counter has one writer, the queue's user, and any number of readers.

use std::sync::atomic::{AtomicU64, Ordering};

use port::DropReason;

/// A number with one writer.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds; only by its writer. No read-modify-write.
    #[inline(always)]
    pub(crate) fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// What it is now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Frames dropped, by reason.
#[derive(Debug)]
pub struct Drops([Counter; DropReason::COUNT]);

impl Default for Drops {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Counter::default()))
    }
}

impl Drops {
    #[inline(always)]
    pub(crate) fn add(&self, reason: DropReason, n: u64) {
        if let Some(counter) = self.0.get(reason as usize) {
            counter.add(n);
        }
    }

    /// How many for `reason`.
    pub fn get(&self, reason: DropReason) -> u64 {
        self.0.get(reason as usize).map_or(0, Counter::get)
    }

    /// How many in all.
    pub fn sum(&self) -> u64 {
        self.0.iter().map(Counter::get).sum()
    }
}

/// Of a receive queue. `frames` = handed on or dropped, damaged ones too.
#[derive(Debug, Default)]
pub struct ReceiveCounters {
    /// Frames that came in.
    pub frames: Counter,
    /// Their bytes, without FCS.
    pub bytes: Counter,
    /// Dropped on the way in.
    pub drops: Drops,
    /// Error bits of descriptors, by [`super::Nic::RECEIVE_ERRORS`].
    pub errors: [Counter; 8],
    /// How often the ring could not be filled for want of buffers.
    pub starved: Counter,
}

/// Of a transmit queue. `offered` = sent + dropped.
#[derive(Debug, Default)]
pub struct TransmitCounters {
    /// Frames given to [`port::TxQueue::send`].
    pub offered: Counter,
    /// Frames handed to the device.
    pub sent: Counter,
    /// Their bytes, without FCS.
    pub bytes: Counter,
    /// Of these frames, the ones that were not copied: they came in by a card of the same arena.
    pub uncopied: Counter,
    /// Dropped here.
    pub drops: Drops,
}
