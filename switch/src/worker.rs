//! A worker: one thread on one core that moves frames from receive queues to transmit queues, and does nothing else.
//!
//! Polls, never locks, never allocates, never logs. Sleeps only if told to. What varies was decided when the plan was built.

mod injected;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use host::cpu::rdtsc;
use port::{Burst, BurstBuffer, FrameSet, RxQueue, Scratch, TagEdit, TxQueue};

use crate::bridge::{Clock, Outputs, flow_hash};
use crate::capture::{Capture, Way};
use crate::claim::Owner;
use crate::config::Idle;
use crate::counters::WorkerCounters;
use crate::plan::{Plan, Plans};
use crate::sleeper::Sleeper;
use crate::slot::{Running, RxSlot};
use crate::vhost_port::VhostPort;

/// How long a worker that may sleep polls in vain before it does.
const PATIENCE_MICROSECONDS: u64 = 50;

/// How long it sleeps at most: a plan or a stop that was missed is seen then.
const SLEEP_MILLISECONDS: u16 = 200;

/// What others see of a worker.
pub struct WorkerShared {
    /// Index in the plan.
    pub index: usize,
    /// Core it runs on.
    pub core: u32,
    /// What it did.
    pub counters: WorkerCounters,
    /// Wakes it.
    pub sleeper: Arc<Sleeper>,
    /// TSC value that the bridge's seconds count from.
    pub epoch: u64,
    /// Whether it sleeps now.
    pub asleep: AtomicBool,
    /// Ends it.
    pub stop: AtomicBool,
}

/// A worker's private state.
pub struct Worker {
    shared: Arc<WorkerShared>,
    plans: Arc<Plans>,
    plan: Arc<Plan>,
    version: u64,
    tools: Tools,
    hz: u64,
    second_ends: u64,
    clock: Clock,
}

/// What the turns of a worker work with; allocated once.
struct Tools {
    owner: Owner,
    buffer: BurstBuffer,
    outputs: Outputs,
    scratch: Scratch,
    /// TSC up to which the time is some queue's or somebody else's.
    spent: u64,
    /// For frames on the lines of ports that suffer on purpose: coming in, and going out.
    held: [BurstBuffer; 2],
}

impl WorkerShared {
    /// A worker for `core` that has not begun. `epoch` is the TSC value that the bridge's seconds count from.
    ///
    /// # Errors
    /// The process has no descriptors left.
    pub fn new(index: usize, core: u32, epoch: u64) -> std::io::Result<Self> {
        let (counters, sleeper) = (WorkerCounters::default(), Sleeper::new()?);
        Ok(Self {
            index,
            core,
            counters,
            sleeper,
            epoch,
            asleep: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        })
    }
}

impl Worker {
    /// A worker that follows `plans`; `None` when this process had 65,535 of them.
    pub fn new(shared: Arc<WorkerShared>, plans: Arc<Plans>) -> Option<Self> {
        let hz = host::cpu::tsc_hz();
        let clock = clock_since(shared.epoch);
        let tools = Tools {
            owner: Owner::new()?,
            buffer: BurstBuffer::default(),
            outputs: Outputs::default(),
            scratch: Scratch::default(),
            spent: rdtsc(),
            held: Default::default(),
        };
        let (version, plan) = plans.load();
        Some(Self { shared, plans, plan, version, tools, hz, second_ends: clock.cycles + hz, clock })
    }

    /// Works until it is told to stop.
    pub fn run(&mut self) {
        let patience = self.hz / 1_000_000 * PATIENCE_MICROSECONDS;
        let mut last = rdtsc();
        let mut idle_since = last;
        while !self.shared.stop.load(Ordering::Relaxed) {
            if self.plans.version() != self.version {
                self.follow();
            }
            let done = turn(&self.plan, self.shared.index, self.clock, &mut self.tools);
            let mut now = rdtsc();
            let counters = &self.shared.counters;
            counters.turns.add(1);
            if done.bursts > 0 {
                counters.busy.add(now - last);
                counters.frames.add(done.frames);
                counters.bytes.add(done.bytes);
                counters.dropped.add(done.dropped);
                counters.bursts.add(done.bursts);
                idle_since = now;
            } else {
                counters.idle.add(now - last);
                if self.plan.idle == Idle::Sleep && now - idle_since > patience {
                    sleep(&self.plan, &self.shared, &mut self.tools.owner);
                    // What woke it is work; the time until then was not.
                    idle_since = rdtsc();
                    counters.idle.add(idle_since - now);
                    now = idle_since;
                }
            }
            last = now;
            self.tools.spent = now;
            self.clock.cycles = now;
            while now >= self.second_ends {
                self.second_ends += self.hz;
                self.clock.seconds += 1;
            }
        }
        leave_all(&self.plan, self.shared.index, &mut self.tools.owner);
    }

    /// Takes up the plan in force. The old one is freed by housekeeping, which holds it too.
    #[cold]
    fn follow(&mut self) {
        leave_all(&self.plan, self.shared.index, &mut self.tools.owner);
        (self.version, self.plan) = self.plans.load();
    }
}

#[cfg(test)]
impl Worker {
    /// One turn, after which the worker keeps nothing: a test changes rings on the same thread.
    pub(crate) fn turn(&mut self) -> usize {
        let frames = turn(&self.plan, self.shared.index, self.clock, &mut self.tools).frames as usize;
        leave_all(&self.plan, self.shared.index, &mut self.tools.owner);
        frames
    }
}

/// Gives up every queue that the worker polls under `plan`.
fn leave_all(plan: &Plan, index: usize, owner: &mut Owner) {
    for queue in plan.queues.get(index).map(Vec::as_slice).unwrap_or_default() {
        queue.leave(owner);
    }
    for queue in plan.devices.queues_of(index) {
        queue.leave(owner);
    }
}

/// The bridge's time, counted from the TSC value `epoch`.
pub(crate) fn clock_since(epoch: u64) -> Clock {
    let cycles = rdtsc();
    Clock { cycles, seconds: (cycles.saturating_sub(epoch) / host::cpu::tsc_hz()) as u32 + 1 }
}

/// What came in during a turn.
#[derive(Default)]
struct Turn {
    frames: u64,
    bytes: u64,
    dropped: u64,
    bursts: u64,
}

/// One look at every queue.
#[inline(always)]
fn turn(plan: &Plan, index: usize, clock: Clock, tools: &mut Tools) -> Turn {
    let mut done = Turn::default();
    if let Some(extras) = plan.extras.as_deref() {
        if extras.injections.is_empty() {
            turn_captured(plan, index, clock, tools, &extras.captures, &mut done);
        } else {
            injected::turn(plan, extras, index, clock, tools, &mut done);
        }
        return done;
    }
    for queue in plan.queues.get(index).map(Vec::as_slice).unwrap_or_default() {
        poll::<_, false>(plan, queue, clock, tools, &[], &mut done);
    }
    if !plan.devices.queues_of(index).is_empty() {
        turn_devices(plan, index, clock, tools, &mut done);
    }
    done
}

/// One look at every device's queue. Apart: the loop over guests' rings is laid out as if there were none.
#[inline(never)]
fn turn_devices(plan: &Plan, index: usize, clock: Clock, tools: &mut Tools, done: &mut Turn) {
    for queue in plan.devices.queues_of(index) {
        poll::<_, false>(plan, queue, clock, tools, &[], done);
    }
}

/// One look at every queue while somebody looks at frames. Apart, for the same reason.
#[inline(never)]
fn turn_captured(
    plan: &Plan,
    index: usize,
    clock: Clock,
    tools: &mut Tools,
    captures: &[Arc<Capture>],
    done: &mut Turn,
) {
    let guests = plan.queues.get(index).map(Vec::as_slice).unwrap_or_default();
    for queue in guests {
        poll::<_, true>(plan, queue, clock, tools, captures, done);
    }
    for queue in plan.devices.queues_of(index) {
        poll::<_, true>(plan, queue, clock, tools, captures, done);
    }
}

/// One burst of one queue, with copies of its frames for those who look at them.
#[inline(always)]
fn poll<R: Running, const CAPTURED: bool>(
    plan: &Plan,
    queue: &RxSlot<R>,
    clock: Clock,
    tools: &mut Tools,
    captures: &[Arc<Capture>],
    done: &mut Turn,
) {
    let Tools { owner, buffer, outputs, scratch, spent, .. } = tools;
    let Some(mut entered) = queue.enter(owner) else { return };
    let Some(mut polled) = queue.polled(&mut entered, plan.burst) else { return };
    let waiting = polled.ring.peek();
    if waiting == 0 {
        return;
    }
    // Most bursts go where the last one went: fetch that ring's free buffers while the sender's descriptors are still on
    // their way here (85 -> 80 cycles a frame in the prototype).
    let likely = *polled.likely;
    let mut ahead = plan.port(likely).and_then(VhostPort::only_tx).and_then(|slot| slot.try_claim());
    if let Some(tx) = &mut ahead {
        tx.prepare(waiting);
    }
    scratch.refill();
    let bytes_before = queue.counters.bytes.get();
    let mut burst = polled.ring.poll(buffer);
    let frames = burst.len() as u64;
    done.frames += frames;
    done.bytes += queue.counters.bytes.get().wrapping_sub(bytes_before);
    done.bursts += u64::from(frames > 0);
    if CAPTURED {
        let set = burst.all();
        captures.iter().for_each(|c| c.take(queue.port_number(), &burst, set, TagEdit::Keep, Way::In));
    }
    let whole = plan.bridge.recall(queue.port_number(), &burst, clock, polled.ingress);
    if whole.is_some() {
        queue.counters.switched.add(frames);
    } else {
        let classified =
            plan.bridge.classify(queue.port_number(), &mut burst, clock, polled.ingress, outputs);
        queue.counters.switched.add(u64::from(classified.switched));
        queue.counters.replicas.add(u64::from(classified.replicas - classified.switched));
        done.dropped += frames.saturating_sub(u64::from(classified.switched));
    }
    let whole = whole.map(|(port, edit)| (port, burst.all(), edit));
    for (port, set, edit) in whole.into_iter().chain(outputs.drain()) {
        if CAPTURED {
            captures.iter().for_each(|c| c.take(port, &burst, set, edit, Way::Out));
        }
        match &mut ahead {
            Some(tx) if port == likely => tx.send(&burst, set, edit, scratch),
            _ => send(plan, port, &burst, set, edit, scratch),
        }
        *polled.likely = port;
    }
    burst.release();
    if let Some(tx) = &mut ahead {
        tx.notify();
    }
    // Polls that found nothing before this one in the same turn are part of it: a look at an empty ring costs next to nothing.
    let now = rdtsc();
    queue.counters.cycles.add(now.wrapping_sub(std::mem::replace(spent, now)));
}

/// Sends to a port that was not prepared, or that has several receive rings: each flow keeps to one.
#[inline(never)]
pub(crate) fn send(
    plan: &Plan,
    port: u16,
    burst: &Burst<'_>,
    set: FrameSet,
    edit: TagEdit,
    scratch: &mut Scratch,
) {
    let Some(guest) = plan.port(port) else {
        if let Some(device) = plan.devices.port(port) {
            let active = device.shared.active_queues();
            spread(burst, set, active, |queue, set| {
                if let Some(slot) = device.tx.get(queue) {
                    slot.send(burst, set, edit, scratch);
                }
            });
        }
        return;
    };
    spread(burst, set, guest.active_queues(), |queue, set| {
        if let Some(slot) = guest.tx.get(queue) {
            slot.send(burst, set, edit, scratch);
        }
    });
}

/// Divides `set` among `active` queues, each flow to one.
#[inline(always)]
fn spread(burst: &Burst<'_>, set: FrameSet, active: usize, mut send: impl FnMut(usize, FrameSet)) {
    if active <= 1 {
        send(0, set);
        return;
    }
    let mut left = set;
    while let Some(first) = { left }.next() {
        let queue = queue_of(burst, first, active);
        let mut same = FrameSet::EMPTY;
        for i in left {
            if queue_of(burst, i, active) == queue {
                same.insert(i);
            }
        }
        left = left.without(same);
        send(queue, same);
    }
}

/// The receive ring of frame `i` among `active`.
fn queue_of(burst: &Burst<'_>, i: usize, active: usize) -> usize {
    match (burst.heads().get(i), burst.frames().get(i)) {
        (Some(head), Some(frame)) => flow_hash(head, frame) as usize % active,
        _ => 0,
    }
}

/// Asks all drivers for notifications and sleeps, unless frames came in meanwhile.
#[cold]
fn sleep(plan: &Plan, shared: &WorkerShared, owner: &mut Owner) {
    let queues = plan.queues.get(shared.index).map(Vec::as_slice).unwrap_or_default();
    // Frames that are held back are due soon.
    let mut pending = plan.extras.as_ref().is_some_and(|extras| extras.injections.hold());
    for queue in queues {
        pending |= queue.arm(owner, &shared.sleeper);
    }
    for queue in plan.devices.queues_of(shared.index) {
        pending |= queue.arm(owner, &shared.sleeper);
    }
    if !pending {
        leave_all(plan, shared.index, owner);
        shared.counters.sleeps.add(1);
        shared.asleep.store(true, Ordering::Relaxed);
        shared.sleeper.sleep(SLEEP_MILLISECONDS);
        shared.asleep.store(false, Ordering::Relaxed);
    }
    for queue in queues {
        queue.disarm(owner);
    }
    for queue in plan.devices.queues_of(shared.index) {
        queue.disarm(owner);
    }
}
