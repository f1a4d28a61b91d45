//! The conversation with a card's back end: met, told about memory and rings, met again when it went away.
//!
//! Owns the connection and the thread that looks after it. Every answer is waited for, but not for long; a back end that is
//! gone is waited for as long as the machine lives. Split rings go on where the used ring says, packed ones where the inflight
//! region does that the back end's predecessor kept.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::time::Duration;

use crossbeam::channel::{Receiver, TryRecvError};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use vhost_user::ProtocolFeatures as Protocol;
use vhost_user::frontend::{
    FrontEnd, FrontEndError, FrontEndListener, InflightRegion, MemoryRegion, QueueConfig,
};
use virtio::features;
use vm_memory::{Bytes, GuestAddress};

use super::control::CardState;
use super::{NetError, QUEUES};
use crate::config::{NetConfig, VhostUserConfig};
use crate::control::report::EventKind;
use crate::life::{Ending, Events};
use crate::memory::GuestMemory;
use crate::virtio_pci::{Activation, QueueSetup};
use crate::worker::PACKED_START;

/// How long an answer may take, and all of those to what is asked at once, and how long a back end may take to learn of all rings.
const PATIENCE: Duration = Duration::from_secs(5);
const TELLING: Duration = Duration::from_secs(10);
/// How long a back end may take for its first answers when the machine starts without waiting for it.
const AT_ONCE: Duration = Duration::from_millis(100);
/// How often a back end that is not there is looked for.
const RETRY: Duration = Duration::from_millis(100);

/// What the card asks for.
pub(super) enum Command {
    /// The driver is ready.
    Start(Activation),
    /// The driver resets the card.
    Stop,
    /// The machine comes to rest.
    Pause,
    /// It goes on.
    Resume,
    /// The machine ends.
    End,
}

/// What ties the conversation to its card.
pub(super) struct Ties {
    pub(super) commands: Receiver<Command>,
    pub(super) wake: Arc<EventFd>,
    /// How many pairs of queues the driver uses. No command: a guest may say it again and again while nobody listens.
    pub(super) pairs: Arc<AtomicU16>,
    pub(super) idle: Arc<AtomicBool>,
    pub(super) state: Arc<CardState>,
    /// The back end has no ring, because the machine rests.
    pub(super) rests: Arc<AtomicBool>,
    /// There is a back end.
    pub(super) connected: Arc<AtomicBool>,
    pub(super) events: Events,
    /// The machine ends before it began.
    pub(super) ending: Ending,
}

/// What a back end has of what we want.
#[derive(Clone, Copy, Debug)]
pub(super) struct Offer {
    pub(super) features: u64,
    pub(super) pairs: u16,
}

impl Offer {
    /// A card whose back end nobody has seen.
    const BARE: Self = Self { features: features::VERSION_1, pairs: 1 };
}

/// Where the back end is met.
enum Meeting {
    There(PathBuf),
    Here(FrontEndListener),
}

/// What a running back end knows.
struct Running {
    activation: Activation,
    /// How many pairs of queues the back end was told of: one, until the driver says otherwise.
    pairs: u16,
    inflight: Option<InflightRegion>,
    /// Where its rings were when the machine came to rest; nobody touched them since.
    bases: Vec<(u16, u32)>,
    /// It had a back end before this one: rings go on, they do not begin.
    goes_on: bool,
    /// The queues run.
    started: bool,
}

/// The conversation.
pub(super) struct Session {
    name: String,
    meeting: Meeting,
    wanted: u64,
    /// Pairs of queues to have; once the driver knows a number, that.
    pairs: u16,
    mtu: Option<u16>,
    memory: Arc<GuestMemory>,
    ties: Ties,
    front: Option<(FrontEnd, Protocol, Offer)>,
    running: Option<Running>,
    complained: bool,
}

impl Session {
    /// Meets the back end; says what is waited for if it is not there. Returns what it offers of `wanted`; a card that does
    /// not wait is offered without any of it.
    pub(super) fn begin(
        card: &NetConfig,
        config: &VhostUserConfig,
        wanted: u64,
        memory: Arc<GuestMemory>,
        ties: Ties,
    ) -> Result<(Self, Offer), NetError> {
        let meeting = match config.listen {
            true => Meeting::Here(FrontEndListener::bind(&config.socket)?),
            false => Meeting::There(config.socket.clone()),
        };
        let mut session = Self {
            name: card.name.clone(),
            meeting,
            wanted,
            pairs: config.pairs,
            mtu: card.mtu,
            memory,
            ties,
            front: None,
            running: None,
            complained: false,
        };
        let mut offered = session.meet(if config.wait { PATIENCE } else { AT_ONCE });
        while config.wait && offered.is_none() {
            if session.ties.ending.is_asked() {
                return Err(NetError::Ended(session.name));
            }
            session.pause();
            offered = session.meet(PATIENCE);
        }
        let offer = offered.unwrap_or(Offer::BARE);
        if offered.is_none() {
            session.wanted = offer.features;
        }
        if offer.pairs < config.pairs {
            let has =
                if offered.is_some() { "its back end has" } else { "there is no back end yet, which makes" };
            tracing::warn!(
                "{}: {has} {} of the {} queue pairs that `queues` asks for",
                session.name,
                offer.pairs,
                config.pairs
            );
        }
        session.pairs = offer.pairs;
        Ok((session, offer))
    }

    /// Looks after the back end until the machine ends.
    pub(super) fn run(&mut self) {
        loop {
            match self.ties.commands.try_recv() {
                Ok(Command::Start(activation)) => {
                    self.running = Some(Running {
                        activation,
                        pairs: 1,
                        inflight: None,
                        bases: Vec::new(),
                        goes_on: false,
                        started: false,
                    });
                }
                Ok(Command::Stop) => self.stop(),
                Ok(Command::Pause) => self.rest(),
                Ok(Command::Resume) => self.ties.rests.store(false, Ordering::Release),
                Ok(Command::End) | Err(TryRecvError::Disconnected) => return self.stop(),
                Err(TryRecvError::Empty) => {
                    if self.front.is_none() && self.meet(PATIENCE).is_none() {
                        self.pause();
                        continue;
                    }
                    self.start();
                    self.use_pairs(self.ties.pairs.load(Ordering::Acquire));
                    if self.front.is_some() {
                        self.watch();
                    }
                }
            }
        }
    }

    /// Tries to meet a back end, once, which may take so long to answer. Returns what it offers of what we want.
    fn meet(&mut self, patience: Duration) -> Option<Offer> {
        let met = match &self.meeting {
            Meeting::There(path) => FrontEnd::connect(path, PATIENCE),
            // Not to wait in it: the time-out that it takes is also that of all answers.
            Meeting::Here(listener) if is_readable(listener) => listener.accept(PATIENCE),
            Meeting::Here(_) => {
                self.complain("waiting for its back end to connect");
                return None;
            }
        };
        let wanted =
            self.running.as_ref().map_or(self.wanted, |running| running.activation.features & self.wanted);
        let protocol = Protocol::REPLY_ACK | Protocol::INFLIGHT_SHMFD | Protocol::MTU | Protocol::MQ;
        let most = self.pairs;
        let agreed = met.and_then(|mut front| {
            front.within(patience);
            let mut agreed = front.negotiate(wanted, protocol)?;
            let several = agreed.features & features::NET_MQ != 0 && agreed.protocol.contains(Protocol::MQ);
            let pairs = if several { front.queue_pairs()?.min(most.into()).max(1) as u16 } else { 1 };
            if pairs == 1 && self.running.is_none() {
                agreed.features &= !features::NET_MQ;
            }
            Ok((agreed, pairs, front))
        });
        match agreed {
            Ok((_, pairs, _)) if self.running.is_some() && pairs < most => {
                self.complain(&format!(
                    "the new back end has {pairs} queue pair(s), the guest's card {most}"
                ));
                None
            }
            Ok((agreed, ..)) if self.running.is_some() && agreed.features != wanted => {
                let lost = wanted & !agreed.features;
                self.complain(&format!(
                    "the new back end lacks features {lost:#x} that the guest's driver uses"
                ));
                None
            }
            Ok((agreed, pairs, front)) => {
                tracing::info!("{}: back end connected", self.name);
                self.complained = false;
                let offer = Offer { features: agreed.features, pairs };
                self.front = Some((front, agreed.protocol, offer));
                self.ties.connected.store(true, Ordering::Relaxed);
                self.ties.events.note(EventKind::BackEndConnected, Some(&self.name));
                if self.ties.state.link_up() {
                    self.tell_of_change();
                }
                Some(offer)
            }
            Err(error @ FrontEndError::Connect { .. }) => {
                self.complain(&format!("waiting for its back end ({error})"));
                None
            }
            Err(error) => {
                self.complain(&error.to_string());
                None
            }
        }
    }

    /// Says what is wrong, once until it is set right.
    fn complain(&mut self, what: &str) {
        if !std::mem::replace(&mut self.complained, true) {
            tracing::warn!("{}: {what}", self.name);
        }
    }

    /// Tells the back end about memory and rings, if the driver is ready and it does not know yet.
    fn start(&mut self) {
        let (Some((front, protocol, offer)), Some(running)) = (&mut self.front, &mut self.running) else {
            return;
        };
        if running.started || self.ties.rests.load(Ordering::Acquire) {
            return;
        }
        // It came while no driver used the card, and may lack what this one was offered before: met again, it is judged.
        let used = running.activation.features & self.wanted;
        if used & !offer.features != 0 || used & features::NET_MQ != 0 && offer.pairs < self.pairs {
            self.gone();
            return;
        }
        front.within(TELLING);
        let told = tell(front, *protocol, running, &self.memory, self.wanted, self.mtu);
        match told {
            Ok(()) => {
                running.started = true;
                running.bases.clear();
                let again = std::mem::replace(&mut running.goes_on, true);
                // Whatever was said while nobody listened is said again: buffers to take, buffers that were used.
                for queue in &running.activation.queues {
                    signal(&queue.kick);
                    queue.call.iter().for_each(signal);
                }
                // The new back end, and whoever is behind it, may never have heard of the guest.
                if again && running.activation.features & features::NET_GUEST_ANNOUNCE != 0 {
                    self.ties.state.set_announce(true);
                    self.tell_of_change();
                }
            }
            Err(error) => {
                self.gone();
                self.complain(&error.to_string());
                self.pause();
            }
        }
    }

    /// Takes the rings back and keeps where they were. One that does not give them back in time loses the connection, and with
    /// it the rings.
    fn rest(&mut self) {
        if let (Some((front, ..)), Some(running)) = (&mut self.front, &mut self.running)
            && std::mem::replace(&mut running.started, false)
        {
            front.within(PATIENCE);
            let stopped = running.activation.queues.iter().map(|queue| {
                let base = front.stop_queue(queue.index)?;
                Ok((queue.index, base))
            });
            match stopped.collect::<Result<Vec<_>, FrontEndError>>() {
                Ok(bases) => running.bases = bases,
                Err(error) => self.lose(&error),
            }
        }
        self.ties.rests.store(true, Ordering::Release);
    }

    /// Ends the connection: the back end did not do what it was told.
    fn lose(&mut self, error: &FrontEndError) {
        tracing::warn!("{}: {error}", self.name);
        self.gone();
    }

    fn gone(&mut self) {
        self.front = None;
        if self.ties.connected.swap(false, Ordering::Relaxed) {
            self.ties.events.note(EventKind::BackEndGone, Some(&self.name));
        }
    }

    /// The driver uses `pairs` pairs from now on, if it did not before.
    fn use_pairs(&mut self, pairs: u16) {
        let Some(running) = self.running.as_mut().filter(|running| running.pairs != pairs) else { return };
        let before = std::mem::replace(&mut running.pairs, pairs);
        let Some((front, protocol, _)) = self.front.as_mut().filter(|_| running.started) else { return };
        // Without protocol features all queues are enabled, always.
        if protocol.is_empty() {
            return;
        }
        front.within(PATIENCE);
        for queue in &running.activation.queues {
            let (was, is) = (is_of(queue, before), is_of(queue, pairs));
            if was == is {
                continue;
            }
            if let Err(error) = front.enable_queue(queue.index, is) {
                running.started = false;
                return self.lose(&error);
            }
            // What was put there before it was enabled.
            signal(&queue.kick);
        }
        tracing::debug!("{}: the driver uses {pairs} queue pair(s)", self.name);
    }

    /// Tells the driver that the configuration changed.
    fn tell_of_change(&self) {
        self.running.iter().flat_map(|running| &running.activation.changed).for_each(signal);
    }

    /// Lets go of the queues.
    fn stop(&mut self) {
        if let (Some((front, ..)), Some(running)) = (&mut self.front, &self.running)
            && running.started
        {
            front.within(PATIENCE);
            let queues = running.activation.queues.iter();
            if let Err(error) =
                queues.map(|queue| front.stop_queue(queue.index)).collect::<Result<Vec<_>, _>>()
            {
                // Without the connection, the back end lets go as well.
                self.lose(&error);
            }
        }
        self.running = None;
        self.ties.state.set_announce(false);
        self.ties.idle.store(true, Ordering::Release);
    }

    /// Waits for a command or the end of the connection.
    fn watch(&mut self) {
        let Some((front, ..)) = &self.front else { return };
        let mut fds = [
            PollFd::new(front.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.ties.wake.as_fd(), PollFlags::POLLIN),
        ];
        let _ = poll(&mut fds, PollTimeout::NONE);
        // It answers, and says nothing by itself: whatever comes, the end included, is the end of it.
        let ended = fds.first().and_then(PollFd::any).unwrap_or(false);
        let _ = self.ties.wake.read();
        if ended {
            self.gone();
            if let Some(running) = &mut self.running {
                running.started = false;
            }
            self.complain("its back end is gone; the guest keeps its card, and it is waited for");
            // One that comes and goes at once does not keep this thread busy.
            self.pause();
        }
    }

    /// Waits a while, or for a command.
    fn pause(&self) {
        let mut fds = vec![PollFd::new(self.ties.wake.as_fd(), PollFlags::POLLIN)];
        if let (Meeting::Here(listener), None) = (&self.meeting, &self.front) {
            fds.push(PollFd::new(listener.as_fd(), PollFlags::POLLIN));
        }
        let _ = poll(&mut fds, PollTimeout::try_from(RETRY).unwrap_or(PollTimeout::ZERO));
        let _ = self.ties.wake.read();
    }
}

/// Everything that a back end has to know, in the order in which it wants to know it.
fn tell(
    front: &mut FrontEnd,
    protocol: Protocol,
    running: &mut Running,
    memory: &GuestMemory,
    wanted: u64,
    mtu: Option<u16>,
) -> Result<(), FrontEndError> {
    let activation = &running.activation;
    let extended = if protocol.is_empty() { 0 } else { features::VHOST_USER_PROTOCOL_FEATURES };
    front.set_features(activation.features & wanted | extended)?;
    if let Some(mtu) = mtu.filter(|_| protocol.contains(Protocol::MTU)) {
        front.set_mtu(mtu)?;
    }
    let regions: Vec<_> = memory
        .regions()
        .iter()
        .filter_map(|region| {
            Some(MemoryRegion {
                file: memory.file(region)?,
                size: region.guest.end - region.guest.start,
                guest: region.guest.start,
                user: region.host,
                offset: region.file_offset,
            })
        })
        .collect();
    front.set_memory(&regions)?;
    let packed = activation.features & features::RING_PACKED != 0;
    let mut has_inflight = false;
    if protocol.contains(Protocol::INFLIGHT_SHMFD) {
        let size = activation.queues.iter().map(|queue| queue.size).max().unwrap_or(1);
        let last = activation.queues.iter().map(|queue| queue.index).max().unwrap_or(QUEUES as u16 - 1);
        let region = match running.inflight.take() {
            Some(region) => region,
            None => front.get_inflight(last + 1, size)?,
        };
        front.set_inflight(running.inflight.insert(region))?;
        has_inflight = true;
    }
    for queue in &activation.queues {
        let kept = running.bases.iter().find(|(index, _)| *index == queue.index).map(|(_, base)| *base);
        let base = match (packed, running.goes_on) {
            _ if kept.is_some() => kept,
            (true, false) => Some(PACKED_START),
            (true, true) if has_inflight => None,
            (true, true) => {
                return Err(FrontEndError::NotNegotiated(
                    "packed rings that go on after it was gone (INFLIGHT_SHMFD)",
                ));
            }
            (false, false) => Some(0),
            (false, true) => Some(used_index(memory, queue)),
        };
        let config = QueueConfig {
            size: queue.size,
            descriptors: queue.descriptors.ptr as u64,
            driver: queue.driver.ptr as u64,
            device: queue.device.ptr as u64,
            base,
            log: None,
            call: queue.call.as_ref().map(descriptor),
            kick: Some(descriptor(&queue.kick)),
            err: None,
        };
        front.start_queue(queue.index, &config)?;
    }
    if !protocol.is_empty() {
        let mut used = activation.queues.iter().filter(|queue| is_of(queue, running.pairs));
        used.try_for_each(|queue| front.enable_queue(queue.index, true))?;
    }
    Ok(())
}

/// Whether it is among the first `pairs`.
fn is_of(queue: &QueueSetup, pairs: u16) -> bool {
    usize::from(queue.index) < QUEUES * usize::from(pairs)
}

/// Where a split ring's device was: its used index (virtio 1.3, 2.7.8). The guest may have written anything there; the back end
/// checks what follows from it.
fn used_index(memory: &GuestMemory, queue: &QueueSetup) -> u32 {
    let at = GuestAddress(queue.device.guest.saturating_add(2));
    u32::from(u16::from_le(memory.view().load(at, Ordering::Acquire).unwrap_or(0)))
}

fn is_readable(fd: &impl AsFd) -> bool {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

fn descriptor(event: &vmm_sys_util::eventfd::EventFd) -> BorrowedFd<'_> {
    // SAFETY: it is open as long as `event` is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// The back end holds it too, and may have filled it: never waits.
fn signal(event: &vmm_sys_util::eventfd::EventFd) {
    host::signal::signal(descriptor(event));
}
