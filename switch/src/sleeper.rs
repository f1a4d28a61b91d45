//! How a worker sleeps and who wakes it.
//!
//! Owns the worker's epoll descriptor: the kick descriptors of the rings that it polls, and an eventfd for housekeeping. Kicks
//! are edge-triggered and never read: what matters is that one came, not how many.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// What a worker sleeps on.
pub struct Sleeper {
    epoll: Epoll,
    wake: EventFd,
}

impl Sleeper {
    /// A sleeper that only housekeeping can wake yet.
    ///
    /// # Errors
    /// The process has no descriptors left.
    pub fn new() -> io::Result<Arc<Self>> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        epoll.add(&wake, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0))?;
        Ok(Arc::new(Self { epoll, wake }))
    }

    /// Wakes the worker, or keeps it from falling asleep.
    pub fn wake(&self) {
        // A full counter wakes as well.
        let _ = self.wake.write(1);
    }

    /// Sleeps until something happens, at most `milliseconds`.
    pub(crate) fn sleep(&self, milliseconds: u16) {
        let mut events = [EpollEvent::empty(); 8];
        // An interrupted sleep is a short one.
        let _ = self.epoll.wait(&mut events, EpollTimeout::from(milliseconds));
    }
}

/// The kick descriptor of a ring, and the sleeper that watches it. Unwatched when dropped: the front end holds the same
/// eventfd, so that closing ours would not take it out of the epoll set.
pub(crate) struct Kick {
    fd: OwnedFd,
    watched_by: Option<Arc<Sleeper>>,
}

impl Kick {
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self { fd, watched_by: None }
    }

    /// Lets `sleeper` wake when the driver kicks. Costs nothing when it does already.
    pub(crate) fn watch(&mut self, sleeper: &Arc<Sleeper>) {
        if self.watched_by.as_ref().is_some_and(|s| Arc::ptr_eq(s, sleeper)) {
            return;
        }
        self.unwatch();
        let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 1);
        if sleeper.epoll.add(self.fd.as_fd(), event).is_ok() {
            self.watched_by = Some(sleeper.clone());
        }
    }

    fn unwatch(&mut self) {
        if let Some(old) = self.watched_by.take() {
            let _ = old.epoll.delete(self.fd.as_fd());
        }
    }
}

impl Drop for Kick {
    fn drop(&mut self) {
        self.unwatch();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    fn eventfd() -> (EventFd, OwnedFd) {
        let fd = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
        let other = fd.as_fd().try_clone_to_owned().unwrap();
        (fd, other)
    }

    fn slept(sleeper: &Sleeper, milliseconds: u16) -> Duration {
        let start = Instant::now();
        sleeper.sleep(milliseconds);
        start.elapsed()
    }

    #[test]
    fn a_kick_wakes_again_and_again_without_being_read() {
        let sleeper = Sleeper::new().unwrap();
        let (front, ours) = eventfd();
        let mut kick = Kick::new(ours);
        kick.watch(&sleeper);
        kick.watch(&sleeper);
        for _ in 0..3 {
            front.write(1).unwrap();
            assert!(slept(&sleeper, 60_000) < Duration::from_secs(50));
        }
        assert!(slept(&sleeper, 20) >= Duration::from_millis(19), "no kick, no waking");
    }

    #[test]
    fn a_ring_that_is_gone_wakes_nobody_although_the_front_end_still_has_the_descriptor() {
        let sleeper = Sleeper::new().unwrap();
        let (front, ours) = eventfd();
        let mut kick = Kick::new(ours);
        kick.watch(&sleeper);
        drop(kick);
        front.write(1).unwrap();
        assert!(slept(&sleeper, 20) >= Duration::from_millis(19));
    }
}
