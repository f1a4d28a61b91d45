//! Checks of memory: huge pages, and what moves or merges pages behind a guest's back.

use std::path::Path;

use super::{Check, Host, Outcome, always, knob};
use crate::topology;

pub(super) const CHECKS: &[Check] = &[
    Check {
        name: "huge-pages",
        why: "rings and guests in 4 KiB pages miss the TLB on most frames, and cards reach scattered memory",
        matters: always,
        run: huge_pages,
    },
    Check {
        name: "huge-pages-nodes",
        why: "a guest or card whose memory node has no huge pages gets them from another one, and every access crosses over",
        matters: always,
        run: every_node,
    },
    Check {
        name: "huge-pages-permitted",
        why: "a control group may allow fewer huge pages than there are: who wants more is killed by SIGBUS when it touches one",
        matters: always,
        run: permitted,
    },
    Check {
        name: "huge-pages-mounted",
        why: "DPDK and QEMU take huge pages from files; Cableway does without",
        matters: always,
        run: mounted,
    },
    Check {
        name: "transparent-huge-pages",
        why: "khugepaged moves pages of running guests, which stops each vCPU that touches them",
        matters: always,
        run: transparent,
    },
    Check {
        name: "ksm",
        why: "merging equal pages takes cores and makes a guest's first write to each a fault; it also leaks what other guests hold",
        matters: |needs| needs.machines,
        run: |host| knob(host, "sys/kernel/mm/ksm/run", &["0", "2"], "2"),
    },
    Check {
        name: "numa-balancing",
        why: "it takes pages away to see who touches them: a fault for each, on cores that should only poll",
        matters: always,
        run: |host| knob(host, "proc/sys/kernel/numa_balancing", &["0"], "0"),
    },
    Check {
        name: "swappiness",
        why: "a guest's page that was swapped out costs milliseconds when it is touched again",
        matters: |needs| needs.machines,
        run: swappiness,
    },
];

fn huge_pages(host: &Host) -> Outcome {
    let pools = topology::huge_pools(&host.root);
    let shown: Vec<_> = pools
        .iter()
        .filter(|pool| pool.total > 0)
        .map(|pool| {
            let size = if pool.page_size >= 1 << 30 { "1 GiB" } else { "2 MiB" };
            format!("{} of {size} on node {}, {} free", pool.total, pool.node, pool.free)
        })
        .collect();
    if pools.is_empty() {
        return Outcome::error(
            "this kernel has none",
            "use a kernel with CONFIG_HUGETLBFS (every distribution's has it)",
        );
    }
    match shown.is_empty() {
        false => Outcome::ok(shown.join("; ")),
        true => Outcome::warning(
            "none set aside",
            "echo 1024 > /proc/sys/vm/nr_hugepages (2 MiB each), or `huge_pages` in [host] of a node's file",
        ),
    }
}

fn every_node(host: &Host) -> Outcome {
    let pools = topology::huge_pools(&host.root);
    let mut nodes: Vec<u32> = pools.iter().map(|pool| pool.node).collect();
    nodes.dedup();
    // Those of the cores that poll; a node of memory alone needs none.
    let busy = host.busy_cores();
    let near: Vec<u32> = busy.iter().filter_map(|core| topology::node_of_core(&host.root, core)).collect();
    if nodes.len() > 1 && !near.is_empty() {
        nodes.retain(|node| near.contains(node));
    }
    let with = |node: &u32| pools.iter().any(|pool| pool.node == *node && pool.total > 0);
    let without: Vec<String> = nodes.iter().filter(|node| !with(node)).map(u32::to_string).collect();
    if pools.iter().all(|pool| pool.node == pools[0].node) {
        Outcome::not_applicable("one memory node")
    } else if without.is_empty() || pools.iter().all(|pool| pool.total == 0) {
        // None at all is what `huge-pages` complains about.
        Outcome::ok(format!("{} nodes alike", nodes.len()))
    } else {
        let node = without.join(", ");
        Outcome::warning(
            format!("none on node {node}"),
            format!(
                "echo 512 > /sys/devices/system/node/node{}/hugepages/hugepages-2048kB/nr_hugepages",
                without[0]
            ),
        )
    }
}

/// Limits of the control groups that this process is in, from its own to the root (Linux, Documentation/admin-guide/cgroup-v2.rst and
/// cgroup-v1/hugetlb.rst).
fn permitted(host: &Host) -> Outcome {
    let groups = host.text("proc/self/cgroup").unwrap_or_default();
    let mounts = host.text("proc/self/mounts").unwrap_or_default();
    let mount = |kind: &str, option: &str| {
        mounts.lines().find_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let fits =
                *words.get(2)? == kind && words.get(3)?.split(',').any(|o| option.is_empty() || o == option);
            fits.then(|| words.get(1).map(|place| (*place).to_owned()))?
        })
    };
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (parts.next(), parts.next()) else { continue };
        let (place, file) = match controllers {
            "" => (mount("cgroup2", ""), "max"),
            one if one.split(',').any(|c| c == "hugetlb") => (mount("cgroup", "hugetlb"), "limit_in_bytes"),
            _ => continue,
        };
        let Some(place) = place else { continue };
        let mut group = Some(Path::new(group));
        while let Some(here) = group {
            let folder = format!("{place}/{}", here.display().to_string().trim_matches('/'));
            for size in ["2MB", "1GB"] {
                let file = format!("{}/hugetlb.{size}.{file}", folder.trim_end_matches('/'));
                // Without a limit version 1 says the largest number of whole pages.
                let limit = host
                    .text(&file)
                    .and_then(|text| text.parse::<u64>().ok())
                    .filter(|limit| *limit < 1 << 62);
                if let Some(limit) = limit {
                    let all = if controllers.is_empty() { "max" } else { "-1" };
                    return Outcome::warning(
                        format!("{limit} bytes of pages of {size} in {}", here.display()),
                        format!("echo {all} > {file}, or start it elsewhere"),
                    );
                }
            }
            group = here.parent();
        }
    }
    Outcome::ok("no control group limits them")
}

fn mounted(host: &Host) -> Outcome {
    let mounts = host.text("proc/self/mounts").unwrap_or_default();
    let places: Vec<&str> = mounts
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace().skip(1);
            let place = words.next()?;
            (words.next()? == "hugetlbfs").then_some(place)
        })
        .collect();
    match places.is_empty() {
        true => Outcome::not_applicable(
            "not mounted; only for DPDK or QEMU: mount -t hugetlbfs none /dev/hugepages",
        ),
        false => Outcome::ok(places.join(", ")),
    }
}

fn transparent(host: &Host) -> Outcome {
    let file = "sys/kernel/mm/transparent_hugepage/enabled";
    let Some(text) = host.text(file) else { return Outcome::not_applicable("this kernel has none") };
    let now = text.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map_or("", |(now, _)| now);
    match now {
        // For whoever asks for them, such as our VMM for guests in ordinary pages.
        "madvise" | "never" => Outcome::ok(now),
        other => Outcome::warning(other, format!("echo madvise > /{file}")),
    }
}

fn swappiness(host: &Host) -> Outcome {
    let swaps = host.text("proc/swaps").unwrap_or_default();
    let now = host.text("proc/sys/vm/swappiness").and_then(|text| text.parse::<u32>().ok());
    match now {
        _ if swaps.lines().count() < 2 => Outcome::not_applicable("no swap"),
        None => Outcome::not_applicable("the kernel does not say"),
        Some(now) if now <= 10 => Outcome::ok(now.to_string()),
        Some(now) => Outcome::warning(
            now.to_string(),
            "echo 10 > /proc/sys/vm/swappiness, or `lock_memory = true` in each [[vm]]",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::super::tests::Machine;

    fn pool(node: u32, file: &str) -> String {
        format!("sys/devices/system/node/node{node}/hugepages/hugepages-2048kB/{file}")
    }

    #[test]
    fn huge_pages_are_wanted_and_on_every_node() {
        let machine = |on_0: &str, on_1: &str| {
            Machine::with(&[
                (&pool(0, "nr_hugepages"), on_0),
                (&pool(0, "free_hugepages"), on_0),
                (&pool(1, "nr_hugepages"), on_1),
                (&pool(1, "free_hugepages"), "0\n"),
            ])
        };
        machine("0\n", "0\n").says("huge-pages", State::Warning, "nr_hugepages");
        machine("0\n", "0\n").says("huge-pages-nodes", State::Ok, "alike");
        machine("64\n", "0\n").says("huge-pages", State::Ok, "64 of 2 MiB on node 0, 64 free");
        machine("64\n", "0\n").says("huge-pages-nodes", State::Warning, "node1/hugepages");
        machine("64\n", "8\n").says("huge-pages-nodes", State::Ok, "2 nodes");
        Machine::with(&[]).says("huge-pages", State::Error, "CONFIG_HUGETLBFS");
        Machine::with(&[]).says("huge-pages-nodes", State::NotApplicable, "one memory node");
        // Node 1 has no core that polls: nobody there needs any.
        let pages = [
            pool(0, "nr_hugepages"),
            pool(0, "free_hugepages"),
            pool(1, "nr_hugepages"),
            pool(1, "free_hugepages"),
        ];
        let mut files: Vec<(&str, &str)> =
            pages.iter().map(String::as_str).zip(["64\n", "64\n", "0\n", "0\n"]).collect();
        files.push(("sys/devices/system/cpu/online", "0-1\n"));
        files.push(("sys/devices/system/cpu/cpu1/node0/cpulist", ""));
        Machine::with(&files).says("huge-pages-nodes", State::Ok, "1 nodes alike");
    }

    #[test]
    fn limits_of_control_groups_and_mounts_are_found() {
        let v2 = (
            "proc/self/mounts",
            "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\nhugetlbfs /dev/hugepages hugetlbfs rw 0 0\n",
        );
        let ours = ("proc/self/cgroup", "0::/node/switch\n");
        let limited = |limit: &str| Machine::with(&[v2, ours, ("sys/fs/cgroup/node/hugetlb.2MB.max", limit)]);
        limited("4194304\n").says(
            "huge-pages-permitted",
            State::Warning,
            "echo max > /sys/fs/cgroup/node/hugetlb.2MB.max",
        );
        limited("max\n").says("huge-pages-permitted", State::Ok, "no control group");
        limited("max\n").says("huge-pages-mounted", State::Ok, "/dev/hugepages");
        let v1 = ("proc/self/mounts", "cgroup /sys/fs/cgroup/hugetlb cgroup rw,hugetlb 0 0\n");
        let group = ("proc/self/cgroup", "5:hugetlb:/vm\n4:memory:/\n");
        let limited = |limit: &str| {
            Machine::with(&[v1, group, ("sys/fs/cgroup/hugetlb/vm/hugetlb.1GB.limit_in_bytes", limit)])
        };
        limited("0\n").says(
            "huge-pages-permitted",
            State::Warning,
            "echo -1 > /sys/fs/cgroup/hugetlb/vm/hugetlb.1GB",
        );
        limited("9223372036854771712\n").says("huge-pages-permitted", State::Ok, "no control group");
        limited("0\n").says("huge-pages-mounted", State::NotApplicable, "mount -t hugetlbfs");
    }

    #[test]
    fn what_moves_and_merges_pages_is_told() {
        let transparent = "sys/kernel/mm/transparent_hugepage/enabled";
        let machine = Machine::with(&[
            (transparent, "[always] madvise never\n"),
            ("sys/kernel/mm/ksm/run", "1\n"),
            ("proc/sys/kernel/numa_balancing", "1\n"),
            ("proc/swaps", "Filename Type\n/dev/sda2 partition\n"),
            ("proc/sys/vm/swappiness", "60\n"),
        ]);
        machine.says("transparent-huge-pages", State::Warning, "always");
        machine.says("ksm", State::Warning, "echo 2");
        machine.says("numa-balancing", State::Warning, "echo 0");
        machine.says("swappiness", State::Warning, "lock_memory");
        let good = Machine::with(&[
            (transparent, "always [madvise] never\n"),
            ("sys/kernel/mm/ksm/run", "0\n"),
            ("proc/swaps", "Filename Type\n"),
        ]);
        good.says("transparent-huge-pages", State::Ok, "madvise");
        good.says("ksm", State::Ok, "0");
        good.says("swappiness", State::NotApplicable, "no swap");
        good.says("numa-balancing", State::NotApplicable, "no /proc");
        let swaps = ("proc/swaps", "Filename Type\n/dev/sda2 partition\n");
        Machine::with(&[swaps, ("proc/sys/vm/swappiness", "10\n")]).says("swappiness", State::Ok, "10");
        Machine::with(&[("proc/sys/kernel/numa_balancing", "0\n")]).says("numa-balancing", State::Ok, "0");
        Machine::with(&[]).says("ksm", State::NotApplicable, "no /sys");
        Machine::with(&[]).says("transparent-huge-pages", State::NotApplicable, "none");
    }
}
