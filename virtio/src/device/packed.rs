//! The device side of a packed virtqueue (virtio 1.3, section 2.8).
//!
//! Owns the positions and wrap counters of what comes next. Reads each descriptor exactly once, through [`crate::memory`], and
//! hands out only checked chains. Where the front end keeps an inflight region, the position is written there once a burst,
//! so that a crashed device resumes. Never allocates, never blocks, never knows what the buffers are for.

use std::sync::atomic::{Ordering, compiler_fence};

use super::Ring;
use super::chain::{Chain, Stock, Taken, Walk, table_entry};
use super::inflight::Inflight;
use super::setup::{Direction, RingError, RingSetup};
use crate::event::need_event;
use crate::features;
use crate::memory::copy::{full_fence, prefetch_read, prefetch_write};
use crate::memory::packed::{AVAIL, Events, Ring as Descriptors, USED};
use crate::memory::split::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Descriptor};

/// A position in the ring and the wrap counter that goes with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) at: u16,
    pub(super) wrap: bool,
}

impl Position {
    pub(super) const START: Position = Position { at: 0, wrap: true };

    #[inline(always)]
    pub(super) fn advance(&mut self, by: u16, size: u16) {
        self.at += by;
        if self.at >= size {
            self.at -= size;
            self.wrap = !self.wrap;
        }
    }

    /// As the low or high half of SET_VRING_BASE and the event areas have it.
    pub(super) fn bits(self) -> u16 {
        self.at | u16::from(self.wrap) << 15
    }

    fn from_bits(bits: u16) -> Self {
        Self { at: bits & 0x7fff, wrap: bits >> 15 == 1 }
    }

    /// AVAIL and USED of a descriptor that is available at this position.
    #[inline(always)]
    pub(super) fn available_flags(self) -> u16 {
        if self.wrap { AVAIL } else { USED }
    }

    /// Whether a descriptor with these flags at this position is available.
    #[inline(always)]
    fn available(self, flags: u16) -> bool {
        flags & (AVAIL | USED) == self.available_flags()
    }

    /// Whether a descriptor with these flags at this position is used.
    #[inline(always)]
    pub(super) fn used(self, flags: u16) -> bool {
        flags & (AVAIL | USED) == self.used_flags()
    }

    /// AVAIL and USED of a descriptor that is used at this position.
    #[inline(always)]
    pub(super) fn used_flags(self) -> u16 {
        if self.wrap { AVAIL | USED } else { 0 }
    }
}

/// A used chain that the driver was not told of yet.
#[derive(Clone, Copy)]
struct Done {
    /// The used descriptor's second half, without AVAIL and USED.
    word: u64,
    /// Descriptors that it stands for.
    slots: u16,
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
    /// Used since the last publish, oldest first: the ring is written when they are published, so that a device which dies
    /// before leaves it as the driver made it.
    done: Box<[Done]>,
    /// How many of `done`.
    pending: usize,
    /// Where `used` was when the driver was last asked whether it wants to be notified.
    asked: Position,
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
            (_, Some(base)) => {
                Self::from_base(base, &descriptors, size, setup.features & features::IN_ORDER != 0)?
            }
            (_, None) => return Err(RingError::NoPosition),
        };
        let ring = Self {
            descriptors,
            driver,
            device,
            size,
            plain: setup.direction.plain(),
            in_order: setup.features & features::IN_ORDER != 0,
            next: position,
            used: position,
            done: vec![Done { word: 0, slots: 0 }; usize::from(size)].into(),
            pending: 0,
            asked: position,
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
    fn from_base(
        base: u32,
        descriptors: &Descriptors,
        size: u16,
        in_order: bool,
    ) -> Result<Position, RingError> {
        let avail = Position::from_bits(base as u16);
        let position = if base >> 16 == 0 { avail } else { Position::from_bits((base >> 16) as u16) };
        if avail.at >= size || position.at >= size {
            return Err(RingError::Base(base));
        }
        if position == Position::START && !Self::at_start(descriptors, size, in_order) {
            return Err(RingError::NoPosition);
        }
        Ok(position)
    }

    /// Whether the ring is new, or its device used all of it an even number of times: a front end that forgot where the
    /// device was says that it is at the start, too.
    ///
    /// The lap before left descriptors with AVAIL and USED clear, and between them the rest of each chain as the driver wrote
    /// it, USED set (section 2.8.1); one with both set is of a lap that is not over. What looks like the rest of a chain may
    /// be available, to a device that is not at the start. So its head must be there, used under the same buffer id (which
    /// is in a chain's last descriptor, section 2.8.6), or the answer is no. With IN_ORDER the heads say less (section 2.8.13).
    fn at_start(descriptors: &Descriptors, size: u16, in_order: bool) -> bool {
        // The buffer id of the used chain whose rest may be next.
        let mut chain = None;
        let mut ended = true;
        for i in 0..size {
            let d = descriptors.get(i);
            (chain, ended) = match (d.b & (AVAIL | USED), chain) {
                (AVAIL, _) => (None, true),
                (0, _) => (Some(d.a), true),
                (USED, Some(id)) if !in_order && d.b & DESC_NEXT != 0 => (Some(id), false),
                (USED, Some(id)) if !in_order && d.a == id => (None, true),
                _ => return false,
            };
        }
        ended
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

    /// Brings single buffers of the right direction into stock until there are `want`. Returns the descriptor at which it
    /// stopped, if one is available there.
    #[inline(always)]
    fn fetch_singles(&mut self, want: usize) -> Result<Option<Descriptor>, RingError> {
        let most = want.saturating_sub(self.stock.len()).min(usize::from(self.size - self.held));
        let write = self.setup.direction == Direction::Write;
        // Everything that changes with each descriptor is kept in registers: this loop runs for every frame.
        let (ring, size, mut next) = (self.descriptors, self.size, self.next);
        let mut near = self.setup.memory.region_near(self.hot);
        let mut stock = self.stock.extend();
        let mut n = 0;
        let stop = loop {
            if n == most {
                break Ok(None);
            }
            if n % 4 == 0 && n + 16 < most {
                ring.prefetch_at(next.at + 16, write);
            }
            let d = ring.get(next.at);
            let flags = d.b & (DESC_NEXT | DESC_WRITE | DESC_INDIRECT | AVAIL | USED);
            if flags != self.plain | next.available_flags() {
                break Ok(next.available(d.b).then_some(d));
            }
            let ptr = match near.translate(d.address, d.len) {
                Some(ptr) => ptr,
                None => match self.setup.memory.translate(&mut self.hot, d.address, d.len) {
                    Some(ptr) => {
                        near = self.setup.memory.region_near(self.hot);
                        ptr
                    }
                    None => break Err(RingError::Address { index: next.at, address: d.address, len: d.len }),
                },
            };
            // The frame begins behind a header of 12 bytes, perhaps in the next cache line.
            if write {
                prefetch_write(ptr.wrapping_add(12))
            } else {
                prefetch_read(ptr.wrapping_add(12))
            }
            stock.push(Chain::single(ptr, d.len, d.a));
            next.advance(1, size);
            n += 1;
        };
        stock.finish();
        self.held += n as u16;
        self.next = next;
        compiler_fence(Ordering::Acquire);
        stop
    }

    #[inline(always)]
    fn put(&mut self, id: u16, written: u32, slots: u16) {
        let write = if written > 0 { DESC_WRITE } else { 0 };
        let word = u64::from(written) | u64::from(id) << 32 | u64::from(write) << 48;
        if let Some(done) = self.done.get_mut(self.pending) {
            *done = Done { word, slots };
            self.pending += 1;
        }
    }

    /// Writes `done` to the ring, in order. Each used descriptor stands for itself, and is complete when it is seen.
    #[inline(always)]
    fn write(&mut self, done: std::ops::Range<usize>) {
        let (ring, size, mut used) = (self.descriptors, self.size, self.used);
        let mut slots = 0;
        for done in self.done.get(done).unwrap_or_default() {
            ring.put(used.at, done.word | u64::from(used.used_flags()) << 48);
            used.advance(done.slots, size);
            slots += done.slots;
        }
        self.held -= slots;
        self.used = used;
    }

    /// As [`Self::write`], of all that is pending, with the position kept in the inflight area: in runs of which a successor
    /// can tell how far they got.
    #[inline(never)]
    fn write_with_inflight(&mut self, inflight: Inflight) {
        let mut from = 0;
        while let Some(done) = self.done.get(from..self.pending).filter(|d| !d.is_empty()) {
            let singles = done.iter().take_while(|d| d.slots == 1).count();
            let run = singles.max(1);
            let mut end = self.used;
            end.advance(done.iter().take(run).map(|d| d.slots).sum(), self.size);
            inflight.intend(self.used, end, singles > 0);
            self.write(from..from + run);
            inflight.commit(end);
            from += run;
        }
    }

    /// Marks the pages of the used descriptors from `from` to here as written.
    #[cold]
    fn log_used(&self, mut from: Position) {
        let Some(log) = &self.setup.log else { return };
        while from != self.used {
            log.mark(self.setup.descriptors.guest + u64::from(from.at) * 16, 16);
            from.advance(1, self.size);
        }
    }
}

impl Ring for PackedRing {
    #[inline(always)]
    fn peek(&mut self, want: usize) -> Result<usize, RingError> {
        if !self.next.available(self.descriptors.flags(self.next.at)) {
            return Ok(0);
        }
        self.descriptors.prefetch_at(self.next.at + 4, false);
        Ok(want.min(32))
    }

    #[inline(always)]
    fn fetch(&mut self, want: usize) -> Result<usize, RingError> {
        if self.setup.direction == Direction::Read {
            self.descriptors.prefetch_at(self.used.at, true);
        } else if self.stock.len() < want {
            // Used descriptors will be written to these lines soon: better to get them once, to write, than twice.
            let missing = (want - self.stock.len()).min(64) as u16 + 3;
            for ahead in (0..missing).step_by(4) {
                self.descriptors.prefetch_at(self.next.at.wrapping_add(ahead), true);
            }
        }
        while let Some(d) = self.fetch_singles(want)? {
            if !self.walk(d)? {
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

    fn take(&mut self) -> Option<Taken> {
        self.stock.take()
    }

    fn use_taken(&mut self, chain: Taken, written: u32) {
        self.put(chain.id, written, chain.slots);
    }

    #[inline(always)]
    fn make_visible(&mut self) -> bool {
        if self.pending == 0 {
            return false;
        }
        let from = self.used;
        match self.setup.inflight.as_ref().and_then(Inflight::of) {
            None => self.write(0..self.pending),
            Some(inflight) => self.write_with_inflight(inflight),
        }
        self.pending = 0;
        if self.setup.log.is_some() {
            self.log_used(from);
        }
        true
    }

    #[inline(always)]
    fn notification_wanted(&mut self) -> bool {
        let (old, new) = (self.asked, self.used);
        self.asked = new;
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
        if let (Some(log), Some(at)) = (&self.setup.log, self.setup.log_used) {
            log.mark(at, Events::BYTES as u64);
        }
        full_fence();
    }

    #[inline(always)]
    fn prefetch_ahead(&self, descriptors: u16) {
        for ahead in (0..descriptors).step_by(4) {
            self.descriptors.prefetch_at(self.next.at + ahead, true);
        }
    }

    fn base(&self) -> u32 {
        u32::from(self.used.bits()) << 16 | u32::from(self.used.bits())
    }
}
