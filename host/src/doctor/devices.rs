//! Checks of what cards by VFIO need: an IOMMU, the kernel's modules, groups of their own, and leave to lock memory.

use std::fs;

use super::{Check, Host, Outcome, with_cards};
use crate::pci::{self, Function};

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
    match (driver, container) {
        (true, true) => Outcome::ok("vfio-pci is loaded"),
        (false, _) => Outcome::error(
            "vfio-pci is not loaded",
            "modprobe vfio-pci; if that fails, this kernel was built without: use the distribution's standard one",
        ),
        (true, false) => Outcome::error("/dev/vfio/vfio is missing", "modprobe vfio_iommu_type1"),
    }
}

/// Network cards in the machine.
fn cards(host: &Host) -> Vec<Function> {
    pci::list(&host.root).into_iter().filter(Function::is_network).collect()
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
    let limits = host.text("proc/self/limits").unwrap_or_default();
    let line = limits.lines().find(|line| line.starts_with("Max locked memory")).unwrap_or_default();
    let soft = line.split_whitespace().nth(3).unwrap_or_default();
    let status = host.text("proc/self/status").unwrap_or_default();
    // CAP_IPC_LOCK, bit 14 (capability.h), is above the limit.
    let effective =
        status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok());
    let capable = effective.is_some_and(|caps| caps & 1 << 14 != 0);
    match soft {
        "" => Outcome::not_applicable("the kernel does not say"),
        "unlimited" => Outcome::ok("unlimited"),
        _ if capable => Outcome::ok(format!("{soft} bytes, and this process may exceed it")),
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
    use super::super::State;
    use super::super::tests::Machine;

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
