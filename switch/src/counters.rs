//! Counters of queues and workers: written by one thread at a time, read by anyone.
//!
//! Each counter has one writer (whoever holds the queue's claim, or the worker itself), so that counting is a load and a
//! store, never an atomic read-modify-write. Readers sum.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use port::DropReason;

/// A number that one thread at a time adds to.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. Only for the one writer.
    #[inline(always)]
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// The sum so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Drops by reason.
#[derive(Debug)]
pub struct Drops([Counter; DropReason::COUNT]);

impl Default for Drops {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Counter::default()))
    }
}

impl Drops {
    /// Counts `n` frames under `reason`.
    #[inline(always)]
    pub fn add(&self, reason: DropReason, n: u64) {
        if let Some(counter) = self.0.get(reason as usize) {
            counter.add(n);
        }
    }

    /// The reasons under which anything was counted.
    pub fn list(&self) -> Vec<(DropReason, u64)> {
        let all = DropReason::ALL.iter().zip(&self.0).map(|(r, c)| (*r, c.get()));
        all.filter(|(_, n)| *n > 0).collect()
    }

    /// All reasons together.
    pub fn total(&self) -> u64 {
        self.0.iter().map(Counter::get).sum()
    }
}

/// What became of the source addresses that came in on a queue.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct AddressCounters {
    /// Addresses learnt.
    pub learnt: Counter,
    /// Addresses that were at another port before.
    pub moved: Counter,
    /// Frames whose address was not learnt because the port has its limit of addresses.
    pub limit_reached: Counter,
    /// Frames whose address was not learnt because its part of the table is full.
    pub table_full: Counter,
}

/// What came in on a queue: `received = switched + dropped`.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct RxCounters {
    /// Frames that the sender made available.
    pub received: Counter,
    /// Bytes of them, without FCS and virtio-net header.
    pub bytes: Counter,
    /// Bursts that were not empty.
    pub bursts: Counter,
    /// Frames handed to at least one output.
    pub switched: Counter,
    /// Copies beyond the first of frames that were flooded.
    pub replicas: Counter,
    /// Frames handed to none.
    pub drops: Drops,
    /// TSC cycles of the polls that found at least one frame, until the last copy was handed over.
    pub cycles: Counter,
    /// The addresses that they came from.
    pub addresses: Arc<AddressCounters>,
}

/// What went out of a queue: `offered = sent + dropped`. Over all queues of a switch, `received + replicas` of the one side
/// is `sent + dropped` of both.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct TxCounters {
    /// Frames that were to go out here.
    pub offered: Counter,
    /// Frames copied to the receiver.
    pub sent: Counter,
    /// Bytes of them, without FCS and virtio-net header.
    pub bytes: Counter,
    /// Calls that copied at least one frame.
    pub bursts: Counter,
    /// Segments that unsegmented frames were cut into for this receiver.
    pub segments: Counter,
    /// Notifications sent to the driver.
    pub calls: Counter,
    /// Frames that could not be sent.
    pub drops: Drops,
    /// Frames that did not come as far as the ring, by reason: counted by whoever does not hold it, so atomically.
    refused: Refused,
}

#[derive(Debug)]
struct Refused([AtomicU64; DropReason::COUNT]);

impl Default for Refused {
    fn default() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl TxCounters {
    /// Counts `frames` that did not come as far as the ring, such as those that found it busy for longer than the retry budget
    /// ([`DropReason::RingBusy`]). For anyone.
    #[cold]
    pub(crate) fn refuse(&self, reason: DropReason, frames: u64) {
        if let Some(counter) = self.refused.0.get(reason as usize) {
            counter.fetch_add(frames, Ordering::Relaxed);
        }
    }

    /// Frames that were to go out here, those that did not come as far as the ring included.
    pub fn all_offered(&self) -> u64 {
        let refused: u64 = self.refused.0.iter().map(|n| n.load(Ordering::Relaxed)).sum();
        self.offered.get() + refused
    }

    /// All drops by reason.
    pub fn all_drops(&self) -> Vec<(DropReason, u64)> {
        let refused = self.refused.0.iter().map(|n| n.load(Ordering::Relaxed));
        let counted = DropReason::ALL.iter().zip(&self.drops.0).zip(refused);
        counted.map(|((reason, n), refused)| (*reason, n.get() + refused)).filter(|(_, n)| *n > 0).collect()
    }
}

/// What a worker did with its time.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct WorkerCounters {
    /// Frames taken from receive queues.
    pub frames: Counter,
    /// Bytes of them, without FCS and virtio-net header.
    pub bytes: Counter,
    /// Those of them that the bridge handed to no output.
    pub dropped: Counter,
    /// Bursts that were not empty.
    pub bursts: Counter,
    /// Turns over all queues.
    pub turns: Counter,
    /// TSC cycles of turns that found at least one frame.
    pub busy: Counter,
    /// TSC cycles of turns that found none, waiting included.
    pub idle: Counter,
    /// Times it went to sleep.
    pub sleeps: Counter,
}
