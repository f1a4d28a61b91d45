//! What leaves by one queue of the interface: frames copied into chunks of the shared memory, sent by a call a burst.
//!
//! Owns the transmit and the completion ring, and the chunks that are free. A completion of a chunk that the kernel does not have ends
//! the port.

use std::io;
use std::sync::Arc;

use libc::xdp_desc;
use port::{Offload, PutError, Segment, Sink};
use virtio::memory::copy::copy;

use super::ring::{Consumer, Producer, broken};
use super::socket::{CHUNK, Chunks, Socket};

/// What leaves by one queue of an interface.
pub struct XdpSink {
    send: Producer<xdp_desc>,
    done: Consumer<u64>,
    chunks: Chunks,
    free: Vec<u32>,
    socket: Arc<Socket>,
    /// Frames were put since the kernel was last told.
    put: bool,
}

impl XdpSink {
    pub(super) fn new(
        send: Producer<xdp_desc>,
        done: Consumer<u64>,
        chunks: Chunks,
        socket: Arc<Socket>,
    ) -> Self {
        let free = chunks.numbers().collect();
        Self { send, done, chunks, free, socket, put: false }
    }

    /// Takes back what was sent.
    fn reap(&mut self) -> io::Result<()> {
        let ready = self.done.ready()?;
        for _ in 0..ready {
            let address = self.done.take();
            let chunk = self.chunks.take_back(address);
            self.free.push(chunk.ok_or_else(|| broken("the kernel sent a buffer that it did not have"))?);
        }
        if ready > 0 {
            self.done.publish();
        }
        Ok(())
    }

    /// Lets the kernel send what was put.
    fn kick(&mut self) -> io::Result<()> {
        self.put = false;
        self.send.publish();
        if self.send.needs_wakeup() {
            self.socket.send(|| self.send.waiting())?;
        }
        Ok(())
    }

    /// A chunk for a frame.
    #[cold]
    fn make_room(&mut self) -> io::Result<()> {
        self.reap()?;
        if self.free.is_empty() {
            self.kick()?;
            self.reap()?;
        }
        Ok(())
    }
}

impl Sink for XdpSink {
    fn put(&mut self, _: Offload, len: usize, pieces: impl Iterator<Item = Segment>) -> Result<(), PutError> {
        if len > CHUNK {
            return Err(PutError::Refused);
        }
        if self.free.is_empty() {
            self.make_room().map_err(PutError::Gone)?;
        }
        let Some(&chunk) = self.free.last() else { return Err(PutError::Full) };
        let (to, mut at) = (self.chunks.ptr(chunk), 0);
        for piece in pieces {
            let n = (piece.len as usize).min(len - at);
            // SAFETY: `n` bytes at `piece.ptr` are the frame's, by the caller; `at + n` is at most `len`, which fits the chunk.
            unsafe { copy(to.add(at), piece.ptr, n) };
            at += n;
        }
        self.free.pop();
        self.chunks.give(chunk);
        self.send.put(xdp_desc { addr: self.chunks.address(chunk), len: at as u32, options: 0 });
        self.put = true;
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.put || self.socket.has_unsent() {
            self.kick()?;
        }
        self.reap()
    }
}

#[cfg(test)]
mod tests {
    use super::super::ring::kernel;
    use super::*;

    const SIZE: u32 = 8;

    fn sink() -> XdpSink {
        let chunks = Chunks::of_test(SIZE, SIZE);
        XdpSink::new(kernel::producer(SIZE), kernel::consumer(SIZE), chunks, Arc::new(Socket::of_test()))
    }

    fn put(sink: &mut XdpSink, bytes: &[u8]) -> Result<(), PutError> {
        let pieces = bytes.chunks(7).map(|p| Segment { ptr: p.as_ptr(), len: p.len() as u32 });
        sink.put(Offload::NONE, bytes.len(), pieces)
    }

    #[test]
    fn frames_leave_whole_and_in_order_and_a_full_ring_says_so() {
        let mut sink = sink();
        let frame = |n: u32| (0..100).map(|i| (n * 3 + i) as u8).collect::<Vec<u8>>();
        for n in 0..100 {
            put(&mut sink, &frame(n)).unwrap();
            sink.flush().unwrap();
            let found = sink.send.taken().unwrap();
            assert_eq!(found.len, 100);
            let chunk = (found.addr / CHUNK as u64) as u32 - SIZE;
            // SAFETY: the chunk that the sink filled.
            let bytes = unsafe { std::slice::from_raw_parts(sink.chunks.ptr(chunk), 100) };
            assert_eq!(bytes, frame(n));
            sink.done.give(found.addr);
        }
        sink.flush().unwrap();
        for n in 0..SIZE {
            put(&mut sink, &frame(n)).unwrap();
        }
        assert!(matches!(put(&mut sink, &frame(0)), Err(PutError::Full)));
        let found = sink.send.taken().unwrap();
        sink.done.give(found.addr);
        put(&mut sink, &frame(0)).unwrap();
    }

    #[test]
    fn a_frame_longer_than_a_chunk_is_refused() {
        assert!(matches!(put(&mut sink(), &[0; CHUNK + 1]), Err(PutError::Refused)));
        put(&mut sink(), &[0; CHUNK]).unwrap();
    }

    #[test]
    fn a_completion_that_makes_no_sense_ends_the_port() {
        for address in [0, u64::from(SIZE) * CHUNK as u64, u64::from(2 * SIZE) * CHUNK as u64, u64::MAX] {
            let mut sink = sink();
            // None of them is with the kernel.
            sink.done.give(address);
            assert!(sink.flush().unwrap_err().to_string().contains("did not have"), "{address:#x}");
        }
        let mut sink = sink();
        sink.send.set_consumer(1);
        put(&mut sink, &[0; 60]).unwrap();
        put(&mut sink, &[0; 60]).unwrap();
        sink.send.set_consumer(3);
        assert!(sink.send.waiting().unwrap_err().to_string().contains("more than it was given"));
    }
}
