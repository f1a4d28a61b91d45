//! A switch of one worker that takes a turn when it is told to, with guests on all ports.

use std::sync::Arc;

use crossbeam::channel::Receiver;
use port::DropReason;

use super::super::VhostPort;
use super::guest::{Guest, Kind, Received};
use crate::bridge::{BridgePlan, Fdb, PortPlan};
use crate::capture::Capture;
use crate::config::Idle;
use crate::events::{Event, Events};
use crate::plan::{Devices, Extras, Plan, Plans};
use crate::worker::{Worker, WorkerShared};

pub(super) struct World {
    pub(super) guests: Vec<Guest>,
    pub(super) events: Receiver<Event>,
    worker: Worker,
}

impl World {
    /// Ports that do nothing special.
    pub(super) fn of(kinds: &[Kind]) -> Self {
        Self::with_plans(kinds, vec![PortPlan::default(); kinds.len()])
    }

    pub(super) fn with_plans(kinds: &[Kind], plans: Vec<PortPlan>) -> Self {
        let (sender, events) = Events::channel(64);
        let guests = (0..)
            .zip(kinds)
            .map(|(number, &kind)| {
                Guest::new(VhostPort::new(number, "vnf", kind.pairs, sender.clone()), kind)
            })
            .collect();
        Self::of_guests(guests, plans, events)
    }

    /// A switch that is started when the guests run already.
    pub(super) fn of_guests(guests: Vec<Guest>, plans: Vec<PortPlan>, events: Receiver<Event>) -> Self {
        Self::captured(guests, plans, events, Vec::new())
    }

    /// The same, with somebody who looks at frames.
    pub(super) fn captured(
        guests: Vec<Guest>,
        plans: Vec<PortPlan>,
        events: Receiver<Event>,
        captures: Vec<Arc<Capture>>,
    ) -> Self {
        Self::with_extras(guests, plans, events, Extras { captures, ..Extras::default() })
    }

    /// The same, with all that a plan may have.
    pub(super) fn with_extras(
        guests: Vec<Guest>,
        plans: Vec<PortPlan>,
        events: Receiver<Event>,
        extras: Extras,
    ) -> Self {
        let fdb = Arc::new(Fdb::new(1024).unwrap());
        let plan = Plan {
            bridge: BridgePlan::new(plans.into_iter().map(Some).collect(), fdb, false).unwrap(),
            ports: guests.iter().map(|g| Some(g.port.clone())).collect(),
            queues: vec![guests.iter().flat_map(|g| g.port.rx.iter().cloned()).collect()],
            devices: Devices::default(),
            extras: extras.any(),
            burst: 64,
            idle: Idle::Poll,
        };
        let shared = Arc::new(WorkerShared::new(0, 0, host::cpu::rdtsc()).unwrap());
        let worker = Worker::new(shared, Arc::new(Plans::new(plan))).unwrap();
        Self { guests, events, worker }
    }

    /// One look at every queue.
    pub(super) fn turn(&mut self) -> usize {
        self.worker.turn()
    }

    /// Turns until nothing moves any more.
    pub(super) fn settle(&mut self) {
        let received = |w: &Self| -> u64 { w.guests.iter().map(received_by).sum() };
        loop {
            let before = received(self);
            self.turn();
            if received(self) == before {
                return;
            }
        }
    }

    /// Guest 0 sends `frames` one by one to guest 1 through buffers of `len` bytes; what arrives.
    pub(super) fn carry(&mut self, frames: &[Vec<u8>], len: usize) -> Vec<Received> {
        let mut arrived = Vec::new();
        for some in frames.chunks(usize::from(self.guests[0].kind.size)) {
            self.guests[1].offer_all(len);
            some.iter().for_each(|frame| self.guests[0].send(frame));
            self.settle();
            assert_eq!(self.guests[0].reclaim_sent(), some.len());
            arrived.extend(self.guests[1].received());
        }
        arrived
    }

    /// What was dropped on the way out to guest `i`.
    pub(super) fn dropped_to(&self, i: usize) -> Vec<(DropReason, u64)> {
        self.guests[i].port.tx.iter().flat_map(|slot| slot.counters.all_drops()).collect()
    }

    /// What was dropped on the way in from guest `i`.
    pub(super) fn dropped_from(&self, i: usize) -> Vec<(DropReason, u64)> {
        self.guests[i].port.rx.iter().flat_map(|slot| slot.counters.drops.list()).collect()
    }

    /// Asserts that every frame that came in went out, or was dropped under a reason.
    pub(super) fn assert_conserved(&self) {
        let rx = || self.guests.iter().flat_map(|g| &g.port.rx).map(|slot| &slot.counters);
        let tx = || self.guests.iter().flat_map(|g| &g.port.tx).map(|slot| &slot.counters);
        for c in rx() {
            assert_eq!(c.received.get(), c.switched.get() + c.drops.total());
        }
        for c in tx() {
            let drops: u64 = c.all_drops().iter().map(|(_, n)| n).sum();
            assert_eq!(c.all_offered(), c.sent.get() + drops);
        }
        let came: u64 = rx().map(|c| c.received.get() + c.replicas.get() - c.drops.total()).sum();
        assert_eq!(came, tx().map(|c| c.all_offered()).sum::<u64>());
    }
}

fn received_by(guest: &Guest) -> u64 {
    guest.port.rx.iter().map(|slot| slot.counters.received.get()).sum()
}
