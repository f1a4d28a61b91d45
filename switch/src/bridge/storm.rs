//! Storm limits: how many broadcast, multicast and unknown frames a second a port may bring in.
//!
//! One bucket for each port and kind, shared by all workers that poll queues of the port, so that the limit is the port's
//! however its queues are spread. It is one atomic word, written at most once per burst, and only by bursts that
//! hold such frames. Time is what the caller says it is: no clock is read here.
//!
//! The word is the time at which the bucket will be full again (the "generic cell rate algorithm", ITU-T I.371): a
//! frame moves it ahead by one frame's interval, and a frame that would move it further ahead of now than the burst
//! allows is refused. Nothing needs refilling.

use std::sync::atomic::{AtomicU64, Ordering};

/// Fractions of a cycle: at 20 million frames a second of 2.6 GHz, the interval is exact to 0.05 %.
const FRACTION_BITS: u32 = 4;

/// A limit in frames a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StormRate {
    /// Frames a second; 0 refuses all.
    pub frames: u32,
    /// Frames that may come at once after a quiet time; at least 1 where `frames` is not 0.
    pub burst: u32,
}

/// Kinds of frames that go to more ports than one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flood {
    /// To ff:ff:ff:ff:ff:ff.
    Broadcast,
    /// To any other group.
    Multicast,
    /// To a station whose port is not known.
    Unknown,
}

/// The limits of one port. Shared by the configuration before and after a change that leaves them as they are.
#[derive(Debug, Default)]
pub struct StormGuard {
    kinds: [Option<Bucket>; 3],
}

/// On a line of its own: ports are polled by different workers.
#[derive(Debug)]
#[repr(align(64))]
struct Bucket {
    full_at: AtomicU64,
    interval: u64,
    tolerance: u64,
}

impl StormGuard {
    /// Limits for broadcast, multicast and unknown frames (`None` is unlimited), for a clock of `cycles_per_second`.
    pub fn new(
        broadcast: Option<StormRate>,
        multicast: Option<StormRate>,
        unknown: Option<StormRate>,
        cycles_per_second: u64,
    ) -> Self {
        Self {
            kinds: [broadcast, multicast, unknown]
                .map(|rate| rate.map(|rate| Bucket::new(rate, cycles_per_second))),
        }
    }

    /// How many of `frames` may pass at `now` (cycles); the others are to be dropped.
    #[inline]
    pub fn admit(&self, kind: Flood, frames: usize, now: u64) -> usize {
        match &self.kinds[kind as usize] {
            None => frames,
            Some(bucket) => bucket.admit(frames as u64, now) as usize,
        }
    }
}

impl Bucket {
    fn new(rate: StormRate, cycles_per_second: u64) -> Self {
        if rate.frames == 0 {
            return Self { full_at: AtomicU64::new(0), interval: 0, tolerance: 0 };
        }
        let second = cycles_per_second.max(1) << FRACTION_BITS;
        let interval = (second / u64::from(rate.frames)).max(1);
        let tolerance = interval.saturating_mul(u64::from(rate.burst.max(1)));
        Self { full_at: AtomicU64::new(0), interval, tolerance }
    }

    fn admit(&self, frames: u64, now: u64) -> u64 {
        if self.interval == 0 {
            return 0;
        }
        let now = now << FRACTION_BITS;
        // Another worker's clock may be a little ahead of ours, and another worker may come between: then once more.
        let mut full_at = self.full_at.load(Ordering::Relaxed);
        loop {
            let from = full_at.max(now);
            let admitted = frames.min((now + self.tolerance).saturating_sub(from) / self.interval);
            if admitted == 0 {
                return 0;
            }
            let new = from + admitted * self.interval;
            match self.full_at.compare_exchange_weak(full_at, new, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return admitted,
                Err(current) => full_at = current,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HZ: u64 = 2_600_000_000;

    fn broadcast(frames: u32, burst: u32) -> StormGuard {
        StormGuard::new(Some(StormRate { frames, burst }), None, None, HZ)
    }

    #[test]
    fn a_burst_passes_at_once_and_then_the_rate() {
        let guard = broadcast(1000, 50);
        assert_eq!(guard.admit(Flood::Broadcast, 64, HZ), 50);
        assert_eq!(guard.admit(Flood::Broadcast, 64, HZ), 0);
        assert_eq!(guard.admit(Flood::Broadcast, 64, HZ + HZ / 100), 10);
        assert_eq!(guard.admit(Flood::Broadcast, 64, 10 * HZ), 50);
    }

    #[test]
    fn what_has_no_limit_passes_and_a_limit_of_zero_refuses_all() {
        let guard = StormGuard::new(None, Some(StormRate { frames: 0, burst: 9 }), None, HZ);
        assert_eq!(guard.admit(Flood::Broadcast, 64, 0), 64);
        assert_eq!(guard.admit(Flood::Unknown, 64, 0), 64);
        assert_eq!(guard.admit(Flood::Multicast, 64, 5 * HZ), 0);
    }

    #[test]
    fn a_clock_that_is_a_little_behind_gets_nothing_extra() {
        let guard = broadcast(1000, 10);
        assert_eq!(guard.admit(Flood::Broadcast, 64, HZ), 10);
        assert_eq!(guard.admit(Flood::Broadcast, 64, HZ - 1000), 0);
        assert_eq!(guard.admit(Flood::Broadcast, 64, 0), 0);
    }

    #[test]
    fn several_workers_together_get_the_port_s_limit() {
        let guard = broadcast(1, 100_000);
        let total: usize = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..3)
                .map(|_| {
                    scope.spawn(|| (0..5000).map(|_| guard.admit(Flood::Broadcast, 32, HZ)).sum::<usize>())
                })
                .collect();
            workers.into_iter().map(|worker| worker.join().unwrap()).sum()
        });
        assert_eq!(total, 100_000);
    }

    proptest! {
        #[test]
        fn over_any_time_no_more_than_rate_and_burst_pass(
            frames in 1u32..20_000_000, burst in 1u32..5000, steps in prop::collection::vec((0u64..HZ / 10, 1usize..64), 1..200),
        ) {
            let guard = broadcast(frames, burst);
            let (mut now, mut passed) = (HZ, 0u64);
            for (step, offered) in steps {
                now += step;
                let admitted = guard.admit(Flood::Broadcast, offered, now);
                prop_assert!(admitted <= offered);
                passed += admitted as u64;
                let most = u128::from(now - HZ) * u128::from(frames) * 1001 / 1000 / u128::from(HZ) + u128::from(burst) + 1;
                prop_assert!(u128::from(passed) <= most, "{passed} of at most {most}");
            }
        }
    }
}
