//! A busy loop that looks at the clock: whatever takes the core away from it shows as a gap.
//!
//! Owns the loop. It makes no system call and touches no memory but its own, so that nothing interrupts it which would not
//! interrupt a worker that polls.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::Serialize;

use crate::clock::{Clock, cycles};
use crate::histogram::Latencies;

/// How many of the longest gaps are told one by one.
const WORST: usize = 5;

/// Passes of the loop that took too long.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Gaps {
    /// How many.
    pub count: u64,
    /// Time lost in them, as a share of the whole, in parts per million.
    pub lost_ppm: f64,
    /// The longest, the longest first.
    pub worst: Vec<Gap>,
    /// All of them by length, the shortest first; only lengths that there were.
    pub lengths: Vec<Lengths>,
}

/// Gaps of about one length.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Lengths {
    /// From so many nanoseconds on.
    pub from_ns: u64,
    /// How many.
    pub count: u64,
    /// The longest of them.
    pub worst_ns: f64,
}

/// One of them.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Gap {
    /// When it began: seconds after the test did.
    pub at_s: f64,
    /// How long it was, in nanoseconds.
    pub ns: f64,
    /// What the kernel did meanwhile, if it was traced.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub by: Vec<String>,
    /// Its begin and end, in ticks of the counter.
    #[serde(skip)]
    pub(crate) ticks: (u64, u64),
}

/// Loops for `length`, or until `stop` is set. Every pass is recorded, in cycles; those of at least `gap` are told apart.
pub(super) fn run(clock: &Clock, length: Duration, gap: Duration, stop: &AtomicBool) -> (Latencies, Gaps) {
    let mut times = Latencies::default();
    let mut seen = Collector::new(gap, clock);
    let begin = cycles();
    let length = clock.cycles(length.as_secs_f64());
    let mut last = begin;
    while last.wrapping_sub(begin) < length && !stop.load(Ordering::Relaxed) {
        let now = cycles();
        // Not ordered across cores of a machine whose counters differ: the thread stays on its core.
        let pass = now.wrapping_sub(last);
        times.record(pass);
        if pass >= seen.threshold {
            seen.add(last.wrapping_sub(begin), pass);
        }
        last = now;
    }
    (times, seen.into_gaps(begin, last.wrapping_sub(begin), clock))
}

/// Where lengths begin, in nanoseconds: with `gap`, then 1, 2, 5, 10, … µs as far as they are longer, up to a second.
fn edges(gap: Duration) -> Vec<u64> {
    let gap = u64::try_from(gap.as_nanos()).unwrap_or(u64::MAX);
    let steps =
        (3..9).flat_map(|decade| [1, 2, 5].map(|step| step * 10u64.pow(decade))).chain([1_000_000_000]);
    std::iter::once(gap).chain(steps.filter(|step| *step > gap)).collect()
}

/// Gaps while the loop runs, in cycles. Allocates nothing after it was made.
struct Collector {
    threshold: u64,
    count: u64,
    lost: u64,
    /// Lengths: from how many nanoseconds and cycles on, how many, and the longest.
    lengths: Vec<(u64, u64, u64, u64)>,
    /// When and how long, the longest first; unused places are zero.
    worst: [(u64, u64); WORST],
}

impl Collector {
    fn new(gap: Duration, clock: &Clock) -> Self {
        let cycles = |ns: u64| clock.cycles(ns as f64 / 1e9).max(1);
        let lengths: Vec<_> = edges(gap).into_iter().map(|ns| (ns, cycles(ns), 0, 0)).collect();
        let threshold = lengths.first().map_or(1, |first| first.1);
        Self { threshold, count: 0, lost: 0, lengths, worst: [(0, 0); WORST] }
    }

    #[cold]
    fn add(&mut self, at: u64, length: u64) {
        self.count += 1;
        self.lost = self.lost.saturating_add(length);
        if let Some(of_its_length) = self.lengths.iter_mut().rev().find(|from| length >= from.1) {
            of_its_length.2 += 1;
            of_its_length.3 = of_its_length.3.max(length);
        }
        let shorter = self.worst.iter_mut().skip_while(|w| w.1 >= length);
        // It takes the place of the first that is shorter, that one the place of the next, and so on.
        shorter.fold((at, length), |moved, place| std::mem::replace(place, moved));
    }

    fn into_gaps(self, begin: u64, whole: u64, clock: &Clock) -> Gaps {
        let worst = self.worst.iter().take_while(|w| w.1 > 0);
        let gap = |&(at, length): &(u64, u64)| {
            let from = begin.wrapping_add(at);
            Gap {
                at_s: clock.seconds(at),
                ns: clock.nanos(length),
                by: Vec::new(),
                ticks: (from, from.wrapping_add(length)),
            }
        };
        let lengths = self.lengths.iter().filter(|of| of.2 > 0);
        Gaps {
            count: self.count,
            lost_ppm: 1e6 * self.lost as f64 / whole.max(1) as f64,
            worst: worst.map(gap).collect(),
            lengths: lengths
                .map(|&(from_ns, _, count, worst)| Lengths { from_ns, count, worst_ns: clock.nanos(worst) })
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_gaps_are_kept_the_longest_first() {
        let mut seen = Collector::new(Duration::from_nanos(10), &Clock { hz: 1e9 });
        for (at, length) in [(0, 20), (100, 50), (200, 10), (300, 40), (400, 30), (500, 60), (600, 15)] {
            seen.add(at, length);
        }
        seen.add(600, 3_000);
        let gaps = seen.into_gaps(7_000, 1_000, &Clock { hz: 1e9 });
        let lengths = |from_ns, count, worst_ns| Lengths { from_ns, count, worst_ns };
        assert_eq!(gaps.lengths, [lengths(10, 7, 60.0), lengths(2_000, 1, 3_000.0)]);
        assert_eq!(gaps.worst[0].ticks, (7_600, 10_600));
        assert_eq!(gaps.count, 8);
        assert!((gaps.lost_ppm - 3_225_000.0).abs() < 1e-6, "{gaps:?}");
        let kept: Vec<_> = gaps.worst.iter().map(|g| g.ns as u64).collect();
        assert_eq!(kept, [3_000, 60, 50, 40, 30]);
        assert!((gaps.worst[1].at_s - 500e-9).abs() < 1e-12);
    }

    #[test]
    fn lengths_begin_with_the_shortest_gap_and_go_up_to_a_second() {
        let of = |gap| edges(Duration::from_nanos(gap));
        assert_eq!(of(1_000)[..4], [1_000, 2_000, 5_000, 10_000]);
        assert_eq!(of(1_500)[..3], [1_500, 2_000, 5_000]);
        assert_eq!(of(300).last(), Some(&1_000_000_000));
        assert_eq!(of(5_000_000_000), [5_000_000_000]);
    }

    #[test]
    fn a_gap_that_somebody_makes_is_seen() {
        // A second thread on the same core, busy for 20 ms at a time: the loop loses the core meanwhile.
        let core = host::topology::permitted_cores().unwrap().iter().next().unwrap();
        let over = AtomicBool::new(false);
        let gaps = std::thread::scope(|scope| {
            scope.spawn(|| {
                host::thread::pin(core).unwrap();
                while !over.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
            let measured = scope.spawn(|| {
                host::thread::pin(core).unwrap();
                let found = run(
                    &Clock::of_this_machine(),
                    Duration::from_secs(1),
                    Duration::from_micros(500),
                    &AtomicBool::new(false),
                );
                over.store(true, Ordering::Relaxed);
                found.1
            });
            measured.join().unwrap()
        });
        assert!(gaps.count > 0 && gaps.lost_ppm > 100_000.0, "half of the core is the other's: {gaps:?}");
    }
}
