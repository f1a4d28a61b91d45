//! `cableway up --detach`, `down` and `status`: what is done from outside of the supervisor.

use std::fs::OpenOptions;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use control::client::{self, ClientError};
use rustix::process::Signal;

use super::child::{last_lines, log_path};
use super::report::{NodeReport, PATH, Phase, door};
use super::state::State;
use super::supervise::tear_down;
use crate::output::{self, refuse};
use crate::ready;

/// Starts the supervisor in the background and waits until the node is up.
///
/// # Errors
/// It could not be brought up.
pub(super) fn detach(file: &Path, run_dir: &Path, filter: Option<&str>) -> Result<ExitCode> {
    let log = log_path(run_dir, "node");
    let out = OpenOptions::new().append(true).create(true).open(&log);
    let out = out.with_context(|| format!("opening {}", log.display()))?;
    let place = tempfile::tempdir().context("making a temporary directory")?;
    let socket = place.path().join("ready");
    let readiness = UnixDatagram::bind(&socket).with_context(|| format!("making {}", socket.display()))?;
    readiness.set_read_timeout(Some(Duration::from_millis(50)))?;
    let mut command = Command::new(std::env::current_exe().context("finding this program")?);
    command.arg("up").arg(file).arg("--run-dir").arg(run_dir);
    if let Some(filter) = filter {
        command.args(["--log", filter]);
    }
    command.env("NOTIFY_SOCKET", &socket).stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
    let mut supervisor = command.process_group(0).spawn().context("starting the supervisor")?;
    eprintln!("bringing up {}: {} tells how it goes …", file.display(), log.display());
    loop {
        let mut message = [0; 256];
        let said = readiness.recv(&mut message).unwrap_or(0);
        if ready::is_ready(message.get(..said).unwrap_or_default()) {
            // A machine that still waits for something is shown, and no failure.
            status(run_dir, false)?;
            return Ok(ExitCode::SUCCESS);
        }
        if let Some(ended) = supervisor.try_wait()? {
            let end = last_lines(&log, 20).unwrap_or_default();
            eprintln!("cableway: the node is not up; the end of {}:\n{end}", log.display());
            return Ok(ExitCode::from(ended.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)));
        }
    }
}

/// Brings the node in `run_dir` down.
///
/// # Errors
/// Something could not be given back.
pub(super) fn down(run_dir: &Path) -> Result<ExitCode> {
    let Some(state) = State::read(run_dir)? else {
        output::print(&format!("no node is up in {}\n", run_dir.display()))?;
        return Ok(ExitCode::SUCCESS);
    };
    let file = state.file.display().to_string();
    let log = log_path(run_dir, "node");
    if let Some(supervisor) = state.supervisor.open() {
        supervisor.signal(Signal::TERM);
        let longest = state.children.iter().map(|child| child.patience()).max().unwrap_or_default();
        eprintln!("bringing {file} down; machines have up to {} s …", longest.as_secs());
        // Machines all at once, then the switch, then what was changed.
        if !supervisor.has_ended(2 * longest + Duration::from_secs(60)) {
            let (pid, log) = (state.supervisor.pid, log.display());
            bail!("its supervisor (process {pid}) does not end; see {log}");
        }
    }
    // It was gone, was killed on the way, or could not give everything back.
    if let Some(mut left) = State::read(run_dir)? {
        crate::log::start(None)?;
        tracing::info!("its supervisor is gone: bringing {file} down without it");
        if tear_down(&mut left, run_dir) > 0 {
            let what: Vec<_> = left.changes.iter().map(ToString::to_string).collect();
            bail!("not given back: {}", what.join(", "));
        }
    }
    output::print(&format!("{file} is down\n"))?;
    Ok(ExitCode::SUCCESS)
}

/// Shows what the node's processes do.
///
/// # Errors
/// Nobody supervises it, and its state cannot be read.
pub(super) fn status(run_dir: &Path, json: bool) -> Result<ExitCode> {
    let report = match client::get::<NodeReport>(&door(run_dir), PATH) {
        Ok(answer) => answer.value,
        Err(why) => {
            // Nobody there is what its state is written down for; somebody who does not answer is worth a word.
            let nobody = matches!(why, ClientError::NotRunning(_));
            if !nobody {
                eprintln!("cableway: {why}");
            }
            let Some(state) = State::read(run_dir)? else {
                let way = if nobody {
                    "cableway up FILE starts one"
                } else {
                    "where systemd starts it by this question (cableway.socket), journalctl -u cableway says why it did not"
                };
                return Ok(refuse(format!("no node is up in {}: {way}", run_dir.display())));
            };
            NodeReport::of(&state, run_dir, None)
        }
    };
    if json {
        output::print(&(serde_json::to_string_pretty(&report)? + "\n"))?;
    } else {
        output::print(&table(&report))?;
    }
    Ok(if report.is_well() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn table(report: &NodeReport) -> String {
    let mut table = output::table(&["name", "state", "for", "process", "restarts", "ended last"], &[2, 3, 4]);
    for child in &report.children {
        table.add_row([
            child.name.clone(),
            child.state.clone(),
            output::duration(child.since_s as f64),
            child.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
            child.restarts.to_string(),
            child.last_end.clone().unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    let supervisor = match (report.supervisor, report.phase) {
        (None, _) => "nobody supervises it: cableway up takes it over, cableway down ends it".to_owned(),
        (Some(pid), Some(Phase::Starting)) => format!("being brought up by process {pid}"),
        (Some(pid), Some(Phase::Ending)) => format!("being brought down by process {pid}"),
        (Some(pid), Some(Phase::Up) | None) => format!("supervised by process {pid}"),
    };
    format!("{}, {supervisor}\n\n{table}\n", report.file)
}
