//! When the next frame is due: an open-loop schedule that does not care how the last frame fared.
//!
//! A frame that cannot be sent when it is due stays due at that time, and its latency counts from then: a slow switch
//! cannot hide behind a generator that waits for it ("coordinated omission").

use crate::clock::Clock;

/// Bits behind the binary point: 10^12 frames drift by less than a microsecond.
const FRACTION: u32 = 20;

/// Evenly spaced times, in cycles.
#[derive(Clone, Debug)]
pub struct Schedule {
    start: u64,
    interval: u64,
    next: u64,
}

impl Schedule {
    /// `rate` frames a second from `start` (cycles) on. An infinite rate makes every frame due at once.
    pub fn new(rate: f64, start: u64, clock: &Clock) -> Self {
        let interval = if rate > 0.0 { clock.hz / rate * f64::from(1u32 << FRACTION) } else { f64::MAX };
        // Saturates: at a rate of 0 the second frame is due in some hundred years.
        Self { start, interval: interval.min((1u64 << 62) as f64) as u64, next: 0 }
    }

    /// When the next frame is due, in cycles.
    #[inline(always)]
    pub fn due(&self) -> u64 {
        self.start.wrapping_add(self.next >> FRACTION)
    }

    /// Moves on to the frame after it.
    #[inline(always)]
    pub fn advance(&mut self) {
        self.next = self.next.saturating_add(self.interval);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_holds_as_many_frames_as_the_rate_says() {
        let clock = Clock { hz: 2.6e9 };
        for rate in [1.0, 1000.0, 14_880_952.0, 37_123_456.7] {
            let mut schedule = Schedule::new(rate, 1_000, &clock);
            let mut frames = 0u64;
            while schedule.due() < 1_000 + 2_600_000_000 {
                schedule.advance();
                frames += 1;
            }
            assert!((frames as f64 - rate).abs() <= 1.5, "{frames} at {rate}");
        }
    }

    #[test]
    fn an_infinite_rate_makes_everything_due_at_once_and_no_rate_almost_nothing() {
        let clock = Clock { hz: 1e9 };
        let mut schedule = Schedule::new(f64::INFINITY, 5, &clock);
        (0..1000).for_each(|_| schedule.advance());
        assert_eq!(schedule.due(), 5);
        let mut schedule = Schedule::new(0.0, 5, &clock);
        schedule.advance();
        assert!(schedule.due() > 1 << 40);
    }
}
