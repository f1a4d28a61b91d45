//! `cableway vm list`, `info`, `pause`, …: clients of running machines' control sockets.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use control::client::{self, ClientError};
use control::{Door, RunDirError, run_dir_of_client};
use serde_json::Value;
use vmm::control::report::{ActionReport, EventReport, EventsReport, MachineInfo};
use vmm::control::{door, names};

use super::console::{self, ConsoleArgs};
use crate::output;

/// How long a process that ends may take to be gone.
const GONE: Duration = Duration::from_secs(10);

/// What to ask.
#[derive(Subcommand)]
pub(super) enum Ask {
    /// The machines that run, those of a node too.
    List(ListArgs),
    /// One machine: its vCPUs with their exits, its devices with their counters.
    Info(AskArgs),
    /// Stop a machine's vCPUs and devices where they are.
    Pause(AskArgs),
    /// Let a paused machine go on.
    Resume(AskArgs),
    /// Reset a machine at once, as if its guest had rebooted.
    Reboot(AskArgs),
    /// Press a machine's power button; a guest that is not off in time is ended.
    Shutdown(ShutdownArgs),
    /// End a machine at once.
    Kill(AskArgs),
    /// Attach this terminal to a machine's console; Ctrl-] detaches.
    Console(ConsoleArgs),
    /// What happened to a machine: starts, pauses, resets, back ends gone and back.
    Events(EventsArgs),
}

#[derive(Args)]
pub(super) struct Place {
    /// Directory of the machines' control sockets [default: /run/cableway, or $XDG_RUNTIME_DIR/cableway when not root].
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
}

impl Place {
    fn run_dir(&self) -> Result<PathBuf, RunDirError> {
        run_dir_of_client(self.run_dir.as_deref())
    }

    pub(super) fn door(&self, name: &str) -> Result<Door, RunDirError> {
        Ok(door(&self.run_dir()?, name))
    }
}

#[derive(Args)]
pub(super) struct ListArgs {
    #[command(flatten)]
    place: Place,
    /// Print the machines' answers in JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub(super) struct AskArgs {
    /// The machine.
    name: String,
    #[command(flatten)]
    place: Place,
    /// Print the machine's answer as it came, in JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub(super) struct ShutdownArgs {
    #[command(flatten)]
    ask: AskArgs,
    /// How long the guest may take [default: the machine's `shutdown_timeout`].
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u32>,
}

#[derive(Args)]
pub(super) struct EventsArgs {
    #[command(flatten)]
    ask: AskArgs,
    /// Only events after this number.
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    after: u64,
    /// Go on with what happens, until the machine ends.
    #[arg(long)]
    follow: bool,
}

/// Asks, and prints the answer.
///
/// # Errors
/// There is none.
pub(super) fn run(ask: &Ask) -> Result<ExitCode> {
    match ask {
        Ask::List(args) => list(args)?,
        Ask::Info(args) => {
            let answer = client::get::<MachineInfo>(&args.place.door(&args.name)?, "/v1/vm")?;
            output::print(&if args.json { answer.json + "\n" } else { info(&answer.value)? })?;
        }
        Ask::Pause(args) => tell(args, "/v1/pause")?,
        Ask::Resume(args) => tell(args, "/v1/resume")?,
        Ask::Reboot(args) => tell(args, "/v1/reboot")?,
        Ask::Shutdown(ShutdownArgs { ask, timeout }) => {
            let timeout = timeout.map_or_else(String::new, |seconds| format!("?timeout={seconds}"));
            tell(ask, &format!("/v1/shutdown{timeout}"))?;
        }
        Ask::Kill(args) => {
            tell(args, "/v1/kill")?;
            until_gone(&args.place.door(&args.name)?)?;
        }
        Ask::Console(args) => return console::run(args),
        Ask::Events(args) => events(args)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn tell(args: &AskArgs, path: &str) -> Result<()> {
    let answer = client::post::<ActionReport>(&args.place.door(&args.name)?, path)?;
    let text = format!("{} is {}\n", args.name, answer.value.state.word());
    output::print(&if args.json { answer.json + "\n" } else { text })?;
    Ok(())
}

/// Waits until nobody answers any more.
fn until_gone(door: &Door) -> Result<()> {
    let end = Instant::now() + GONE;
    while door.socket.exists() {
        if Instant::now() > end {
            bail!("the {} does not end; its process is to be killed (kill -9)", door.what);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn list(args: &ListArgs) -> Result<()> {
    let run_dir = args.place.run_dir()?;
    let machines = machines(&run_dir)?;
    if args.json {
        let all: Vec<&Value> = machines.iter().map(|(_, json)| json).collect();
        output::print(&(serde_json::to_string(&all)? + "\n"))?;
        return Ok(());
    }
    let mut table =
        output::table(&["machine", "state", "process", "vCPUs", "memory", "uptime"], &[2, 3, 4, 5]);
    for (machine, _) in &machines {
        table.add_row([
            machine.name.clone(),
            machine.state.word().to_owned(),
            machine.pid.to_string(),
            machine.vcpus.len().to_string(),
            output::bytes(machine.memory_bytes),
            output::duration(machine.uptime_s),
        ]);
    }
    match machines.is_empty() {
        true => output::print(&format!("no machine is running in {}\n", run_dir.display()))?,
        false => output::print(&format!("{table}\n"))?,
    }
    Ok(())
}

/// All machines that answer, and their answers as they came. Who ends meanwhile, or left its socket behind, is none.
fn machines(run_dir: &Path) -> Result<Vec<(MachineInfo, Value)>> {
    let names = match names(run_dir) {
        Ok(names) => names,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => bail!("reading {}: {error}", run_dir.display()),
    };
    let mut machines = Vec::new();
    for name in names {
        match client::get::<MachineInfo>(&door(run_dir, &name), "/v1/vm") {
            Ok(answer) => machines.push((answer.value, serde_json::from_str(&answer.json)?)),
            Err(ClientError::NotRunning(_)) => {}
            Err(error) => eprintln!("cableway: {error}"),
        }
    }
    Ok(machines)
}

fn info(machine: &MachineInfo) -> Result<String> {
    let mut text = String::new();
    let (state, uptime) = (machine.state.word(), output::duration(machine.uptime_s));
    writeln!(
        text,
        "{}: {state}, process {}, up {uptime}, booted {} time(s)",
        machine.name, machine.pid, machine.boots
    )?;
    writeln!(text, "kernel {}, memory {}\n", machine.kernel, output::bytes(machine.memory_bytes))?;
    let mut vcpus = output::table(
        &["vCPU", "thread", "core", "priority", "ran", "steal", "exits", "by reason"],
        &[0, 1, 2, 3, 4, 5, 6],
    );
    let or_none = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    for vcpu in &machine.vcpus {
        let exits = vcpu.exits.iter().map(|(reason, count)| format!("{reason} {}", output::grouped(*count)));
        let milliseconds = |ns: u64| format!("{} ms", output::grouped(ns / 1_000_000));
        vcpus.add_row([
            vcpu.number.to_string(),
            vcpu.thread.to_string(),
            or_none(vcpu.core.map(|core| core.to_string())),
            or_none(vcpu.priority.map(|priority| priority.to_string())),
            milliseconds(vcpu.ran_ns),
            milliseconds(vcpu.steal_ns),
            output::grouped(vcpu.exits_total),
            exits.collect::<Vec<_>>().join(", "),
        ]);
    }
    writeln!(text, "{vcpus}\n")?;
    let header =
        ["device", "kind", "back end", "kicks by exit", "queue", "requests", "bytes", "errors", "interrupts"];
    let mut devices = output::table(&header, &[3, 4, 5, 6, 7, 8]);
    for device in &machine.devices {
        let back_end = match device.back_end {
            None => "-",
            Some(true) => "connected",
            Some(false) => "gone",
        };
        let first =
            [device.name.clone(), device.kind.clone(), back_end.to_owned(), output::grouped(device.kicks)];
        if device.queues.is_empty() {
            devices.add_row(first.iter().cloned().chain(std::iter::repeat_n("-".to_owned(), 5)));
        }
        for queue in &device.queues {
            let counts = [queue.index.into(), queue.requests, queue.bytes, queue.errors, queue.interrupts];
            devices.add_row(first.iter().cloned().chain(counts.map(output::grouped)));
        }
    }
    writeln!(text, "{devices}")?;
    Ok(text)
}

fn events(args: &EventsArgs) -> Result<()> {
    let door = args.ask.place.door(&args.ask.name)?;
    let mut after = args.after;
    loop {
        let wait = if args.follow { 5 } else { 0 };
        let answer =
            match client::get::<EventsReport>(&door, &format!("/v1/events?after={after}&wait={wait}")) {
                // It was there a moment ago: it ended.
                Err(ClientError::NotRunning(_)) if after != args.after => return Ok(()),
                other => other?,
            };
        after = answer.value.last.max(after);
        if args.ask.json {
            if !args.follow || !answer.value.events.is_empty() {
                output::print(&(answer.json + "\n"))?;
            }
        } else {
            if answer.value.missed > 0 {
                output::print(&format!("({} earlier events are forgotten)\n", answer.value.missed))?;
            }
            output::print(&answer.value.events.iter().map(line).collect::<String>())?;
        }
        if !args.follow {
            return Ok(());
        }
    }
}

fn line(event: &EventReport) -> String {
    let kind = serde_json::to_string(&event.kind).unwrap_or_default().replace('"', "").replace('_', " ");
    let device = event.device.as_deref().map_or_else(String::new, |device| format!(" ({device})"));
    format!("{} {:.3} {kind}{device}\n", event.sequence, event.time_s)
}
