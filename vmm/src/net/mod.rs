//! A network card whose data path is a vhost-user back end: a switch, ours or anybody's.
//!
//! Owns what the guest's driver sees: features, address, link, MTU. The conversation with the back end has a thread of its own
//! ([`session`]), so that one that answers late or never holds no vCPU, and so has the driver's control queue ([`control`]);
//! frames pass neither.

mod control;
mod session;
pub(crate) mod tap;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::thread::JoinHandle;

use crossbeam::channel::{Sender, unbounded};
use nix::sys::eventfd::{EfdFlags, EventFd};
use virtio::features;

use crate::config::{NetConfig, VhostUserConfig};
use crate::life::{Ending, Events};
use crate::lifecycle::Lifecycle;
use crate::memory::GuestMemory;
use crate::sandbox::{self, ThreadKind};
use crate::virtio_pci::{Activation, QueueSetup, VirtioDevice};
use crate::worker::Workers;
#[cfg(any(test, fuzzing))]
pub(crate) use control::any_control;
use control::{CardState, Control};
use session::{Command, Session, Ties};

/// virtio's number of a network card (virtio 1.3, 5.1), and PCI's class of one.
const KIND: (u16, u16) = (1, 0x0200);
/// Receive and transmit queue: a pair.
const QUEUES: usize = 2;
/// Entries of the control queue; a driver has one command at a time in it.
const CONTROL_SIZE: u16 = 64;

/// What is the back end's to offer and passes through to the driver. What needs a control queue is the card's own, but for
/// several pairs.
const OF_BACK_END: u64 = features::NET_CSUM
    | features::NET_GUEST_CSUM
    | features::NET_GUEST_TSO4
    | features::NET_GUEST_TSO6
    | features::NET_GUEST_ECN
    | features::NET_GUEST_UFO
    | features::NET_HOST_TSO4
    | features::NET_HOST_TSO6
    | features::NET_HOST_ECN
    | features::NET_HOST_UFO
    | features::NET_MRG_RXBUF
    | features::NET_GUEST_USO4
    | features::NET_GUEST_USO6
    | features::NET_HOST_USO
    | features::RING_INDIRECT_DESC
    | features::RING_EVENT_IDX
    | features::VERSION_1
    | features::IN_ORDER;

/// Why a card cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The socket to listen on.
    #[error("`net`: {0}")]
    Socket(#[from] vhost_user::frontend::FrontEndError),
    /// A tap.
    #[error("`net`: {doing} of the tap {name}: {source}{hint}")]
    Tap {
        /// Which.
        name: String,
        /// What was refused.
        doing: &'static str,
        /// Why.
        source: std::io::Error,
        /// What may help.
        hint: &'static str,
    },
    /// The machine is to end, and so is the wait.
    #[error("`net`: the machine was told to end before {0} had its back end")]
    Ended(String),
    /// No more descriptors or threads.
    #[error("`net`: {0}")]
    System(#[from] std::io::Error),
}

/// A card's configuration (5.1.4), whatever is behind it: address, link status, pairs of queues, MTU.
fn configuration(state: &CardState, pairs: u16, mtu: Option<u16>) -> Vec<u8> {
    let mut config = state.mac().to_vec();
    config.extend(state.status().to_le_bytes());
    config.extend(pairs.to_le_bytes());
    config.extend(mtu.unwrap_or(0).to_le_bytes());
    config
}

/// The card.
pub(crate) struct Net {
    name: String,
    offered: u64,
    state: Arc<CardState>,
    pairs: u16,
    mtu: Option<u16>,
    queue_size: u16,
    teller: Teller,
    /// How many pairs the driver uses.
    used_pairs: Arc<AtomicU16>,
    idle: Arc<AtomicBool>,
    rests: Arc<AtomicBool>,
    connected: Arc<AtomicBool>,
    control: Workers,
    thread: Option<JoinHandle<Option<Session>>>,
}

/// Tells the conversation's thread something.
struct Teller {
    commands: Sender<Command>,
    wake: Arc<EventFd>,
}

impl Teller {
    fn tell(&self, command: Command) {
        // Its thread only ends when the card is dropped.
        let _ = self.commands.send(command);
        let _ = self.wake.write(1);
    }
}

impl Net {
    /// Meets the back end and makes a card that offers what it offers. Is not waited for when the machine is `ending`.
    ///
    /// # Errors
    /// The socket cannot be listened on; the machine ends.
    pub(crate) fn new(
        config: &NetConfig,
        back: &VhostUserConfig,
        memory: Arc<GuestMemory>,
        events: Events,
        ending: Ending,
    ) -> Result<Self, NetError> {
        let packed = if back.packed { features::RING_PACKED } else { 0 };
        let several = if back.pairs > 1 { features::NET_MQ } else { 0 };
        let wanted = OF_BACK_END | packed | several;
        let (commands, received) = unbounded();
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC);
        let wake = Arc::new(wake.map_err(std::io::Error::from)?);
        let used_pairs = Arc::new(AtomicU16::new(1));
        let idle = Arc::new(AtomicBool::new(true));
        let state = Arc::new(CardState::new(config.mac, false));
        let for_rings = memory.for_rings().map_err(std::io::Error::other)?;
        let (rests, connected) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let ties = Ties {
            commands: received,
            wake: wake.clone(),
            pairs: used_pairs.clone(),
            idle: idle.clone(),
            state: state.clone(),
            rests: rests.clone(),
            connected: connected.clone(),
            events,
            ending,
        };
        let (mut session, theirs) = Session::begin(config, back, wanted, memory, ties)?;
        let mtu = if config.mtu.is_some() { features::NET_MTU } else { 0 };
        let offered = theirs.features & wanted
            | features::VERSION_1
            | features::NET_MAC
            | features::NET_STATUS
            | control::OFFERED
            | mtu;
        let (use_pairs, woken) = (used_pairs.clone(), wake.clone());
        let teller = Teller { commands, wake };
        let control = Control {
            state: state.clone(),
            pairs: theirs.pairs,
            features: 0,
            use_pairs: move |pairs| {
                use_pairs.store(pairs, Ordering::Release);
                let _ = woken.write(1);
            },
        };
        let control = Workers::new(&format!("{} ctl", config.name), &for_rings, vec![control])?;
        // What is left of it at the end, its socket's file too, is not its own thread's to clear away.
        let thread = sandbox::spawn(ThreadKind::BackEnd, format!("net {}", config.name), move || {
            session.run();
            session
        })?;
        Ok(Self {
            name: config.name.clone(),
            offered,
            state,
            pairs: theirs.pairs,
            mtu: config.mtu,
            queue_size: config.queue_size,
            teller,
            used_pairs,
            idle,
            rests,
            connected,
            control,
            thread: Some(thread),
        })
    }

    /// The queue that takes commands (5.1.2): behind the pairs that the driver knows of.
    fn control_index(&self, features: u64) -> u16 {
        QUEUES as u16 * if features & features::NET_MQ == 0 { 1 } else { self.pairs }
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> (u16, u16) {
        KIND
    }

    fn features(&self) -> u64 {
        self.offered
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![self.queue_size; QUEUES * usize::from(self.pairs)];
        sizes.push(CONTROL_SIZE);
        sizes
    }

    fn config(&self) -> Vec<u8> {
        configuration(&self.state, self.pairs, self.mtu)
    }

    fn generation(&self) -> u8 {
        self.state.generation()
    }

    fn activate(&mut self, activation: Activation) {
        self.idle.store(false, Ordering::Release);
        // Its control queue rests, so that nobody else writes here.
        self.used_pairs.store(1, Ordering::Release);
        let Activation { features, queues, changed } = activation;
        let at = self.control_index(features);
        let (of_pairs, others): (Vec<_>, Vec<_>) = queues.into_iter().partition(|queue| queue.index < at);
        self.teller.tell(Command::Start(Activation { features, queues: of_pairs, changed }));
        let command = others.into_iter().find(|queue| queue.index == at);
        let command = command.filter(|_| features & features::NET_CTRL_VQ != 0);
        let queues = command.into_iter().map(|queue| QueueSetup { index: 0, ..queue }).collect();
        self.control.activate(Activation { features, queues, changed: None });
    }

    fn reset(&mut self) {
        // A card that has no queues is reset already: its thread, late with this, would say so of those that it gets next.
        if !self.is_reset() {
            self.control.reset();
            self.teller.tell(Command::Stop);
        }
    }

    fn is_reset(&self) -> bool {
        self.idle.load(Ordering::Acquire) && self.control.are_idle()
    }

    fn is_broken(&self) -> bool {
        self.control.are_broken()
    }

    fn lifecycle(&self) -> &dyn Lifecycle {
        self
    }

    fn back_end(&self) -> Option<bool> {
        Some(self.connected.load(Ordering::Relaxed))
    }
}

/// The back end gives its rings back and gets them again where it left off; the card's own queue rests meanwhile.
impl Lifecycle for Net {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn pause(&self) {
        self.control.pause();
        self.teller.tell(Command::Pause);
    }

    fn is_paused(&self) -> bool {
        self.control.is_paused() && self.rests.load(Ordering::Acquire)
    }

    fn resume(&self) {
        self.control.resume();
        self.teller.tell(Command::Resume);
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.teller.tell(Command::End);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
