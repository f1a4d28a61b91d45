//! `cableway switch stats`, `ports`, `fdb` and `reload`: clients of a running switch's control socket.

use std::fmt::Write;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, Subcommand};
use control::client::{self, Answer, ClientError};
use control::{RunDirError, run_dir_of_client};
use serde::de::DeserializeOwned;
use switch::control::door;
use switch::control::report::{FdbReport, PortReport, PortsReport, ReloadReport, StatsReport, SwitchInfo};

use super::Place;
use super::capture::CaptureArgs;
use super::stats;
use crate::output;

/// What to ask.
#[derive(Subcommand)]
pub(super) enum Ask {
    /// Frames, drops and cycles of a running switch.
    Stats(StatsArgs),
    /// The ports of a running switch: who is connected, what was negotiated, why one stopped.
    Ports(AskArgs),
    /// The addresses that a running switch has learnt.
    Fdb(FdbArgs),
    /// Copy the frames of one port of a running switch into a file (pcapng), at a bounded cost: frames beyond it are counted.
    Capture(CaptureArgs),
    /// Make a running switch read its file again and apply it as one transaction.
    Reload(AskArgs),
}

#[derive(Args)]
pub(super) struct AskArgs {
    #[command(flatten)]
    place: Place,
    /// Print the switch's answer as it came, in JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub(super) struct StatsArgs {
    #[command(flatten)]
    ask: AskArgs,
    /// Show rates, again every SECONDS, until interrupted.
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1", value_parser = seconds)]
    watch: Option<Duration>,
}

#[derive(Args)]
pub(super) struct FdbArgs {
    #[command(flatten)]
    ask: AskArgs,
    /// Only addresses at this port.
    #[arg(long)]
    port: Option<String>,
    /// Only addresses of this VLAN.
    #[arg(long)]
    vlan: Option<u16>,
}

pub(super) fn seconds(text: &str) -> Result<Duration, String> {
    let wrong = || "wanted a number of seconds from 0.1 to 3600".to_owned();
    let seconds: f64 = text.parse().map_err(|_| wrong())?;
    if (0.1..=3600.0).contains(&seconds) { Ok(Duration::from_secs_f64(seconds)) } else { Err(wrong()) }
}

/// Asks, and prints the answer.
///
/// # Errors
/// There is none.
pub(super) fn run(ask: Ask) -> Result<ExitCode> {
    match ask {
        Ask::Stats(args) => stats(&args)?,
        Ask::Ports(args) => show(&args, "/v1/ports", ports)?,
        Ask::Fdb(args) => {
            let mut path = "/v1/fdb?".to_owned();
            if let Some(port) = &args.port {
                write!(path, "port={}&", control::encoded(port))?;
            }
            if let Some(vlan) = args.vlan {
                write!(path, "vlan={vlan}&")?;
            }
            let path = path.trim_end_matches(['?', '&']);
            show(&args.ask, path, fdb)?;
        }
        Ask::Capture(args) => super::capture::run(&args)?,
        Ask::Reload(args) => {
            let answer = client::post(&door(&args.run_dir()?), "/v1/reload")?;
            print(&args, answer, reload)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

impl AskArgs {
    fn run_dir(&self) -> Result<std::path::PathBuf, RunDirError> {
        run_dir_of_client(self.place.run_dir.as_deref())
    }
}

/// Asks for `path` and prints what came.
fn show<T: DeserializeOwned>(args: &AskArgs, path: &str, text: impl Fn(&T) -> String) -> Result<()> {
    print(args, client::get(&door(&args.run_dir()?), path)?, text)
}

fn print<T>(args: &AskArgs, answer: Answer<T>, text: impl Fn(&T) -> String) -> Result<()> {
    if args.json {
        output::print(&(answer.json + "\n"))?;
    } else {
        output::print(&text(&answer.value))?;
    }
    Ok(())
}

fn stats(args: &StatsArgs) -> Result<()> {
    let run_dir = args.ask.run_dir()?;
    let ask = || client::get::<StatsReport>(&door(&run_dir), "/v1/stats");
    let Some(interval) = args.watch else {
        let info = client::get::<SwitchInfo>(&door(&run_dir), "/v1/switch")?.value;
        return print(&args.ask, ask()?, |report| stats::since_start(&info, report));
    };
    let mut before = ask()?;
    loop {
        std::thread::sleep(interval);
        let now = match ask() {
            // It was there a moment ago: it ended.
            Err(ClientError::NotRunning(_)) => return Ok(()),
            other => other?,
        };
        if args.ask.json {
            output::print(&(now.json.clone() + "\n"))?;
        } else {
            output::print(&stats::between(&before.value, &now.value))?;
        }
        before = now;
    }
}

/// A table of ports, and under it what each has to say.
fn ports(report: &PortsReport) -> String {
    let header = ["port", "state", "socket or device", "rings", "queue pairs", "memory", "MTU", "VLAN"];
    let mut table = output::table(&header, &[4, 5, 6]);
    let mut notes = String::new();
    for port in &report.ports {
        let sizes: Vec<_> = port.rings.iter().map(|ring| ring.size).collect();
        let size = sizes.iter().max().map_or_else(String::new, |size| format!(" {size}"));
        let pairs = port.rings.iter().filter(|ring| ring.enabled && ring.index % 2 == 1).count();
        table.add_row([
            port.name.clone(),
            port.state.word().to_owned(),
            where_it_is(port),
            port.layout.as_ref().map_or_else(|| "-".to_owned(), |layout| format!("{layout}{size}")),
            pairs.to_string(),
            if port.memory_bytes == 0 { "-".to_owned() } else { output::bytes(port.memory_bytes) },
            port.mtu.map_or_else(|| "-".to_owned(), |mtu| mtu.to_string()),
            port.vlan.clone().unwrap_or_else(|| "-".to_owned()),
        ]);
        if let Some(reason) = &port.reason {
            notes += &format!("{}: {reason}\n", port.name);
        }
        if !port.features.is_empty() {
            let what = if port.device.is_some() { "offloads in use:" } else { "negotiated" };
            notes += &format!("{}: {what} {}\n", port.name, port.features.join(", "));
        }
    }
    let gap = if notes.is_empty() { "" } else { "\n" };
    format!("{table}\n{gap}{notes}")
}

/// The socket and its side, or the device.
fn where_it_is(port: &PortReport) -> String {
    match (&port.socket, &port.mode, &port.device) {
        (Some(socket), Some(mode), _) => format!("{socket} ({mode})"),
        (_, _, Some(device)) => format!("{} {device}", port.kind),
        _ => port.kind.clone(),
    }
}

fn fdb(report: &FdbReport) -> String {
    let mut table = output::table(&["address", "VLAN", "port", "age"], &[1, 3]);
    for entry in &report.entries {
        table.add_row([
            entry.address.clone(),
            entry.vlan.map_or_else(|| "-".to_owned(), |vlan| vlan.to_string()),
            entry.port.clone(),
            match entry.age_s {
                _ if entry.is_static => "static".to_owned(),
                Some(age) => format!("{age} s"),
                None => "-".to_owned(),
            },
        ]);
    }
    let (used, size) = (output::grouped(report.used as u64), output::grouped(report.size as u64));
    format!("{table}\n\n{used} of {size} entries used, {} shown\n", report.entries.len())
}

fn reload(report: &ReloadReport) -> String {
    let mut text = String::new();
    for (what, ports) in [
        ("added", &report.added),
        ("removed", &report.removed),
        ("changed", &report.changed),
        ("of these, disconnected to renegotiate", &report.reconnected),
    ] {
        if !ports.is_empty() {
            text += &format!("{what}: {}\n", ports.join(", "));
        }
    }
    if report.switch_changed {
        text += "[switch] changed\n";
    }
    let untouched = report.unchanged;
    text + &format!("{untouched} port{} untouched\n", if untouched == 1 { "" } else { "s" })
}
