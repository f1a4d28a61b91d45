//! How quiet is a core? What a thread on it loses to everything else that runs there.
//!
//! Two measurements, each by one thread pinned to each core, all cores at once: a loop that does nothing but look at the
//! clock ([`jitter`], as oslat does), and a timer that should wake a thread at exact times ([`wakeup`], as cyclictest does).
//! Beside them, what the kernel counted on that core meanwhile ([`disturbance`]). Changes nothing on the machine, and needs
//! no switch.

pub mod disturbance;
pub mod jitter;
pub mod trace;
pub mod wakeup;

use std::path::Path;
use std::sync::Barrier;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use serde::Serialize;

use crate::clock::Clock;
use crate::histogram::{Latencies, Summary};
use crate::machine::Machine;
use disturbance::{Disturbance, Runs};
use trace::Trace;

/// The percentiles of these reports: a core that is isolated well shows nothing before the last.
pub const PERCENTILES: [(&str, f64); 6] =
    [("p50", 50.0), ("p90", 90.0), ("p99", 99.0), ("p99.9", 99.9), ("p99.99", 99.99), ("p99.999", 99.999)];

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Test {
    /// Gaps in a busy loop.
    Jitter,
    /// How late a timer wakes a thread.
    Wakeup,
}

/// A test, and as what its threads run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Planned {
    /// Which.
    pub test: Test,
    /// SCHED_FIFO priority of the measuring threads, 1 to 99; none: ordinary threads.
    pub priority: Option<u8>,
}

/// What was asked for.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// On which cores, at once.
    pub cores: Vec<u32>,
    /// How long each test takes.
    pub seconds: f64,
    /// In this order.
    pub tests: Vec<Planned>,
    /// Time between two wake-ups, in nanoseconds.
    pub interval_ns: u64,
    /// A pass of the loop that took at least this long, in nanoseconds, is a gap.
    pub gap_ns: u64,
    /// What the longest gap and the latest wake-up may be, in nanoseconds.
    pub limit_ns: Option<u64>,
    /// Whether the kernel's trace says what interrupted the busy loop.
    pub trace: bool,
}

/// One test on one core.
#[derive(Clone, Debug, Serialize)]
pub struct CoreResult {
    /// Which test.
    pub test: Test,
    /// On which core.
    pub core: u32,
    /// Times of the passes of the loop, or latenesses of the wake-ups.
    pub times: Summary,
    /// Points of the curve "time by percentile": percent, nanoseconds.
    pub curve: Vec<(f64, f64)>,
    /// Passes that took at least [`Plan::gap_ns`], and the time lost in them; of the busy loop only.
    pub gaps: Option<jitter::Gaps>,
    /// What the kernel counted on the core meanwhile.
    pub disturbance: Disturbance,
}

/// Everything that was found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What was asked for.
    pub plan: Plan,
    /// On which machine.
    pub machine: Machine,
    /// What could not be set up as it should be: the measurement went on without.
    pub without: Vec<String>,
    /// By test, then by core.
    pub results: Vec<CoreResult>,
    /// Whether it was interrupted.
    pub interrupted: bool,
}

impl Report {
    /// The results that exceed the plan's limit.
    pub fn beyond_limit(&self) -> impl Iterator<Item = &CoreResult> {
        let limit = self.plan.limit_ns.map_or(f64::INFINITY, |ns| ns as f64);
        self.results.iter().filter(move |r| r.times.max_ns.is_some_and(|max| max > limit))
    }

    /// The report as JSON.
    pub fn json(&self) -> String {
        // A report is made of strings and numbers: nothing in it can fail to be written.
        serde_json::to_string_pretty(self).unwrap_or_else(|e| format!("{{\"error\": \"{e}\"}}"))
    }
}

/// Why a core could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum QuietError {
    /// The thread cannot be put on its core.
    #[error(transparent)]
    Pin(#[from] host::thread::PinError),
    /// The thread cannot be scheduled as real time.
    #[error("{0}; or measure as an ordinary thread with --priority 0")]
    RealTime(#[from] host::thread::RealTimeError),
    /// The kernel's counters cannot be read.
    #[error("cannot read {0}")]
    Counters(String, #[source] std::io::Error),
    /// No thread could be started.
    #[error("cannot start a measuring thread")]
    Thread(#[source] std::io::Error),
    /// The kernel gives no trace.
    #[error("cannot trace: {0}; --trace needs root and tracefs")]
    Trace(#[source] std::io::Error),
    /// The timer failed.
    #[error("clock_nanosleep: {0}")]
    Timer(nix::Error),
}

/// Measures. Takes `plan.seconds` for each test, less if `stop` is set.
///
/// # Errors
/// See [`QuietError`]; nothing goes on running.
pub fn run(plan: &Plan, stop: &AtomicBool, mut progress: impl FnMut(Test)) -> Result<Report, QuietError> {
    // What keeps the last test from its end is said before the first one.
    if plan.trace && plan.tests.iter().any(|planned| planned.test == Test::Jitter) {
        trace::tracefs()?;
    }
    let mut without = Vec::new();
    let _awake = stay_awake(&mut without);
    let mut results = Vec::new();
    for &planned in &plan.tests {
        progress(planned.test);
        results.extend(on_all_cores(plan, planned, stop)?);
    }
    Ok(Report {
        plan: plan.clone(),
        machine: Machine::read(Path::new("/")),
        without,
        results,
        interrupted: stop.load(std::sync::atomic::Ordering::Relaxed),
    })
}

/// Keeps the cores out of deep idle states while the value lives, as cyclictest does: what is measured is the scheduler and
/// its neighbours, not the time that a core needs to wake from C6 (Documentation/power/pm_qos_interface.rst).
fn stay_awake(without: &mut Vec<String>) -> Option<std::fs::File> {
    use std::io::Write;
    let path = "/dev/cpu_dma_latency";
    let held = std::fs::OpenOptions::new().write(true).open(path).and_then(|mut file| {
        file.write_all(&0i32.to_ne_bytes())?;
        Ok(file)
    });
    held.map_err(|error| without.push(format!("cores may enter deep idle states: {path}: {error}"))).ok()
}

/// One thread a core; all begin together.
fn on_all_cores(plan: &Plan, planned: Planned, stop: &AtomicBool) -> Result<Vec<CoreResult>, QuietError> {
    let traced = plan.trace && planned.test == Test::Jitter;
    let trace = traced.then(|| Trace::start(&plan.cores)).transpose()?;
    let before = Runs::now();
    let mut results = side_by_side(plan, planned, stop)?;
    let after = Runs::now();
    for result in &mut results {
        result.disturbance.threads = after.since(&before, result.core);
    }
    if let Some(trace) = trace {
        trace.stop()?;
        for result in &mut results {
            let Some(gaps) = &mut result.gaps else { continue };
            let times: Vec<_> = gaps.worst.iter().map(|gap| gap.ticks).collect();
            for (gap, by) in gaps.worst.iter_mut().zip(trace.during(result.core, &times)?) {
                gap.by = by;
            }
        }
    }
    Ok(results)
}

fn side_by_side(plan: &Plan, planned: Planned, stop: &AtomicBool) -> Result<Vec<CoreResult>, QuietError> {
    let together = Barrier::new(plan.cores.len());
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for &core in &plan.cores {
            let together = &together;
            threads.push(scope.spawn(move || on_core(plan, planned, core, stop, together)));
        }
        // A thread that panicked takes the measurement with it.
        threads.into_iter().map(|t| t.join().unwrap_or_else(|p| std::panic::resume_unwind(p))).collect()
    })
}

fn on_core(
    plan: &Plan,
    planned: Planned,
    core: u32,
    stop: &AtomicBool,
    together: &Barrier,
) -> Result<CoreResult, QuietError> {
    let ready = prepare(planned.priority, core);
    // Whoever failed still comes here, or the others would wait for ever.
    together.wait();
    ready?;
    let before = Disturbance::now(core)?;
    let length = Duration::from_secs_f64(plan.seconds);
    let clock = Clock::of_this_machine();
    let (times, clock, gaps): (Latencies, Clock, _) = match planned.test {
        Test::Jitter => {
            let (times, gaps) = jitter::run(&clock, length, Duration::from_nanos(plan.gap_ns), stop);
            (times, clock, Some(gaps))
        }
        Test::Wakeup => {
            let times = wakeup::run(length, Duration::from_nanos(plan.interval_ns), stop)
                .map_err(QuietError::Timer)?;
            (times, wakeup::NANOSECONDS, None)
        }
    };
    let disturbance = Disturbance::now(core)?.since(&before);
    Ok(CoreResult {
        test: planned.test,
        core,
        times: times.summary_of(&PERCENTILES, &clock),
        curve: times.curve(&clock),
        gaps,
        disturbance,
    })
}

fn prepare(priority: Option<u8>, core: u32) -> Result<(), QuietError> {
    host::thread::pin(core)?;
    if let Some(priority) = priority {
        host::thread::run_real_time(priority)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(tests: Vec<Test>) -> Plan {
        let cores = host::topology::permitted_cores().unwrap().iter().take(1).collect();
        Plan {
            cores,
            seconds: 0.2,
            tests: tests.into_iter().map(|test| Planned { test, priority: None }).collect(),
            interval_ns: 1_000_000,
            gap_ns: 1_000,
            limit_ns: None,
            trace: false,
        }
    }

    #[test]
    fn both_tests_measure_every_core_that_was_named() {
        let mut seen = Vec::new();
        let plan = plan(vec![Test::Wakeup, Test::Jitter]);
        let report = run(&plan, &AtomicBool::new(false), |test| seen.push(test)).unwrap();
        assert_eq!(seen, [Test::Wakeup, Test::Jitter]);
        assert!(!report.interrupted);
        let [wakeup, jitter] = report.results.as_slice() else { panic!("{report:?}") };
        assert_eq!((wakeup.core, jitter.core), (plan.cores[0], plan.cores[0]));
        // 200 are due in 0.2 s; a busy machine swallows some.
        assert!((1..=200).contains(&wakeup.times.samples), "{}", wakeup.times.samples);
        assert!(jitter.times.samples > 10_000, "{}", jitter.times.samples);
        assert!(jitter.times.min_ns.unwrap() < 1_000.0, "{:?}", jitter.times);
        assert!(wakeup.gaps.is_none() && jitter.gaps.is_some());
    }

    #[test]
    fn a_trace_that_cannot_be_had_is_said_before_anything_is_measured() {
        let mut seen = Vec::new();
        let plan = Plan { trace: true, ..plan(vec![Test::Wakeup, Test::Jitter]) };
        match run(&plan, &AtomicBool::new(false), |test| seen.push(test)) {
            Err(QuietError::Trace(_)) => assert_eq!(seen, []),
            other => assert_eq!(other.unwrap().results.len(), 2),
        }
    }

    #[test]
    fn a_core_that_does_not_exist_is_an_error_and_the_others_do_not_wait_for_it() {
        let mut plan = plan(vec![Test::Jitter]);
        plan.cores.push(1_000);
        let error = run(&plan, &AtomicBool::new(false), |_| ()).unwrap_err().to_string();
        assert!(error.starts_with("core 1000 does not exist"), "{error}");
    }

    #[test]
    fn a_limit_that_is_exceeded_names_the_results_beyond_it() {
        let mut plan = plan(vec![Test::Jitter]);
        plan.limit_ns = Some(1);
        let report = run(&plan, &AtomicBool::new(false), |_| ()).unwrap();
        assert_eq!(report.beyond_limit().count(), 1);
        let generous = Report { plan: Plan { limit_ns: Some(u64::MAX), ..plan }, ..report };
        assert_eq!(generous.beyond_limit().count(), 0);
    }

    #[test]
    fn a_stop_ends_it_and_what_there_is_is_reported() {
        let mut plan = plan(vec![Test::Wakeup]);
        plan.seconds = 1_000.0;
        let report = run(&plan, &AtomicBool::new(true), |_| ()).unwrap();
        assert!(report.interrupted && report.results.len() == 1);
    }
}
