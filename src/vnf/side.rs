//! One network interface as a function sees it: frames in, frames out, and what became of them.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use anyhow::Result;
use nix::poll::{PollFd, PollFlags, poll};
use pmd::kernel::packet::{self, PacketSink, PacketSource};
use port::{Frame, MAX_BURST, Offload, PutError, Segment, Sink, Source};

/// How often a full interface is tried again before its frame is dropped.
const TRIES: usize = 1_000;

/// An interface.
pub(super) struct Side {
    pub(super) name: String,
    source: PacketSource,
    pub(super) out: Out,
    /// Frames that came in.
    pub(super) received: u64,
}

/// The way out of an interface.
pub(super) struct Out {
    sink: PacketSink,
    /// Frames that went out.
    pub(super) sent: u64,
    /// Frames that should have, and did not.
    pub(super) dropped: u64,
}

impl Side {
    /// An interface that is up.
    ///
    /// # Errors
    /// It is not.
    pub(super) fn open(name: &str) -> Result<Self> {
        let (source, sink) = packet::open(name)?;
        let out = Out { sink, sent: 0, dropped: 0 };
        Ok(Self { name: name.to_owned(), source, out, received: 0 })
    }

    /// Gives every frame that is here to `with`, with its bytes, and this interface's own way out. How many there were.
    ///
    /// # Errors
    /// The interface is gone.
    pub(super) fn take(&mut self, mut with: impl FnMut(&[u8], Offload, &mut Out)) -> Result<usize> {
        if self.source.look(MAX_BURST)? == 0 {
            return Ok(0);
        }
        let mut frames = [Frame::EMPTY; MAX_BURST];
        let lent = self.source.lend(&mut frames);
        for frame in frames.iter().take(lent) {
            // SAFETY: a source lends one run of `len` bytes, which stays as it is until `take_back`, after this loop.
            let bytes = unsafe { std::slice::from_raw_parts(frame.ptr, frame.len as usize) };
            with(bytes, frame.offload, &mut self.out);
        }
        self.source.take_back();
        self.received += lent as u64;
        Ok(lent)
    }

    fn waker(&self) -> Option<BorrowedFd<'_>> {
        self.source.waker()
    }
}

impl Out {
    /// Sends a frame that lies in pieces. A full interface is tried again for a while.
    pub(super) fn send(&mut self, offload: Offload, pieces: &[&[u8]]) {
        let len = pieces.iter().map(|piece| piece.len()).sum();
        for _ in 0..TRIES {
            let segments = pieces.iter().filter(|piece| !piece.is_empty());
            let segments = segments.map(|piece| Segment { ptr: piece.as_ptr(), len: piece.len() as u32 });
            match self.sink.put(offload, len, segments) {
                Ok(()) => {
                    self.sent += 1;
                    return;
                }
                Err(PutError::Full) => std::thread::yield_now(),
                Err(_) => break,
            }
        }
        self.dropped += 1;
    }
}

/// Waits until a frame is at one of the interfaces, or for `longest`.
pub(super) fn wait(sides: &[&Side], longest: Duration) {
    let mut fds: Vec<_> =
        sides.iter().filter_map(|side| side.waker()).map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
    // Interrupted by a signal or not: whoever calls looks for itself.
    let _ = poll(&mut fds, u16::try_from(longest.as_millis()).unwrap_or(u16::MAX));
}
