//! Ring memory as the driver touches it: atomic loads and stores at a byte offset, nothing else.
//!
//! The device at the other end is another process that may write anything at any time, so no reference to the bytes
//! is ever made and no value is read twice by this module. Under `cfg(loom)` the same operations go to cells that loom watches.

pub(super) use imp::{Area, full_fence};

#[cfg(not(loom))]
mod imp {
    use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

    use crate::memory::HostRange;

    pub(in crate::driver) use crate::memory::copy::full_fence;

    /// One of the areas of a ring.
    pub(in crate::driver) struct Area {
        base: *mut u8,
        len: usize,
    }

    // SAFETY: all access is atomic; the ring that owns the area keeps its memory mapped.
    unsafe impl Send for Area {}

    impl Area {
        /// # Safety
        /// The range stays mapped readable and writable as long as the area lives, `ptr` is aligned to 16 bytes, and
        /// no Rust reference to it exists.
        pub(in crate::driver) unsafe fn new(range: &HostRange) -> Self {
            Self { base: range.ptr, len: range.len }
        }

        #[inline(always)]
        fn at(&self, offset: usize, bytes: usize) -> *mut u8 {
            debug_assert!(offset + bytes <= self.len && offset.is_multiple_of(bytes));
            self.base.wrapping_add(offset)
        }

        /// # Safety
        /// `offset` is a multiple of 2, and 2 bytes there lie in the area.
        #[inline(always)]
        pub(in crate::driver) unsafe fn load16(&self, offset: usize, order: Ordering) -> u16 {
            // SAFETY: in the area and aligned (caller); mapped (`new`).
            unsafe { AtomicU16::from_ptr(self.at(offset, 2).cast()) }.load(order)
        }

        /// # Safety
        /// As [`Area::load16`].
        #[inline(always)]
        pub(in crate::driver) unsafe fn store16(&self, offset: usize, value: u16, order: Ordering) {
            // SAFETY: as in `load16`.
            unsafe { AtomicU16::from_ptr(self.at(offset, 2).cast()) }.store(value, order);
        }

        /// # Safety
        /// `offset` is a multiple of 4, and 4 bytes there lie in the area.
        #[inline(always)]
        pub(in crate::driver) unsafe fn load32(&self, offset: usize, order: Ordering) -> u32 {
            // SAFETY: in the area and aligned (caller); mapped (`new`).
            unsafe { AtomicU32::from_ptr(self.at(offset, 4).cast()) }.load(order)
        }

        /// # Safety
        /// `offset` is a multiple of 8, and 8 bytes there lie in the area.
        #[inline(always)]
        pub(in crate::driver) unsafe fn load64(&self, offset: usize, order: Ordering) -> u64 {
            // SAFETY: in the area and aligned (caller); mapped (`new`).
            unsafe { AtomicU64::from_ptr(self.at(offset, 8).cast()) }.load(order)
        }

        /// # Safety
        /// As [`Area::load64`].
        #[inline(always)]
        pub(in crate::driver) unsafe fn store64(&self, offset: usize, value: u64, order: Ordering) {
            // SAFETY: as in `load64`.
            unsafe { AtomicU64::from_ptr(self.at(offset, 8).cast()) }.store(value, order);
        }

        /// Zeroes the area, as a ring starts.
        pub(in crate::driver) fn clear(&self) {
            // SAFETY: `len` bytes at `base` are mapped writable (`new`); no device runs on a ring that starts.
            unsafe { std::ptr::write_bytes(self.base, 0, self.len) };
        }
    }
}

#[cfg(loom)]
mod imp {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use loom::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

    pub(in crate::driver) fn full_fence() {
        fence(Ordering::SeqCst);
    }

    enum Cell {
        Two(AtomicU16),
        Four(AtomicU32),
        Eight(AtomicU64),
    }

    /// One of the areas of a ring: cells of fixed widths. A clone is another view of the same cells.
    #[derive(Clone)]
    pub(in crate::driver) struct Area {
        cells: Arc<BTreeMap<usize, Cell>>,
    }

    impl Area {
        /// Cells one after the other, of these widths in bytes (2, 4 or 8), all zero.
        pub(in crate::driver) fn of(widths: impl IntoIterator<Item = usize>) -> Self {
            let mut cells = BTreeMap::new();
            let mut at = 0;
            for width in widths {
                let cell = match width {
                    2 => Cell::Two(AtomicU16::new(0)),
                    4 => Cell::Four(AtomicU32::new(0)),
                    _ => Cell::Eight(AtomicU64::new(0)),
                };
                cells.insert(at, cell);
                at += width;
            }
            Self { cells: Arc::new(cells) }
        }

        fn cell(&self, offset: usize) -> &Cell {
            self.cells.get(&offset).unwrap_or_else(|| panic!("no cell at {offset}"))
        }

        pub(in crate::driver) unsafe fn load16(&self, offset: usize, order: Ordering) -> u16 {
            let Cell::Two(c) = self.cell(offset) else { panic!("width at {offset}") };
            c.load(order)
        }

        pub(in crate::driver) unsafe fn store16(&self, offset: usize, value: u16, order: Ordering) {
            let Cell::Two(c) = self.cell(offset) else { panic!("width at {offset}") };
            c.store(value, order);
        }

        pub(in crate::driver) unsafe fn load32(&self, offset: usize, order: Ordering) -> u32 {
            let Cell::Four(c) = self.cell(offset) else { panic!("width at {offset}") };
            c.load(order)
        }

        pub(in crate::driver) unsafe fn store32(&self, offset: usize, value: u32, order: Ordering) {
            let Cell::Four(c) = self.cell(offset) else { panic!("width at {offset}") };
            c.store(value, order);
        }

        pub(in crate::driver) unsafe fn load64(&self, offset: usize, order: Ordering) -> u64 {
            let Cell::Eight(c) = self.cell(offset) else { panic!("width at {offset}") };
            c.load(order)
        }

        pub(in crate::driver) unsafe fn store64(&self, offset: usize, value: u64, order: Ordering) {
            let Cell::Eight(c) = self.cell(offset) else { panic!("width at {offset}") };
            c.store(value, order);
        }
    }
}
