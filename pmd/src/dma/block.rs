//! Pieces of an arena for rings: taken when a device starts, given back when it has stopped.

use std::sync::Arc;

use super::{Arena, ArenaError};

/// Where rings begin: more than any device asks for, and two rings never share a cache line or a page.
const ALIGN: usize = 4096;

/// Memory for a ring: zeroed, aligned to 4096 bytes, given back when dropped. No device uses it any more by then.
pub struct Block {
    arena: Arc<Arena>,
    offset: usize,
    len: usize,
}

impl Block {
    /// At least `len` bytes of `arena`.
    ///
    /// # Errors
    /// [`ArenaError::Rings`].
    pub fn new(arena: &Arc<Arena>, len: usize) -> Result<Self, ArenaError> {
        let wanted = len.max(1).checked_next_multiple_of(ALIGN).ok_or(ArenaError::Rings { wanted: len })?;
        let mut ledger = arena.ledger();
        let run = ledger.rings.iter().position(|&(_, free)| free >= wanted);
        let run = run.ok_or(ArenaError::Rings { wanted })?;
        let offset = match ledger.rings.get_mut(run) {
            Some((at, free)) => {
                let offset = *at;
                (*at, *free) = (*at + wanted, *free - wanted);
                offset
            }
            None => return Err(ArenaError::Rings { wanted }),
        };
        ledger.rings.retain(|&(_, free)| free > 0);
        drop(ledger);
        let block = Self { arena: arena.clone(), offset, len: wanted };
        // SAFETY: `wanted` bytes of the arena's memory that no other block has.
        unsafe { block.ptr().write_bytes(0, wanted) };
        Ok(block)
    }

    /// The first byte.
    pub fn ptr(&self) -> *mut u8 {
        self.arena.memory.as_ptr().wrapping_add(self.offset)
    }

    /// The same, as devices know it.
    pub fn iova(&self) -> u64 {
        self.arena.iova + self.offset as u64
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let mut ledger = self.arena.ledger();
        let at = ledger.rings.partition_point(|&(offset, _)| offset < self.offset);
        ledger.rings.insert(at, (self.offset, self.len));
        // Neighbours become one again.
        ledger.rings.dedup_by(|next, run| {
            let joins = run.0 + run.1 == next.0;
            if joins {
                run.1 += next.1;
            }
            joins
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Noted;
    use super::super::{Arena, ArenaOptions};
    use super::*;
    use host::memory::Pages;

    #[test]
    fn blocks_lie_apart_are_zeroed_and_join_again_when_given_back() {
        let options = ArenaOptions { rings: 5 * ALIGN, buffers: 1, pages: Pages::Ordinary, node: None };
        let arena = Arena::new(options, Arc::new(Noted::default())).unwrap();
        let [a, b, c] = [1, ALIGN + 1, 2 * ALIGN].map(|len| Block::new(&arena, len).unwrap());
        assert_eq!(
            [&a, &b, &c].map(|x| (x.offset, x.len)),
            [(0, ALIGN), (ALIGN, 2 * ALIGN), (3 * ALIGN, 2 * ALIGN)]
        );
        assert!(matches!(Block::new(&arena, 1), Err(ArenaError::Rings { wanted: ALIGN })));
        // SAFETY: the block's own bytes.
        unsafe { b.ptr().write(42) };
        drop((c, a, b));
        let all = Block::new(&arena, 5 * ALIGN).unwrap();
        // SAFETY: the block's own bytes.
        assert_eq!((all.iova() & 0xfff, unsafe { all.ptr().add(ALIGN).read() }), (0, 0));
    }
}
