//! What became of the frames of one stream: lost, duplicated, out of order, by their sequence numbers.
//!
//! Owns the numbers that are still missing, as gaps between those that came. A frame that comes when it is expected costs
//! one comparison. Knows nothing of bytes or time.

use std::collections::VecDeque;

/// Gaps that are remembered. When there are more, the oldest is given up: its frames stay missing, and count as duplicates
/// should they come after all.
const GAPS: usize = 65_536;

/// Counts of one stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Counts {
    /// Frames that came for the first time.
    pub received: u64,
    /// Frames that had come before.
    pub duplicates: u64,
    /// Frames that came after one with a higher number.
    pub reordered: u64,
    /// Numbers that were passed over and have not come since.
    pub missing: u64,
}

/// The receiving end of a stream whose frames are numbered from 0.
#[derive(Debug, Default)]
pub struct Ledger {
    next: u64,
    counts: Counts,
    /// Half-open ranges of numbers that have not come, ascending.
    gaps: VecDeque<(u64, u64)>,
}

impl Ledger {
    /// Enters the frame number `sequence`.
    #[inline(always)]
    pub fn enter(&mut self, sequence: u64) {
        if sequence == self.next {
            self.next += 1;
            self.counts.received += 1;
        } else {
            self.enter_unexpected(sequence);
        }
    }

    /// What is known now.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// The number after the highest that came.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Counts all numbers below `sequence` that have not come as missing.
    pub fn skip_to(&mut self, sequence: u64) {
        if sequence > self.next {
            self.counts.missing += sequence - self.next;
            self.gaps.push_back((self.next, sequence));
            self.gaps.drain(..self.gaps.len().saturating_sub(GAPS));
            self.next = sequence;
        }
    }

    #[cold]
    #[inline(never)]
    fn enter_unexpected(&mut self, sequence: u64) {
        if sequence > self.next {
            self.skip_to(sequence);
            self.counts.received += 1;
            self.next = sequence + 1;
            return;
        }
        // The last gap that begins at or before it.
        let after = self.gaps.partition_point(|gap| gap.0 <= sequence);
        match after.checked_sub(1).and_then(|at| self.gaps.get(at).copied().map(|gap| (at, gap))) {
            Some((at, (from, to))) if sequence < to => {
                self.counts.received += 1;
                self.counts.reordered += 1;
                self.counts.missing -= 1;
                self.close(at, (from, to), sequence);
            }
            _ => self.counts.duplicates += 1,
        }
    }

    fn close(&mut self, at: usize, (from, to): (u64, u64), sequence: u64) {
        self.gaps.remove(at);
        if sequence + 1 < to {
            self.gaps.insert(at, (sequence + 1, to));
        }
        if from < sequence {
            self.gaps.insert(at, (from, sequence));
        }
        self.gaps.drain(..self.gaps.len().saturating_sub(GAPS));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn after(sequences: &[u64]) -> Counts {
        let mut ledger = Ledger::default();
        sequences.iter().for_each(|&s| ledger.enter(s));
        ledger.counts()
    }

    #[test]
    fn frames_in_order_are_received_and_nothing_else() {
        assert_eq!(after(&[0, 1, 2, 3]), Counts { received: 4, ..Counts::default() });
    }

    #[test]
    fn a_late_frame_is_reordered_and_no_longer_missing() {
        assert_eq!(after(&[0, 3]), Counts { received: 2, missing: 2, ..Counts::default() });
        assert_eq!(after(&[0, 3, 1]), Counts { received: 3, missing: 1, reordered: 1, duplicates: 0 });
        assert_eq!(after(&[0, 3, 1, 1]), Counts { received: 3, missing: 1, reordered: 1, duplicates: 1 });
    }

    #[test]
    fn memory_stays_bounded_when_every_second_frame_is_lost() {
        let mut ledger = Ledger::default();
        for s in 0..4 * GAPS as u64 {
            ledger.enter(2 * s + 1);
        }
        for s in (0..8 * GAPS as u64).rev().step_by(3) {
            ledger.enter(s);
        }
        assert!(ledger.gaps.len() <= GAPS);
    }

    #[test]
    fn frames_lost_without_end_are_all_counted() {
        let mut ledger = Ledger::default();
        for s in 0..4 * GAPS as u64 {
            ledger.enter(2 * s + 1);
        }
        assert_eq!(ledger.counts().missing, 4 * GAPS as u64);
    }

    proptest! {
        /// Any arrival order, with losses and repetitions, against a set that remembers everything.
        #[test]
        fn counts_are_exact_for_any_arrivals(arrivals in proptest::collection::vec(0u64..200, 0..400)) {
            let (mut seen, mut highest) = (std::collections::HashSet::new(), None);
            let mut want = Counts::default();
            for &s in &arrivals {
                if !seen.insert(s) {
                    want.duplicates += 1;
                } else {
                    want.received += 1;
                    want.reordered += u64::from(highest.is_some_and(|h| s < h));
                }
                highest = highest.max(Some(s));
            }
            want.missing = highest.map_or(0, |h| h + 1 - seen.len() as u64);
            prop_assert_eq!(after(&arrivals), want);
        }
    }
}
