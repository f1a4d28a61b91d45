//! Memory that devices read and write: one arena for all network cards that exchange frames.
//!
//! ```text
//!   huge pages, mapped for the devices as one run        ordinary memory, which no device sees
//!   +--------+--------+-----+-----+-----+-- ··· --+      +--------------------------------+
//!   | ring   | ring   | buf | buf | buf |         |      | for each buffer: home pool,    |
//!   +--------+--------+-----+-----+-----+-- ··· --+      | taken?, next in a return path  |
//!     Block             stride of an odd number           +--------------------------------+
//!                       of cache lines
//! ```
//!
//! Owns the memory and its mapping: both go, in this order, when the last user is gone: unmapped, then released. Whoever lets a
//! device loose on it keeps the arena alive until that device is stopped. Hands out addresses, never references: a device may
//! write at any time.

mod block;
mod pool;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use host::memory::{MemoryError, Pages, SharedMemory};

use crate::access::{IovaSpace, MapError};

pub use block::Block;
pub use pool::Pool;

/// Bytes of a buffer, all of them for the frame.
pub const BUFFER: u32 = 2048;

/// From one buffer to the next: an odd number of cache lines, so that the first lines of frames do not all fall into the same
/// few sets of the cache.
const STRIDE: u32 = BUFFER + 64;

/// Pools that an arena can have at a time.
const POOLS: usize = 256;

/// No buffer.
const NONE: u32 = u32::MAX;

/// How an arena is made.
#[derive(Clone, Copy, Debug)]
pub struct ArenaOptions {
    /// Bytes for rings.
    pub rings: usize,
    /// Buffers, of [`BUFFER`] bytes each.
    pub buffers: u32,
    /// Which pages.
    pub pages: Pages,
    /// The memory node of the devices, where that is known.
    pub node: Option<u32>,
}

impl Default for ArenaOptions {
    fn default() -> Self {
        Self { rings: 256 << 10, buffers: 8192, pages: Pages::Auto, node: None }
    }
}

/// Why there is no memory for a device.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum ArenaError {
    #[error("cannot make the cards' memory: {0}")]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Map(#[from] MapError),
    #[error("{0} buffers are too many: an arena has at most 1048576")]
    TooManyBuffers(u32),
    #[error("the arena has {free} buffers left, {wanted} are needed; make it larger, or the rings shorter")]
    Buffers { wanted: u32, free: u32 },
    #[error("the arena has no {wanted} bytes left for a ring; make it larger, or the rings shorter")]
    Rings { wanted: usize },
    #[error("the arena has {POOLS} pools already: too many queues")]
    Pools,
}

/// What is known of a buffer, outside of its pages.
struct Meta {
    /// The next one in its pool's return path.
    next: AtomicU32,
    /// The pool that it belongs to.
    home: AtomicU32,
    /// Taken out of a burst by a transmit queue. Written by the thread that has the burst, and read by it when the burst ends.
    taken: AtomicBool,
}

/// Memory for rings and buffers, mapped for devices.
pub struct Arena {
    // Unmapped by `drop`, which runs before the fields are: the memory goes after its mapping.
    memory: SharedMemory,
    space: Arc<dyn IovaSpace>,
    iova: u64,
    /// Where the first buffer begins.
    buffers_at: usize,
    meta: Box<[Meta]>,
    /// The top of each pool's return path.
    returns: Box<[Return]>,
    ledger: Mutex<Ledger>,
}

/// A return path's top, on a cache line of its own: other workers push, the owner takes all.
#[repr(align(64))]
struct Return(AtomicU32);

/// What nobody uses.
struct Ledger {
    /// Buffers without a pool.
    buffers: Vec<u32>,
    /// Free runs of ring memory: offset and bytes, in order of offset.
    rings: Vec<(usize, usize)>,
    /// Pool numbers in no use.
    numbers: Vec<u32>,
    /// Pools that were dropped while some of their buffers were under way: number, buffers missing.
    retired: Vec<(u32, u32)>,
}

impl Arena {
    /// Makes an arena and maps it into `space`, as one run. Warns (in the log) where it got ordinary pages.
    ///
    /// # Errors
    /// There is no such memory, or it cannot be mapped.
    pub fn new(options: ArenaOptions, space: Arc<dyn IovaSpace>) -> Result<Arc<Self>, ArenaError> {
        let ArenaOptions { rings, buffers, pages, node } = options;
        if buffers > 1 << 20 {
            return Err(ArenaError::TooManyBuffers(buffers));
        }
        let buffers_at = rings.next_multiple_of(4096);
        let memory = SharedMemory::new(buffers_at + buffers as usize * STRIDE as usize, pages, node)?;
        if memory.pages() == Pages::Ordinary {
            tracing::warn!(
                "the cards' memory is in {}: set huge pages aside (echo {} > /proc/sys/vm/nr_hugepages) for speed",
                memory.pages(),
                memory.len().div_ceil(2 << 20),
            );
        }
        let iova = space.map(&memory)?;
        let meta =
            || Meta { next: AtomicU32::new(NONE), home: AtomicU32::new(NONE), taken: AtomicBool::new(false) };
        let ledger = Ledger {
            buffers: (0..buffers).rev().collect(),
            rings: vec![(0, buffers_at)],
            numbers: (0..POOLS as u32).rev().collect(),
            retired: Vec::new(),
        };
        Ok(Arc::new(Self {
            memory,
            space,
            iova,
            buffers_at,
            meta: (0..buffers).map(|_| meta()).collect(),
            returns: (0..POOLS).map(|_| Return(AtomicU32::new(NONE))).collect(),
            ledger: Mutex::new(ledger),
        }))
    }

    /// The addresses that devices know this memory by.
    pub fn space(&self) -> &Arc<dyn IovaSpace> {
        &self.space
    }

    /// The pages that it got; never [`Pages::Auto`].
    pub fn pages(&self) -> Pages {
        self.memory.pages()
    }

    /// The first byte of buffer `index`, which is one of this arena's.
    #[inline(always)]
    pub fn ptr(&self, index: u32) -> *mut u8 {
        debug_assert!((index as usize) < self.meta.len());
        self.memory.as_ptr().wrapping_add(self.offset(index))
    }

    /// The same, as devices know it.
    #[inline(always)]
    pub fn iova(&self, index: u32) -> u64 {
        self.iova + self.offset(index) as u64
    }

    #[inline(always)]
    fn offset(&self, index: u32) -> usize {
        self.buffers_at + index as usize * STRIDE as usize
    }

    /// The device's address of `ptr`, a byte of this arena.
    #[inline(always)]
    pub fn iova_of(&self, ptr: *const u8) -> u64 {
        self.iova + ptr.addr().wrapping_sub(self.memory.as_ptr().addr()) as u64
    }

    /// The buffer that `ptr` lies in, if it lies in one.
    #[inline(always)]
    pub fn buffer_of(&self, ptr: *const u8) -> Option<u32> {
        let first = self.memory.as_ptr().addr() + self.buffers_at;
        let index = ptr.addr().wrapping_sub(first) / STRIDE as usize;
        (index < self.meta.len()).then_some(index as u32)
    }

    /// Takes buffer `index` out of the burst that holds it; false if somebody did already. Only by the thread that has the
    /// burst.
    #[inline(always)]
    pub fn take_out(&self, index: u32) -> bool {
        match self.meta.get(index as usize) {
            Some(meta) if !meta.taken.load(Ordering::Relaxed) => {
                meta.taken.store(true, Ordering::Relaxed);
                true
            }
            _ => false,
        }
    }

    /// Whether buffer `index` could still be taken out.
    pub fn is_in_burst(&self, index: u32) -> bool {
        self.meta.get(index as usize).is_some_and(|meta| !meta.taken.load(Ordering::Relaxed))
    }

    /// Whether buffer `index` was taken out of the burst that ends now; forgets it.
    #[inline(always)]
    pub fn was_taken_out(&self, index: u32) -> bool {
        let Some(meta) = self.meta.get(index as usize) else { return false };
        let taken = meta.taken.load(Ordering::Relaxed);
        if taken {
            meta.taken.store(false, Ordering::Relaxed);
        }
        taken
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        self.space.unmap(self.iova, self.memory.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Notes what is mapped and unmapped, and whether the memory was still there.
    #[derive(Default)]
    pub(super) struct Noted(pub(super) Mutex<Vec<String>>);

    impl IovaSpace for Noted {
        fn map(&self, memory: &SharedMemory) -> Result<u64, MapError> {
            self.0.lock().unwrap().push(format!("map {}", memory.len()));
            Ok(0x1_0000_0000)
        }
        fn unmap(&self, iova: u64, len: usize) {
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            let there = maps.contains("memfd:cableway");
            self.0.lock().unwrap().push(format!("unmap {iova:#x} {len}, memory there: {there}"));
        }
    }

    fn options(buffers: u32) -> ArenaOptions {
        ArenaOptions { rings: 8192, buffers, pages: Pages::Ordinary, node: None }
    }

    #[test]
    fn an_arena_is_mapped_once_and_unmapped_before_its_memory_goes() {
        let space = Arc::new(Noted::default());
        let arena = Arena::new(options(100), space.clone()).unwrap();
        let len = arena.memory.len();
        let pool = Pool::new(&arena, 10).unwrap();
        drop(arena);
        assert_eq!(*space.0.lock().unwrap(), [format!("map {len}")]);
        drop(pool);
        assert_eq!(
            space.0.lock().unwrap()[1],
            format!("unmap 0x100000000 {len}, memory there: true"),
            "once, and before the memory"
        );
    }

    #[test]
    fn every_byte_of_a_buffer_and_none_beside_the_buffers_leads_back_to_it() {
        let arena = Arena::new(options(3), Arc::new(Noted::default())).unwrap();
        for index in 0..3 {
            let ptr = arena.ptr(index);
            assert_eq!(
                (arena.buffer_of(ptr), arena.buffer_of(ptr.wrapping_add(2047))),
                (Some(index), Some(index))
            );
            assert_eq!(arena.iova(index) - 0x1_0000_0000, (ptr.addr() - arena.memory.as_ptr().addr()) as u64);
            assert_eq!(arena.iova_of(ptr), arena.iova(index));
        }
        assert_eq!(arena.buffer_of(arena.ptr(0).wrapping_sub(1)), None);
        assert_eq!(arena.buffer_of(arena.ptr(2).wrapping_add(STRIDE as usize)), None);
        assert_eq!(arena.buffer_of(std::ptr::null()), None);
    }

    #[test]
    fn a_buffer_is_taken_out_of_a_burst_once() {
        let arena = Arena::new(options(3), Arc::new(Noted::default())).unwrap();
        assert!(arena.take_out(1) && !arena.take_out(1) && !arena.take_out(3));
        assert!(arena.was_taken_out(1) && !arena.was_taken_out(1) && !arena.was_taken_out(0));
    }

    #[test]
    fn memory_that_cannot_be_mapped_is_no_arena() {
        struct No;
        impl IovaSpace for No {
            fn map(&self, memory: &SharedMemory) -> Result<u64, MapError> {
                Err(MapError { len: memory.len(), reason: "no".into() })
            }
            fn unmap(&self, _: u64, _: usize) {
                panic!("was never mapped");
            }
        }
        let error = Arena::new(options(1), Arc::new(No)).err().unwrap();
        assert_eq!(error.to_string(), "cannot map 12288 bytes for the device: no");
    }
}
