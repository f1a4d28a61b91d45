//! Time in cycles of the time stamp counter, the only clock that is cheap enough to read for every burst.
//!
//! Owns the conversion between cycles and time. Assumes an invariant counter that all cores share, as every server CPU of
//! the last decade has; [`Clock::measure`] says what it found, and the report prints it.

use std::time::{Duration, Instant};

/// Reads the time stamp counter.
#[inline(always)]
pub fn cycles() -> u64 {
    // SAFETY: RDTSC has no operands and touches no memory; x86-64 always has it, and Linux leaves it enabled for programs.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// How fast the time stamp counter runs.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Clock {
    /// Cycles a second.
    pub hz: f64,
}

impl Clock {
    /// Measures the counter against the monotonic clock for about 50 ms (error below 0.01 %).
    pub fn measure() -> Self {
        let started = Instant::now();
        let from = cycles();
        std::thread::sleep(Duration::from_millis(50));
        // The counter is read between two readings of the clock, so that a pause on one side shows and is tried again.
        let mut best = (Duration::MAX, 0.0);
        for _ in 0..16 {
            let before = started.elapsed();
            let now = cycles();
            let after = started.elapsed();
            if after - before < best.0 {
                let middle = (before + after) / 2;
                best = (after - before, now.wrapping_sub(from) as f64 / middle.as_secs_f64());
            }
        }
        Self { hz: best.1 }
    }

    /// Nanoseconds in `cycles`.
    pub fn nanos(&self, cycles: u64) -> f64 {
        cycles as f64 * 1e9 / self.hz
    }

    /// Seconds in `cycles`.
    pub fn seconds(&self, cycles: u64) -> f64 {
        cycles as f64 / self.hz
    }

    /// Cycles in `seconds`.
    pub fn cycles(&self, seconds: f64) -> u64 {
        (seconds * self.hz) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_measured_frequency_predicts_how_long_a_sleep_took() {
        let clock = Clock::measure();
        let (started, from) = (Instant::now(), cycles());
        std::thread::sleep(Duration::from_millis(20));
        let (cycled, slept) = (clock.seconds(cycles() - from), started.elapsed().as_secs_f64());
        assert!((cycled / slept - 1.0).abs() < 0.05, "{cycled} s by cycles, {slept} s by the clock");
    }
}
