//! From a guest's transmit ring into a burst.
//!
//! Reads each virtio-net header and each frame's first bytes once, into the worker's memory; refuses what cannot be a frame;
//! lends the rest. Never copies a payload, never looks past a frame's end.

use std::sync::Arc;

use port::{
    Burst, BurstBuffer, DropReason, Frame, FrameSet, HEAD, Head, MAX_BURST, MAX_SEGMENTS, MIN_FRAME, Offload,
    Release, RxQueue, Segment,
};
use virtio::device::{Buffer, Chain, Ring, RingError, Stock};
use virtio::memory::copy::{copy, full_fence, read_head, read_net_header};
use virtio::with_ring;

use super::{PortShared, RunningRing, RxSlot, RxState};
use crate::claim::{Entered, Owner};
use crate::counters::RxCounters;
use crate::sleeper::Sleeper;
use crate::slot::{Polled, Running};

/// A guest's transmit ring, claimed for one burst.
pub struct RxRing<'c> {
    running: &'c mut RunningRing,
    port: &'c PortShared,
    index: u16,
    counters: &'c RxCounters,
    limit: usize,
    /// Chains that the current burst took, usable or not.
    taken: usize,
}

impl RxSlot {
    /// Its worker goes elsewhere.
    pub(crate) fn leave(&self, owner: &mut Owner) {
        self.state.leave(owner);
    }

    /// Before a worker sleeps: asks the driver for notifications and lets `sleeper` hear them. True if the worker must not
    /// sleep: frames wait, somebody else has the ring, or the driver cannot kick.
    pub(crate) fn arm(&self, owner: &mut Owner, sleeper: &Arc<Sleeper>) -> bool {
        let Some(mut claim) = self.state.enter(owner) else { return true };
        let Some(running) = claim.ring.as_mut().filter(|r| r.live()) else { return false };
        let Some(kick) = &mut running.kick else { return true };
        kick.watch(sleeper);
        running.ring.set_notify(true);
        running.ring.has_work()
    }

    /// After a worker slept: no notifications, please.
    pub(crate) fn disarm(&self, owner: &mut Owner) {
        if let Some(mut claim) = self.state.enter(owner)
            && let Some(running) = claim.ring.as_mut().filter(|r| r.live())
        {
            running.ring.set_notify(false);
        }
    }
}

impl Running for RunningRing {
    type Queue<'c> = RxRing<'c>;

    fn number(index: u16) -> usize {
        usize::from(index / 2)
    }

    #[inline(always)]
    fn polled<'c>(
        slot: &'c RxSlot,
        entered: &'c mut Entered<'_, RxState>,
        limit: usize,
    ) -> Option<Polled<'c, RxRing<'c>>> {
        let RxState { ring, ingress, likely } = &mut **entered;
        let running = ring.as_mut().filter(|r| r.live())?;
        let limit = limit.min(MAX_BURST);
        let ring = RxRing {
            running,
            port: &slot.port,
            index: slot.index,
            counters: &slot.counters,
            limit,
            taken: 0,
        };
        Some(Polled { ring, ingress, likely })
    }
}

impl RxQueue for RxRing<'_> {
    #[inline(always)]
    fn peek(&mut self) -> usize {
        let limit = self.limit;
        match with_ring!(&mut self.running.ring, r => if r.stock().is_empty() { r.peek(limit) } else { Ok(r.stock().len()) })
        {
            Ok(n) => n,
            Err(e) => {
                self.running.fail(self.port, self.index, e);
                0
            }
        }
    }

    #[inline(always)]
    fn poll<'q>(&'q mut self, buffer: &'q mut BurstBuffer) -> Burst<'q> {
        let header = self.running.header;
        let read =
            with_ring!(&mut self.running.ring, r => Self::read(r, header, self.limit, self.counters, buffer));
        self.taken = read.taken;
        if let Some(error) = read.broken {
            self.running.fail(self.port, self.index, error);
        }
        let frames = read.frames;
        if frames == 0 && self.taken > 0 {
            self.release();
        }
        Burst::new(self, buffer, frames)
    }
}

/// What a poll found.
struct Read {
    taken: usize,
    frames: usize,
    broken: Option<RingError>,
}

impl RxRing<'_> {
    #[inline(always)]
    fn read<R: Ring>(
        ring: &mut R,
        header: usize,
        limit: usize,
        counters: &RxCounters,
        buffer: &mut BurstBuffer,
    ) -> Read {
        let (have, broken) = match ring.fetch(limit) {
            Ok(n) => (n.min(limit), None),
            Err(e) => (ring.stock().len().min(limit), Some(e)),
        };
        let stock = ring.stock();
        let (mut frames, mut taken, mut bytes, mut segments) = (0, 0, 0u64, 0);
        while taken < have {
            let chain = stock.get(taken);
            let (Some(frame), Some(head)) = (buffer.frames.get_mut(frames), buffer.heads.get_mut(frames))
            else {
                break;
            };
            // One buffer that holds header and frame is what DPDK guests send always, and Linux guests for small frames.
            let read = if chain.more == 0 && chain.len as usize >= header + MIN_FRAME as usize {
                Self::read_single(chain, header, frame, &mut head.0)
            } else {
                let room = &mut buffer.segments[..];
                match Self::read_chain(stock, chain, header, frame, &mut head.0, room, segments) {
                    Some(read) => read,
                    // The burst's table of segments is full: the rest comes with the next burst.
                    None => break,
                }
            };
            taken += 1;
            match read.and_then(|()| frame.check()) {
                Ok(()) => {
                    bytes += u64::from(frame.len);
                    segments += usize::from(frame.more);
                    frames += 1;
                }
                Err(reason) => counters.drops.add(reason, 1),
            }
        }
        if taken > 0 {
            counters.received.add(taken as u64);
            counters.bytes.add(bytes);
            counters.bursts.add(1);
        }
        Read { taken, frames, broken }
    }

    /// A chain of one buffer that is long enough.
    #[inline(always)]
    fn read_single(
        chain: &Chain,
        header: usize,
        frame: &mut Frame,
        head: &mut [u8; HEAD],
    ) -> Result<(), DropReason> {
        let len = chain.len - header as u32;
        // SAFETY: the chain's `len` bytes at `ptr` are in guest memory (checked at fetch) and hold header and frame.
        let (low, csum_offset) = unsafe {
            let ptr = chain.ptr.wrapping_add(header);
            read_head(head, ptr, len as usize);
            read_net_header(chain.ptr)
        };
        *frame = Frame {
            ptr: chain.ptr.wrapping_add(header),
            first_len: len,
            len,
            more_at: 0,
            more: 0,
            offload: Offload { low, csum_offset },
        };
        Ok(())
    }

    /// A chain of any shape: the header may be split over several buffers, and so may the frame's first bytes.
    #[cold]
    #[inline(never)]
    fn read_chain(
        stock: &Stock,
        chain: &Chain,
        header: usize,
        frame: &mut Frame,
        head: &mut [u8; HEAD],
        table: &mut [Segment],
        used: usize,
    ) -> Option<Result<(), DropReason>> {
        // Nothing usable, or no room for the header (CVE-2022-2132): there is no frame.
        if chain.total as usize <= header {
            let reason = if chain.total as usize == header { DropReason::Runt } else { DropReason::BadChain };
            return Some(Err(reason));
        }
        if used + usize::from(chain.more) > table.len().min(MAX_SEGMENTS) {
            return None;
        }
        let first = Buffer { ptr: chain.ptr, len: chain.len };
        let mut net_header = [0u8; 12];
        let (mut skip, mut copied, mut in_head) = (header, 0, 0);
        let len = chain.total - header as u32;
        *frame = Frame { len, more_at: used as u16, ..Frame::EMPTY };
        *head = [0; HEAD];
        for buffer in std::iter::once(&first).chain(stock.more(chain)) {
            let (mut ptr, mut left) = (buffer.ptr, buffer.len as usize);
            if skip > 0 {
                let n = skip.min(left);
                // SAFETY: `n` bytes at `ptr` are in guest memory; `copied + n <= header <= 12`.
                unsafe { copy(net_header.as_mut_ptr().add(copied), ptr, n) };
                (skip, copied, left) = (skip - n, copied + n, left - n);
                ptr = ptr.wrapping_add(n);
            }
            if left == 0 {
                continue;
            }
            let n = left.min(HEAD - in_head);
            // SAFETY: `n` bytes at `ptr` are in guest memory; `in_head + n <= HEAD`.
            unsafe { copy(head.as_mut_ptr().add(in_head), ptr, n) };
            in_head += n;
            if frame.ptr.is_null() {
                (frame.ptr, frame.first_len) = (ptr, left as u32);
            } else if let Some(slot) = table.get_mut(used + usize::from(frame.more)) {
                *slot = Segment { ptr, len: left as u32 };
                frame.more += 1;
            }
        }
        let [b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, ..] = net_header;
        frame.offload = Offload {
            low: u64::from_le_bytes([b0, b1, b2, b3, b4, b5, b6, b7]),
            csum_offset: u16::from_le_bytes([b8, b9]),
        };
        Some(Ok(()))
    }
}

impl Release for RxRing<'_> {
    #[inline(always)]
    fn release(&mut self) {
        let taken = std::mem::take(&mut self.taken);
        let wanted = with_ring!(&mut self.running.ring, r => {
            r.use_read(taken);
            r.make_visible();
            full_fence();
            r.notification_wanted()
        });
        if wanted {
            self.running.signal();
        }
    }

    #[inline(always)]
    fn dropped(&mut self, set: FrameSet, reason: DropReason) {
        self.counters.drops.add(reason, set.len() as u64);
    }
}

// The head that a frame is judged by is exactly what `Head` holds.
const _: () = assert!(size_of::<Head>() == HEAD);
