//! The receive queue: descriptors that the device has filled become frames of a burst.
//!
//! Everything that the device writes is read once into a local and judged there. A frame stays in its buffer; a transmit queue
//! of the same arena may take the buffer out of the burst, then another one takes its place in the ring. Never blocks, never
//! allocates, reads no register.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use port::{Burst, BurstBuffer, DropReason, Frame, FrameSet, MAX_BURST, Offload, Release, RxQueue, Segment};
use virtio::memory::copy::{full_fence, prefetch_read, read_head};

use super::counters::ReceiveCounters;
use super::descriptors::{Descriptor, Received};
use super::device::Core;
use super::error::DeviceError;
use super::regs::RDT;
use super::{MAX_DESCRIPTORS, MIN_FRAME, QUEUE};
use crate::access::PciDevice;
use crate::dma::{BUFFER, Pool};

/// Descriptors given to the device at a time: a register write costs as much as several frames.
const REFILL: u32 = 32;

/// No buffer in a place of the ring.
const NONE: u32 = u32::MAX;

/// The receive queue of a device. One thread polls it at a time.
pub struct Receive<D: PciDevice> {
    ring: *mut Descriptor,
    mask: u32,
    /// The next descriptor to read; counts on without wrapping to the ring.
    next: u32,
    /// The next descriptor to give to the device.
    tail: u32,
    /// Descriptors that the current burst has.
    taken: u32,
    /// Longest frame in bytes, without FCS.
    max: u32,
    /// The buffer at each place of the ring.
    slots: Box<[u32]>,
    pool: Pool,
    core: Arc<Core<D>>,
    counters: Arc<ReceiveCounters>,
    /// Tags taken off the frames of the current burst.
    tags: Box<[Option<u16>; MAX_BURST]>,
}

// SAFETY: the ring is memory of the device's arena, which `core` keeps; it belongs to no thread, and `&mut self` is needed to
// touch it.
unsafe impl<D: PciDevice> Send for Receive<D> {}

/// What descriptors hold that are not simply a frame.
enum Odd {
    /// The end of the frame has not come yet.
    Wait,
    /// No frame, in so many descriptors.
    Drop(DropReason, u32),
    /// A frame, in so many descriptors.
    Frame(u32),
}

impl<D: PciDevice> Receive<D> {
    pub(super) fn new(core: Arc<Core<D>>, size: u32, max: u32, pool: Pool) -> Self {
        let mut queue = Self {
            ring: core.receive_ring().cast(),
            mask: size - 1,
            next: 0,
            tail: 0,
            taken: 0,
            max,
            slots: vec![NONE; size as usize].into(),
            pool,
            core,
            counters: Arc::default(),
            tags: Box::new([None; MAX_BURST]),
        };
        queue.refill();
        queue
    }

    /// What it counts.
    pub fn counters(&self) -> Arc<ReceiveCounters> {
        self.counters.clone()
    }

    /// The VLAN tag that the device took off frame `i` of the burst polled last, where it does that.
    pub fn tag(&self, i: usize) -> Option<u16> {
        self.tags.get(i).copied().flatten()
    }

    /// The descriptor at `at`, as the device wrote it, read once.
    #[inline(always)]
    fn written(&self, at: u32) -> Received {
        // SAFETY: the place is inside the ring by the mask; `core` keeps the ring's memory; the device may write at any time:
        // volatile, and a single load for the whole word.
        let word = unsafe { (&raw const (*self.ring.add((at & self.mask) as usize)).0[1]).read_volatile() };
        Received(u64::from_le(word))
    }

    #[inline(always)]
    fn slot(&self, at: u32) -> u32 {
        // The mask keeps it inside; the fallback is never taken.
        self.slots.get((at & self.mask) as usize).copied().unwrap_or(NONE)
    }

    /// Gives the device buffers in all places of the ring that have none. One place stays free: head equal to tail means empty.
    fn refill(&mut self) {
        let before = self.tail;
        let arena = self.pool.arena().clone();
        while self.tail.wrapping_sub(self.next) < self.mask {
            let Some(slot) = self.slots.get_mut((self.tail & self.mask) as usize) else { break };
            if *slot == NONE {
                match self.pool.take() {
                    Some(index) => *slot = index,
                    None => {
                        self.counters.starved.add(1);
                        break;
                    }
                }
            }
            let address = arena.iova(*slot).to_le();
            // SAFETY: as in `written`; the device does not have this descriptor.
            unsafe {
                let descriptor = self.ring.add((self.tail & self.mask) as usize);
                (&raw mut (*descriptor).0[0]).write_volatile(address);
                (&raw mut (*descriptor).0[1]).write_volatile(0);
            }
            self.tail = self.tail.wrapping_add(1);
        }
        if self.tail != before {
            fence(Ordering::Release);
            self.core.regs().write_number(RDT(QUEUE), self.tail & self.mask);
        }
    }

    /// Refills where enough places are free.
    #[inline(always)]
    fn feed(&mut self) {
        if self.mask - self.tail.wrapping_sub(self.next) >= REFILL {
            self.refill();
        }
    }

    /// Fills `buffer` with frames; how many.
    #[inline(always)]
    fn read(&mut self, buffer: &mut BurstBuffer) -> usize {
        let posted = self.tail.wrapping_sub(self.next);
        let (mut frames, mut taken, mut dropped, mut bytes, mut segments) = (0, 0, 0, 0, 0);
        let strips = self.core.strips_tags();
        while taken < posted && self.core.runs() {
            let (Some(frame), Some(head)) = (buffer.frames.get_mut(frames), buffer.heads.get_mut(frames))
            else {
                break;
            };
            let at = self.next.wrapping_add(taken);
            let d = self.written(at);
            if !d.done() {
                break;
            }
            // What lies behind the descriptor is read after it.
            fence(Ordering::Acquire);
            let len = d.len();
            let simple = d.0 & Received::WHOLE_MASK == Received::WHOLE;
            if simple && len.wrapping_sub(MIN_FRAME) <= self.max.min(BUFFER) - MIN_FRAME {
                let ptr = self.pool.arena().ptr(self.slot(at));
                // SAFETY: `len` bytes of the buffer, at most BUFFER (checked), in the arena, which `pool` keeps.
                unsafe { read_head(&mut head.0, ptr, len as usize) };
                let offload = Self::offload(d);
                *frame = Frame { ptr, first_len: len, len, more_at: 0, more: 0, offload };
                taken += 1;
            } else {
                match self.read_odd(
                    at,
                    posted - taken,
                    frame,
                    &mut head.0,
                    &mut buffer.segments[..],
                    segments,
                ) {
                    Odd::Wait => break,
                    Odd::Frame(n) => taken += n,
                    Odd::Drop(reason, n) => {
                        self.counters.drops.add(reason, 1);
                        taken += n;
                        dropped += 1;
                        continue;
                    }
                }
                segments += usize::from(frame.more);
            }
            if strips && let Some(tag) = self.tags.get_mut(frames) {
                *tag = d.tag();
            }
            bytes += u64::from(frame.len);
            frames += 1;
        }
        self.taken = taken;
        if taken > 0 {
            self.counters.frames.add(frames as u64 + dropped);
            self.counters.bytes.add(bytes);
        }
        frames
    }

    #[inline(always)]
    fn offload(d: Received) -> Offload {
        let low = if d.checksum_good() { u64::from(Offload::DATA_VALID) } else { 0 };
        Offload { low, csum_offset: 0 }
    }

    /// Frames over several descriptors, damaged ones, and what no device should write. At most `posted` descriptors are its.
    #[cold]
    #[inline(never)]
    fn read_odd(
        &mut self,
        at: u32,
        posted: u32,
        frame: &mut Frame,
        head: &mut [u8; 64],
        table: &mut [Segment],
        used: usize,
    ) -> Odd {
        let mut found = [(0u32, 0u32); MAX_DESCRIPTORS as usize];
        let (mut total, mut count) = (0, 0);
        let last = loop {
            if count == posted {
                return Odd::Wait;
            }
            let here = at.wrapping_add(count);
            let d = self.written(here);
            if !d.done() {
                return Odd::Wait;
            }
            fence(Ordering::Acquire);
            let Some(place) = found.get_mut(count as usize) else {
                return self
                    .broken(here, format!("a frame does not end after {MAX_DESCRIPTORS} descriptors"));
            };
            let len = d.len();
            if len == 0 || len > BUFFER {
                return self.broken(here, format!("{len} bytes in a buffer of {BUFFER}"));
            }
            *place = (self.slot(here), len);
            total += len;
            count += 1;
            if d.ends() {
                break d;
            }
        };
        for (bit, counter) in self.counters.errors.iter().enumerate() {
            counter.add(u64::from(last.errors() >> bit & 1));
        }
        let found = found.get(..count as usize).unwrap_or_default();
        if last.damaged() {
            return Odd::Drop(DropReason::Damaged, count);
        }
        if total < MIN_FRAME {
            return Odd::Drop(DropReason::Runt, count);
        }
        if total > self.max {
            return Odd::Drop(DropReason::Oversize, count);
        }
        let Some(room) = table.get_mut(used..used + found.len() - 1) else { return Odd::Wait };
        let arena = self.pool.arena();
        let (mut in_head, mut pieces) = (0, room.iter_mut());
        *head = [0; 64];
        for (i, &(index, len)) in found.iter().enumerate() {
            let ptr = arena.ptr(index);
            if let Some(rest) = head.get_mut(in_head..) {
                let n = rest.len().min(len as usize);
                // SAFETY: `n` bytes of the buffer (`len` was checked), and as many in `rest`.
                unsafe { virtio::memory::copy::copy(rest.as_mut_ptr(), ptr, n) };
                in_head += n;
            }
            if i == 0 {
                let offload = Self::offload(last);
                let more = found.len() as u16 - 1;
                *frame = Frame { ptr, first_len: len, len: total, more_at: used as u16, more, offload };
            } else if let Some(piece) = pieces.next() {
                *piece = Segment { ptr, len };
            }
        }
        Odd::Frame(count)
    }

    /// The device wrote what it cannot mean: the port stops. The frame at hand is not counted as received.
    fn broken(&mut self, at: u32, what: String) -> Odd {
        self.core.fail(DeviceError::Broken { descriptor: at & self.mask, what });
        Odd::Wait
    }
}

impl<D: PciDevice> RxQueue for Receive<D> {
    #[inline(always)]
    fn peek(&mut self) -> usize {
        self.feed();
        let posted = self.tail.wrapping_sub(self.next).min(MAX_BURST as u32);
        let mut waiting = 0;
        while waiting < posted && self.core.runs() {
            let at = self.next.wrapping_add(waiting);
            if !self.written(at).done() {
                break;
            }
            prefetch_read(self.pool.arena().ptr(self.slot(at)));
            waiting += 1;
        }
        waiting as usize
    }

    #[inline(always)]
    fn poll<'q>(&'q mut self, buffer: &'q mut BurstBuffer) -> Burst<'q> {
        self.feed();
        let frames = self.read(buffer);
        if frames == 0 && self.taken > 0 {
            self.release();
        }
        Burst::new(self, buffer, frames)
    }
}

impl<D: PciDevice> Release for Receive<D> {
    #[inline(always)]
    fn release(&mut self) {
        let end = self.next.wrapping_add(std::mem::take(&mut self.taken));
        let arena = self.pool.arena();
        while self.next != end {
            if let Some(slot) = self.slots.get_mut((self.next & self.mask) as usize)
                && arena.was_taken_out(*slot)
            {
                *slot = NONE;
            }
            self.next = self.next.wrapping_add(1);
        }
        self.feed();
        full_fence();
    }

    #[inline(always)]
    fn dropped(&mut self, set: FrameSet, reason: DropReason) {
        self.counters.drops.add(reason, set.len() as u64);
    }
}

impl<D: PciDevice> Drop for Receive<D> {
    fn drop(&mut self) {
        // The device may write to these buffers until it has stopped.
        self.core.stop();
        for slot in self.slots.iter_mut().filter(|slot| **slot != NONE) {
            self.pool.put(std::mem::replace(slot, NONE));
        }
    }
}
