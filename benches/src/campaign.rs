//! All trials of one switch: frame size by frame size, in the order in which an engineer would ask.
//!
//! First the closed loop, which finds about what the switch can carry; then the rates of RFC 2544 below that; then
//! latency at parts of the no-drop rate. Owns that order and nothing of how a trial is run or shown.

use serde::Serialize;

use crate::endpoint::Endpoint;
use crate::frame::Verify;
use crate::histogram::Summary;
use crate::search::{self, Burst, Found, NDR, PDR, Sample};
use crate::silence::SOME_MAY_BE_LOST;
use crate::station::WhenFull;
use crate::trial::{Load, Outcome, Rig, Traffic};

/// Bytes on an Ethernet wire that are not in a frame as sizes are given here: preamble 7, delimiter 1, FCS 4, gap 12.
pub const WIRE_OVERHEAD: usize = 24;
/// How far above the closed loop's rate the search begins.
const HEADROOM: f64 = 1.25;
/// The longest burst that is tried, in frames.
const LONGEST_BURST: u64 = 1 << 17;
/// The generator counts as the bottleneck when it was busy for more than this share of a trial.
const GENERATOR_LIMIT: f64 = 0.95;

/// What is to be measured.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// Frame sizes in bytes, without FCS.
    pub sizes: Vec<usize>,
    /// Seconds of each trial.
    pub seconds: f64,
    /// Frames in flight in the closed loop.
    pub in_flight: u64,
    /// Addresses behind each port, traffic to all of them.
    pub addresses: u32,
    /// How much of each received frame is read.
    pub verify: Verify,
    /// Whether to search for the no-drop and partial-drop rates and the longest burst.
    pub search: bool,
    /// Whether to measure latency at 10, 50 and 90 % of the no-drop rate.
    pub latency: bool,
}

/// A rate, in the units that people ask for. Frames of both directions are counted.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Rate {
    /// Million frames a second.
    pub mpps: f64,
    /// Frame bytes only, without FCS.
    pub gbit: f64,
    /// As an Ethernet wire would carry it: with 24 bytes of preamble, FCS and gap a frame.
    pub gbit_wire: f64,
}

impl Rate {
    /// `frames` a second of `size` bytes.
    pub fn new(frames: f64, size: usize) -> Self {
        let gbit = |bytes: usize| frames * bytes as f64 * 8.0 / 1e9;
        Self { mpps: frames / 1e6, gbit: gbit(size), gbit_wire: gbit(size + WIRE_OVERHEAD) }
    }
}

/// Work of the switch's data thread, if it tells.
#[derive(Clone, Copy, Debug, Default)]
pub struct Work {
    /// Cycles in which it did anything but poll in vain.
    pub busy_cycles: u64,
    /// Frames it forwarded.
    pub frames: u64,
}

/// What a closed loop found.
#[derive(Clone, Debug, Serialize)]
pub struct ClosedLoop {
    /// Frames delivered, both ways.
    pub rate: Rate,
    /// Cycles of the switch's data thread for each frame, if it tells.
    pub worker_cycles: Option<f64>,
    /// Round trip of a full pipe.
    pub round_trip: Summary,
    /// Frames lost.
    pub lost: u64,
    /// Frames that came twice.
    pub duplicates: u64,
    /// Frames damaged.
    pub corrupt: u64,
    /// Part of its time that the generator was busy.
    pub generator_busy: f64,
}

/// A rate that was searched for.
#[derive(Clone, Debug, Serialize)]
pub struct Throughput {
    /// The rate.
    pub rate: Rate,
    /// How it was found.
    pub found: Found,
    /// The generator was busy nearly all the time in the last trial: the switch may do more.
    pub generator_limited: bool,
}

/// Latency at one load.
#[derive(Clone, Debug, Serialize)]
pub struct LoadLatency {
    /// Percent of the no-drop rate.
    pub percent: u32,
    /// The rate offered.
    pub rate: Rate,
    /// One way, from when a frame was due.
    pub one_way: Summary,
    /// The curve: percent, nanoseconds.
    pub curve: Vec<(f64, f64)>,
    /// Frames lost in this trial.
    pub lost: u64,
}

/// Everything about one frame size.
#[derive(Clone, Debug, Serialize)]
pub struct SizeResult {
    /// Bytes, without FCS.
    pub size: usize,
    /// The closed loop.
    pub closed_loop: ClosedLoop,
    /// The no-drop rate.
    pub ndr: Option<Throughput>,
    /// The partial-drop rate (0.5 %).
    pub pdr: Option<Throughput>,
    /// The longest burst in one direction without loss.
    pub back_to_back: Option<Burst>,
    /// Latency at parts of the no-drop rate.
    pub latency: Vec<LoadLatency>,
}

impl SizeResult {
    /// Whether the generator, not the switch, may have set a figure.
    pub fn generator_limited(&self) -> bool {
        let searched = [&self.ndr, &self.pdr].into_iter().flatten().any(|t| t.generator_limited);
        searched || self.closed_loop.generator_busy > GENERATOR_LIMIT
    }
}

/// Why a campaign ended before its end.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum CampaignError {
    /// The user wants to stop.
    #[error("stopped before the end; the results so far follow")]
    Stopped,
    /// Nothing comes through.
    #[error(
        "no frame of {size} bytes came through ({sent} sent): see that the switch forwards between the two ports, and that \
         its MTU is large enough"
    )]
    Silent {
        /// Frame size in bytes.
        size: usize,
        /// Frames sent.
        sent: u64,
    },
}

/// What happens while a campaign runs.
pub struct Campaign<'r, 'a, E: Endpoint> {
    rig: &'r mut Rig<'a, E>,
    plan: &'r Plan,
    /// Told what is being done.
    progress: &'r mut dyn FnMut(&str),
    /// Asks the switch's data thread for its work so far.
    work: &'r mut dyn FnMut() -> Option<Work>,
}

impl<'r, 'a, E: Endpoint> Campaign<'r, 'a, E> {
    /// A campaign on `rig`.
    pub fn new(
        rig: &'r mut Rig<'a, E>,
        plan: &'r Plan,
        progress: &'r mut dyn FnMut(&str),
        work: &'r mut dyn FnMut() -> Option<Work>,
    ) -> Self {
        Self { rig, plan, progress, work }
    }

    /// Measures every size. What was found before an error is in `results`.
    ///
    /// # Errors
    /// [`CampaignError`].
    pub fn run(&mut self, results: &mut Vec<SizeResult>) -> Result<(), CampaignError> {
        for &size in &self.plan.sizes {
            let traffic = Traffic { size, addresses: self.plan.addresses, verify: self.plan.verify };
            (self.progress)(&format!("{size} B: introducing {} addresses a side", self.plan.addresses));
            self.rig.introduce(traffic);
            self.go_on()?;
            let closed_loop = self.closed_loop(traffic)?;
            let found = SizeResult {
                size,
                closed_loop,
                ndr: None,
                pdr: None,
                back_to_back: None,
                latency: Vec::new(),
            };
            results.push(found);
            let Some(result) = results.last_mut() else { continue };
            self.search(traffic, result)?;
        }
        Ok(())
    }

    fn go_on(&self) -> Result<(), CampaignError> {
        if self.rig.stopped() { Err(CampaignError::Stopped) } else { Ok(()) }
    }

    fn closed_loop(&mut self, traffic: Traffic) -> Result<ClosedLoop, CampaignError> {
        (self.progress)(&format!(
            "{} B: closed loop, {} frames in flight",
            traffic.size, self.plan.in_flight
        ));
        let before = (self.work)();
        let outcome = self.rig.closed_loop(traffic, self.plan.in_flight, self.plan.seconds);
        let after = (self.work)();
        if outcome.received() == 0 {
            self.go_on()?;
            return Err(CampaignError::Silent { size: traffic.size, sent: outcome.due() });
        }
        let worker_cycles = before.zip(after).and_then(|(a, b)| {
            let frames = b.frames.checked_sub(a.frames)?;
            (frames > 0).then(|| b.busy_cycles.saturating_sub(a.busy_cycles) as f64 / frames as f64)
        });
        Ok(ClosedLoop {
            // Each round trip crosses the switch twice.
            rate: Rate::new(2.0 * outcome.rate(), traffic.size),
            worker_cycles,
            round_trip: outcome.latencies.summary(&self.rig.clock()),
            lost: outcome.lost().saturating_sub(outcome.corrupt()),
            duplicates: outcome.duplicates(),
            corrupt: outcome.corrupt(),
            generator_busy: outcome.generator_busy,
        })
    }

    fn search(&mut self, traffic: Traffic, result: &mut SizeResult) -> Result<(), CampaignError> {
        if !self.plan.search && !self.plan.latency {
            return Ok(());
        }
        let ceiling = result.closed_loop.rate.mpps * 1e6 * HEADROOM;
        let pdr = self.throughput(traffic, "partial-drop rate", PDR, ceiling)?;
        // What loses more than half a percent loses something: no need to ask again above it.
        let below = if pdr.found.rate > 0.0 { pdr.found.rate * (1.0 + PDR.precision) } else { ceiling };
        result.pdr = Some(pdr);
        let ndr = self.throughput(traffic, "no-drop rate", NDR, below)?;
        let rate = ndr.found.rate;
        result.ndr = Some(ndr);
        if self.plan.search {
            result.back_to_back = Some(self.back_to_back(traffic)?);
        }
        if self.plan.latency && rate > 0.0 {
            for percent in [10, 50, 90] {
                let latency = self.latency(traffic, percent, rate * f64::from(percent) / 100.0)?;
                result.latency.push(latency);
            }
        }
        Ok(())
    }

    fn throughput(
        &mut self,
        traffic: Traffic,
        name: &str,
        goal: search::Goal,
        ceiling: f64,
    ) -> Result<Throughput, CampaignError> {
        let (size, seconds) = (traffic.size, self.plan.seconds);
        let mut busy = 0.0;
        let found = search::rate(goal, ceiling, |rate| {
            self.go_on()?;
            (self.progress)(&format!("{size} B: {name}, trying {:.2} Mpps", rate / 1e6));
            let outcome = self.rig.open_loop(traffic, Load::steady(rate / 2.0, seconds));
            // A trial that was cut short says nothing.
            self.go_on()?;
            busy = outcome.generator_busy;
            Ok(sample(rate, &outcome))
        })?;
        let generator_limited = busy > GENERATOR_LIMIT;
        Ok(Throughput { rate: Rate::new(found.rate, size), found, generator_limited })
    }

    fn back_to_back(&mut self, traffic: Traffic) -> Result<Burst, CampaignError> {
        (self.progress)(&format!("{} B: longest burst", traffic.size));
        search::burst(LONGEST_BURST, 5, |frames| {
            self.go_on()?;
            let rate = f64::INFINITY;
            let patience = SOME_MAY_BE_LOST;
            let load = Load { rate, frames, both: false, when_full: WhenFull::Lose, grace: 1.0, patience };
            let outcome = self.rig.open_loop(traffic, load);
            self.go_on()?;
            Ok(sample(rate, &outcome))
        })
    }

    fn latency(&mut self, traffic: Traffic, percent: u32, rate: f64) -> Result<LoadLatency, CampaignError> {
        self.go_on()?;
        (self.progress)(&format!("{} B: latency at {percent} % ({:.2} Mpps)", traffic.size, rate / 1e6));
        let outcome = self.rig.open_loop(traffic, Load::steady(rate / 2.0, self.plan.seconds));
        let clock = self.rig.clock();
        Ok(LoadLatency {
            percent,
            rate: Rate::new(rate, traffic.size),
            one_way: outcome.latencies.summary(&clock),
            curve: outcome.latencies.curve(&clock),
            lost: outcome.lost(),
        })
    }
}

fn sample(rate: f64, outcome: &Outcome) -> Sample {
    Sample { rate, due: outcome.due(), lost: outcome.lost() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;
    use crate::endpoint::tests::{perfect, wire};
    use std::sync::atomic::{AtomicBool, Ordering};

    fn plan(search: bool, latency: bool) -> Plan {
        let verify = Verify::Whole;
        Plan { sizes: vec![64, 256], seconds: 0.02, in_flight: 64, addresses: 3, verify, search, latency }
    }

    #[test]
    fn a_campaign_measures_every_size_and_asks_for_the_workers_cycles() {
        let go = AtomicBool::new(false);
        let (a, b) = wire(256, perfect());
        let mut rig = Rig::new([a, b], Clock::of_this_machine(), &go, false);
        let (plan, mut results, mut steps) = (plan(true, true), Vec::new(), 0);
        let mut work = Work::default();
        let mut ask = || {
            work.busy_cycles += 1_000;
            work.frames += 10;
            Some(work)
        };
        let mut progress = |_: &str| steps += 1;
        Campaign::new(&mut rig, &plan, &mut progress, &mut ask).run(&mut results).unwrap();
        assert_eq!(results.iter().map(|r| r.size).collect::<Vec<_>>(), [64, 256]);
        for r in &results {
            assert!(r.closed_loop.rate.mpps > 0.0 && r.closed_loop.lost == 0);
            assert_eq!(r.closed_loop.worker_cycles, Some(100.0));
            assert!(r.ndr.is_some() && r.pdr.is_some() && r.back_to_back.is_some());
        }
        assert!(steps > 10);
    }

    #[test]
    fn a_switch_that_forwards_nothing_is_an_error_that_says_so() {
        let go = AtomicBool::new(false);
        let (a, b) = wire(256, Box::new(|_, _| {}));
        let mut rig = Rig::new([a, b], Clock::of_this_machine(), &go, false);
        let (plan, mut results) = (plan(false, false), Vec::new());
        let error = Campaign::new(&mut rig, &plan, &mut |_| {}, &mut || None).run(&mut results).unwrap_err();
        assert!(matches!(error, CampaignError::Silent { size: 64, .. }), "{error}");
    }

    #[test]
    fn stopping_keeps_what_was_found() {
        let go = AtomicBool::new(false);
        let (a, b) = wire(256, perfect());
        let mut rig = Rig::new([a, b], Clock::of_this_machine(), &go, false);
        let (plan, mut results) = (plan(true, true), Vec::new());
        let mut progress = |step: &str| go.store(step.contains("partial-drop"), Ordering::Relaxed);
        let error =
            Campaign::new(&mut rig, &plan, &mut progress, &mut || None).run(&mut results).unwrap_err();
        assert_eq!((error, results.len()), (CampaignError::Stopped, 1));
        assert!(results[0].ndr.is_none());
    }

    #[test]
    fn gigabits_say_which_overhead_they_count() {
        // Line rate of 10 GbE with 60-byte frames (64 with FCS).
        let rate = Rate::new(14_880_952.4, 60);
        assert!((rate.gbit_wire - 10.0).abs() < 1e-6, "{rate:?}");
        assert!((rate.gbit - 7.142_857).abs() < 1e-5, "{rate:?}");
    }
}
