//! `cableway up`, `down` and `status`: a whole node from one file.
//!
//! Owns the order in which a host is made a node and given back, and the supervision of the processes that are the node: one
//! `cableway switch` and one `cableway vm` for each machine, which all read the same file. Moves no frame and runs no guest.

mod ask;
mod changes;
mod child;
mod config;
pub(crate) mod cores;
mod handed;
mod plan;
mod planned;
mod process;
mod report;
mod state;
mod supervise;
mod together;
mod virtuals;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use control::ControlSocket;
use host::doctor::Needs;
use settings::ConfigErrors;

use crate::output::{self, refuse};

/// Bring up a whole node: huge pages, network cards, the switch and its virtual machines.
///
/// Checks everything before it changes anything; what fails on the way is rolled back. Then it supervises: a switch that dies is
/// started again within a second, with its machines untouched, a machine as `restart` in [host] says. SIGTERM, Ctrl-C and
/// `cableway down` give everything back. docs/node.md explains the file; configs/node.toml is one.
///
/// Exit status: 0 after the node was brought down; 1 something went wrong, and was rolled back; 2 refused, nothing was changed.
#[derive(Args)]
pub(crate) struct UpArgs {
    /// The node (TOML).
    file: PathBuf,
    #[command(flatten)]
    place: Place,
    /// Say what is wrong with the file, or what would be done, core by core and device by device; change nothing.
    #[arg(long)]
    plan: bool,
    /// Return when everything is up; the supervisor goes on in the background.
    #[arg(short, long, conflicts_with = "plan")]
    detach: bool,
    /// What the supervisor logs: error, warn, info, debug, trace, or a filter [default: $RUST_LOG, else info].
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,
}

/// Bring a node down: machines are shut down, then the switch ends, then everything that was changed is given back.
///
/// Works also when its supervisor is gone. Exit status: 0 nothing of it is there any more; 1 something could not be given back.
#[derive(Args)]
pub(crate) struct DownArgs {
    #[command(flatten)]
    place: Place,
}

/// What a node's processes do. Exit status 1 unless all of them run.
#[derive(Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    place: Place,
    /// Print it as JSON.
    #[arg(long)]
    json: bool,
}

/// Where a node runs.
#[derive(Args)]
struct Place {
    /// Directory of the node's state, logs, and of all sockets with relative paths [default: /run/cableway, or
    /// $XDG_RUNTIME_DIR/cableway when not root].
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
}

/// `cableway up`.
///
/// # Errors
/// What went wrong on the way.
pub(crate) fn up(args: &UpArgs) -> Result<ExitCode> {
    // SAFETY: this is the first that the command does: there are no threads, and no file is open.
    let mut handed = match unsafe { handed::descriptor() } {
        Ok(handed) => handed,
        Err(error) => return Ok(refuse(format!("{error:#}"))),
    };
    let done = start(args, &mut handed);
    if let Some(unused) = handed {
        handed::turn_away(unused);
    }
    done
}

/// The same, with the control socket that was `handed` over, if it comes so far that it is served.
fn start(args: &UpArgs, handed: &mut Option<OwnedFd>) -> Result<ExitCode> {
    let run_dir = match control::run_dir_of_server(args.place.run_dir.as_deref()) {
        Ok(run_dir) => run_dir,
        Err(error) => return Ok(refuse(error)),
    };
    // The children find both wherever they are started.
    let run_dir = run_dir.canonicalize()?;
    let file = args.file.canonicalize().unwrap_or_else(|_| args.file.clone());
    let found = match state::State::read(&run_dir) {
        Ok(found) => found,
        Err(error) => return Ok(refuse(error)),
    };
    if let (Some(state), false) = (&found, args.plan) {
        if state.supervisor.is_alive() {
            return Ok(refuse(format!(
                "a node is up in {} already, supervised by process {}: cableway status shows it, cableway down ends it",
                run_dir.display(),
                state.supervisor.pid
            )));
        }
        if state.file != file {
            return Ok(refuse(format!(
                "the node of {} was left behind in {} by a supervisor that is gone: cableway down first, or cableway up {0} \
                 to take it over",
                state.file.display(),
                run_dir.display()
            )));
        }
    }
    let node = match config::Node::load(&file, &run_dir, found.as_ref()) {
        Ok(node) => node,
        Err(errors) => {
            eprintln!("{errors}");
            return Ok(ExitCode::from(output::REFUSED));
        }
    };
    if args.plan {
        output::print(&plan::text(&node)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    if args.detach {
        return ask::detach(&file, &run_dir, args.log.as_deref());
    }
    if let Err(error) = crate::log::start(args.log.as_deref()) {
        return Ok(refuse(error));
    }
    let door = report::door(&run_dir);
    let socket = match handed.take() {
        Some(fd) => ControlSocket::take(&door, fd),
        None => ControlSocket::bind(&door),
    };
    match socket {
        Ok(socket) => supervise::run(&node, &run_dir, found, socket),
        Err(error) => Ok(refuse(error)),
    }
}

/// What a node's file asks of the machine, for `cableway doctor`; and why its cores cannot be chosen here, if they cannot.
///
/// # Errors
/// The file cannot be read.
pub(crate) fn needs(file: &Path) -> Result<(Needs, Option<ConfigErrors>), ConfigErrors> {
    config::needs(file)
}

/// `cableway down`.
///
/// # Errors
/// Something could not be given back.
pub(crate) fn down(args: &DownArgs) -> Result<ExitCode> {
    ask::down(&control::run_dir_of_client(args.place.run_dir.as_deref())?)
}

/// `cableway status`.
///
/// # Errors
/// The state cannot be read.
pub(crate) fn status(args: &StatusArgs) -> Result<ExitCode> {
    ask::status(&control::run_dir_of_client(args.place.run_dir.as_deref())?, args.json)
}
