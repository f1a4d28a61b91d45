//! A port with a network device of this machine behind it: a card, a tap or an interface of the kernel, or nothing at all.
//!
//! Owns the device's queues between its opening and its end. [`rx`] lends bursts of what a driver's [`port::Source`] found,
//! [`tx`] finishes frames for its [`port::Sink`], [`kinds`] is the list of drivers, [`card`] what
//! cards have besides. A device that goes away stops its port, with
//! the reason; housekeeping opens it again when it is there again. Never waits for a device.

mod card;
mod card_queues;
mod functions;
mod kinds;
mod rx;
mod tx;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pmd::access::Reading;
use pmd::igb::VirtualFunction;
use pmd::kernel::OpenError;
use pmd::kernel::xdp::XdpDevice;

use card::Card;
pub(crate) use card::{CardError, Cards};
use functions::{Answering, SharedCard};
pub use kinds::DeviceError;
pub(crate) use kinds::{Inlet, Opened, Sinks, Sources, open};
pub(crate) use rx::Receiving;
pub(crate) use tx::Sending;

use crate::config::{self, PortConfig};
use crate::events::{Event, Events};
use crate::slot::{PortShared, PortState, RxSlot, TxSlot};

/// Why a card that is open moves nothing.
const NO_LINK: &str = "no link";

/// One queue that a worker polls.
pub(crate) type DeviceRx = RxSlot<Receiving>;

/// One queue that workers send to.
pub(crate) type DeviceTx = TxSlot<Sending>;

/// A port with a device.
pub struct DevicePort {
    /// What a user sees of it.
    pub(crate) shared: Arc<PortShared>,
    pub(crate) rx: Vec<Arc<DeviceRx>>,
    pub(crate) tx: Vec<Arc<DeviceTx>>,
    /// For housekeeping, while a card is open.
    card: SharedCard,
    /// While a card is open that has virtual functions.
    answering: Mutex<Option<Answering>>,
    /// For housekeeping, while XDP sockets are open.
    xdp: Mutex<Option<XdpDevice>>,
}

impl DevicePort {
    /// A port whose device is not open yet.
    pub(crate) fn new(number: u16, name: &str, queues: u16, events: Events) -> Arc<Self> {
        let shared = PortShared::new(number, name, events);
        let rx = (0..queues).map(|queue| DeviceRx::new(&shared, queue)).collect();
        let tx = (0..queues).map(|queue| DeviceTx::new(&shared, queue)).collect();
        Arc::new(Self {
            shared,
            rx,
            tx,
            card: Arc::default(),
            answering: Mutex::default(),
            xdp: Mutex::default(),
        })
    }

    /// Opens the device and lets frames pass. `first`: an interface that is not there is made, if its kind can be.
    ///
    /// # Errors
    /// It is not there, or cannot be had; the port is as it was.
    pub(crate) fn open(
        &self,
        config: &PortConfig,
        first: bool,
        cards: &mut Cards,
    ) -> Result<(), DeviceError> {
        let Opened { queues, features, card, xdp, node } = open(config, first, cards)?;
        let refused = |source| OpenError::Refused {
            name: config.behind.device().unwrap_or_default().to_owned(),
            what: "watching it",
            source,
            remedy: "; give the switch more descriptors (ulimit -n)",
        };
        let watched = |(inlet, sink): (Inlet, Sinks)| {
            let live = !matches!(inlet, Inlet::Device(Sources::Null(_)));
            Ok((live, Receiving::new(inlet)?, sink))
        };
        let has_functions = card.as_ref().is_some_and(|card| !card.functions().is_empty());
        let answering = has_functions.then(|| Answering::start(self.card.clone())).transpose();
        let answering = answering.map_err(|source| OpenError::Refused {
            name: config.behind.device().unwrap_or_default().to_owned(),
            what: "starting the thread that answers its virtual functions",
            source,
            remedy: "; give the switch more threads (ulimit -u)",
        })?;
        // All of them, or none.
        let queues: Vec<_> = queues.into_iter().map(watched).collect::<Result<_, _>>().map_err(refused)?;
        let shared = &self.shared;
        // Before a worker can find the device gone again.
        shared.broken.store(false, Ordering::Release);
        // A device may have fewer than were wanted, and said so: frames are sent by those that there are.
        let active = queues.len().min(self.tx.len());
        for ((live, receiving, sink), (rx, tx)) in queues.into_iter().zip(self.rx.iter().zip(&self.tx)) {
            let mut state = rx.state.take();
            (state.ring, state.likely) = (Some(receiving), u16::MAX);
            drop(state);
            rx.live.store(live, Ordering::Release);
            rx.node.store(node.map_or(0, |node| node + 1), Ordering::Relaxed);
            *tx.ring.take() = Some(Sending::new(sink, features));
        }
        shared.active.store(active as u16, Ordering::Release);
        shared.change_info(|info| info.features = features);
        // Up when it has a link, where housekeeping looks for that.
        let looked_at = card.is_some() || xdp.is_some();
        shared.set_state(if looked_at { PortState::Stopped(NO_LINK.to_owned()) } else { PortState::Up });
        *self.card() = card;
        *self.answering.lock().unwrap_or_else(PoisonError::into_inner) = answering;
        if let Some(device) = &xdp {
            let way = if device.zero_copy() { "zero copy" } else { "the kernel copies" };
            tracing::info!("port {}: XDP sockets on {} queues, {way}", shared.name, self.rx.len());
        }
        *self.xdp() = xdp;
        // Frames can pass at once, where the kernel knows of a link already.
        let _ = self.look_at_card();
        shared.events.send(Event::RingsChanged);
        Ok(())
    }

    /// Shows why the device is not open.
    pub(crate) fn wait(&self, error: &DeviceError) {
        self.shared.set_state(PortState::Stopped(error.to_string()));
    }

    /// Gives the device up. Workers have let go when it returns.
    pub(crate) fn halt(&self) {
        self.shared.active.store(0, Ordering::Release);
        for slot in &self.rx {
            slot.live.store(false, Ordering::Release);
            slot.state.take().ring = None;
        }
        for slot in &self.tx {
            *slot.ring.take() = None;
        }
        drop(self.answering.lock().unwrap_or_else(PoisonError::into_inner).take());
        // The last that holds the card: it stops now, and its memory is free.
        *self.card() = None;
        *self.xdp() = None;
    }

    /// Whether a card is open, or XDP sockets, with a link or without.
    pub(crate) fn has_card(&self) -> bool {
        self.card().is_some() || self.xdp().is_some()
    }

    /// The virtual functions of the card, if there is one open.
    pub(crate) fn functions(&self) -> Vec<VirtualFunction> {
        self.card().as_ref().map_or_else(Vec::new, |card| card.functions().to_vec())
    }

    /// Changes what the card's virtual functions may, if there is one open; all or none.
    ///
    /// # Errors
    /// It has fewer, or one may not have its address.
    pub(crate) fn grant(&self, functions: &[config::VirtualFunction]) -> Result<(), CardError> {
        self.card().as_mut().map_or(Ok(()), |card| card.grant(functions))
    }

    /// Looks at the card, or the interface of XDP sockets, if there is one open; shows and says whether its link changed.
    ///
    /// # Errors
    /// It must be closed, and why.
    pub(crate) fn look_at_card(&self) -> Result<Option<bool>, String> {
        let changed = match &mut *self.xdp() {
            Some(device) => device.look().map_err(|error| error.to_string())?,
            None => self.card().as_mut().map_or(Ok(None), Card::look)?,
        };
        if let Some(up) = changed {
            self.shared.set_state(if up { PortState::Up } else { PortState::Stopped(NO_LINK.to_owned()) });
        }
        Ok(changed)
    }

    /// What the device counts itself, by its own names.
    pub(crate) fn device_counters(&self) -> Vec<(&'static str, u64)> {
        if let Some(device) = &*self.xdp() {
            return device.counters();
        }
        self.card().as_mut().map(Card::counters).unwrap_or_default()
    }

    /// What the registers of the card read, if there is one open.
    pub(crate) fn registers(&self) -> Option<Result<Vec<Reading>, String>> {
        // With the card in hand: a look may select what the driver selects.
        self.card().as_ref().map(Card::registers)
    }

    fn xdp(&self) -> MutexGuard<'_, Option<XdpDevice>> {
        self.xdp.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn card(&self) -> MutexGuard<'_, Option<Card>> {
        self.card.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The queues that run, with their numbers: what workers poll.
    pub(crate) fn polled(&self) -> impl Iterator<Item = (usize, &Arc<DeviceRx>)> {
        self.rx.iter().enumerate().filter(|(_, slot)| slot.live.load(Ordering::Acquire))
    }
}

/// A device failed: its port is not touched any more, and housekeeping is told.
#[cold]
fn fail(port: &PortShared, error: std::io::Error) {
    port.broken.store(true, Ordering::Release);
    port.events.send(Event::DeviceGone { port: port.number, error });
}
