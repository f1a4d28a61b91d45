//! `cableway vm`: run a virtual machine, or check its configuration.
//!
//! Exit status, besides those of every command: 3 when the guest's kernel panicked, 4 when a vCPU met a triple fault, 5 when
//! KVM could not go on.

mod ask;
mod check;
mod console;
mod run;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use vmm::config::{Config, ConfigErrors};

use crate::node::cores::Planner;

/// Run a virtual machine, or ask one that runs.
///
/// With a FILE, runs the machine that its `[vm]` describes until the guest turns itself off; without one, the flags describe
/// it: every key of `[vm]` is one. SIGTERM presses the power button, SIGINT or a second SIGTERM ends the machine at once.
/// docs/vm.md explains every key.
///
/// Exit status: 0 the guest turned itself off, or was ended by a signal; 1 something went wrong; 2 refused, nothing was
/// started; 3 the guest's kernel panicked; 4 triple fault; 5 KVM could not go on.
#[derive(Args)]
#[command(
    arg_required_else_help = true,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true
)]
pub(crate) struct VmArgs {
    #[command(subcommand)]
    ask: Option<ask::Ask>,

    #[command(flatten)]
    run: RunArgs,
}

#[derive(Args)]
struct RunArgs {
    /// The configuration (TOML).
    #[arg(conflicts_with = "Keys", required_unless_present_any = ["kernel", "firmware"])]
    file: Option<PathBuf>,

    /// The machine of this name, of a node's file (`cableway up`), which has a list of them: `[[vm]]`.
    #[arg(long, value_name = "NAME", requires = "file", conflicts_with = "Keys")]
    vm: Option<String>,

    /// Where the machine's control socket is, vm-NAME.sock, and relative sockets of a node's file are [default: /run/cableway,
    /// or $XDG_RUNTIME_DIR/cableway when not root].
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,

    /// Say what is wrong with the configuration and what it would do; start nothing.
    #[arg(long)]
    check: bool,

    /// What to log to standard error: error, warn, info, debug, trace, or a filter like `vmm=debug` [default: $RUST_LOG,
    /// else info].
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,

    #[command(flatten)]
    keys: Keys,
}

macro_rules! keys {
    ($($(#[doc = $doc:literal])+ $key:ident: $value:literal,)+) => {
        /// Every key of `[vm]`, as a flag.
        #[derive(Args)]
        struct Keys {
            $($(#[doc = $doc])+ #[arg(long, value_name = $value, help_heading = "Instead of a FILE")] $key: Option<String>,)+
            /// A network card, as often as there are cards: vhost-user,socket=PATH, and mode, queues, packed, wait; or tap,device=NAME; and mac, queue_size, mtu.
            #[arg(long, value_name = "CARD", help_heading = "Instead of a FILE")]
            net: Vec<String>,
            /// A memory node of the guest, as often as there are nodes: memory=1GiB,vcpus=0:1, and node, distances, devices.
            #[arg(long, value_name = "NODE", help_heading = "Instead of a FILE")]
            numa: Vec<String>,
            /// A disk, as often as there are disks: raw,path=FILE, and read_only, direct, serial, discard, aio, queues, queue_size, iothreads, iothread_cores (0:1).
            #[arg(long, value_name = "DISK", help_heading = "Instead of a FILE")]
            disk: Vec<String>,
            /// A function of the host's that the guest gets, bound to vfio-pci (cableway nic bind), as often as there are: 0000:01:00.0, and vf_token=UUID.
            #[arg(long, value_name = "FUNCTION", help_heading = "Instead of a FILE")]
            pci: Vec<String>,
        }

        impl Keys {
            /// Keys with the values that were given.
            fn given(self) -> Vec<(&'static str, String)> {
                let cards = self.net.into_iter().map(|card| ("net", card));
                let disks = self.disk.into_iter().map(|disk| ("disk", disk));
                let nodes = self.numa.into_iter().map(|node| ("numa", node));
                let functions = self.pci.into_iter().map(|function| ("pci", function));
                let listed = cards.chain(disks).chain(nodes).chain(functions);
                let keys = [$((stringify!($key), self.$key),)+];
                keys.into_iter().filter_map(|(key, value)| Some((key, value?))).chain(listed).collect()
            }
        }
    };
}

keys! {
    /// What it is called in logs [default: vm].
    name: "NAME",
    /// The kernel: an ELF with a PVH entry, or a bzImage.
    kernel: "FILE",
    /// Not supported yet: a machine starts a kernel without firmware.
    firmware: "FILE",
    /// The initial file system.
    initramfs: "FILE",
    /// The kernel's command line [default: console=ttyS0].
    cmdline: "TEXT",
    /// Memory, like "512 MiB" or 4GiB [default: 512 MiB].
    memory: "AMOUNT",
    /// What the memory is made of: 4K, 2M, 1G, or auto [default: 4K].
    pages: "SIZE",
    /// The host's memory node that it lies on.
    node: "N",
    /// Whether it is locked in memory [default: false].
    lock_memory: "BOOL",
    /// Whether all of it is there from the start; huge pages, locked memory and memory that is shared always are [default: false].
    prefault: "BOOL",
    /// How many vCPUs [default: 1].
    vcpus: "N",
    /// How the guest sees them, like sockets=1,cores=2,threads=2.
    topology: "PARTS",
    /// The host's core of each vCPU, like 2,3.
    vcpu_cores: "CORES",
    /// SCHED_FIFO priority of the vCPUs, 1 to 98.
    vcpu_priority: "N",
    /// The host's cores of every other thread, like 0,1.
    emulator_cores: "CORES",
    /// What the guest does without leaving the guest: hlt, mwait, pause, cstate.
    disable_exits: "LIST",
    /// Microseconds that KVM polls before it puts a halted vCPU to sleep.
    halt_poll_us: "N",
    /// Whether the guest is told that its vCPUs have their cores to themselves [default: false].
    hint_dedicated: "BOOL",
    /// Where the I/O APIC is: kernel (or on) or split [default: kernel].
    irqchip: "WHERE",
    /// Whether the guest has performance counters [default: true].
    pmu: "BOOL",
    /// Where the serial console goes: stdio, off, or file:PATH [default: stdio].
    serial: "WHERE",
    /// Where the virtio console (hvc0) goes: stdio, off, or file:PATH [default: off].
    console: "WHERE",
    /// Whether the guest has a source of randomness [default: false].
    rng: "BOOL",
    /// What a reset by the guest does: restart or end [default: restart].
    on_reboot: "WHAT",
    /// Seconds that a guest may take to shut down when asked [default: 30].
    shutdown_timeout: "SECONDS",
    /// What a system call does that a thread has no use for: kill (or true) the process, log it, or off (or false) [default: kill].
    seccomp: "WHAT",
    /// Whether the process is held to its own files (Landlock) [default: true].
    confine_files: "BOOL",
}

/// Runs the subcommand.
///
/// # Errors
/// What went wrong while it ran. A configuration that is refused is not an error here: it was said, and the status is 2.
pub(crate) fn run(args: VmArgs) -> Result<ExitCode> {
    let args = match args.ask {
        Some(ask) => return ask::run(&ask),
        None => args.run,
    };
    let config = match (&args.file, &args.vm) {
        (Some(file), Some(name)) => {
            let run_dir = match control::run_dir_of_client(args.run_dir.as_deref()) {
                Ok(run_dir) => run_dir,
                Err(error) => return Ok(crate::output::refuse(error)),
            };
            Config::load_of_node(file, name, &run_dir, |document, problems| {
                Planner::now().fills(document, problems)
            })
        }
        (Some(file), None) => Config::load(file),
        (None, _) => Config::from_flags(&args.keys.given()),
    };
    match config {
        Ok(config) if args.check => check::run(&config, args.run_dir.as_deref()),
        Ok(config) => run::run(&config, args.run_dir.as_deref(), args.log.as_deref()),
        Err(errors) => Ok(refused(&errors)),
    }
}

fn refused(errors: &ConfigErrors) -> ExitCode {
    eprintln!("{errors}");
    ExitCode::from(crate::output::REFUSED)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: RunArgs,
    }

    #[test]
    fn every_key_is_a_flag_and_every_flag_a_key() {
        let keys = vmm::config::vocabulary().into_iter().filter(|(table, _)| *table == "vm");
        let mut words = vec!["vm".to_owned()];
        for (_, key) in keys.clone() {
            words.extend([format!("--{}", key.replace('_', "-")), "x".to_owned()]);
        }
        let given =
            Command::try_parse_from(words).unwrap_or_else(|error| panic!("{error}")).args.keys.given();
        let (mut given, mut keys): (Vec<_>, Vec<_>) =
            (given.iter().map(|(key, _)| *key).collect(), keys.map(|(_, key)| key).collect());
        given.sort_unstable();
        keys.sort_unstable();
        assert_eq!(given, keys);
    }
}
