//! Memory that this process shares with nobody: ordinary pages, joined to 2 MiB ones as they are touched.
//!
//! Owns an anonymous mapping. Costs nothing until it is used, unless it is to be present from the start; never hands out a
//! reference to the bytes: a guest may change them.

use std::num::NonZeroUsize;
use std::ptr::NonNull;

use super::{
    JOINED, MemoryError, NODE_HINT, POPULATE_HINT, Pages, advise, bind, check_available, in_shares, lock, map,
};

/// Memory of this process, unmapped when dropped.
#[derive(Debug)]
pub struct OwnMemory {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to no thread; access to it is through raw pointers, whose users answer for it.
unsafe impl Send for OwnMemory {}
// SAFETY: as above; `&OwnMemory` gives nothing but addresses.
unsafe impl Sync for OwnMemory {}

impl OwnMemory {
    /// At least `size` bytes (rounded up to whole pages), all zero, on memory node `node` if one is given; all present if
    /// `present`.
    ///
    /// # Errors
    /// There is too little memory, with figures; or the kernel refuses a step.
    pub fn new(size: usize, node: Option<u32>, present: bool) -> Result<Self, MemoryError> {
        let len = size.checked_next_multiple_of(Pages::Ordinary.size());
        let len = len.filter(|&len| isize::try_from(len).is_ok());
        let len = len.and_then(NonZeroUsize::new).ok_or(MemoryError::Size(size))?;
        check_available(len.get(), Pages::Ordinary, node)?;
        let kernel = |doing, hint| {
            move |e: nix::Error| MemoryError::Kernel { doing, size: len.get(), source: e.into(), hint }
        };
        let start = map(None, len, Pages::Ordinary).map_err(kernel("cannot map memory", ""))?;
        // From here on, dropping `memory` unmaps it.
        let memory = Self { start, len: len.get() };
        if let Some(node) = node {
            bind(start, len.get(), node).map_err(kernel("cannot bind memory to its node", NODE_HINT))?;
        }
        let all = |advice| advise(start, 0, len.get(), advice);
        all(libc::MADV_DONTDUMP).map_err(kernel("cannot keep memory out of core dumps", ""))?;
        // A kernel without transparent huge pages says no, and nothing is lost.
        let _ = all(libc::MADV_HUGEPAGE);
        if present {
            in_shares(memory.len, JOINED, |from, to| memory.fill(from, to))
                .map_err(kernel("cannot fill memory", POPULATE_HINT))?;
        }
        Ok(memory)
    }

    /// Makes a part present.
    fn fill(&self, from: usize, to: usize) -> nix::Result<()> {
        advise(self.start, from, to - from, libc::MADV_POPULATE_WRITE)
    }

    /// Locks every page in memory, which makes it present; see [`super::SharedMemory::lock`].
    ///
    /// # Errors
    /// The process may lock less than this; the message says how to allow it.
    pub fn lock(&self) -> Result<(), MemoryError> {
        lock(self.start, self.len)
    }

    /// The first byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Bytes mapped: what was asked for, rounded up to whole pages.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: memory of no bytes is refused.
    pub fn is_empty(&self) -> bool {
        false
    }
}

impl Drop for OwnMemory {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `new` made; whoever uses its addresses keeps `self` alive.
        let _ = unsafe { nix::sys::mman::munmap(self.start.cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// KiB of the mapping that are present.
    fn present(memory: &OwnMemory) -> u64 {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let head = format!("{:x}-", memory.as_ptr() as usize);
        let of_mapping = smaps.lines().skip_while(|line| !line.starts_with(&head));
        let rss = of_mapping.filter_map(|line| line.strip_prefix("Rss:")).next().unwrap();
        rss.trim().strip_suffix(" kB").unwrap().parse().unwrap()
    }

    #[test]
    fn it_is_there_when_it_is_used_or_from_the_start() {
        let lazy = OwnMemory::new(8 << 20, None, false).unwrap();
        assert_eq!(present(&lazy), 0);
        // SAFETY: the first byte of the mapping, which only this test knows.
        unsafe { lazy.as_ptr().write_volatile(1) };
        assert!((4..=2048).contains(&present(&lazy)));
        let whole = OwnMemory::new(8 << 20, None, true).unwrap();
        assert_eq!(present(&whole), 8 << 10);
        assert!((whole.as_ptr() as usize).is_multiple_of(JOINED));
    }

    #[test]
    fn more_than_there_is_is_refused_with_figures() {
        let text = OwnMemory::new(1 << 46, None, false).unwrap_err().to_string();
        assert!(text.starts_with("needs 67108864 MiB of memory, "), "{text}");
    }
}
