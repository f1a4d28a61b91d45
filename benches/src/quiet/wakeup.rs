//! A timer that should wake a thread at exact times: how late is it?
//!
//! Owns the loop. Each wake-up is due at a time that does not depend on how the last one fared, so that a late one is not
//! forgiven; wake-ups that became due while the thread was still away are left out, as cyclictest does.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, ClockNanosleepFlags, clock_gettime, clock_nanosleep};

use crate::clock::Clock;
use crate::histogram::Latencies;

/// The unit of what [`run`] records: nanoseconds of the kernel's clock, not cycles.
pub(super) const NANOSECONDS: Clock = Clock { hz: 1e9 };

const CLOCK: ClockId = ClockId::CLOCK_MONOTONIC;

/// Sleeps until each of the due times in `length`, `interval` apart, or until `stop` is set. Records by how much each
/// wake-up was late, in nanoseconds.
pub(super) fn run(length: Duration, interval: Duration, stop: &AtomicBool) -> nix::Result<Latencies> {
    let mut late = Latencies::default();
    let interval = interval.max(Duration::from_micros(1));
    let begin = now()?;
    let end = begin + length;
    let mut due = begin + interval;
    while due <= end && !stop.load(Ordering::Relaxed) {
        match clock_nanosleep(CLOCK, ClockNanosleepFlags::TIMER_ABSTIME, &TimeSpec::from(due)) {
            // A signal: the due time is still the same.
            Err(Errno::EINTR) => continue,
            other => other?,
        };
        let woken = now()?;
        let by = woken.saturating_sub(due);
        late.record(u64::try_from(by.as_nanos()).unwrap_or(u64::MAX));
        due = next_due(due, woken, interval);
    }
    Ok(late)
}

/// The first due time after `woken`.
fn next_due(due: Duration, woken: Duration, interval: Duration) -> Duration {
    let missed = woken.saturating_sub(due).as_nanos() / interval.as_nanos().max(1);
    due + interval.saturating_mul(u32::try_from(missed).unwrap_or(u32::MAX).saturating_add(1))
}

fn now() -> nix::Result<Duration> {
    clock_gettime(CLOCK).map(Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_wake_up_leaves_out_what_became_due_meanwhile_and_keeps_the_rhythm() {
        let us = Duration::from_micros;
        assert_eq!(next_due(us(100), us(103), us(100)), us(200));
        assert_eq!(next_due(us(100), us(200), us(100)), us(300));
        assert_eq!(next_due(us(100), us(451), us(100)), us(500));
        // A clock that did not reach the due time is not late.
        assert_eq!(next_due(us(100), us(99), us(100)), us(200));
    }

    #[test]
    fn nobody_is_woken_early_and_as_often_as_there_is_time() {
        let late =
            run(Duration::from_millis(100), Duration::from_millis(1), &AtomicBool::new(false)).unwrap();
        assert!((1..=100).contains(&late.samples()), "{}", late.samples());
        assert!(late.max(&NANOSECONDS).unwrap() > 0.0);
    }
}
