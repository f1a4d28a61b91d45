//! `cableway up FILE --plan`: what would be done, core by core, page by page, device by device.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::Path;

use anyhow::Result;
use host::machine::Machine;
use host::topology;
use switch::config::Behind;
use vmm::config::{NetBack, PageSize};

use super::changes;
use super::config::{Node, Restart};
use crate::output;

/// The plan.
///
/// # Errors
/// The machine's cores cannot be read.
pub(super) fn text(node: &Node) -> Result<String> {
    let mut text = format!("{} is valid. It would\n", node.file.display());
    let steps = changes::steps(node);
    for step in &steps {
        writeln!(text, "  {}", step.what)?;
    }
    if steps.is_empty() {
        writeln!(text, "  change nothing on this host")?;
    }
    let ports: Vec<&str> = node.switch.ports.iter().map(|port| port.name.as_str()).collect();
    writeln!(text, "  start the switch with {} port(s): {}", ports.len(), ports.join(", "))?;
    for machine in &node.machines {
        let pages = match machine.pages {
            PageSize::Auto => "2 MiB pages if enough are free",
            PageSize::Ordinary => "4 KiB pages",
            PageSize::Huge2M => "2 MiB pages",
            PageSize::Huge1G => "1 GiB pages",
        };
        let at = match machine.host_nodes().as_slice() {
            [] => String::new(),
            [node] => format!(" of memory node {node}"),
            nodes => {
                let nodes: Vec<_> = nodes.iter().map(u32::to_string).collect();
                format!(" of memory nodes {}", nodes.join(" and "))
            }
        };
        let memory = output::bytes(machine.memory);
        writeln!(
            text,
            "  start machine {}: {} vCPU(s), {memory} in {pages}{at}",
            machine.name,
            machine.topology.vcpus()
        )?;
        for card in &machine.net {
            let behind = match &card.back {
                NetBack::VhostUser(back) => {
                    let socket = &back.socket;
                    let port = node.switch.ports.iter().find(
                        |port| matches!(&port.behind, Behind::VhostUser { socket: s, .. } if s == socket),
                    );
                    port.map_or_else(|| socket.display().to_string(), |port| format!("port {}", port.name))
                }
                NetBack::Tap(device) => format!("tap {device}"),
            };
            writeln!(text, "    {} on {behind}", card.name)?;
        }
        for function in &machine.pci {
            writeln!(text, "    {} passed through; all of its memory is pinned for that", function.device)?;
        }
    }
    let policy = match node.host.restart {
        Restart::OnFailure => "start a machine again that fails",
        Restart::Always => "start a machine again whatever ends it",
        Restart::Never => "leave a machine that ended alone",
    };
    writeln!(text, "  start the switch again if it dies, and {policy}\n")?;
    writeln!(text, "{}", cores(node)?)?;
    for note in notes(node) {
        writeln!(text, "note: {note}")?;
    }
    Ok(text)
}

/// Each core of the host, and what runs there.
fn cores(node: &Node) -> Result<comfy_table::Table> {
    let mut tasks: BTreeMap<u32, Vec<String>> = BTreeMap::new();
    let mut add = |core: u32, what: String| tasks.entry(core).or_default().push(what);
    node.switch.switch.workers.iter().for_each(|core| add(*core, "worker of the switch".to_owned()));
    for core in node.switch.switch.housekeeping.iter().flatten() {
        add(*core, "housekeeping of the switch".to_owned());
    }
    for machine in &node.machines {
        for (n, core) in machine.vcpu_cores.iter().flatten().enumerate() {
            let priority = machine.vcpu_priority.map_or_else(String::new, |p| format!(" (SCHED_FIFO {p})"));
            add(*core, format!("vCPU {n} of {}{priority}", machine.name));
        }
        machine
            .emulator_cores
            .iter()
            .flatten()
            .for_each(|core| add(*core, format!("emulator of {}", machine.name)));
        for disk in &machine.disk {
            let threads = usize::from(disk.iothreads);
            // In turn, as the machine does it.
            let cores = disk.iothread_cores.iter().flat_map(|cores| cores.iter().cycle().take(threads));
            for core in cores.copied().collect::<BTreeSet<_>>() {
                add(core, format!("{} of {}", disk.name, machine.name));
            }
        }
    }
    let root = Path::new("/");
    let machine = Machine::read(root)?;
    let threads = machine.cores.values().any(|core| core.threads.len() > 1);
    let mut heads = vec!["core", "socket", "memory node", "what runs there"];
    heads.extend(threads.then_some("threads"));
    heads.extend(node.cores.as_ref().map(|_| "why"));
    let mut table = output::table(&heads, &[0, 1, 2]);
    for (number, core) in &machine.cores {
        let why = node.cores.as_ref().and_then(|plan| plan.why.get(number));
        let what = match (tasks.get(number), why) {
            (Some(tasks), _) => tasks.join(", "),
            (None, Some(_)) => "nothing".to_owned(),
            (None, None) => "whatever the kernel puts there".to_owned(),
        };
        let mut row = vec![number.to_string(), core.socket.to_string(), core.node.to_string(), what];
        row.extend(threads.then(|| core.threads.to_string()));
        row.extend(node.cores.as_ref().map(|_| why.cloned().unwrap_or_default()));
        table.add_row(row);
    }
    Ok(table)
}

/// What is allowed, and probably not what is wanted.
fn notes(node: &Node) -> Vec<String> {
    let root = Path::new("/");
    let mut notes = Vec::new();
    let pinned = node.machines.iter().any(|machine| machine.vcpu_cores.is_some());
    if pinned && node.switch.switch.housekeeping.is_none() {
        notes.push(
            "`housekeeping` of [switch] is not given: its other threads may run on cores of vCPUs".to_owned(),
        );
    }
    for machine in &node.machines {
        let name = &machine.name;
        if pinned && machine.emulator_cores.is_none() {
            notes.push(format!(
                "machine {name}: without `emulator_cores` its other threads may run on cores of vCPUs"
            ));
        }
        let hosts: Vec<u32> = machine.nodes.iter().filter_map(|node| node.host).collect();
        for function in machine.pci.iter().filter(|_| !hosts.is_empty()) {
            let near = host::pci::find(root, function.device).and_then(|function| function.node);
            if let Some(near) = near.filter(|near| !hosts.contains(near)) {
                let bdf = function.device;
                notes.push(format!(
                    "machine {name}: {bdf} is on memory node {near}, its memory on {hosts:?}; all that it writes crosses over"
                ));
            }
        }
        for (n, core) in machine.vcpu_cores.iter().flatten().enumerate() {
            let (of_core, of_memory) = (topology::node_of_core(root, *core), machine.host_node_of(n));
            if let (Some(of_core), Some(of_memory)) = (of_core, of_memory)
                && of_core != of_memory
            {
                notes.push(format!(
                    "machine {name}: core {core} is on memory node {of_core}, its memory on {of_memory}; every access crosses over"
                ));
            }
        }
    }
    notes.extend(far_workers(node, root));
    // Two that poll on the threads of one core halve each other.
    let busy: Vec<u32> = node
        .machines
        .iter()
        .flat_map(|machine| machine.vcpu_cores.iter().flatten())
        .chain(&node.switch.switch.workers)
        .copied()
        .collect();
    for core in &busy {
        for sibling in topology::smt_siblings(root, *core).iter().flat_map(|set| set.iter()) {
            if sibling > *core && busy.contains(&sibling) {
                notes.push(format!(
                    "cores {core} and {sibling} are threads of one physical core; they halve each other"
                ));
            }
        }
    }
    notes
}

/// Cards and machines' memory on memory nodes that have cores, and no worker: each frame crosses over.
fn far_workers(node: &Node, root: &Path) -> Vec<String> {
    let workers = &node.switch.switch.workers;
    let nodes: BTreeSet<u32> =
        workers.iter().filter_map(|core| topology::node_of_core(root, *core)).collect();
    if nodes.is_empty() {
        return Vec::new();
    }
    let mut far = Vec::new();
    for port in &node.switch.ports {
        let Behind::Nic { bdf, .. } = &port.behind else { continue };
        let near = host::pci::find(root, *bdf).and_then(|function| function.node);
        far.extend(near.filter(|near| !nodes.contains(near)).map(|near| (format!("card {bdf}"), near)));
    }
    for machine in node.machines.iter().filter(|machine| !machine.net.is_empty()) {
        let hosts = machine.host_nodes();
        if let (Some(first), true) = (hosts.first(), hosts.iter().all(|host| !nodes.contains(host))) {
            far.push((format!("the memory of machine {}", machine.name), *first));
        }
    }
    let on: Vec<_> = nodes.iter().map(u32::to_string).collect();
    let on = on.join(" and ");
    far.into_iter()
        .map(|(what, near)| {
            format!(
                "{what} is on memory node {near}, the workers on {on}; every frame crosses over: name cores of node {near} in `workers`, or \
                 leave them to `workers = \"auto\"`"
            )
        })
        .collect()
}
