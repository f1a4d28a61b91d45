//! Typed views of the three areas of a split virtqueue (virtio 1.3, sections 2.7.5 to 2.7.8), seen by the device.
//!
//! Each view holds a pointer to an area that was checked whole when the ring was set up, and the mask of its size: every
//! index is masked here, so no index can leave its area.

use std::arch::x86_64::{__m128i, _mm_extract_epi64};
use std::sync::atomic::{AtomicU16, Ordering};

use super::HostRange;
use super::copy::{prefetch_read, prefetch_write};

/// This descriptor continues in `next`.
pub const DESC_NEXT: u16 = 1;
/// The device writes the buffer.
pub const DESC_WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub const DESC_INDIRECT: u16 = 4;

/// Bytes of one descriptor.
pub const DESCRIPTOR: usize = 16;

/// Bytes of the avail ring of a queue of `size`, with its event field.
pub fn avail_bytes(size: u16) -> usize {
    6 + 2 * usize::from(size)
}

/// Bytes of the used ring of a queue of `size`, with its event field.
pub fn used_bytes(size: u16) -> usize {
    6 + 8 * usize::from(size)
}

/// A descriptor, as it was read. In split rings `a` is flags and `b` next; in packed rings `a` is id and `b` flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes.
    pub len: u32,
    /// Bytes 12..14.
    pub a: u16,
    /// Bytes 14..16.
    pub b: u16,
}

/// Reads the descriptor at `at`, once, in one 16-byte load (atomic on every CPU with AVX: Intel SDM 3A 9.1.1, AMD APM 2 7.3.2).
///
/// # Safety
/// 16 bytes at `at` are mapped and `at` is a multiple of 16.
#[inline(always)]
pub unsafe fn read_descriptor(at: *const u8) -> Descriptor {
    // SAFETY: mapped and aligned (caller).
    let v = unsafe { (at as *const __m128i).read_volatile() };
    // SAFETY: SSE4.1 is part of x86-64-v3, our compile target.
    let (low, high) = unsafe { (_mm_extract_epi64::<0>(v) as u64, _mm_extract_epi64::<1>(v) as u64) };
    Descriptor { address: low, len: high as u32, a: (high >> 32) as u16, b: (high >> 48) as u16 }
}

/// A descriptor table of a power of two of entries.
#[derive(Clone, Copy)]
pub struct Table {
    at: *const u8,
    mask: u16,
}

impl Table {
    /// A view of `range`; `None` if it is too small for `size` (a power of two) descriptors, or misaligned.
    pub fn new(range: HostRange, size: u16) -> Option<Self> {
        let fits = size.is_power_of_two()
            && range.len >= usize::from(size) * DESCRIPTOR
            && (range.ptr as usize).is_multiple_of(DESCRIPTOR);
        fits.then(|| Self { at: range.ptr, mask: size - 1 })
    }

    /// Descriptor `index`, masked to the table.
    #[inline(always)]
    pub fn get(&self, index: u16) -> Descriptor {
        // SAFETY: the masked index is inside the area that `new` checked; the ring's memory outlives this view.
        unsafe { read_descriptor(self.at.add(usize::from(index & self.mask) * DESCRIPTOR)) }
    }

    /// Starts fetching the cache line of descriptor `index`.
    #[inline(always)]
    pub fn prefetch(&self, index: u16) {
        prefetch_read(self.at.wrapping_add(usize::from(index & self.mask) * DESCRIPTOR));
    }
}

/// The avail ring: written by the driver.
#[derive(Clone, Copy)]
pub struct Avail {
    at: *const u8,
    mask: u16,
}

impl Avail {
    /// No interrupts, please (`VIRTQ_AVAIL_F_NO_INTERRUPT`).
    pub const NO_INTERRUPT: u16 = 1;

    /// A view of `range`; `None` if it is too small or misaligned.
    pub fn new(range: HostRange, size: u16) -> Option<Self> {
        let fits = size.is_power_of_two()
            && range.len >= avail_bytes(size)
            && (range.ptr as usize).is_multiple_of(2);
        fits.then(|| Self { at: range.ptr, mask: size - 1 })
    }

    #[inline(always)]
    fn field(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: all offsets used here are inside the area that `new` checked, and even; the memory outlives the view.
        unsafe { AtomicU16::from_ptr(self.at.add(offset) as *mut u16) }
    }

    /// The driver's flags.
    #[inline(always)]
    pub fn flags(&self) -> u16 {
        self.field(0).load(Ordering::Relaxed)
    }

    /// The avail index; entries before it may be read after this (acquire).
    #[inline(always)]
    pub fn index(&self) -> u16 {
        self.field(2).load(Ordering::Acquire)
    }

    /// Entry `position`, masked to the ring.
    #[inline(always)]
    pub fn entry(&self, position: u16) -> u16 {
        self.field(4 + 2 * usize::from(position & self.mask)).load(Ordering::Relaxed)
    }

    /// Starts fetching the cache line of entry `position`.
    #[inline(always)]
    pub fn prefetch(&self, position: u16) {
        prefetch_read(self.at.wrapping_add(4 + 2 * usize::from(position & self.mask)));
    }

    /// used_event: the driver wants a notification when this used index was passed.
    #[inline(always)]
    pub fn used_event(&self) -> u16 {
        self.field(4 + 2 * (usize::from(self.mask) + 1)).load(Ordering::Relaxed)
    }
}

/// The used ring: written by the device.
#[derive(Clone, Copy)]
pub struct Used {
    at: *mut u8,
    mask: u16,
}

impl Used {
    /// No notifications, please (`VIRTQ_USED_F_NO_NOTIFY`).
    pub const NO_NOTIFY: u16 = 1;

    /// A view of `range`; `None` if it is too small or misaligned.
    pub fn new(range: HostRange, size: u16) -> Option<Self> {
        let fits =
            size.is_power_of_two() && range.len >= used_bytes(size) && (range.ptr as usize).is_multiple_of(4);
        fits.then(|| Self { at: range.ptr, mask: size - 1 })
    }

    #[inline(always)]
    fn field(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: all offsets used here are inside the area that `new` checked, and even; the memory outlives the view.
        unsafe { AtomicU16::from_ptr(self.at.add(offset) as *mut u16) }
    }

    /// Writes element `position` (masked): descriptor chain `id` is used, `len` bytes were written. Not visible to the
    /// driver before [`Used::publish`].
    #[inline(always)]
    pub fn put(&self, position: u16, id: u16, len: u32) {
        let at = self.at.wrapping_add(Self::offset(position & self.mask));
        let element = u64::from(id) | u64::from(len) << 32;
        // The ring is only guaranteed to be aligned to 4: one store that may be unaligned is what every driver expects, since
        // it reads an element only after the index was published.
        // SAFETY: inside the area that `new` checked; x86 allows unaligned stores.
        unsafe {
            std::arch::asm!("mov [{}], {}", in(reg) at, in(reg) element, options(nostack, preserves_flags))
        };
    }

    /// Starts fetching the line that writing element `position` will write. Not that of the index: the driver watches it, and
    /// would have it back before it is written.
    #[inline(always)]
    pub fn prefetch(&self, position: u16) {
        prefetch_write(self.at.wrapping_add(Self::offset(position & self.mask)));
    }

    /// Offset of element `position` (already masked) in the area.
    #[inline(always)]
    pub fn offset(position: u16) -> usize {
        4 + 8 * usize::from(position)
    }

    /// The used index as it stands.
    pub fn index(&self) -> u16 {
        self.field(2).load(Ordering::Relaxed)
    }

    /// Makes all elements before `index` visible to the driver (release).
    #[inline(always)]
    pub fn publish(&self, index: u16) {
        self.field(2).store(index, Ordering::Release);
    }

    /// Sets the device's flags.
    pub fn set_flags(&self, flags: u16) {
        self.field(0).store(flags, Ordering::Relaxed);
    }

    /// avail_event: we want a notification when this avail index was passed.
    pub fn set_avail_event(&self, index: u16) {
        self.field(4 + 8 * (usize::from(self.mask) + 1)).store(index, Ordering::Relaxed);
    }
}
