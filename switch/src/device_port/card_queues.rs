//! A card's queues as those of a port: what the driver counts becomes what the port counts.
//!
//! Bursts pass as they are: a card lends them itself, and takes sets of frames of them.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use pmd::nic::{AnyReceive, AnyTransmit, ReceiveCounters, Single};
use port::{
    Burst, BurstBuffer, DropReason, FrameSet, Gso, Offload, PutError, RxQueue, Scratch, Segment, Sink,
    TagEdit, TxQueue,
};

use crate::counters::{RxCounters, TxCounters};

/// A card's receive queue: it fills bursts itself, heads too, and what it drops is counted for its port.
pub(crate) struct CardReceive {
    pub(super) queue: AnyReceive,
    /// Becomes readable when frames come in, if the queue was armed.
    pub(super) bell: Option<OwnedFd>,
    counters: Arc<ReceiveCounters>,
    /// Frames and drops that the port knows of.
    frames: u64,
    drops: [u64; DropReason::COUNT],
}

impl CardReceive {
    /// A queue that was not polled yet.
    pub(super) fn new(queue: AnyReceive, bell: Option<OwnedFd>) -> Self {
        let counters = queue.counters();
        Self { queue, bell, counters, frames: 0, drops: [0; DropReason::COUNT] }
    }

    /// Fills `buffer`; how many frames that are, which are not released yet.
    pub(super) fn poll(&mut self, buffer: &mut BurstBuffer, counters: &RxCounters) -> usize {
        let burst = self.queue.poll(buffer);
        let came = burst.len();
        let bytes: u64 = burst.frames().iter().map(|frame| u64::from(frame.len)).sum();
        // They are lent by the port, which releases them.
        std::mem::forget(burst);
        let all = self.counters.frames.get() - self.frames;
        self.frames += all;
        if all > 0 {
            counters.received.add(all);
            counters.bytes.add(bytes);
            counters.bursts.add(u64::from(came > 0));
        }
        if all != came as u64 {
            self.count_drops(counters);
        }
        came
    }

    #[cold]
    fn count_drops(&mut self, counters: &RxCounters) {
        for (reason, known) in DropReason::ALL.iter().zip(&mut self.drops) {
            let now = self.counters.drops.get(*reason);
            counters.drops.add(*reason, now - std::mem::replace(known, now));
        }
    }
}

/// A card's transmit queue.
pub(crate) struct CardSend {
    single: Single<AnyTransmit>,
    /// Drops that the port knows of.
    drops: [u64; DropReason::COUNT],
}

impl CardSend {
    /// A queue that nothing was sent to yet.
    pub(super) fn new(queue: AnyTransmit) -> Self {
        let counters = queue.counters();
        Self { single: Single::new(queue, counters), drops: [0; DropReason::COUNT] }
    }

    /// The frames of `set` that nobody has to cut: tags and checksums are the card's business.
    pub(super) fn whole(burst: &Burst<'_>, set: FrameSet) -> FrameSet {
        let mut whole = set;
        for i in set {
            let offload = burst.frames().get(i).map_or(Offload::NONE, |frame| frame.offload);
            if !offload.is_none() && offload.gso() != Ok(Gso::None) {
                whole.remove(i);
            }
        }
        whole
    }

    /// Gives the card all of `set` at once; returns how many frames and bytes it took. The others are counted.
    pub(super) fn send(
        &mut self,
        burst: &Burst<'_>,
        set: FrameSet,
        edit: TagEdit,
        scratch: &mut Scratch,
        counters: &TxCounters,
    ) -> (u64, u64) {
        let of_card = self.single.counters();
        let before = (of_card.sent.get(), of_card.bytes.get());
        self.single.queue.send(burst, set, edit, scratch);
        let of_card = self.single.counters();
        let (sent, bytes) = (of_card.sent.get() - before.0, of_card.bytes.get() - before.1);
        if sent != set.len() as u64 {
            self.each_drop(|reason, n| counters.drops.add(reason, n));
        }
        (sent, bytes)
    }

    /// What was dropped since this was last asked.
    #[cold]
    fn each_drop(&mut self, mut tell: impl FnMut(DropReason, u64)) {
        for (reason, known) in DropReason::ALL.iter().zip(&mut self.drops) {
            let now = self.single.counters().drops.get(*reason);
            tell(*reason, now - std::mem::replace(known, now));
        }
    }
}

/// For frames that were finished in private memory; whoever finished them counts what is refused.
impl Sink for CardSend {
    fn put(
        &mut self,
        offload: Offload,
        len: usize,
        pieces: impl Iterator<Item = Segment>,
    ) -> Result<(), PutError> {
        let put = self.single.put(offload, len, pieces);
        if put.is_err() {
            self.each_drop(|_, _| {});
        }
        put
    }

    fn flush(&mut self) -> io::Result<()> {
        self.single.flush()
    }
}
