//! `cableway up --detach`, `down` and `status`: what is done from outside of the supervisor.

use std::fs::OpenOptions;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::Signal;
use serde::Serialize;

use super::child::{last_lines, log_path};
use super::state::{State, now};
use super::supervise::tear_down;
use crate::output::{self, refuse};

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
        let mut message = [0; 64];
        if readiness.recv(&mut message).is_ok() {
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

/// What `status --json` prints.
#[derive(Serialize)]
struct Status<'s> {
    file: &'s Path,
    run_dir: &'s Path,
    /// The supervisor's process, if it runs.
    supervisor: Option<i32>,
    children: Vec<ChildStatus<'s>>,
}

#[derive(Serialize)]
struct ChildStatus<'s> {
    name: &'s str,
    kind: super::state::Kind,
    state: &'static str,
    pid: Option<i32>,
    since_s: u64,
    restarts: u64,
    last_end: Option<&'s str>,
}

/// Shows what the node's processes do.
///
/// # Errors
/// The state cannot be read.
pub(super) fn status(run_dir: &Path, json: bool) -> Result<ExitCode> {
    let Some(state) = State::read(run_dir)? else {
        return Ok(refuse(format!("no node is up in {}: cableway up FILE starts one", run_dir.display())));
    };
    let children: Vec<_> = state
        .children
        .iter()
        .map(|child| ChildStatus {
            name: &child.name,
            kind: child.kind,
            state: child.word(),
            pid: child.process.filter(|process| process.is_alive()).map(|process| process.pid),
            since_s: now().saturating_sub(child.since),
            restarts: child.restarts,
            last_end: child.last_end.as_deref(),
        })
        .collect();
    let supervisor = state.supervisor.is_alive().then_some(state.supervisor.pid);
    let well = supervisor.is_some() && children.iter().all(|child| child.state == "running");
    let status = Status { file: &state.file, run_dir, supervisor, children };
    if json {
        output::print(&(serde_json::to_string_pretty(&status)? + "\n"))?;
    } else {
        output::print(&table(&status))?;
    }
    Ok(if well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn table(status: &Status<'_>) -> String {
    let mut table = output::table(&["name", "state", "for", "process", "restarts", "ended last"], &[2, 3, 4]);
    for child in &status.children {
        table.add_row([
            child.name.to_owned(),
            child.state.to_owned(),
            output::duration(child.since_s as f64),
            child.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
            child.restarts.to_string(),
            child.last_end.unwrap_or("-").to_owned(),
        ]);
    }
    let supervisor = status.supervisor.map_or_else(
        || "nobody supervises it: cableway up takes it over, cableway down ends it".to_owned(),
        |pid| format!("supervised by process {pid}"),
    );
    format!("{}, {supervisor}\n\n{table}\n", status.file.display())
}
