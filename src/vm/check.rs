//! `cableway vm FILE --check`: what is wrong with a machine's configuration, or what it would do.

use std::fmt::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use host::{pci, topology};
use vmm::boot::Format;
use vmm::config::{Config, DiskAio, IrqChip, NetBack, OnReboot, PageSize, Seccomp, SerialTo};
use vmm::preflight::Preflight;
use vmm::sandbox;

use crate::confinement;
use crate::output::{self, refuse};

/// Checks the configuration on this machine.
///
/// # Errors
/// The report cannot be written.
pub(super) fn run(config: &Config, run_dir: Option<&Path>) -> Result<ExitCode> {
    match Preflight::new(config) {
        Ok(preflight) => {
            output::print(&report(config, &preflight, run_dir)?)?;
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => Ok(refuse(error)),
    }
}

/// What would be done, with the effective cores, nodes and pages.
fn report(config: &Config, preflight: &Preflight, run_dir: Option<&Path>) -> Result<String> {
    let mut text = format!("{} is valid. It would\n", config.name);
    let format = match preflight.kernel_format() {
        Format::Elf => "an ELF, by its PVH entry",
        Format::BzImage => "a bzImage, by its 64-bit entry",
    };
    writeln!(text, "  start {} ({format})", config.kernel.display())?;
    if let Some(initramfs) = &config.initramfs {
        writeln!(text, "  with the initramfs {}", initramfs.display())?;
    }
    writeln!(text, "  and the command line {:?}", config.cmdline)?;
    let pages = match config.pages {
        PageSize::Auto => "2 MiB huge pages if enough are free, else 4 KiB pages",
        PageSize::Ordinary => "4 KiB pages",
        PageSize::Huge2M => "2 MiB huge pages",
        PageSize::Huge1G => "1 GiB huge pages",
    };
    let on = |host: Option<u32>| host.map_or_else(String::new, |node| format!(" on memory node {node}"));
    let locked = if config.lock_memory { ", locked" } else { "" };
    let node = config.nodes.first().filter(|_| !config.numa).and_then(|node| node.host);
    writeln!(text, "  take {} of memory in {pages}{}{locked}", output::bytes(config.memory), on(node))?;
    for (n, node) in config.nodes.iter().enumerate().filter(|_| config.numa) {
        let (memory, host) = (output::bytes(node.memory), on(node.host));
        let devices = if node.devices { ", near its PCI devices" } else { "" };
        writeln!(text, "    its memory node {n}: {memory}{host}, vCPUs {:?}{devices}", node.vcpus)?;
    }
    let topology = config.topology;
    writeln!(
        text,
        "  run {} vCPU(s): {} socket(s) of {} core(s) of {} thread(s)",
        topology.vcpus(),
        topology.sockets,
        topology.cores,
        topology.threads
    )?;
    let priority = match config.vcpu_priority {
        Some(priority) => format!(", SCHED_FIFO priority {priority}"),
        None => String::new(),
    };
    match &config.vcpu_cores {
        None => writeln!(text, "    wherever the kernel puts them")?,
        Some(cores) => {
            for (n, core) in cores.iter().enumerate() {
                let node = topology::node_of_core(Path::new("/"), *core);
                let place = node.map_or_else(String::new, |node| format!(" (memory node {node})"));
                writeln!(text, "    vCPU {n} on core {core}{place}{priority}")?;
                if let (Some(of_core), Some(of_memory)) = (node, config.host_node_of(n))
                    && of_core != of_memory
                {
                    writeln!(text, "    note: the memory is on node {of_memory}; every access crosses over")?;
                }
                for sibling in topology::smt_siblings(Path::new("/"), *core).iter().flat_map(|set| set.iter())
                {
                    if sibling > *core && cores.contains(&sibling) && topology.threads == 1 {
                        writeln!(
                            text,
                            "    note: cores {core} and {sibling} are one physical core; vCPUs there halve each other"
                        )?;
                    }
                }
            }
        }
    }
    match &config.emulator_cores {
        Some(cores) => writeln!(text, "  do everything else on cores {cores:?}")?,
        None => writeln!(text, "  do everything else on any core that it may use")?,
    }
    let exits = |wanted: bool| {
        let refused = preflight.refused_exits();
        let exits = config.disable_exits.iter().filter(move |exit| refused.contains(exit) != wanted);
        exits.map(|exit| exit.word()).collect::<Vec<_>>().join(", ")
    };
    match config.irqchip {
        IrqChip::Kernel => writeln!(text, "  leave all interrupt controllers to KVM")?,
        IrqChip::Split => writeln!(text, "  have the I/O APIC here, local APICs in KVM")?,
    }
    if !exits(true).is_empty() {
        writeln!(text, "  let the guest do {} without an exit", exits(true))?;
    }
    if !exits(false).is_empty() {
        writeln!(text, "  note: KVM here refuses to let {} go without an exit", exits(false))?;
    }
    for card in &config.net {
        let back = match &card.back {
            NetBack::VhostUser(back) => {
                let how = if back.listen { "listen on" } else { "connect to" };
                let wait = if back.wait { " and wait for it" } else { "" };
                let queues =
                    if back.pairs > 1 { format!(", {} queue pairs", back.pairs) } else { String::new() };
                format!("{how} {}{wait}{queues}", back.socket.display())
            }
            NetBack::Tap(interface) => format!("use the tap {interface}"),
        };
        let mac = card.mac.map(|byte| format!("{byte:02x}")).join(":");
        writeln!(text, "  {back}: network card {} ({mac})", card.name)?;
    }
    for (disk, size) in config.disk.iter().zip(preflight.disk_sizes()) {
        let how = if disk.read_only { "read" } else { "read and write" };
        let (path, size) = (disk.path.display(), output::bytes(size));
        let direct = if disk.direct { ", beside the page cache" } else { "" };
        writeln!(text, "  {how} {path} ({size}): disk {}, {} queue(s){direct}", disk.name, disk.queues)?;
        let aio = match disk.aio {
            DiskAio::IoUring => "with io_uring if the kernel allows",
            DiskAio::Threads => "one request after the other",
        };
        let cores =
            disk.iothread_cores.as_ref().map_or_else(String::new, |cores| format!(" on cores {cores:?}"));
        writeln!(text, "    by {} thread(s){cores}, {aio}", disk.iothreads)?;
    }
    for function in &config.pci {
        let function = pci::find(Path::new("/"), function.device);
        let Some(function) = function else { continue };
        writeln!(
            text,
            "  pass {} ({:04x}:{:04x}) through to the guest",
            function.bdf, function.vendor, function.device
        )?;
        let hosts: Vec<u32> = config.nodes.iter().filter_map(|node| node.host).collect();
        if let Some(near) = function.node.filter(|near| !hosts.is_empty() && !hosts.contains(near)) {
            writeln!(
                text,
                "    note: it is on memory node {near}, the guest's memory on {hosts:?}; all that it writes crosses over"
            )?;
        }
    }
    if !config.pci.is_empty() {
        writeln!(text, "  pin all of the guest's memory for these devices")?;
    }
    writeln!(text, "  connect the serial console to {}", config.serial)?;
    if config.console != SerialTo::Off {
        writeln!(text, "  connect the virtio console to {}", config.console)?;
    }
    if config.rng {
        writeln!(text, "  give the guest randomness")?;
    }
    let reboot = match config.on_reboot {
        OnReboot::Restart => "start again",
        OnReboot::End => "end",
    };
    writeln!(text, "  {reboot} when the guest reboots; give it {:?} to shut down", config.shutdown_timeout)?;
    let run_dir = control::run_dir_of_client(run_dir).ok();
    let files = sandbox::files(config, run_dir.as_deref());
    writeln!(text, "  {}", confinement::files(files.as_ref())?)?;
    let calls = "when a thread calls the kernel for what its kind has no use for";
    match config.seccomp {
        Seccomp::Kill => writeln!(text, "  end at once {calls}")?,
        Seccomp::Log => writeln!(text, "  log it {calls}")?,
        Seccomp::Off => {
            writeln!(text, "  let every thread call the kernel for anything: `seccomp` is \"off\"")?
        }
    }
    Ok(text)
}
