//! A running switch: workers, housekeeping, the sessions of its ports, and the one value that they all follow.
//!
//! Owns the threads. [`Switch`] is the handle that the command line, the control socket and tests hold; the housekeeping
//! thread is the only one that changes anything, so that changes are one after the other by construction.

mod announce;
mod attached;
mod housekeeper;
mod placement;
mod ports;
mod report;

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use arc_swap::ArcSwap;
use crossbeam::channel::{Sender, bounded};
use host::sandbox::files::{FileAccess, FilesError, Held};

use crate::bridge::{Fdb, FdbError, PlanError};
use crate::capture::{Capture, Traced};
use crate::config::{Config, PortConfig, ThisMachine};
use crate::control::report::ReloadReport;
use crate::inject::Lanes;
use crate::plan::Plans;
use crate::sandbox::{self, Devices, SandboxError, ThreadKind, files};
use crate::worker::{Worker, WorkerShared};
pub(crate) use attached::Attached;
use housekeeper::{Command, Housekeeper};
pub(crate) use ports::OFFERED;

/// Why a switch did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A thread could not be started, or not on its core.
    #[error("worker on core {core}: {reason}")]
    Worker {
        /// The core.
        core: u32,
        /// What the system said.
        reason: String,
    },
    /// A socket could not be opened.
    #[error("port {port}: {source}")]
    Port {
        /// The port's name.
        port: String,
        /// What is wrong with its socket.
        source: vhost_user::SocketError,
    },
    /// A network device could not be opened.
    #[error("port {port}: {source}")]
    Device {
        /// The port's name.
        port: String,
        /// What is wrong with its device.
        source: crate::device_port::DeviceError,
    },
    /// The file of a port's frames cannot be written.
    #[error("port {port}: {}: cannot be written: {source}", file.display())]
    Trace {
        /// The port's name.
        port: String,
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The learning table or its static entries.
    #[error("learning table: {0}")]
    Fdb(#[from] FdbError),
    /// A thread could not be confined.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// A thread could not be held to the switch's files.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// The bridge cannot be as the configuration wants it.
    #[error(transparent)]
    Bridge(#[from] PlanError),
    /// The system refused something else.
    #[error("{0}")]
    System(#[from] std::io::Error),
}

/// Why a change was refused; everything is as it was.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// These keys of `[switch]` only take effect at a start.
    #[error("{0} cannot change while the switch runs; restart it to change them")]
    NeedsRestart(String),
    /// A port could not be opened or its bridge settings are impossible.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The switch is ending.
    #[error("the switch is ending")]
    Ending,
}

/// A port as the configuration has it and as it runs.
#[derive(Clone)]
pub(crate) struct PortView {
    pub(crate) config: PortConfig,
    pub(crate) port: Attached,
    pub(crate) lanes: Option<Arc<Lanes>>,
    pub(crate) trace: Option<Arc<Traced>>,
}

/// What readers see of the configuration in force.
pub(crate) struct View {
    pub(crate) config: Config,
    pub(crate) ports: Vec<PortView>,
}

impl View {
    /// The port of this name.
    ///
    /// # Errors
    /// There is none, and which there are.
    fn port(&self, name: &str) -> Result<&PortView, String> {
        self.ports.iter().find(|p| p.config.name == name).ok_or_else(|| {
            let names: Vec<_> = self.ports.iter().map(|p| p.config.name.as_str()).collect();
            format!("there is no port {name:?}; there are {}", names.join(", "))
        })
    }
}

/// What all threads of a switch share.
pub(crate) struct Shared {
    pub(crate) plans: Arc<Plans>,
    pub(crate) fdb: Arc<Fdb>,
    pub(crate) workers: Vec<Arc<WorkerShared>>,
    pub(crate) view: ArcSwap<View>,
    captures: Mutex<Vec<Arc<Capture>>>,
    pub(crate) started: Instant,
    /// TSC when the switch started: the bridge's seconds count from it.
    pub(crate) epoch: u64,
}

impl Shared {
    /// The captures that run.
    pub(crate) fn captures(&self) -> Vec<Arc<Capture>> {
        self.change_captures(|captures| captures.clone())
    }

    /// Looks at the list of captures, or changes it; the next plan follows.
    pub(crate) fn change_captures<T>(&self, change: impl FnOnce(&mut Vec<Arc<Capture>>) -> T) -> T {
        change(&mut self.captures.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A running switch. Ends when dropped.
pub struct Switch {
    shared: Arc<Shared>,
    commands: Sender<Command>,
    threads: Vec<JoinHandle<()>>,
    run_dir: PathBuf,
    machine: ThisMachine,
}

impl Switch {
    /// Starts workers, opens all sockets. When it returns, every port can be connected to.
    ///
    /// # Errors
    /// Whatever is impossible; nothing is left behind.
    pub fn start(config: Config, run_dir: PathBuf, machine: ThisMachine) -> Result<Self, StartError> {
        let fdb = Arc::new(Fdb::new(config.switch.fdb_size)?);
        let epoch = host::cpu::rdtsc();
        let (events, inbox) = crate::events::Events::channel(1024);
        let first = ports::empty_plan(&config, fdb.clone())?;
        let workers = (config.switch.workers.iter().enumerate())
            .map(|(index, core)| WorkerShared::new(index, *core, epoch).map(Arc::new))
            .collect::<Result<Vec<_>, _>>()?;
        let view = View { config: config.clone(), ports: Vec::new() };
        let shared = Arc::new(Shared {
            plans: Arc::new(Plans::new(first)),
            fdb,
            workers,
            view: ArcSwap::from_pointee(view),
            captures: Mutex::default(),
            started: Instant::now(),
            epoch,
        });
        // Dropped on any error below: ends the threads that run already.
        let (commands, orders) = bounded(16);
        let mut switch = Self { shared: shared.clone(), commands, threads: Vec::new(), run_dir, machine };
        for worker in &shared.workers {
            let thread = start_worker(worker.clone(), &shared)?;
            switch.threads.push(thread);
        }
        let (ready, result) = bounded(1);
        let files = files::of(&config, &switch.run_dir);
        let devices = Devices::of(&config);
        let for_main = files.clone();
        let thread = std::thread::Builder::new().name("housekeeping".into()).spawn(move || {
            // Session threads are started from here, and inherit cores and confinement.
            let confined = become_housekeeping(&config, files.as_ref());
            let opened = confined.and_then(|held| Ok((held, Housekeeper::new(shared, events, config)?)));
            match opened {
                Ok((held, mut housekeeper)) => {
                    let _ = ready.send(Ok(held));
                    housekeeper.run(&orders, &inbox);
                }
                Err(e) => {
                    let _ = ready.send(Err(e));
                }
            }
        })?;
        switch.threads.push(thread);
        let ended = |_| Err(std::io::Error::other("housekeeping ended at once").into());
        let held = result.recv().unwrap_or_else(ended)?;
        let in_force = for_main.as_ref().filter(|_| held != Held::NotAtAll);
        switch.machine = switch.machine.confined(in_force, devices);
        Ok(switch)
    }

    /// Puts a changed configuration in force, whole or not at all. Ports that did not change are not touched.
    ///
    /// # Errors
    /// What could not be done; everything is as it was.
    pub fn apply(&self, config: Config) -> Result<ReloadReport, ApplyError> {
        let (reply, answer) = bounded(1);
        self.commands.send(Command::Apply(Box::new(config), reply)).map_err(|_| ApplyError::Ending)?;
        answer.recv().map_err(|_| ApplyError::Ending)?
    }

    /// Ends all threads and removes the sockets.
    pub fn shutdown(self) {
        drop(self);
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        // Housekeeping first: it closes the sessions while workers still let go of rings.
        let _ = self.commands.send(Command::Stop);
        if let Some(housekeeping) = self.threads.pop() {
            let _ = housekeeping.join();
        }
        for worker in &self.shared.workers {
            worker.stop.store(true, Ordering::Relaxed);
            worker.sleeper.wake();
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Starts a worker's thread on its core; returns when it runs there.
fn start_worker(worker: Arc<WorkerShared>, shared: &Shared) -> Result<JoinHandle<()>, StartError> {
    let core = worker.core;
    let failed = move |reason: String| StartError::Worker { core, reason };
    let plans = shared.plans.clone();
    let devices = Devices::of(&shared.view.load().config);
    let (ready, result) = bounded(1);
    let thread = std::thread::Builder::new()
        .name(format!("worker-{core}"))
        .spawn(move || {
            let placed = host::thread::pin(core).map_err(|e| failed(e.to_string()));
            // Allocated here, on the worker's node.
            let worker =
                Worker::new(worker, plans).ok_or_else(|| failed("too many workers were started".into()));
            let confined = placed.and_then(|()| Ok(sandbox::apply(ThreadKind::Worker, devices)?)).and(worker);
            match confined {
                Ok(mut worker) => {
                    let _ = ready.send(Ok(()));
                    worker.run();
                }
                Err(e) => {
                    let _ = ready.send(Err(e));
                }
            }
        })
        .map_err(|e| failed(e.to_string()))?;
    result.recv().unwrap_or_else(|_| Err(failed("ended at once".into())))?;
    Ok(thread)
}

/// Makes the calling thread, and all that it starts later, one for everything but moving frames: off the workers' cores, held
/// to `files` (if there are any), and to the system calls of housekeeping. Says how far the files are in force.
///
/// # Errors
/// The kernel does not say which cores there are, or refuses to confine.
pub fn become_housekeeping(config: &Config, files: Option<&FileAccess>) -> Result<Held, StartError> {
    host_cores(config)?;
    // The filter does not let the calls of Landlock pass.
    let held = files.map_or(Ok(Held::NotAtAll), FileAccess::confine)?;
    sandbox::apply(ThreadKind::Housekeeping, Devices::of(config))?;
    Ok(held)
}

/// Keeps the calling thread, and all that it starts, off the workers' cores.
fn host_cores(config: &Config) -> Result<(), StartError> {
    let permitted = host::topology::permitted_cores().map_err(std::io::Error::other)?;
    let wanted: Vec<u32> = match &config.switch.housekeeping {
        Some(cores) => cores.clone(),
        None => permitted.iter().filter(|core| !config.switch.workers.contains(core)).collect(),
    };
    let mut set = nix::sched::CpuSet::new();
    for core in wanted {
        set.set(core as usize).map_err(std::io::Error::from)?;
    }
    // All cores are workers': better to share one with a worker than not to run.
    let _ = nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set);
    Ok(())
}
