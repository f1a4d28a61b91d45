//! What a traffic tool needs of a port: frames in, frames out, buffers.
//!
//! Implemented by the virtio-user driver (`virtio_user.rs`); a test implements it with two queues in memory. Owned buffers
//! move between the port and the tool, so that a frame is reflected without a copy.

/// A port that takes and gives bursts of owned buffers. Never blocks.
pub trait Endpoint {
    /// The right to a buffer with room for one frame.
    type Buffer: Send;

    /// Appends up to `max` received frames to `into`; returns how many.
    fn receive(&mut self, into: &mut Vec<Self::Buffer>, max: usize) -> usize;

    /// Sends frames from the front of `from` until the ring is full; those sent are gone from it. Returns how many.
    fn transmit(&mut self, from: &mut Vec<Self::Buffer>) -> usize;

    /// An empty buffer, or `None` while all are in the rings or with their users.
    fn allocate(&mut self) -> Option<Self::Buffer>;

    /// Gives a buffer back.
    fn free(&mut self, buffer: Self::Buffer);

    /// The frame in a buffer of this port, to read.
    fn frame(&self, buffer: &Self::Buffer) -> impl Bytes;

    /// The frame in a buffer of this port, to write.
    fn frame_mut(&mut self, buffer: &mut Self::Buffer) -> impl FrameBuffer;
}

impl<E: Endpoint> Endpoint for &mut E {
    type Buffer = E::Buffer;

    #[inline(always)]
    fn receive(&mut self, into: &mut Vec<E::Buffer>, max: usize) -> usize {
        (**self).receive(into, max)
    }

    #[inline(always)]
    fn transmit(&mut self, from: &mut Vec<E::Buffer>) -> usize {
        (**self).transmit(from)
    }

    #[inline(always)]
    fn allocate(&mut self) -> Option<E::Buffer> {
        (**self).allocate()
    }

    #[inline(always)]
    fn free(&mut self, buffer: E::Buffer) {
        (**self).free(buffer);
    }

    #[inline(always)]
    fn frame(&self, buffer: &E::Buffer) -> impl Bytes {
        (**self).frame(buffer)
    }

    #[inline(always)]
    fn frame_mut(&mut self, buffer: &mut E::Buffer) -> impl FrameBuffer {
        (**self).frame_mut(buffer)
    }
}

/// Bytes of a frame, read by value: the memory may be shared with the switch.
pub trait Bytes {
    /// Bytes of the frame, without FCS.
    fn len(&self) -> usize;

    /// The `N` bytes at `at`. Those that lie outside the frame are unspecified.
    fn load<const N: usize>(&self, at: usize) -> [u8; N];

    /// Whether the frame has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A buffer that is ours at the moment, to be written by value.
pub trait FrameBuffer: Bytes {
    /// Sets the number of bytes (at most the capacity; more is cut to it).
    fn set_len(&mut self, len: usize);

    /// Writes `N` bytes at `at`; nothing if they do not all fit in the buffer.
    fn store<const N: usize>(&mut self, at: usize, bytes: [u8; N]);
}

impl<B: Bytes + ?Sized> Bytes for &B {
    fn len(&self) -> usize {
        (**self).len()
    }

    #[inline(always)]
    fn load<const N: usize>(&self, at: usize) -> [u8; N] {
        (**self).load(at)
    }
}

impl Bytes for [u8] {
    fn len(&self) -> usize {
        <[u8]>::len(self)
    }

    #[inline(always)]
    fn load<const N: usize>(&self, at: usize) -> [u8; N] {
        match self.get(at..).and_then(<[u8]>::first_chunk::<N>) {
            Some(bytes) => *bytes,
            None => std::array::from_fn(|i| self.get(at + i).copied().unwrap_or(0)),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::collections::VecDeque;
    use std::sync::{Arc, Mutex};

    /// A buffer in ordinary memory.
    #[derive(Clone, Debug)]
    pub(crate) struct VecBuffer {
        pub(crate) bytes: Vec<u8>,
    }

    impl VecBuffer {
        pub(crate) fn with_capacity(capacity: usize) -> Self {
            Self { bytes: Vec::with_capacity(capacity) }
        }
    }

    impl Bytes for VecBuffer {
        fn len(&self) -> usize {
            self.bytes.len()
        }
        fn load<const N: usize>(&self, at: usize) -> [u8; N] {
            self.bytes.as_slice().load(at)
        }
    }

    impl FrameBuffer for VecBuffer {
        fn set_len(&mut self, len: usize) {
            self.bytes.resize(len.min(self.bytes.capacity()), 0);
        }
        fn store<const N: usize>(&mut self, at: usize, bytes: [u8; N]) {
            if let Some(place) = self.bytes.get_mut(at..).and_then(<[u8]>::first_chunk_mut::<N>) {
                *place = bytes;
            }
        }
    }

    impl Bytes for &mut VecBuffer {
        fn len(&self) -> usize {
            self.bytes.len()
        }
        fn load<const N: usize>(&self, at: usize) -> [u8; N] {
            self.bytes.as_slice().load(at)
        }
    }

    impl FrameBuffer for &mut VecBuffer {
        fn set_len(&mut self, len: usize) {
            (**self).set_len(len);
        }
        fn store<const N: usize>(&mut self, at: usize, bytes: [u8; N]) {
            (**self).store(at, bytes);
        }
    }

    type Queue = Arc<Mutex<VecDeque<VecBuffer>>>;
    /// What the wire does with a frame: nothing, or lose it, damage it, send it twice, …
    pub(crate) type Fault = Box<dyn FnMut(VecBuffer, &mut VecDeque<VecBuffer>) + Send>;

    /// One end of a wire of `depth` frames each way.
    pub(crate) struct Wire {
        incoming: Queue,
        outgoing: Queue,
        depth: usize,
        fault: Fault,
        pub(crate) lent: usize,
    }

    pub(crate) fn perfect() -> Fault {
        Box::new(|frame, queue| queue.push_back(frame))
    }

    /// Two ends of one wire; `fault` is what happens from the first to the second.
    pub(crate) fn wire(depth: usize, fault: Fault) -> (Wire, Wire) {
        let (ab, ba) = (Queue::default(), Queue::default());
        let a = Wire { incoming: ba.clone(), outgoing: ab.clone(), depth, fault, lent: 0 };
        let b = Wire { incoming: ab, outgoing: ba, depth, fault: perfect(), lent: 0 };
        (a, b)
    }

    impl Endpoint for Wire {
        type Buffer = VecBuffer;

        fn receive(&mut self, into: &mut Vec<VecBuffer>, max: usize) -> usize {
            let mut queue = self.incoming.lock().unwrap();
            let n = max.min(queue.len());
            into.extend(queue.drain(..n));
            self.lent += n;
            n
        }

        fn transmit(&mut self, from: &mut Vec<VecBuffer>) -> usize {
            let mut queue = self.outgoing.lock().unwrap();
            let n = from.len().min(self.depth.saturating_sub(queue.len()));
            for frame in from.drain(..n) {
                (self.fault)(frame, &mut queue);
            }
            self.lent -= n;
            n
        }

        fn allocate(&mut self) -> Option<VecBuffer> {
            self.lent += 1;
            Some(VecBuffer::with_capacity(crate::frame::LARGEST))
        }

        fn free(&mut self, _: VecBuffer) {
            self.lent -= 1;
        }

        fn frame(&self, buffer: &VecBuffer) -> impl Bytes {
            buffer
        }

        fn frame_mut(&mut self, buffer: &mut VecBuffer) -> impl FrameBuffer {
            buffer
        }
    }
}
