//! A vhost-user port: the rings of a guest's network device, as receive and transmit queues of the switch.
//!
//! Owns the rings between their start and stop, and the port's visible state. [`rx`] lends bursts out of the guest's transmit
//! rings, [`tx`] copies frames into its receive rings, [`device`] follows the vhost-user session. The session and the workers
//! meet at the [`Claimed`] ring of each queue and nowhere else.

mod device;
mod rx;
mod scatter;
#[cfg(test)]
mod tests;
mod tx;
mod view;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use virtio::device::{DeviceRing, Ring, RingError};
use virtio::features;
use virtio::memory::GuestMemory;
use virtio::with_ring;

pub use device::VhostDevice;
pub use rx::RxRing;
pub use tx::TxRing;
pub(crate) use view::RingView;
use view::RingViews;

use crate::bridge::IngressState;
use crate::claim::Claimed;
use crate::counters::{RxCounters, TxCounters};
use crate::events::{Event, Events};
use crate::offload::Accepts;
use crate::sleeper::Kick;

/// A ring between start and stop.
pub struct RunningRing {
    ring: DeviceRing,
    /// Signals the driver.
    call: Option<OwnedFd>,
    /// The driver wakes a sleeping worker by it.
    kick: Option<Kick>,
    /// Tells the front end that the ring broke.
    err: Option<OwnedFd>,
    enabled: bool,
    /// Bytes of the virtio-net header: 12, or 10 for a legacy guest without mergeable buffers.
    header: usize,
    mergeable: bool,
    /// What the guest takes undone.
    accepts: Accepts,
    /// Set when the ring broke: it is not touched any more.
    broken: bool,
}

impl RunningRing {
    /// Whether a worker may process it.
    #[inline(always)]
    fn live(&self) -> bool {
        self.enabled && !self.broken
    }

    /// Notifies the driver. Never waits, whatever the guest does to its eventfd.
    #[inline(always)]
    fn signal(&self) -> bool {
        let Some(call) = &self.call else { return false };
        host::signal::signal(call.as_fd());
        true
    }

    fn ring_memory_gone(&self) -> bool {
        with_ring!(&self.ring, r => r.setup().memory.is_gone())
    }

    /// The ring broke: stop touching it, and say so to the front end and to housekeeping.
    #[cold]
    fn fail(&mut self, port: &PortShared, queue: u16, error: RingError) {
        self.broken = true;
        // Zero pages where the file was cut off look like any nonsense: name the cause, not the symptom.
        let error = if self.ring_memory_gone() { RingError::MemoryGone } else { error };
        if let Some(err) = &self.err {
            host::signal::signal(err.as_fd());
        }
        port.broken.store(true, Ordering::Release);
        port.events.send(Event::RingBroken { port: port.number, queue, error });
    }
}

/// One transmit ring of the guest: what a worker polls.
pub struct RxSlot {
    pub(crate) port: Arc<PortShared>,
    /// Virtqueue index.
    pub(crate) index: u16,
    pub(crate) state: Claimed<RxState>,
    /// Whether the ring runs and is enabled, for placing it.
    pub(crate) live: AtomicBool,
    /// NUMA node of the guest's memory, plus one; 0: not known.
    pub(crate) node: AtomicU32,
    /// What came in.
    pub counters: RxCounters,
}

/// What a worker needs to poll a queue, under one claim.
pub(crate) struct RxState {
    pub(crate) ring: Option<RunningRing>,
    pub(crate) ingress: IngressState,
    /// The output of most frames of the last burst: prepared before the next is read.
    pub(crate) likely: u16,
}

/// One receive ring of the guest: what workers send to.
pub struct TxSlot {
    pub(crate) port: Arc<PortShared>,
    pub(crate) index: u16,
    pub(crate) ring: Claimed<Option<RunningRing>>,
    /// What went out.
    pub counters: TxCounters,
}

/// What a user sees of a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortState {
    /// Nobody is connected.
    Waiting,
    /// A front end is connected; no ring pair runs yet.
    Connected,
    /// At least one receive and one transmit ring run.
    Up,
    /// A ring broke, with the reason.
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

/// What session, workers and control share of a port.
pub struct PortShared {
    /// Number in the bridge.
    pub number: u16,
    /// Name in the configuration.
    pub name: String,
    pub(crate) events: Events,
    /// A ring of the port broke: none of them is polled until the front end starts them anew.
    pub(crate) broken: AtomicBool,
    /// Receive rings that run and are enabled, counted from the first.
    pub(crate) active: AtomicU16,
    pub(crate) state: Mutex<PortState>,
    pub(crate) info: Mutex<PortInfo>,
}

impl PortShared {
    /// What a user sees.
    pub fn state(&self) -> PortState {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What the session learnt.
    pub fn info(&self) -> PortInfo {
        self.info.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_state(&self, state: PortState) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }
}

/// A vhost-user port.
pub struct VhostPort {
    /// What it shares with its session.
    pub shared: Arc<PortShared>,
    /// The guest's transmit rings, one per queue pair.
    pub rx: Vec<Arc<RxSlot>>,
    /// The guest's receive rings, one per queue pair.
    pub tx: Vec<Arc<TxSlot>>,
    memory: Mutex<Option<Arc<GuestMemory>>>,
    views: RingViews,
}

impl VhostPort {
    /// A port without a session.
    pub fn new(number: u16, name: &str, queue_pairs: u16, events: Events) -> Arc<Self> {
        let shared = Arc::new(PortShared {
            number,
            name: name.to_owned(),
            events,
            broken: AtomicBool::new(false),
            active: AtomicU16::new(0),
            state: Mutex::new(PortState::Waiting),
            info: Mutex::new(PortInfo::default()),
        });
        let rx = (0..queue_pairs)
            .map(|pair| {
                let counters = RxCounters::default();
                let ingress = IngressState { addresses: counters.addresses.clone() };
                let state = RxState { ring: None, ingress, likely: u16::MAX };
                let (port, index) = (shared.clone(), 2 * pair + 1);
                Arc::new(RxSlot {
                    port,
                    index,
                    state: Claimed::new(state),
                    live: AtomicBool::new(false),
                    node: AtomicU32::new(0),
                    counters,
                })
            })
            .collect();
        let tx = (0..queue_pairs)
            .map(|pair| {
                let (port, index) = (shared.clone(), 2 * pair);
                Arc::new(TxSlot { port, index, ring: Claimed::new(None), counters: TxCounters::default() })
            })
            .collect();
        Arc::new(Self { shared, rx, tx, memory: Mutex::new(None), views: RingViews::default() })
    }

    /// Stops every ring that still runs; after a ring broke, or when the port goes away. Workers have let go when it returns.
    pub fn halt(&self) {
        for slot in &self.rx {
            slot.state.take().ring = None;
            slot.live.store(false, Ordering::Release);
        }
        for slot in &self.tx {
            *slot.ring.take() = None;
        }
        self.shared.active.store(0, Ordering::Release);
        self.views.all_stopped();
    }

    /// The rings that run, by index.
    pub(crate) fn rings(&self) -> Vec<RingView> {
        self.views.list()
    }

    /// Whether the guest's memory file was cut off under us.
    pub(crate) fn memory_gone(&self) -> bool {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).as_ref().is_some_and(|m| m.is_gone())
    }

    /// The queues that run, with their queue pair: what workers poll.
    pub(crate) fn polled(&self) -> impl Iterator<Item = (usize, &Arc<RxSlot>)> {
        self.rx.iter().enumerate().filter(|(_, slot)| slot.live.load(Ordering::Acquire))
    }

    /// Receive rings of the guest that can be sent to.
    #[inline(always)]
    pub(crate) fn active_queues(&self) -> usize {
        usize::from(self.shared.active.load(Ordering::Relaxed))
    }

    /// The receive ring of a guest that has just one.
    #[inline(always)]
    pub(crate) fn only_tx(&self) -> Option<&TxSlot> {
        if self.active_queues() == 1 { self.tx.first().map(|slot| &**slot) } else { None }
    }
}

/// Bytes of the virtio-net header under these features (virtio 1.3, section 5.1.6.1).
pub(crate) fn header_len(negotiated: u64) -> usize {
    if negotiated & (features::VERSION_1 | features::NET_MRG_RXBUF) != 0 { 12 } else { 10 }
}
