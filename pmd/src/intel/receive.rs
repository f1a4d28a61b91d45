//! The receive queue: descriptors that the device has filled become frames of a burst.
//!
//! Everything that the device writes is read once into a local and judged there. A frame stays in its buffer; a transmit queue
//! of the same arena may take the buffer out of the burst, then another one takes its place in the ring. Never blocks, never
//! allocates, reads no register.

mod slowly;

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use port::{Burst, BurstBuffer, DropReason, Frame, FrameSet, HEAD, MAX_BURST, Release, RxQueue};
use virtio::memory::copy::{copy_64, full_fence, prefetch_read};

use super::Card;
use super::core::Core;
use super::descriptors::{Descriptor, Received};
use crate::access::PciDevice;
use crate::dma::{BUFFER, Pool, Stack};
use crate::nic::{ReceiveCounters, ReceiveQueue};

/// Descriptors given to the device at a time: a register write costs as much as several frames.
const REFILL: u32 = 32;

/// The shortest frame that is handled without looking twice. A wire has none below 60 bytes.
const LEAST_SIMPLE: u32 = HEAD as u32 - 8;

/// No buffer in a place of the ring.
const NONE: u32 = u32::MAX;

/// The receive queue of a device. One thread polls it at a time.
pub struct Receive<D: PciDevice, C: Card> {
    ring: *mut Descriptor,
    queue: u32,
    mask: u32,
    /// The next descriptor to read; counts on without wrapping to the ring.
    next: u32,
    /// The first place whose descriptor has no buffer for the device: as far behind `next` as the ring is long, unless buffers
    /// run short.
    filled: u32,
    /// What the device was told (its tail, before it wraps).
    told: u32,
    /// Descriptors that the current burst has.
    taken: u32,
    /// Longest frame in bytes, without FCS; and of one in a single buffer, less LEAST_SIMPLE.
    max: u32,
    simple: u32,
    /// The buffer at each place of the ring.
    slots: Box<[u32]>,
    pool: Pool,
    core: Arc<Core<D, C>>,
    counters: Arc<ReceiveCounters>,
    /// Tags taken off the frames of the current burst.
    tags: Box<[Option<u16>; MAX_BURST]>,
}

// SAFETY: the ring is memory of the device's arena, which `core` keeps; it belongs to no thread, and `&mut self` is needed to
// touch it.
unsafe impl<D: PciDevice, C: Card> Send for Receive<D, C> {}

impl<D: PciDevice, C: Card> Receive<D, C> {
    /// Ring `ring`, which is queue `queue` of the device; frames of `max` bytes at most, without FCS, in buffers of `pool`.
    pub(crate) fn new(
        core: Arc<Core<D, C>>,
        (ring, queue): (u32, u32),
        size: u32,
        max: u32,
        pool: Pool,
    ) -> Self {
        Self {
            ring: core.receive_ring(ring).cast(),
            queue,
            mask: size - 1,
            next: 0,
            filled: 0,
            told: 0,
            taken: 0,
            max,
            simple: max.min(BUFFER) - LEAST_SIMPLE,
            slots: vec![NONE; size as usize].into(),
            pool,
            core,
            counters: Arc::default(),
            tags: Box::new([None; MAX_BURST]),
        }
    }

    /// The descriptor at `at`, as the device wrote it, read once.
    #[inline(always)]
    fn written(&self, at: u32) -> Received {
        // SAFETY: the place is inside the ring by the mask; `core` keeps the ring's memory.
        unsafe { Self::written_at(self.ring.add((at & self.mask) as usize)) }
    }

    /// # Safety
    /// `descriptor` is one of the ring's.
    #[inline(always)]
    unsafe fn written_at(descriptor: *const Descriptor) -> Received {
        // SAFETY: the caller's promise. The device may write at any time: volatile, and a single load for the whole word.
        let word = unsafe { (&raw const (*descriptor).0[1]).read_volatile() };
        // What lies behind the descriptor is read after it.
        fence(Ordering::Acquire);
        Received(u64::from_le(word))
    }

    #[inline(always)]
    fn slot(&self, at: u32) -> u32 {
        // The mask keeps it inside; the fallback is never taken.
        self.slots.get((at & self.mask) as usize).copied().unwrap_or(NONE)
    }

    /// Descriptors that the device has. One place is never its: head equal to tail means empty.
    #[inline(always)]
    fn posted(&self) -> u32 {
        self.filled.wrapping_sub(self.next).min(self.mask)
    }

    /// Whether there are places without buffers.
    #[inline(always)]
    fn is_short(&self) -> bool {
        self.filled.wrapping_sub(self.next) <= self.mask
    }

    /// Gives the device a buffer.
    ///
    /// # Safety
    /// `descriptor` is one of the ring's, and the device does not have it.
    #[inline(always)]
    unsafe fn place(descriptor: *mut Descriptor, address: u64) {
        // SAFETY: the caller's promise.
        unsafe {
            (&raw mut (*descriptor).0[0]).write_volatile(address.to_le());
            (&raw mut (*descriptor).0[1]).write_volatile(0);
        }
    }

    /// The burst ends, at `end`, while buffers are short: those that were taken out leave their places empty.
    #[cold]
    #[inline(never)]
    fn give_up_taken(&mut self, end: u32) {
        while self.next != end {
            let (arena, stack) = self.pool.parts();
            if let Some(slot) = self.slots.get_mut((self.next & self.mask) as usize)
                // SAFETY: a place that the device had has a buffer.
                && unsafe { !Stack::holds(arena, *slot, stack.mark(self.next & self.mask)) }
            {
                *slot = NONE;
            }
            self.next = self.next.wrapping_add(1);
        }
    }

    /// Finds buffers for the places that have none.
    #[cold]
    #[inline(never)]
    pub(crate) fn refill(&mut self) {
        let (arena, stack) = self.pool.parts();
        while self.filled.wrapping_sub(self.next) <= self.mask {
            let at = (self.filled & self.mask) as usize;
            let Some(slot) = self.slots.get_mut(at) else { break };
            if *slot == NONE {
                match stack.take(arena, self.filled & self.mask) {
                    Some(index) => *slot = index,
                    None => {
                        self.counters.starved.add(1);
                        break;
                    }
                }
            }
            // SAFETY: inside the ring by the mask; what is not filled is not the device's.
            unsafe { Self::place(self.ring.add(at), arena.iova(*slot)) };
            self.filled = self.filled.wrapping_add(1);
        }
        self.announce(1);
    }

    /// Tells the device of new buffers, if there are `least` of them.
    #[inline(always)]
    fn announce(&mut self, least: u32) {
        let tail = self.next.wrapping_add(self.posted());
        if tail.wrapping_sub(self.told) >= least {
            self.told = tail;
            fence(Ordering::Release);
            self.core.regs().write_number(C::receive_tail(self.queue), tail & self.mask);
        }
    }

    /// Fills `buffer` with frames; how many.
    #[inline(always)]
    fn read(&mut self, buffer: &mut BurstBuffer) -> usize {
        self.taken = 0;
        if !self.core.state.runs() {
            return 0;
        }
        let arena = self.pool.arena().view();
        let simple = self.simple;
        let (first, mut head) = (buffer.frames.as_mut_ptr(), buffer.heads.as_mut_ptr());
        let mut frame = first;
        let posted = self.next.wrapping_add(self.posted());
        let mut left = self.posted().min(MAX_BURST as u32);
        let mut bytes = 0u32;
        let mut place = (self.next & self.mask) as usize;
        // Up to the end of the ring, and on from its start.
        'burst: while left > 0 {
            let run = left.min(self.mask + 1 - place as u32);
            // SAFETY: ring and slots have `mask + 1` places.
            let (mut descriptor, mut slot) =
                unsafe { (self.ring.add(place), self.slots.as_ptr().add(place)) };
            let end = descriptor.wrapping_add(run as usize);
            while descriptor != end {
                // SAFETY: inside the ring, as `end` is its end at most.
                let (d, index) = unsafe { (Self::written_at(descriptor), *slot) };
                let len = d.len();
                let over = len.wrapping_sub(LEAST_SIMPLE);
                if d.0 & (Received::WHOLE_MASK | C::DAMAGED) != Received::WHOLE || over > simple {
                    break 'burst;
                }
                (descriptor, slot) = (descriptor.wrapping_add(1), slot.wrapping_add(1));
                bytes += len;
                let ptr = arena.ptr(index);
                // SAFETY: there are MAX_BURST places for frames and heads, and no more than that are filled (`left`). A buffer
                // has BUFFER bytes, more than a head, in the arena, which `pool` keeps.
                unsafe {
                    copy_64((&raw mut (*head).0).cast(), ptr);
                    clear_behind(&mut (*head).0, over);
                    let offload = d.offload_of_whole::<C>();
                    *frame = Frame { ptr, first_len: len, len, more_at: 0, more: 0, offload };
                    (frame, head) = (frame.add(1), head.add(1));
                }
            }
            (left, place) = (left - run, 0);
        }
        // SAFETY: both point into the same array.
        let whole = unsafe { frame.offset_from_unsigned(first) } as u32;
        let at = self.next.wrapping_add(whole);
        self.taken = whole;
        self.counters.bytes.add(bytes.into());
        self.counters.frames.add(whole.into());
        if self.core.strips_tags() {
            self.note_tags(whole);
        }
        // Whatever is not simply a frame, and all that follows it.
        if at != posted && (whole as usize) < MAX_BURST && self.written(at).done() {
            self.read_on(buffer)
        } else {
            whole as usize
        }
    }

    /// Notes the tags that were taken off the frames of the first `n` descriptors.
    #[cold]
    #[inline(never)]
    fn note_tags(&mut self, n: u32) {
        for i in 0..n {
            let tag = self.written(self.next.wrapping_add(i)).tag();
            if let Some(place) = self.tags.get_mut(i as usize) {
                *place = tag;
            }
        }
    }
}

/// Zeroes what lies behind the frame, whose length is LEAST_SIMPLE and `over` bytes.
#[inline(always)]
fn clear_behind(head: &mut [u8; HEAD], over: u32) {
    // Which bits of the head's last eight bytes are frame, when 0 to 7 or all of these bytes are. No branch: frames of 60 and of
    // 64 bytes come in any mixture.
    const KEEP: [u64; 9] = {
        let mut keep = [u64::MAX; 9];
        let mut bytes = 0;
        while bytes < 8 {
            keep[bytes] = (1 << (8 * bytes)) - 1;
            bytes += 1;
        }
        keep
    };
    if let (Some(keep), Some(last)) = (KEEP.get(over.min(8) as usize), head.last_chunk_mut::<8>()) {
        *last = (u64::from_le_bytes(*last) & keep).to_le_bytes();
    }
}

impl<D: PciDevice, C: Card> RxQueue for Receive<D, C> {
    #[inline(always)]
    fn peek(&mut self) -> usize {
        if self.is_short() {
            self.refill();
        }
        let posted = self.posted();
        if !self.core.state.runs() || posted == 0 {
            return 0;
        }
        // The device writes descriptors back in order: a few looks tell about how many.
        for waiting in [32, 8, 1] {
            if waiting <= posted && self.written(self.next.wrapping_add(waiting - 1)).done() {
                prefetch_read(self.pool.arena().view().ptr(self.slot(self.next)));
                return waiting as usize;
            }
        }
        0
    }

    #[inline(always)]
    fn poll<'q>(&'q mut self, buffer: &'q mut BurstBuffer) -> Burst<'q> {
        if self.is_short() {
            self.refill();
        }
        let frames = self.read(buffer);
        if frames == 0 && self.taken > 0 {
            self.release();
        }
        Burst::new(self, buffer, frames)
    }
}

impl<D: PciDevice, C: Card> Release for Receive<D, C> {
    #[inline(always)]
    fn release(&mut self) {
        let end = self.next.wrapping_add(std::mem::take(&mut self.taken));
        if self.is_short() {
            self.give_up_taken(end);
            self.refill();
        } else {
            // Each place gets a buffer again: its own, if that is still here.
            let (arena, pool) = self.pool.parts();
            let mut stack = *pool;
            let mut next = self.next;
            while next != end {
                let place = next & self.mask;
                let run = end.wrapping_sub(next).min(self.mask + 1 - place);
                // SAFETY: ring and slots have `mask + 1` places.
                let (mut descriptor, first) =
                    unsafe { (self.ring.add(place as usize), self.slots.as_mut_ptr().add(place as usize)) };
                let (mut slot, last) = (first, first.wrapping_add(run as usize));
                let mut mark = stack.mark(place);
                while slot != last {
                    // SAFETY: as above, `run` places on at most; each has a buffer.
                    unsafe {
                        let mut index = *slot;
                        if !Stack::holds(arena, index, mark) {
                            let Some(other) = stack.take_as(arena, mark) else { break };
                            index = other;
                            *slot = index;
                        }
                        Self::place(descriptor, arena.iova(index));
                        (descriptor, slot) = (descriptor.add(1), slot.add(1));
                    }
                    mark += 1;
                }
                // SAFETY: both point into the slots.
                next = next.wrapping_add(unsafe { slot.offset_from_unsigned(first) } as u32);
                if slot != last {
                    stack = stack.collected(arena);
                    if stack.is_empty() {
                        break;
                    }
                }
            }
            *pool = stack;
            self.filled = next.wrapping_add(self.mask + 1);
            self.next = next;
            if next == end {
                self.announce(REFILL);
            } else {
                self.give_up_taken(end);
                self.refill();
            }
        }
        full_fence();
    }

    #[inline(always)]
    fn dropped(&mut self, set: FrameSet, reason: DropReason) {
        self.counters.drops.add(reason, set.len() as u64);
    }
}

impl<D: PciDevice, C: Card> ReceiveQueue for Receive<D, C> {
    fn counters(&self) -> Arc<ReceiveCounters> {
        self.counters.clone()
    }

    fn tag(&self, i: usize) -> Option<u16> {
        self.tags.get(i).copied().flatten()
    }

    fn vector(&self) -> Option<u16> {
        Some(C::vector(self.queue))
    }

    fn arm(&mut self) -> bool {
        if !self.core.state.runs() {
            return true;
        }
        C::arm(self.core.regs(), self.queue);
        // Who was told of a frame before may have been told of this one: it is in the ring by now.
        let waits = self.peek() > 0;
        if waits {
            self.disarm();
        }
        waits
    }

    fn disarm(&mut self) {
        C::disarm(self.core.regs(), self.queue);
    }
}

impl<D: PciDevice, C: Card> Drop for Receive<D, C> {
    fn drop(&mut self) {
        // The device may write to these buffers until it has stopped.
        self.core.stop();
        for slot in self.slots.iter_mut().filter(|slot| **slot != NONE) {
            self.pool.put(std::mem::replace(slot, NONE));
        }
    }
}
