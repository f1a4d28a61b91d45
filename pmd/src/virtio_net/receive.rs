//! The receive queue: buffers that the device has used become frames of a burst.
//!
//! A buffer begins with room, then the header, then the frame, which stays where it is; a transmit queue of the same arena may take
//! the buffer out of the burst. What the device writes beside the ring (the header) is read once and judged. Never blocks, never
//! allocates, reads no register.

use std::collections::VecDeque;
use std::mem::ManuallyDrop;
use std::sync::Arc;

use port::{Burst, BurstBuffer, DropReason, Frame, FrameSet, MAX_BURST, Offload, Release, RxQueue, Segment};
use virtio::driver::{DriverRing, Single};
use virtio::memory::copy::{full_fence, read_head, read_net_header};
use virtio::net::HEADER_LEN;

use super::core::Core;
use super::pci::{Doorbell, Started};
use crate::access::{NarrowBar, PciDevice};
use crate::dma::{BUFFER, Pool, Stack};
use crate::nic::{DeviceError, MOST_BUFFERS, ReceiveCounters, ReceiveQueue};

/// Where the frame begins in its buffer, on a cache line; the header lies before it.
const FRAME_AT: u32 = 64;
const HEADER_AT: u32 = FRAME_AT - HEADER_LEN as u32;

/// Bytes that the device may write into a buffer: header and frame.
pub(super) const ROOM: u32 = BUFFER - HEADER_AT;

/// Buffers are given to the device when at least so many are missing: telling it costs as much as many frames.
const REFILL: u16 = 32;

/// The receive queue of a device. One thread polls it at a time.
pub struct Receive<D: PciDevice<Bar: NarrowBar>> {
    ring: ManuallyDrop<DriverRing>,
    number: u16,
    doorbell: Doorbell,
    vector: Option<u16>,
    /// Buffers that the device has used and that are in no frame yet, and the bytes that it wrote.
    used: VecDeque<(u32, u32)>,
    /// Buffers of the current burst.
    lent: Vec<u32>,
    /// What one of them is held under.
    mark: u32,
    mergeable: bool,
    /// Longest frame in bytes, without FCS.
    max: u32,
    pool: Pool,
    core: Arc<Core<D>>,
    counters: Arc<ReceiveCounters>,
}

impl<D: PciDevice<Bar: NarrowBar>> Receive<D> {
    pub(super) fn new(
        core: Arc<Core<D>>,
        ring: DriverRing,
        (number, Started { doorbell, vector }): (u16, Started),
        mergeable: bool,
        max: u32,
        mut pool: Pool,
    ) -> Self {
        let size = usize::from(ring.free());
        let mark = pool.parts().1.mark(0);
        Self {
            ring: ManuallyDrop::new(ring),
            number,
            doorbell,
            vector,
            used: VecDeque::with_capacity(size + MAX_BURST),
            lent: Vec::with_capacity(size + MAX_BURST),
            mark,
            mergeable,
            max,
            pool,
            core,
            counters: Arc::default(),
        }
    }

    /// Gives the device buffers for all that are missing.
    pub(super) fn refill(&mut self) {
        let wanted = usize::from(self.ring.free());
        let (arena, stack) = self.pool.parts();
        let offered = self.ring.offer(std::iter::from_fn(|| {
            let index = stack.take(arena, 0)?;
            Some(Single { address: arena.iova(index) + u64::from(HEADER_AT), len: ROOM, token: index })
        }));
        if offered < wanted {
            self.counters.starved.add(1);
        }
        if offered > 0 && self.ring.publish() {
            self.core.registers.ring(&self.doorbell, self.number);
        }
    }

    /// Takes back the buffers of the burst that nobody took out of it.
    fn take_back(&mut self) {
        let (arena, stack) = self.pool.parts();
        for index in self.lent.drain(..) {
            // SAFETY: a buffer of the arena. This queue has taken none since the burst began, so none was taken anew.
            if unsafe { Stack::holds(arena, index, self.mark) } {
                stack.put(arena, index);
            }
        }
    }

    /// Takes what the device has used.
    fn collect(&mut self) {
        let room = MAX_BURST.saturating_sub(self.used.len());
        let used = &mut self.used;
        if let Err(fault) = self.ring.reclaim(room, |index, len| used.push_back((index, len))) {
            self.core.state.fail(DeviceError::Ring(fault));
        }
    }

    /// The next frame, if all of its buffers are here: what it is, or why it is dropped.
    fn take(
        &mut self,
        head: &mut [u8; 64],
        table: &mut [Segment],
        table_used: usize,
    ) -> Option<Result<Frame, DropReason>> {
        let &(first, written) = self.used.front()?;
        let arena = self.pool.arena().view();
        let start = arena.ptr(first);
        // SAFETY: the header's 12 bytes lie inside the buffer, which the arena keeps mapped and which is aligned to 64; read once.
        let ((low, csum_offset), buffers) = unsafe {
            let header = start.wrapping_add(HEADER_AT as usize);
            let count = header.wrapping_add(10).cast::<u16>().read_volatile();
            (read_net_header(header), u16::from_le(count))
        };
        let count = if self.mergeable { u32::from(buffers) } else { 1 };
        if !(1..=MOST_BUFFERS).contains(&count) || written < HEADER_LEN as u32 {
            let what = format!("a frame of {count} buffers and {written} bytes in the first");
            self.core.state.fail(DeviceError::Broken { descriptor: first, what });
            return None;
        }
        if self.used.len() < count as usize {
            return None;
        }
        let first_len = written - HEADER_LEN as u32;
        let mut frame = Frame {
            ptr: start.wrapping_add(FRAME_AT as usize),
            first_len,
            len: first_len,
            more_at: table_used as u16,
            more: count as u16 - 1,
            offload: Offload { low, csum_offset },
        };
        let mut whole = first_len > 0;
        for (i, (index, len)) in self.used.drain(..count as usize).enumerate() {
            self.lent.push(index);
            if i > 0 {
                frame.len += len;
                whole &= len > 0;
                match table.get_mut(table_used + i - 1) {
                    // The buffers after the first have no header.
                    Some(piece) => {
                        *piece = Segment { ptr: arena.ptr(index).wrapping_add(HEADER_AT as usize), len };
                    }
                    None => whole = false,
                }
            }
        }
        if !whole {
            return Some(Err(DropReason::Runt));
        }
        if frame.len > self.max {
            return Some(Err(DropReason::Oversize));
        }
        if let Err(reason) = frame.check() {
            return Some(Err(reason));
        }
        // SAFETY: `first_len` bytes of the buffer (the ring checked what the device claims to have written).
        unsafe { read_head(head, frame.ptr, first_len.min(64) as usize) };
        let mut in_head = first_len.min(64) as usize;
        for piece in table.get(table_used..table_used + usize::from(frame.more)).unwrap_or_default() {
            let Some(rest) = head.get_mut(in_head..).filter(|rest| !rest.is_empty()) else { break };
            let n = rest.len().min(piece.len as usize);
            // SAFETY: as above, and `n` bytes in `rest`.
            unsafe { virtio::memory::copy::copy(rest.as_mut_ptr(), piece.ptr, n) };
            in_head += n;
        }
        Some(Ok(frame))
    }
}

impl<D: PciDevice<Bar: NarrowBar>> RxQueue for Receive<D> {
    fn peek(&mut self) -> usize {
        if !self.core.state.runs() {
            return 0;
        }
        self.collect();
        self.used.len()
    }

    fn poll<'q>(&'q mut self, buffer: &'q mut BurstBuffer) -> Burst<'q> {
        let (mut frames, mut segments) = (0, 0);
        if self.core.state.runs() {
            self.collect();
            let (mut received, mut bytes) = (0, 0);
            while let (Some(place), Some(head)) =
                (buffer.frames.get_mut(frames), buffer.heads.get_mut(frames))
            {
                match self.take(&mut head.0, &mut buffer.segments[..], segments) {
                    None => break,
                    Some(Ok(frame)) => {
                        segments += usize::from(frame.more);
                        bytes += u64::from(frame.len);
                        *place = frame;
                        frames += 1;
                    }
                    Some(Err(reason)) => self.counters.drops.add(reason, 1),
                }
                received += 1;
            }
            self.counters.frames.add(received);
            self.counters.bytes.add(bytes);
        }
        // A burst of nothing is not released, but what was dropped goes back, and so does what ran short.
        if frames == 0 && (!self.lent.is_empty() || self.ring.free() >= REFILL) && self.core.state.runs() {
            self.release();
        }
        Burst::new(self, buffer, frames)
    }
}

impl<D: PciDevice<Bar: NarrowBar>> Release for Receive<D> {
    fn release(&mut self) {
        self.take_back();
        if self.ring.free() >= REFILL {
            self.refill();
        }
        full_fence();
    }

    fn dropped(&mut self, set: FrameSet, reason: DropReason) {
        self.counters.drops.add(reason, set.len() as u64);
    }
}

impl<D: PciDevice<Bar: NarrowBar>> ReceiveQueue for Receive<D> {
    fn counters(&self) -> Arc<ReceiveCounters> {
        self.counters.clone()
    }

    fn tag(&self, _: usize) -> Option<u16> {
        None
    }

    fn vector(&self) -> Option<u16> {
        self.vector
    }

    fn arm(&mut self) -> bool {
        if !self.core.state.runs() || self.vector.is_none() || !self.used.is_empty() {
            return true;
        }
        let waits = self.ring.request_notification();
        if waits {
            self.disarm();
        }
        waits
    }

    fn disarm(&mut self) {
        self.ring.suppress_notifications();
    }
}

impl<D: PciDevice<Bar: NarrowBar>> Drop for Receive<D> {
    fn drop(&mut self) {
        // The device may write to these buffers until it has stopped.
        self.core.stop();
        self.take_back();
        let (arena, stack) = self.pool.parts();
        for (index, _) in self.used.drain(..) {
            stack.put(arena, index);
        }
        // SAFETY: it is not used after this.
        unsafe { ManuallyDrop::take(&mut self.ring) }.abandon(|index| stack.put(arena, index));
    }
}
