//! Hears of the end of a passed-through device: the kernel wants it back, or the bus reports an error of it.
//!
//! Owns a thread that sleeps until then, takes the device from the guest and says so: the kernel waits for it meanwhile.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::function::Inner;
use crate::device::lock;
use crate::sandbox::{self, ThreadKind};

/// The thread; it ends when this is dropped.
pub(super) struct Watch {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<Option<()>>>,
}

impl Watch {
    /// Begins to listen.
    ///
    /// # Errors
    /// No thread or eventfd is to be had.
    pub(super) fn start(inner: Arc<Mutex<Inner>>, name: &str, alarms: Vec<OwnedFd>) -> io::Result<Self> {
        let stop =
            Arc::new(EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let stopped = stop.clone();
        let listen = move || listen(&inner, &alarms, &stopped);
        let thread = sandbox::spawn(ThreadKind::Watch, format!("pci {name}"), listen)?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

fn listen(inner: &Mutex<Inner>, alarms: &[OwnedFd], stop: &EventFd) {
    loop {
        let mut fds = vec![PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
        fds.extend(alarms.iter().map(|alarm| PollFd::new(alarm.as_fd(), PollFlags::POLLIN)));
        if poll(&mut fds, PollTimeout::NONE).is_err() {
            continue;
        }
        if stop.read().is_ok() {
            return;
        }
        let mut inner = lock(inner);
        if let Some((name, why)) = inner.must_go() {
            inner.take_away();
            tracing::error!(
                "{name}: {why}: it was taken from the guest, which reads all ones there until the machine starts anew"
            );
            return;
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
