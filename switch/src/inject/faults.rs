//! What becomes of each frame, decided by a seed.
//!
//! A frame's fate depends on the seed, its queue, its direction and how many frames came before it, and on nothing else: not on
//! bursts, times or other frames' fates. Knows no frame.

use crate::config::{Inject, Share};

/// Frames that a reordered one is let pass by, at most.
pub(super) const REACH: u64 = 4;

/// Decides, frame by frame.
pub(super) struct Faults {
    drop: Share,
    corrupt: Share,
    duplicate: Share,
    reorder: Share,
    random: oorandom::Rand32,
}

/// What becomes of one frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Fate {
    /// It is lost.
    pub(super) drop: bool,
    /// One of its bits is turned round: this one, counted modulo the frame's bits.
    pub(super) corrupt: Option<u32>,
    /// It comes twice.
    pub(super) duplicate: bool,
    /// So many of those that come after it go before it; 0: it keeps its place.
    pub(super) behind: u64,
}

impl Faults {
    /// Those of one queue and direction, which `stream` numbers.
    pub(super) fn new(inject: &Inject, stream: u64) -> Self {
        let Inject { seed, drop, corrupt, duplicate, reorder, .. } = *inject;
        Self { drop, corrupt, duplicate, reorder, random: oorandom::Rand32::new_inc(seed, stream) }
    }

    /// The fate of the next frame.
    pub(super) fn next(&mut self) -> Fate {
        // As many numbers for each frame, whatever becomes of it: one rate does not change whom another hits.
        let [drop, corrupt, duplicate, reorder, bit, reach] = [(); 6].map(|()| self.random.rand_u32());
        Fate {
            drop: self.drop.holds(drop),
            corrupt: self.corrupt.holds(corrupt).then_some(bit),
            duplicate: self.duplicate.holds(duplicate),
            behind: if self.reorder.holds(reorder) { 1 + u64::from(reach) % REACH } else { 0 },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inject(seed: u64, percent: [u32; 4]) -> Inject {
        let [drop, corrupt, duplicate, reorder] = percent.map(|n| Share::of_millionths(n * 10_000));
        Inject { seed, drop, corrupt, duplicate, reorder, ..Inject::default() }
    }

    fn fates(inject: &Inject, stream: u64, count: usize) -> Vec<Fate> {
        let mut faults = Faults::new(inject, stream);
        std::iter::repeat_with(|| faults.next()).take(count).collect()
    }

    #[test]
    fn nothing_happens_at_zero_and_everything_at_a_hundred_percent() {
        assert!(fates(&inject(1, [0; 4]), 0, 10_000).iter().all(|fate| *fate == Fate::default()));
        for fate in fates(&inject(1, [100; 4]), 0, 10_000) {
            assert!(
                fate.drop && fate.corrupt.is_some() && fate.duplicate && (1..=REACH).contains(&fate.behind)
            );
        }
    }

    #[test]
    fn one_rate_does_not_change_whom_another_hits() {
        let drops =
            |inject: &Inject| -> Vec<bool> { fates(inject, 3, 1_000).iter().map(|f| f.drop).collect() };
        assert_eq!(drops(&inject(9, [20, 0, 0, 0])), drops(&inject(9, [20, 50, 60, 70])));
    }

    proptest::proptest! {
        #[test]
        fn the_same_seed_hits_the_same_frames_and_others_hit_others(seed in 0..u64::MAX / 2, stream in 0u64..200) {
            let all = inject(seed, [30; 4]);
            let once = fates(&all, stream, 300);
            assert_eq!(once, fates(&all, stream, 300));
            assert_ne!(once, fates(&inject(seed + 1, [30; 4]), stream, 300));
            assert_ne!(once, fates(&all, stream + 1, 300));
        }

        #[test]
        fn rates_are_kept_within_six_standard_deviations(seed: u64, percent in proptest::array::uniform4(0u32..=100)) {
            const FRAMES: usize = 20_000;
            let seen = fates(&inject(seed, percent), 1, FRAMES);
            let count = |of: fn(&Fate) -> bool| seen.iter().filter(|fate| of(fate)).count() as f64;
            let counts = [count(|f| f.drop), count(|f| f.corrupt.is_some()), count(|f| f.duplicate), count(|f| f.behind > 0)];
            for (percent, seen) in percent.into_iter().zip(counts) {
                let p = f64::from(percent) / 100.0;
                let (mean, deviation) = (p * FRAMES as f64, (p * (1.0 - p) * FRAMES as f64).sqrt());
                assert!((seen - mean).abs() <= 6.0 * deviation + 1.0, "{percent} %: {seen} of {FRAMES}");
            }
        }
    }
}
