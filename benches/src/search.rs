//! The search for a rate (RFC 2544, section 26.1) and for a burst (26.4).
//!
//! Knows no frames: it asks a closure what becomes of a rate and decides what to ask next, so that it is tested against
//! devices that exist only as a formula.

use serde::Serialize;

/// What became of one rate, or of one burst.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Sample {
    /// Frames a second, both directions.
    pub rate: f64,
    /// Frames that were due.
    pub due: u64,
    /// Of these, lost: not sent in time, not received, or damaged.
    pub lost: u64,
}

impl Sample {
    /// Whether it lost at most `tolerance` (a share, 0 to 1) of the frames.
    pub fn passes(&self, tolerance: f64) -> bool {
        self.due > 0 && self.lost as f64 <= tolerance * self.due as f64
    }
}

/// What is searched for.
#[derive(Clone, Copy, Debug)]
pub struct Goal {
    /// Share of frames that may be lost: 0 for the no-drop rate, 0.005 for the partial-drop rate.
    pub tolerance: f64,
    /// The result is within this share of the highest rate asked.
    pub precision: f64,
    /// Further trials that the result must pass.
    pub confirmations: u32,
}

/// The no-drop rate.
pub const NDR: Goal = Goal { tolerance: 0.0, precision: 0.01, confirmations: 2 };
/// The partial-drop rate.
pub const PDR: Goal = Goal { tolerance: 0.005, precision: 0.01, confirmations: 1 };

/// A rate that was found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Found {
    /// Frames a second, both directions; 0 if every rate lost too much.
    pub rate: f64,
    /// The highest rate asked passed: the device may do more.
    pub at_ceiling: bool,
    /// Every trial, in order.
    pub trials: Vec<Sample>,
}

/// Finds the highest rate up to `ceiling` that meets `goal`: halves the interval between a rate that passes and one that
/// does not, then repeats the result; if a repetition fails, it goes down in steps that double until one passes every time.
///
/// # Errors
/// Whatever `trial` returns; the search ends there.
pub fn rate<E>(
    goal: Goal,
    ceiling: f64,
    mut trial: impl FnMut(f64) -> Result<Sample, E>,
) -> Result<Found, E> {
    let mut trials = Vec::new();
    let mut ask = |rate: f64, trials: &mut Vec<Sample>| -> Result<bool, E> {
        let sample = trial(rate)?;
        trials.push(sample);
        Ok(sample.passes(goal.tolerance))
    };
    let step = goal.precision * ceiling;
    let (mut low, mut high) = (0.0, ceiling);
    if ask(ceiling, &mut trials)? {
        low = ceiling;
    }
    while high - low > step {
        let middle = (low + high) / 2.0;
        if ask(middle, &mut trials)? {
            low = middle;
        } else {
            high = middle;
        }
    }
    let mut down = step;
    'candidates: while low > 0.0 {
        for _ in 0..goal.confirmations {
            if !ask(low, &mut trials)? {
                low = if low > down { low - down } else { 0.0 };
                down *= 2.0;
                continue 'candidates;
            }
        }
        break;
    }
    Ok(Found { rate: low, at_ceiling: low == ceiling, trials })
}

/// The longest burst that was found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Burst {
    /// Frames, one after the other as fast as the generator goes; 0 if even one was lost.
    pub frames: u64,
    /// The longest burst asked passed.
    pub at_limit: bool,
    /// Bursts sent.
    pub trials: u32,
}

/// Finds the longest burst up to `limit` frames that passes `repeats` times in a row without loss: doubles until one fails,
/// then halves the interval down to 2 %.
///
/// # Errors
/// Whatever `trial` returns.
pub fn burst<E>(
    limit: u64,
    repeats: u32,
    mut trial: impl FnMut(u64) -> Result<Sample, E>,
) -> Result<Burst, E> {
    let mut trials = 0;
    let mut passes = |frames: u64| -> Result<bool, E> {
        for _ in 0..repeats.max(1) {
            trials += 1;
            if !trial(frames)?.passes(0.0) {
                return Ok(false);
            }
        }
        Ok(true)
    };
    let (mut low, mut high) = (0, 1);
    while high < limit && passes(high)? {
        low = high;
        high = (high * 2).min(limit);
    }
    if high == limit && passes(limit)? {
        return Ok(Burst { frames: limit, at_limit: true, trials });
    }
    while high - low > (low / 50).max(1) {
        let middle = low + (high - low) / 2;
        if passes(middle)? {
            low = middle;
        } else {
            high = middle;
        }
    }
    Ok(Burst { frames: low, at_limit: false, trials })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::convert::Infallible;

    /// Carries `capacity` frames a second and no more; trials last a second.
    fn device(capacity: f64) -> impl FnMut(f64) -> Result<Sample, Infallible> {
        move |rate| {
            let lost = (rate - capacity).max(0.0).ceil() as u64;
            Ok(Sample { rate, due: rate as u64, lost })
        }
    }

    fn found(goal: Goal, ceiling: f64, device: impl FnMut(f64) -> Result<Sample, Infallible>) -> Found {
        match rate(goal, ceiling, device) {
            Ok(found) => found,
        }
    }

    #[test]
    fn the_no_drop_rate_is_just_below_the_capacity() {
        let f = found(NDR, 20e6, device(10_420_000.0));
        assert!(f.rate <= 10_420_000.0 && f.rate > 10_420_000.0 - 200_001.0, "{f:?}");
        assert!(!f.at_ceiling);
        assert!(f.trials.len() < 12, "{}", f.trials.len());
    }

    #[test]
    fn the_partial_drop_rate_is_where_half_a_percent_is_lost() {
        let f = found(PDR, 20e6, device(10e6));
        assert!((f.rate / 10.05e6 - 1.0).abs() < 0.02, "{f:?}");
        assert!(f.trials.iter().any(|t| t.lost > 0 && t.passes(0.005)) || f.rate <= 10e6);
    }

    #[test]
    fn a_device_faster_than_the_ceiling_says_so() {
        let f = found(NDR, 5e6, device(10e6));
        assert_eq!((f.rate, f.at_ceiling), (5e6, true));
    }

    #[test]
    fn a_dead_device_has_rate_zero() {
        let dead = |rate| Ok(Sample { rate, due: rate as u64, lost: rate as u64 });
        let f = found(NDR, 1e6, dead);
        assert_eq!((f.rate, f.at_ceiling), (0.0, false));
        let nothing_due = |rate| Ok(Sample { rate, due: 0, lost: 0 });
        assert_eq!(found(NDR, 1e6, nothing_due).rate, 0.0);
    }

    #[test]
    fn a_rate_that_passed_by_luck_is_not_believed() {
        // Above 4 Mpps every second trial loses a frame; below, none does.
        let mut n = 0;
        let flaky = move |rate: f64| {
            n += 1;
            let lost = u64::from(rate > 10e6 || rate > 4e6 && n % 2 == 0);
            Ok(Sample { rate, due: rate as u64, lost })
        };
        let f = found(NDR, 20e6, flaky);
        assert!(f.rate <= 4e6 && f.rate > 0.0, "{f:?}");
        let last: Vec<_> = f.trials.iter().rev().take(2).collect();
        assert!(last.iter().all(|t| t.rate == f.rate && t.lost == 0));
    }

    #[test]
    fn the_search_ends_with_the_first_error() {
        let mut asked = 0;
        let result = rate(NDR, 1e6, |_| -> Result<Sample, &str> {
            asked += 1;
            Err("cable pulled")
        });
        assert_eq!((result, asked), (Err("cable pulled"), 1));
    }

    #[test]
    fn the_longest_burst_is_found_within_two_percent() {
        for buffer in [1, 2, 255, 256, 1000, 777_777] {
            let mut trial = |frames: u64| -> Result<Sample, Infallible> {
                Ok(Sample { rate: 0.0, due: frames, lost: frames.saturating_sub(buffer) })
            };
            let Ok(b) = burst(1 << 20, 3, &mut trial);
            assert!(b.frames <= buffer && b.frames as f64 > 0.979 * buffer as f64 - 1.0, "{buffer}: {b:?}");
            let Ok(b) = burst(256, 3, &mut trial);
            assert_eq!(b.at_limit, buffer >= 256);
        }
    }

    proptest! {
        #[test]
        fn every_result_was_confirmed_and_is_within_the_precision(capacity in 1e4f64..30e6) {
            let f = found(NDR, 20e6, device(capacity));
            prop_assert!(f.rate <= capacity.min(20e6));
            prop_assert!(f.rate >= capacity.min(20e6) - 20e6 * NDR.precision - 1.0);
            if f.rate > 0.0 {
                prop_assert!(f.trials.iter().rev().take(2).all(|t| t.rate == f.rate && t.lost == 0));
            }
        }
    }
}
