//! A process that is known by number: told from a later one with the same number, waited for and ended without being its
//! parent.
//!
//! Owns pidfds and start times. A process outlives whoever started it, so everything here works for a process that somebody
//! else started.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// A process, as it is written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    /// Its number.
    pub(super) pid: i32,
    /// When it was started, in clock ticks since the machine was (proc(5), `starttime`): numbers come again.
    pub(super) started: u64,
}

impl Identity {
    /// The process of this number, as it is now.
    ///
    /// # Errors
    /// There is none.
    pub(super) fn of(pid: i32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let started =
            start_time(&stat).ok_or_else(|| io::Error::other(format!("{stat:?} has no start time")))?;
        Ok(Self { pid, started })
    }

    /// The calling process.
    ///
    /// # Errors
    /// /proc is not there.
    pub(super) fn own() -> io::Result<Self> {
        Self::of(rustix::process::getpid().as_raw_nonzero().get())
    }

    /// Whether it is still the same one, and no zombie.
    pub(super) fn is_alive(&self) -> bool {
        self.open().is_some()
    }

    /// A handle of it, if it is still there.
    pub(super) fn open(&self) -> Option<Handle> {
        let pidfd = pidfd_open(Pid::from_raw(self.pid)?, PidfdFlags::empty()).ok()?;
        // The descriptor is of whoever has the number now: only after it was taken the comparison means something.
        let same = Self::of(self.pid).is_ok_and(|now| now == *self);
        let handle = Handle { pidfd };
        (same && !handle.has_ended(Duration::ZERO)).then_some(handle)
    }
}

/// The 22nd number of /proc/PID/stat, counted behind the name, which may hold anything.
fn start_time(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// A running process.
#[derive(Debug)]
pub(super) struct Handle {
    pidfd: OwnedFd,
}

impl Handle {
    /// To wait for several at once: readable when it has ended.
    pub(super) fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }

    /// Whether it ends within `patience`.
    pub(super) fn has_ended(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            let rest = deadline.saturating_duration_since(Instant::now());
            let rest = Timespec::try_from(rest).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
            match poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&rest)) {
                Err(rustix::io::Errno::INTR) => {}
                ready => return ready.is_ok_and(|ready| ready > 0),
            }
        }
    }

    /// Sends it a signal; one that has ended meanwhile needs none.
    pub(super) fn signal(&self, signal: Signal) {
        let _ = pidfd_send_signal(&self.pidfd, signal);
    }

    /// Asks it to end; after `patience` it is ended. True: it had to be.
    pub(super) fn end(&self, patience: Duration) -> bool {
        self.signal(Signal::TERM);
        let forced = !self.has_ended(patience);
        if forced {
            self.signal(Signal::KILL);
            self.has_ended(Duration::from_secs(10));
        }
        forced
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_process_is_told_from_a_later_one_with_its_number() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let identity = Identity::of(child.id() as i32).unwrap();
        assert!(identity.is_alive());
        assert!(!Identity { started: identity.started + 1, ..identity }.is_alive());
        let handle = identity.open().unwrap();
        assert!(!handle.has_ended(Duration::from_millis(1)));
        assert!(!handle.end(Duration::from_secs(60)));
        assert!(!identity.is_alive(), "a zombie is not alive");
        child.wait().unwrap();
        assert!(!identity.is_alive());
    }

    #[test]
    fn one_that_does_not_want_to_end_is_ended() {
        // Says when it ignores the signal: before, it would end by it.
        let mut child = Command::new("sh")
            .args(["-c", "trap '' TERM; echo; while :; do sleep 0.1; done"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        std::io::Read::read_exact(&mut child.stdout.take().unwrap(), &mut [0]).unwrap();
        let handle = Identity::of(child.id() as i32).unwrap().open().unwrap();
        assert!(handle.end(Duration::from_millis(100)));
        child.wait().unwrap();
    }

    #[test]
    fn the_start_time_is_found_behind_any_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 0 0";
        assert_eq!(start_time(stat), Some(4711));
        assert_eq!(start_time("7 (x"), None);
    }
}
