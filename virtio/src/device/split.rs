//! The device side of a split virtqueue (virtio 1.3, section 2.7).
//!
//! Owns the shadow of the avail and used indices. Reads each descriptor exactly once, through [`crate::memory`], and hands
//! out only checked chains. Never allocates, never blocks, never knows what the buffers are for.

use super::Ring;
use super::chain::{Chain, Stock, Taken, Walk, table_entry};
use super::setup::{Direction, RingError, RingSetup};
use crate::event::need_event;
use crate::features;
use crate::memory::copy::{full_fence, prefetch_read, prefetch_write};
use crate::memory::split::{Avail, DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Descriptor, Table, Used};

/// The device side of a split ring.
pub struct SplitRing {
    table: Table,
    avail: Avail,
    used: Used,
    size: u16,
    mask: u16,
    /// Flags of a chain that takes the fast path: one buffer of the right direction.
    plain: u16,
    in_order: bool,
    event_idx: bool,
    /// In-order rings: the avail ring need not be read, descriptors follow each other. False until the first chain after a
    /// start has shown where they begin.
    follows: bool,
    /// Descriptor that the next chain begins with, if `follows`.
    next_descriptor: u16,
    /// Next entry of the avail ring to fetch.
    next: u16,
    /// The avail index as last read.
    seen: u16,
    /// Next entry of the used ring to write.
    used_next: u16,
    /// What `used.index` is set to.
    published: u16,
    /// What it was when the driver was last asked whether it wants to be notified.
    asked: u16,
    hot: usize,
    stock: Stock,
    setup: RingSetup,
}

impl SplitRing {
    /// Starts a ring.
    ///
    /// It goes on at the used index in guest memory, whatever base the front end remembers: a device that completes in order
    /// has used everything before it and nothing after it, also when it was killed in the middle of a burst.
    ///
    /// # Errors
    /// A size or area that is impossible.
    pub fn start(setup: RingSetup) -> Result<Self, RingError> {
        let size = setup.size;
        if !size.is_power_of_two() || size > 32_768 {
            return Err(RingError::Size(size));
        }
        setup.check_overlap()?;
        let area = |area, range: crate::memory::HostRange| RingError::Area {
            area,
            len: range.len,
            guest: range.guest,
        };
        let table = Table::new(setup.descriptors, size).ok_or(area("descriptor", setup.descriptors))?;
        let avail = Avail::new(setup.driver, size).ok_or(area("driver", setup.driver))?;
        let used = Used::new(setup.device, size).ok_or(area("device", setup.device))?;
        let next = used.index();
        let ring = Self {
            table,
            avail,
            used,
            size,
            mask: size - 1,
            plain: setup.direction.plain(),
            in_order: setup.features & features::IN_ORDER != 0,
            event_idx: setup.features & features::RING_EVENT_IDX != 0,
            follows: false,
            next_descriptor: 0,
            next,
            seen: next,
            used_next: next,
            published: next,
            asked: next,
            hot: 0,
            stock: Stock::new(size),
            setup,
        };
        Ok(ring)
    }

    pub(super) fn setup_mut(&mut self) -> &mut RingSetup {
        &mut self.setup
    }

    #[inline(always)]
    fn refresh(&mut self) -> Result<(), RingError> {
        let seen = self.avail.index();
        // Chains in stock were taken from the same `size` entries.
        if seen.wrapping_sub(self.used_next) > self.size {
            return Err(RingError::AvailIndex { avail: seen, next: self.next, size: self.size });
        }
        self.seen = seen;
        Ok(())
    }

    #[inline(always)]
    fn advance(&mut self, head: u16, slots: u16) {
        self.next = self.next.wrapping_add(1);
        self.next_descriptor = head.wrapping_add(slots) & self.mask;
        self.follows = true;
    }

    /// Brings up to `most` single buffers of the right direction into stock; so many are available. Returns how many, and the
    /// descriptor at which it stopped.
    #[inline(always)]
    fn fetch_singles(&mut self, most: usize) -> Result<(usize, Option<(u16, Descriptor)>), RingError> {
        let most = most.min(self.stock.room());
        let write = self.setup.direction == Direction::Write;
        // Everything that changes with each descriptor is kept in registers: this loop runs for every frame.
        let (table, avail, mask) = (self.table, self.avail, self.mask);
        let (mut next, mut follower) = (self.next, self.next_descriptor);
        let mut follows = self.in_order && self.follows;
        let mut near = self.setup.memory.region_near(self.hot);
        let mut stock = self.stock.extend();
        let mut n = 0;
        let stop = loop {
            if n == most {
                break Ok(None);
            }
            let head = if follows { follower } else { avail.entry(next) };
            if head > mask {
                break Err(RingError::Index { index: u32::from(head), size: u32::from(mask) + 1 });
            }
            let d = table.get(head);
            if d.a & (DESC_NEXT | DESC_WRITE | DESC_INDIRECT) != self.plain {
                break Ok(Some((head, d)));
            }
            let ptr = match near.translate(d.address, d.len) {
                Some(ptr) => ptr,
                None => match self.setup.memory.translate(&mut self.hot, d.address, d.len) {
                    Some(ptr) => {
                        near = self.setup.memory.region_near(self.hot);
                        ptr
                    }
                    None => break Err(RingError::Address { index: head, address: d.address, len: d.len }),
                },
            };
            // The frame begins behind a header of 12 bytes, perhaps in the next cache line.
            if write {
                prefetch_write(ptr.wrapping_add(12))
            } else {
                prefetch_read(ptr.wrapping_add(12))
            }
            stock.push(Chain::single(ptr, d.len, head));
            next = next.wrapping_add(1);
            follower = head.wrapping_add(1) & mask;
            follows = self.in_order;
            n += 1;
        };
        stock.finish();
        (self.next, self.next_descriptor) = (next, follower);
        self.follows |= n > 0;
        stop.map(|stop| (n, stop))
    }

    /// A chain of several buffers, or one that breaks a rule. False: no room for it now.
    #[cold]
    #[inline(never)]
    fn walk(&mut self, head: u16, first: Descriptor) -> Result<bool, RingError> {
        let Some(mut builder) = self.stock.begin() else { return Ok(false) };
        let direction = self.setup.direction;
        let mut walk = Walk { memory: &self.setup.memory, hot: &mut self.hot, direction };
        let mut d = first;
        let mut slots = 1;
        loop {
            if d.a & DESC_INDIRECT != 0 {
                if d.a & DESC_NEXT != 0 {
                    return Err(RingError::Indirect { index: head, len: d.len });
                }
                let (table, n) = walk.table(head, &d)?;
                let mut i = 0;
                // As many steps as there are entries: a table that loops ends here.
                for step in 0..=n {
                    let Some(e) = table_entry(table, i, n).filter(|_| step < n) else {
                        return Err(RingError::Loop { index: head });
                    };
                    if e.a & DESC_INDIRECT != 0 {
                        return Err(RingError::Indirect { index: head, len: d.len });
                    }
                    walk.buffer(&mut self.stock, &mut builder, head, &e, e.a)?;
                    if e.a & DESC_NEXT == 0 {
                        break;
                    }
                    i = u32::from(e.b);
                    if i >= n {
                        return Err(RingError::Index { index: i, size: n });
                    }
                }
                break;
            }
            walk.buffer(&mut self.stock, &mut builder, head, &d, d.a)?;
            if d.a & DESC_NEXT == 0 {
                break;
            }
            if slots == self.size {
                return Err(RingError::Loop { index: head });
            }
            if d.b > self.mask {
                return Err(RingError::Index { index: u32::from(d.b), size: u32::from(self.size) });
            }
            d = self.table.get(d.b);
            slots += 1;
        }
        self.stock.finish(builder, head, slots);
        self.advance(head, slots);
        Ok(true)
    }

    #[inline(always)]
    fn put(&mut self, id: u16, len: u32) {
        self.used.put(self.used_next, id, len);
        if let (Some(log), Some(at)) = (&self.setup.log, self.setup.log_used) {
            log.mark(at.saturating_add(Used::offset(self.used_next & self.mask) as u64), 8);
        }
    }
}

impl Ring for SplitRing {
    #[inline(always)]
    fn peek(&mut self, want: usize) -> Result<usize, RingError> {
        let mut ready = self.seen.wrapping_sub(self.next);
        if ready == 0 {
            self.refresh()?;
            ready = self.seen.wrapping_sub(self.next);
            if ready == 0 {
                // What the driver writes before the index is then here when the index is.
                if self.in_order && self.follows {
                    self.table.prefetch(self.next_descriptor);
                } else {
                    self.avail.prefetch(self.next);
                }
                return Ok(0);
            }
        }
        let n = usize::from(ready).min(want);
        // With IN_ORDER the descriptors are known before the avail ring was read: four to a cache line.
        if self.in_order && self.follows {
            let mut ahead = 0;
            while ahead < n as u16 + 3 {
                self.table.prefetch(self.next_descriptor.wrapping_add(ahead));
                ahead += 4;
            }
        } else {
            for ahead in 0..n as u16 {
                self.table.prefetch(self.avail.entry(self.next.wrapping_add(ahead)));
            }
        }
        Ok(n)
    }

    #[inline(always)]
    fn fetch(&mut self, want: usize) -> Result<usize, RingError> {
        let have = self.stock.len();
        // The driver has read this line: fetched now, it is here when it is to be written.
        self.used.prefetch(self.used_next);
        if have >= want {
            return Ok(have);
        }
        let missing = want - have;
        if usize::from(self.seen.wrapping_sub(self.next)) < missing {
            self.refresh()?;
        }
        let mut left = usize::from(self.seen.wrapping_sub(self.next)).min(missing);
        while left > 0 {
            let (taken, stop) = self.fetch_singles(left)?;
            left -= taken;
            if let Some((head, d)) = stop {
                if !self.walk(head, d)? {
                    break;
                }
                left -= 1;
            } else if taken == 0 {
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
            // One element stands for the batch: at its beginning, with the id of its last chain (section 2.7.9).
            let id = self.stock.get(n - 1).id;
            self.put(id, 0);
            self.used_next = self.used_next.wrapping_add(n as u16);
        } else {
            for i in 0..n {
                let id = self.stock.get(i).id;
                self.put(id, 0);
                self.used_next = self.used_next.wrapping_add(1);
            }
        }
        self.stock.pop(n);
    }

    #[inline(always)]
    fn use_written(&mut self, written: u32) {
        if self.stock.is_empty() {
            return;
        }
        let id = self.stock.get(0).id;
        self.put(id, written);
        self.used_next = self.used_next.wrapping_add(1);
        self.stock.pop(1);
    }

    fn take(&mut self) -> Option<Taken> {
        self.stock.take()
    }

    fn use_taken(&mut self, chain: Taken, written: u32) {
        self.put(chain.id, written);
        self.used_next = self.used_next.wrapping_add(1);
    }

    #[inline(always)]
    fn make_visible(&mut self) -> bool {
        if self.published == self.used_next {
            return false;
        }
        self.used.publish(self.used_next);
        self.published = self.used_next;
        if let (Some(log), Some(at)) = (&self.setup.log, self.setup.log_used) {
            log.mark(at, 4);
        }
        true
    }

    #[inline(always)]
    fn notification_wanted(&mut self) -> bool {
        let (old, new) = (self.asked, self.published);
        self.asked = new;
        if self.event_idx {
            need_event(self.avail.used_event(), new, old)
        } else {
            self.avail.flags() & Avail::NO_INTERRUPT == 0
        }
    }

    fn set_notify(&mut self, on: bool) {
        let written_at = if self.event_idx {
            // Off: an index that was passed long ago, so that the driver stays quiet for the next 65,535 chains.
            let event = if on { self.next } else { self.next.wrapping_sub(1) };
            self.used.set_avail_event(event);
            Used::offset(self.size)
        } else {
            self.used.set_flags(if on { 0 } else { Used::NO_NOTIFY });
            0
        };
        if let (Some(log), Some(at)) = (&self.setup.log, self.setup.log_used) {
            log.mark(at.saturating_add(written_at as u64), 2);
        }
        full_fence();
    }

    #[inline(always)]
    fn prefetch_ahead(&self, descriptors: u16) {
        if self.in_order {
            let mut ahead = 0;
            while ahead < descriptors {
                self.table.prefetch(self.next_descriptor.wrapping_add(ahead));
                ahead += 4;
            }
        }
    }

    fn base(&self) -> u32 {
        u32::from(self.used_next)
    }
}
