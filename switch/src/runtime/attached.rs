//! A port of any kind, as housekeeping and reports see it: the one place outside of the data path that knows how many kinds
//! there are.

use std::sync::Arc;

use pmd::igb::VirtualFunction;

use port::DropReason;

use crate::control::report::{CardReport, DeviceCount, RegisterReport};
use crate::counters::{RxCounters, TxCounters};
use crate::device_port::{DevicePort, DeviceRx};
use crate::plan::Plan;
use crate::slot::{PortShared, PortState};
use crate::vhost_port::{RingView, RxSlot, VhostPort};

/// What is behind a port.
#[derive(Clone)]
pub(crate) enum Attached {
    /// A guest's network device.
    Guest(Arc<VhostPort>),
    /// A network device of this machine.
    Device(Arc<DevicePort>),
}

/// A queue that a worker polls.
pub(super) enum Queue {
    Guest(Arc<RxSlot>),
    Device(Arc<DeviceRx>),
}

impl Attached {
    /// What a user sees of it.
    pub(crate) fn shared(&self) -> &Arc<PortShared> {
        match self {
            Attached::Guest(port) => &port.shared,
            Attached::Device(port) => &port.shared,
        }
    }

    /// Its number in the bridge.
    pub(crate) fn number(&self) -> u16 {
        self.shared().number
    }

    /// Stops whatever still runs of a port that broke, and shows why. Workers have let go when it returns. False if its guest
    /// began anew meanwhile, and nothing is to be stopped.
    pub(super) fn stop(&self, reason: &str) -> bool {
        match self {
            Attached::Guest(port) => port.halt_broken() && port.shared.set_stopped(reason),
            // Opened by nobody but who stops it.
            Attached::Device(port) => {
                port.shared.set_state(PortState::Stopped(reason.to_owned()));
                port.halt();
                true
            }
        }
    }

    /// The virtual functions of its card.
    pub(super) fn functions(&self) -> Vec<VirtualFunction> {
        match self {
            Attached::Guest(_) => Vec::new(),
            Attached::Device(port) => port.functions(),
        }
    }

    /// Whether a guest's memory file was cut off under us.
    pub(super) fn memory_gone(&self) -> bool {
        matches!(self, Attached::Guest(port) if port.memory_gone())
    }

    /// The queues that run, with their numbers: what workers poll.
    pub(super) fn polled(&self) -> Vec<(usize, Queue)> {
        match self {
            Attached::Guest(port) => port.polled().map(|(n, q)| (n, Queue::Guest(q.clone()))).collect(),
            Attached::Device(port) => port.polled().map(|(n, q)| (n, Queue::Device(q.clone()))).collect(),
        }
    }

    /// What came in on each queue.
    pub(super) fn received(&self) -> Vec<&RxCounters> {
        match self {
            Attached::Guest(port) => port.rx.iter().map(|slot| &slot.counters).collect(),
            Attached::Device(port) => port.rx.iter().map(|slot| &slot.counters).collect(),
        }
    }

    /// What went out of each queue.
    pub(super) fn sent(&self) -> Vec<&TxCounters> {
        match self {
            Attached::Guest(port) => port.tx.iter().map(|slot| &slot.counters).collect(),
            Attached::Device(port) => port.tx.iter().map(|slot| &slot.counters).collect(),
        }
    }

    /// Counts frames of a queue that came in and were lost on purpose.
    pub(super) fn count_lost(&self, queue: usize, frames: u64) {
        if frames == 0 {
            return;
        }
        // Counters have one writer at a time: whoever holds the queue's claim.
        match self {
            Attached::Guest(port) => {
                if let Some(slot) = port.rx.get(queue) {
                    let _claim = slot.state.take();
                    slot.counters.drops.add(DropReason::InjectedLost, frames);
                }
            }
            Attached::Device(port) => {
                if let Some(slot) = port.rx.get(queue) {
                    let _claim = slot.state.take();
                    slot.counters.drops.add(DropReason::InjectedLost, frames);
                }
            }
        }
    }

    /// Counts frames that were to go out and were lost on purpose.
    pub(super) fn count_lost_outward(&self, frames: u64) {
        if let Some(counters) = self.sent().first().filter(|_| frames > 0) {
            counters.refuse(DropReason::InjectedLost, frames);
        }
    }

    /// What its device counts itself.
    pub(super) fn device_counts(&self) -> Vec<DeviceCount> {
        let Attached::Device(port) = self else { return Vec::new() };
        let counts = port.device_counters().into_iter();
        counts.map(|(name, count)| DeviceCount { name: name.to_owned(), count }).collect()
    }

    /// What its card counts and its registers read, if one is open.
    pub(super) fn card(&self) -> Option<Result<CardReport, String>> {
        let Attached::Device(port) = self else { return None };
        let registers = port.registers()?;
        Some(registers.map(|registers| CardReport {
            counters: self.device_counts(),
            registers: registers.into_iter().map(RegisterReport::from).collect(),
        }))
    }

    /// A guest's rings that run.
    pub(super) fn rings(&self) -> Vec<RingView> {
        match self {
            Attached::Guest(port) => port.rings(),
            Attached::Device(_) => Vec::new(),
        }
    }

    /// Which worker polls queue `queue` of it under `plan`.
    pub(super) fn worker_of(&self, queue: usize, plan: &Plan) -> Option<usize> {
        match self {
            Attached::Guest(port) => {
                let slot = port.rx.get(queue)?;
                plan.queues.iter().position(|queues| queues.iter().any(|q| Arc::ptr_eq(q, slot)))
            }
            Attached::Device(port) => {
                let slot = port.rx.get(queue)?;
                plan.devices.queues.iter().position(|queues| queues.iter().any(|q| Arc::ptr_eq(q, slot)))
            }
        }
    }
}

impl Queue {
    /// What came in on it.
    pub(super) fn counters(&self) -> &RxCounters {
        match self {
            Queue::Guest(slot) => &slot.counters,
            Queue::Device(slot) => &slot.counters,
        }
    }

    /// NUMA node of its memory, if it is known.
    pub(super) fn memory_node(&self) -> Option<u32> {
        match self {
            Queue::Guest(slot) => slot.memory_node(),
            Queue::Device(slot) => slot.memory_node(),
        }
    }
}
