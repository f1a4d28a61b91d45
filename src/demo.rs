//! `cableway demo`: a switch and two network functions in this process, with nothing to set up.
//!
//! Composes what the libraries have; owns what is printed. One function offers frames, the other reflects them, the switch
//! carries them: a live line a second, a table at the end.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::Context;
use benches::campaign::Rate;
use benches::clock::Clock;
use benches::frame::{Addresses, Verify};
use benches::histogram::{Latencies, Summary, time, time_or_dash};
use benches::machine::Machine;
use benches::pinger::Loop;
use benches::seats::{Seats, Worth};
use benches::silence::NOTHING_MAY_BE_LOST;
use benches::virtio_user::{self, PortOptions, Ring};
use benches::vnfs::{self, Event, Job, Standing};
use serde::Serialize;
use switch::config::{Config, ThisMachine};
use switch::control::SwitchState;
use switch::runtime::Switch;

use crate::output::{self, grouped};

/// Entries of each ring.
const QUEUE_SIZE: u16 = 256;
/// Seconds before frames count: caches, page tables and the switch's learning table settle.
const WARM_UP: f64 = 0.3;

/// Two network functions exchange frames through a switch, with rate, loss and latency.
#[derive(clap::Args, Debug)]
pub(crate) struct DemoArgs {
    /// How long to run, in seconds.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    seconds: u32,
    /// Bytes of each frame, without FCS.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(64..=9216))]
    size: u16,
    /// Ring layout: split or packed.
    #[arg(long, default_value_t = Ring::Split)]
    ring: Ring,
    /// Frames in flight.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u16).range(1..=256))]
    in_flight: u16,
    /// Print the result as JSON, and nothing else.
    #[arg(long)]
    json: bool,
}

/// What the demo found.
#[derive(Serialize)]
struct Found {
    seconds: f64,
    size: u16,
    ring: Ring,
    in_flight: u16,
    memory: String,
    seats: Seats,
    worth: Worth,
    /// Frames that the switch delivered, both ways.
    delivered: u64,
    rate: Rate,
    worker_cycles_per_frame: Option<f64>,
    /// Part of its time that the worker was busy, 0 to 1.
    worker_busy: Option<f64>,
    lost: u64,
    duplicates: u64,
    corrupt: u64,
    round_trip: Summary,
    /// Ctrl-C ended it.
    interrupted: bool,
    machine: Machine,
}

/// Runs it. Exit status 1 when a frame was lost or damaged.
///
/// # Errors
/// Whatever keeps the switch or the network functions from running.
pub(crate) fn run(args: DemoArgs) -> anyhow::Result<ExitCode> {
    let args = &args;
    let stop = crate::interrupt::flag()?;
    let (seats, worth) =
        Seats::on_this_machine().context("cannot find out which cores this process may use")?;
    let run_dir =
        tempfile::Builder::new().prefix("cableway-demo-").tempdir().context("making a run directory")?;
    let switch = start_switch(run_dir.path(), seats, worth)?;
    let port = PortOptions {
        listen: false,
        ring: args.ring,
        queue_size: QUEUE_SIZE,
        largest: args.size.into(),
        timeout: Duration::from_secs(5),
    };
    let mut offering = virtio_user::open(&run_dir.path().join("v0.sock"), 0, port)?;
    let mut reflecting = virtio_user::open(&run_dir.path().join("v1.sock"), 1, port)?;
    let memory = offering.pages().to_string();
    if !args.json {
        output::print(&introduction(args, seats, worth, &memory))?;
    }
    let (Some(first), Some(second)) =
        (offering.queue_pairs().first_mut(), reflecting.queue_pairs().first_mut())
    else {
        anyhow::bail!("a port without queues");
    };
    let clock = Clock::of_this_machine();
    let mut watch = Watch::new(args, clock, &switch);
    vnfs::run(first, second, job(args, seats, worth, clock), clock, &stop, |event| watch.see(event))?;
    let found = watch.found(args, seats, worth, memory, &stop);
    let text = if args.json {
        serde_json::to_string_pretty(&found)? + "\n"
    } else {
        conclusion(&found, &watch.latencies, &clock)
    };
    output::print(&text)?;
    drop((offering, reflecting));
    switch.shutdown();
    Ok(if found.is_sound() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Found {
    /// Frames came through, and all of them as they were sent.
    fn is_sound(&self) -> bool {
        self.lost + self.corrupt == 0 && self.delivered > 0
    }
}

/// A learning bridge of two ports.
fn start_switch(run_dir: &Path, seats: Seats, worth: Worth) -> anyhow::Result<Switch> {
    // A worker that polls would take the only core from everyone else.
    let idle = if worth == Worth::Nothing { "sleep" } else { "poll" };
    let text = format!(
        "[switch]\nworkers = [{}]\nidle = \"{idle}\"\n\
         [[port]]\nname = \"v0\"\nkind = \"vhost-user\"\nsocket = \"v0.sock\"\n\
         [[port]]\nname = \"v1\"\nkind = \"vhost-user\"\nsocket = \"v1.sock\"\n",
        seats.worker
    );
    let machine = ThisMachine::now();
    let config = Config::parse(&text, Path::new("the demo's configuration"), run_dir, &machine)?;
    Switch::start(config, run_dir.to_owned(), machine).context("starting the switch")
}

fn job(args: &DemoArgs, seats: Seats, worth: Worth, clock: Clock) -> Job {
    let frames = Loop {
        size: args.size.into(),
        in_flight: args.in_flight.into(),
        stream: 1,
        addresses: Addresses { from: 0, to: 1, count: 1 },
        verify: Verify::Whole,
        patience: clock.cycles(NOTHING_MAY_BE_LOST),
    };
    Job {
        frames,
        warm_up: WARM_UP,
        seconds: args.seconds.into(),
        offering: Some(seats.offering),
        reflecting: (!seats.functions_share()).then_some(seats.reflecting),
        polite: worth == Worth::Nothing,
    }
}

/// What is seen while it runs.
struct Watch<'a> {
    live: bool,
    size: usize,
    clock: Clock,
    switch: &'a Switch,
    /// Busy and idle cycles and frames of the worker when counting began, and when it ended.
    work: [Option<(u64, u64, u64)>; 2],
    before: (f64, u64),
    last: Option<Standing>,
    latencies: Latencies,
}

impl<'a> Watch<'a> {
    fn new(args: &DemoArgs, clock: Clock, switch: &'a Switch) -> Self {
        Self {
            live: !args.json,
            size: args.size.into(),
            clock,
            switch,
            work: [None; 2],
            before: (0.0, 0),
            last: None,
            latencies: Latencies::default(),
        }
    }

    fn worker(&self) -> Option<(u64, u64, u64)> {
        self.switch.stats().workers.first().map(|w| (w.busy_cycles, w.idle_cycles, w.frames))
    }

    fn see(&mut self, event: Event) {
        match event {
            Event::Started => self.work[0] = self.worker(),
            Event::Second(standing) => {
                if self.live {
                    self.line(&standing);
                }
                self.before = (standing.seconds, standing.arrivals.counts.received);
                self.latencies.add(&standing.latencies);
            }
            Event::Ended(standing) => {
                self.work[1] = self.worker();
                if self.live && standing.seconds > self.before.0 + 0.5 {
                    self.line(&standing);
                }
                self.latencies.add(&standing.latencies);
                self.last = Some(standing);
            }
        }
    }

    fn line(&self, standing: &Standing) {
        let trips = standing.arrivals.counts.received.saturating_sub(self.before.1);
        let rate = Rate::new(2.0 * trips as f64 / (standing.seconds - self.before.0), self.size);
        let at = |percent| time_or_dash(standing.latencies.percentile(percent, &self.clock));
        let line = format!(
            "{:>8.0} {:>9.2} {:>9.2} {:>9} {:>10} {:>10}\n",
            standing.seconds,
            rate.mpps,
            rate.gbit,
            standing.arrivals.counts.missing,
            at(50.0),
            at(99.0)
        );
        // Whoever reads only the end still gets it; the end says so if it cannot be written either.
        let _ = output::print(&line);
    }

    fn found(
        &self,
        args: &DemoArgs,
        seats: Seats,
        worth: Worth,
        memory: String,
        stop: &Arc<AtomicBool>,
    ) -> Found {
        let (seconds, arrivals) =
            self.last.as_ref().map_or_else(Default::default, |l| (l.seconds, l.arrivals));
        // Each round trip is two frames through the switch.
        let delivered = 2 * arrivals.counts.received;
        let rate = if seconds > 0.0 { delivered as f64 / seconds } else { 0.0 };
        let work = match self.work {
            [Some(a), Some(b)] => Some((b.0 - a.0, b.1 - a.1, b.2 - a.2)),
            _ => None,
        };
        let share = |part: u64, whole: u64| (whole > 0).then(|| part as f64 / whole as f64);
        Found {
            seconds,
            size: args.size,
            ring: args.ring,
            in_flight: args.in_flight,
            memory,
            seats,
            worth,
            delivered,
            rate: Rate::new(rate, self.size),
            worker_cycles_per_frame: work.and_then(|(busy, _, frames)| share(busy, frames)),
            worker_busy: work.and_then(|(busy, idle, _)| share(busy, busy + idle)),
            // A damaged frame is not also a lost one.
            lost: arrivals.counts.missing.saturating_sub(arrivals.corrupt),
            duplicates: arrivals.counts.duplicates,
            corrupt: arrivals.corrupt,
            round_trip: self.latencies.summary(&self.clock),
            interrupted: stop.load(std::sync::atomic::Ordering::Relaxed),
            machine: Machine::read(Path::new("/")),
        }
    }
}

fn introduction(args: &DemoArgs, seats: Seats, worth: Worth, memory: &str) -> String {
    let functions = if seats.functions_share() {
        format!("core {}, both on one thread: one offers frames, one reflects them", seats.offering)
    } else {
        format!("core {} offers frames, core {} reflects them", seats.offering, seats.reflecting)
    };
    let warning = match worth {
        Worth::Sound => "",
        Worth::Siblings => {
            "\n  The worker shares its physical core with the functions: with two cores it is faster.\n"
        }
        Worth::Nothing => {
            "\n  There is one core for everything. It works, but the figures mean nothing: two cores are the least.\n"
        }
    };
    format!(
        "Two network functions exchange frames through a Cableway switch.\n\n\
         \x20 switch     learning bridge, 2 vhost-user ports, one worker on core {}\n\
         \x20 functions  {functions}\n\
         \x20 rings      {}, {QUEUE_SIZE} entries, in {memory}\n\
         \x20 frames     {} bytes, {} in flight, every byte of each one checked\n{warning}\n\
         {:>8} {:>9} {:>9} {:>9} {:>10} {:>10}\n",
        seats.worker, args.ring, args.size, args.in_flight, "second", "Mpps", "Gbit/s", "lost", "p50", "p99",
    )
}

/// The table at the end.
fn conclusion(found: &Found, latencies: &Latencies, clock: &Clock) -> String {
    let mut rows = vec![
        ("rate", format!("{:.2} Mpps", found.rate.mpps)),
        ("", format!("{:.2} Gbit/s of frames, {:.2} as on a wire", found.rate.gbit, found.rate.gbit_wire)),
    ];
    if let (Some(cycles), Some(busy)) = (found.worker_cycles_per_frame, found.worker_busy) {
        rows.push(("worker", format!("{cycles:.0} cycles a frame, busy {:.0} % of the time", 100.0 * busy)));
    }
    rows.push(("lost", grouped(found.lost)));
    rows.push(("duplicates", grouped(found.duplicates)));
    rows.push(("corrupt", grouped(found.corrupt)));
    rows.push(("", String::new()));
    let samples = grouped(found.round_trip.samples);
    rows.push(("round trip", format!("{samples} samples, {} frames in flight", found.in_flight)));
    rows.extend(found.round_trip.percentiles.iter().map(|p| (p.name, time_or_dash(p.ns))));
    rows.push(("max", time_or_dash(found.round_trip.max_ns)));

    let how = if found.interrupted { ", interrupted" } else { "" };
    let delivered = grouped(found.delivered);
    let mut text =
        format!("\n{:.1} seconds{how}, {delivered} frames delivered, both ways together\n\n", found.seconds);
    for (label, value) in rows {
        text += format!("  {label:<11}{value}").trim_end();
        text.push('\n');
    }
    text.push('\n');
    for line in latencies.draw(10, 40, clock) {
        text += &format!("  {line}\n");
    }
    for note in notes(found) {
        text += &format!("\n{note}");
    }
    text + "\n"
}

/// What keeps the figures from meaning more than they do.
fn notes(found: &Found) -> Vec<String> {
    let mut notes = Vec::new();
    if found.worker_busy.is_some_and(|busy| busy < 0.9) && found.worth == Worth::Sound {
        notes.push("The worker had time to spare: the functions, not the switch, set the rate.".to_owned());
    }
    if found.in_flight > 8 && found.rate.mpps > 0.0 {
        // Little's law: what a frame waits for is the others.
        let waits = f64::from(found.in_flight) * 2e3 / found.rate.mpps;
        notes.push(format!(
            "The pipe is full: {} frames in flight at this rate are {} each. For a lonely frame: --in-flight 1.",
            found.in_flight,
            time(waits)
        ));
    }
    if found.machine.virtual_machine {
        notes.push(
            "A virtual machine: its host may pause a core at any time, which shows in p99.99 and max."
                .to_owned(),
        );
    }
    if found.delivered == 0 {
        notes.push("NOTHING came through.".to_owned());
    }
    if found.lost + found.corrupt > 0 {
        notes.push("Frames were LOST or DAMAGED: that must not happen here.".to_owned());
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found() -> (Found, Latencies, Clock) {
        let (clock, mut latencies) = (Clock { hz: 1e9 }, Latencies::default());
        (0..50_000).for_each(|i| latencies.record(5_000 + i % 700));
        let found = Found {
            seconds: 10.0,
            size: 64,
            ring: Ring::Split,
            in_flight: 128,
            memory: "2 MiB huge pages".into(),
            seats: Seats { worker: 1, offering: 0, reflecting: 0 },
            worth: Worth::Sound,
            delivered: 250_000_000,
            rate: Rate::new(25e6, 64),
            worker_cycles_per_frame: Some(61.4),
            worker_busy: Some(0.59),
            lost: 0,
            duplicates: 0,
            corrupt: 0,
            round_trip: latencies.summary(&clock),
            interrupted: false,
            machine: Machine::read(Path::new("/")),
        };
        (found, latencies, clock)
    }

    #[test]
    fn the_table_says_all_that_was_promised() {
        let (found, latencies, clock) = found();
        let text = conclusion(&found, &latencies, &clock);
        for line in [
            "250,000,000 frames delivered",
            "  rate       25.00 Mpps",
            "12.80 Gbit/s of frames, 17.60 as on a wire",
            "61 cycles a frame, busy 59 % of the time",
            "  lost       0",
            "  duplicates 0",
            "  corrupt    0",
            "50,000 samples, 128 frames in flight",
            "  p99.99     -",
            "are 10.2 µs each",
            "the functions, not the switch, set the rate",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        assert!(text.lines().filter(|l| l.contains('█')).count() >= 1 && !text.contains("LOST"));
    }

    #[test]
    fn a_frame_lost_or_damaged_or_none_at_all_is_a_failure() {
        let with = |change: fn(&mut Found)| {
            let (mut found, ..) = found();
            change(&mut found);
            found.is_sound()
        };
        assert!(with(|_| {}));
        assert!(!with(|f| f.lost = 1) && !with(|f| f.corrupt = 1) && !with(|f| f.delivered = 0));
    }

    #[test]
    fn loss_is_not_hidden_at_the_end() {
        let (found, latencies, clock) = found();
        let text = conclusion(&Found { lost: 3, ..found }, &latencies, &clock);
        assert!(text.contains("  lost       3\n") && text.contains("LOST or DAMAGED"));
    }
}
