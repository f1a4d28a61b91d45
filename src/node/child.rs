//! One process of a node: the switch, or a machine. How it is started, told to be ready, and started again.
//!
//! Owns its command line, log and readiness socket. Never decides when: that is `supervise`.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::config::{Node, Restart};
use super::process::{Handle, Identity};
use super::state::{ChildState, Kind, now};
use crate::ready;

/// A log that is longer becomes NAME.log.1: a guest writes there what it wants.
const LOG_MAX: u64 = 4 << 20;
/// More ends than this in [`WINDOW`], and the next start waits.
const CRASHES: usize = 5;
const WINDOW: Duration = Duration::from_secs(10);
const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// A switch has nothing to ask anybody when it ends.
const SWITCH_PATIENCE: u64 = 10;
/// What a machine gets beyond the time that it gives its guest.
const VM_PATIENCE: u64 = 10;

/// A child.
pub(super) struct Child {
    /// As it is written down.
    pub(super) state: ChildState,
    /// The process, if it runs.
    pub(super) handle: Option<Handle>,
    /// Where it says that it is ready.
    pub(super) readiness: UnixDatagram,
    /// When it is to be started again.
    pub(super) next_start: Option<Instant>,
    /// Of a process that we started: how it ends.
    own: Option<std::process::Child>,
    arguments: Vec<String>,
    run_dir: PathBuf,
    pacing: Pacing,
}

impl Child {
    /// The children of a node: the switch first.
    ///
    /// # Errors
    /// The run directory takes no sockets.
    pub(super) fn all(node: &Node, run_dir: &Path) -> Result<Vec<Self>> {
        let (file, dir) = (node.file.display().to_string(), run_dir.display().to_string());
        let switch = ["switch".to_owned(), file.clone(), "--run-dir".to_owned(), dir.clone()];
        let mut children = vec![Self::new("switch", Kind::Switch, SWITCH_PATIENCE, switch.into(), run_dir)?];
        for machine in &node.machines {
            let arguments = ["vm", &file, "--vm", &machine.name, "--run-dir", &dir].map(str::to_owned);
            let patience = machine.shutdown_timeout.as_secs() + VM_PATIENCE;
            children.push(Self::new(&machine.name, Kind::Vm, patience, arguments.into(), run_dir)?);
        }
        Ok(children)
    }

    fn new(name: &str, kind: Kind, patience_s: u64, arguments: Vec<String>, run_dir: &Path) -> Result<Self> {
        let path = readiness_path(run_dir, name);
        let _ = fs::remove_file(&path);
        let readiness = UnixDatagram::bind(&path).with_context(|| format!("making {}", path.display()))?;
        readiness.set_nonblocking(true)?;
        let state = ChildState {
            name: name.to_owned(),
            kind,
            process: None,
            ready: false,
            since: now(),
            restarts: 0,
            last_end: None,
            patience_s,
        };
        let run_dir = run_dir.to_owned();
        Ok(Self {
            state,
            handle: None,
            readiness,
            next_start: None,
            own: None,
            arguments,
            run_dir,
            pacing: Pacing::default(),
        })
    }

    /// Takes over a process that another supervisor started, if it still runs.
    pub(super) fn adopt(&mut self, found: &ChildState) {
        self.state = ChildState { patience_s: self.state.patience_s, ..found.clone() };
        self.handle = found.process.and_then(|process| process.open());
        if self.handle.is_none() {
            self.state.process = None;
            self.state.ready = false;
        }
    }

    /// Starts it.
    ///
    /// # Errors
    /// The system refuses.
    pub(super) fn start(&mut self) -> Result<()> {
        let program = std::env::current_exe().context("finding this program")?;
        let mut command = Command::new(program);
        command.args(&self.arguments).env("NOTIFY_SOCKET", readiness_path(&self.run_dir, &self.state.name));
        // Ctrl-C is for the supervisor, who ends its children in order.
        command.stdin(Stdio::null()).process_group(0);
        // Under systemd everything goes to the journal.
        if !host::program::is_journal(io::stderr()) {
            let log = self.log()?;
            command.stdout(log.try_clone()?).stderr(log);
        }
        let child = command.spawn().with_context(|| format!("starting {}", self.state.name))?;
        let identity = Identity::of(i32::try_from(child.id()).context("a process number")?)?;
        // It is our child: even if it has ended, nobody else has its number before it is waited for.
        self.handle = identity.open();
        self.state.process = Some(identity);
        self.state.ready = false;
        self.state.since = now();
        self.next_start = None;
        self.own = Some(child);
        Ok(())
    }

    /// Whether it says now that it is ready.
    pub(super) fn became_ready(&mut self) -> bool {
        let mut message = [0; 256];
        let mut ready = false;
        while let Ok(length) = self.readiness.recv(&mut message) {
            let said = message.get(..length).unwrap_or_default();
            ready |= ready::is_ready(said);
        }
        let news = ready && !self.state.ready && self.state.process.is_some();
        self.state.ready |= news;
        if news {
            self.state.since = now();
        }
        news
    }

    /// Notes that its process has ended; says how, and plans the next start.
    pub(super) fn ended(&mut self, policy: Restart) -> String {
        let status = self.own.take().and_then(|mut own| own.wait().ok());
        let how =
            status.map_or_else(|| "ended, nobody knows how (another supervisor started it)".to_owned(), word);
        let clean = status.is_some_and(|status| status.success());
        self.handle = None;
        self.state.process = None;
        self.state.ready = false;
        self.state.since = now();
        self.state.last_end = Some(how.clone());
        let again = match (self.state.kind, policy) {
            (Kind::Switch, _) | (Kind::Vm, Restart::Always) => true,
            (Kind::Vm, Restart::OnFailure) => !clean,
            (Kind::Vm, Restart::Never) => false,
        };
        self.next_start = again.then(|| self.pacing.next_start(Instant::now()));
        how
    }

    /// Starts it again.
    ///
    /// # Errors
    /// The system refuses; it is tried again later.
    pub(super) fn restart(&mut self) -> Result<()> {
        self.state.restarts += 1;
        let done = self.start();
        if done.is_err() {
            self.next_start = Some(self.pacing.next_start(Instant::now()));
        }
        done
    }

    /// The last lines that it logged.
    pub(super) fn last_words(&self) -> String {
        last_lines(&log_path(&self.run_dir, &self.state.name), 5).unwrap_or_default()
    }

    /// Keeps its log short. It is written by a process that opened it for appending, so it can be emptied meanwhile; what is
    /// written between both steps is lost.
    pub(super) fn tidy_log(&self) {
        let path = log_path(&self.run_dir, &self.state.name);
        if fs::metadata(&path).is_ok_and(|found| found.len() > LOG_MAX) {
            let done = fs::copy(&path, path.with_extension("log.1"))
                .and_then(|_| OpenOptions::new().write(true).open(&path)?.set_len(0));
            if let Err(error) = done {
                tracing::warn!("cannot shorten {}: {error}", path.display());
            }
        }
    }

    fn log(&self) -> Result<File> {
        let path = log_path(&self.run_dir, &self.state.name);
        let open = OpenOptions::new().append(true).create(true).open(&path);
        open.with_context(|| format!("opening {}", path.display()))
    }
}

/// Where a child says that it is ready.
pub(super) fn readiness_path(run_dir: &Path, name: &str) -> PathBuf {
    run_dir.join(format!("{name}.ready"))
}

/// Where a child's output goes.
pub(super) fn log_path(run_dir: &Path, name: &str) -> PathBuf {
    run_dir.join(format!("{name}.log"))
}

/// The last lines of a file.
pub(super) fn last_lines(path: &Path, lines: usize) -> io::Result<String> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(4_096)))?;
    let mut bytes = Vec::new();
    file.take(4_096).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    Ok(all.get(all.len().saturating_sub(lines)..).unwrap_or_default().join("\n"))
}

fn word(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(0), _) => "ended".to_owned(),
        (Some(code), _) => format!("ended with status {code}"),
        (_, Some(signal)) => {
            let name = signal_hook::low_level::signal_name(signal).unwrap_or("a signal");
            format!("was ended by {name}")
        }
        _ => "ended".to_owned(),
    }
}

/// When something that ends again and again is started again.
#[derive(Default)]
struct Pacing {
    /// Recent ends.
    ends: VecDeque<Instant>,
    /// When it was started again the last time, and after what wait.
    last: Option<(Instant, Duration)>,
}

impl Pacing {
    /// It ended now: it is started at once, unless it did so too often. Who waited once goes on waiting, longer each time, until
    /// it lives for [`WINDOW`].
    fn next_start(&mut self, now: Instant) -> Instant {
        let waited = match self.last {
            Some((start, wait)) if now.saturating_duration_since(start) < WINDOW => wait,
            _ => Duration::ZERO,
        };
        while self.ends.front().is_some_and(|end| now.saturating_duration_since(*end) > WINDOW) {
            self.ends.pop_front();
        }
        self.ends.push_back(now);
        let wait = if waited > Duration::ZERO {
            (2 * waited).min(LONGEST_WAIT)
        } else if self.ends.len() > CRASHES {
            FIRST_WAIT
        } else {
            Duration::ZERO
        };
        let next = now + wait;
        self.last = Some((next, wait));
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_crashes_are_answered_at_once_and_a_series_slower_and_slower() {
        let mut pacing = Pacing::default();
        let mut now = Instant::now();
        let mut waits = Vec::new();
        for _ in 0..13 {
            let next = pacing.next_start(now);
            waits.push(next.duration_since(now).as_secs());
            now = next + Duration::from_millis(100);
        }
        assert_eq!(waits, [0, 0, 0, 0, 0, 1, 2, 4, 8, 16, 32, 60, 60]);
        // Whoever ran for long is not one of a series any more.
        now += Duration::from_secs(1_000);
        assert_eq!(pacing.next_start(now), now);
    }

    #[test]
    fn the_last_lines_of_a_long_log_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.log");
        let text: String = (0..2_000).map(|n| format!("line {n}\n")).collect();
        fs::write(&path, text).unwrap();
        assert_eq!(last_lines(&path, 2).unwrap(), "line 1998\nline 1999");
        fs::write(&path, "one").unwrap();
        assert_eq!(last_lines(&path, 2).unwrap(), "one");
    }
}
