//! A vhost-user port: the rings of a guest's network device, as receive and transmit queues of the switch.
//!
//! Owns the rings between their start and stop, and the port's visible state. [`rx`] lends bursts out of the guest's transmit
//! rings, [`tx`] copies frames into its receive rings, [`device`] follows the vhost-user session. The session and the workers
//! meet at the [claimed](crate::claim) ring of each queue and nowhere else.

mod device;
mod rx;
mod scatter;
#[cfg(test)]
mod tests;
mod tx;
mod view;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
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

use crate::events::{Event, Events};
use crate::offload::Accepts;
use crate::sleeper::Kick;
use crate::slot::{self, PortShared};

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
pub type RxSlot = slot::RxSlot<RunningRing>;

/// One receive ring of the guest: what workers send to.
pub type TxSlot = slot::TxSlot<RunningRing>;

type RxState = slot::RxState<RunningRing>;

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
        let shared = PortShared::new(number, name, events);
        let rx = (0..queue_pairs).map(|pair| RxSlot::new(&shared, 2 * pair + 1)).collect();
        let tx = (0..queue_pairs).map(|pair| TxSlot::new(&shared, 2 * pair)).collect();
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

    /// Stops every ring of a port that broke. False if its front end has begun anew since, which clears the port's mark before it
    /// puts a ring in place: what runs then is left alone.
    pub(crate) fn halt_broken(&self) -> bool {
        let broken = || self.shared.broken.load(Ordering::Acquire);
        for slot in &self.rx {
            let mut state = slot.state.take();
            if !broken() {
                return false;
            }
            state.ring = None;
            slot.live.store(false, Ordering::Release);
        }
        for slot in &self.tx {
            let mut ring = slot.ring.take();
            if !broken() {
                return false;
            }
            *ring = None;
        }
        self.shared.active.store(0, Ordering::Release);
        self.views.all_stopped();
        true
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
        self.shared.active_queues()
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
