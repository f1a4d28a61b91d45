//! Turns of a worker while the frames of some port are lost, damaged, doubled, exchanged or kept waiting on purpose.
//!
//! Frames of such ports take a way of their own: copies of them go onto a [lane](Lane), and what comes off it is judged and sent
//! like any burst. Apart from the other turns, which know nothing of it. Frames are looked at (captured) on the far side of the
//! lane: as they came in, and as they really go out.

use host::cpu::rdtsc;
use port::{Burst, BurstBuffer, DropReason, FrameSet, Release, RxQueue, Scratch, TagEdit};

use super::{Tools, Turn, send};
use crate::bridge::{Clock, IngressState, Outputs};
use crate::capture::Way;
use crate::counters::{RxCounters, TxCounters};
use crate::inject::{BURSTS, Lane, OnLane};
use crate::outgoing::Outgoing;
use crate::plan::{Extras, Plan};
use crate::slot::{Running, RxSlot};

/// One look at every queue, and at every lane that frames go out by.
#[inline(never)]
pub(super) fn turn(
    plan: &Plan,
    extras: &Extras,
    index: usize,
    clock: Clock,
    tools: &mut Tools,
    done: &mut Turn,
) {
    for (port, lane) in extras.injections.all_outward().filter(|(_, lane)| lane.holds()) {
        let Some(mut line) = lane.try_claim() else { continue };
        tools.scratch.refill();
        let [_, buffer] = &mut tools.held;
        let left = Leaving { plan, extras, port }.leave(&mut line, buffer, &mut tools.scratch);
        done.bursts += u64::from(left);
    }
    for queue in plan.queues.get(index).map(Vec::as_slice).unwrap_or_default() {
        poll(plan, extras, queue, clock, tools, done);
    }
    for queue in plan.devices.queues_of(index) {
        poll(plan, extras, queue, clock, tools, done);
    }
}

/// One burst of one queue.
fn poll<R: Running>(
    plan: &Plan,
    extras: &Extras,
    queue: &RxSlot<R>,
    clock: Clock,
    tools: &mut Tools,
    done: &mut Turn,
) {
    let Tools { owner, buffer, outputs, scratch, spent, held: [coming, going] } = tools;
    let Some(mut entered) = queue.enter(owner) else { return };
    let Some(mut polled) = queue.polled(&mut entered, plan.burst) else { return };
    let (port, counters) = (queue.port_number(), &queue.counters);
    let lane = extras.injections.inward(port, R::number(queue.index));
    let waiting = polled.ring.peek() > 0;
    if !waiting && !lane.is_some_and(Lane::holds) {
        return;
    }
    scratch.refill();
    let bytes_before = counters.bytes.get();
    let mut forward = Forward {
        plan,
        extras,
        port,
        clock,
        ingress: polled.ingress,
        outputs,
        scratch,
        counters,
        buffer: going,
    };
    let Some(lane) = lane else {
        let mut burst = polled.ring.poll(buffer);
        let dropped_before = counters.drops.total();
        look(extras, port, &burst, burst.all(), TagEdit::Keep, Way::In);
        done.frames += burst.len() as u64;
        done.bursts += u64::from(!burst.is_empty());
        done.bytes += counters.bytes.get().wrapping_sub(bytes_before);
        forward.burst(&mut burst);
        drop(burst);
        done.dropped += counters.drops.total().wrapping_sub(dropped_before);
        spend(counters, spent);
        return;
    };
    // Somebody else changes it: the frames wait where they are.
    let Some(mut line) = lane.try_claim() else { return };
    let mut dropped_before = counters.drops.total();
    if waiting {
        let mut burst = polled.ring.poll(buffer);
        dropped_before = counters.drops.total();
        look(extras, port, &burst, burst.all(), TagEdit::Keep, Way::In);
        done.frames += burst.len() as u64;
        done.bursts += u64::from(!burst.is_empty());
        done.bytes += counters.bytes.get().wrapping_sub(bytes_before);
        let copies = take_in(&mut line, &mut burst);
        burst.release();
        // A frame that comes twice was received twice.
        counters.received.add(copies);
    }
    for _ in 0..BURSTS {
        let count = line.lend(rdtsc(), coming);
        if count == 0 {
            break;
        }
        let mut lent = Lent { line: &mut line, counters: Some(counters) };
        forward.burst(&mut Burst::new(&mut lent, coming, count));
        done.bursts += 1;
    }
    done.dropped += counters.drops.total().wrapping_sub(dropped_before);
    spend(counters, spent);
}

/// The time since it was last asked for was this queue's.
fn spend(counters: &RxCounters, spent: &mut u64) {
    let now = rdtsc();
    counters.cycles.add(now.wrapping_sub(std::mem::replace(spent, now)));
}

/// Copies the frames of `burst` onto a line; how many more there are than came.
fn take_in(line: &mut OnLane<'_>, burst: &mut Burst<'_>) -> u64 {
    let now = rdtsc();
    let (mut copies, mut injected, mut lost) = (0, FrameSet::EMPTY, FrameSet::EMPTY);
    for i in burst.all() {
        let (Some(frame), Some(head)) = (burst.frames().get(i), burst.heads().get(i)) else { continue };
        // As it is, it is as possible as it was.
        let taken = Outgoing::new(burst, frame, head, TagEdit::Keep).map(|frame| line.take(now, &frame));
        match taken {
            Some(Ok(times)) => copies += times - 1,
            Some(Err(DropReason::Injected)) => injected.insert(i),
            Some(Err(_)) | None => lost.insert(i),
        }
    }
    burst.drop_frames(injected, DropReason::Injected);
    burst.drop_frames(lost, DropReason::InjectedLost);
    copies
}

/// Copies that a line lends, on behalf of the queue whose frames they are.
struct Lent<'l, 'c> {
    line: &'l mut OnLane<'c>,
    /// `None`: they were judged before.
    counters: Option<&'l RxCounters>,
}

impl Release for Lent<'_, '_> {
    fn release(&mut self) {
        self.line.take_back();
    }

    fn dropped(&mut self, set: FrameSet, reason: DropReason) {
        if let Some(counters) = self.counters {
            counters.drops.add(reason, set.len() as u64);
        }
    }
}

/// Shows frames to those who look at them.
fn look(extras: &Extras, port: u16, burst: &Burst<'_>, set: FrameSet, edit: TagEdit, way: Way) {
    extras.captures.iter().for_each(|capture| capture.take(port, burst, set, edit, way));
}

/// What it takes to judge bursts of one port and send them on.
struct Forward<'w> {
    plan: &'w Plan,
    extras: &'w Extras,
    port: u16,
    clock: Clock,
    ingress: &'w mut IngressState,
    outputs: &'w mut Outputs,
    scratch: &'w mut Scratch,
    counters: &'w RxCounters,
    buffer: &'w mut BurstBuffer,
}

impl Forward<'_> {
    fn burst(&mut self, burst: &mut Burst<'_>) {
        if burst.is_empty() {
            return;
        }
        let Self { plan, extras, .. } = *self;
        let done = plan.bridge.classify(self.port, burst, self.clock, self.ingress, self.outputs);
        self.counters.switched.add(u64::from(done.switched));
        self.counters.replicas.add(u64::from(done.replicas - done.switched));
        for (port, set, edit) in self.outputs.drain() {
            match extras.injections.outward(port) {
                None => {
                    look(extras, port, burst, set, edit, Way::Out);
                    send(plan, port, burst, set, edit, self.scratch);
                }
                Some(lane) => {
                    let leaving = Leaving { plan, extras, port };
                    let copies = leaving.send(lane, burst, set, edit, self.buffer, self.scratch);
                    self.counters.replicas.add(copies);
                }
            }
        }
    }
}

/// What it takes to send frames out of a port by its lane.
struct Leaving<'w> {
    plan: &'w Plan,
    extras: &'w Extras,
    port: u16,
}

impl Leaving<'_> {
    /// Copies the frames of `set` onto `lane`, and sends what is due; how many more they became.
    fn send(
        &self,
        lane: &Lane,
        burst: &Burst<'_>,
        set: FrameSet,
        edit: TagEdit,
        buffer: &mut BurstBuffer,
        scratch: &mut Scratch,
    ) -> u64 {
        let Some(mut line) = lane.claim() else {
            self.refuse(DropReason::RingBusy, set.len() as u64);
            return 0;
        };
        let now = rdtsc();
        let mut copies = 0;
        for i in set {
            let (Some(frame), Some(head)) = (burst.frames().get(i), burst.heads().get(i)) else { continue };
            let out = Outgoing::new(burst, frame, head, edit).ok_or(DropReason::BadOffload);
            match out.and_then(|out| line.take(now, &out)) {
                Ok(times) => copies += times - 1,
                Err(reason) => self.refuse(reason, 1),
            }
        }
        self.leave(&mut line, buffer, scratch);
        copies
    }

    /// Sends what is due; whether that was anything.
    fn leave(&self, line: &mut OnLane<'_>, buffer: &mut BurstBuffer, scratch: &mut Scratch) -> bool {
        let Self { plan, extras, port } = *self;
        for round in 0..BURSTS {
            let count = line.lend(rdtsc(), buffer);
            if count == 0 {
                return round > 0;
            }
            let mut lent = Lent { line, counters: None };
            let burst = Burst::new(&mut lent, buffer, count);
            look(extras, port, &burst, burst.all(), TagEdit::Keep, Way::Out);
            send(plan, port, &burst, burst.all(), TagEdit::Keep, scratch);
        }
        true
    }

    /// Counts frames that did not come as far as a queue of the port, at its first.
    fn refuse(&self, reason: DropReason, frames: u64) {
        let guest = self.plan.port(self.port).and_then(|port| port.tx.first()).map(|slot| &slot.counters);
        let device = || self.plan.devices.port(self.port)?.tx.first().map(|slot| &slot.counters);
        if let Some(counters) = guest.or_else(device) {
            TxCounters::refuse(counters, reason, frames);
        }
    }
}
