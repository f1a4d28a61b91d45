//! `cableway switch FILE --check`: what is wrong with a configuration, or what it would do.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use control::client;
use host::topology;
use switch::config::{Behind, Config, PortConfig, Side, ThisMachine, far_cards};
use switch::control::{door, report::PortsReport};
use switch::sandbox::files;

use super::Place;
use crate::confinement;
use crate::node::cores::Planner;
use crate::output::{self, refuse};

/// Checks `file`.
///
/// # Errors
/// The report cannot be written.
pub(super) fn run(file: &Path, place: &Place) -> Result<ExitCode> {
    let run_dir = match control::run_dir_of_server(place.run_dir.as_deref()) {
        Ok(run_dir) => run_dir,
        Err(error) => return Ok(refuse(error)),
    };
    // The sockets of a switch that runs there already are no obstacle: the file may be meant for its next reload.
    let running =
        client::get::<PortsReport>(&door(&run_dir), "/v1/ports").map(|answer| answer.value.ports).ok();
    let ours = running.iter().flatten().filter_map(|port| Some(port.socket.clone()?.into())).collect();
    match Config::load(file, &run_dir, &ThisMachine::now().deciding(Planner::for_switch()).listening_on(ours))
    {
        Ok(config) => {
            let mut text = report(&config, &run_dir)?;
            if running.is_some() {
                text += "\nA switch is running there: `cableway switch reload` applies its own file.\n";
            }
            output::print(&text)?;
            Ok(ExitCode::SUCCESS)
        }
        Err(errors) => {
            eprintln!("{errors}");
            Ok(ExitCode::from(output::REFUSED))
        }
    }
}

/// What the configuration would do on this machine.
fn report(config: &Config, run_dir: &Path) -> Result<String> {
    let mut text = format!("{} is valid. It would\n", config.file.display());
    let switch = &config.switch;
    for core in &switch.workers {
        let node = topology::node_of_core(Path::new("/"), *core);
        let node = node.map_or_else(String::new, |node| format!(" (memory node {node})"));
        writeln!(text, "  poll on core {core}{node}, up to {} frames at a time", switch.burst)?;
        for sibling in topology::smt_siblings(Path::new("/"), *core).iter().flat_map(|set| set.iter()) {
            if sibling > *core && switch.workers.contains(&sibling) {
                writeln!(
                    text,
                    "  note: cores {core} and {sibling} are one physical core; workers there halve each other"
                )?;
            }
        }
    }
    match &switch.housekeeping {
        Some(cores) => writeln!(text, "  do everything else on cores {cores:?}")?,
        None => writeln!(text, "  do everything else on the other cores it may use")?,
    }
    writeln!(
        text,
        "  remember up to {} addresses, each for {} s after it was heard from",
        output::grouped(switch.fdb_size as u64),
        switch.fdb_age.as_secs()
    )?;
    writeln!(text, "  answer questions on {}", door(run_dir).socket.display())?;
    writeln!(text, "  {}", confinement::files(files::of(config, run_dir).as_ref())?)?;
    writeln!(text, "  serve {} port(s):\n", config.ports.len())?;
    let mut table =
        output::table(&["port", "what it does", "VLAN", "queue pairs", "workers", "memory up to"], &[3, 5]);
    for port in &config.ports {
        table.add_row([
            port.name.clone(),
            behind(port) + &besides(port),
            port.vlan.to_string(),
            port.queue_pairs.to_string(),
            workers(port),
            match port.behind {
                Behind::VhostUser { .. } => output::bytes(port.max_memory),
                _ => "-".to_owned(),
            },
        ]);
    }
    writeln!(text, "{table}")?;
    for far in far_cards(config, Path::new("/")) {
        writeln!(text, "\nnote: {far}")?;
    }
    Ok(text)
}

fn behind(port: &PortConfig) -> String {
    match &port.behind {
        Behind::VhostUser { socket, side } => {
            let path = socket.display();
            match side {
                Side::Server { mode, group: None } => format!("listen on {path} ({mode:04o})"),
                Side::Server { mode, group: Some(gid) } => {
                    format!("listen on {path} ({mode:04o}, group {gid})")
                }
                Side::Client { reconnect } => format!("connect to {path} every {} ms", reconnect.as_millis()),
            }
        }
        Behind::Tap { device } => format!("be the tap {device}"),
        Behind::Nic { device, .. } => format!("drive the card {device}"),
        Behind::Packet { device } => format!("share the interface {device}"),
        Behind::Xdp { device } => format!("take what arrives at the interface {device}"),
        Behind::Pcap(files) => {
            let path = |file: &PathBuf| file.display().to_string();
            let replay = files.replay.as_ref().map(|file| format!("replay {}", path(file)));
            let record = files.record.as_ref().map(|file| format!("record to {}", path(file)));
            [replay, record].into_iter().flatten().collect::<Vec<_>>().join(", ")
        }
        Behind::Null => "throw away what goes out".to_owned(),
    }
}

/// What is done to its frames besides.
fn besides(port: &PortConfig) -> String {
    let inject = port.inject.map(|inject| format!(", let frames suffer ({inject})"));
    let trace = port.trace.as_ref().map(|file| format!(", write all frames to {}", file.display()));
    [inject, trace].into_iter().flatten().collect()
}

fn workers(port: &PortConfig) -> String {
    port.queue_workers.as_ref().map_or_else(|| "any".to_owned(), |cores| format!("{cores:?}"))
}
