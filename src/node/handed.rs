//! The node's control socket, as whoever started the supervisor hands it over (systemd's socket units, sd_listen_fds(3)).
//!
//! Owns the taking of descriptors from the environment. Nothing of it is left for the processes that are started later.

use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;

use anyhow::{Context, Result, bail};

/// The descriptor that was handed over, if there is one. It and its environment are not inherited by others.
///
/// # Errors
/// The environment contradicts itself, or there are several.
///
/// # Safety
/// No other thread is there yet, and this process has opened no file that it still needs.
pub(super) unsafe fn descriptor() -> Result<Option<OwnedFd>> {
    // SAFETY: the caller says that nobody else reads the environment.
    let found = unsafe { sd_notify::listen_fds_with_names_and_unset_env() };
    let found = found.context("what systemd hands over ($LISTEN_FDS)")?;
    let mut handed: Vec<(OwnedFd, String)> = found
        // SAFETY: these numbers are open, as they were just set to be closed by exec, and are ours alone: $LISTEN_PID names
        // this process, and the variables are gone, so that nobody takes them twice.
        .map(|(fd, name)| (unsafe { OwnedFd::from_raw_fd(fd) }, name))
        .collect();
    if handed.len() > 1 {
        let names: Vec<&str> = handed.iter().map(|(_, name)| name.as_str()).collect();
        bail!(
            "systemd hands over {} sockets ({}), and a node has one: one ListenStream= of one socket unit",
            names.len(),
            names.join(", ")
        );
    }
    Ok(handed.pop().map(|(fd, _)| fd))
}

/// Closes the connections that wait at a socket which is not served after all: systemd would start this again for each of them, as
/// long as it waits.
pub(super) fn turn_away(handed: OwnedFd) {
    let listener = UnixListener::from(handed);
    if listener.set_nonblocking(true).is_ok() {
        while listener.accept().is_ok() {}
    }
}
