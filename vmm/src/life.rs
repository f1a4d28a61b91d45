//! What of a machine outlives its guest's reboots: its state, what happened to it, its consoles' files and tails.
//!
//! Owns what the control socket shows and asks. The machine itself puts its parts here when it runs and takes them back when
//! it ends; nothing here ever holds a vCPU.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Seek, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use host::program::is_journal;
use tokio::sync::oneshot;

use crate::config::{Config, SerialTo};
use crate::control::report::{
    EventKind, EventReport, EventsReport, MachineInfo, MachineState, Port, VcpuReport,
};
use crate::device::{Devices, lock};
use crate::journal::JournalLines;
use crate::machine::{Done, Remote, Take};
use crate::scrollback::Scrollback;
use crate::vcpu::VcpuPlace;

/// Events that are kept.
const KEPT: usize = 1024;

/// A machine, across its reboots.
pub struct Life {
    config: Config,
    began: Instant,
    now: Mutex<Now>,
    events: Events,
    ending: Ending,
    pub(crate) serial: Arc<Scrollback>,
    pub(crate) console: Arc<Scrollback>,
    /// Where the two go, if to files: opened once, so that a reboot needs no right to open them.
    files: [Option<File>; 2],
}

struct Now {
    state: MachineState,
    boots: u64,
    parts: Option<Parts>,
}

/// What a machine that runs lends.
pub(crate) struct Parts {
    pub(crate) remote: Remote,
    pub(crate) vcpus: Vec<VcpuPlace>,
    pub(crate) devices: Arc<Devices>,
    pub(crate) serial: Option<Take>,
    pub(crate) console: Option<Take>,
}

/// Whether somebody asked for the machine's end: whoever waits while it is put together looks here.
#[derive(Clone, Default)]
pub(crate) struct Ending(Arc<AtomicBool>);

impl Ending {
    pub(crate) fn is_asked(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// What happened, in order; the oldest is forgotten.
#[derive(Clone)]
pub(crate) struct Events(Arc<Mutex<Log>>);

#[derive(Default)]
struct Log {
    next: u64,
    kept: VecDeque<EventReport>,
}

impl Events {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Mutex::new(Log { next: 1, kept: VecDeque::new() })))
    }

    /// Notes that something happened, to the device `subject` if to one.
    pub(crate) fn note(&self, kind: EventKind, subject: Option<&str>) {
        let mut log = lock(&self.0);
        let time_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
        let (sequence, device) = (log.next, subject.map(str::to_owned));
        log.next += 1;
        if log.kept.len() >= KEPT {
            log.kept.pop_front();
        }
        log.kept.push_back(EventReport { sequence, time_s, kind, device });
    }

    /// Those with numbers above `after`.
    pub(crate) fn since(&self, after: u64) -> EventsReport {
        let log = lock(&self.0);
        let oldest = log.kept.front().map_or(log.next, |event| event.sequence);
        let events = log.kept.iter().filter(|event| event.sequence > after).cloned().collect();
        EventsReport { events, missed: oldest.saturating_sub(after.saturating_add(1)), last: log.next - 1 }
    }
}

impl Life {
    /// The life of the machine that `config` describes, before its first start.
    ///
    /// # Errors
    /// A console's file cannot be written.
    pub fn new(config: &Config) -> io::Result<Arc<Self>> {
        let open = |to: &SerialTo| match to {
            SerialTo::File(path) => create(path).map(Some),
            _ => Ok(None),
        };
        let files = [open(&config.serial)?, open(&config.console)?];
        Ok(Arc::new(Self {
            config: config.clone(),
            began: Instant::now(),
            now: Mutex::new(Now { state: MachineState::Starting, boots: 0, parts: None }),
            events: Events::new(),
            ending: Ending::default(),
            serial: Arc::default(),
            console: Arc::default(),
            files,
        }))
    }

    /// Where what a console prints goes, from its beginning; `None`: there is no such console.
    pub(crate) fn sink(&self, port: Port) -> io::Result<Option<Box<dyn Write + Send>>> {
        let [serial, console] = &self.files;
        let (to, file) = match port {
            Port::Serial => (&self.config.serial, serial),
            Port::Virtio => (&self.config.console, console),
        };
        Ok(match (to, file) {
            (SerialTo::Off, _) => None,
            (SerialTo::File(_), Some(file)) => {
                // What cannot be emptied has no beginning either.
                let _ = file.set_len(0);
                let _ = (&mut &*file).rewind();
                Some(Box::new(file.try_clone()?))
            }
            (SerialTo::Stdio, _) if is_journal(io::stdout()) => {
                Some(Box::new(JournalLines::new(io::stdout())))
            }
            (SerialTo::Stdio | SerialTo::File(_), _) => Some(Box::new(io::stdout())),
        })
    }

    pub(crate) fn events(&self) -> &Events {
        &self.events
    }

    /// It runs, for the first time or again; not if it is to end.
    #[must_use]
    pub(crate) fn runs(&self, parts: Parts) -> bool {
        let mut now = lock(&self.now);
        if self.is_ending() {
            return false;
        }
        *now = Now { state: MachineState::Running, boots: now.boots + 1, parts: Some(parts) };
        self.events.note(EventKind::Started, None);
        true
    }

    /// Ends the machine at once, and for good: the guest if there is one, whose answer is returned, or the start that is under way.
    pub(crate) fn end(&self) -> Option<oneshot::Receiver<Done>> {
        // Either the guest that begins just now sees it, or it is asked.
        let now = lock(&self.now);
        self.ending.0.store(true, Ordering::Release);
        now.parts.as_ref().map(|parts| parts.remote.end())
    }

    /// Ends the machine at once, and for good, whether it has a guest or is being put together.
    pub fn kill(&self) {
        drop(self.end());
    }

    /// Presses the power button; whether there was a guest to hear it. Waits until then: a machine that rests or goes on takes
    /// that long.
    pub fn shutdown(&self) -> bool {
        self.remote().is_some_and(|remote| remote.shutdown_within(None).blocking_recv().is_ok())
    }

    /// Whether it never had a guest, and has none yet.
    pub fn is_starting(&self) -> bool {
        self.state() == MachineState::Starting
    }

    /// Whether somebody asked for its end.
    pub fn is_ending(&self) -> bool {
        self.ending.is_asked()
    }

    pub(crate) fn ending(&self) -> Ending {
        self.ending.clone()
    }

    /// It ended before its guest began.
    pub fn ended(&self) {
        self.becomes(MachineState::Ended, EventKind::Killed);
    }

    /// It is in another state because of `why`.
    pub(crate) fn becomes(&self, state: MachineState, why: EventKind) {
        lock(&self.now).state = state;
        self.events.note(why, None);
    }

    /// Gives its parts back.
    pub(crate) fn ends(&self) {
        lock(&self.now).parts = None;
    }

    pub(crate) fn state(&self) -> MachineState {
        lock(&self.now).state
    }

    /// What asks the machine, while it runs.
    pub(crate) fn remote(&self) -> Option<Remote> {
        lock(&self.now).parts.as_ref().map(|parts| parts.remote.clone())
    }

    /// Types `bytes` on a console; how many it took. `None`: there is no such console.
    pub(crate) fn type_on(&self, port: Port, bytes: &[u8]) -> Option<usize> {
        let now = lock(&self.now);
        // Between two boots nobody takes anything.
        let Some(parts) = &now.parts else { return self.has(port).then_some(0) };
        let take = match port {
            Port::Serial => &parts.serial,
            Port::Virtio => &parts.console,
        };
        take.as_ref().map(|take| take.bytes(bytes))
    }

    /// Whether the machine has this console.
    pub(crate) fn has(&self, port: Port) -> bool {
        let to = match port {
            Port::Serial => &self.config.serial,
            Port::Virtio => &self.config.console,
        };
        *to != SerialTo::Off
    }

    /// The console that is attached to unless one is named.
    pub(crate) fn main_console(&self) -> Port {
        if self.has(Port::Serial) || !self.has(Port::Virtio) { Port::Serial } else { Port::Virtio }
    }

    pub(crate) fn printed(&self, port: Port) -> &Scrollback {
        match port {
            Port::Serial => &self.serial,
            Port::Virtio => &self.console,
        }
    }

    /// All that there is to know.
    pub(crate) fn info(&self) -> MachineInfo {
        let now = lock(&self.now);
        let parts = now.parts.as_ref();
        MachineInfo {
            name: self.config.name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            state: now.state,
            uptime_s: self.began.elapsed().as_secs_f64(),
            boots: now.boots,
            kernel: self.config.kernel.display().to_string(),
            memory_bytes: self.config.memory,
            vcpus: parts.map_or_else(Vec::new, |p| p.vcpus.iter().map(VcpuReport::of).collect()),
            devices: parts.map_or_else(Vec::new, |p| p.devices.reports()),
            last_event: self.events.since(u64::MAX).last,
        }
    }
}

fn create(path: &Path) -> io::Result<File> {
    File::create(path).map_err(|error| {
        io::Error::new(error.kind(), format!("the console's file {}: {error}", path.display()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_numbered_and_the_oldest_are_counted_as_missed() {
        let events = Events::new();
        assert_eq!((events.since(0).missed, events.since(0).last), (0, 0));
        (0..KEPT + 10).for_each(|_| events.note(EventKind::Paused, None));
        let report = events.since(0);
        assert_eq!((report.events.len(), report.missed, report.last), (KEPT, 10, KEPT as u64 + 10));
        assert_eq!(events.since(report.last).events, []);
        assert_eq!(events.since(report.last - 1).events[0].sequence, report.last);
        assert_eq!(events.since(u64::MAX).missed, 0);
    }
}
