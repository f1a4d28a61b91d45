//! The dirty log of a live migration (vhost-user, "Migration").
//!
//! Owns the bitmap that front end and back end share. Bits are only ever set here; the front end clears them.

use std::any::Any;
use std::sync::atomic::{AtomicU8, Ordering};

/// Bytes of guest memory that one bit of the dirty log stands for (vhost-user: `VHOST_LOG_PAGE`).
pub const LOG_PAGE: u64 = 4096;

/// A dirty log: one bit a 4 KiB page, set for every page that the device writes (live migration).
pub struct DirtyLog {
    base: *const AtomicU8,
    len: usize,
    _mapping: Box<dyn Any + Send + Sync>,
}

// SAFETY: the bitmap is only touched by atomic operations, and `_mapping` keeps it mapped.
unsafe impl Send for DirtyLog {}
// SAFETY: as above.
unsafe impl Sync for DirtyLog {}

impl DirtyLog {
    /// A log of `len` bytes at `base`.
    ///
    /// # Safety
    /// `len` bytes at `base` stay mapped readable and writable for as long as `mapping` is not dropped.
    pub unsafe fn new(base: *mut u8, len: usize, mapping: Box<dyn Any + Send + Sync>) -> Self {
        Self { base: base as *const AtomicU8, len, _mapping: mapping }
    }

    /// Marks the pages of `len` bytes at guest-physical `addr`. Pages beyond the log are ignored, as the front end asked.
    pub fn mark(&self, addr: u64, len: u64) {
        if len == 0 {
            return;
        }
        let last = addr.saturating_add(len - 1) / LOG_PAGE;
        let mut page = addr / LOG_PAGE;
        while page <= last && page / 8 < self.len as u64 {
            // SAFETY: `page / 8 < self.len`, and the log is mapped as long as `self` lives (`new`).
            let byte = unsafe { &*self.base.add((page / 8) as usize) };
            let bit = 1 << (page % 8);
            if byte.load(Ordering::Relaxed) & bit == 0 {
                byte.fetch_or(bit, Ordering::Relaxed);
            }
            page += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(bytes: usize) -> (DirtyLog, *const u8) {
        let bitmap: Box<[u8]> = vec![0; bytes].into();
        let base = Box::leak(bitmap).as_mut_ptr();
        // SAFETY: the leaked bitmap lives for ever.
        (unsafe { DirtyLog::new(base, bytes, Box::new(())) }, base)
    }

    fn bytes(base: *const u8, n: usize) -> Vec<u8> {
        // SAFETY: `base` is the leaked bitmap of at least `n` bytes.
        (0..n).map(|i| unsafe { base.add(i).read_volatile() }).collect()
    }

    #[test]
    fn every_page_that_a_write_touches_is_marked_and_no_other() {
        let (log, base) = log(4);
        log.mark(4095, 2);
        log.mark(9 * 4096, 1);
        log.mark(3 * 4096, 0);
        assert_eq!(bytes(base, 4), [0b11, 0b10, 0, 0]);
    }

    #[test]
    fn cve_2020_10722_pages_beyond_the_log_or_the_address_space_are_ignored() {
        let (log, base) = log(1);
        log.mark(8 * 4096, 4096);
        log.mark(u64::MAX, u64::MAX);
        log.mark(7 * 4096, u64::MAX);
        assert_eq!(bytes(base, 1), [0x80]);
    }
}
