//! The device side of a packed virtqueue (virtio 1.3, section 2.8).
//!
//! Owns the positions and wrap counters of what comes next. Reads each descriptor exactly once, through [`crate::memory`], and
//! hands out only checked chains. Where the front end keeps an inflight region, the position is written there once a burst,
//! so that a crashed device resumes. Never allocates, never blocks, never knows what the buffers are for.

use std::sync::atomic::{AtomicU8, AtomicU16, Ordering, compiler_fence};

use super::Ring;
use super::chain::{Chain, Stock, Walk, table_entry};
use super::setup::{Direction, InflightArea, RingError, RingSetup};
use crate::event::need_event;
use crate::features;
use crate::memory::copy::{full_fence, prefetch_read, prefetch_write};
use crate::memory::packed::{AVAIL, Events, Ring as Descriptors, USED};
use crate::memory::split::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Descriptor};

/// A position in the ring and the wrap counter that goes with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Position {
    at: u16,
    wrap: bool,
}

impl Position {
    const START: Position = Position { at: 0, wrap: true };

    #[inline(always)]
    fn advance(&mut self, by: u16, size: u16) {
        self.at += by;
        if self.at >= size {
            self.at -= size;
            self.wrap = !self.wrap;
        }
    }

    /// As the low or high half of SET_VRING_BASE and the event areas have it.
    fn bits(self) -> u16 {
        self.at | u16::from(self.wrap) << 15
    }

    fn from_bits(bits: u16) -> Self {
        Self { at: bits & 0x7fff, wrap: bits >> 15 == 1 }
    }

    /// Whether a descriptor with these flags at this position is available.
    #[inline(always)]
    fn available(self, flags: u16) -> bool {
        let (avail, used) = (flags & AVAIL != 0, flags & USED != 0);
        avail == self.wrap && used != self.wrap
    }

    /// AVAIL and USED of a descriptor that is used at this position.
    #[inline(always)]
    fn used_flags(self) -> u16 {
        if self.wrap { AVAIL | USED } else { 0 }
    }
}

/// The device side of a packed ring.
pub struct PackedRing {
    descriptors: Descriptors,
    driver: Events,
    device: Events,
    size: u16,
    plain: u16,
    in_order: bool,
    /// Next descriptor to fetch.
    next: Position,
    /// Next descriptor to mark used.
    used: Position,
    /// The first used descriptor since the last publish: written last.
    first: Option<(Position, u16, u32)>,
    published: Position,
    /// Descriptors between `used` and `next`: never more than the ring has, whatever the driver claims.
    held: u16,
    hot: usize,
    stock: Stock,
    setup: RingSetup,
}

impl PackedRing {
    /// Starts a ring at the position in the inflight area if that was in use, else at `setup.base`.
    ///
    /// # Errors
    /// A size, area or position that is impossible; [`RingError::NoPosition`] for a ring that was in use and whose position
    /// nobody knows.
    pub fn start(setup: RingSetup) -> Result<Self, RingError> {
        let size = setup.size;
        if size == 0 || size > 32_768 {
            return Err(RingError::Size(size));
        }
        setup.check_overlap()?;
        let area = |area, range: crate::memory::HostRange| RingError::Area {
            area,
            len: range.len,
            guest: range.guest,
        };
        let descriptors =
            Descriptors::new(setup.descriptors, size).ok_or(area("descriptor", setup.descriptors))?;
        let driver = Events::new(setup.driver).ok_or(area("driver", setup.driver))?;
        let device = Events::new(setup.device).ok_or(area("device", setup.device))?;
        let position = match (setup.inflight.as_ref().and_then(Inflight::of), setup.base) {
            (Some(inflight), _) if inflight.in_use(size) => inflight.recover(&descriptors, size)?,
            (_, Some(base)) => Self::from_base(base, &descriptors, size)?,
            (_, None) => return Err(RingError::NoPosition),
        };
        let ring = Self {
            descriptors,
            driver,
            device,
            size,
            plain: if setup.direction == Direction::Write { DESC_WRITE } else { 0 },
            in_order: setup.features & features::IN_ORDER != 0,
            next: position,
            used: position,
            first: None,
            published: position,
            held: 0,
            hot: 0,
            stock: Stock::new(size),
            setup,
        };
        if let Some(inflight) = ring.setup.inflight.as_ref().and_then(Inflight::of) {
            inflight.begin(size, position);
        }
        Ok(ring)
    }

    /// The used half of a base counts: what lies between it and the avail half was fetched and not completed by a device
    /// that is gone, and is fetched again. A front end that knows only one half leaves the other zero.
    fn from_base(base: u32, descriptors: &Descriptors, size: u16) -> Result<Position, RingError> {
        let avail = Position::from_bits(base as u16);
        let position = if base >> 16 == 0 { avail } else { Position::from_bits((base >> 16) as u16) };
        if avail.at >= size || position.at >= size {
            return Err(RingError::Base(base));
        }
        // A ring that begins at the start was never used: no descriptor of it has its USED bit set.
        if position == Position::START && (0..size).any(|i| descriptors.flags(i) & USED != 0) {
            return Err(RingError::NoPosition);
        }
        Ok(position)
    }

    pub(super) fn setup_mut(&mut self) -> &mut RingSetup {
        &mut self.setup
    }

    /// A chain of several buffers, or one that breaks a rule. False: no room for it now.
    #[cold]
    #[inline(never)]
    fn walk(&mut self, first: Descriptor) -> Result<bool, RingError> {
        let Some(mut builder) = self.stock.begin() else { return Ok(false) };
        let direction = self.setup.direction;
        let mut walk = Walk { memory: &self.setup.memory, hot: &mut self.hot, direction };
        let head = self.next.at;
        let mut d = first;
        let mut slots = 1;
        let mut position = self.next;
        loop {
            if d.b & DESC_INDIRECT != 0 {
                if d.b & DESC_NEXT != 0 || slots > 1 {
                    return Err(RingError::Indirect { index: head, len: d.len });
                }
                let (table, n) = walk.table(head, &d)?;
                // All entries belong to the chain, in order (section 2.8.8).
                for i in 0..n {
                    let Some(e) = table_entry(table, i, n) else { break };
                    walk.buffer(&mut self.stock, &mut builder, head, &e, e.b)?;
                }
                break;
            }
            walk.buffer(&mut self.stock, &mut builder, head, &d, d.b)?;
            if d.b & DESC_NEXT == 0 {
                break;
            }
            if slots + self.held >= self.size {
                return Err(RingError::Loop { index: head });
            }
            position.advance(1, self.size);
            d = self.descriptors.get(position.at);
            slots += 1;
        }
        // The id is in the last descriptor of the chain (section 2.8.6).
        self.stock.finish(builder, d.a, slots);
        self.held += slots;
        self.next.advance(slots, self.size);
        Ok(true)
    }

    #[inline(always)]
    fn put(&mut self, id: u16, written: u32, slots: u16) {
        if self.first.is_none() {
            self.first = Some((self.used, id, written));
        } else {
            self.write(self.used, id, written, Ordering::Relaxed);
        }
        self.used.advance(slots, self.size);
        self.held -= slots;
    }

    #[inline(always)]
    fn write(&self, position: Position, id: u16, written: u32, order: Ordering) {
        let flags = position.used_flags() | if written > 0 { DESC_WRITE } else { 0 };
        self.descriptors.put(position.at, id, written, flags, order);
        if let (Some(log), Some(at)) = (&self.setup.log, self.setup.log_used) {
            log.mark(at, 4);
        }
        if let Some(log) = &self.setup.log {
            log.mark(self.setup.descriptors.guest + u64::from(position.at) * 16, 16);
        }
    }
}

impl Ring for PackedRing {
    #[inline(always)]
    fn peek(&mut self, want: usize) -> Result<usize, RingError> {
        if !self.next.available(self.descriptors.flags(self.next.at)) {
            return Ok(0);
        }
        for line in 1..=4 {
            let ahead = self.next.at + 4 * line;
            let at = if ahead >= self.size { ahead - self.size } else { ahead };
            self.descriptors.prefetch(at);
        }
        Ok(want.min(32))
    }

    #[inline(always)]
    fn fetch(&mut self, want: usize) -> Result<usize, RingError> {
        let write = self.setup.direction == Direction::Write;
        while self.stock.len() < want && self.held < self.size {
            let d = self.descriptors.get(self.next.at);
            if !self.next.available(d.b) {
                break;
            }
            compiler_fence(Ordering::Acquire);
            if d.b & (DESC_NEXT | DESC_WRITE | DESC_INDIRECT) == self.plain {
                let Some(ptr) = self.setup.memory.translate(&mut self.hot, d.address, d.len) else {
                    return Err(RingError::Address { index: self.next.at, address: d.address, len: d.len });
                };
                if write {
                    prefetch_write(ptr.wrapping_add(12))
                } else {
                    prefetch_read(ptr.wrapping_add(12))
                }
                self.stock.push(Chain::single(ptr, d.len, d.a));
                self.held += 1;
                self.next.advance(1, self.size);
            } else if !self.walk(d)? {
                break;
            }
        }
        Ok(self.stock.len())
    }

    #[inline(always)]
    fn setup(&self) -> &RingSetup {
        &self.setup
    }

    #[inline(always)]
    fn stock(&self) -> &Stock {
        &self.stock
    }

    #[inline(always)]
    fn use_read(&mut self, n: usize) {
        let n = n.min(self.stock.len());
        if n == 0 {
            return;
        }
        if self.in_order {
            // One used descriptor stands for the batch: where it began, with the id of its last chain (section 2.8.7).
            let (mut slots, mut id) = (0, 0);
            for i in 0..n {
                let chain = self.stock.get(i);
                (slots, id) = (slots + chain.slots, chain.id);
            }
            self.put(id, 0, slots);
        } else {
            for i in 0..n {
                let chain = *self.stock.get(i);
                self.put(chain.id, 0, chain.slots);
            }
        }
        self.stock.pop(n);
    }

    #[inline(always)]
    fn use_written(&mut self, written: u32) {
        if self.stock.is_empty() {
            return;
        }
        let chain = *self.stock.get(0);
        self.put(chain.id, written, chain.slots);
        self.stock.pop(1);
    }

    #[inline(always)]
    fn publish(&mut self) -> bool {
        let Some((position, id, written)) = self.first.take() else { return false };
        let inflight = self.setup.inflight.as_ref().and_then(Inflight::of);
        if let Some(inflight) = inflight {
            inflight.intend(self.used);
        }
        self.write(position, id, written, Ordering::Release);
        if let Some(inflight) = inflight {
            inflight.commit(self.used);
        }
        let (old, new) = (self.published, self.used);
        self.published = new;
        full_fence();
        let (event, flags) = self.driver.get();
        match flags {
            Events::DESCRIPTOR => {
                let event = Position::from_bits(event);
                // Offsets of the previous lap count as negative (section 2.8.10).
                let event_at =
                    if event.wrap == new.wrap { event.at } else { event.at.wrapping_sub(self.size) };
                let old_at = if old.wrap == new.wrap { old.at } else { old.at.wrapping_sub(self.size) };
                need_event(event_at, new.at, old_at)
            }
            Events::DISABLE => false,
            _ => true,
        }
    }

    fn set_notify(&mut self, on: bool) {
        self.device.set(0, if on { Events::ENABLE } else { Events::DISABLE });
        full_fence();
    }

    #[inline(always)]
    fn prefetch_ahead(&self, descriptors: u16) {
        let mut ahead = 0;
        while ahead < descriptors {
            let at = self.next.at + ahead;
            self.descriptors.prefetch_write(if at >= self.size { at - self.size } else { at });
            ahead += 4;
        }
    }

    fn base(&self) -> u32 {
        u32::from(self.used.bits()) << 16 | u32::from(self.used.bits())
    }
}

/// The header of a packed queue's inflight region (vhost-user, "Inflight I/O tracking", packed virtqueue). A device that
/// completes in order needs no list of descriptors: the used position is all there is to know.
#[derive(Clone, Copy)]
struct Inflight {
    at: *mut u8,
}

impl Inflight {
    /// Bytes of the header.
    const BYTES: usize = 32;
    const VERSION: usize = 8;
    const DESC_NUM: usize = 10;
    const USED: usize = 16;
    const OLD_USED: usize = 18;
    const USED_WRAP: usize = 20;
    const OLD_USED_WRAP: usize = 21;
    /// A byte of the padding: 1 once a ring ran on this region.
    const STARTED: usize = 22;

    #[inline(always)]
    fn of(area: &InflightArea) -> Option<Self> {
        let fits = area.range.len >= Self::BYTES && (area.range.ptr as usize).is_multiple_of(8);
        fits.then_some(Self { at: area.range.ptr })
    }

    #[inline(always)]
    fn word(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: even offsets below BYTES of an area that `of` checked and that its `InflightArea` keeps mapped.
        unsafe { AtomicU16::from_ptr(self.at.add(offset) as *mut u16) }
    }

    #[inline(always)]
    fn byte(&self, offset: usize) -> &AtomicU8 {
        // SAFETY: as above.
        unsafe { AtomicU8::from_ptr(self.at.add(offset)) }
    }

    fn in_use(&self, size: u16) -> bool {
        self.byte(Self::STARTED).load(Ordering::Relaxed) == 1
            && self.word(Self::DESC_NUM).load(Ordering::Relaxed) == size
    }

    /// The position after a crash. Between [`Inflight::intend`] and [`Inflight::commit`] the two differ: the batch was
    /// published if its first descriptor says so.
    fn recover(&self, descriptors: &Descriptors, size: u16) -> Result<Position, RingError> {
        let load = |at, wrap| Position {
            at: self.word(at).load(Ordering::Relaxed),
            wrap: self.byte(wrap).load(Ordering::Relaxed) != 0,
        };
        let (old, new) = (load(Self::OLD_USED, Self::OLD_USED_WRAP), load(Self::USED, Self::USED_WRAP));
        if old.at >= size || new.at >= size {
            return Err(RingError::Base(u32::from(old.bits()) << 16 | u32::from(new.bits())));
        }
        let published = (descriptors.flags(old.at) & USED != 0) == old.wrap;
        Ok(if published { new } else { old })
    }

    fn begin(&self, size: u16, position: Position) {
        self.word(Self::VERSION).store(1, Ordering::Relaxed);
        self.word(Self::DESC_NUM).store(size, Ordering::Relaxed);
        self.intend(position);
        self.commit(position);
        self.byte(Self::STARTED).store(1, Ordering::Release);
    }

    #[inline(always)]
    fn intend(&self, position: Position) {
        self.byte(Self::USED_WRAP).store(u8::from(position.wrap), Ordering::Relaxed);
        self.word(Self::USED).store(position.at, Ordering::Release);
    }

    #[inline(always)]
    fn commit(&self, position: Position) {
        self.word(Self::OLD_USED).store(position.at, Ordering::Release);
        self.byte(Self::OLD_USED_WRAP).store(u8::from(position.wrap), Ordering::Release);
    }
}
