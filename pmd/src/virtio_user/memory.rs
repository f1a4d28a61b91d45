//! The memory that a virtio-user device shares with its back end: rings first, then the buffers.
//!
//! Owns the plan of what lies where. The back end maps all of it and may write anything at any time, so that nothing here
//! makes a reference to the bytes: they are copied in and out by [`virtio::memory::copy`].

use std::sync::Arc;

use host::memory::{MemoryError, Pages, SharedMemory};
use virtio::device::{Direction, Layout};
use virtio::driver::{AreaSizes, DriverSetup, IndirectTables};
use virtio::features;
use virtio::memory::HostRange;

/// Where the back end sees the first byte (guest-physical).
pub(super) const GUEST_BASE: u64 = 1 << 32;

/// Where a frame begins in its buffer, so that its first 64 bytes are one cache line. The virtio-net header lies directly
/// before it, in a line of its own: as long as headers do not change, that line is read by both sides and moved by none.
pub(super) const HEADROOM: usize = 64;

/// Most buffers of one frame that is transmitted: 64 KiB in buffers of 2 KiB, and some more.
pub(super) const MAX_PIECES: u16 = 64;

/// What is planned for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) layout: Layout,
    pub(super) queue_size: u16,
    pub(super) queue_pairs: u16,
    pub(super) buffers: u32,
    pub(super) buffer_size: u32,
}

/// Byte offsets of what a ring needs.
#[derive(Clone, Copy, Debug)]
struct RingAt {
    descriptors: usize,
    driver: usize,
    device: usize,
    tables: usize,
    end: usize,
}

impl Plan {
    /// Bytes from one buffer to the next: an odd number of cache lines, so that the same line of neighbouring buffers falls
    /// into different sets of the caches.
    fn stride(&self) -> usize {
        ((self.buffer_size as usize).div_ceil(64) | 1) * 64
    }

    /// Each area in cache lines of its own: the two sides write different ones.
    fn ring_at(&self, queue: u16) -> RingAt {
        let sizes = AreaSizes::of(self.layout, self.queue_size);
        let line = |n: usize| n.next_multiple_of(64);
        // 128: the adjacent-line prefetcher fetches lines in pairs.
        let apart = |n: usize| n.next_multiple_of(128);
        let tables = 16 * usize::from(MAX_PIECES) * usize::from(self.queue_size);
        let each = apart(line(sizes.descriptors)) + apart(sizes.driver) + apart(sizes.device) + tables;
        let descriptors = usize::from(queue) * apart(each);
        let driver = descriptors + apart(line(sizes.descriptors));
        let device = driver + apart(sizes.driver);
        let tables = device + apart(sizes.device);
        RingAt { descriptors, driver, device, tables, end: descriptors + apart(each) }
    }

    fn buffers_at(&self) -> usize {
        self.ring_at(2 * self.queue_pairs - 1).end.next_multiple_of(4096)
    }

    fn bytes(&self) -> usize {
        self.buffers_at() + self.stride() * self.buffers as usize
    }
}

/// The memory of one device.
pub(super) struct DeviceMemory {
    shared: SharedMemory,
    plan: Plan,
}

/// Where the areas of a ring are.
pub(super) struct RingRanges {
    pub(super) descriptors: HostRange,
    pub(super) driver: HostRange,
    pub(super) device: HostRange,
    tables: HostRange,
}

impl DeviceMemory {
    pub(super) fn new(plan: Plan, pages: Pages) -> Result<Arc<Self>, MemoryError> {
        let shared = SharedMemory::new(plan.bytes(), pages, None)?;
        Ok(Arc::new(Self { shared, plan }))
    }

    pub(super) fn shared(&self) -> &SharedMemory {
        &self.shared
    }

    /// The areas of virtqueue `queue` (2n receives, 2n + 1 transmits), which is below twice the number of pairs.
    pub(super) fn ring(&self, queue: u16) -> RingRanges {
        let at = self.plan.ring_at(queue);
        let sizes = AreaSizes::of(self.plan.layout, self.plan.queue_size);
        let range = |offset: usize, len| HostRange {
            ptr: self.shared.as_ptr().wrapping_add(offset),
            len,
            guest: GUEST_BASE + offset as u64,
        };
        RingRanges {
            descriptors: range(at.descriptors, sizes.descriptors),
            driver: range(at.driver, sizes.driver),
            device: range(at.device, sizes.device),
            tables: range(at.tables, 16 * usize::from(MAX_PIECES) * usize::from(self.plan.queue_size)),
        }
    }

    /// The driver side of virtqueue `queue`, to be started on zeroed areas.
    pub(super) fn setup(self: &Arc<Self>, queue: u16, negotiated: u64) -> DriverSetup {
        let ring = self.ring(queue);
        DriverSetup {
            layout: if negotiated & features::RING_PACKED != 0 { Layout::Packed } else { Layout::Split },
            direction: if queue.is_multiple_of(2) { Direction::Write } else { Direction::Read },
            size: self.plan.queue_size,
            features: negotiated,
            descriptors: ring.descriptors,
            driver: ring.driver,
            device: ring.device,
            indirect: Some(IndirectTables { range: ring.tables, entries: MAX_PIECES }),
            mapping: self.clone(),
        }
    }

    /// Where the buffers are.
    pub(super) fn buffers(&self) -> Buffers {
        let at = self.plan.buffers_at();
        Buffers {
            base: self.shared.as_ptr().wrapping_add(at),
            guest: GUEST_BASE + at as u64,
            stride: self.plan.stride() as u32,
            size: self.plan.buffer_size,
            count: self.plan.buffers,
        }
    }
}

/// The array of buffers: addresses, no bytes.
#[derive(Clone, Copy)]
pub(super) struct Buffers {
    base: *mut u8,
    guest: u64,
    stride: u32,
    /// Bytes of each.
    pub(super) size: u32,
    /// How many.
    pub(super) count: u32,
}

// SAFETY: only addresses; the memory is shared with another process anyway, and is only accessed by copy routines.
unsafe impl Send for Buffers {}

impl Buffers {
    /// The first byte of buffer `index`, which is below `count`.
    #[inline(always)]
    pub(super) fn ptr(&self, index: u32) -> *mut u8 {
        debug_assert!(index < self.count);
        self.base.wrapping_add(index as usize * self.stride as usize)
    }

    /// The same, as the back end knows it.
    #[inline(always)]
    pub(super) fn guest(&self, index: u32) -> u64 {
        self.guest + u64::from(index) * u64::from(self.stride)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_and_buffers_lie_apart_and_inside_the_memory() {
        for (layout, queue_size) in [(Layout::Split, 256), (Layout::Packed, 100), (Layout::Packed, 1)] {
            let plan = Plan { layout, queue_size, queue_pairs: 3, buffers: 100, buffer_size: 2048 };
            let memory = DeviceMemory::new(plan, Pages::Ordinary).unwrap();
            let start = memory.shared.as_ptr().addr();
            let mut taken: Vec<(usize, usize)> = Vec::new();
            for queue in 0..6 {
                let r = memory.ring(queue);
                for range in [r.descriptors, r.driver, r.device, r.tables] {
                    assert!(range.ptr.addr().is_multiple_of(64));
                    assert_eq!(range.guest - GUEST_BASE, (range.ptr.addr() - start) as u64);
                    taken.push((range.ptr.addr(), range.ptr.addr() + range.len));
                }
            }
            let buffers = memory.buffers();
            taken.extend((0..100).map(|i| (buffers.ptr(i).addr(), buffers.ptr(i).addr() + 2048)));
            taken.sort_unstable();
            assert!(taken.windows(2).all(|w| w[0].1 <= w[1].0), "overlap");
            assert!(taken.last().unwrap().1 <= start + memory.shared.len());
        }
    }
}
