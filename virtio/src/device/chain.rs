//! Descriptor chains, fetched and translated, in the order in which the driver made them available.
//!
//! Owns the queue of chains between fetch and use, and the table of their further buffers. Every chain in it was checked
//! whole: its buffers lie in guest memory. Never allocates after it was made.

use super::setup::{Direction, RingError};
use crate::memory::GuestMemory;
use crate::memory::split::{DESC_WRITE, DESCRIPTOR, Descriptor, read_descriptor};

/// The longest chain that is followed, in buffers. Linux uses at most 19 for a frame.
pub const MAX_CHAIN: usize = 256;

/// Buffers beyond the first that the chains in a stock may have together; a fetch stops early where it runs out.
const ARENA: u32 = 2048;

/// One buffer of a chain, translated.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// First byte, in our address space; the driver may change the bytes at any time.
    pub ptr: *mut u8,
    /// Bytes, never 0.
    pub len: u32,
}

/// A descriptor chain. Chains that break a rule without breaking the ring (a buffer of the wrong direction, more than
/// [`MAX_CHAIN`] buffers) have no buffers: `total` is 0.
#[derive(Clone, Copy, Debug)]
pub struct Chain {
    /// The first buffer that is not empty.
    pub ptr: *mut u8,
    /// Bytes of it.
    pub len: u32,
    /// Bytes of all buffers.
    pub total: u32,
    /// Index of the second buffer in the stock's table.
    more_at: u32,
    /// Buffers after the first.
    pub more: u16,
    /// What the driver calls it: the head descriptor's index, or the packed buffer id.
    pub id: u16,
    /// Descriptors that it takes in the ring.
    pub slots: u16,
}

impl Chain {
    pub(super) const NONE: Chain =
        Chain { ptr: std::ptr::null_mut(), len: 0, total: 0, more_at: 0, more: 0, id: 0, slots: 1 };

    /// A chain of one buffer.
    #[inline(always)]
    pub(super) fn single(ptr: *mut u8, len: u32, id: u16) -> Self {
        Chain { ptr, len, total: len, more_at: 0, more: 0, id, slots: 1 }
    }
}

/// What has to be known of a chain to use it when it is in stock no more.
#[derive(Debug)]
pub struct Taken {
    pub(super) id: u16,
    pub(super) slots: u16,
}

/// Chains fetched and not yet used, oldest first.
pub struct Stock {
    chains: Box<[Chain]>,
    mask: u32,
    head: u32,
    tail: u32,
    arena: Box<[Buffer]>,
    arena_tail: u32,
    arena_free: u32,
    /// Beside `chains`: how many buffers of a chain that was walked are there to be read.
    readable: Box<[u16]>,
}

// SAFETY: the pointers are into guest memory that the ring's `RingSetup::memory` keeps mapped, whichever thread runs it.
unsafe impl Send for Stock {}

impl Stock {
    pub(super) fn new(ring_size: u16) -> Self {
        let capacity = usize::from(ring_size).next_power_of_two();
        Self {
            chains: vec![Chain::NONE; capacity].into(),
            mask: capacity as u32 - 1,
            head: 0,
            tail: 0,
            arena: vec![Buffer { ptr: std::ptr::null_mut(), len: 0 }; ARENA as usize].into(),
            arena_tail: 0,
            arena_free: ARENA,
            readable: vec![0; capacity].into(),
        }
    }

    /// How many chains wait.
    #[inline(always)]
    pub fn len(&self) -> usize {
        self.tail.wrapping_sub(self.head) as usize
    }

    /// Whether none waits.
    #[inline(always)]
    pub fn is_empty(&self) -> bool {
        self.tail == self.head
    }

    /// The `i`-th chain waiting. Past the last one, whatever stood there before: its buffers may be prefetched, nothing else.
    #[inline(always)]
    pub fn get(&self, i: usize) -> &Chain {
        let slot = self.head.wrapping_add(i as u32) & self.mask;
        // SAFETY: `chains` holds `mask + 1` entries.
        unsafe { self.chains.get_unchecked(slot as usize) }
    }

    /// The buffers of `chain` after its first.
    #[inline(always)]
    pub fn more(&self, chain: &Chain) -> &[Buffer] {
        let at = chain.more_at as usize;
        self.arena.get(at..at + usize::from(chain.more)).unwrap_or_default()
    }

    /// The buffers of the `i`-th chain waiting on a ring of [`Direction::Both`]: those to be read, then those to be written.
    pub fn request(&self, i: usize) -> (impl Iterator<Item = Buffer>, impl Iterator<Item = Buffer>) {
        let waiting = i < self.len();
        let chain = if waiting { *self.get(i) } else { Chain::NONE };
        let slot = self.head.wrapping_add(i as u32) & self.mask;
        let readable = self.readable.get(slot as usize).map_or(0, |n| usize::from(*n));
        let first = (chain.total > 0).then_some(Buffer { ptr: chain.ptr, len: chain.len });
        let more = if waiting { self.more(self.get(i)) } else { &[] };
        let all = first.into_iter().chain(more.iter().copied());
        (all.clone().take(readable), all.skip(readable))
    }

    /// How many more chains of one buffer fit.
    #[inline(always)]
    pub(super) fn room(&self) -> usize {
        (self.mask as usize + 1).saturating_sub(self.len())
    }

    /// To add chains in a loop: what changes is kept apart until [`Extend::finish`].
    #[inline(always)]
    pub(super) fn extend(&mut self) -> Extend<'_> {
        Extend { chains: &mut self.chains, mask: self.mask, at: self.tail, tail: &mut self.tail }
    }

    #[inline(always)]
    pub(super) fn push(&mut self, chain: Chain) {
        let slot = (self.tail & self.mask) as usize;
        // SAFETY: `chains` holds `mask + 1` entries.
        unsafe { *self.chains.get_unchecked_mut(slot) = chain };
        self.tail = self.tail.wrapping_add(1);
    }

    /// Forgets the oldest `n` chains (at most as many as there are).
    #[inline(always)]
    pub(super) fn pop(&mut self, n: usize) {
        if self.arena_free != ARENA {
            for i in 0..n {
                let chain = *self.get(i);
                if chain.more > 0 {
                    self.free(chain.more_at, chain.more);
                }
            }
        }
        self.head = self.head.wrapping_add(n as u32);
    }

    /// The oldest chain leaves.
    pub(super) fn take(&mut self) -> Option<Taken> {
        if self.is_empty() {
            return None;
        }
        let &Chain { id, slots, .. } = self.get(0);
        self.pop(1);
        Some(Taken { id, slots })
    }

    /// Chains are freed in the order in which they were fetched, so what was skipped at the end of the table to keep a chain
    /// in one piece comes free with the chain after it.
    #[cold]
    fn free(&mut self, at: u32, more: u16) {
        let end = at + u32::from(more);
        let oldest = (self.arena_tail + self.arena_free) % ARENA;
        self.arena_free += (end + ARENA - oldest) % ARENA;
    }

    /// Starts a chain of several buffers; `None` when the table is full and the fetch must wait.
    pub(super) fn begin(&mut self) -> Option<Builder> {
        if self.arena_free < 2 * MAX_CHAIN as u32 {
            return None;
        }
        let at = if self.arena_tail + MAX_CHAIN as u32 > ARENA { 0 } else { self.arena_tail };
        let chain = Chain { more_at: at, ..Chain::NONE };
        Some(Builder { at, chain, readable: 0, writing: false, unusable: false })
    }

    /// Appends a buffer. Empty ones are skipped.
    pub(super) fn append(&mut self, b: &mut Builder, ptr: *mut u8, len: u32) {
        if len == 0 {
            return;
        }
        let total = b.chain.total.checked_add(len);
        if total.is_none() || usize::from(b.chain.more) + 1 >= MAX_CHAIN {
            b.unusable = true;
        }
        if b.unusable {
            return;
        }
        if b.chain.total == 0 {
            (b.chain.ptr, b.chain.len) = (ptr, len);
        } else if let Some(slot) = self.arena.get_mut((b.at + u32::from(b.chain.more)) as usize) {
            *slot = Buffer { ptr, len };
            b.chain.more += 1;
        }
        b.chain.total = total.unwrap_or_default();
    }

    /// Ends a chain and puts it in stock.
    pub(super) fn finish(&mut self, b: Builder, id: u16, slots: u16) {
        let mut chain = Chain { id, slots, ..b.chain };
        if b.unusable {
            chain = Chain { id, slots, ..Chain::NONE };
        }
        if chain.more > 0 {
            let end = chain.more_at + u32::from(chain.more);
            self.arena_free -= (end + ARENA - self.arena_tail) % ARENA;
            self.arena_tail = end % ARENA;
        }
        if let Some(readable) = self.readable.get_mut((self.tail & self.mask) as usize) {
            *readable = if b.unusable { 0 } else { b.readable };
        }
        self.push(chain);
    }
}

/// Chains being added to a stock that has room for them.
pub(super) struct Extend<'s> {
    chains: &'s mut [Chain],
    mask: u32,
    at: u32,
    tail: &'s mut u32,
}

impl Extend<'_> {
    #[inline(always)]
    pub(super) fn push(&mut self, chain: Chain) {
        // SAFETY: `chains` holds `mask + 1` entries.
        unsafe { *self.chains.get_unchecked_mut((self.at & self.mask) as usize) = chain };
        self.at = self.at.wrapping_add(1);
    }

    /// What was added is in stock from now on.
    #[inline(always)]
    pub(super) fn finish(self) {
        *self.tail = self.at;
    }
}

/// A chain being put together.
pub(super) struct Builder {
    at: u32,
    chain: Chain,
    /// Buffers to be read, those that are empty left out.
    readable: u16,
    /// A buffer to be written was met: none to be read may follow.
    writing: bool,
    unusable: bool,
}

/// What walking a chain needs to know about its ring.
pub(super) struct Walk<'r> {
    pub(super) memory: &'r GuestMemory,
    pub(super) hot: &'r mut usize,
    pub(super) direction: Direction,
}

impl Walk<'_> {
    /// Appends the buffer that a descriptor describes (`flags` are its flags, wherever the layout keeps them).
    pub(super) fn buffer(
        &mut self,
        stock: &mut Stock,
        b: &mut Builder,
        head: u16,
        d: &Descriptor,
        flags: u16,
    ) -> Result<(), RingError> {
        let writable = flags & DESC_WRITE != 0;
        b.writing |= writable;
        let wrong = match self.direction {
            Direction::Read => writable,
            Direction::Write => !writable,
            Direction::Both => !writable && b.writing,
        };
        b.unusable |= wrong;
        b.readable += u16::from(!writable && d.len > 0 && !b.unusable);
        let Some(ptr) = self.memory.translate(self.hot, d.address, d.len) else {
            return Err(RingError::Address { index: head, address: d.address, len: d.len });
        };
        stock.append(b, ptr, d.len);
        Ok(())
    }

    /// The table that an indirect descriptor refers to, and its number of entries. The length was read once, with the
    /// descriptor (CVE-2026-93683).
    pub(super) fn table(&mut self, head: u16, d: &Descriptor) -> Result<(*const u8, u32), RingError> {
        let malformed = RingError::Indirect { index: head, len: d.len };
        if d.len == 0 || !(d.len as usize).is_multiple_of(DESCRIPTOR) {
            return Err(malformed);
        }
        match self.memory.translate(self.hot, d.address, d.len) {
            Some(at) if (at as usize).is_multiple_of(DESCRIPTOR) => Ok((at, d.len / DESCRIPTOR as u32)),
            Some(_) => Err(malformed),
            None => Err(RingError::Address { index: head, address: d.address, len: d.len }),
        }
    }
}

/// Entry `i` of an indirect table of `n` entries.
pub(super) fn table_entry(at: *const u8, i: u32, n: u32) -> Option<Descriptor> {
    // SAFETY: the table's `n` descriptors were translated whole and are aligned (`Walk::table`), and `i < n`.
    (i < n).then(|| unsafe { read_descriptor(at.add(i as usize * DESCRIPTOR)) })
}
