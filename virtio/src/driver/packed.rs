//! The driver side of a packed virtqueue (virtio 1.3, section 2.8).
//!
//! Owns the positions and wrap counters and the table of what the device has. The first descriptor of a burst is written
//! last: until then the device, which looks at one position only, sees nothing of it. With IN_ORDER a buffer's id is the
//! position of its first descriptor; without, ids come from a private stack.

use std::any::Any;
use std::sync::Arc;

#[cfg(loom)]
use loom::sync::atomic::Ordering;
#[cfg(not(loom))]
use std::sync::atomic::Ordering;

use super::area::{Area, full_fence};
use super::split::{chain_len, total, written};
use super::{Batch, DriverFault, INDIRECT, NEXT, OfferError, Piece, Single, Slot, WRITE, word};
use crate::device::Direction;
use crate::event::need_event;
use crate::features;

/// Descriptor flag: equals the driver's wrap counter when available.
const AVAIL: u16 = 1 << 7;
/// Descriptor flag: equals the device's wrap counter when used.
const USED: u16 = 1 << 15;

/// Event area flags (section 2.8.14): always, never, at a position.
const EVENT_ENABLE: u16 = 0;
const EVENT_DISABLE: u16 = 1;
const EVENT_AT: u16 = 2;

/// The shared half. Positions are always below the size: [`Position`] sees to it.
pub(super) struct Shared {
    pub(super) ring: Area,
    pub(super) driver: Area,
    pub(super) device: Area,
    pub(super) tables: Option<(Area, u64, u16)>,
}

/// A place in the ring with the wrap counter of the lap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Position {
    at: u16,
    wrap: bool,
    size: u16,
}

impl Position {
    /// `by` descriptors further, at most the ring size.
    #[inline(always)]
    fn advanced(self, by: u16) -> Self {
        let ahead = u32::from(self.at) + u32::from(by);
        if ahead >= u32::from(self.size) {
            Self { at: (ahead - u32::from(self.size)) as u16 % self.size, wrap: !self.wrap, ..self }
        } else {
            Self { at: ahead as u16, ..self }
        }
    }

    /// The flags that make a descriptor available here.
    #[inline(always)]
    fn available(self) -> u16 {
        if self.wrap { AVAIL } else { USED }
    }

    /// Whether these flags say "used" here.
    #[inline(always)]
    fn is_used(self, flags: u16) -> bool {
        flags & (AVAIL | USED) == if self.wrap { AVAIL | USED } else { 0 }
    }

    /// As event areas and SET_VRING_BASE have it: bits 0 to 14 the place, bit 15 the wrap counter.
    fn bits(self) -> u16 {
        self.at | u16::from(self.wrap) << 15
    }
}

impl Shared {
    #[inline(always)]
    fn set_address(&self, at: u16, address: u64) {
        // SAFETY: `at` is a `Position` of this ring, whose area has 16 bytes for each, aligned to 16 (checked by
        // `DriverRing::new`).
        unsafe { self.ring.store64(16 * usize::from(at), address, Ordering::Relaxed) }
    }

    /// Length, id and flags in one store: the descriptor belongs to the device from here on.
    #[inline(always)]
    fn set_word(&self, at: u16, word: u64) {
        // SAFETY: as in `set_address`.
        unsafe { self.ring.store64(16 * usize::from(at) + 8, word, Ordering::Release) }
    }

    /// Length, id and flags in one load.
    #[inline(always)]
    fn word(&self, p: Position) -> (u32, u16, u16) {
        // SAFETY: as in `set_address`.
        let word = unsafe { self.ring.load64(16 * usize::from(p.at) + 8, Ordering::Acquire) };
        (word as u32, (word >> 32) as u16, (word >> 48) as u16)
    }

    fn set_driver_event(&self, off_wrap: u16, flags: u16) {
        // SAFETY: the event area has 4 bytes: position, then flags.
        unsafe {
            self.driver.store16(0, off_wrap, Ordering::Relaxed);
            self.driver.store16(2, flags, Ordering::Release);
        }
    }

    /// The device's event area: position and flags, in one load.
    #[inline(always)]
    fn device_event(&self) -> (u16, u16) {
        // SAFETY: the event area has 4 bytes, aligned to 16.
        let both = unsafe { self.device.load32(0, Ordering::Relaxed) };
        (both as u16, (both >> 16) as u16)
    }
}

/// The driver side of a packed ring.
pub struct PackedDriver {
    shared: Shared,
    in_order: bool,
    event_idx: bool,
    pub(super) direction: Direction,
    /// Flags of a single descriptor: [`WRITE`] on a receive ring.
    flags: u16,
    /// Where the next descriptor goes.
    avail: Position,
    /// Where the next used element comes.
    used: Position,
    /// Free descriptors.
    free: u16,
    /// The first descriptor of the burst: its place and what will make it visible.
    held: Option<(u16, u64)>,
    /// Descriptors offered since the last publish.
    unpublished: u16,
    /// Descriptors published since the ring began; wraps.
    published: u32,
    /// The last place for which the device was notified, counted as `published` is.
    answered: u32,
    batch: Batch,
    /// Free ids, the next one last (without IN_ORDER).
    ids: Vec<u16>,
    slots: Box<[Slot]>,
    _mapping: Arc<dyn Any + Send + Sync>,
}

impl PackedDriver {
    /// # Safety
    /// As [`super::DriverRing::new`], and the areas passed its check.
    #[cfg(not(loom))]
    pub(super) unsafe fn new(setup: super::DriverSetup) -> Self {
        let with_tables = setup.indirect.filter(|_| setup.features & features::RING_INDIRECT_DESC != 0);
        // SAFETY: the caller's promise.
        let shared = unsafe {
            Shared {
                ring: Area::new(&setup.descriptors),
                driver: Area::new(&setup.driver),
                device: Area::new(&setup.device),
                tables: with_tables.map(|t| (Area::new(&t.range), t.range.guest, t.entries)),
            }
        };
        shared.ring.clear();
        shared.driver.clear();
        shared.device.clear();
        Self::on(shared, setup.size, setup.direction, setup.features, setup.mapping)
    }

    /// A ring of `size` descriptors (at least 1) on zeroed areas.
    pub(super) fn on(
        shared: Shared,
        size: u16,
        direction: Direction,
        negotiated: u64,
        mapping: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        let start = Position { at: 0, wrap: true, size };
        let mut ring = Self {
            in_order: negotiated & features::IN_ORDER != 0,
            event_idx: negotiated & features::RING_EVENT_IDX != 0,
            direction,
            flags: if direction == Direction::Write { WRITE } else { 0 },
            avail: start,
            used: start,
            free: size,
            held: None,
            unpublished: 0,
            published: 0,
            answered: u32::MAX,
            batch: Batch::default(),
            ids: (0..size).rev().collect(),
            slots: vec![Slot::default(); usize::from(size)].into_boxed_slice(),
            shared,
            _mapping: mapping,
        };
        ring.suppress_notifications();
        ring
    }

    /// The id of the buffer whose first descriptor is at `p`. There is a free one: ids are as many as descriptors.
    #[inline(always)]
    fn id(in_order: bool, ids: &mut Vec<u16>, p: Position) -> u16 {
        if in_order { p.at } else { ids.pop().unwrap_or_default() }
    }

    /// Writes `word` at `p`, or keeps it back if it is the first of the burst.
    #[inline(always)]
    fn show(&mut self, p: Position, word: u64) {
        if self.held.is_none() {
            self.held = Some((p.at, word));
        } else {
            self.shared.set_word(p.at, word);
        }
    }

    /// See [`super::DriverRing::offer`].
    #[inline(always)]
    pub fn offer(&mut self, buffers: impl Iterator<Item = Single>) -> usize {
        let mut n = 0;
        let mut p = self.avail;
        for b in buffers.take(usize::from(self.free)) {
            let id = Self::id(self.in_order, &mut self.ids, p);
            self.slots[usize::from(id)] = Slot { token: b.token, writable: b.len, span: 1 };
            self.shared.set_address(p.at, b.address);
            self.show(p, word(b.len, id, self.flags | p.available()));
            p = p.advanced(1);
            n += 1;
        }
        self.avail = p;
        self.free -= n;
        self.unpublished += n;
        usize::from(n)
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
        let span = chain_len(pieces, self.avail.size)?;
        if span > self.free {
            return Err(OfferError::Full);
        }
        let id = Self::id(self.in_order, &mut self.ids, self.avail);
        // From the last descriptor to the first: the chain is whole when its first becomes visible, even if other bursts
        // follow before the next publish.
        for (i, piece) in (0..span).zip(pieces).rev() {
            let p = self.avail.advanced(i);
            let more = if i + 1 < span { NEXT } else { 0 };
            self.shared.set_address(p.at, piece.address);
            let write = if usize::from(i) < readable { 0 } else { WRITE };
            let w = word(piece.len, id, write | more | p.available());
            if i == 0 { self.show(p, w) } else { self.shared.set_word(p.at, w) }
        }
        self.entered(id, Slot { token, writable: total(written(pieces, readable)), span });
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
        let id = Self::id(self.in_order, &mut self.ids, self.avail);
        let base = 16 * usize::from(*entries) * usize::from(id);
        for (i, piece) in (0..usize::from(n)).zip(pieces) {
            // SAFETY: the tables' memory has `entries` descriptors for each slot of the ring (checked by
            // `DriverRing::new`), `id` is below the ring size and `i < n <= entries`.
            unsafe {
                table.store64(base + 16 * i, piece.address, Ordering::Relaxed);
                table.store64(base + 16 * i + 8, word(piece.len, 0, self.flags), Ordering::Relaxed);
            }
        }
        self.shared.set_address(self.avail.at, guest + base as u64);
        self.show(self.avail, word(16 * u32::from(n), id, INDIRECT | self.avail.available()));
        self.entered(id, Slot { token, writable: total(pieces), span: 1 });
        Ok(())
    }

    fn entered(&mut self, id: u16, slot: Slot) {
        self.avail = self.avail.advanced(slot.span);
        self.free -= slot.span;
        self.unpublished += slot.span;
        self.slots[usize::from(id)] = slot;
    }

    /// See [`super::DriverRing::publish`].
    #[inline(always)]
    pub fn publish(&mut self) -> bool {
        let Some((at, word)) = self.held.take() else { return false };
        self.shared.set_word(at, word);
        let added = std::mem::take(&mut self.unpublished);
        self.published = self.published.wrapping_add(added.into());
        // The descriptors before the question whether the device sleeps: it publishes its wish, then looks at the ring.
        full_fence();
        let (off_wrap, flags) = self.shared.device_event();
        if !self.event_idx || flags != EVENT_AT {
            return flags != EVENT_DISABLE;
        }
        self.wishes(off_wrap, added)
    }

    /// Whether a device that wants to be notified of the descriptor at `off_wrap` (section 2.8.10) has to be, now that `added`
    /// more were published: if it is among them, or came before them and was never answered.
    ///
    /// The specification only asks for the first. But QEMU 10's virtio-net writes where it stands, then takes what was published
    /// meanwhile, and sleeps without writing again; it has passed its own place, and would sleep for ever
    /// (`virtio_net_tx_complete`; for a split ring, taking a buffer moves the place on). One notification too many does no harm:
    /// devices have to handle spurious ones.
    fn wishes(&mut self, off_wrap: u16, added: u16) -> bool {
        let mut event = off_wrap & 0x7fff;
        if (off_wrap >> 15 != 0) != self.avail.wrap {
            event = event.wrapping_sub(self.avail.size);
        }
        let now = self.avail.at;
        let place = self.published.wrapping_sub(now.wrapping_sub(event).into());
        let is_late = || self.answered != place && need_event(event, now, now.wrapping_sub(self.avail.size));
        let wished = need_event(event, now, now.wrapping_sub(added)) || is_late();
        if wished {
            self.answered = place;
        }
        wished
    }

    /// See [`super::DriverRing::reclaim`].
    ///
    /// # Errors
    /// See [`DriverFault`].
    #[inline(always)]
    pub fn reclaim(&mut self, max: usize, mut each: impl FnMut(u32, u32)) -> Result<usize, DriverFault> {
        let mut done = 0;
        loop {
            while self.batch.left > 0 && done < max {
                let (token, len) = self.next_of_batch();
                each(token, len);
                done += 1;
            }
            let (n, skipped) = self.take_used(max - done, &mut each);
            done += n;
            match skipped? {
                Some((id, len)) => self.begin_batch(id, len)?,
                None => return Ok(done),
            }
        }
    }

    /// Takes back at most `max` buffers whose used descriptors come one by one. Also the id and length of the used descriptor
    /// of a batch, where one ended it.
    ///
    /// The position stays in registers until the end: written and read back for every frame it costs more than the rest.
    #[inline(always)]
    fn take_used(
        &mut self,
        max: usize,
        each: &mut impl FnMut(u32, u32),
    ) -> (usize, Result<Option<(u16, u32)>, DriverFault>) {
        let mut p = self.used;
        let mut free = self.free;
        let mut done = 0;
        let mut end = Ok(None);
        while done < max {
            let (len, id, flags) = self.shared.word(p);
            if !p.is_used(flags) {
                break;
            }
            if self.in_order && id != p.at {
                end = Ok(Some((id, len)));
                break;
            }
            let slot = match self.slots.get_mut(usize::from(id)) {
                Some(slot) if slot.span != 0 => slot,
                _ => {
                    end = Err(DriverFault::UsedId { id: u32::from(id) });
                    break;
                }
            };
            if self.direction != Direction::Read && len > slot.writable {
                end = Err(DriverFault::UsedLen { id, len, capacity: slot.writable });
                break;
            }
            let span = std::mem::take(&mut slot.span);
            let token = slot.token;
            p = p.advanced(span);
            free += span;
            if !self.in_order {
                self.ids.push(id);
            }
            each(token, if self.direction == Direction::Read { 0 } else { len });
            done += 1;
        }
        self.used = p;
        self.free = free;
        (done, end)
    }

    /// The device skipped ahead: buffer `id` is the last of a batch (section 2.8.9). Its first is at the used position.
    #[cold]
    fn begin_batch(&mut self, id: u16, len: u32) -> Result<(), DriverFault> {
        let mut p = self.used;
        for count in 1..=self.avail.size {
            // An id is the position of the buffer's first descriptor, so this is a buffer or nothing.
            let slot = self.slots[usize::from(p.at)];
            if slot.span == 0 {
                break;
            }
            if p.at == id {
                if self.direction != Direction::Read && len > slot.writable {
                    return Err(DriverFault::UsedLen { id, len, capacity: slot.writable });
                }
                self.batch = Batch { left: count, last_len: len };
                return Ok(());
            }
            p = p.advanced(slot.span);
        }
        Err(DriverFault::UsedId { id: u32::from(id) })
    }

    /// The next buffer of a batch that was begun: `batch.left` is not 0.
    fn next_of_batch(&mut self) -> (u32, u32) {
        self.batch.left -= 1;
        let slot = &mut self.slots[usize::from(self.used.at)];
        let span = std::mem::take(&mut slot.span);
        let written = if self.batch.left == 0 { self.batch.last_len } else { slot.writable };
        let token = slot.token;
        self.used = self.used.advanced(span);
        self.free += span;
        (token, if self.direction == Direction::Read { 0 } else { written })
    }

    /// See [`super::DriverRing::free`].
    #[inline(always)]
    pub fn free(&self) -> u16 {
        self.free
    }

    /// See [`super::DriverRing::is_ready`].
    pub fn is_ready(&self) -> bool {
        let (_, _, flags) = self.shared.word(self.used);
        self.batch.left > 0 || self.used.is_used(flags)
    }

    /// See [`super::DriverRing::request_notification`].
    pub fn request_notification(&mut self) -> bool {
        let flags = if self.event_idx { EVENT_AT } else { EVENT_ENABLE };
        self.shared.set_driver_event(self.used.bits(), flags);
        full_fence();
        self.is_ready()
    }

    /// See [`super::DriverRing::suppress_notifications`].
    pub fn suppress_notifications(&mut self) {
        self.shared.set_driver_event(self.used.bits(), EVENT_DISABLE);
    }

    /// See [`super::DriverRing::resume_position`].
    ///
    /// # Errors
    /// See [`DriverFault`].
    pub fn resume_position(&self) -> Result<u32, DriverFault> {
        let mut p = self.used;
        let mut left = self.avail.size - self.free;
        for _ in 0..self.batch.left {
            let span = self.slots[usize::from(p.at)].span;
            p = p.advanced(span);
            left -= span;
        }
        while left > 0 {
            let (_, id, flags) = self.shared.word(p);
            if !p.is_used(flags) {
                break;
            }
            let span = match self.slots.get(usize::from(id)) {
                Some(slot) if slot.span != 0 && slot.span <= left => slot.span,
                _ => return Err(DriverFault::UsedId { id: u32::from(id) }),
            };
            // A batch covers everything from here to the end of buffer `id`.
            let covered =
                if self.in_order { (id + self.avail.size - p.at) % self.avail.size + span } else { span };
            if covered > left {
                return Err(DriverFault::UsedId { id: u32::from(id) });
            }
            p = p.advanced(covered);
            left -= covered;
        }
        Ok(u32::from(p.bits()) << 16 | u32::from(p.bits()))
    }

    /// See [`super::DriverRing::abandon`].
    pub fn abandon(self, each: impl FnMut(u32)) {
        self.slots.iter().filter(|s| s.span != 0).map(|s| s.token).for_each(each);
    }
}
