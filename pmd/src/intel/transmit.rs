//! The transmit queue: frames of a burst become descriptors.
//!
//! A frame that lies in a buffer of the same arena (it came in by another card) is not copied: its buffer is taken out of the
//! burst and goes home when the device has sent it. Every other frame is copied once. Never blocks, never allocates, reads no
//! register.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use port::{Burst, DropReason, Frame, FrameSet, Gso, Head, Offload, Scratch, TagEdit, TxQueue};

use super::Card;
use super::core::Core;
use super::descriptors::{Ask, Checksum, Descriptor, LAST, REPORT, SENT};
use crate::access::PciDevice;
use crate::dma::{BUFFER, Chain, Pool};
use crate::nic::{MOST_BUFFERS, Plan, TransmitCounters, TransmitQueue, Writer, pieces};

/// A transmit queue of a device. One thread uses it at a time.
pub struct Transmit<D: PciDevice, C: Card> {
    ring: *mut Descriptor,
    queue: u32,
    mask: u32,
    /// The next descriptor to write; counts on without wrapping to the ring.
    next: u32,
    /// The oldest descriptor that the device may still use.
    oldest: u32,
    /// Descriptors that the device reports on, oldest first, and the buffers of those up to there: `first_mark` up to
    /// `next_mark`, which count on too.
    marks: Box<[(u32, Chain)]>,
    first_mark: u32,
    next_mark: u32,
    /// What the device was told last, of frames that it has to finish.
    context: Option<[u64; 2]>,
    /// Descriptors were written that the device was not told of.
    unannounced: bool,
    /// Longest frame in bytes, without FCS.
    max: u32,
    /// Buffers of the descriptors written since the last mark.
    chain: Chain,
    pool: Pool,
    core: Arc<Core<D, C>>,
    counters: Arc<TransmitCounters>,
}

// SAFETY: as for `Receive`.
unsafe impl<D: PciDevice, C: Card> Send for Transmit<D, C> {}

impl<D: PciDevice, C: Card> Transmit<D, C> {
    /// Ring `ring`, which is queue `queue` of the device; frames of `max` bytes at most, without FCS, which are copied into buffers of `pool`.
    pub(crate) fn new(
        core: Arc<Core<D, C>>,
        (ring, queue): (u32, u32),
        size: u32,
        max: u32,
        pool: Pool,
    ) -> Self {
        Self {
            ring: core.transmit_ring(ring).cast(),
            queue,
            mask: size - 1,
            next: 0,
            oldest: 0,
            marks: vec![(0, Chain::EMPTY); size as usize].into(),
            first_mark: 0,
            next_mark: 0,
            context: None,
            unannounced: false,
            max,
            chain: Chain::EMPTY,
            pool,
            core,
            counters: Arc::default(),
        }
    }

    /// Descriptors that can be written now. One stays free: head equal to tail means that there is none.
    #[inline(always)]
    fn free(&self) -> u32 {
        self.mask - self.next.wrapping_sub(self.oldest)
    }

    /// Writes the next descriptor.
    fn write(&mut self, address: u64, flags: u64) {
        // SAFETY: the place is inside the ring by the mask; `core` keeps the ring's memory.
        unsafe { Self::write_at(self.ring.add((self.next & self.mask) as usize), address, flags) };
        self.next = self.next.wrapping_add(1);
    }

    /// Writes a descriptor.
    ///
    /// # Safety
    /// `descriptor` is one of the ring's; the device does not have it, and was not told of it yet.
    #[inline(always)]
    unsafe fn write_at(descriptor: *mut Descriptor, address: u64, flags: u64) {
        // SAFETY: the caller's promise.
        unsafe {
            (&raw mut (*descriptor).0[0]).write_volatile(address.to_le());
            (&raw mut (*descriptor).0[1]).write_volatile(flags.to_le());
        }
    }

    /// Asks for a report on the descriptor written last, if there is one since the last report.
    #[inline(always)]
    fn mark(&mut self) {
        let at = self.next.wrapping_sub(1);
        // SAFETY: as in `write`: the device was not told of this descriptor yet.
        unsafe {
            let word = &raw mut (*self.ring.add((at & self.mask) as usize)).0[1];
            word.write_volatile(word.read_volatile() | REPORT.to_le());
        }
        // There are as many places as descriptors, and a mark stands for at least one.
        if let Some(mark) = self.marks.get_mut((self.next_mark & self.mask) as usize) {
            *mark = (at, std::mem::replace(&mut self.chain, Chain::EMPTY));
            self.next_mark = self.next_mark.wrapping_add(1);
        }
    }

    /// Takes buffer `index` until the device has sent it; false if it is nobody's to take.
    fn take(&mut self, index: u32) -> bool {
        let arena = self.pool.arena().clone();
        let view = arena.view();
        // An empty chain may have been begun for a frame that was refused then.
        if !self.chain.is_empty() && self.chain.add(view, index) {
            return true;
        }
        // Each mark is for buffers of one pool.
        if !view.is_held(index) {
            return false;
        }
        if !self.chain.is_empty() {
            self.mark();
        }
        self.chain = Chain::beginning_with(view, index);
        self.chain.add(view, index)
    }

    /// Takes back what the device has sent, and lets its buffers go home.
    #[inline(always)]
    fn reclaim(&mut self) {
        while self.first_mark != self.next_mark {
            let Some((at, chain)) = self.marks.get((self.first_mark & self.mask) as usize) else { break };
            // SAFETY: inside the ring by the mask; the device may write at any time: volatile. Whatever it says, only
            // descriptors that were written are taken back.
            let word =
                unsafe { (&raw const (*self.ring.add((at & self.mask) as usize)).0[1]).read_volatile() };
            if u64::from_le(word) & SENT == 0 {
                break;
            }
            chain.go_home(self.pool.arena().view());
            self.oldest = at.wrapping_add(1);
            self.first_mark = self.first_mark.wrapping_add(1);
        }
    }

    /// A frame that needs more than one descriptor for one buffer; its length as sent.
    #[cold]
    #[inline(never)]
    fn send_any(
        &mut self,
        burst: &Burst<'_>,
        frame: &Frame,
        head: &Head,
        edit: TagEdit,
    ) -> Result<u32, DropReason> {
        // The device inserts tags only where it takes them off too (CTRL.VME), and by itself, behind the checksum's offsets.
        let plan = Plan::new(frame, edit, self.max, self.core.strips_tags())?;
        let Ask { flags, context } = C::ask(checksum_of(plan.offload)?, plan.inserts, head)?;
        let told = context.is_none() || context == self.context;
        let context_descriptors = u32::from(!told);

        let arena = self.pool.arena().clone();
        let view = arena.view();
        let ours = |ptr: *const u8| view.buffer_of(ptr).filter(|&index| view.is_held(index));
        let uncopied = plan.edit == TagEdit::Keep
            && frame.more < MOST_BUFFERS as u16
            && pieces(burst, frame).all(|(ptr, _)| ours(ptr).is_some());
        let total = plan.len(frame);
        let descriptors = if uncopied { u32::from(frame.more) + 1 } else { total.div_ceil(BUFFER) };
        if descriptors > MOST_BUFFERS {
            return Err(DropReason::Oversize);
        }
        if self.free() < descriptors + context_descriptors {
            self.reclaim();
            if self.free() < descriptors + context_descriptors {
                return Err(DropReason::ReceiverFull);
            }
        }
        if uncopied {
            self.tell(context, told);
            for (i, (ptr, len)) in pieces(burst, frame).enumerate() {
                let Some(index) = ours(ptr) else { break };
                self.take(index);
                let ends = if i == usize::from(frame.more) { LAST } else { 0 };
                self.write(view.iova_of(ptr), C::data(len, total, flags | ends));
            }
            self.counters.uncopied.add(1);
            return Ok(total);
        }

        let mut writer = Writer::new(&mut self.pool, descriptors).ok_or(DropReason::ReceiverFull)?;
        writer.frame(burst, frame, head, plan.edit);
        let (buffers, total) = writer.finish();
        self.tell(context, told);
        let mut left = total;
        for &index in buffers.get(..descriptors as usize).unwrap_or_default() {
            let len = left.min(BUFFER);
            left -= len;
            self.take(index);
            let ends = if left == 0 { LAST } else { 0 };
            self.write(view.iova(index), C::data(len, total, flags | ends));
        }
        Ok(total)
    }

    /// Tells the device what the next frame needs, unless it knows.
    fn tell(&mut self, context: Option<[u64; 2]>, told: bool) {
        if let (Some([low, high]), false) = (context, told) {
            self.write(low, high);
            self.context = context;
        }
    }
}

/// Where a checksum begins and where it goes, if one is to be calculated.
fn checksum_of(offload: Offload) -> Result<Option<Checksum>, DropReason> {
    if offload.is_none() {
        return Ok(None);
    }
    // Segmentation is left to whoever has the frame: the device would need its headers rewritten for it.
    if offload.gso() != Ok(Gso::None) {
        return Err(DropReason::CannotFinish);
    }
    let at = offload.csum_start().checked_add(offload.csum_offset);
    match (u8::try_from(offload.csum_start()), at.map(u8::try_from)) {
        (Ok(start), Some(Ok(at))) => Ok(Some(Checksum { start, at })),
        _ => Err(DropReason::CannotFinish),
    }
}

impl<D: PciDevice, C: Card> TxQueue for Transmit<D, C> {
    #[inline(always)]
    fn prepare(&mut self, frames: usize) {
        if (self.free() as usize) < frames {
            self.reclaim();
        }
    }

    #[inline(always)]
    fn send(&mut self, burst: &Burst<'_>, set: FrameSet, edit: TagEdit, _: &mut Scratch) {
        self.counters.offered.add(set.len() as u64);
        if !self.core.state.is_up() {
            self.counters.drops.add(DropReason::PortDown, set.len() as u64);
            return;
        }
        if (self.free() as usize) < 2 * set.len() {
            self.reclaim();
        }
        let (frames, heads) = (burst.frames(), burst.heads());
        let before = self.next;
        let mut bytes = 0u32;
        // SAFETY: `pool` keeps the arena, and `self` keeps `pool`.
        let view = unsafe { &*Arc::as_ptr(self.pool.arena()) }.view();
        let ring = self.ring;
        let set = FrameSet(set.0 & burst.all().0);
        // A frame that lies in the arena takes one descriptor, and there is no more to it; as long as there is room for all.
        let longest = if edit == TagEdit::Keep && self.free() as usize >= set.len() { self.max } else { 0 };
        // Most sets are all of a burst, or one run of it.
        let start = (set.0.trailing_zeros() as usize).min(frames.len());
        let run = (!(set.0 >> (start & 63))).trailing_zeros() as usize;
        let lined_up = frames.get(start..).unwrap_or_default();
        let (mut next, mut chain) = (self.next, Chain::EMPTY);
        if let Some(index) = lined_up.first().and_then(|frame| view.buffer_of(frame.ptr)) {
            chain = Chain::beginning_with(view, index);
        }
        let mut frame = lined_up.as_ptr();
        // Up to the end of the ring: what is left goes the other way, once in many bursts.
        let place = (next & self.mask) as usize;
        let to_end = (self.mask + 1) as usize - place;
        let end = frame.wrapping_add(run.min(lined_up.len()).min(to_end));
        let mut descriptor = ring.wrapping_add(place);
        while frame != end {
            // SAFETY: between the first of the frames and their end.
            let Frame { ptr, len, more, offload, .. } = unsafe { *frame };
            if len > longest || more != 0 || !offload.is_none() || !chain.add_buffer_of(view, ptr) {
                break;
            }
            // SAFETY: as in `write`.
            unsafe { Self::write_at(descriptor, view.iova_of(ptr), C::data(len, len, LAST)) };
            (frame, descriptor) = (frame.wrapping_add(1), descriptor.wrapping_add(1));
            bytes += len;
        }
        // SAFETY: both point into the frames of the burst.
        let done = unsafe { frame.offset_from_unsigned(lined_up.as_ptr()) };
        next = next.wrapping_add(done as u32);
        let rest = set.without(FrameSet::first(start + done));
        let mut bytes = u64::from(bytes);
        let mut sent = u64::from(next.wrapping_sub(before));
        let uncopied = sent;
        (self.next, self.chain) = (next, chain);
        // Whatever else there is.
        for i in rest {
            let (Some(frame), Some(head)) = (frames.get(i), heads.get(i)) else { break };
            match self.send_any(burst, frame, head, edit) {
                Ok(len) => {
                    sent += 1;
                    bytes += u64::from(len);
                }
                Err(reason) => self.counters.drops.add(reason, 1),
            }
        }
        let next = self.next;
        if next != before {
            self.mark();
            self.unannounced = true;
            self.counters.sent.add(sent);
            self.counters.uncopied.add(uncopied);
            self.counters.bytes.add(bytes);
        }
    }

    #[inline(always)]
    fn notify(&mut self) {
        if std::mem::take(&mut self.unannounced) {
            fence(Ordering::Release);
            self.core.regs().write_number(C::transmit_tail(self.queue), self.next & self.mask);
        }
    }
}

impl<D: PciDevice, C: Card> TransmitQueue for Transmit<D, C> {
    fn counters(&self) -> Arc<TransmitCounters> {
        self.counters.clone()
    }
}

impl<D: PciDevice, C: Card> Drop for Transmit<D, C> {
    fn drop(&mut self) {
        // The device may read these buffers until it has stopped.
        self.core.stop();
        let view = self.pool.arena().view();
        while self.first_mark != self.next_mark {
            if let Some((_, chain)) = self.marks.get((self.first_mark & self.mask) as usize) {
                chain.go_home(view);
            }
            self.first_mark = self.first_mark.wrapping_add(1);
        }
        self.chain.go_home(view);
    }
}
