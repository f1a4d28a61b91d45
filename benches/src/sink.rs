//! Where frames of one stream arrive: judged, entered in the ledger, timed.

use serde::Serialize;

use crate::accounting::{Counts, Ledger};
use crate::endpoint::Bytes;
use crate::frame::{Checker, Verdict, Verify};
use crate::histogram::Latencies;

/// What arrived.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Arrivals {
    /// Intact frames of this stream, by sequence number.
    #[serde(flatten)]
    pub counts: Counts,
    /// Test frames whose bytes changed on the way. Their numbers are missing too.
    pub corrupt: u64,
    /// Intact test frames of another stream: sent to the wrong port, or left over from an earlier trial.
    pub stray: u64,
    /// Frames that are none of ours.
    pub foreign: u64,
}

/// The receiving end of a stream.
pub struct Sink {
    stream: u16,
    checker: Checker,
    ledger: Ledger,
    corrupt: u64,
    stray: u64,
    foreign: u64,
    /// Times from the frame's stamp to its arrival.
    pub latencies: Latencies,
}

impl Sink {
    /// Expects frames of `size` bytes of `stream`.
    pub fn new(stream: u16, size: usize, verify: Verify) -> Self {
        Self {
            stream,
            checker: Checker::new(size, verify),
            ledger: Ledger::default(),
            corrupt: 0,
            stray: 0,
            foreign: 0,
            latencies: Latencies::default(),
        }
    }

    /// Takes a frame that was found in the ring at `now` (cycles). Returns whether it is intact and of this stream.
    #[inline(always)]
    pub fn take(&mut self, frame: impl Bytes, now: u64) -> bool {
        match self.checker.judge(frame) {
            Verdict::Intact { stream, sequence, stamp } if stream == self.stream => {
                self.ledger.enter(sequence);
                self.latencies.record(now.saturating_sub(stamp));
                true
            }
            other => {
                self.count(other);
                false
            }
        }
    }

    #[cold]
    fn count(&mut self, verdict: Verdict) {
        match verdict {
            Verdict::Intact { .. } => self.stray += 1,
            Verdict::Corrupt => self.corrupt += 1,
            Verdict::Foreign => self.foreign += 1,
        }
    }

    /// What arrived so far.
    pub fn arrivals(&self) -> Arrivals {
        let (corrupt, stray, foreign) = (self.corrupt, self.stray, self.foreign);
        Arrivals { counts: self.ledger.counts(), corrupt, stray, foreign }
    }

    /// Frames with numbers below `sent` that may still come: not here, and not known to be missing.
    #[inline(always)]
    pub fn awaited(&self, sent: u64) -> u64 {
        sent.saturating_sub(self.ledger.next())
    }

    /// Gives up on every frame below `sent` that has not come: it is missing.
    pub fn give_up(&mut self, sent: u64) {
        self.ledger.skip_to(sent);
    }
}
