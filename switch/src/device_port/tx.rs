//! From a burst into a device's transmit queue.
//!
//! Every frame goes through [`crate::outgoing`]: what costs a system call each has no need of a shorter way. Cards have one: they
//! take sets of frames, edit tags and finish checksums themselves, and copy none that came in by another card of their arena.

use std::io;

use port::{Burst, DropReason, FrameSet, Offload, PutError, Scratch, Segment, Sink, TagEdit, TxQueue};

use super::card_queues::CardSend;
use super::kinds::each;
use super::{DeviceTx, Sinks, fail};
use crate::claim::Claim;
use crate::offload::Accepts;
use crate::outgoing::{Destination, Outgoing, Refusal};

/// How often a burst tries to claim a queue that another worker holds.
const CLAIM_RETRIES: u32 = 64;

/// A device's transmit queue between its opening and its end.
pub struct Sending {
    sink: Sinks,
    /// What the device takes undone.
    accepts: Accepts,
    /// Set when the device went away: it is not given anything any more.
    broken: bool,
}

impl Sending {
    /// `features`: what the device takes undone, as those of a guest that takes the same.
    pub(super) fn new(sink: Sinks, features: u64) -> Self {
        Self { sink, accepts: Accepts::of_features(features), broken: false }
    }
}

/// A device's transmit queue, claimed for one burst.
struct SendQueue<'c> {
    claim: Claim<'c, Option<Sending>>,
    slot: &'c DeviceTx,
}

impl DeviceTx {
    /// Sends through a claim of its own, within the burst's retry budget.
    pub(crate) fn send(&self, burst: &Burst<'_>, set: FrameSet, edit: TagEdit, scratch: &mut Scratch) {
        for _ in 0..CLAIM_RETRIES {
            if let Some(claim) = self.ring.try_claim() {
                let mut queue = SendQueue { claim, slot: self };
                queue.send(burst, set, edit, scratch);
                queue.notify();
                return;
            }
            std::hint::spin_loop();
        }
        self.counters.refuse(DropReason::RingBusy, set.len() as u64);
    }
}

impl<S: Sink> Destination for S {
    type Broken = io::Error;

    fn write(
        &mut self,
        offload: Offload,
        len: usize,
        pieces: impl Iterator<Item = Segment>,
    ) -> Result<(), Refusal<io::Error>> {
        self.put(offload, len, pieces).map_err(|e| match e {
            PutError::Full => Refusal::Drop(DropReason::ReceiverFull),
            PutError::Down => Refusal::Drop(DropReason::PortDown),
            PutError::Refused => Refusal::Drop(DropReason::DeviceRefused),
            PutError::Gone(error) => Refusal::Broken(error),
        })
    }
}

impl TxQueue for SendQueue<'_> {
    fn prepare(&mut self, _: usize) {}

    fn send(&mut self, burst: &Burst<'_>, set: FrameSet, edit: TagEdit, scratch: &mut Scratch) {
        let (counters, offered) = (&self.slot.counters, set.len() as u64);
        counters.offered.add(offered);
        let Some(sending) = self.claim.as_mut().filter(|s| !s.broken) else {
            counters.drops.add(DropReason::PortDown, offered);
            return;
        };
        let (mut sent, mut bytes) = (0u64, 0u64);
        let mut rest = set;
        if let Sinks::Card(card) = &mut sending.sink {
            let whole = CardSend::whole(burst, set);
            rest = set.without(whole);
            (sent, bytes) = card.send(burst, whole, edit, scratch, counters);
        }
        for i in rest.by_ref() {
            let (Some(frame), Some(head)) = (burst.frames().get(i), burst.heads().get(i)) else { continue };
            let Some(out) = Outgoing::new(burst, frame, head, edit) else {
                counters.drops.add(DropReason::BadOffload, 1);
                continue;
            };
            let accepts = sending.accepts;
            match each!(Sinks + Card, &mut sending.sink, s => out.send(accepts, s, scratch, counters)) {
                Ok(n) => (sent, bytes) = (sent + 1, bytes + u64::from(n)),
                Err(Refusal::Drop(reason)) => counters.drops.add(reason, 1),
                Err(Refusal::Broken(error)) => {
                    sending.broken = true;
                    fail(&self.slot.port, error);
                    counters.drops.add(DropReason::PortDown, 1);
                    break;
                }
            }
        }
        counters.drops.add(DropReason::PortDown, rest.len() as u64);
        if sent > 0 {
            counters.sent.add(sent);
            counters.bytes.add(bytes);
            counters.bursts.add(1);
        }
    }

    fn notify(&mut self) {
        let Some(sending) = self.claim.as_mut().filter(|s| !s.broken) else { return };
        if let Err(error) = each!(Sinks + Card, &mut sending.sink, s => s.flush()) {
            sending.broken = true;
            fail(&self.slot.port, error);
        }
    }
}
