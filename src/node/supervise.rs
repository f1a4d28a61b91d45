//! The supervisor: brings a node up, keeps its processes running, brings it down.
//!
//! Owns the order: host, switch, machines; and back. Its own death changes nothing for the others: the next `up` takes them
//! over, and `down` works without it.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use control::ControlSocket;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::low_level::pipe;

use super::changes;
use super::child::{Child, readiness_path};
use super::config::Node;
use super::process::Identity;
use super::report::{Phase, Shown};
use super::state::{ChildState, Kind, State};
use crate::ready;

/// How long the switch may take until it is ready, and a machine until that is not waited for any more.
const START: Duration = Duration::from_secs(30);
/// How long giving back may take, beyond the end of all processes.
const GIVE_BACK: Duration = Duration::from_secs(60);
/// How often logs are looked at.
const TICK: Duration = Duration::from_secs(1);

/// Supervises until a signal ends it, and answers at `socket`. `found`: what an earlier supervisor left.
///
/// # Errors
/// What went wrong; everything was taken back.
pub(super) fn run(
    node: &Node,
    run_dir: &Path,
    found: Option<State>,
    socket: ControlSocket,
) -> Result<ExitCode> {
    let signals = Signals::new()?;
    let mut supervisor = Supervisor::new(node, run_dir, found)?;
    let _server = socket.serve(supervisor.shown.clone().router(), || {})?;
    let up = supervisor.bring_up(&signals);
    match &up {
        Ok(true) => {
            tracing::info!("{} is up: cableway status shows it, cableway down ends it", node.file.display());
            supervisor.enter(Phase::Up);
            ready::tell();
            supervisor.watch(&signals, None);
        }
        Ok(false) => tracing::info!("interrupted: everything is taken back"),
        Err(_) => tracing::error!("it cannot be brought up: everything is taken back"),
    }
    supervisor.enter(Phase::Ending);
    ready::tell_end(supervisor.patience());
    let left = tear_down(&mut supervisor.state, run_dir);
    up?;
    if left > 0 {
        bail!("{left} of what was changed could not be given back; `cableway down` tries it again");
    }
    tracing::info!("{} is down", node.file.display());
    Ok(ExitCode::SUCCESS)
}

/// Signals, as something to wait for.
struct Signals {
    /// Readable: end.
    stop: UnixStream,
    /// Readable: the switch is to read its file again.
    reload: UnixStream,
}

impl Signals {
    fn new() -> Result<Self> {
        let channel = |signals: &[i32]| -> Result<UnixStream> {
            let (read, write) = UnixStream::pair()?;
            read.set_nonblocking(true)?;
            for signal in signals {
                pipe::register(*signal, write.try_clone()?).context("waiting for signals")?;
            }
            Ok(read)
        };
        Ok(Self { stop: channel(&[SIGTERM, SIGINT])?, reload: channel(&[SIGHUP])? })
    }
}

struct Supervisor<'n> {
    node: &'n Node,
    run_dir: PathBuf,
    phase: Phase,
    /// To those who ask.
    shown: Shown,
    /// As it is written down, but for the children, which are copied when it is.
    state: State,
    children: Vec<Child>,
}

impl<'n> Supervisor<'n> {
    fn new(node: &'n Node, run_dir: &Path, found: Option<State>) -> Result<Self> {
        let mut children = Child::all(node, run_dir)?;
        let (changes, mut left) = found.map(|state| (state.changes, state.children)).unwrap_or_default();
        for child in &mut children {
            if let Some(i) = left.iter().position(|found| found.name == child.state.name) {
                child.adopt(&left.swap_remove(i));
                if child.handle.is_some() {
                    tracing::info!("{} runs already, and is taken over", child.state.name);
                }
            }
        }
        for gone in left.iter().filter_map(|child| Some((child, child.process?.open()?))) {
            tracing::info!("{} is not in the file any more: it is ended", gone.0.name);
            gone.1.end(gone.0.patience());
        }
        let state =
            State { file: node.file.clone(), supervisor: Identity::own()?, changes, children: Vec::new() };
        let shown = Shown::new(state.clone(), run_dir);
        let mut made =
            Self { node, run_dir: run_dir.to_owned(), phase: Phase::Starting, shown, state, children };
        made.note();
        Ok(made)
    }

    /// Goes on to another phase.
    fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        self.save();
    }

    /// Takes the children's state over into the node's, and shows it.
    fn note(&mut self) {
        self.state.children = self.children.iter().map(|child| child.state.clone()).collect();
        self.shown.set(&self.state, self.phase);
        ready::tell_status(&self.shown.report().sentence());
    }

    /// How long everything may take to end: all machines at once, then the switch, then what was changed.
    fn patience(&self) -> Duration {
        2 * self.children.iter().map(|child| child.state.patience()).max().unwrap_or_default() + GIVE_BACK
    }

    /// Writes down what is. Not being able to is no reason to end what runs.
    fn save(&mut self) {
        self.note();
        if let Err(error) = self.state.write(&self.run_dir) {
            tracing::error!("cannot write the node's state in {}: {error}", self.run_dir.display());
        }
    }

    /// False: it was interrupted.
    fn bring_up(&mut self, signals: &Signals) -> Result<bool> {
        self.save();
        for step in changes::steps(self.node) {
            tracing::info!("{}", step.what);
            if !self.state.changes.contains(&step.change) {
                self.state.changes.push(step.change.clone());
            }
            // Before it is made: whoever finds this state takes back what may or may not have been done.
            self.note();
            self.state.write(&self.run_dir).context("writing the node's state")?;
            step.make()?;
        }
        for kind in [Kind::Switch, Kind::Vm] {
            for child in self.children.iter_mut().filter(|child| child.state.kind == kind) {
                if child.handle.is_none() {
                    tracing::info!("starting {}", child.state.name);
                    child.start()?;
                }
            }
            self.save();
            if !self.await_ready(kind, signals)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Waits until all children of a kind are ready; a machine only for so long, the switch must be. False: interrupted.
    fn await_ready(&mut self, kind: Kind, signals: &Signals) -> Result<bool> {
        let deadline = Instant::now() + START;
        loop {
            let mut of_kind = self.children.iter().filter(|child| child.state.kind == kind);
            if of_kind.clone().all(|child| child.state.ready) {
                return Ok(true);
            }
            if let Some(ended) = of_kind.clone().find(|child| child.state.process.is_none()) {
                let (name, how) = (&ended.state.name, ended.state.last_end.as_deref().unwrap_or("ended"));
                bail!("{name} {how}; the end of its log:\n{}", ended.last_words());
            }
            let late = of_kind.find(|child| !child.state.ready).filter(|_| Instant::now() >= deadline);
            match (late, kind) {
                (None, _) => {}
                (Some(_), Kind::Switch) => bail!("the switch is not ready after {START:?}"),
                (Some(late), Kind::Vm) => {
                    tracing::warn!("{} is still waiting; its log says for what", late.state.name);
                    return Ok(true);
                }
            }
            if self.turn(signals, Some(deadline), false) {
                return Ok(false);
            }
        }
    }

    /// Keeps everything running until a signal.
    fn watch(&mut self, signals: &Signals, until: Option<Instant>) {
        while !self.turn(signals, until, true) {}
    }

    /// Waits for something to happen, and does what it asks for. True: end.
    fn turn(&mut self, signals: &Signals, until: Option<Instant>, revive: bool) -> bool {
        self.wait(signals, until);
        let mut changed = false;
        for child in &mut self.children {
            let name = child.state.name.clone();
            if child.became_ready() {
                tracing::info!("{name} is ready");
                changed = true;
            }
            // A child that ended before we could open it has a process, and no handle.
            let running = child.handle.as_ref().is_some_and(|handle| !handle.has_ended(Duration::ZERO));
            if child.state.process.is_some() && !running {
                let how = child.ended(self.node.host.restart);
                let next = match child.next_start.map(|at| at.saturating_duration_since(Instant::now())) {
                    _ if !revive => "",
                    None => "; it stays down",
                    Some(Duration::ZERO) => "; it is started again",
                    Some(_) => "; it ends too often, and is started again in a while",
                };
                tracing::warn!("{name} {how}{next}");
                changed = true;
            }
            if revive && child.next_start.is_some_and(|at| Instant::now() >= at) {
                if let Err(error) = child.restart() {
                    tracing::error!("{error:#}");
                }
                changed = true;
            }
            child.tidy_log();
        }
        if changed {
            self.save();
        }
        let asked = |mut channel: &UnixStream| channel.read(&mut [0; 16]).is_ok_and(|read| read > 0);
        if asked(&signals.reload) {
            let switch = self.children.iter().find(|child| child.state.kind == Kind::Switch);
            if let Some(handle) = switch.and_then(|child| child.handle.as_ref()) {
                tracing::info!("the switch reads its part of the file again");
                handle.signal(Signal::HUP);
            }
        }
        asked(&signals.stop)
    }

    /// Until a child ends or speaks, a signal comes, or it is time for something.
    fn wait(&self, signals: &Signals, until: Option<Instant>) {
        let times = self.children.iter().filter_map(|child| child.next_start).chain(until);
        let rest = times.map(|at| at.saturating_duration_since(Instant::now())).chain([TICK]).min();
        let rest = Timespec::try_from(rest.unwrap_or(TICK)).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
        let mut fds =
            vec![PollFd::new(&signals.stop, PollFlags::IN), PollFd::new(&signals.reload, PollFlags::IN)];
        for child in &self.children {
            fds.push(PollFd::new(&child.readiness, PollFlags::IN));
            fds.extend(child.handle.iter().map(|handle| PollFd::new(handle.pidfd(), PollFlags::IN)));
        }
        // A signal that interrupts it is one of those that are waited for.
        let _ = poll(&mut fds, Some(&rest));
    }
}

/// Ends all processes of a node and takes back what it changed; how much of that failed. `state` keeps what is left.
pub(super) fn tear_down(state: &mut State, run_dir: &Path) -> usize {
    for kind in [Kind::Vm, Kind::Switch] {
        end_all(state.children.iter().filter(|child| child.kind == kind));
    }
    for child in &state.children {
        let _ = std::fs::remove_file(readiness_path(run_dir, &child.name));
    }
    state.children.clear();
    let mut left = Vec::new();
    while let Some(change) = state.changes.pop() {
        match change.undo() {
            Ok(()) => tracing::info!("given back: {change}"),
            Err(error) => {
                tracing::error!("not given back: {change}: {error:#}");
                left.push(change);
            }
        }
    }
    left.reverse();
    state.changes = left;
    let kept = if state.changes.is_empty() { State::remove(run_dir) } else { state.write(run_dir) };
    if let Err(error) = kept {
        tracing::error!("the node's state in {}: {error}", run_dir.display());
    }
    state.changes.len()
}

/// All at once: machines shut down side by side.
fn end_all<'c>(children: impl Iterator<Item = &'c ChildState>) {
    std::thread::scope(|scope| {
        for child in children {
            let Some(handle) = child.process.and_then(|process| process.open()) else { continue };
            scope.spawn(move || {
                tracing::info!("ending {}", child.name);
                if handle.end(child.patience()) {
                    tracing::warn!("{} did not end within {:?} and was killed", child.name, child.patience());
                }
            });
        }
    });
}
