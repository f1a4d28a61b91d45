//! Threads that work on virtqueues for devices of our own, one for each queue.
//!
//! Owns the queue between DRIVER_OK and reset: what the driver makes available goes to a [`Serve`], request by request, in
//! order. A vCPU only leaves a message here and never waits. A ring that makes no sense is left alone until the driver resets
//! its device.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender, TryRecvError, unbounded};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use virtio::device::{DeviceRing, Direction, Layout, Ring, RingError, RingSetup};
use virtio::memory::GuestMemory;
use virtio::{features, with_ring};

use crate::buffers::Request;
use crate::control::report::QueueReport;
use crate::lifecycle::Lifecycle;
use crate::virtio_pci::{Activation, QueueSetup};

/// Where a packed ring begins: both wrap counters set (virtio 1.3, 2.8.1).
pub(crate) const PACKED_START: u32 = 0x8000_8000;

/// What a device does with the requests of one queue. It may wait for what they need; only its own queue waits then.
pub(crate) trait Serve: Send + 'static {
    /// The driver is ready; this was agreed on.
    fn start(&mut self, features: u64);
    /// Does what a request asks for. Returns how many bytes of it were written, from its first on; `None` keeps it until
    /// [`Serve::source`] has something.
    fn serve(&mut self, request: Request<'_>) -> Option<u32>;
    /// What a request that was kept is kept for; without it, it stays until the driver resets the device.
    fn source(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

enum Command {
    Start(u64, QueueSetup),
    Stop,
    Pause,
    Resume,
    End,
}

/// Counters of one queue; its thread writes them.
#[derive(Default)]
struct Counters {
    requests: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    interrupts: AtomicU64,
}

impl Counters {
    fn add(counter: &AtomicU64, more: u64) {
        counter.store(counter.load(Ordering::Relaxed) + more, Ordering::Relaxed);
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
        let mut workers =
            Self { name: name.to_owned(), workers: Vec::new(), counters: Vec::new(), state: Arc::default() };
        for (n, serve) in serve.into_iter().enumerate() {
            let (sender, commands) = unbounded();
            let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?);
            let mut worker = Worker {
                name: format!("{name}.{n}"),
                serve,
                commands,
                wake: wake.clone(),
                memory: memory.clone(),
                state: workers.state.clone(),
                running: None,
                paused: false,
                counters: Arc::default(),
            };
            workers.counters.push(worker.counters.clone());
            let thread = std::thread::Builder::new().name(worker.name.clone()).spawn(move || worker.run())?;
            workers.workers.push((sender, wake, thread));
        }
        Ok(workers)
    }

    /// The driver is ready.
    pub(crate) fn activate(&self, activation: Activation) {
        // All threads let go before.
        self.state.broken.store(false, Ordering::Release);
        for queue in activation.queues {
            if let Some((commands, wake, _)) = self.workers.get(usize::from(queue.index)) {
                self.state.busy.fetch_add(1, Ordering::AcqRel);
                // It only ends when this is dropped.
                let _ = commands.send(Command::Start(activation.features, queue));
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

/// A queue that is worked on.
struct Running {
    /// `None`: it made no sense.
    ring: Option<DeviceRing>,
    queue: QueueSetup,
    /// The driver was asked to say when there is something to do.
    asked: bool,
    /// A request is kept until there is something for it.
    starved: bool,
}

struct Worker<S> {
    name: String,
    serve: S,
    commands: Receiver<Command>,
    wake: Arc<EventFd>,
    memory: Arc<GuestMemory>,
    state: Arc<State>,
    running: Option<Running>,
    paused: bool,
    counters: Arc<Counters>,
}

impl<S: Serve> Worker<S> {
    fn run(&mut self) {
        loop {
            match self.commands.try_recv() {
                Ok(Command::Start(features, queue)) => self.start(features, queue),
                Ok(Command::Stop) => self.stop(),
                Ok(Command::Pause) => self.set_paused(true),
                Ok(Command::Resume) => self.set_paused(false),
                Ok(Command::End) | Err(TryRecvError::Disconnected) => return self.stop(),
                Err(TryRecvError::Empty) if self.paused => self.wait(),
                Err(TryRecvError::Empty) => match self.turn() {
                    Ok(true) => {}
                    Ok(false) => self.wait(),
                    Err(error) => self.give_up(&error),
                },
            }
        }
    }

    fn start(&mut self, features: u64, queue: QueueSetup) {
        self.serve.start(features);
        let packed = features & features::RING_PACKED != 0;
        let setup = RingSetup {
            layout: if packed { Layout::Packed } else { Layout::Split },
            direction: Direction::Both,
            size: queue.size,
            descriptors: queue.descriptors,
            driver: queue.driver,
            device: queue.device,
            base: Some(if packed { PACKED_START } else { 0 }),
            features,
            memory: self.memory.clone(),
            log: None,
            log_used: None,
            inflight: None,
        };
        let ring = DeviceRing::start(setup);
        let ring = ring.map_err(|error| self.give_up(&error)).ok();
        self.running = Some(Running { ring, queue, asked: true, starved: false });
    }

    fn stop(&mut self) {
        if self.running.take().is_some() {
            self.state.busy.fetch_sub(1, Ordering::AcqRel);
        }
    }

    fn set_paused(&mut self, paused: bool) {
        match (std::mem::replace(&mut self.paused, paused), paused) {
            (false, true) => self.state.paused.fetch_add(1, Ordering::AcqRel),
            (true, false) => self.state.paused.fetch_sub(1, Ordering::AcqRel),
            _ => 0,
        };
    }

    fn give_up(&mut self, error: &RingError) {
        tracing::warn!(
            "{}: the guest's driver broke its queue: {error}; it must reset the device",
            self.name
        );
        self.state.broken.store(true, Ordering::Release);
        Counters::add(&self.counters.errors, 1);
        if let Some(running) = &mut self.running {
            running.ring = None;
        }
    }

    /// Serves one request. False if there is nothing to do for now, and somebody says when there is.
    fn turn(&mut self) -> Result<bool, RingError> {
        let Some(Running { ring: Some(ring), queue, asked, starved }) = &mut self.running else {
            return Ok(false);
        };
        if with_ring!(ring, r => r.fetch(1))? == 0 {
            // Asked first, looked at again then: nothing is missed in between.
            if !std::mem::replace(asked, true) {
                ring.set_notify(true);
            }
            return Ok(ring.has_work());
        }
        if std::mem::replace(asked, false) {
            ring.set_notify(false);
        }
        let interrupt = with_ring!(ring, r => {
            let request = Request::oldest(r.stock());
            let read = request.readable.len();
            let served = self.serve.serve(request);
            *starved = served.is_none();
            let Some(written) = served else { return Ok(false) };
            Counters::add(&self.counters.requests, 1);
            Counters::add(&self.counters.bytes, read + u64::from(written));
            r.use_written(written);
            r.publish()
        });
        if let Some(call) = queue.call.as_ref().filter(|_| interrupt) {
            host::signal::signal(descriptor(call));
            Counters::add(&self.counters.interrupts, 1);
        }
        Ok(true)
    }

    /// Waits for a command or the driver.
    fn wait(&self) {
        let mut fds = vec![PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)];
        match &self.running {
            // Whatever comes stays in its descriptor until the thread goes on.
            _ if self.paused => {}
            Some(Running { ring: Some(_), starved: true, .. }) => {
                fds.extend(self.serve.source().map(|source| PollFd::new(source, PollFlags::POLLIN)));
            }
            Some(Running { ring: Some(_), queue, .. }) => {
                fds.push(PollFd::new(descriptor(&queue.kick), PollFlags::POLLIN));
            }
            _ => {}
        }
        let _ = poll(&mut fds, PollTimeout::NONE);
        let _ = self.wake.read();
        if let Some(running) = self.running.as_ref().filter(|_| !self.paused) {
            let _ = running.queue.kick.read();
        }
    }
}

fn descriptor(event: &vmm_sys_util::eventfd::EventFd) -> BorrowedFd<'_> {
    // SAFETY: it is open as long as `event` is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
