//! What arrives at one queue of the interface: frames in chunks of the shared memory, lent and given back.
//!
//! Owns the receive and the fill ring, and knows of each chunk whether the kernel has it. Believes no descriptor: a chunk that the
//! kernel does not have, or a frame that leaves its chunk, ends the port.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use host::cpu::{rdtsc, tsc_hz};
use libc::xdp_desc;
use port::{Frame, MAX_BURST, Source};

use super::ring::{Consumer, Producer, broken};
use super::socket::{CHUNK, Chunks, Socket};

/// How often a socket that has nothing is asked whether its interface is still there.
const ASK_MILLISECONDS: u64 = 10;

/// What arrives at one queue of an interface.
pub struct XdpSource {
    pub(super) received: Consumer<xdp_desc>,
    pub(super) fill: Producer<u64>,
    chunks: Chunks,
    socket: Arc<Socket>,
    limit: usize,
    /// Chunks of the frames lent last.
    lent: Vec<u32>,
    /// What the kernel did wrong.
    wrong: Option<&'static str>,
    /// Time stamp when the interface is asked for again.
    asks_at: u64,
    ask: u64,
}

impl XdpSource {
    /// Gives the kernel all of `chunks` to fill.
    pub(super) fn new(
        received: Consumer<xdp_desc>,
        fill: Producer<u64>,
        chunks: Chunks,
        socket: Arc<Socket>,
    ) -> Self {
        let ask = tsc_hz() / 1000 * ASK_MILLISECONDS;
        let lent = Vec::with_capacity(MAX_BURST);
        let mut this = Self { received, fill, chunks, socket, limit: 0, lent, wrong: None, asks_at: 0, ask };
        for chunk in this.chunks.numbers() {
            this.chunks.give(chunk);
            this.fill.put(this.chunks.address(chunk));
        }
        this.fill.publish();
        this
    }

    /// The frame that `found` describes and its chunk, if it describes one.
    fn frame(&mut self, found: xdp_desc) -> Result<(Frame, u32), &'static str> {
        if found.options & libc::XDP_PKT_CONTD != 0 {
            return Err("the kernel gave a frame in several pieces, which nobody asked for");
        }
        let chunk =
            self.chunks.take_back(found.addr).ok_or("the kernel gave a buffer that it did not have")?;
        let within = (found.addr % CHUNK as u64) as usize;
        if found.len == 0 || within + found.len as usize > CHUNK {
            return Err("the kernel gave a frame that is longer than its buffer");
        }
        // SAFETY: `within` is less than CHUNK, and the chunk is part of the memory.
        let ptr = unsafe { self.chunks.ptr(chunk).add(within) };
        Ok((Frame { ptr, first_len: found.len, len: found.len, ..Frame::EMPTY }, chunk))
    }

    /// Looks after what only a system call can.
    #[cold]
    fn ask(&mut self, now: u64) -> io::Result<()> {
        self.asks_at = now + self.ask;
        self.socket.alive()
    }
}

impl Source for XdpSource {
    fn look(&mut self, limit: usize) -> io::Result<usize> {
        self.limit = limit;
        if let Some(wrong) = self.wrong {
            return Err(broken(wrong));
        }
        let ready = self.received.ready()? as usize;
        if ready == 0 {
            // What was left when the last burst went out has nobody else who would think of it.
            if self.socket.has_unsent() {
                self.socket.send_rest();
            }
            let now = rdtsc();
            if now >= self.asks_at {
                self.ask(now)?;
            }
        }
        Ok(ready.min(limit))
    }

    fn lend(&mut self, frames: &mut [Frame]) -> usize {
        let ready = self.received.ready().unwrap_or(0) as usize;
        let most = ready.min(self.limit).min(MAX_BURST);
        let mut lent = 0;
        for slot in frames.iter_mut().take(most) {
            let found = self.received.take();
            match self.frame(found) {
                Ok((frame, chunk)) => {
                    *slot = frame;
                    self.lent.push(chunk);
                    lent += 1;
                }
                Err(wrong) => {
                    self.wrong = Some(wrong);
                    break;
                }
            }
        }
        self.received.publish();
        lent
    }

    fn take_back(&mut self) {
        if self.lent.is_empty() {
            return;
        }
        for chunk in self.lent.drain(..) {
            self.chunks.give(chunk);
            self.fill.put(self.chunks.address(chunk));
        }
        self.fill.publish();
        if self.fill.needs_wakeup() {
            self.socket.fill_again();
        }
    }

    fn before_sleep(&mut self) {
        if self.fill.needs_wakeup() {
            self.socket.fill_again();
        }
    }

    fn waker(&self) -> Option<BorrowedFd<'_>> {
        Some(self.socket.as_fd())
    }
}

#[cfg(test)]
mod tests {
    use super::super::ring::kernel;
    use super::*;

    const SIZE: u32 = 8;

    fn source() -> XdpSource {
        let (received, fill) = (kernel::consumer(SIZE), kernel::producer(SIZE));
        XdpSource::new(received, fill, Chunks::of_test(0, SIZE), Arc::new(Socket::of_test()))
    }

    fn arrives(source: &XdpSource, bytes: &[u8], headroom: u64) -> u64 {
        let chunk = source.fill.taken().expect("a buffer to fill");
        let address = chunk + headroom;
        // SAFETY: within the chunk that the source gave.
        unsafe {
            let to = source.chunks.ptr((chunk / CHUNK as u64) as u32).add(headroom as usize);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
        source.received.give(xdp_desc { addr: address, len: bytes.len() as u32, options: 0 });
        chunk
    }

    #[test]
    fn frames_are_lent_in_order_and_their_buffers_are_filled_again() {
        let mut source = source();
        let mut frames = [Frame::EMPTY; 64];
        // Several times around the ring.
        for round in 0..20u8 {
            for i in 0..5 {
                arrives(&source, &[round, i, 7, 7], 256);
            }
            assert_eq!(source.look(4).unwrap(), 4);
            assert_eq!(source.lend(&mut frames), 4);
            for (i, frame) in frames.iter().take(4).enumerate() {
                // SAFETY: a frame that is lent.
                let bytes = unsafe { std::slice::from_raw_parts(frame.ptr, frame.len as usize) };
                assert_eq!(bytes, [round, i as u8, 7, 7]);
            }
            source.take_back();
            assert_eq!(source.look(64).unwrap(), 1);
            assert_eq!(source.lend(&mut frames), 1);
            source.take_back();
        }
    }

    #[test]
    fn a_descriptor_that_makes_no_sense_ends_the_port_and_lends_nothing() {
        let chunk = CHUNK as u64;
        let wrong = |addr, len, options| xdp_desc { addr, len, options };
        let descriptors = [
            (wrong(256, 60, 0), "did not have"),
            (wrong(u64::from(SIZE) * chunk, 60, 0), "did not have"),
            (wrong(u64::MAX - 10, 60, 0), "did not have"),
            (wrong(chunk - 10, 60, 0), "longer than its buffer"),
            (wrong(0, u32::MAX, 0), "longer than its buffer"),
            (wrong(0, 0, 0), "longer than its buffer"),
            (wrong(0, 60, libc::XDP_PKT_CONTD), "several pieces"),
        ];
        for (i, (descriptor, said)) in descriptors.into_iter().enumerate() {
            let mut source = source();
            if i == 0 {
                // The same buffer twice.
                source.received.give(descriptor);
            }
            source.received.give(descriptor);
            let mut frames = [Frame::EMPTY; 64];
            source.look(64).unwrap();
            assert_eq!(source.lend(&mut frames), usize::from(i == 0), "{descriptor:?}");
            source.take_back();
            let error = source.look(64).unwrap_err().to_string();
            assert!(error.contains(said), "{descriptor:?}: {error}");
        }
    }

    #[test]
    fn an_index_beyond_the_ring_ends_the_port() {
        let mut source = source();
        source.received.set_producer(SIZE + 1);
        assert!(source.look(64).unwrap_err().to_string().contains("more than its ring holds"));
    }
}
