//! Who may touch a ring right now.
//!
//! A [`Claimed`] value is used by one thread at a time. Workers only ever *try*: one compare-exchange, and whoever is second
//! goes on with other work. The housekeeping side may wait: it announces itself, workers then keep off, and it gets the value
//! as soon as the burst at hand is over. A message that takes something away from a port (its memory, its rings) takes the
//! value first, so that its answer is never sent while a worker still looks.

use std::cell::UnsafeCell;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU32, Ordering};

/// Held by somebody.
const HELD: u32 = 1;
/// Each waiting housekeeping thread counts this much.
const WAITING: u32 = 2;

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

    /// For housekeeping: the value, as soon as the burst that uses it is over.
    pub(crate) fn take(&self) -> Claim<'_, T> {
        self.state.fetch_add(WAITING, Ordering::Relaxed);
        let mut spins = 0u32;
        loop {
            let state = self.state.load(Ordering::Relaxed);
            if state & HELD == 0
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
}
