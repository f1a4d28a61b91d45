//! Where a console's bytes come from and go to.
//!
//! Owns the thread that writes what the guest printed and the one that reads what a user types; both end with the console. A
//! reader that is slow or gone costs the guest nothing: its queue is bounded, and what does not fit is counted and lost.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, bounded, unbounded};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::machine::Event;
use crate::sandbox::{self, ThreadKind};
use crate::scrollback::Scrollback;
use crate::terminal::RawTerminal;

/// Bytes that the guest may be ahead of whoever reads: a kernel's whole boot log.
const QUEUE: usize = 256 << 10;
/// How long what the guest printed last may take to be written when the machine ends.
const DRAIN: Duration = Duration::from_secs(2);
/// How long the reader waits for the guest to take what was typed.
const TYPED_WAIT: u16 = 5;
/// Ctrl-], as telnet and virsh have it: ends the machine from its console.
const ESCAPE: u8 = 0x1d;

/// The end of the queue that the guest's side writes to.
pub(crate) struct Output {
    queue: Sender<u8>,
    lost: Arc<AtomicU64>,
    /// For those who attach later.
    scrollback: Arc<Scrollback>,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            self.scrollback.push(*byte);
            if self.queue.len() >= QUEUE || self.queue.send(*byte).is_err() {
                self.lost.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The outside of a serial port, or of a virtio console.
pub(crate) struct Console {
    written: Receiver<()>,
    lost: Arc<AtomicU64>,
    reader: Option<(std::thread::JoinHandle<Option<()>>, EventFd)>,
    _raw: Option<RawTerminal>,
}

impl Console {
    /// A console whose bytes go to `sink`.
    ///
    /// # Errors
    /// No thread is to be had.
    pub(crate) fn new(
        sink: Box<dyn Write + Send>,
        scrollback: &Arc<Scrollback>,
    ) -> io::Result<(Self, Output)> {
        // One of `bounded` is in memory whole from the start: 4 MiB.
        let (queue, bytes) = unbounded();
        let (done, written) = bounded(1);
        sandbox::spawn(ThreadKind::Console, "console".to_owned(), move || {
            write_out(&bytes, sink);
            let _ = done.send(());
        })?;
        let lost = Arc::new(AtomicU64::new(0));
        let console = Self { written, lost: lost.clone(), reader: None, _raw: None };
        Ok((console, Output { queue, lost, scrollback: scrollback.clone() }))
    }

    /// For tests: what is printed is thrown away.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn open_nowhere() -> (Self, Output) {
        let (queue, bytes) = unbounded();
        let (done, written) = bounded(1);
        std::thread::spawn(move || {
            write_out(&bytes, Box::new(io::sink()));
            let _ = done.send(());
        });
        let lost = Arc::new(AtomicU64::new(0));
        let console = Self { written, lost: lost.clone(), reader: None, _raw: None };
        (console, Output { queue, lost, scrollback: Arc::default() })
    }

    /// Gives `take` what comes in on standard input, if anything can; it says how many bytes it took. A terminal is set to
    /// pass every key on.
    pub(crate) fn listen(
        &mut self,
        take: impl Fn(&[u8]) -> usize + Send + 'static,
        events: Sender<Event>,
    ) -> io::Result<()> {
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?;
        let stopped = stop.as_fd().try_clone_to_owned()?;
        self._raw = RawTerminal::new();
        let raw = self._raw.is_some();
        let thread = sandbox::spawn(ThreadKind::Console, "keyboard".to_owned(), move || {
            read_in(take, &events, &stopped, raw);
        })?;
        self.reader = Some((thread, stop));
        Ok(())
    }

    /// Ends both threads, after what the guest printed last was written, if somebody reads it. The port must be gone.
    pub(crate) fn close(mut self) {
        if let Some((thread, stop)) = self.reader.take() {
            let _ = stop.write(1);
            let _ = thread.join();
        }
        let _ = self.written.recv_timeout(DRAIN);
        match self.lost.load(Ordering::Relaxed) {
            0 => {}
            lost => tracing::warn!("{lost} bytes of a console were lost: nobody read them in time"),
        }
    }
}

/// Writes what comes until the port is gone.
fn write_out(bytes: &Receiver<u8>, mut sink: Box<dyn Write + Send>) {
    let mut batch = Vec::with_capacity(4096);
    while let Ok(first) = bytes.recv() {
        batch.clear();
        batch.push(first);
        batch.extend(bytes.try_iter().take(4095));
        // Nobody is there to read it: the guest goes on.
        let _ = sink.write_all(&batch).and_then(|()| sink.flush());
    }
}

/// Passes standard input on until it ends or `stop` is signalled.
fn read_in(take: impl Fn(&[u8]) -> usize, events: &Sender<Event>, stop: &impl AsFd, terminal: bool) {
    let stdin = io::stdin();
    let stopped = |timeout: PollTimeout| {
        let mut fds = [PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, timeout).is_ok_and(|ready| ready > 0)
    };
    let mut buffer = [0; 256];
    loop {
        let mut fds =
            [PollFd::new(stdin.as_fd(), PollFlags::POLLIN), PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::NONE).is_err() && nix::Error::last() != nix::Error::EINTR {
            return;
        }
        if stopped(PollTimeout::ZERO) {
            return;
        }
        // Unlocked and unbuffered: whatever is read here was typed for this guest.
        let Ok(length @ 1..) = nix::unistd::read(&stdin, &mut buffer) else { return };
        let mut typed = buffer.get(..length).unwrap_or_default();
        if terminal && typed.contains(&ESCAPE) {
            let _ = events.send(Event::Escape);
            return;
        }
        while !typed.is_empty() {
            let taken = take(typed);
            typed = typed.get(taken..).unwrap_or_default();
            if !typed.is_empty() && stopped(TYPED_WAIT.into()) {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_reads_is_kept_up_to_a_bound_and_counted_beyond() {
        let (queue, bytes) = unbounded();
        let mut output = Output { queue, lost: Arc::default(), scrollback: Arc::default() };
        output.write_all(&[7; QUEUE - 1]).unwrap();
        output.write_all(b"ab").unwrap();
        output.write_all(b"cde").unwrap();
        assert_eq!((bytes.len(), output.lost.load(Ordering::Relaxed)), (QUEUE, 4));
        assert_eq!(bytes.try_iter().last(), Some(b'a'));
        drop(bytes);
        output.write_all(b"f").unwrap();
        assert_eq!(output.lost.load(Ordering::Relaxed), 5, "nobody is there any more");
    }
}
