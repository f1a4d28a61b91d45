//! Typed views of the areas of a packed virtqueue (virtio 1.3, sections 2.8.13 and 2.8.14), seen by the device.
//!
//! Positions are kept below the ring size by whoever counts them; a position that is not is taken as 0, so that none can
//! leave the area.

use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use super::HostRange;
use super::copy::{prefetch_read, prefetch_write};
use super::split::{DESCRIPTOR, Descriptor, read_descriptor};

/// AVAIL bit of a descriptor's flags.
pub const AVAIL: u16 = 1 << 7;
/// USED bit of a descriptor's flags.
pub const USED: u16 = 1 << 15;

/// The descriptor ring.
#[derive(Clone, Copy)]
pub struct Ring {
    at: *mut u8,
    size: u16,
}

impl Ring {
    /// A view of `range`; `None` if it is too small for `size` descriptors, or misaligned.
    pub fn new(range: HostRange, size: u16) -> Option<Self> {
        let fits = size > 0
            && range.len >= usize::from(size) * DESCRIPTOR
            && (range.ptr as usize).is_multiple_of(DESCRIPTOR);
        fits.then_some(Self { at: range.ptr, size })
    }

    #[inline(always)]
    fn slot(&self, position: u16) -> *mut u8 {
        let inside = if position < self.size { position } else { 0 };
        self.at.wrapping_add(usize::from(inside) * DESCRIPTOR)
    }

    /// The flags of the descriptor at `position` alone; what it says may be read after this (acquire).
    #[inline(always)]
    pub fn flags(&self, position: u16) -> u16 {
        // SAFETY: inside the area that `new` checked; 14 is even.
        unsafe { AtomicU16::from_ptr(self.slot(position).add(14) as *mut u16) }.load(Ordering::Acquire)
    }

    /// The descriptor at `position`, in one load: its flags are as old as the rest.
    #[inline(always)]
    pub fn get(&self, position: u16) -> Descriptor {
        // SAFETY: inside the area that `new` checked, and aligned.
        unsafe { read_descriptor(self.slot(position)) }
    }

    /// Writes the second half of the used descriptor at `position` in one store: length, id << 32, flags << 48. The address is
    /// left as it was. All that was written before is visible to whoever sees it (release).
    #[inline(always)]
    pub fn put(&self, position: u16, word: u64) {
        // SAFETY: inside the area that `new` checked; offset 8 of an aligned descriptor is aligned to 8.
        unsafe { AtomicU64::from_ptr(self.slot(position).add(8) as *mut u64) }.store(word, Ordering::Release);
    }

    /// Starts fetching the cache line of the descriptor at `position`, at most a lap ahead, to read or to write it.
    #[inline(always)]
    pub fn prefetch_at(&self, position: u16, write: bool) {
        let slot = self.slot(if position >= self.size { position - self.size } else { position });
        if write { prefetch_write(slot) } else { prefetch_read(slot) }
    }
}

/// An event suppression area: 2 bytes descriptor offset and wrap counter, 2 bytes flags.
#[derive(Clone, Copy)]
pub struct Events {
    at: *mut u8,
}

impl Events {
    /// Bytes of the area.
    pub const BYTES: usize = 4;
    /// Notify for everything.
    pub const ENABLE: u16 = 0;
    /// Notify for nothing.
    pub const DISABLE: u16 = 1;
    /// Notify for one descriptor (with EVENT_IDX).
    pub const DESCRIPTOR: u16 = 2;

    /// A view of `range`; `None` if it is too small or misaligned.
    pub fn new(range: HostRange) -> Option<Self> {
        (range.len >= Self::BYTES && (range.ptr as usize).is_multiple_of(4)).then_some(Self { at: range.ptr })
    }

    /// Offset with wrap counter (bit 15), and flags, as the other side set them.
    #[inline(always)]
    pub fn get(&self) -> (u16, u16) {
        // SAFETY: 4 aligned bytes that `new` checked.
        let v =
            unsafe { std::sync::atomic::AtomicU32::from_ptr(self.at as *mut u32) }.load(Ordering::Relaxed);
        (v as u16, (v >> 16) as u16 & 3)
    }

    /// Sets both.
    pub fn set(&self, offset_wrap: u16, flags: u16) {
        let v = u32::from(offset_wrap) | u32::from(flags) << 16;
        // SAFETY: 4 aligned bytes that `new` checked.
        unsafe { std::sync::atomic::AtomicU32::from_ptr(self.at as *mut u32) }.store(v, Ordering::Relaxed);
    }
}
