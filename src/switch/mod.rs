//! `cableway switch`: run a switch, check its configuration, or ask one that runs.

mod ask;
mod capture;
mod check;
mod serve;
mod stats;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

/// Run a virtual switch, or ask one that runs.
///
/// With a FILE, runs the switch that the file describes until it gets SIGTERM or SIGINT; SIGHUP applies the changed file.
/// configs/example.toml explains every key, configs/vv.toml is the smallest useful switch.
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct SwitchArgs {
    #[command(subcommand)]
    ask: Option<ask::Ask>,

    #[command(flatten)]
    run: RunArgs,
}

#[derive(Args)]
struct RunArgs {
    /// The configuration (TOML).
    #[arg(required = true)]
    file: Option<PathBuf>,

    #[command(flatten)]
    place: Place,

    /// Say what is wrong with the file and what it would do; start nothing.
    #[arg(long)]
    check: bool,

    /// What to log to standard error: error, warn, info, debug, trace, or a filter like `switch=debug` [default: $RUST_LOG,
    /// else info].
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,
}

/// Where a switch runs.
#[derive(Args)]
struct Place {
    /// Directory of the control socket and of all sockets with relative paths [default: /run/cableway, or
    /// $XDG_RUNTIME_DIR/cableway when not root].
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
}

/// Runs the subcommand.
///
/// # Errors
/// What went wrong while it ran. A configuration that is refused is not an error here: it was said, and the status is 2.
pub(crate) fn run(args: SwitchArgs) -> Result<ExitCode> {
    match (args.ask, args.run) {
        (Some(ask), _) => ask::run(ask),
        (None, RunArgs { file: Some(file), place, check: true, .. }) => check::run(&file, &place),
        (None, RunArgs { file: Some(file), place, log, .. }) => serve::run(&file, &place, log.as_deref()),
        (None, _) => Ok(ExitCode::from(crate::output::REFUSED)), // clap demands FILE where there is no subcommand
    }
}
