//! A region of registers that is mapped into this process.
//!
//! Owns no mapping: whoever made it keeps it alive through `_owner`.

use std::any::Any;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{Ordering, compiler_fence};

use super::{Bar, GONE, NarrowBar};

/// Mapped registers: a read is a load, a write is a store.
pub struct Mmio {
    base: NonNull<u8>,
    len: u32,
    _owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: registers belong to no thread, and are only accessed with single volatile loads and stores.
unsafe impl Send for Mmio {}
// SAFETY: as above.
unsafe impl Sync for Mmio {}

impl Mmio {
    /// The `len` bytes at `base`.
    ///
    /// # Safety
    /// They are mapped, readable and writable for as long as `owner` lives, aligned to 4 bytes, and no Rust reference points
    /// into them.
    pub unsafe fn new(base: NonNull<u8>, len: u32, owner: Arc<dyn Any + Send + Sync>) -> Self {
        Self { base, len: len & !3, _owner: owner }
    }

    #[inline(always)]
    fn at<T>(&self, offset: u32) -> Option<*mut T> {
        // `len` is a multiple of 4, so an offset below it that is aligned to 4 or fewer bytes has as many.
        (offset < self.len && offset.is_multiple_of(size_of::<T>() as u32))
            .then(|| self.base.as_ptr().wrapping_add(offset as usize).cast())
    }
}

impl Bar for Mmio {
    #[inline(always)]
    fn read32(&self, offset: u32) -> u32 {
        match self.at::<u32>(offset) {
            // SAFETY: four aligned bytes inside the mapping (`at`; `new`'s contract).
            Some(at) => u32::from_le(unsafe { at.read_volatile() }),
            None => GONE,
        }
    }

    #[inline(always)]
    fn write32(&self, offset: u32, value: u32) {
        if let Some(at) = self.at::<u32>(offset) {
            // What was written to memory before is there before the device hears of it: x86 keeps the order of stores, the
            // compiler must too.
            compiler_fence(Ordering::Release);
            // SAFETY: as in `read32`.
            unsafe { at.write_volatile(value.to_le()) }
        }
    }
}

impl NarrowBar for Mmio {
    fn read8(&self, offset: u32) -> u8 {
        // SAFETY: as in `read32`, one byte.
        self.at::<u8>(offset).map_or(u8::MAX, |at| unsafe { at.read_volatile() })
    }

    fn write8(&self, offset: u32, value: u8) {
        if let Some(at) = self.at::<u8>(offset) {
            compiler_fence(Ordering::Release);
            // SAFETY: as in `read32`, one byte.
            unsafe { at.write_volatile(value) }
        }
    }

    fn read16(&self, offset: u32) -> u16 {
        // SAFETY: as in `read32`, two aligned bytes.
        self.at::<u16>(offset).map_or(u16::MAX, |at| u16::from_le(unsafe { at.read_volatile() }))
    }

    fn write16(&self, offset: u32, value: u16) {
        if let Some(at) = self.at::<u16>(offset) {
            compiler_fence(Ordering::Release);
            // SAFETY: as in `read32`, two aligned bytes.
            unsafe { at.write_volatile(value.to_le()) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_outside_of_the_region_read_as_gone_and_swallow_writes() {
        let memory = Arc::new([const { std::sync::atomic::AtomicU32::new(0) }; 4]);
        let base = NonNull::from(&memory[0]).cast();
        // SAFETY: 12 bytes of the array, which its `Arc` keeps; atomics may be written through a shared reference.
        let bar = unsafe { Mmio::new(base, 14, memory.clone()) };
        for offset in [0, 8, 12, 2, u32::MAX - 3] {
            bar.write32(offset, 7);
        }
        assert_eq!([0, 4, 8, 12, 6].map(|o| bar.read32(o)), [7, 0, 7, GONE, GONE]);
        assert_eq!(memory[3].load(Ordering::Relaxed), 0);
    }
}
