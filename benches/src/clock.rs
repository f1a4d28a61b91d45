//! Time in cycles of the time stamp counter, the only clock that is cheap enough to read for every burst.
//!
//! Owns the conversion between cycles and time. Assumes an invariant counter that all cores share, as every server CPU of
//! the last decade has; the report says whether this machine's is.

pub use host::cpu::rdtsc as cycles;

/// How fast the time stamp counter runs.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Clock {
    /// Cycles a second.
    pub hz: f64,
}

impl Clock {
    /// That of this machine.
    pub fn of_this_machine() -> Self {
        Self { hz: host::cpu::tsc_hz() as f64 }
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
    use std::time::{Duration, Instant};

    #[test]
    fn the_frequency_predicts_how_long_a_sleep_took() {
        let clock = Clock::of_this_machine();
        let (started, from) = (Instant::now(), cycles());
        std::thread::sleep(Duration::from_millis(20));
        let (cycled, slept) = (clock.seconds(cycles() - from), started.elapsed().as_secs_f64());
        assert!((cycled / slept - 1.0).abs() < 0.05, "{cycled} s by cycles, {slept} s by the clock");
    }
}
