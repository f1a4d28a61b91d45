//! Faults on purpose: what a bad wire does to the frames of a port (`inject = { … }`), so that one can see who bears it.
//!
//! Owns, for each queue that frames come in on and for each port that they go out of, a [line](mod@line) with copies of the frames that
//! are on it. A plan has only the ports that want faults ([`Injection`]): workers of a switch without any run the same
//! instructions as if there were no such thing.

mod faults;
mod line;
mod store;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use port::{BurstBuffer, DropReason};

use crate::claim::{Claim, Claimed};
use crate::config::{Direction, Inject};
use crate::outgoing::Outgoing;
use line::{Line, LineCounters};

/// How often a burst tries to claim a line that another worker holds.
const CLAIM_RETRIES: u32 = 4_096;

/// Bursts that may leave a line at a time: twice as many frames as can come in, so that none piles up.
pub(crate) const BURSTS: usize = 4;

/// A line that several threads may want.
pub(crate) struct Lane {
    line: Claimed<Line>,
    counters: LineCounters,
    /// Tells the lanes of a port apart.
    stream: u64,
}

/// A lane, claimed.
pub(crate) struct OnLane<'c> {
    line: Claim<'c, Line>,
    counters: &'c LineCounters,
}

impl Lane {
    fn new(stream: u64) -> Self {
        Self { line: Claimed::new(Line::new()), counters: LineCounters::default(), stream }
    }

    /// For workers: the lane, unless somebody has it.
    pub(crate) fn try_claim(&self) -> Option<OnLane<'_>> {
        self.line.try_claim().map(|line| OnLane { line, counters: &self.counters })
    }

    /// The same, within a retry budget.
    pub(crate) fn claim(&self) -> Option<OnLane<'_>> {
        for _ in 0..CLAIM_RETRIES {
            if let Some(lane) = self.try_claim() {
                return Some(lane);
            }
            std::hint::spin_loop();
        }
        None
    }

    /// Whether frames are on it.
    pub(crate) fn holds(&self) -> bool {
        self.counters.held.load(Ordering::Relaxed) > 0
    }

    /// For housekeeping: from now on does what `inject` says; frames that are on it go on.
    fn change(&self, inject: Option<&Inject>) {
        self.line.take().change(inject, self.stream);
    }

    /// For housekeeping: forgets the frames that are on it; how many.
    fn clear(&self) -> u64 {
        if self.holds() { self.line.take().clear(&self.counters) } else { 0 }
    }
}

impl OnLane<'_> {
    /// Takes a frame in at `now`: how many come out of it.
    ///
    /// # Errors
    /// It is lost, and this is why.
    pub(crate) fn take(&mut self, now: u64, frame: &Outgoing<'_>) -> Result<u64, DropReason> {
        self.line.take(now, frame, self.counters)
    }

    /// Fills `buffer` with frames that are due at `now`: how many. They stay as they are until [`Self::take_back`].
    pub(crate) fn lend(&mut self, now: u64, buffer: &mut BurstBuffer) -> usize {
        self.line.lend(now, buffer)
    }

    /// What was lent last is not looked at any more.
    pub(crate) fn take_back(&mut self) {
        self.line.take_back(self.counters);
    }
}

/// All lanes of a port.
pub struct Lanes {
    inward: Vec<Lane>,
    outward: Lane,
}

/// What was done to the frames of a port, one way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Done {
    pub(crate) corrupted: u64,
    pub(crate) duplicated: u64,
    pub(crate) reordered: u64,
    pub(crate) delayed: u64,
    pub(crate) held: u64,
}

impl Lanes {
    /// Those of a port with so many queues, as `inject` says.
    pub fn new(inject: &Inject, queues: u16) -> Arc<Self> {
        let inward = (0..queues).map(|queue| Lane::new(2 * u64::from(queue))).collect();
        let lanes = Self { inward, outward: Lane::new(1) };
        lanes.change(inject);
        Arc::new(lanes)
    }

    /// For housekeeping: other faults from now on.
    pub(crate) fn change(&self, inject: &Inject) {
        let of = |way| (inject.direction == Direction::Both || inject.direction == way).then_some(inject);
        self.inward.iter().for_each(|lane| lane.change(of(Direction::In)));
        self.outward.change(of(Direction::Out));
    }

    /// For housekeeping: no faults any more; what waits is lost. Workers that still follow an old plan find lines on which nothing
    /// happens.
    pub(crate) fn end(&self) -> (Vec<u64>, u64) {
        let end = |lane: &Lane| {
            lane.change(None);
            lane.clear()
        };
        (self.inward.iter().map(end).collect(), end(&self.outward))
    }

    /// For housekeeping: queue `queue` does not run any more, what came in on it is not due to anyone. How many frames.
    pub(crate) fn clear_inward(&self, queue: usize) -> u64 {
        self.inward.get(queue).map_or(0, Lane::clear)
    }

    /// What was done so far, to what came in and to what went out.
    pub(crate) fn done(&self) -> (Done, Done) {
        let inward = self.inward.iter().map(|lane| done(&lane.counters));
        let sum = |a: Done, b: Done| Done {
            corrupted: a.corrupted + b.corrupted,
            duplicated: a.duplicated + b.duplicated,
            reordered: a.reordered + b.reordered,
            delayed: a.delayed + b.delayed,
            held: a.held + b.held,
        };
        (inward.fold(Done::default(), sum), done(&self.outward.counters))
    }
}

fn done(counters: &LineCounters) -> Done {
    let of = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    Done {
        corrupted: of(&counters.corrupted),
        duplicated: of(&counters.duplicated),
        reordered: of(&counters.reordered),
        delayed: of(&counters.delayed),
        held: of(&counters.held),
    }
}

/// The ports of a plan that want faults.
#[derive(Default)]
pub struct Injections(Vec<Injection>);

/// One of them.
pub struct Injection {
    /// Number of the port.
    pub port: u16,
    /// Its lanes.
    pub lanes: Arc<Lanes>,
}

impl Injections {
    /// These.
    pub fn new(ports: Vec<Injection>) -> Self {
        Self(ports)
    }

    /// Whether no port wants any.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The lane of what comes in on a port's queue.
    pub(crate) fn inward(&self, port: u16, queue: usize) -> Option<&Lane> {
        self.0.iter().find(|injection| injection.port == port)?.lanes.inward.get(queue)
    }

    /// The lane of what goes out of a port.
    pub(crate) fn outward(&self, port: u16) -> Option<&Lane> {
        self.0.iter().find(|injection| injection.port == port).map(|injection| &injection.lanes.outward)
    }

    /// All of these, with their ports.
    pub(crate) fn all_outward(&self) -> impl Iterator<Item = (u16, &Lane)> {
        self.0.iter().map(|injection| (injection.port, &injection.lanes.outward))
    }

    /// Whether frames wait anywhere: nobody sleeps then.
    pub(crate) fn hold(&self) -> bool {
        let holds = |Injection { lanes, .. }: &Injection| {
            lanes.outward.holds() || lanes.inward.iter().any(Lane::holds)
        };
        self.0.iter().any(holds)
    }
}
