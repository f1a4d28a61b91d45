//! A queue pair: one receive ring, one transmit ring and a stack of free buffers.
//!
//! Owns the way of a buffer: stack, receive ring, caller, transmit ring, stack. Polls; no call here blocks, allocates or
//! logs, and an idle poll writes to no shared line. What the back end says about a buffer is checked by [`virtio::driver`].

mod bytes;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtio::driver::{DriverFault, DriverRing, OfferError, Piece, SetupError, Single};
use virtio::features;
use virtio::memory::copy::prefetch_read;
use virtio::net::header_len;

use bytes::{clear_header, num_buffers};

use super::buffer::Buffer;
use super::counters::Counters;
use super::memory::{Buffers, DeviceMemory, HEADROOM, MAX_PIECES};

/// A receive ring is refilled when this many of its descriptors are free: one publish and one fence for all of them.
const REFILL: u16 = 32;

/// No further buffer in a frame on the transmit ring.
const LAST: u32 = u32::MAX;

/// In a token of the transmit ring: the frame has further buffers.
const LONG: u32 = 1 << 31;

/// One receive and one transmit ring with their buffers. A thread polls it; it may be moved between threads.
pub struct QueuePair {
    receive: DriverRing,
    transmit: DriverRing,
    buffers: Buffers,
    /// Free buffers; the one used last is on top and still in the cache.
    pool: Vec<u32>,
    owner: u16,
    header_len: u16,
    mergeable: bool,
    indirect: bool,
    running: bool,
    /// Refill when this many receive descriptors are free.
    refill: u16,
    counters: Counters,
    receive_kick: Option<OwnedFd>,
    transmit_kick: Option<OwnedFd>,
    /// The next buffer of a transmitted frame, by buffer.
    next: Box<[u32]>,
    /// A frame of which not all buffers have come in yet.
    partial: Vec<Buffer>,
    fault: Option<DriverFault>,
    index: u16,
    queue_size: u16,
    memory: Arc<DeviceMemory>,
}

impl QueuePair {
    /// Pair `index` of the device `owner`, with the free buffers `pool`; not running yet.
    pub(super) fn new(
        memory: Arc<DeviceMemory>,
        owner: u16,
        index: u16,
        queue_size: u16,
        negotiated: u64,
        pool: std::ops::Range<u32>,
    ) -> Result<Self, SetupError> {
        let (receive, transmit) = rings(&memory, index, negotiated)?;
        let buffers = memory.buffers();
        let all = buffers.count as usize;
        let mut free = Vec::with_capacity(all);
        free.extend(pool.rev());
        Ok(Self {
            receive,
            transmit,
            buffers,
            pool: free,
            owner,
            header_len: header_len(negotiated) as u16,
            mergeable: negotiated & features::NET_MRG_RXBUF != 0,
            indirect: negotiated & features::RING_INDIRECT_DESC != 0,
            running: false,
            refill: REFILL.min(queue_size.div_ceil(4)),
            counters: Counters::default(),
            receive_kick: None,
            transmit_kick: None,
            next: vec![LAST; all].into_boxed_slice(),
            partial: Vec::with_capacity(usize::from(queue_size)),
            fault: None,
            index,
            queue_size,
            memory,
        })
    }

    /// The back end is there: `receive_kick` and `transmit_kick` are the eventfds that it was given.
    pub(super) fn start(&mut self, receive_kick: Option<OwnedFd>, transmit_kick: Option<OwnedFd>) {
        (self.receive_kick, self.transmit_kick) = (receive_kick, transmit_kick);
        self.running = true;
        self.refill();
        // A back end that sleeps looks at what was made available before it came.
        kick(&self.receive_kick, &mut self.counters);
        kick(&self.transmit_kick, &mut self.counters);
    }

    /// The back end is gone. Frames that it used before are still received after the next [`QueuePair::start`].
    pub(super) fn pause(&mut self) {
        self.running = false;
    }

    /// Where a new back end goes on: SET_VRING_BASE of the receive and the transmit ring.
    pub(super) fn resume_positions(&self) -> Result<(u32, u32), DriverFault> {
        match &self.fault {
            Some(fault) => Err(*fault),
            None => Ok((self.receive.resume_position()?, self.transmit.resume_position()?)),
        }
    }

    /// Starts both rings anew, as a device that was reset wants them. What the back end had is lost, and counted.
    pub(super) fn reset(&mut self, negotiated: u64) -> Result<(), SetupError> {
        if self.fault.is_none() {
            self.reclaim();
        }
        let (receive, transmit) = rings(&self.memory, self.index, negotiated)?;
        let (pool, next) = (&mut self.pool, &mut self.next);
        std::mem::replace(&mut self.receive, receive).abandon(|index| pool.push(index));
        let mut lost = 0;
        std::mem::replace(&mut self.transmit, transmit).abandon(|token| {
            recycle(pool, next, token);
            lost += 1;
        });
        self.counters.abandoned += lost;
        pool.extend(self.partial.drain(..).map(|b| b.index));
        self.header_len = header_len(negotiated) as u16;
        self.mergeable = negotiated & features::NET_MRG_RXBUF != 0;
        self.indirect = negotiated & features::RING_INDIRECT_DESC != 0;
        (self.fault, self.running) = (None, false);
        Ok(())
    }

    /// Takes up to `max` frames that have come in and appends their buffers to `out`, in order; returns how many frames. A
    /// frame of several buffers takes several places in `out` ([`Buffer::follows`]).
    #[inline]
    pub fn receive(&mut self, out: &mut Vec<Buffer>, max: usize) -> usize {
        if !self.running {
            return 0;
        }
        let start = out.len();
        out.append(&mut self.partial);
        let (buffers, owner, header) = (self.buffers, self.owner, u32::from(self.header_len));
        let mut bytes = 0;
        let mut runts = 0;
        let result = self.receive.reclaim(max, |index, written| {
            prefetch_read(buffers.ptr(index));
            // A length below that of the header wraps, and shows in `runts`.
            let len = written.wrapping_sub(header);
            runts |= len;
            bytes += u64::from(len);
            out.push(Buffer { index, len, offset: HEADROOM as u16, follows: 0, owner, header_set: false });
        });
        if let Err(fault) = result {
            self.broke(fault);
        }
        if self.receive.free() >= self.refill {
            self.refill();
        }
        let taken = out.len() - start;
        if taken == 0 {
            return 0;
        }
        if self.mergeable {
            self.gather(out, start)
        } else if runts >> 31 != 0 {
            self.drop_runts(out, start)
        } else {
            self.counters.received += taken as u64;
            self.counters.received_bytes += bytes;
            taken
        }
    }

    /// Sorts what came in into frames: each header says how many buffers its frame has. What is incomplete waits.
    #[inline]
    fn gather(&mut self, out: &mut Vec<Buffer>, start: usize) -> usize {
        let mut frames = 0;
        let mut bytes = 0;
        for i in start..out.len() {
            let Some(b) = out.get(i) else { break };
            // SAFETY: a buffer of ours has `HEADROOM` bytes before its frame, of which the header is the last.
            let spans = unsafe { num_buffers(self.buffers.ptr(b.index)) };
            if spans != 1 || b.len >> 31 != 0 {
                return self.gather_slowly(out, start);
            }
            bytes += u64::from(b.len);
            frames += 1;
        }
        self.counters.received += frames as u64;
        self.counters.received_bytes += bytes;
        frames
    }

    #[cold]
    fn gather_slowly(&mut self, out: &mut Vec<Buffer>, start: usize) -> usize {
        let header = u32::from(self.header_len);
        let mut incoming = out.split_off(start).into_iter().peekable();
        let mut frames = 0;
        while let Some(mut first) = incoming.next() {
            // SAFETY: as in `gather`.
            let spans = unsafe { num_buffers(self.buffers.ptr(first.index)) };
            if spans == 0 || spans > self.queue_size || first.len >> 31 != 0 {
                self.counters.malformed += 1;
                self.pool.push(first.index);
                continue;
            }
            let at = out.len();
            let mut bytes = u64::from(first.len);
            first.follows = spans - 1;
            out.push(first);
            for _ in 1..spans {
                match incoming.next() {
                    // The buffers after the first have no header: what was taken off as such is frame.
                    Some(b) if b.offset == HEADROOM as u16 => {
                        let len = b.len.wrapping_add(header);
                        bytes += u64::from(len);
                        out.push(Buffer { len, offset: b.offset - self.header_len, ..b });
                    }
                    Some(b) => {
                        bytes += u64::from(b.len);
                        out.push(b);
                    }
                    None => {
                        // The first is told apart by its offset when it is looked at again.
                        self.partial.extend(out.drain(at..));
                        self.counters.received += frames as u64;
                        return frames;
                    }
                }
            }
            frames += 1;
            self.counters.received_bytes += bytes;
        }
        self.counters.received += frames as u64;
        frames
    }

    /// Buffers that hold less than a header are no frames.
    #[cold]
    fn drop_runts(&mut self, out: &mut Vec<Buffer>, start: usize) -> usize {
        let incoming = out.split_off(start);
        for b in incoming {
            if b.len >> 31 != 0 {
                self.counters.malformed += 1;
                self.pool.push(b.index);
            } else {
                self.counters.received += 1;
                self.counters.received_bytes += u64::from(b.len);
                out.push(b);
            }
        }
        out.len() - start
    }

    /// Gives the receive ring all the buffers that it has room for.
    pub(super) fn refill(&mut self) {
        let wanted = usize::from(self.receive.free());
        if self.pool.len() < wanted {
            self.reclaim();
        }
        let (buffers, header) = (self.buffers, u32::from(self.header_len));
        let before = HEADROOM as u32 - header;
        let pool = &mut self.pool;
        let offered = self.receive.offer(std::iter::from_fn(|| {
            let index = pool.pop()?;
            let address = buffers.guest(index) + u64::from(before);
            Some(Single { address, len: buffers.size - before, token: index })
        }));
        if offered < wanted {
            self.counters.starved += 1;
        }
        if self.receive.publish() {
            kick(&self.receive_kick, &mut self.counters);
        }
    }

    /// Hands frames to the back end, from the front of `frames` as many as there is room for; returns how many buffers it
    /// took. They come back to the pool by themselves when the back end is done with them.
    #[inline]
    pub fn transmit(&mut self, frames: &mut Vec<Buffer>) -> usize {
        if !self.running || frames.is_empty() {
            return 0;
        }
        if usize::from(self.transmit.free()) < frames.len() {
            self.reclaim();
        }
        let mut taken = 0;
        let mut count = 0;
        while let Some(rest) = frames.get(taken..).filter(|r| !r.is_empty()) {
            let buffers = self.buffers;
            let (owner, header) = (self.owner, self.header_len);
            let mut bytes = 0;
            // A run of frames of one buffer each.
            let run = rest.iter().take_while(|b| b.follows == 0).map(|b| {
                assert!(b.owner == owner, "a buffer of another device");
                let at = b.offset - header;
                if !b.header_set {
                    // SAFETY: a frame in a buffer of ours begins at least a header behind the buffer's first byte.
                    unsafe { clear_header(buffers.ptr(b.index).wrapping_add(usize::from(at)), header) };
                }
                bytes += u64::from(b.len);
                let address = buffers.guest(b.index) + u64::from(at);
                Single { address, len: b.len + u32::from(header), token: b.index }
            });
            let n = self.transmit.offer(run);
            taken += n;
            count += n as u64;
            self.counters.transmitted_bytes += bytes;
            match frames.get(taken) {
                Some(b) if b.follows != 0 => {
                    match self.transmit_long(frames.get(taken..).unwrap_or_default()) {
                        Ok(n) => {
                            taken += n;
                            count += 1;
                        }
                        Err(OfferError::Full) => break,
                        Err(_) => taken += self.discard(frames.get(taken..).unwrap_or_default()),
                    }
                }
                _ => break,
            }
        }
        self.counters.transmitted += count;
        if self.transmit.publish() {
            kick(&self.transmit_kick, &mut self.counters);
        }
        frames.drain(..taken);
        taken
    }

    /// Offers the frame of several buffers that `frames` begins with, as an indirect table if that was negotiated; returns
    /// how many buffers it has.
    #[cold]
    fn transmit_long(&mut self, frames: &[Buffer]) -> Result<usize, OfferError> {
        let n = frames.first().map_or(1, |b| b.follows() + 1);
        let mut pieces = [Piece { address: 0, len: 0 }; MAX_PIECES as usize];
        let (Some(frame), Some(pieces)) = (frames.get(..n), pieces.get_mut(..n)) else {
            return Err(OfferError::Pieces(n));
        };
        let mut bytes = 0;
        for (i, (piece, b)) in pieces.iter_mut().zip(frame).enumerate() {
            assert!(b.owner == self.owner, "a buffer of another device");
            let before = if i == 0 { self.header_len } else { 0 };
            let at = b.offset - before;
            if i == 0 && !b.header_set {
                let header = self.buffers.ptr(b.index).wrapping_add(usize::from(at));
                // SAFETY: as in `transmit`.
                unsafe { clear_header(header, before) };
            }
            let address = self.buffers.guest(b.index) + u64::from(at);
            *piece = Piece { address, len: b.len + u32::from(before) };
            bytes += u64::from(b.len);
        }
        let token = frame.first().map_or(0, |b| b.index) | LONG;
        if self.indirect {
            self.transmit.offer_indirect(pieces, token)?;
        } else {
            self.transmit.offer_chain(pieces, token)?;
        }
        for pair in frame.windows(2) {
            if let [a, b] = pair
                && let Some(next) = self.next.get_mut(a.index as usize)
            {
                *next = b.index;
            }
        }
        self.counters.transmitted_bytes += bytes;
        Ok(n)
    }

    /// Takes back the buffers of a frame that cannot be sent at all; returns how many.
    #[cold]
    fn discard(&mut self, frames: &[Buffer]) -> usize {
        let n = frames.first().map_or(0, |b| b.follows() + 1).min(frames.len());
        for b in frames.iter().take(n) {
            assert!(b.owner == self.owner, "a buffer of another device");
            self.pool.push(b.index);
        }
        self.counters.unsendable += 1;
        n
    }

    /// Takes transmitted buffers back from the back end.
    fn reclaim(&mut self) {
        let (pool, next) = (&mut self.pool, &mut self.next);
        let result = self.transmit.reclaim(usize::MAX, |index, _| recycle(pool, next, index));
        if let Err(fault) = result {
            self.broke(fault);
        }
    }

    /// A free buffer of no bytes, or `None` if all are in use.
    #[inline]
    pub fn allocate(&mut self) -> Option<Buffer> {
        if self.pool.is_empty() {
            self.reclaim();
        }
        let index = self.pool.pop()?;
        let owner = self.owner;
        Some(Buffer { index, len: 0, offset: HEADROOM as u16, follows: 0, owner, header_set: false })
    }

    /// Puts a buffer back.
    ///
    /// # Panics
    /// The buffer belongs to another device.
    #[inline]
    pub fn free(&mut self, b: Buffer) {
        assert!(b.owner == self.owner, "a buffer of another device");
        self.pool.push(b.index);
    }

    /// What happened so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// What the back end did wrong, if it did: both rings are at rest until [`super::VirtioUser::reconnect`].
    pub fn fault(&self) -> Option<&DriverFault> {
        self.fault.as_ref()
    }

    /// Free buffers.
    pub fn available(&self) -> usize {
        self.pool.len()
    }

    #[cold]
    fn broke(&mut self, fault: DriverFault) {
        self.fault = Some(fault);
        self.running = false;
    }
}

/// The rings of pair `index`, empty.
fn rings(
    memory: &Arc<DeviceMemory>,
    index: u16,
    negotiated: u64,
) -> Result<(DriverRing, DriverRing), SetupError> {
    let ring = |queue| {
        // SAFETY: the plan keeps the areas apart and inside the memory, which the setup keeps mapped; only the rings of this
        // queue touch them, one after the other, and no back end runs on them yet.
        unsafe { DriverRing::new(memory.setup(queue, negotiated)) }
    };
    Ok((ring(2 * index)?, ring(2 * index + 1)?))
}

/// Puts the buffers of a transmitted frame back.
#[inline(always)]
fn recycle(pool: &mut Vec<u32>, next: &mut [u32], token: u32) {
    pool.push(token & !LONG);
    if token & LONG != 0 {
        recycle_rest(pool, next, token & !LONG);
    }
}

#[cold]
fn recycle_rest(pool: &mut Vec<u32>, next: &mut [u32], mut index: u32) {
    while let Some(after) = next.get_mut(index as usize).filter(|n| **n != LAST) {
        index = std::mem::replace(after, LAST);
        pool.push(index);
    }
}

/// Signals an eventfd. It is non-blocking; one whose counter is full has been signalled enough.
#[cold]
fn kick(fd: &Option<OwnedFd>, counters: &mut Counters) {
    if let Some(fd) = fd {
        counters.kicks += 1;
        let _ = nix::unistd::write(fd, &1u64.to_ne_bytes());
    }
}
