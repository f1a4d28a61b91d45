//! What workers follow: one immutable value, replaced as a whole.
//!
//! Housekeeping builds a new plan aside and swaps it in; workers see it at their next turn. An old plan is freed by
//! housekeeping when the last worker has passed, never by a worker.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;

use crate::bridge::BridgePlan;
use crate::capture::Capture;
use crate::config::Idle;
use crate::device_port::{DevicePort, DeviceRx};
use crate::inject::Injections;
use crate::vhost_port::{RxSlot, VhostPort};

/// Everything a worker needs to know for a turn.
pub struct Plan {
    /// Where frames go.
    pub bridge: BridgePlan,
    /// Guests' ports by number; numbers of removed ports, and of those in `devices`, stay empty.
    pub ports: Vec<Option<Arc<VhostPort>>>,
    /// Which guests' queues each worker polls.
    pub queues: Vec<Vec<Arc<RxSlot>>>,
    /// The ports that have a device of this machine behind them.
    pub devices: Devices,
    /// What is done to frames besides moving them; `None`, where nothing is, costs workers one look a turn.
    pub extras: Option<Box<Extras>>,
    /// Frames taken from a queue at a time.
    pub burst: usize,
    /// What a worker does when nothing comes in.
    pub idle: Idle,
}

/// What a plan says of ports whose frames are looked at, or damaged on purpose.
#[derive(Default)]
pub struct Extras {
    /// Ports whose frames somebody looks at.
    pub captures: Vec<Arc<Capture>>,
    /// Ports whose frames suffer.
    pub injections: Injections,
}

impl Extras {
    /// Nothing, if there is nothing to do.
    pub fn any(self) -> Option<Box<Self>> {
        (!self.captures.is_empty() || !self.injections.is_empty()).then(|| Box::new(self))
    }
}

/// What a plan says of ports with devices. Apart from those with guests, so that these pay nothing for them.
#[derive(Default)]
pub struct Devices {
    /// By number, as [`Plan::ports`].
    pub(crate) ports: Vec<Option<Arc<DevicePort>>>,
    /// Which queues each worker polls.
    pub(crate) queues: Vec<Vec<Arc<DeviceRx>>>,
}

impl Devices {
    /// The port of this number.
    pub(crate) fn port(&self, number: u16) -> Option<&DevicePort> {
        self.ports.get(usize::from(number))?.as_deref()
    }

    /// The queues that worker `index` polls.
    #[inline(always)]
    pub(crate) fn queues_of(&self, index: usize) -> &[Arc<DeviceRx>] {
        self.queues.get(index).map(Vec::as_slice).unwrap_or_default()
    }
}

impl Plan {
    /// The guest's port of this number.
    #[inline(always)]
    pub fn port(&self, number: u16) -> Option<&VhostPort> {
        self.ports.get(usize::from(number))?.as_deref()
    }
}

/// The plan in force, and those that workers may still look at.
pub struct Plans {
    current: ArcSwap<Plan>,
    /// Counts swaps: what workers compare each turn.
    version: AtomicU64,
    old: Mutex<Vec<Arc<Plan>>>,
}

impl Plans {
    /// Begins with `plan`.
    pub fn new(plan: Plan) -> Self {
        Self { current: ArcSwap::from_pointee(plan), version: AtomicU64::new(0), old: Mutex::default() }
    }

    /// How often the plan was replaced.
    #[inline(always)]
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// The plan in force, and a version not newer than it.
    pub fn load(&self) -> (u64, Arc<Plan>) {
        let version = self.version();
        (version, self.current.load_full())
    }

    /// Puts `plan` in force.
    pub fn swap(&self, plan: Plan) {
        let mut graves = self.old.lock().unwrap_or_else(PoisonError::into_inner);
        let old = self.current.swap(Arc::new(plan));
        self.version.fetch_add(1, Ordering::Release);
        graves.push(old);
        graves.retain(|plan| Arc::strong_count(plan) > 1);
    }

    /// Frees old plans that nobody looks at any more. Returns how many are left.
    pub fn collect(&self) -> usize {
        let mut old = self.old.lock().unwrap_or_else(PoisonError::into_inner);
        old.retain(|plan| Arc::strong_count(plan) > 1);
        old.len()
    }
}
