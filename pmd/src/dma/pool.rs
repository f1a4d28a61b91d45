//! A pool of buffers: a stack for its owner, and a return path for everybody else.
//!
//! A pool has one user at a time (a queue, on one worker). A buffer that another worker's transmit queue had comes back by the
//! return path: that worker pushes a batch with one compare-exchange, the owner takes all of them with one swap when its stack
//! is empty. Nothing is ever popped singly, so the path has no ABA problem; nobody waits, nothing is allocated.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Arena, ArenaError, Ledger, NONE};

/// Free buffers of one user.
pub struct Pool {
    arena: Arc<Arena>,
    number: u32,
    free: Vec<u32>,
    /// Buffers that belong to it, wherever they are.
    total: u32,
    /// Buffers of other pools that go home together.
    batch: Batch,
}

/// Buffers of one pool, linked by their `next`, on their way to its return path.
struct Batch {
    home: u32,
    first: u32,
    last: u32,
}

impl Batch {
    const EMPTY: Batch = Batch { home: NONE, first: NONE, last: NONE };
}

impl Pool {
    /// A pool of `count` buffers of `arena`.
    ///
    /// # Errors
    /// The arena has no more of them, or too many pools.
    pub fn new(arena: &Arc<Arena>, count: u32) -> Result<Self, ArenaError> {
        let mut ledger = arena.ledger();
        arena.sweep(&mut ledger);
        let free = ledger.buffers.len();
        let Some(at) = free.checked_sub(count as usize) else {
            return Err(ArenaError::Buffers { wanted: count, free: free as u32 });
        };
        let number = ledger.numbers.pop().ok_or(ArenaError::Pools)?;
        // Room for what other pools' buffers never need: only its own come back here.
        let free = ledger.buffers.split_off(at);
        for &index in &free {
            if let Some(meta) = arena.meta.get(index as usize) {
                meta.home.store(number, Ordering::Relaxed);
            }
        }
        Ok(Self { arena: arena.clone(), number, free, total: count, batch: Batch::EMPTY })
    }

    /// The arena that its buffers are in.
    pub fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// A free buffer, the one used last if it can be.
    #[inline(always)]
    pub fn take(&mut self) -> Option<u32> {
        match self.free.pop() {
            Some(index) => Some(index),
            None => self.take_returned(),
        }
    }

    /// Takes all that came back by the return path onto the stack, and one of them.
    #[cold]
    fn take_returned(&mut self) -> Option<u32> {
        let path = self.arena.returns.get(self.number as usize)?;
        // An idle poll reads the line and does not write it.
        if path.0.load(Ordering::Relaxed) == NONE {
            return None;
        }
        self.arena.collect(self.number, |index| self.free.push(index));
        self.free.pop()
    }

    /// Gives `index` back: to this pool, or (after [`Pool::flush`] at the latest) to the one that it belongs to.
    #[inline(always)]
    pub fn put(&mut self, index: u32) {
        let Some(meta) = self.arena.meta.get(index as usize) else { return };
        let home = meta.home.load(Ordering::Relaxed);
        if home == self.number {
            // Never allocates: the stack once held all that belong here.
            self.free.push(index);
            return;
        }
        if home == self.batch.home {
            meta.next.store(self.batch.first, Ordering::Relaxed);
            self.batch.first = index;
            return;
        }
        self.flush();
        self.batch = Batch { home, first: index, last: index };
    }

    /// Sends the buffers of other pools home.
    #[inline]
    pub fn flush(&mut self) {
        if self.batch.home != NONE {
            let batch = std::mem::replace(&mut self.batch, Batch::EMPTY);
            self.arena.give_back(&batch);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.flush();
        let mut ledger = self.arena.ledger();
        let missing = self.total - self.free.len() as u32;
        ledger.buffers.append(&mut self.free);
        ledger.retired.push((self.number, missing));
        self.arena.sweep(&mut ledger);
    }
}

impl Arena {
    /// Pushes a batch onto its pool's return path. Any thread.
    fn give_back(&self, batch: &Batch) {
        let Some(last) = self.meta.get(batch.last as usize) else { return };
        let Some(path) = self.returns.get(batch.home as usize) else { return };
        let mut top = path.0.load(Ordering::Relaxed);
        loop {
            last.next.store(top, Ordering::Relaxed);
            // Release: whoever takes the path sees every `next`, and everything done with the buffers.
            match path.0.compare_exchange_weak(top, batch.first, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => top = now,
            }
        }
    }

    /// Takes everything off the return path of pool `number`; returns how many that was. Only by the pool's user.
    fn collect(&self, number: u32, mut each: impl FnMut(u32)) -> u32 {
        let Some(path) = self.returns.get(number as usize) else { return 0 };
        let mut index = path.0.swap(NONE, Ordering::Acquire);
        let mut count = 0;
        while let Some(meta) = self.meta.get(index as usize) {
            let next = meta.next.load(Ordering::Relaxed);
            each(index);
            count += 1;
            index = next;
        }
        count
    }

    /// Collects what came back to pools that are gone; their numbers can be used again when nothing is missing.
    fn sweep(&self, ledger: &mut Ledger) {
        let Ledger { buffers, numbers, retired, .. } = ledger;
        retired.retain_mut(|(number, missing)| {
            *missing = missing.saturating_sub(self.collect(*number, |index| buffers.push(index)));
            if *missing == 0 {
                numbers.push(*number);
            }
            *missing > 0
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Noted;
    use super::super::{ArenaOptions, POOLS};
    use super::*;
    use host::memory::Pages;
    use std::collections::BTreeSet;

    fn arena(buffers: u32) -> Arc<Arena> {
        let options = ArenaOptions { rings: 4096, buffers, pages: Pages::Ordinary, node: None };
        Arena::new(options, Arc::new(Noted::default())).unwrap()
    }

    fn all(pool: &mut Pool) -> BTreeSet<u32> {
        std::iter::from_fn(|| pool.take()).collect()
    }

    #[test]
    fn a_pool_gives_each_of_its_buffers_once_and_the_last_used_first() {
        let arena = arena(5);
        let (mut a, mut b) = (Pool::new(&arena, 3).unwrap(), Pool::new(&arena, 2).unwrap());
        let (first, second) = (all(&mut a), all(&mut b));
        assert_eq!((first.len(), second.len(), first.is_disjoint(&second)), (3, 2, true));
        for &index in &first {
            a.put(index);
        }
        assert_eq!(a.take(), first.last().copied());
    }

    #[test]
    fn an_arena_that_is_too_short_says_how_many_buffers_are_left() {
        let arena = arena(5);
        let _a = Pool::new(&arena, 3).unwrap();
        let error = Pool::new(&arena, 3).err().unwrap().to_string();
        assert!(error.starts_with("the arena has 2 buffers left, 3 are needed"), "{error}");
    }

    #[test]
    fn a_buffer_given_to_another_pool_comes_home_even_when_that_one_is_gone() {
        let arena = arena(4);
        let (mut a, mut b) = (Pool::new(&arena, 2).unwrap(), Pool::new(&arena, 2).unwrap());
        let [x, y] = [a.take(), a.take()].map(Option::unwrap);
        b.put(x);
        assert_eq!(a.take(), None, "not before it was flushed");
        b.flush();
        assert_eq!((a.take(), a.take()), (Some(x), None));
        drop(a);
        assert!(Pool::new(&arena, 1).is_err(), "two buffers of the dropped pool are still under way");
        b.put(x);
        b.put(y);
        b.flush();
        let mut c = Pool::new(&arena, 2).unwrap();
        let home = all(&mut c);
        assert_eq!(home, BTreeSet::from([x, y]));
        home.into_iter().for_each(|index| c.put(index));
        drop((b, c));
        for _ in 0..2 * POOLS {
            Pool::new(&arena, 4).unwrap();
        }
    }

    #[test]
    fn buffers_that_two_workers_return_at_once_all_come_home() {
        let arena = arena(64);
        let mut pool = Pool::new(&arena, 64).unwrap();
        let (to, from) = std::sync::mpsc::sync_channel::<u32>(16);
        let from = std::sync::Mutex::new(from);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let mut other = Pool::new(&arena, 0).unwrap();
                    while let Ok(index) = { from.lock().unwrap().recv() } {
                        other.put(index);
                        if index % 3 != 0 {
                            other.flush();
                        }
                    }
                });
            }
            let mut sent = 0;
            while sent < 20_000 {
                // What a worker holds back in its batch is never so much that the owner starves for good.
                match pool.take() {
                    Some(index) => {
                        to.send(index).unwrap();
                        sent += 1;
                    }
                    None => std::thread::yield_now(),
                }
            }
            drop(to);
        });
        assert_eq!(all(&mut pool).len(), 64);
    }
}
