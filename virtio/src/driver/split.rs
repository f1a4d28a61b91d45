//! The driver side of a split virtqueue (virtio 1.3, section 2.7).
//!
//! Owns the shadow of the avail and used indices and the table of what the device has. With IN_ORDER descriptors are taken
//! around the table and come back in that order; without, they come from a free list kept in private memory.

use std::any::Any;
use std::sync::Arc;

#[cfg(loom)]
use loom::sync::atomic::Ordering;
#[cfg(not(loom))]
use std::sync::atomic::Ordering;

use super::area::{Area, full_fence};
use super::{Batch, DriverFault, INDIRECT, NEXT, OfferError, Piece, Single, Slot, WRITE, word};
use crate::device::Direction;
use crate::event::need_event;
use crate::features;

/// avail.flags: do not notify us.
const NO_INTERRUPT: u16 = 1;
/// used.flags: the device needs no notification.
const NO_NOTIFY: u16 = 1;

/// The shared half: every index is taken modulo the ring size here, so that no access can leave the areas.
pub(super) struct Shared {
    pub(super) descriptors: Area,
    pub(super) avail: Area,
    pub(super) used: Area,
    pub(super) tables: Option<(Area, u64, u16)>,
    pub(super) mask: u16,
}

impl Shared {
    #[inline(always)]
    fn slot(&self, i: u16) -> usize {
        usize::from(i & self.mask)
    }

    #[inline(always)]
    fn set_descriptor(&self, i: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = 16 * self.slot(i);
        // SAFETY: the table has 16 bytes for each of `mask + 1` slots, aligned to 16 (checked by `DriverRing::new`).
        unsafe {
            self.descriptors.store64(at, address, Ordering::Relaxed);
            self.descriptors.store64(at + 8, word(len, flags, next), Ordering::Relaxed);
        }
    }

    /// Leaves the entry alone where it says so already: an unchanged line stays in both caches. Saves a line transfer every
    /// 32 buffers when descriptors go round in order.
    #[inline(always)]
    fn set_avail(&self, index: u16, head: u16) {
        let at = 4 + 2 * self.slot(index);
        // SAFETY: the avail ring has 2 bytes for each of `mask + 1` slots behind its 4-byte head.
        unsafe {
            if self.avail.load16(at, Ordering::Relaxed) != head {
                self.avail.store16(at, head, Ordering::Relaxed);
            }
        }
    }

    #[inline(always)]
    fn set_avail_index(&self, index: u16) {
        // SAFETY: the avail ring begins with flags and idx, 2 bytes each.
        unsafe { self.avail.store16(2, index, Ordering::Release) }
    }

    fn set_avail_flags(&self, flags: u16) {
        // SAFETY: as in `set_avail_index`.
        unsafe { self.avail.store16(0, flags, Ordering::Relaxed) }
    }

    fn set_used_event(&self, index: u16) {
        // SAFETY: used_event follows the last entry of the avail ring.
        unsafe { self.avail.store16(6 + 2 * usize::from(self.mask), index, Ordering::Relaxed) }
    }

    #[inline(always)]
    fn used_index(&self) -> u16 {
        // SAFETY: the used ring begins with flags and idx, 2 bytes each.
        unsafe { self.used.load16(2, Ordering::Acquire) }
    }

    #[inline(always)]
    fn used_flags(&self) -> u16 {
        // SAFETY: as in `used_index`.
        unsafe { self.used.load16(0, Ordering::Relaxed) }
    }

    #[inline(always)]
    fn avail_event(&self) -> u16 {
        // SAFETY: avail_event follows the last element of the used ring.
        unsafe { self.used.load16(12 + 8 * usize::from(self.mask), Ordering::Relaxed) }
    }

    #[inline(always)]
    fn used_element(&self, index: u16) -> (u32, u32) {
        let at = 4 + 8 * self.slot(index);
        // SAFETY: the used ring has 8 bytes for each of `mask + 1` slots behind its 4-byte head.
        unsafe { (self.used.load32(at, Ordering::Relaxed), self.used.load32(at + 4, Ordering::Relaxed)) }
    }
}

/// The driver side of a split ring.
pub struct SplitDriver {
    shared: Shared,
    in_order: bool,
    event_idx: bool,
    pub(super) direction: Direction,
    /// Flags of a single descriptor: [`WRITE`] on a receive ring.
    flags: u16,
    /// Next avail index.
    avail: u16,
    /// The avail index that the device was last shown.
    published: u16,
    /// Next used index.
    used: u16,
    /// The next free descriptor.
    head: u16,
    /// The oldest descriptor that the device has (IN_ORDER).
    tail: u16,
    /// Free descriptors.
    free: u16,
    batch: Batch,
    /// What follows a descriptor in its chain or in the free list.
    links: Box<[u16]>,
    slots: Box<[Slot]>,
    _mapping: Arc<dyn Any + Send + Sync>,
}

impl SplitDriver {
    /// # Safety
    /// As [`super::DriverRing::new`], and the areas passed its check.
    #[cfg(not(loom))]
    pub(super) unsafe fn new(setup: super::DriverSetup) -> Self {
        let with_tables = setup.indirect.filter(|_| setup.features & features::RING_INDIRECT_DESC != 0);
        // SAFETY: the caller's promise.
        let shared = unsafe {
            Shared {
                descriptors: Area::new(&setup.descriptors),
                avail: Area::new(&setup.driver),
                used: Area::new(&setup.device),
                tables: with_tables.map(|t| (Area::new(&t.range), t.range.guest, t.entries)),
                mask: setup.size - 1,
            }
        };
        shared.descriptors.clear();
        shared.avail.clear();
        shared.used.clear();
        Self::on(shared, setup.direction, setup.features, setup.mapping)
    }

    /// A ring on zeroed areas.
    pub(super) fn on(
        shared: Shared,
        direction: Direction,
        negotiated: u64,
        mapping: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        let mask = shared.mask;
        let mut ring = Self {
            in_order: negotiated & features::IN_ORDER != 0,
            event_idx: negotiated & features::RING_EVENT_IDX != 0,
            direction,
            flags: if direction == Direction::Write { WRITE } else { 0 },
            avail: 0,
            published: 0,
            used: 0,
            head: 0,
            tail: 0,
            free: mask + 1,
            batch: Batch::default(),
            links: (0..=mask).map(|i| (i + 1) & mask).collect(),
            slots: vec![Slot::default(); usize::from(mask) + 1].into_boxed_slice(),
            shared,
            _mapping: mapping,
        };
        ring.suppress_notifications();
        ring
    }

    #[inline(always)]
    fn follower(&self, i: u16) -> u16 {
        if self.in_order { (i + 1) & self.shared.mask } else { self.links[usize::from(i)] }
    }

    /// See [`super::DriverRing::offer`].
    #[inline(always)]
    pub fn offer(&mut self, buffers: impl Iterator<Item = Single>) -> usize {
        let mut head = self.head;
        let mut avail = self.avail;
        for b in buffers.take(usize::from(self.free)) {
            self.shared.set_descriptor(head, b.address, b.len, self.flags, 0);
            self.shared.set_avail(avail, head);
            self.slots[usize::from(head)] = Slot { token: b.token, writable: b.len, span: 1 };
            head = self.follower(head);
            avail = avail.wrapping_add(1);
        }
        let taken = avail.wrapping_sub(self.avail);
        (self.head, self.avail) = (head, avail);
        self.free -= taken;
        usize::from(taken)
    }

    /// Offers a chain whose first `readable` pieces the device reads; it writes the others. Which they may be is for
    /// [`super::DriverRing`] to say.
    ///
    /// # Errors
    /// See [`OfferError`].
    pub(super) fn offer_chain(
        &mut self,
        pieces: &[Piece],
        readable: usize,
        token: u32,
    ) -> Result<(), OfferError> {
        let span = chain_len(pieces, self.shared.mask.saturating_add(1))?;
        if span > self.free {
            return Err(OfferError::Full);
        }
        let first = self.head;
        let mut at = first;
        for (i, p) in (1..).zip(pieces) {
            let next = self.follower(at);
            let more = if i < span { NEXT } else { 0 };
            let write = if usize::from(i) > readable { WRITE } else { 0 };
            self.shared.set_descriptor(at, p.address, p.len, write | more, next);
            at = next;
        }
        self.push(first, at, Slot { token, writable: total(written(pieces, readable)), span });
        Ok(())
    }

    /// See [`super::DriverRing::offer_indirect`].
    ///
    /// # Errors
    /// See [`OfferError`].
    pub fn offer_indirect(&mut self, pieces: &[Piece], token: u32) -> Result<(), OfferError> {
        let (table, guest, entries) = self.shared.tables.as_ref().ok_or(OfferError::NoTables)?;
        let n = chain_len(pieces, *entries)?;
        if self.free == 0 {
            return Err(OfferError::Full);
        }
        let first = self.head;
        let base = 16 * usize::from(*entries) * self.shared.slot(first);
        for (i, p) in (1..).zip(pieces) {
            let at = base + 16 * (usize::from(i) - 1);
            let (more, next) = if i < n { (NEXT, i) } else { (0, 0) };
            // SAFETY: the tables' memory has `entries` descriptors for each slot of the ring (checked by
            // `DriverRing::new`), and `i <= n <= entries`.
            unsafe {
                table.store64(at, p.address, Ordering::Relaxed);
                table.store64(at + 8, word(p.len, self.flags | more, next), Ordering::Relaxed);
            }
        }
        self.shared.set_descriptor(first, guest + base as u64, 16 * u32::from(n), INDIRECT, 0);
        self.push(first, self.follower(first), Slot { token, writable: total(pieces), span: 1 });
        Ok(())
    }

    /// Enters a chain that begins at descriptor `first` into the avail ring; `next` is the first descriptor behind it.
    fn push(&mut self, first: u16, next: u16, slot: Slot) {
        self.shared.set_avail(self.avail, first);
        self.slots[usize::from(first)] = slot;
        self.head = next;
        self.free -= slot.span;
        self.avail = self.avail.wrapping_add(1);
    }

    /// See [`super::DriverRing::publish`].
    #[inline(always)]
    pub fn publish(&mut self) -> bool {
        if self.avail == self.published {
            return false;
        }
        let old = std::mem::replace(&mut self.published, self.avail);
        self.shared.set_avail_index(self.avail);
        // The index before the question whether the device sleeps: it publishes its wish, then looks at the index.
        full_fence();
        if self.event_idx {
            need_event(self.shared.avail_event(), self.avail, old)
        } else {
            self.shared.used_flags() & NO_NOTIFY == 0
        }
    }

    /// See [`super::DriverRing::reclaim`].
    ///
    /// # Errors
    /// See [`DriverFault`].
    #[inline(always)]
    pub fn reclaim(&mut self, max: usize, mut each: impl FnMut(u32, u32)) -> Result<usize, DriverFault> {
        let ready = self.ready()?;
        let n = usize::from(ready).min(max);
        if self.in_order && self.direction == Direction::Read {
            // What the device read comes back in the order in which it was offered: the index says it all, the used
            // elements are never fetched.
            for _ in 0..n {
                let token = self.pop();
                each(token, 0);
            }
            return Ok(n);
        }
        for done in 0..n {
            if self.batch.left > 0 {
                let (token, len) = self.next_of_batch();
                each(token, len);
                continue;
            }
            let (id, len) = self.shared.used_element(self.used);
            if self.in_order && id != u32::from(self.tail) {
                self.begin_batch(id, len, ready - done as u16)?;
                let (token, len) = self.next_of_batch();
                each(token, len);
                continue;
            }
            let (token, len) = self.take(id, len)?;
            each(token, len);
        }
        Ok(n)
    }

    /// How many buffers the device has published as used.
    #[inline(always)]
    fn ready(&mut self) -> Result<u16, DriverFault> {
        let seen = self.shared.used_index();
        let ready = seen.wrapping_sub(self.used);
        let outstanding = self.published.wrapping_sub(self.used);
        if ready > outstanding {
            return Err(DriverFault::UsedIndex { used: seen, ahead: ready, outstanding });
        }
        Ok(ready)
    }

    /// Takes back buffer `id` with `len` bytes written.
    #[inline(always)]
    fn take(&mut self, id: u32, len: u32) -> Result<(u32, u32), DriverFault> {
        let slot = match self.slots.get_mut(id as usize) {
            Some(slot) if slot.span != 0 => slot,
            _ => return Err(DriverFault::UsedId { id }),
        };
        let id = id as u16;
        if self.direction != Direction::Read && len > slot.writable {
            return Err(DriverFault::UsedLen { id, len, capacity: slot.writable });
        }
        let span = std::mem::take(&mut slot.span);
        let token = slot.token;
        self.used = self.used.wrapping_add(1);
        self.free += span;
        if self.in_order {
            self.tail = self.tail.wrapping_add(span) & self.shared.mask;
        } else {
            let mut last = id;
            for _ in 1..span {
                last = self.links[usize::from(last)];
            }
            self.links[usize::from(last)] = self.head;
            self.head = id;
        }
        Ok((token, if self.direction == Direction::Read { 0 } else { len }))
    }

    /// Takes back the oldest buffer, whatever the device wrote about it (IN_ORDER). One is outstanding.
    #[inline(always)]
    fn pop(&mut self) -> u32 {
        let slot = &mut self.slots[usize::from(self.tail)];
        let span = std::mem::take(&mut slot.span);
        self.tail = self.tail.wrapping_add(span) & self.shared.mask;
        self.free += span;
        self.used = self.used.wrapping_add(1);
        slot.token
    }

    /// The device skipped ahead: buffer `id` is the last of a batch of at most `most` (section 2.7.9).
    #[cold]
    fn begin_batch(&mut self, id: u32, len: u32, most: u16) -> Result<(), DriverFault> {
        let mut at = self.tail;
        for count in 1..=most {
            let slot = self.slots[usize::from(at)];
            if u32::from(at) == id {
                if self.direction != Direction::Read && len > slot.writable {
                    return Err(DriverFault::UsedLen { id: at, len, capacity: slot.writable });
                }
                self.batch = Batch { left: count, last_len: len };
                return Ok(());
            }
            at = at.wrapping_add(slot.span) & self.shared.mask;
        }
        Err(DriverFault::UsedId { id })
    }

    /// The next buffer of a batch that was begun: `batch.left` is not 0.
    fn next_of_batch(&mut self) -> (u32, u32) {
        self.batch.left -= 1;
        let whole = self.slots[usize::from(self.tail)].writable;
        let len = if self.batch.left == 0 { self.batch.last_len } else { whole };
        (self.pop(), len)
    }

    /// See [`super::DriverRing::free`].
    #[inline(always)]
    pub fn free(&self) -> u16 {
        self.free
    }

    /// See [`super::DriverRing::is_ready`].
    pub fn is_ready(&self) -> bool {
        self.shared.used_index() != self.used
    }

    /// See [`super::DriverRing::request_notification`].
    pub fn request_notification(&mut self) -> bool {
        if self.event_idx {
            self.shared.set_used_event(self.used);
        } else {
            self.shared.set_avail_flags(0);
        }
        full_fence();
        self.is_ready()
    }

    /// See [`super::DriverRing::suppress_notifications`].
    pub fn suppress_notifications(&mut self) {
        if self.event_idx {
            // Just passed: due again after 65,535 more, when a needless notification costs nothing worth avoiding.
            self.shared.set_used_event(self.used.wrapping_sub(1));
        } else {
            self.shared.set_avail_flags(NO_INTERRUPT);
        }
    }

    /// See [`super::DriverRing::resume_position`].
    ///
    /// # Errors
    /// See [`DriverFault`].
    pub fn resume_position(&self) -> Result<u32, DriverFault> {
        let used = self.shared.used_index();
        let ahead = used.wrapping_sub(self.used);
        let outstanding = self.published.wrapping_sub(self.used);
        if ahead > outstanding {
            return Err(DriverFault::UsedIndex { used, ahead, outstanding });
        }
        Ok(u32::from(used))
    }

    /// See [`super::DriverRing::abandon`].
    pub fn abandon(self, each: impl FnMut(u32)) {
        self.slots.iter().filter(|s| s.span != 0).map(|s| s.token).for_each(each);
    }
}

/// The number of pieces, if it is one that fits.
pub(super) fn chain_len(pieces: &[Piece], most: u16) -> Result<u16, OfferError> {
    match u16::try_from(pieces.len()) {
        Ok(n) if n > 0 && n <= most => Ok(n),
        _ => Err(OfferError::Pieces(pieces.len())),
    }
}

/// The pieces behind the first `readable`.
pub(super) fn written(pieces: &[Piece], readable: usize) -> &[Piece] {
    pieces.get(readable..).unwrap_or_default()
}

/// Bytes of all pieces.
pub(super) fn total(pieces: &[Piece]) -> u32 {
    pieces.iter().fold(0, |sum, p| sum.saturating_add(p.len))
}
