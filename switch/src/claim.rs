//! Who may touch a ring right now.
//!
//! A [`Claimed`] value is used by one thread at a time. Workers only ever *try*, and whoever is second goes on with other work:
//! a ring that several workers send to is claimed by one compare-exchange a burst; a ring that one worker polls stays that
//! worker's ([`Owner`]) from turn to turn, which costs it one load a poll. The housekeeping side may wait: it announces itself,
//! workers then keep off, and it gets the value as soon as the burst at hand is over. A message that takes something away
//! from a port (its memory, its rings) takes the value first, so that its answer is never sent while a worker still looks.

use std::cell::UnsafeCell;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU32, Ordering};

/// Held by somebody.
const HELD: u32 = 1;
/// Each waiting housekeeping thread counts this much.
const WAITING: u32 = 2;
/// Above: the owner's number, while a worker keeps the value between turns.
const OWNER: u32 = 0xffff_0000;

/// A worker, as the keeper of the values that it alone polls. There is one of each number, so that what it keeps is its own;
/// a value in use borrows it, so that it uses one at a time.
pub(crate) struct Owner {
    mark: u32,
}

impl Owner {
    /// A new one; `None` when 65,535 were made in this process.
    pub(crate) fn new() -> Option<Self> {
        static LAST: AtomicU32 = AtomicU32::new(0);
        let number =
            LAST.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n < 0xffff).then_some(n + 1));
        number.ok().map(|n| Self { mark: (n + 1) << 16 })
    }
}

/// A value that one thread at a time may use.
#[repr(align(128))]
pub(crate) struct Claimed<T> {
    state: AtomicU32,
    value: UnsafeCell<T>,
}

// SAFETY: the value is only reached through a `Claim`, of which there is one at a time (see `try_claim`, `take`).
unsafe impl<T: Send> Sync for Claimed<T> {}

/// The right to use the value, until dropped.
pub(crate) struct Claim<'c, T> {
    of: &'c Claimed<T>,
}

impl<T> Claimed<T> {
    /// Nobody holds it.
    pub(crate) fn new(value: T) -> Self {
        Self { state: AtomicU32::new(0), value: UnsafeCell::new(value) }
    }

    /// For workers: the value, unless somebody has it or waits for it.
    #[inline(always)]
    pub(crate) fn try_claim(&self) -> Option<Claim<'_, T>> {
        let free = self.state.compare_exchange(0, HELD, Ordering::Acquire, Ordering::Relaxed);
        // Lazily: a claim that is made and dropped releases what it never had.
        free.is_ok().then(|| Claim { of: self })
    }

    /// For the worker that polls the value: the value, kept since the last turn if nobody asked for it meanwhile.
    #[inline(always)]
    pub(crate) fn enter<'c>(&'c self, owner: &'c mut Owner) -> Option<Entered<'c, T>> {
        let state = self.state.load(Ordering::Relaxed);
        if state == owner.mark || self.enter_anew(state, owner) {
            return Some(Entered { of: self, _owner: owner });
        }
        None
    }

    #[cold]
    #[inline(never)]
    fn enter_anew(&self, state: u32, owner: &mut Owner) -> bool {
        if state & OWNER == owner.mark {
            // Somebody waits for it.
            self.leave(owner);
            return false;
        }
        self.state.compare_exchange(0, owner.mark, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    /// Gives the value up, if `owner` keeps it: before a worker sleeps, follows another plan, or ends.
    pub(crate) fn leave(&self, owner: &mut Owner) {
        if self.state.load(Ordering::Relaxed) & OWNER == owner.mark {
            self.state.fetch_sub(owner.mark, Ordering::Release);
        }
    }

    /// For housekeeping: the value, as soon as the burst that uses it is over.
    pub(crate) fn take(&self) -> Claim<'_, T> {
        self.state.fetch_add(WAITING, Ordering::Relaxed);
        let mut spins = 0u32;
        loop {
            let state = self.state.load(Ordering::Relaxed);
            if state & (HELD | OWNER) == 0
                && self
                    .state
                    .compare_exchange(state, (state | HELD) - WAITING, Ordering::Acquire, Ordering::Relaxed)
                    .is_ok()
            {
                return Claim { of: self };
            }
            spins += 1;
            // A burst takes microseconds, unless its worker's core was taken away.
            if spins < 100 { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
    }
}

/// The right of a worker to use a value that it keeps, for one poll.
pub(crate) struct Entered<'c, T> {
    of: &'c Claimed<T>,
    _owner: &'c mut Owner,
}

impl<T> Deref for Entered<'_, T> {
    type Target = T;

    #[inline(always)]
    fn deref(&self) -> &T {
        // SAFETY: the owner's mark is in `state` until `leave`, which needs the owner that we borrow; nobody else gets in.
        unsafe { &*self.of.value.get() }
    }
}

impl<T> DerefMut for Entered<'_, T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above, and this is the only `Entered` of the owner.
        unsafe { &mut *self.of.value.get() }
    }
}

impl<T> Deref for Claim<'_, T> {
    type Target = T;

    #[inline(always)]
    fn deref(&self) -> &T {
        // SAFETY: this is the only claim (HELD was set by us), and it is borrowed.
        unsafe { &*self.of.value.get() }
    }
}

impl<T> DerefMut for Claim<'_, T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: this is the only claim (HELD was set by us), and it is borrowed mutably.
        unsafe { &mut *self.of.value.get() }
    }
}

impl<T> Drop for Claim<'_, T> {
    #[inline(always)]
    fn drop(&mut self) {
        self.of.state.fetch_sub(HELD, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn a_second_worker_goes_on_with_other_work() {
        let value = Claimed::new(1);
        let first = value.try_claim();
        assert!(first.is_some() && value.try_claim().is_none());
        drop(first);
        assert!(value.try_claim().is_some());
    }

    #[test]
    fn housekeeping_gets_a_value_that_a_worker_claims_without_pause() {
        let value = Arc::new(Claimed::new(0u64));
        let stop = Arc::new(AtomicBool::new(false));
        let worker = std::thread::spawn({
            let (value, stop) = (value.clone(), stop.clone());
            move || {
                while !stop.load(Ordering::Relaxed) {
                    if let Some(mut v) = value.try_claim() {
                        *v += 1;
                        let seen = *v;
                        std::hint::spin_loop();
                        assert_eq!(*v, seen, "somebody else wrote while a worker had it");
                    }
                }
            }
        });
        for _ in 0..2_000 {
            let mut v = value.take();
            *v += 1;
        }
        stop.store(true, Ordering::Relaxed);
        worker.join().unwrap();
    }

    #[test]
    fn what_a_worker_keeps_nobody_else_claims_until_it_leaves() {
        let value = Claimed::new(1);
        let (mut a, mut b) = (Owner::new().unwrap(), Owner::new().unwrap());
        assert_eq!(value.enter(&mut a).map(|v| *v), Some(1));
        assert!(value.enter(&mut b).is_none() && value.try_claim().is_none());
        value.leave(&mut b);
        assert!(value.enter(&mut a).is_some(), "leaving what one does not keep changes nothing");
        value.leave(&mut a);
        assert!(value.enter(&mut b).is_some());
    }

    #[test]
    fn housekeeping_gets_a_value_that_its_worker_keeps() {
        let value = Arc::new(Claimed::new(0u64));
        let stop = Arc::new(AtomicBool::new(false));
        let worker = std::thread::spawn({
            let (value, stop) = (value.clone(), stop.clone());
            move || {
                let mut owner = Owner::new().unwrap();
                while !stop.load(Ordering::Relaxed) {
                    if let Some(mut v) = value.enter(&mut owner) {
                        *v += 1;
                        let seen = *v;
                        std::hint::spin_loop();
                        assert_eq!(*v, seen, "somebody else wrote while its worker used it");
                    }
                }
                value.leave(&mut owner);
            }
        });
        for _ in 0..2_000 {
            *value.take() += 1;
        }
        stop.store(true, Ordering::Relaxed);
        worker.join().unwrap();
        assert!(value.try_claim().is_some());
    }
}
