//! What workers follow: one immutable value, replaced as a whole.
//!
//! Housekeeping builds a new plan aside and swaps it in; workers see it at their next turn. An old plan is freed by
//! housekeeping when the last worker has passed, never by a worker.

use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;

use crate::bridge::BridgePlan;
use crate::config::Idle;
use crate::vhost_port::{RxSlot, VhostPort};

/// Everything a worker needs to know for a turn.
pub struct Plan {
    /// Where frames go.
    pub bridge: BridgePlan,
    /// Ports by number; numbers of removed ports stay empty.
    pub ports: Vec<Option<Arc<VhostPort>>>,
    /// Which queues each worker polls.
    pub queues: Vec<Vec<Arc<RxSlot>>>,
    /// Frames taken from a queue at a time.
    pub burst: usize,
    /// What a worker does when nothing comes in.
    pub idle: Idle,
}

impl Plan {
    /// The port of this number.
    #[inline(always)]
    pub fn port(&self, number: u16) -> Option<&VhostPort> {
        self.ports.get(usize::from(number))?.as_deref()
    }
}

/// The plan in force, and those that workers may still look at.
pub struct Plans {
    current: Arc<ArcSwap<Plan>>,
    old: Mutex<Vec<Arc<Plan>>>,
}

impl Plans {
    /// Begins with `plan`.
    pub fn new(plan: Plan) -> Self {
        Self { current: Arc::new(ArcSwap::from_pointee(plan)), old: Mutex::default() }
    }

    /// For a worker's cache.
    pub fn subscribe(&self) -> Arc<ArcSwap<Plan>> {
        self.current.clone()
    }

    /// The plan in force.
    pub fn load(&self) -> Arc<Plan> {
        self.current.load_full()
    }

    /// Puts `plan` in force.
    pub fn swap(&self, plan: Plan) {
        let old = self.current.swap(Arc::new(plan));
        self.old.lock().unwrap_or_else(PoisonError::into_inner).push(old);
        self.collect();
    }

    /// Frees old plans that nobody looks at any more. Returns how many are left.
    pub fn collect(&self) -> usize {
        let mut old = self.old.lock().unwrap_or_else(PoisonError::into_inner);
        old.retain(|plan| Arc::strong_count(plan) > 1);
        old.len()
    }
}
