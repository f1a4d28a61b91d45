//! The queues of a port, whatever kind of port it is: what a worker polls, what workers send to, and what the port shows of
//! itself.
//!
//! Owns the claim, the counters and the bridge's state of each queue. What runs behind it (a guest's ring, a device's queue) is the
//! type parameter, so that each kind gets code of its own and nothing is looked up per burst, let alone per frame.

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use port::RxQueue;

use crate::bridge::IngressState;
use crate::claim::{Claimed, Entered, Owner};
use crate::counters::{RxCounters, TxCounters};
use crate::events::Events;

/// What frames come in from, between its start and its stop.
pub(crate) trait Running: Sized {
    /// It, for one burst.
    type Queue<'c>: RxQueue
    where
        Self: 'c;

    /// The number of the queue whose index is this.
    fn number(index: u16) -> usize;

    /// What a burst of at most `limit` frames needs, if it can be polled now.
    fn polled<'c>(
        slot: &'c RxSlot<Self>,
        entered: &'c mut Entered<'_, RxState<Self>>,
        limit: usize,
    ) -> Option<Polled<'c, Self::Queue<'c>>>;
}

/// What a worker gets of a claimed queue: the queue, the bridge's state for its port, and the output it usually sends to.
pub(crate) struct Polled<'c, Q> {
    /// To poll.
    pub(crate) ring: Q,
    /// To classify.
    pub(crate) ingress: &'c mut IngressState,
    /// To prepare.
    pub(crate) likely: &'c mut u16,
}

/// One queue that frames come in on: what a worker polls.
pub struct RxSlot<R> {
    pub(crate) port: Arc<PortShared>,
    /// Virtqueue index, or the queue's number where there are no virtqueues.
    pub(crate) index: u16,
    pub(crate) state: Claimed<RxState<R>>,
    /// Whether it runs and is enabled, for placing it.
    pub(crate) live: AtomicBool,
    /// NUMA node of its memory, plus one; 0: not known.
    pub(crate) node: AtomicU32,
    /// What came in.
    pub counters: RxCounters,
}

/// What a worker needs to poll a queue, under one claim.
pub(crate) struct RxState<R> {
    pub(crate) ring: Option<R>,
    pub(crate) ingress: IngressState,
    /// The output of most frames of the last burst: prepared before the next is read.
    pub(crate) likely: u16,
}

/// One queue that frames go out of: what workers send to.
pub struct TxSlot<R> {
    pub(crate) port: Arc<PortShared>,
    pub(crate) index: u16,
    pub(crate) ring: Claimed<Option<R>>,
    /// What went out.
    pub counters: TxCounters,
}

impl<R> RxSlot<R> {
    /// Nothing runs yet.
    pub(crate) fn new(port: &Arc<PortShared>, index: u16) -> Arc<Self> {
        let counters = RxCounters::default();
        let ingress = IngressState::new(counters.addresses.clone());
        let state = RxState { ring: None, ingress, likely: u16::MAX };
        Arc::new(Self {
            port: port.clone(),
            index,
            state: Claimed::new(state),
            live: AtomicBool::new(false),
            node: AtomicU32::new(0),
            counters,
        })
    }

    /// The queue, for the worker that polls it; `None` while somebody else has it or waits for it.
    #[inline(always)]
    pub(crate) fn enter<'c>(&'c self, owner: &'c mut Owner) -> Option<Entered<'c, RxState<R>>> {
        self.state.enter(owner)
    }

    /// What a burst of at most `limit` frames needs, if the queue runs.
    #[inline(always)]
    pub(crate) fn polled<'c>(
        &'c self,
        entered: &'c mut Entered<'_, RxState<R>>,
        limit: usize,
    ) -> Option<Polled<'c, R::Queue<'c>>>
    where
        R: Running,
    {
        R::polled(self, entered, limit)
    }

    /// NUMA node of its memory, if it is known.
    pub(crate) fn memory_node(&self) -> Option<u32> {
        self.node.load(Ordering::Relaxed).checked_sub(1)
    }

    /// Number of the port it belongs to.
    #[inline(always)]
    pub(crate) fn port_number(&self) -> u16 {
        self.port.number
    }
}

impl<R> TxSlot<R> {
    /// Nothing runs yet.
    pub(crate) fn new(port: &Arc<PortShared>, index: u16) -> Arc<Self> {
        let (port, ring) = (port.clone(), Claimed::new(None));
        Arc::new(Self { port, index, ring, counters: TxCounters::default() })
    }
}

/// What a user sees of a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortState {
    /// Nobody is connected, or its device was not opened yet.
    Waiting,
    /// A front end is connected; no ring pair runs yet.
    Connected,
    /// At least one receive and one transmit ring run.
    Up,
    /// A ring broke, or the device is gone, with the reason.
    Stopped(String),
}

/// What the session learnt about its front end.
#[derive(Clone, Debug, Default)]
pub struct PortInfo {
    /// Negotiated virtio features.
    pub features: u64,
    /// Bytes of guest memory, and in how many regions.
    pub memory: (u64, usize),
    /// The guest's MTU, if the front end told it.
    pub mtu: Option<u16>,
    /// What was last refused, since the port came up (or its front end connected).
    pub refused: Option<String>,
    /// How the last session ended.
    pub last_end: Option<String>,
    /// Device status byte, if the front end forwards it.
    pub status: Option<u8>,
}

/// What workers, control and the session or device behind a port share of it.
pub struct PortShared {
    /// Number in the bridge.
    pub number: u16,
    /// Name in the configuration.
    pub name: String,
    pub(crate) events: Events,
    /// A ring or queue of the port broke: none of them is polled until they are started anew.
    pub(crate) broken: AtomicBool,
    /// Queues that can be sent to, counted from the first.
    pub(crate) active: AtomicU16,
    pub(crate) state: Mutex<PortState>,
    pub(crate) info: Mutex<PortInfo>,
}

impl PortShared {
    /// A port behind which there is nothing yet.
    pub(crate) fn new(number: u16, name: &str, events: Events) -> Arc<Self> {
        Arc::new(Self {
            number,
            name: name.to_owned(),
            events,
            broken: AtomicBool::new(false),
            active: AtomicU16::new(0),
            state: Mutex::new(PortState::Waiting),
            info: Mutex::new(PortInfo::default()),
        })
    }

    /// Queues that can be sent to.
    #[inline(always)]
    pub(crate) fn active_queues(&self) -> usize {
        usize::from(self.active.load(Ordering::Relaxed))
    }

    /// What a user sees.
    pub fn state(&self) -> PortState {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What the session learnt.
    pub fn info(&self) -> PortInfo {
        self.info.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn change_info(&self, change: impl FnOnce(&mut PortInfo)) {
        change(&mut self.info.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Shows that the port stopped, unless it was started anew since it broke: whoever starts it clears the mark first, and then
    /// sets the state. False if it was.
    pub(crate) fn set_stopped(&self, reason: &str) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let broken = self.broken.load(Ordering::Acquire);
        if broken {
            *state = PortState::Stopped(reason.to_owned());
        }
        broken
    }

    pub(crate) fn set_state(&self, state: PortState) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }
}
