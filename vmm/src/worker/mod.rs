//! Threads that work on virtqueues for devices of our own, one for each queue or for several.
//!
//! Owns the threads, where they run, and what they are told: what a driver makes available goes to a [`Serve`], request by
//! request ([`queue`]). A vCPU only leaves a message here and never waits. A ring that makes no sense is left alone until the
//! driver resets its device.
//!
//! What these threads may ask of the kernel follows from what they serve ([`Serve::KIND`]).

pub(crate) mod queue;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender, TryRecvError, bounded, unbounded};
use host::thread::PinError;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use virtio::device::RingError;
use virtio::memory::GuestMemory;

use crate::buffers::Request;
use crate::control::report::QueueReport;
use crate::lifecycle::Lifecycle;
use crate::sandbox::{self, SandboxError, ThreadKind};
use crate::virtio_pci::{Activation, QueueSetup};
use queue::Queue;

/// Where a packed ring begins: both wrap counters set (virtio 1.3, 2.8.1).
pub(crate) const PACKED_START: u32 = 0x8000_8000;

/// What became of a request.
pub(crate) enum Served {
    /// It is done; so many bytes of it were written, from its first on.
    Done(u32),
    /// It is kept until [`Serve::source`] has something; without one, until the driver resets the device.
    Kept,
    /// It is under way; [`Serve::finished`] gives this number back when it is done. Small, and of no other that is under way.
    UnderWay(u16),
}

/// What a device does with the requests of one queue. It may wait for what they need; only its own thread waits then.
pub(crate) trait Serve: Send + 'static {
    /// What its thread may do.
    const KIND: ThreadKind;
    /// The driver is ready; this was agreed on.
    fn start(&mut self, features: u64);
    /// Does what a request asks for, or begins to.
    fn serve(&mut self, request: Request<'_>) -> Served;
    /// What says that a request that was kept can be served, or that one that was under way is done.
    fn source(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    /// Requests came that are under way, and for now there are no more. False: it has to be asked again.
    fn begin(&mut self) -> bool {
        true
    }
    /// Whether a request is under way.
    fn is_under_way(&self) -> bool {
        false
    }
    /// One that was under way and is done: its number, and how many bytes of it were written.
    fn finished(&mut self) -> Option<(u16, u32)> {
        None
    }
    /// Waits until no request is under way any more.
    fn settle(&mut self) {}
}

/// Who works on the queues of a device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Threads<'c> {
    /// How many; queues are dealt out to them in turn.
    pub(crate) count: usize,
    /// The host's core of each, in turn; where the thread that makes them may run if there are none.
    pub(crate) cores: &'c [u32],
}

/// Why a device has no threads.
#[derive(Debug, thiserror::Error)]
pub enum WorkersError {
    /// No more threads or descriptors.
    #[error(transparent)]
    System(#[from] io::Error),
    /// One cannot be where it is to be.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// One cannot be confined.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
}

enum Command {
    /// With these features; the queue is the thread's own number of it.
    Start(u64, usize, QueueSetup),
    Stop,
    Pause,
    Resume,
    End,
}

/// Counters of one queue; its thread writes them.
#[derive(Default)]
pub(crate) struct Counters {
    requests: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    interrupts: AtomicU64,
}

impl Counters {
    fn add(counter: &AtomicU64, more: u64) {
        counter.store(counter.load(Ordering::Relaxed) + more, Ordering::Relaxed);
    }

    /// A request of so many bytes is done.
    fn count(&self, bytes: u64) {
        Self::add(&self.requests, 1);
        Self::add(&self.bytes, bytes);
    }

    fn interrupt(&self) {
        Self::add(&self.interrupts, 1);
    }
}

/// The threads of one device.
pub(crate) struct Workers {
    name: String,
    workers: Vec<(Sender<Command>, Arc<EventFd>, JoinHandle<()>)>,
    counters: Vec<Arc<Counters>>,
    state: Arc<State>,
}

/// What they tell the device.
#[derive(Default)]
struct State {
    /// Queues that are worked on.
    busy: AtomicUsize,
    /// A ring made no sense.
    broken: AtomicBool,
    /// Threads that rest.
    paused: AtomicUsize,
}

impl Workers {
    /// A thread for each of `serve`, which are the device's queues; `name` and their number is what it is called.
    ///
    /// # Errors
    /// No more threads or descriptors.
    pub(crate) fn new(name: &str, memory: &Arc<GuestMemory>, serve: Vec<impl Serve>) -> io::Result<Self> {
        let threads = Threads { count: serve.len(), cores: &[] };
        Self::on(name, memory, serve, threads).map_err(|error| match error {
            WorkersError::System(error) => error,
            WorkersError::Pin(error) => io::Error::other(error),
            WorkersError::Sandbox(error) => io::Error::other(error),
        })
    }

    /// As many threads as are asked for.
    ///
    /// # Errors
    /// They are not to be had.
    pub(crate) fn on<S: Serve>(
        name: &str,
        memory: &Arc<GuestMemory>,
        serve: Vec<S>,
        threads: Threads<'_>,
    ) -> Result<Self, WorkersError> {
        let mut workers =
            Self { name: name.to_owned(), workers: Vec::new(), counters: Vec::new(), state: Arc::default() };
        let count = threads.count.clamp(1, serve.len().max(1));
        let mut dealt: Vec<Vec<Queue<S>>> = (0..count).map(|_| Vec::new()).collect();
        for (n, serve) in serve.into_iter().enumerate() {
            let queue = Queue::new(format!("{name}.{n}"), serve);
            workers.counters.push(queue.counters.clone());
            if let Some(queues) = dealt.get_mut(n % count) {
                queues.push(queue);
            }
        }
        for (n, queues) in dealt.into_iter().enumerate() {
            let (sender, commands) = unbounded();
            let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC);
            let wake = Arc::new(wake.map_err(io::Error::from)?);
            let worker = Worker {
                queues,
                commands,
                wake: wake.clone(),
                memory: memory.clone(),
                state: workers.state.clone(),
                paused: false,
            };
            let core = threads.cores.get(n % threads.cores.len().max(1)).copied();
            let (ready, is_ready) = bounded(1);
            let thread = std::thread::Builder::new().name(format!("{name}.{n}")).spawn(move || {
                let arranged = arrange(core, S::KIND);
                let there = arranged.is_ok();
                let _ = ready.send(arranged);
                if there {
                    worker.run();
                }
            })?;
            workers.workers.push((sender, wake, thread));
            // One that ended says nothing; its queues are never worked on.
            is_ready.recv().unwrap_or(Ok(()))?;
        }
        Ok(workers)
    }

    /// The driver is ready.
    pub(crate) fn activate(&self, activation: Activation) {
        // All threads let go before.
        self.state.broken.store(false, Ordering::Release);
        let count = self.workers.len().max(1);
        for queue in activation.queues {
            let index = usize::from(queue.index);
            if let Some((commands, wake, _)) =
                self.workers.get(index % count).filter(|_| index < self.counters.len())
            {
                self.state.busy.fetch_add(1, Ordering::AcqRel);
                // It only ends when this is dropped.
                let _ = commands.send(Command::Start(activation.features, index / count, queue));
                let _ = wake.write(1);
            }
        }
    }

    /// Begins to let go of the queues.
    pub(crate) fn reset(&self) {
        self.tell(|| Command::Stop);
    }

    fn tell(&self, command: impl Fn() -> Command) {
        for (commands, wake, _) in &self.workers {
            let _ = commands.send(command());
            let _ = wake.write(1);
        }
    }

    /// What was done on each queue.
    pub(crate) fn reports(&self) -> Vec<QueueReport> {
        let report = |(index, of): (u16, &Arc<Counters>)| QueueReport {
            index,
            requests: of.requests.load(Ordering::Relaxed),
            bytes: of.bytes.load(Ordering::Relaxed),
            errors: of.errors.load(Ordering::Relaxed),
            interrupts: of.interrupts.load(Ordering::Relaxed),
        };
        (0..).zip(&self.counters).map(report).collect()
    }

    /// Whether all queues were let go of.
    pub(crate) fn are_idle(&self) -> bool {
        self.state.busy.load(Ordering::Acquire) == 0
    }

    /// Whether the driver must reset the device: a ring made no sense.
    pub(crate) fn are_broken(&self) -> bool {
        !self.are_idle() && self.state.broken.load(Ordering::Acquire)
    }
}

/// A thread rests between two requests.
impl Lifecycle for Workers {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn pause(&self) {
        self.tell(|| Command::Pause);
    }

    fn is_paused(&self) -> bool {
        self.state.paused.load(Ordering::Acquire) == self.workers.len()
    }

    fn resume(&self) {
        self.tell(|| Command::Resume);
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.tell(|| Command::End);
        for (_, _, thread) in self.workers.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Puts the calling thread where it belongs, and confines it.
fn arrange(core: Option<u32>, kind: ThreadKind) -> Result<(), WorkersError> {
    core.map_or(Ok(()), host::thread::pin)?;
    Ok(sandbox::apply(kind)?)
}

struct Worker<S> {
    queues: Vec<Queue<S>>,
    commands: Receiver<Command>,
    wake: Arc<EventFd>,
    memory: Arc<GuestMemory>,
    state: Arc<State>,
    paused: bool,
}

impl<S: Serve> Worker<S> {
    fn run(mut self) {
        loop {
            match self.commands.try_recv() {
                Ok(Command::Start(features, number, setup)) => {
                    let Some(queue) = self.queues.get_mut(number) else { continue };
                    if let Err(error) = queue.start(features, setup, &self.memory) {
                        give_up(queue, &self.state, &error);
                    }
                }
                Ok(Command::Stop) => self.stop(),
                Ok(Command::Pause) => self.set_paused(true),
                Ok(Command::Resume) => self.set_paused(false),
                Ok(Command::End) | Err(TryRecvError::Disconnected) => return self.stop(),
                Err(TryRecvError::Empty) if self.paused || !self.turn() => self.wait(),
                Err(TryRecvError::Empty) => {}
            }
        }
    }

    fn stop(&mut self) {
        let stopped = self.queues.iter_mut().filter_map(|queue| queue.stop().then_some(())).count();
        self.state.busy.fetch_sub(stopped, Ordering::AcqRel);
    }

    fn set_paused(&mut self, paused: bool) {
        match (std::mem::replace(&mut self.paused, paused), paused) {
            (false, true) => {
                self.queues.iter_mut().for_each(Queue::rest);
                self.state.paused.fetch_add(1, Ordering::AcqRel)
            }
            (true, false) => self.state.paused.fetch_sub(1, Ordering::AcqRel),
            _ => 0,
        };
    }

    /// A turn of each queue. False if there is nothing to do for now.
    fn turn(&mut self) -> bool {
        let mut worked = false;
        for queue in &mut self.queues {
            match queue.turn() {
                Ok(more) => worked |= more,
                Err(error) => give_up(queue, &self.state, &error),
            }
        }
        worked
    }

    /// Waits for a command, a driver, or what requests wait for.
    fn wait(&self) {
        let mut fds = vec![PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)];
        let mut kicks = Vec::new();
        // Whatever comes stays in its descriptor until the thread goes on.
        for queue in self.queues.iter().filter(|_| !self.paused) {
            let (kick, source) = queue.sources();
            if let Some(kick) = kick {
                kicks.push((fds.len(), queue));
                fds.push(PollFd::new(kick, PollFlags::POLLIN));
            }
            fds.extend(source.map(|source| PollFd::new(source, PollFlags::POLLIN)));
        }
        let _ = poll(&mut fds, PollTimeout::NONE);
        let has = |at: usize| fds.get(at).is_some_and(|fd| fd.any().unwrap_or(true));
        if has(0) {
            let _ = self.wake.read();
        }
        kicks.into_iter().filter(|(at, _)| has(*at)).for_each(|(_, queue)| queue.heard());
    }
}

/// The driver broke its queue.
fn give_up<S: Serve>(queue: &mut Queue<S>, state: &State, error: &RingError) {
    tracing::warn!("{}: the guest's driver broke its queue: {error}; it must reset the device", queue.name);
    state.broken.store(true, Ordering::Release);
    Counters::add(&queue.counters.errors, 1);
    queue.give_up();
}
