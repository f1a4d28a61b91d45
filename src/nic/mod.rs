//! `cableway nic`: the machine's network cards, who has them, and how they change hands.

mod look;
mod selftest;
mod show;
mod vf;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Subcommand};
use host::pci::{self, Bdf, bind};

use crate::output::{self, refuse};

/// Network cards: list them, and take them from the kernel for the switch to drive, or give them back.
#[derive(Subcommand)]
pub(crate) enum NicCommand {
    /// The machine's network cards, and whether Cableway can drive each, or what is missing.
    List(ListArgs),
    /// All that is known of one card: what it counts and its registers too, by their names.
    Info(InfoArgs),
    /// Let a card with vfio-pci that nobody uses test itself: registers, settings, interrupt, memory, loopback, link.
    Test(selftest::TestArgs),
    /// Take cards from the kernel's drivers and give them to vfio-pci, for `kind = "nic"` ports.
    Bind(BindArgs),
    /// Give cards back to the kernel's drivers that they had.
    Unbind(UnbindArgs),
    /// Make virtual functions of a card, in place of those that there are.
    Vfs(VfsArgs),
    /// Change what a virtual function may, as `ip link set … vf` does, or show it: of a card that a running switch has (the function begins anew), or that
    /// the kernel drives.
    Vf(vf::VfArgs),
}

#[derive(Args)]
pub(crate) struct ListArgs {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// The run directory of the switch that has cards, if one has [default: /run/cableway, or $XDG_RUNTIME_DIR/cableway when not root].
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
}

#[derive(Args)]
pub(crate) struct InfoArgs {
    /// Its PCI address, as in `0000:01:00.0`.
    bdf: Bdf,
    /// The run directory of the switch that has the card, if one has [default: /run/cableway, or $XDG_RUNTIME_DIR/cableway when not root].
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Of a virtual function whose physical one is with vfio-pci as well: the token that its owner set, to read its registers.
    #[arg(long, value_name = "UUID")]
    vf_token: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub(crate) struct BindArgs {
    /// PCI addresses, as in `0000:01:00.0`: several of one IOMMU group at once.
    #[arg(required = true, value_name = "BDF")]
    bdfs: Vec<Bdf>,
    /// Take also an interface that carries the default route or an address.
    #[arg(long)]
    force: bool,
}

#[derive(Args)]
pub(crate) struct UnbindArgs {
    /// PCI addresses, as in `0000:01:00.0`.
    #[arg(required = true, value_name = "BDF")]
    bdfs: Vec<Bdf>,
}

#[derive(Args)]
pub(crate) struct VfsArgs {
    /// The physical function's PCI address, as in `0000:01:00.0`.
    bdf: Bdf,
    /// How many; 0 removes them.
    count: u16,
}

/// Runs the subcommand.
///
/// # Errors
/// What went wrong on the way. What is refused before anything was changed is said, and the status is 2.
pub(crate) fn run(command: NicCommand) -> Result<ExitCode> {
    let root = Path::new("/");
    match command {
        NicCommand::List(args) => show::list(root, &args),
        NicCommand::Info(args) => show::info(root, &args),
        NicCommand::Test(args) => selftest::run(root, &args),
        NicCommand::Bind(args) => bind_all(root, &args),
        NicCommand::Unbind(args) => {
            for bdf in args.bdfs {
                let driver = match bind::unbind(root, bdf) {
                    Err(error @ (bind::BindError::Unknown(_) | bind::BindError::NotBound { .. })) => {
                        return Ok(refuse(error));
                    }
                    done => done?,
                };
                let driver = driver
                    .map_or("no driver: none that is loaded takes it".to_owned(), |d| format!("driver {d}"));
                output::print(&format!("{bdf}: {driver}\n"))?;
            }
            Ok(ExitCode::SUCCESS)
        }
        NicCommand::Vf(args) => vf::run(root, &args),
        NicCommand::Vfs(VfsArgs { bdf, count }) => {
            match bind::set_virtuals(root, bdf, count) {
                Err(error @ bind::BindError::Write { .. }) => return Err(error.into()),
                Err(error) => return Ok(refuse(error)),
                Ok(()) => {}
            }
            let made = pci::find(root, bdf).map(|function| function.virtuals).unwrap_or_default();
            let made = if made.is_empty() { "none".to_owned() } else { pci::listed(&made) };
            output::print(&format!("{bdf}: virtual functions now: {made}\n"))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Takes all of them, or none that is refused beforehand.
fn bind_all(root: &Path, args: &BindArgs) -> Result<ExitCode> {
    let mut functions = Vec::new();
    for bdf in &args.bdfs {
        match bind::check(root, *bdf, &args.bdfs, args.force) {
            Ok(function) => functions.push(function),
            Err(error) => return Ok(refuse(error)),
        }
    }
    for function in &functions {
        let had = bind::bind(root, function)?;
        let from = match (&function.driver, had) {
            (_, true) => " already".to_owned(),
            (Some(driver), _) => format!(", before that {driver}"),
            (None, _) => String::new(),
        };
        output::print(&format!("{}: vfio-pci{from}\n", function.bdf))?;
        if pmd::nic::driver_for(function.id()).is_none() {
            eprintln!(
                "cableway: {}: bound, but no driver of Cableway is for {:04x}:{:04x}",
                function.bdf, function.vendor, function.device
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}
