//! The conversation with a card's back end: met, told about memory and rings, met again when it went away.
//!
//! Owns the connection and the thread that looks after it. Every answer is waited for, but not for long; a back end that is
//! gone is waited for as long as the machine lives. Split rings go on where the used ring says, packed ones where the inflight
//! region does that the back end's predecessor kept.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
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

use super::{NetError, QUEUES};
use crate::config::{NetConfig, VhostUserConfig};
use crate::memory::GuestMemory;
use crate::virtio_pci::{Activation, QueueSetup};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often a back end that is not there is looked for.
const RETRY: Duration = Duration::from_millis(100);
/// Where a packed ring begins: both wrap counters set (virtio 1.3, 2.8.1).
const PACKED_START: u32 = 0x8000_8000;

/// What the card asks for.
pub(super) enum Command {
    /// The driver is ready.
    Start(Activation),
    /// The driver resets the card.
    Stop,
    /// The machine ends.
    End,
}

/// Where the back end is met.
enum Meeting {
    There(PathBuf),
    Here(FrontEndListener),
}

/// What a running back end knows.
struct Running {
    activation: Activation,
    inflight: Option<InflightRegion>,
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
    mtu: Option<u16>,
    memory: Arc<GuestMemory>,
    commands: Receiver<Command>,
    wake: Arc<EventFd>,
    idle: Arc<AtomicBool>,
    front: Option<(FrontEnd, Protocol)>,
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
        commands: Receiver<Command>,
        wake: Arc<EventFd>,
        idle: Arc<AtomicBool>,
    ) -> Result<(Self, u64), NetError> {
        let meeting = match config.listen {
            true => Meeting::Here(FrontEndListener::bind(&config.socket)?),
            false => Meeting::There(config.socket.clone()),
        };
        let mut session = Self {
            name: card.name.clone(),
            meeting,
            wanted,
            mtu: card.mtu,
            memory,
            commands,
            wake,
            idle,
            front: None,
            running: None,
            complained: false,
        };
        let mut offered = session.meet();
        if config.wait {
            while offered.is_none() {
                session.pause();
                offered = session.meet();
            }
        } else if offered.is_none() {
            session.wanted = features::VERSION_1;
        }
        Ok((session, offered.unwrap_or(features::VERSION_1)))
    }

    /// Looks after the back end until the machine ends.
    pub(super) fn run(&mut self) {
        loop {
            match self.commands.try_recv() {
                Ok(Command::Start(activation)) => {
                    self.running =
                        Some(Running { activation, inflight: None, goes_on: false, started: false });
                }
                Ok(Command::Stop) => self.stop(),
                Ok(Command::End) | Err(TryRecvError::Disconnected) => return self.stop(),
                Err(TryRecvError::Empty) => {
                    if self.front.is_none() && self.meet().is_none() {
                        self.pause();
                        continue;
                    }
                    self.start();
                    if self.front.is_some() {
                        self.watch();
                    }
                }
            }
        }
    }

    /// Tries to meet a back end, once. Returns what it offers of what we want.
    fn meet(&mut self) -> Option<u64> {
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
        let protocol = Protocol::REPLY_ACK | Protocol::INFLIGHT_SHMFD | Protocol::MTU;
        let agreed = met.and_then(|mut front| Ok((front.negotiate(wanted, protocol)?, front)));
        match agreed {
            Ok((agreed, _)) if self.running.is_some() && agreed.features != wanted => {
                let lost = wanted & !agreed.features;
                self.complain(&format!(
                    "the new back end lacks features {lost:#x} that the guest's driver uses"
                ));
                None
            }
            Ok((agreed, front)) => {
                tracing::info!("{}: back end connected", self.name);
                self.complained = false;
                self.front = Some((front, agreed.protocol));
                Some(agreed.features)
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
        let (Some((front, protocol)), Some(running)) = (&mut self.front, &mut self.running) else { return };
        if running.started {
            return;
        }
        let told = tell(front, *protocol, running, &self.memory, self.wanted, self.mtu);
        match told {
            Ok(()) => {
                running.started = true;
                running.goes_on = true;
                // Whatever was said while nobody listened is said again: buffers to take, buffers that were used.
                for queue in &running.activation.queues {
                    signal(&queue.kick);
                    queue.call.iter().for_each(signal);
                }
            }
            Err(error) => {
                self.front = None;
                self.complain(&error.to_string());
                self.pause();
            }
        }
    }

    /// Lets go of the queues.
    fn stop(&mut self) {
        if let (Some((front, _)), Some(running)) = (&mut self.front, &self.running)
            && running.started
        {
            let queues = running.activation.queues.iter();
            if let Err(error) =
                queues.map(|queue| front.stop_queue(queue.index)).collect::<Result<Vec<_>, _>>()
            {
                // Without the connection, the back end lets go as well.
                tracing::warn!("{}: {error}", self.name);
                self.front = None;
            }
        }
        self.running = None;
        self.idle.store(true, Ordering::Release);
    }

    /// Waits for a command or the end of the connection.
    fn watch(&mut self) {
        let Some((front, _)) = &self.front else { return };
        let mut fds = [
            PollFd::new(front.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.wake.as_fd(), PollFlags::POLLIN),
        ];
        let _ = poll(&mut fds, PollTimeout::NONE);
        // It answers, and says nothing by itself: whatever comes, the end included, is the end of it.
        let ended = fds.first().and_then(PollFd::any).unwrap_or(false);
        let _ = self.wake.read();
        if ended {
            self.front = None;
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
        let mut fds = vec![PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)];
        if let (Meeting::Here(listener), None) = (&self.meeting, &self.front) {
            fds.push(PollFd::new(listener.as_fd(), PollFlags::POLLIN));
        }
        let _ = poll(&mut fds, PollTimeout::try_from(RETRY).unwrap_or(PollTimeout::ZERO));
        let _ = self.wake.read();
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
        .map(|region| MemoryRegion {
            file: memory.file(),
            size: region.guest.end - region.guest.start,
            guest: region.guest.start,
            user: region.host,
            offset: region.file_offset,
        })
        .collect();
    front.set_memory(&regions)?;
    let packed = activation.features & features::RING_PACKED != 0;
    let mut has_inflight = false;
    if protocol.contains(Protocol::INFLIGHT_SHMFD) {
        let size = activation.queues.iter().map(|queue| queue.size).max().unwrap_or(1);
        let region = match running.inflight.take() {
            Some(region) => region,
            None => front.get_inflight(QUEUES as u16, size)?,
        };
        front.set_inflight(running.inflight.insert(region))?;
        has_inflight = true;
    }
    for queue in &activation.queues {
        let base = match (packed, running.goes_on) {
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
        activation.queues.iter().try_for_each(|queue| front.enable_queue(queue.index, true))?;
    }
    Ok(())
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
