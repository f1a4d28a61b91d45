//! `cableway latency`: how quiet are the cores?
//!
//! Owns the arguments and what becomes of the report. The measuring is `benches::quiet`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use benches::quiet::{self, Plan, Planned, QuietError, Report, Test};
use benches::report::cores;
use host::topology::{self, CoreSet};

use crate::output::{self, refuse};

/// How quiet are the cores? Timer wake-ups (as cyclictest) and gaps in a busy loop (as oslat), on every core at once.
///
/// Works on a host and in a guest. A wake-up's lateness is what an interrupt-driven function waits; a gap in a busy loop is
/// what a polling worker or vCPU loses. Exit status 1 when --limit is exceeded.
#[derive(clap::Args, Debug)]
pub(crate) struct LatencyArgs {
    /// Cores, such as 2-5,8 [default: all that this process may use].
    #[arg(long)]
    cores: Option<CoreSet>,
    /// Seconds of each test.
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// One test only [default: both].
    #[arg(long, value_enum)]
    test: Option<TestName>,
    /// SCHED_FIFO priority of the measuring threads, 1 to 99; 0 for ordinary threads [default: 95 for wake-ups, 0 for the
    /// busy loop, which would keep everything else from its core].
    #[arg(long, value_parser = clap::value_parser!(u8).range(0..=99))]
    priority: Option<u8>,
    /// Time between two wake-ups.
    #[arg(long, default_value = "200us", value_parser = nanoseconds)]
    interval: u64,
    /// A pass of the busy loop that takes this long is a gap.
    #[arg(long, default_value = "1us", value_parser = nanoseconds)]
    gap: u64,
    /// The longest that a wake-up may be late and a gap may be, such as 20us.
    #[arg(long, value_parser = nanoseconds)]
    limit: Option<u64>,
    /// Also says what interrupted the longest gaps of the busy loop, from the kernel's trace (root, tracefs). It costs each interruption
    /// some 100 ns more.
    #[arg(long)]
    trace: bool,
    /// Writes DIR/latency.json and DIR/latency.html, with the curves.
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    /// Prints the result as JSON instead of tables.
    #[arg(long)]
    json: bool,
}

/// What may be asked for.
#[derive(clap::ValueEnum, Clone, Copy, Debug)]
enum TestName {
    /// How late a timer wakes a thread.
    Wakeup,
    /// Gaps in a busy loop.
    Jitter,
}

/// Priority of the wake-up test, that of `cyclictest -p95`: above the kernel's own interrupt threads (50), below its
/// migration and watchdog threads (99).
const WAKEUP_PRIORITY: u8 = 95;

/// Measures and reports.
///
/// # Errors
/// Whatever keeps it from measuring.
pub(crate) fn run(args: &LatencyArgs) -> anyhow::Result<ExitCode> {
    let plan = match plan(args, &topology::permitted_cores()?) {
        Ok(plan) => plan,
        Err(why) => return Ok(refuse(why)),
    };
    let stop = crate::interrupt::flag()?;
    let cores: CoreSet = plan.cores.iter().copied().collect();
    let report = quiet::run(&plan, &stop, |test| {
        let what = match test {
            Test::Wakeup => "timer wake-ups",
            Test::Jitter => "busy loop",
        };
        eprintln!("{what}: cores {cores}, {} s …", plan.seconds);
    });
    let report = match report {
        // What the user can change: a core, a permission.
        Err(error @ (QuietError::Pin(_) | QuietError::RealTime(_) | QuietError::Trace(_))) => {
            return Ok(refuse(error));
        }
        other => other?,
    };
    publish(args, &report)?;
    Ok(if report.beyond_limit().next().is_some() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn plan(args: &LatencyArgs, permitted: &CoreSet) -> Result<Plan, String> {
    let cores = args.cores.as_ref().unwrap_or(permitted);
    if cores.is_empty() {
        return Err("no cores to measure: give --cores such as 2-5,8".into());
    }
    if !(0.01..=604_800.0).contains(&args.seconds) {
        return Err(format!("tests of {} s: give 0.01 to 604800 (a week)", args.seconds));
    }
    if !(10_000..=10_000_000_000).contains(&args.interval) {
        return Err("--interval: give 10us to 10s".into());
    }
    let planned = |test| {
        let by_default = if test == Test::Wakeup { WAKEUP_PRIORITY } else { 0 };
        Planned { test, priority: Some(args.priority.unwrap_or(by_default)).filter(|&p| p > 0) }
    };
    let tests = match args.test {
        None => vec![Test::Wakeup, Test::Jitter],
        Some(TestName::Wakeup) => vec![Test::Wakeup],
        Some(TestName::Jitter) => vec![Test::Jitter],
    };
    Ok(Plan {
        cores: cores.iter().collect(),
        seconds: args.seconds,
        tests: tests.into_iter().map(planned).collect(),
        interval_ns: args.interval,
        gap_ns: args.gap,
        limit_ns: args.limit,
        trace: args.trace,
    })
}

fn publish(args: &LatencyArgs, report: &Report) -> anyhow::Result<()> {
    let text = if args.json { report.json() + "\n" } else { cores::tables(report) };
    output::print(&text)?;
    if let Some(dir) = &args.report {
        std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        for (name, text) in [("latency.json", report.json()), ("latency.html", cores::page(report))] {
            let path = dir.join(name);
            std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
            eprintln!("{}", path.display());
        }
    }
    Ok(())
}

/// A time with its unit: `500ns`, `20us`, `1.5ms`, `2s`; in nanoseconds.
fn nanoseconds(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is no time: give a number and a unit, such as 20us (ns, us, ms, s)");
    let unit_at = text.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(wrong)?;
    let (number, unit) = text.split_at(unit_at);
    let scale = match unit.trim() {
        "ns" => 1.0,
        "us" | "µs" => 1e3,
        "ms" => 1e6,
        "s" => 1e9,
        _ => return Err(wrong()),
    };
    let ns = number.parse::<f64>().map_err(|_| wrong())? * scale;
    if !(1.0..=1e15).contains(&ns) {
        return Err(format!("`{text}`: give at least 1ns and at most 1000000s"));
    }
    Ok(ns as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_has_a_number_and_a_unit() {
        let times = ["500ns", "20us", "20 µs", "1.5ms", "2s"].map(|t| nanoseconds(t).unwrap());
        assert_eq!(times, [500, 20_000, 20_000, 1_500_000, 2_000_000_000]);
        for wrong in ["", "20", "us", "-1us", "1.2.3us", "20 minutes", "0us", "1e9s", "9999999999s"] {
            assert!(nanoseconds(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn by_default_every_permitted_core_is_measured_and_only_wake_ups_in_real_time() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            args: LatencyArgs,
        }
        let parse = |words: &[&str]| <Line as clap::Parser>::parse_from([&["x"], words].concat()).args;
        let permitted = CoreSet::from_iter([1, 4]);
        let made = plan(&parse(&[]), &permitted).unwrap();
        assert_eq!(made.cores, [1, 4]);
        let wakeup = Planned { test: Test::Wakeup, priority: Some(95) };
        assert_eq!(made.tests, [wakeup, Planned { test: Test::Jitter, priority: None }]);
        let made =
            plan(&parse(&["--test", "jitter", "--priority", "1", "--cores", "2-3"]), &permitted).unwrap();
        assert_eq!((made.cores.as_slice(), made.tests[0].priority), ([2, 3].as_slice(), Some(1)));
        assert!(plan(&parse(&["--interval", "1us"]), &permitted).unwrap_err().contains("10us to 10s"));
        assert!(plan(&parse(&["--seconds", "0"]), &permitted).unwrap_err().contains("0.01"));
    }
}
