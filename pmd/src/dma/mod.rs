//! Memory that devices read and write: one arena for all network cards that exchange frames.
//!
//! ```text
//!   huge pages, mapped for the devices as one run        ordinary memory, which no device sees
//!   +--------+--------+-----+-----+-----+-- ··· --+      +--------------------------------+
//!   | ring   | ring   | buf | buf | buf |         |      | for each buffer: home pool,    |
//!   +--------+--------+-----+-----+-----+-- ··· --+      | next in a chain, or held       |
//!     Block             stride of an odd number          +--------------------------------+
//!                       of cache lines
//! ```
//!
//! Owns the memory and its mapping: both go, in this order, when the last user is gone: unmapped, then released. Whoever lets a
//! device loose on it keeps the arena alive until that device is stopped. Hands out addresses, never references: a device may
//! write at any time.

mod block;
mod pool;

use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use host::memory::{MemoryError, Pages, SharedMemory};
use host::topology::{self, HugePool};

use crate::access::{IovaSpace, MapError};

pub use block::Block;
pub use pool::{Chain, Pool, Stack};

/// Buffers that an arena can have.
const MOST_BUFFERS: u32 = 1 << 20;

/// Bytes of a buffer, all of them for the frame.
pub const BUFFER: u32 = 2048;

/// From one buffer to the next: an odd number of cache lines, so that the first lines of frames do not all fall into the same
/// few sets of the cache.
const STRIDE: u32 = BUFFER + 64;

/// Pools that an arena can have at a time.
const POOLS: usize = 256;

/// No buffer.
const NONE: u32 = u32::MAX >> 1;

/// In place of the next one: somebody holds the buffer, under a name. The other bits are the number of the pool that the buffer
/// belongs to and the name ([`held`]).
const HELD: u32 = 1 << 31;

/// Bits of a name.
const NAME_BITS: u32 = 16;

/// What stands in place of the next one while somebody holds a buffer of pool `home` under `name`.
#[inline(always)]
const fn held(home: u32, name: u32) -> u32 {
    HELD | home << NAME_BITS | name
}

// All pools have numbers that fit, and no number of a buffer looks held.
const _: () = assert!(POOLS << NAME_BITS < HELD as usize && MOST_BUFFERS < HELD);

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
    #[error("{0} buffers are too many: an arena has at most {MOST_BUFFERS}")]
    TooManyBuffers(u32),
    #[error("the arena has {free} buffers left, {wanted} are needed; make it larger, or the rings shorter")]
    Buffers { wanted: u32, free: u32 },
    #[error("the arena has no {wanted} bytes left for a ring; make it larger, or the rings shorter")]
    Rings { wanted: usize },
    #[error("the arena has {POOLS} pools already: too many queues")]
    Pools,
}

/// What is known of a buffer. Relaxed: the threads that pass buffers on do so by a return path, or by a ring.
struct Link {
    /// The next one in a stack, a chain or a return path; or that somebody holds it.
    next: AtomicU32,
    /// The pool that it belongs to.
    home: AtomicU32,
}

/// An arena as a loop uses it: what it needs, at hand.
#[derive(Clone, Copy)]
pub struct View<'a> {
    /// Where the first buffer begins.
    first: usize,
    /// From an address of this process to one of the devices, wrapping.
    to_iova: u64,
    memory: &'a SharedMemory,
    links: &'a [Link],
    returns: &'a [Return],
}

impl View<'_> {
    /// The first byte of buffer `index`.
    #[inline(always)]
    pub fn ptr(self, index: u32) -> *mut u8 {
        self.memory.as_ptr().with_addr(self.first + index as usize * STRIDE as usize)
    }

    /// The same, as devices know it.
    #[inline(always)]
    pub fn iova(self, index: u32) -> u64 {
        self.to_iova.wrapping_add((self.first + index as usize * STRIDE as usize) as u64)
    }

    /// The device's address of `ptr`, a byte of the arena.
    #[inline(always)]
    pub fn iova_of(self, ptr: *const u8) -> u64 {
        self.to_iova.wrapping_add(ptr.addr() as u64)
    }

    /// The buffer that `ptr` lies in, if it lies in one.
    #[inline(always)]
    pub fn buffer_of(self, ptr: *const u8) -> Option<u32> {
        let place = self.place_of(ptr);
        (place < self.links.len()).then_some(place as u32)
    }

    /// Where in the row of buffers `ptr` is, or far behind its end.
    #[inline(always)]
    fn place_of(self, ptr: *const u8) -> usize {
        ptr.addr().wrapping_sub(self.first) / STRIDE as usize
    }

    /// Whether somebody holds buffer `index`, so that it can be taken out ([`Chain::add`]).
    pub fn is_held(self, index: u32) -> bool {
        self.links.get(index as usize).is_some_and(|link| link.next.load(Ordering::Relaxed) & HELD != 0)
    }
}

/// Memory for rings and buffers, mapped for devices.
pub struct Arena {
    // Unmapped by `drop`, which runs before the fields are: the memory goes after its mapping.
    memory: SharedMemory,
    space: Arc<dyn IovaSpace>,
    iova: u64,
    /// Where the first buffer begins.
    buffers_at: usize,
    /// What is known of each buffer, outside of its pages.
    links: Box<[Link]>,
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

/// What to do about `len` bytes that found no huge pages, on their node if that matters.
fn advice(len: usize, node: Option<u32>, pools: &[HugePool]) -> String {
    const HUGE: u64 = 2 << 20;
    let needed = (len as u64).div_ceil(HUGE);
    let pools = || pools.iter().filter(|pool| pool.page_size == HUGE);
    let here = || pools().filter(|pool| node.is_none_or(|node| pool.node == node));
    let (free, total) = here().fold((0, 0), |(f, t), pool| (f + pool.free, t + pool.total));
    let elsewhere: Vec<String> = pools()
        .filter(|pool| node.is_some_and(|node| pool.node != node) && pool.free > 0)
        .map(|pool| format!("{} on node {}", pool.free, pool.node))
        .collect();
    let far = match &elsewhere[..] {
        [] => String::new(),
        some => format!(" (there are {}, far from the card)", some.join(" and ")),
    };
    let place = node.map_or_else(String::new, |node| format!(" on its node {node}"));
    let file = match node {
        Some(node) => format!("/sys/devices/system/node/node{node}/hugepages/hugepages-2048kB/nr_hugepages"),
        None => "/proc/sys/vm/nr_hugepages".to_owned(),
    };
    let more = total + needed.saturating_sub(free);
    format!(
        "the cards' memory is in {}: it takes {needed} huge pages of 2 MiB{place}, and {free} are free{far}: echo {more} > {file}",
        Pages::Ordinary
    )
}

impl Arena {
    /// Makes an arena and maps it into `space`, as one run. Warns (in the log) where it got ordinary pages.
    ///
    /// # Errors
    /// There is no such memory, or it cannot be mapped.
    pub fn new(options: ArenaOptions, space: Arc<dyn IovaSpace>) -> Result<Arc<Self>, ArenaError> {
        let ArenaOptions { rings, buffers, pages, node } = options;
        if buffers > MOST_BUFFERS {
            return Err(ArenaError::TooManyBuffers(buffers));
        }
        let buffers_at = rings.next_multiple_of(4096);
        let memory = SharedMemory::new(buffers_at + buffers as usize * STRIDE as usize, pages, node)?;
        if memory.pages() == Pages::Ordinary {
            let pools = topology::huge_pools(Path::new("/"));
            tracing::warn!("{}", advice(memory.len(), node, &pools));
        }
        let iova = space.map(&memory)?;
        let link = || Link { next: AtomicU32::new(NONE), home: AtomicU32::new(NONE) };
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
            links: (0..buffers).map(|_| link()).collect(),
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

    /// As a loop uses it.
    #[inline(always)]
    pub fn view(&self) -> View<'_> {
        let start = self.memory.as_ptr().addr();
        View {
            first: start + self.buffers_at,
            to_iova: self.iova.wrapping_sub(start as u64),
            memory: &self.memory,
            links: &self.links,
            returns: &self.returns,
        }
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
    fn huge_pages_on_the_wrong_node_are_told_with_the_number_and_the_file_of_the_right_one() {
        let pool = |node, page_size, total, free| HugePool { node, page_size, total, free };
        let pools = [pool(0, 2 << 20, 64, 60), pool(1, 2 << 20, 3, 1), pool(1, 1 << 30, 9, 9)];
        assert_eq!(
            advice(9 << 20, Some(1), &pools),
            "the cards' memory is in ordinary 4 KiB pages: it takes 5 huge pages of 2 MiB on its node 1, and 1 are free (there are 60 \
             on node 0, far from the card): echo 7 > /sys/devices/system/node/node1/hugepages/hugepages-2048kB/nr_hugepages"
        );
        assert_eq!(
            advice(2 << 20, None, &[]),
            "the cards' memory is in ordinary 4 KiB pages: it takes 1 huge pages of 2 MiB, and 0 are free: echo 1 > \
             /proc/sys/vm/nr_hugepages"
        );
    }

    #[test]
    fn every_byte_of_a_buffer_and_none_beside_the_buffers_leads_back_to_it() {
        let arena = Arena::new(options(3), Arc::new(Noted::default())).unwrap();
        let (arena, memory) = (arena.view(), &arena.memory);
        for index in 0..3 {
            let ptr = arena.ptr(index);
            assert_eq!(
                (arena.buffer_of(ptr), arena.buffer_of(ptr.wrapping_add(2047))),
                (Some(index), Some(index))
            );
            assert_eq!(arena.iova(index) - 0x1_0000_0000, (ptr.addr() - memory.as_ptr().addr()) as u64);
            assert_eq!(arena.iova_of(ptr), arena.iova(index));
        }
        assert_eq!(arena.buffer_of(arena.ptr(0).wrapping_sub(1)), None);
        assert_eq!(arena.buffer_of(arena.ptr(2).wrapping_add(STRIDE as usize)), None);
        assert_eq!(arena.buffer_of(std::ptr::null()), None);
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
