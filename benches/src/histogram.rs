//! Latencies: recorded in cycles, read in nanoseconds, never averaged.
//!
//! Owns the histogram and what may be said of it: a percentile is only shown with enough samples beyond it. Draws it for a
//! terminal. Knows nothing of frames.

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::clock::Clock;

/// The percentiles of every report.
pub const PERCENTILES: [(&str, f64); 5] =
    [("p50", 50.0), ("p90", 90.0), ("p99", 99.0), ("p99.9", 99.9), ("p99.99", 99.99)];

/// Samples that must lie beyond a percentile before it means anything.
const BEYOND: f64 = 10.0;
/// The longest time that is told apart from a longer one, in cycles: about 25 s.
const LONGEST: u64 = 1 << 36;

/// A histogram of times with an error below 1 % (two significant digits).
#[derive(Clone, Debug)]
pub struct Latencies {
    cycles: Histogram<u64>,
}

impl Default for Latencies {
    fn default() -> Self {
        // The bounds are constants within what the crate allows (1 <= low, 2 * low <= high, digits <= 5).
        let cycles = Histogram::new_with_bounds(1, LONGEST, 2).unwrap_or_else(|_| unreachable!());
        Self { cycles }
    }
}

/// What a histogram says, in nanoseconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Samples recorded.
    pub samples: u64,
    /// The smallest.
    pub min_ns: Option<f64>,
    /// [`PERCENTILES`], each with its time, or none where there are too few samples.
    pub percentiles: Vec<Percentile>,
    /// The largest.
    pub max_ns: Option<f64>,
}

/// One percentile.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Percentile {
    /// Its name: `p99.9`.
    pub name: &'static str,
    /// In percent.
    pub percent: f64,
    /// Its time in nanoseconds; none if fewer than ten samples lie beyond it.
    pub ns: Option<f64>,
}

impl Latencies {
    /// Records one time, in cycles.
    #[inline(always)]
    pub fn record(&mut self, cycles: u64) {
        self.cycles.saturating_record(cycles);
    }

    /// Adds everything that `other` holds.
    pub fn add(&mut self, other: &Latencies) {
        // Both have the same bounds, so that nothing is out of range.
        let _ = self.cycles.add(&other.cycles);
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.cycles.reset();
    }

    /// How many were recorded.
    pub fn samples(&self) -> u64 {
        self.cycles.len()
    }

    /// The time below which `percent` of the samples lie, in nanoseconds, if there are enough of them.
    pub fn percentile(&self, percent: f64, clock: &Clock) -> Option<f64> {
        let beyond = self.samples() as f64 * (100.0 - percent) / 100.0;
        // p50 of 20 samples, p99.99 of 100,000: ten lie beyond (less what floating point loses).
        (beyond + 1e-6 >= BEYOND).then(|| clock.nanos(self.cycles.value_at_percentile(percent)))
    }

    /// The largest time, in nanoseconds.
    pub fn max(&self, clock: &Clock) -> Option<f64> {
        (self.samples() > 0).then(|| clock.nanos(self.cycles.max()))
    }

    /// Everything that a report of traffic says of it.
    pub fn summary(&self, clock: &Clock) -> Summary {
        self.summary_of(&PERCENTILES, clock)
    }

    /// The same with other percentiles: names and percents.
    pub fn summary_of(&self, percentiles: &[(&'static str, f64)], clock: &Clock) -> Summary {
        let percentile = |&(name, percent): &(&'static str, f64)| Percentile {
            name,
            percent,
            ns: self.percentile(percent, clock),
        };
        Summary {
            samples: self.samples(),
            min_ns: (self.samples() > 0).then(|| clock.nanos(self.cycles.min())),
            percentiles: percentiles.iter().map(percentile).collect(),
            max_ns: self.max(clock),
        }
    }

    /// Points of the curve "time by percentile", denser towards 100 %, up to what the samples support.
    pub fn curve(&self, clock: &Clock) -> Vec<(f64, f64)> {
        let mut points = Vec::new();
        // Each decade of "one in n" in nine steps: 0, 10, 20, … 90, 91, … 99, 99.1, … percent.
        for decade in 0..6 {
            for step in 0..9 {
                let beyond = (10.0 - f64::from(step)) * 10f64.powi(1 - decade);
                let percent = 100.0 - beyond;
                match self.percentile(percent, clock) {
                    Some(ns) => points.push((percent, ns)),
                    None => return points,
                }
            }
        }
        points
    }

    /// Lines that draw the distribions for a terminal: times grow by a constant factor from line to line, the bar is the
    /// share of samples, at most `width` characters. From p0.1 to p99.9; what lies outside is in the first and last line.
    pub fn draw(&self, lines: usize, width: usize, clock: &Clock) -> Vec<String> {
        if self.samples() == 0 || lines == 0 {
            return Vec::new();
        }
        let low = self.cycles.value_at_percentile(0.1).max(1) as f64;
        let high = (self.cycles.value_at_percentile(99.9) as f64).max(low * 1.05);
        let step = (high / low).powf(1.0 / lines as f64);
        let mut counts = vec![0u64; lines];
        for bin in self.cycles.iter_recorded() {
            let place = ((bin.value_iterated_to() as f64 / low).ln() / step.ln()).floor().max(0.0) as usize;
            if let Some(count) = counts.get_mut(place.min(lines - 1)) {
                *count += bin.count_since_last_iteration();
            }
        }
        let most = counts.iter().copied().max().unwrap_or(1).max(1) as f64;
        let line = |(i, &count): (usize, &u64)| {
            let from = low * step.powi(i as i32) / clock.hz * 1e9;
            let share = 100.0 * count as f64 / self.samples() as f64;
            let bar = bar(count as f64 / most * width as f64);
            format!("{:>9}  {bar:width$}  {share:>6.2} %", time(from))
        };
        counts.iter().enumerate().map(line).collect()
    }
}

/// A bar of `length` characters, in eighths.
fn bar(length: f64) -> String {
    const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    let eighths = (length * 8.0).round() as usize;
    // Anything at all is visible.
    let eighths = if eighths == 0 && length > 0.0 { 1 } else { eighths };
    "█".repeat(eighths / 8) + EIGHTHS.get(eighths % 8).copied().unwrap_or_default()
}

/// A time as people read it: three digits and a unit.
pub fn time(ns: f64) -> String {
    let (value, unit) = match ns {
        ns if ns < 1e3 => (ns, "ns"),
        ns if ns < 1e6 => (ns / 1e3, "µs"),
        ns if ns < 1e9 => (ns / 1e6, "ms"),
        ns => (ns / 1e9, "s"),
    };
    let digits = if unit == "ns" || value >= 100.0 {
        0
    } else if value >= 10.0 {
        1
    } else {
        2
    };
    format!("{value:.digits$} {unit}")
}

/// A time, or "-" where there is none.
pub fn time_or_dash(ns: Option<f64>) -> String {
    ns.map_or_else(|| "-".into(), time)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIGAHERTZ: Clock = Clock { hz: 1e9 };

    fn of(samples: impl IntoIterator<Item = u64>) -> Latencies {
        let mut latencies = Latencies::default();
        samples.into_iter().for_each(|s| latencies.record(s));
        latencies
    }

    #[test]
    fn percentiles_are_within_one_percent() {
        let summary = of(1..=1_000_000).summary(&GIGAHERTZ);
        assert_eq!(summary.samples, 1_000_000);
        for p in &summary.percentiles {
            let want = p.percent * 1e4;
            assert!((p.ns.unwrap() / want - 1.0).abs() < 0.01, "{p:?}");
        }
        assert!((summary.max_ns.unwrap() / 1e6 - 1.0).abs() < 0.01);
    }

    #[test]
    fn a_percentile_without_ten_samples_beyond_it_is_not_shown() {
        let names = |n: u64| -> Vec<_> {
            let shown = of(1..=n).summary(&GIGAHERTZ).percentiles.into_iter().filter(|p| p.ns.is_some());
            shown.map(|p| p.name).collect()
        };
        assert_eq!(names(0), [""; 0]);
        assert_eq!(names(19), [""; 0]);
        assert_eq!(names(20), ["p50"]);
        assert_eq!(names(1_000), ["p50", "p90", "p99"]);
        assert_eq!(names(99_999), ["p50", "p90", "p99", "p99.9"]);
        assert_eq!(names(100_000), ["p50", "p90", "p99", "p99.9", "p99.99"]);
        assert_eq!(time_or_dash(None), "-");
    }

    #[test]
    fn the_curve_rises_and_ends_where_the_samples_end() {
        let curve = of(1..=10_000).curve(&GIGAHERTZ);
        assert!(curve.windows(2).all(|w| w[0].0 < w[1].0 && w[0].1 <= w[1].1));
        assert!((curve.last().unwrap().0 - 99.9).abs() < 0.01, "{:?}", curve.last());
    }

    #[test]
    fn a_time_beyond_the_longest_is_kept_as_the_longest() {
        let latencies = of([1, u64::MAX]);
        assert_eq!(latencies.samples(), 2);
        assert!(latencies.max(&GIGAHERTZ).unwrap() >= LONGEST as f64);
    }

    #[test]
    fn the_drawing_has_the_longest_bar_where_most_samples_are_and_loses_none() {
        let lines = of((0..900).map(|_| 1_000).chain(2_000..2_100)).draw(8, 20, &GIGAHERTZ);
        assert_eq!(lines.len(), 8);
        assert!(lines[0].contains(&"█".repeat(20)), "{lines:?}");
        let share = |l: &String| l.trim_end_matches(" %").rsplit(' ').next().unwrap().parse::<f64>().unwrap();
        let total: f64 = lines.iter().map(share).sum();
        assert!((total - 100.0).abs() < 0.1, "{total}");
        assert!(Latencies::default().draw(8, 20, &GIGAHERTZ).is_empty());
    }

    #[test]
    fn times_have_three_digits_and_a_unit() {
        let shown: Vec<_> = [742.4, 1_234.0, 12_345.0, 123_456.0, 7.1e6, 2.5e9].map(time).into();
        assert_eq!(shown, ["742 ns", "1.23 µs", "12.3 µs", "123 µs", "7.10 ms", "2.50 s"]);
    }
}
