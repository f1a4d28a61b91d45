//! What the keys mean together: defaults and rules between keys.

use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use settings::values::CoreNumber;
use settings::{DeTable, DeValue, Problems, Spanned, suggestion};

use super::keys::{DiskKeys, NetKeys, PciKeys, TopologyKeys, VmKeys};
use super::nodes::Given;
use super::values::{DiskAio, IrqChip, NetKind, NetMode, OnReboot, PageSize, Seccomp, SerialName, SerialTo};
use super::{
    Config, DiskConfig, GuestNode, MAX_VCPUS, NetBack, NetConfig, PciConfig, Topology, VhostUserConfig,
};

const CMDLINE: &str = "console=ttyS0";
const MEMORY: u64 = 512 << 20;
const MEMORY_LEAST: u64 = 2 << 20;
const MEMORY_MOST: u64 = 16 << 40;
const QUEUE_SIZE: u16 = 256;
/// Devices of a PCI bus, without the host bridge, `console` and `rng`.
const MAX_DEVICES: usize = 29;
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(30);

/// Validates a whole document. `None` when something essential was wrong.
pub(super) fn document(document: &DeTable<'_>, file: &Path, problems: &mut Problems<'_>) -> Option<Config> {
    let mut vm = None;
    for (key, value) in document {
        match (key.get_ref().as_ref(), value.get_ref()) {
            ("vm", DeValue::Table(table)) => {
                let sockets = file.parent().unwrap_or(Path::new(""));
                vm = Some(self::vm(VmKeys::table("", table, problems), &key.span(), file, sockets, problems));
            }
            ("vm", DeValue::Array(_)) => problems.add(
                key.span(),
                "`[[vm]]` is a list of machines: say which one, as in `--vm fw1`, or start all of them with `cableway up`",
            ),
            ("vm", _) => problems.add(key.span(), "`vm` is a table: write `[vm]`"),
            (unknown, _) => {
                let hint = suggestion(unknown, &["vm"]);
                problems.add(key.span(), format!("unknown key `{unknown}` outside of `[vm]`; {hint}"));
            }
        }
    }
    if vm.is_none() && !document.contains_key("vm") {
        problems.add_general("`[vm]` is missing: it names the kernel to start, as in `kernel = \"vmlinux\"`");
    }
    vm?
}

/// The machine `name` of a node's file. Its other tables are for others to judge.
pub(super) fn machine_of_node(
    document: &DeTable<'_>,
    name: &str,
    file: &Path,
    run_dir: &Path,
    problems: &mut Problems<'_>,
) -> Option<Config> {
    let machines = document.get("vm").and_then(|list| list.get_ref().as_array());
    let tables = machines.into_iter().flatten().filter_map(|m| Some((m.span(), m.get_ref().as_table()?)));
    let named: Vec<_> =
        tables.filter_map(|(at, table)| Some((table.get("name")?.get_ref().as_str()?, at, table))).collect();
    let Some((_, at, table)) = named.iter().find(|(found, ..)| *found == name) else {
        let names: Vec<&str> = named.iter().map(|(found, ..)| *found).collect();
        problems.add_general(format!("there is no [[vm]] called `{name}`; {}", suggestion(name, &names)));
        return None;
    };
    of_table(table, at, file, run_dir, problems)
}

/// One element of `[[vm]]`, whose header is at `at`.
pub(super) fn of_table(
    table: &DeTable<'_>,
    at: &Range<usize>,
    file: &Path,
    run_dir: &Path,
    problems: &mut Problems<'_>,
) -> Option<Config> {
    let written = table.get("name").and_then(|name| name.get_ref().as_str());
    let place = written.map_or_else(String::new, |name| format!("machine `{name}`: "));
    let keys = VmKeys::table(&place, table, problems);
    if keys.name.is_none() {
        keys.wrong.or_missing("name", at.clone(), "what to call it, as in `name = \"fw1\"`", problems);
    }
    vm(keys, at, file, run_dir, problems)
}

/// `[vm]`. Relative sockets are in `sockets`.
fn vm(
    keys: VmKeys,
    at: &Range<usize>,
    file: &Path,
    sockets: &Path,
    problems: &mut Problems<'_>,
) -> Option<Config> {
    if let Some(firmware) = &keys.firmware {
        problems.add(
            firmware.span(),
            "`firmware`: not supported yet; a machine starts a Linux by `kernel`, without any: an ELF with a PVH entry, or a bzImage",
        );
    } else if keys.kernel.is_none() {
        keys.wrong.or_missing("kernel", at.clone(), "as in `kernel = \"vmlinux\"`", problems);
    }
    let pages = keys.pages.map_or(PageSize::Ordinary, Spanned::into_inner);
    let given = keys.memory.as_ref().map(|amount| (amount.get_ref().0, amount.span()));
    let vcpus = keys.vcpus.as_ref().map(|count| (count.get_ref().get::<u32>(), count.span()));
    let topology = match keys.topology {
        Some(table) => topology(&table.span(), table.get_ref(), vcpus.as_ref().map(|v| v.0), problems),
        None => Topology { sockets: 1, cores: vcpus.map_or(1, |v| v.0), threads: 1 },
    };
    let numa = keys.numa.is_some();
    let nodes = match keys.numa {
        Some(list) => {
            let node = keys.node.as_ref().map(Spanned::span);
            let given = Given { memory: given, node, pages, vcpus: topology.vcpus() };
            if list.get_ref().is_empty() {
                problems.add(list.span(), "`numa` is empty: a guest has one node at least");
            }
            super::nodes::nodes(list.into_inner(), &given, problems)
        }
        None => vec![GuestNode {
            memory: match given {
                Some((amount, span)) => checked_memory(&span, amount, pages, problems),
                None => MEMORY.next_multiple_of(bytes(pages)),
            },
            vcpus: (0..topology.vcpus()).collect(),
            host: keys.node.map(|node| node.get_ref().get()),
            distances: vec![10],
            devices: true,
        }],
    };
    let memory = nodes.iter().map(|node| node.memory).sum();
    if memory > MEMORY_MOST {
        problems.add_general("`numa`: more than 16 TiB of memory in all");
    }
    let vcpu_cores = keys.vcpu_cores.map(|list| {
        let (span, cores) = cores("vcpu_cores", list, problems);
        let (wanted, given) = (topology.vcpus(), cores.len());
        if wanted as usize != given {
            problems.add(span, format!("`vcpu_cores`: {given} cores for {wanted} vCPUs; name one for each"));
        }
        cores
    });
    let emulator_cores = keys.emulator_cores.map(|list| {
        let (span, cores) = cores("emulator_cores", list, problems);
        for core in cores.iter().filter(|core| vcpu_cores.as_ref().is_some_and(|v| v.contains(core))) {
            let message = format!("`emulator_cores`: core {core} is a vCPU's already; a core has one task");
            problems.add(span.clone(), message);
        }
        cores
    });
    if let Some(priority) = keys.vcpu_priority.as_ref().filter(|_| vcpu_cores.is_none()) {
        problems.add(
            priority.span(),
            "`vcpu_priority` needs `vcpu_cores`: a real-time thread that may run anywhere starves others at random",
        );
    }
    let mut disable_exits: Vec<_> =
        keys.disable_exits.into_iter().flat_map(Spanned::into_inner).map(Spanned::into_inner).collect();
    disable_exits.dedup();
    let mut net: Vec<NetConfig> = Vec::new();
    for card in keys.net.into_iter().flat_map(Spanned::into_inner) {
        let span = card.span();
        if let Some(config) = self::net(card.into_inner(), &span, net.len(), problems) {
            if net.iter().any(|other| other.mac == config.mac) {
                problems.add(span.clone(), "`net`: another card has this `mac` already");
            }
            net.push(config);
        }
    }
    let mut disk: Vec<DiskConfig> = Vec::new();
    for keys in keys.disk.into_iter().flat_map(Spanned::into_inner) {
        let span = keys.span();
        let of_vcpus = vcpu_cores.as_deref().unwrap_or_default();
        disk.extend(self::disk(keys.into_inner(), &span, disk.len(), of_vcpus, problems));
    }
    let mut pci: Vec<PciConfig> = Vec::new();
    for keys in keys.pci.into_iter().flat_map(Spanned::into_inner) {
        let span = keys.span();
        let Some(function) = self::pci(keys.into_inner(), &span, problems) else { continue };
        if pci.iter().any(|other| other.device == function.device) {
            problems.add(span, format!("`pci`: {} is there already", function.device));
        }
        pci.push(function);
    }
    let (cards, disks, functions) = (net.len(), disk.len(), pci.len());
    if cards + disks + functions > MAX_DEVICES {
        problems.add_general(format!(
            "{cards} of `net`, {disks} of `disk` and {functions} of `pci`, a machine has at most {MAX_DEVICES} in all"
        ));
    }
    let to = |key: &Option<Spanned<SerialName>>, default| {
        key.as_ref().map_or(default, |to| to.get_ref().0.clone())
    };
    let (serial, console) = (to(&keys.serial, SerialTo::Stdio), to(&keys.console, SerialTo::Off));
    if let Some(key) = keys.console.as_ref().filter(|_| console == serial && console != SerialTo::Off) {
        let message = "`console`: the serial console is there already; say `serial = \"off\"`, or give one of them a file of its own";
        problems.add(key.span(), message);
    }
    let lock_memory = keys.lock_memory.is_some_and(Spanned::into_inner);
    let shared = net.iter().any(|card| matches!(card.back, NetBack::VhostUser(_)));
    let always = pages != PageSize::Ordinary || lock_memory || shared;
    if let Some(key) = keys.prefault.as_ref().filter(|key| always && !*key.get_ref()) {
        let message = "`prefault`: huge pages, locked memory and memory that a vhost-user back end works on are there from the start, always";
        problems.add(key.span(), message);
    }
    let prefault = keys.prefault.is_some_and(Spanned::into_inner);
    let directory = file.parent();
    // Paths in a file are relative to it, so that a machine can be started from anywhere.
    let resolve = |path: &Path| directory.map_or_else(|| path.to_owned(), |directory| directory.join(path));
    let resolve_file = |to| match to {
        SerialTo::File(path) => SerialTo::File(resolve(&path)),
        other => other,
    };
    let resolve_card = |card: NetConfig| match card.back {
        NetBack::VhostUser(back) => {
            let back = NetBack::VhostUser(VhostUserConfig { socket: sockets.join(&back.socket), ..back });
            NetConfig { back, ..card }
        }
        NetBack::Tap(_) => card,
    };
    Some(Config {
        name: keys.name.map_or_else(|| default_name(file), |name| name.into_inner().0),
        kernel: resolve(&keys.kernel?.get_ref().0),
        initramfs: keys.initramfs.map(|path| resolve(&path.get_ref().0)),
        cmdline: keys.cmdline.map_or_else(|| CMDLINE.to_owned(), |line| line.into_inner().0),
        memory,
        pages,
        nodes,
        numa,
        prefault,
        lock_memory,
        topology,
        vcpu_cores,
        vcpu_priority: keys.vcpu_priority.map(|priority| priority.get_ref().get()),
        emulator_cores,
        disable_exits,
        halt_poll: keys.halt_poll_us.map(|us| Duration::from_micros(us.get_ref().get())),
        hint_dedicated: keys.hint_dedicated.is_some_and(Spanned::into_inner),
        irqchip: keys.irqchip.map_or(IrqChip::Kernel, |chip| chip.into_inner().0),
        net: net.into_iter().map(resolve_card).collect(),
        disk: disk.into_iter().map(|disk| DiskConfig { path: resolve(&disk.path), ..disk }).collect(),
        pci,
        pmu: keys.pmu.is_none_or(Spanned::into_inner),
        serial: resolve_file(serial),
        console: resolve_file(console),
        rng: keys.rng.is_some_and(Spanned::into_inner),
        on_reboot: keys.on_reboot.map_or(OnReboot::Restart, Spanned::into_inner),
        shutdown_timeout: keys
            .shutdown_timeout
            .map_or(SHUTDOWN_TIMEOUT, |seconds| Duration::from_secs(seconds.get_ref().get())),
        seccomp: keys.seccomp.map_or(Seccomp::Kill, |what| what.into_inner().0),
        confine_files: keys.confine_files.is_none_or(Spanned::into_inner),
    })
}

/// One of `net`.
fn net(keys: NetKeys, at: &Range<usize>, number: usize, problems: &mut Problems<'_>) -> Option<NetConfig> {
    if keys.kind.is_none() {
        keys.wrong.or_missing("kind", at.clone(), "`kind = \"vhost-user\"` or `kind = \"tap\"`", problems);
    }
    let kind = keys.kind.as_ref()?.get_ref();
    let given = [
        ("device", NetKind::Tap, keys.device.is_some()),
        ("socket", NetKind::VhostUser, keys.socket.is_some()),
        ("mode", NetKind::VhostUser, keys.mode.is_some()),
        ("queues", NetKind::VhostUser, keys.queues.is_some()),
        ("packed", NetKind::VhostUser, keys.packed.is_some()),
        ("wait", NetKind::VhostUser, keys.wait.is_some()),
    ];
    for (key, of, _) in given.iter().filter(|(_, of, given)| *given && of != kind) {
        let (of, kind) = (of.word(), kind.word());
        problems
            .add(at.clone(), format!("`net`: `{key}` is a key of `kind = \"{of}\"`; this one is \"{kind}\""));
    }
    let queue_size = queue_size(keys.queue_size.map(|size| (size.get_ref().get(), size.span())), problems);
    let back = match kind {
        NetKind::VhostUser => {
            if keys.socket.is_none() {
                let like = "the back end's, as in `socket = \"v0.sock\"`";
                keys.wrong.or_missing("socket", at.clone(), like, problems);
            }
            NetBack::VhostUser(VhostUserConfig {
                socket: keys.socket?.into_inner().0.into(),
                listen: keys.mode.is_some_and(|mode| mode.into_inner() == NetMode::Server),
                pairs: keys.queues.map_or(1, |queues| queues.get_ref().get()),
                packed: keys.packed.is_some_and(Spanned::into_inner),
                wait: keys.wait.is_none_or(Spanned::into_inner),
            })
        }
        NetKind::Tap => {
            if keys.device.is_none() {
                let like = "the tap's, as in `device = \"tap0\"`";
                keys.wrong.or_missing("device", at.clone(), like, problems);
            }
            NetBack::Tap(keys.device?.into_inner().0)
        }
    };
    Some(NetConfig {
        name: keys.name.map_or_else(|| format!("net{number}"), |name| name.into_inner().0),
        back,
        // Locally administered, in QEMU's habit of numbering.
        mac: keys.mac.map_or([0x52, 0x54, 0, 0x12, 0x34, 0x56 + number as u8], |mac| mac.into_inner().0),
        queue_size,
        mtu: keys.mtu.map(|mtu| mtu.get_ref().get()),
    })
}

/// One of `disk`.
fn disk(
    keys: DiskKeys,
    at: &Range<usize>,
    number: usize,
    of_vcpus: &[u32],
    problems: &mut Problems<'_>,
) -> Option<DiskConfig> {
    if keys.format.is_none() {
        keys.wrong.or_missing("format", at.clone(), "`format = \"raw\"`", problems);
    }
    if keys.path.is_none() {
        keys.wrong.or_missing("path", at.clone(), "the image, as in `path = \"disk.raw\"`", problems);
    }
    let queue_size = queue_size(keys.queue_size.map(|size| (size.get_ref().get(), size.span())), problems);
    let queues = keys.queues.map_or(1, |queues| queues.get_ref().get());
    let iothreads = keys.iothreads.map_or(queues, |threads| {
        let wanted = threads.get_ref().get();
        if wanted > queues {
            problems.add(
                threads.span(),
                format!(
                    "`iothreads`: {wanted}, but the disk has {queues} queue(s); a thread has one at least"
                ),
            );
        }
        wanted
    });
    let iothread_cores = keys.iothread_cores.map(|list| {
        let (span, cores) = cores("iothread_cores", list, problems);
        for core in cores.iter().filter(|core| of_vcpus.contains(core)) {
            let message = format!("`iothread_cores`: core {core} is a vCPU's already; a core has one task");
            problems.add(span.clone(), message);
        }
        cores
    });
    Some(DiskConfig {
        name: keys.name.map_or_else(|| format!("disk{number}"), |name| name.into_inner().0),
        path: keys.path?.into_inner().0,
        read_only: keys.read_only.is_some_and(Spanned::into_inner),
        direct: keys.direct.is_some_and(Spanned::into_inner),
        serial: keys.serial.map_or_else(String::new, |serial| serial.into_inner().0),
        discard: keys.discard.is_none_or(Spanned::into_inner),
        aio: keys.aio.map_or(DiskAio::IoUring, Spanned::into_inner),
        queues,
        iothreads,
        iothread_cores,
        queue_size,
    })
}

/// One of `pci`.
fn pci(keys: PciKeys, at: &Range<usize>, problems: &mut Problems<'_>) -> Option<PciConfig> {
    if keys.device.is_none() {
        let like = "which function, as in `device = \"0000:01:00.0\"`; `cableway nic list` shows them";
        keys.wrong.or_missing("device", at.clone(), like, problems);
    }
    Some(PciConfig {
        device: keys.device?.into_inner().0,
        vf_token: keys.vf_token.map(|token| token.into_inner().0),
    })
}

/// A queue's entries, as given and where.
fn queue_size(given: Option<(u16, Range<usize>)>, problems: &mut Problems<'_>) -> u16 {
    let Some((number, at)) = given else { return QUEUE_SIZE };
    if !number.is_power_of_two() {
        problems.add(at, format!("`queue_size`: {number} is no power of two"));
    }
    number
}

/// A machine is called as its file is, or "vm".
fn default_name(file: &Path) -> String {
    let stem = file.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let possible = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if stem.is_empty() || !stem.chars().all(possible) { "vm".to_owned() } else { stem.to_owned() }
}

pub(super) fn bytes(pages: PageSize) -> u64 {
    match pages {
        PageSize::Auto | PageSize::Huge2M => 2 << 20,
        PageSize::Ordinary => 4 << 10,
        PageSize::Huge1G => 1 << 30,
    }
}

pub(super) fn checked_memory(
    span: &Range<usize>,
    amount: u64,
    pages: PageSize,
    problems: &mut Problems<'_>,
) -> u64 {
    if !(MEMORY_LEAST..=MEMORY_MOST).contains(&amount) {
        problems.add(span.clone(), "`memory`: wanted from 2 MiB to 16 TiB");
    } else if !amount.is_multiple_of(bytes(pages)) {
        let (up, down) = (amount.next_multiple_of(bytes(pages)), amount / bytes(pages) * bytes(pages));
        let (word, mib) = (pages.word(), |bytes: u64| format!("\"{} MiB\"", bytes >> 20));
        let least = if down == 0 { String::new() } else { format!("{} or ", mib(down)) };
        problems.add(
            span.clone(),
            format!("`memory`: not a multiple of the page size, {word}: give {least}{}", mib(up)),
        );
    }
    amount
}

/// The topology that was asked for, and whether it has as many vCPUs as were asked for.
fn topology(
    span: &Range<usize>,
    keys: &TopologyKeys,
    vcpus: Option<u32>,
    problems: &mut Problems<'_>,
) -> Topology {
    let count =
        |key: &Option<Spanned<super::keys::VcpuCount>>| key.as_ref().map(|n| n.get_ref().get::<u32>());
    let threads = keys.threads.as_ref().map_or(1, |n| n.get_ref().get::<u32>());
    let sockets = count(&keys.sockets).unwrap_or(1);
    let per_core = sockets.saturating_mul(threads);
    let cores = count(&keys.cores).unwrap_or_else(|| (vcpus.unwrap_or(per_core) / per_core).max(1));
    let all = u64::from(sockets) * u64::from(cores) * u64::from(threads);
    if !keys.wrong.any() {
        match vcpus {
            Some(vcpus) if u64::from(vcpus) != all => problems.add(
                span.clone(),
                format!(
                    "`topology`: {sockets} sockets of {cores} cores of {threads} threads are {all} vCPUs, but `vcpus` is \
                     {vcpus}; make them agree, or leave `vcpus` out"
                ),
            ),
            None if all > u64::from(MAX_VCPUS) => problems.add(
                span.clone(),
                format!("`topology`: {all} vCPUs, a machine has at most {MAX_VCPUS}"),
            ),
            _ => {
                let topology = Topology { sockets, cores, threads };
                let highest = topology.apic_id(topology.vcpus() - 1);
                if highest <= MAX_VCPUS {
                    return topology;
                }
                let message = format!(
                    "`topology`: cores and threads are numbered in bits of their own, which makes the last vCPU number \
                     {highest}, and {MAX_VCPUS} is the highest possible; take powers of two"
                );
                problems.add(span.clone(), message);
            }
        }
    }
    Topology { sockets: 1, cores: vcpus.unwrap_or(1), threads: 1 }
}

/// A list of cores without repetition.
fn cores(
    key: &str,
    list: Spanned<Vec<Spanned<CoreNumber>>>,
    problems: &mut Problems<'_>,
) -> (Range<usize>, Vec<u32>) {
    let span = list.span();
    let mut cores = Vec::new();
    for core in list.into_inner() {
        let number: u32 = core.get_ref().get();
        if cores.contains(&number) {
            problems.add(core.span(), format!("`{key}`: core {number} is there twice; a core has one task"));
        }
        cores.push(number);
    }
    if cores.is_empty() {
        problems.add(span.clone(), format!("`{key}` is empty: name at least one core, as in `{key} = [1]`"));
    }
    (span, cores)
}
