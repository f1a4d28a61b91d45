//! Checks of what cards by VFIO need: an IOMMU, the kernel's modules, groups of their own, and leave to lock memory.

use std::fs;
use std::os::unix::fs::MetadataExt;

use super::{Capability, Check, Host, Outcome, with_cards};
use crate::pci::{self, Function};
use crate::vfio::Way;

pub(super) const CHECKS: &[Check] = &[
    Check {
        name: "iommu",
        why: "without an IOMMU a card in user space can reach all memory, so that the kernel gives none away",
        matters: with_cards,
        run: iommu,
    },
    Check {
        name: "vfio",
        why: "vfio-pci is how the kernel hands a card to user space",
        matters: with_cards,
        run: vfio,
    },
    Check {
        name: "vfio-access",
        why: "a card, or a group of them, has one user at a time, who must be allowed to open it",
        matters: with_cards,
        run: access,
    },
    Check {
        name: "vfio-groups",
        why: "cards of one IOMMU group can reach each other's memory: all of them change hands, or none",
        matters: with_cards,
        run: groups,
    },
    Check {
        name: "reserved-memory",
        why: "firmware that keeps memory of its own behind a card (RMRR) makes the kernel refuse to map anything for it (EINVAL)",
        matters: with_cards,
        run: reserved,
    },
    Check {
        name: "memlock",
        why: "memory that a card reaches is locked, and counts against this limit",
        matters: with_cards,
        run: memlock,
    },
    Check {
        name: "dma-entry-limit",
        why: "VFIO maps at most so many pieces of memory for one container; a large guest in small pages needs more",
        matters: with_cards,
        run: dma_entries,
    },
    Check {
        name: "card-nodes",
        why: "a card that is polled from another memory node pays for every descriptor and frame with a way between sockets",
        matters: with_cards,
        run: nodes,
    },
];

fn iommu(host: &Host) -> Outcome {
    let groups = fs::read_dir(host.path("sys/kernel/iommu_groups")).into_iter().flatten().flatten().count();
    if groups > 0 {
        return Outcome::ok(format!("{groups} groups"));
    }
    let line = host.text("proc/cmdline").unwrap_or_default();
    let asked = line.split_whitespace().any(|word| word == "intel_iommu=on" || word == "amd_iommu=on");
    let found = if asked { "none, although the kernel was asked for it" } else { "none" };
    Outcome::error(
        found,
        "switch VT-d or AMD-Vi on in the firmware's settings, and with Intel put intel_iommu=on iommu=pt on the kernel's command \
         line; until then cards stay with the kernel: kind = \"af_packet\"",
    )
}

fn vfio(host: &Host) -> Outcome {
    let driver = host.exists("sys/bus/pci/drivers/vfio-pci");
    let container = host.exists("dev/vfio/vfio");
    let iommufd = host.exists("dev/iommu");
    match (driver, container || iommufd) {
        (true, true) if !iommufd => Outcome::ok("vfio-pci is loaded"),
        (true, true) if !container => Outcome::ok("vfio-pci is loaded, with iommufd only"),
        (true, true) => Outcome::ok("vfio-pci is loaded, with iommufd and groups"),
        (false, _) => Outcome::error(
            "vfio-pci is not loaded",
            "modprobe vfio-pci; if that fails, this kernel was built without: use the distribution's standard one",
        ),
        (true, false) => Outcome::error("/dev/vfio/vfio is missing", "modprobe vfio_iommu_type1"),
    }
}

/// The cards that are meant: those that a file names, or all network cards of the machine.
fn cards(host: &Host) -> Vec<Function> {
    let named = &host.needs.devices;
    let meant =
        |card: &Function| if named.is_empty() { card.is_network() } else { named.contains(&card.bdf) };
    pci::list(&host.root).into_iter().filter(meant).collect()
}

/// Whether cards that are with vfio-pci can be opened, by this user, and at all: each by its own device or by its group.
fn access(host: &Host) -> Outcome {
    let cards: Vec<Function> =
        cards(host).into_iter().filter(|card| card.driver.as_deref() == Some(pci::VFIO)).collect();
    let (mut held, mut by_device) = (0, 0);
    for card in &cards {
        let Some(way) = Way::of(&host.root, card) else { continue };
        let group = card.group.map(|group| format!("/dev/vfio/{group}"));
        let device = if let Way::Device(file) = &way { Some(file.display().to_string()) } else { None };
        let may = |file: &String| may_open(host, file.trim_start_matches('/'));
        let by_itself = device.as_ref().is_some_and(|file| may(file) && may_open(host, "dev/iommu"));
        if !by_itself && !group.as_ref().is_some_and(may) {
            let files = device.iter().chain(&group).cloned().collect::<Vec<_>>().join(" or ");
            let chown = device.map_or(group.unwrap_or_default(), |file| format!("{file} /dev/iommu"));
            return Outcome::error(
                format!("{files} of {} is not this user's", card.bdf),
                format!(
                    "run as root, or chown USER {chown} (a udev rule for SUBSYSTEM==\"vfio\" makes it last)"
                ),
            );
        }
        by_device += usize::from(by_itself);
        if let Some((pid, name)) = device.iter().chain(&group).find_map(|file| holder(host, file)) {
            if name != "cableway" {
                return Outcome::warning(
                    format!("{} is in use by process {pid} ({name})", card.bdf),
                    format!("end it, kill {pid}, or use another card: until then it cannot be opened"),
                );
            }
            held += 1;
        }
    }
    match cards.len() {
        0 => Outcome::not_applicable("no card is with vfio-pci"),
        all if by_device > 0 => Outcome::ok(format!(
            "{all} with vfio-pci, {held} of them in use by cableway, {by_device} by iommufd"
        )),
        all => Outcome::ok(format!("{all} with vfio-pci, {held} of them in use by cableway")),
    }
}

/// Whether this process may read and write a file, by the file's mode and what `/proc/self/status` says of the process.
fn may_open(host: &Host, file: &str) -> bool {
    let Ok(found) = fs::metadata(host.path(file)) else { return false };
    if host.capable(Capability::DacOverride) {
        return true;
    }
    let status = host.text("proc/self/status").unwrap_or_default();
    let ids = |name: &str| -> Vec<u32> {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.split_whitespace().filter_map(|id| id.parse().ok()).collect()
    };
    // The second of each is the one in force.
    let is = |name: &str, id: u32| ids(name).get(1) == Some(&id);
    let bits = if is("Uid:", found.uid()) {
        found.mode() >> 6
    } else if is("Gid:", found.gid()) || ids("Groups:").contains(&found.gid()) {
        found.mode() >> 3
    } else {
        found.mode()
    };
    bits & 6 == 6
}

/// A process that has `file` open, as far as this one may see that.
fn holder(host: &Host, file: &str) -> Option<(u32, String)> {
    let processes = fs::read_dir(host.path("proc")).ok()?.flatten();
    processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()).find_map(|pid| {
        let mut open = fs::read_dir(host.path(&format!("proc/{pid}/fd"))).ok()?.flatten();
        let here = open.any(|fd| fs::read_link(fd.path()).is_ok_and(|to| to.as_os_str() == file));
        here.then(|| (pid, host.text(&format!("proc/{pid}/comm")).unwrap_or_default()))
    })
}

fn groups(host: &Host) -> Outcome {
    let cards = cards(host);
    let shared = cards.iter().filter(|card| card.group.is_some()).find_map(|card| {
        let others = card.in_the_way(&host.root);
        (!others.is_empty()).then_some((card.bdf, others))
    });
    match shared {
        _ if cards.iter().all(|card| card.group.is_none()) => {
            Outcome::not_applicable("no card in an IOMMU group")
        }
        None => Outcome::ok(format!("{} network functions, each on its own", cards.len())),
        Some((bdf, others)) => {
            let others = pci::listed(&others);
            Outcome::warning(
                format!("{bdf} shares its group with {others}"),
                format!(
                    "cableway nic bind {bdf} {others} takes all of them; or put the card into another slot"
                ),
            )
        }
    }
}

fn reserved(host: &Host) -> Outcome {
    let cards = cards(host);
    let kept = cards.iter().find(|card| {
        let regions = card
            .group
            .and_then(|group| host.text(&format!("sys/kernel/iommu_groups/{group}/reserved_regions")));
        // "direct-relaxable" is what the kernel may ignore (Linux, Documentation/ABI/testing/sysfs-kernel-iommu_groups).
        regions.is_some_and(|text| text.lines().any(|line| line.split_whitespace().last() == Some("direct")))
    });
    match kept {
        _ if cards.iter().all(|card| card.group.is_none()) => {
            Outcome::not_applicable("no card in an IOMMU group")
        }
        None => Outcome::ok("none behind network cards"),
        Some(card) => Outcome::error(
            format!("behind {}", card.bdf),
            "switch off the firmware's features of this card (remote management, shared boot), or use another card",
        ),
    }
}

fn memlock(host: &Host) -> Outcome {
    let Some(soft) = host.limit("Max locked memory") else {
        return Outcome::not_applicable("the kernel does not say");
    };
    match soft.as_str() {
        "unlimited" => Outcome::ok("unlimited"),
        _ if host.capable(Capability::IpcLock) => {
            Outcome::ok(format!("{soft} bytes, and this process may exceed it"))
        }
        _ => Outcome::warning(
            format!("{soft} bytes"),
            "ulimit -l unlimited; LimitMEMLOCK=infinity in a systemd unit; memlock in /etc/security/limits.conf for a user",
        ),
    }
}

fn dma_entries(host: &Host) -> Outcome {
    let Some(limit) = host
        .text("sys/module/vfio_iommu_type1/parameters/dma_entry_limit")
        .and_then(|text| text.parse::<u64>().ok())
    else {
        return Outcome::not_applicable("vfio_iommu_type1 is not loaded");
    };
    let memory = host.text("proc/meminfo").unwrap_or_default();
    let kib = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse::<u64>().ok());
    let needed = kib.unwrap_or(0) / 2048;
    if needed <= limit {
        return Outcome::ok(format!("{limit}, all memory in 2 MiB pages are {needed}"));
    }
    Outcome::warning(
        format!("{limit}, all memory in 2 MiB pages are {needed}"),
        format!(
            "use pages of 1 GiB, or echo {} > /sys/module/vfio_iommu_type1/parameters/dma_entry_limit",
            needed.next_power_of_two()
        ),
    )
}

fn nodes(host: &Host) -> Outcome {
    let nodes: Vec<u32> = cards(host).iter().filter_map(|card| card.node).collect();
    let busy = host.busy_cores();
    let of_cores: Vec<u32> =
        busy.iter().filter_map(|core| crate::topology::node_of_core(&host.root, core)).collect();
    match nodes.iter().find(|node| !of_cores.contains(node)) {
        _ if nodes.is_empty() => Outcome::not_applicable("no card says on which node it is"),
        None => Outcome::ok("each card has a core that polls on its node"),
        Some(node) => Outcome::warning(
            format!("a card is on node {node}, and none of the cores {busy}"),
            "give `workers` a core of that node, see cableway nic list; or put the card into another slot",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Machine;
    use super::super::{Host, Needs, State};
    use crate::pci::tests::Machine as Cards;
    use std::os::unix::fs::PermissionsExt;

    fn of_cards(machine: &Cards, name: &str, needs: Needs) -> (State, String) {
        let findings = Host::new(machine.root(), needs).findings();
        let finding = findings.into_iter().find(|finding| finding.name == name).unwrap();
        (finding.state, format!("{} {}", finding.found, finding.fix.unwrap_or_default()))
    }

    #[test]
    fn a_group_that_somebody_else_has_or_that_is_not_ours_is_told() {
        let machine = Cards::new();
        let says = |state: State, words: &str| {
            let (found, text) = of_cards(&machine, "vfio-access", Needs::everything());
            assert!(found == state && text.contains(words), "{found:?} {text}");
        };
        machine.card("0000:01:00.0", 0x10d3, Some("e1000e"), Some(7));
        says(State::NotApplicable, "no card is with vfio-pci");
        machine.card("0000:02:00.0", 0x10d3, Some("vfio-pci"), Some(8));
        machine.file("dev/vfio/8", "");
        let file = machine.root().join("dev/vfio/8");
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
        machine.file("proc/self/status", "Uid:\t4242\t4242\nGid:\t4242\t4242\nGroups:\t\nCapEff:\t0\n");
        says(State::Error, "/dev/vfio/8 of 0000:02:00.0 is not this user's");
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o666)).unwrap();
        says(State::Ok, "1 with vfio-pci, 0 of them");
        machine.file("proc/812/comm", "dpdk-testpmd\n");
        std::fs::create_dir_all(machine.root().join("proc/812/fd")).unwrap();
        machine.link("proc/812/fd/9", "/dev/vfio/8");
        says(State::Warning, "0000:02:00.0 is in use by process 812 (dpdk-testpmd) end it, kill 812");
        machine.file("proc/812/comm", "cableway\n");
        says(State::Ok, "1 of them in use by cableway");
        // Its own device is the other way; either will do.
        machine.file("sys/bus/pci/devices/0000:02:00.0/vfio-dev/vfio3/dev", "");
        machine.file("dev/vfio/devices/vfio3", "");
        machine.file("dev/iommu", "");
        let mode = |path: &str, mode| {
            let path = machine.root().join(path);
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        mode("dev/vfio/devices/vfio3", 0o600);
        mode("dev/iommu", 0o666);
        says(State::Ok, "1 of them in use by cableway");
        mode("dev/vfio/8", 0o600);
        says(
            State::Error,
            "/dev/vfio/devices/vfio3 or /dev/vfio/8 of 0000:02:00.0 is not this user's run as root, or chown USER /dev/vfio/devices/vfio3 /dev/iommu",
        );
        mode("dev/vfio/devices/vfio3", 0o666);
        says(State::Ok, "1 of them in use by cableway, 1 by iommufd");
        machine.link("proc/812/fd/10", "/dev/vfio/devices/vfio3");
        std::fs::remove_file(machine.root().join("proc/812/fd/9")).unwrap();
        machine.file("proc/812/comm", "qemu\n");
        says(State::Warning, "in use by process 812 (qemu)");
    }

    #[test]
    fn groups_reserved_memory_and_nodes_are_those_of_the_cards_that_are_meant() {
        let machine = Cards::new();
        machine.file("sys/devices/system/cpu/online", "0-1\n");
        machine.file("sys/devices/system/cpu/cpu1/node0/cpulist", "");
        let says = |name: &str, state: State, words: &str| {
            let (found, text) = of_cards(&machine, name, Needs::everything());
            assert!(found == state && text.contains(words), "{name}: {found:?} {text}");
        };
        machine.card("0000:01:00.0", 0x10d3, Some("vfio-pci"), Some(7));
        machine.file("sys/bus/pci/devices/0000:01:00.0/numa_node", "0\n");
        says("vfio-groups", State::Ok, "each on its own");
        says("reserved-memory", State::Ok, "none behind");
        says("card-nodes", State::Ok, "on its node");
        // Another one: with company, with memory of the firmware's, on a far node.
        let second = machine.card("0000:02:00.0", 0x10d3, Some("vfio-pci"), Some(8));
        machine.card("0000:02:00.1", 0x10d3, Some("e1000e"), Some(8));
        machine.file("sys/bus/pci/devices/0000:02:00.0/numa_node", "1\n");
        machine.file(
            "sys/kernel/iommu_groups/8/reserved_regions",
            "0x00000000fee00000 0x00000000feefffff msi\n",
        );
        says("reserved-memory", State::Ok, "none behind");
        machine.file(
            "sys/kernel/iommu_groups/8/reserved_regions",
            "0x000000007d000000 0x000000007effffff direct\n",
        );
        says("vfio-groups", State::Warning, "0000:02:00.0 shares its group with 0000:02:00.1");
        says("reserved-memory", State::Error, "behind 0000:02:00.0");
        says("card-nodes", State::Warning, "a card is on node 1");
        let first = Needs { devices: vec!["0000:01:00.0".parse().unwrap()], ..Needs::everything() };
        for name in ["vfio-groups", "reserved-memory", "card-nodes"] {
            assert_eq!(of_cards(&machine, name, first.clone()).0, State::Ok, "{name}");
        }
        let second = Needs { devices: vec![second], ..first };
        assert_eq!(of_cards(&machine, "reserved-memory", second).0, State::Error);
    }

    #[test]
    fn without_a_card_in_a_group_there_is_nothing_to_judge() {
        let machine = Machine::with(&[]);
        for name in
            ["vfio-groups", "reserved-memory", "card-nodes", "memlock", "dma-entry-limit", "vfio-access"]
        {
            machine.says(name, State::NotApplicable, "");
        }
        let vfio = Machine::with(&[("sys/bus/pci/drivers/vfio-pci/new_id", ""), ("dev/vfio/vfio", "")]);
        vfio.says("vfio", State::Ok, "loaded");
        let newer = Machine::with(&[("sys/bus/pci/drivers/vfio-pci/new_id", ""), ("dev/iommu", "")]);
        newer.says("vfio", State::Ok, "with iommufd only");
        Machine::with(&[("proc/cmdline", "quiet\n")]).says("iommu", State::Error, "none switch VT-d");
    }

    #[test]
    fn an_iommu_and_vfio_are_asked_for_in_turn() {
        let none = Machine::with(&[("proc/cmdline", "quiet intel_iommu=on\n")]);
        none.says("iommu", State::Error, "although the kernel was asked");
        none.says("vfio", State::Error, "modprobe vfio-pci");
        none.says("vfio-groups", State::NotApplicable, "no card");
        let some = Machine::with(&[
            ("sys/kernel/iommu_groups/0/type", "DMA\n"),
            ("sys/bus/pci/drivers/vfio-pci/new_id", ""),
        ]);
        some.says("iommu", State::Ok, "1 groups");
        some.says("vfio", State::Error, "modprobe vfio_iommu_type1");
    }

    #[test]
    fn a_limit_counts_only_for_who_may_not_exceed_it() {
        let limits =
            "Limit  Soft Limit  Hard Limit  Units\nMax locked memory         8388608   8388608   bytes\n";
        let machine = |caps: &str| {
            let status = format!("Name:\tx\nCapEff:\t{caps}\n");
            Machine::with(&[("proc/self/limits", limits), ("proc/self/status", &status)])
        };
        machine("0000000000000000").says("memlock", State::Warning, "8388608 bytes ulimit -l unlimited");
        machine("0000000000004000").says("memlock", State::Ok, "may exceed");
        let unlimited = limits.replacen("8388608", "unlimited", 1);
        Machine::with(&[("proc/self/limits", &unlimited)]).says("memlock", State::Ok, "unlimited");
    }

    #[test]
    fn a_large_machine_needs_more_dma_entries() {
        let machine = |kib: u64| {
            Machine::with(&[
                ("sys/module/vfio_iommu_type1/parameters/dma_entry_limit", "65535\n"),
                ("proc/meminfo", &format!("MemTotal: {kib} kB\nMemFree: 1 kB\n")),
            ])
        };
        machine(64 << 20).says("dma-entry-limit", State::Ok, "32768");
        machine(256 << 20).says("dma-entry-limit", State::Warning, "echo 131072");
    }
}
