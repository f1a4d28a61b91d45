//! A pool of buffers: a stack for its owner, and a return path for everybody else.
//!
//! A pool has one user at a time (a queue, on one worker). Buffers that a transmit queue takes out of a burst form a [`Chain`];
//! when the device has sent them, the whole chain goes home by the return path of its pool with one compare-exchange. The owner
//! takes all that came back with one swap, when its stack is empty. Nothing is ever popped singly by two parties, so the path
//! has no ABA problem; nobody waits, nothing is allocated, and no buffer costs an atomic read-modify-write of its own.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Arena, ArenaError, Ledger, NAME_BITS, NONE, View, held};

/// Free buffers of one user.
pub struct Pool {
    arena: Arc<Arena>,
    stack: Stack,
    /// Buffers that belong to it, wherever they are.
    total: u32,
}

/// The free buffers of a pool, linked by `next`, the one used last on top. Small: a loop works on a copy of its own.
#[derive(Clone, Copy)]
pub struct Stack {
    number: u32,
    /// As wide as an index, so that a loop need not widen it.
    top: usize,
}

impl Stack {
    /// A free buffer, the one used last if it can be; it is held from now on, under `name` (below 2^16).
    #[inline(always)]
    pub fn take(&mut self, view: View<'_>, name: u32) -> Option<u32> {
        if self.is_empty() {
            *self = self.collected(view);
        }
        self.take_as(view, self.mark(name))
    }

    /// What marks a buffer of this pool that is held under `name`; the next name's is one more.
    #[inline(always)]
    pub fn mark(&self, name: u32) -> u32 {
        held(self.number, name)
    }

    /// As [`Stack::take`], with the mark of the name; none if the stack is empty, which [`Stack::collected`] may change.
    #[inline(always)]
    pub fn take_as(&mut self, view: View<'_>, mark: u32) -> Option<u32> {
        let index = self.top;
        let link = view.links.get(index)?;
        self.top = link.next.load(Ordering::Relaxed) as usize;
        link.next.store(mark, Ordering::Relaxed);
        // There are fewer than 2^32 links.
        Some(index as u32)
    }

    /// This stack, which is empty, with all that came back.
    #[cold]
    #[inline(never)]
    pub fn collected(self, view: View<'_>) -> Self {
        let Some(path) = view.returns.get(self.number as usize) else { return self };
        // An idle poll reads the line and does not write it.
        let back = path.0.load(Ordering::Relaxed) != NONE;
        Self { top: if back { path.0.swap(NONE, Ordering::Acquire) } else { NONE } as usize, ..self }
    }

    /// Whether there is no buffer on it.
    pub fn is_empty(&self) -> bool {
        self.top == NONE as usize
    }

    /// Whether `index`, a buffer of this pool, is held under the name of `mark` still: it was not taken out, nor taken out, sent,
    /// and taken anew under another name.
    ///
    /// # Safety
    /// `index` is a buffer of the arena.
    #[inline(always)]
    pub unsafe fn holds(view: View<'_>, index: u32, mark: u32) -> bool {
        // SAFETY: there is a link for each buffer of the arena.
        unsafe { view.links.get_unchecked(index as usize) }.next.load(Ordering::Relaxed) == mark
    }

    /// Gives back `index`, which belongs here.
    #[inline(always)]
    pub fn put(&mut self, view: View<'_>, index: u32) {
        if let Some(link) = view.links.get(index as usize) {
            // What is on the stack came as 32 bits.
            link.next.store(self.top as u32, Ordering::Relaxed);
            self.top = index as usize;
        }
    }
}

/// Buffers of one pool that go home together.
#[derive(Clone, Copy, Debug)]
pub struct Chain {
    home: u32,
    first: u32,
    last: u32,
}

impl Chain {
    /// No buffers.
    pub const EMPTY: Chain = Chain { home: NONE, first: NONE, last: NONE };

    /// A chain for buffers of the pool that `index` belongs to, which is the first to be added.
    #[inline(always)]
    pub fn beginning_with(view: View<'_>, index: u32) -> Chain {
        let home = view.links.get(index as usize).map_or(NONE, |link| link.home.load(Ordering::Relaxed));
        Chain { home, first: NONE, last: index }
    }

    /// Takes buffer `index` out of whoever holds it, into the chain. Not if somebody took it already, or if it belongs to another
    /// pool than those before. Only by the thread that has the burst, or the buffer.
    #[inline(always)]
    pub fn add(&mut self, view: View<'_>, index: u32) -> bool {
        self.add_at(view, index as usize)
    }

    /// As [`Chain::add`], for the buffer that `ptr` lies in, if it lies in one.
    #[inline(always)]
    pub fn add_buffer_of(&mut self, view: View<'_>, ptr: *const u8) -> bool {
        self.add_at(view, view.place_of(ptr))
    }

    #[inline(always)]
    fn add_at(&mut self, view: View<'_>, index: usize) -> bool {
        let Some(link) = view.links.get(index) else { return false };
        if link.next.load(Ordering::Relaxed) >> NAME_BITS != held(self.home, 0) >> NAME_BITS {
            return false;
        }
        link.next.store(self.first, Ordering::Relaxed);
        // There are fewer than 2^32 links.
        self.first = index as u32;
        true
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.first == NONE
    }

    /// Sends the buffers home. Any thread.
    #[inline]
    pub fn go_home(&self, view: View<'_>) {
        let (Some(path), Some(last)) =
            (view.returns.get(self.home as usize), view.links.get(self.last as usize))
        else {
            return;
        };
        if self.is_empty() {
            return;
        }
        let mut top = path.0.load(Ordering::Relaxed);
        loop {
            last.next.store(top, Ordering::Relaxed);
            // Release: whoever takes the path sees every `next`, and everything done with the buffers.
            match path.0.compare_exchange_weak(top, self.first, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return,
                Err(now) => top = now,
            }
        }
    }
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
        let mut stack = Stack { number, top: NONE as usize };
        let view = arena.view();
        for index in ledger.buffers.split_off(at) {
            if let Some(link) = view.links.get(index as usize) {
                link.home.store(number, Ordering::Relaxed);
            }
            stack.put(view, index);
        }
        Ok(Self { arena: arena.clone(), stack, total: count })
    }

    /// The arena that its buffers are in.
    pub fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// The arena, for a loop, and the free buffers.
    #[inline(always)]
    pub fn parts(&mut self) -> (View<'_>, &mut Stack) {
        (self.arena.view(), &mut self.stack)
    }

    /// As [`Stack::take`], under the name 0.
    pub fn take(&mut self) -> Option<u32> {
        self.stack.take(self.arena.view(), 0)
    }

    /// As [`Stack::put`].
    pub fn put(&mut self, index: u32) {
        self.stack.put(self.arena.view(), index);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut ledger = self.arena.ledger();
        let before = ledger.buffers.len();
        ledger.buffers.extend(std::iter::from_fn(|| self.stack.take(self.arena.view(), 0)));
        let missing = self.total - (ledger.buffers.len() - before) as u32;
        ledger.retired.push((self.stack.number, missing));
        self.arena.sweep(&mut ledger);
    }
}

impl Arena {
    /// Takes everything off the return path of pool `number`, which is gone; returns how many that was.
    fn collect(&self, number: u32, mut each: impl FnMut(u32)) -> u32 {
        let Some(path) = self.returns.get(number as usize) else { return 0 };
        let mut index = path.0.swap(NONE, Ordering::Acquire);
        let mut count = 0;
        while let Some(link) = self.links.get(index as usize) {
            let next = link.next.load(Ordering::Relaxed);
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

    /// Sends these home, all of the same pool.
    fn send_home(arena: &Arena, indices: &[u32]) {
        let mut chain = Chain::EMPTY;
        for &index in indices {
            if chain.is_empty() {
                chain = Chain::beginning_with(arena.view(), index);
            }
            assert!(chain.add(arena.view(), index));
        }
        chain.go_home(arena.view());
    }

    #[test]
    fn a_buffer_is_taken_out_once_and_chains_hold_those_of_one_pool() {
        let arena = arena(4);
        let (mut a, mut b) = (Pool::new(&arena, 2).unwrap(), Pool::new(&arena, 2).unwrap());
        let (x, y, view) = (a.take().unwrap(), b.take().unwrap(), arena.view());
        let mut chain = Chain::EMPTY;
        assert!(!chain.add(view, x), "of no pool yet");
        chain = Chain::beginning_with(view, x);
        assert!(chain.is_empty() && chain.add(view, x) && !chain.add(view, x), "once");
        assert!(!chain.add(view, y), "of another pool");
        chain.go_home(view);
        Chain::EMPTY.go_home(view);
        assert_eq!((a.take().is_some(), a.take(), a.take()), (true, Some(x), None));
        // SAFETY: `x` is a buffer of the arena.
        let holds = |name| unsafe { Stack::holds(view, x, a.stack.mark(name)) };
        assert!(holds(0) && !holds(1) && chain.add(view, x), "it can be taken out again");
        assert!(!view.is_held(x));
    }

    #[test]
    fn a_buffer_comes_home_even_when_its_pool_is_gone() {
        let arena = arena(4);
        let (mut a, b) = (Pool::new(&arena, 2).unwrap(), Pool::new(&arena, 2).unwrap());
        let [x, y] = [a.take(), a.take()].map(Option::unwrap);
        send_home(&arena, &[x]);
        assert_eq!((a.take(), a.take()), (Some(x), None));
        drop(a);
        assert!(Pool::new(&arena, 1).is_err(), "two buffers of the dropped pool are still under way");
        send_home(&arena, &[x, y]);
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
                    let mut several = Vec::new();
                    while let Ok(index) = { from.lock().unwrap().recv() } {
                        several.push(index);
                        if several.len() == 3 {
                            send_home(&arena, &several);
                            several.clear();
                        }
                    }
                    send_home(&arena, &several);
                });
            }
            let mut sent = 0;
            while sent < 20_000 {
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
