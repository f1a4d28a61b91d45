//! Checks of cores: who else runs on those that poll, and how steadily they run.

use std::fs;

use super::{Check, Host, Outcome, always, knob};
use crate::partition::Hierarchy;
use crate::topology::{self, CoreSet};

pub(super) const CHECKS: &[Check] = &[
    Check {
        name: "isolated-cores",
        why: "whatever the scheduler puts on a core that polls is a gap of milliseconds, and frames are lost in it",
        matters: always,
        run: isolated,
    },
    Check {
        name: "tick",
        why: "a core with nohz_full is left alone by the timer while one thread runs there, else it is interrupted 250 or 1,000 times a second",
        matters: always,
        run: tick,
    },
    Check {
        name: "interrupts",
        why: "an interrupt on a core that polls is a gap of some microseconds, and what it wakes up is a longer one",
        matters: always,
        run: interrupts,
    },
    Check {
        name: "irqbalance",
        why: "irqbalance moves interrupts again and again, also to cores that poll",
        matters: always,
        run: irqbalance,
    },
    Check {
        name: "workqueues",
        why: "the kernel's deferred work that is bound to no core lands on those that poll, too, unless it is kept off",
        matters: always,
        run: workqueues,
    },
    Check {
        name: "siblings",
        why: "two busy threads of one physical core halve each other, and a third party there disturbs like one on the core itself",
        matters: always,
        run: siblings,
    },
    Check {
        name: "governor",
        why: "a core that polls in sleep mode is clocked down between bursts, and is slow when the next one comes",
        matters: always,
        run: governor,
    },
    Check {
        name: "idle-states",
        why: "a core that sleeps deeply takes up to 100 us and more to wake up: whoever waits for its vCPU or worker waits for that",
        matters: always,
        run: idle_states,
    },
    Check {
        name: "clock",
        why: "latencies are measured, and rates are paced, with the time-stamp counter; any other clock source costs a microsecond a look",
        matters: always,
        run: clock,
    },
    Check {
        name: "rt-throttling",
        why: "with it a real-time thread that is busy all the time, a vCPU as SCHED_FIFO, is stopped for 50 ms each second",
        matters: |needs| needs.machines,
        run: |host| knob(host, "proc/sys/kernel/sched_rt_runtime_us", &["-1"], "-1"),
    },
    Check {
        name: "nmi-watchdog",
        why: "the watchdog interrupts each core with a non-maskable interrupt every few seconds, and takes a performance counter",
        matters: always,
        run: |host| knob(host, "proc/sys/kernel/nmi_watchdog", &["0"], "0"),
    },
    Check {
        name: "timer-migration",
        why: "with it timers of other cores may come to one that polls",
        matters: always,
        run: |host| knob(host, "proc/sys/kernel/timer_migration", &["0"], "0"),
    },
    Check {
        name: "bare-metal",
        why: "a host below this one may pause a core at any time, for milliseconds; nothing here can prevent that",
        matters: always,
        run: bare_metal,
    },
];

/// Cores that are apart from the scheduler's others: by isolcpus, or by an isolated partition of cpusets.
fn isolated(host: &Host) -> Outcome {
    let boot = host.cores("sys/devices/system/cpu/isolated");
    // Of others, and ours; older kernels do not list them.
    let partition = host.cores("sys/fs/cgroup/cpuset.cpus.isolated");
    let ours = Hierarchy::find(&host.root).map(|groups| groups.cores()).unwrap_or_default();
    let isolated: CoreSet = boot.iter().chain(partition.iter()).chain(ours.iter()).collect();
    let busy = host.busy_cores();
    let open: CoreSet = busy.iter().filter(|core| !isolated.contains(*core)).collect();
    if busy.is_empty() {
        return Outcome::warning("one core only", "use a machine with two cores or more: one of them polls");
    }
    if open.is_empty() {
        return Outcome::ok(format!("{isolated} isolated"));
    }
    let found = if isolated.is_empty() { "none".to_owned() } else { format!("{isolated}, but not {open}") };
    let fix = match Hierarchy::find(&host.root).is_some_and(|groups| groups.obstacle().is_none()) {
        true => format!(
            "cableway tune apply --isolate {busy}, or kernel command line: isolcpus=managed_irq,domain,{busy}"
        ),
        // Without cpusets of cgroup v2 nothing can be isolated while the machine runs.
        false => format!("kernel command line: isolcpus=managed_irq,domain,{busy}"),
    };
    Outcome::warning(found, fix)
}

fn tick(host: &Host) -> Outcome {
    let without = host.cores("sys/devices/system/cpu/nohz_full");
    let busy = host.busy_cores();
    let ticking: CoreSet = busy.iter().filter(|core| !without.contains(*core)).collect();
    if ticking.is_empty() && !busy.is_empty() {
        return Outcome::ok(format!("{without} without tick"));
    }
    let found = if without.is_empty() { "every core ticks".to_owned() } else { format!("{ticking} tick") };
    Outcome::warning(found, format!("kernel command line: nohz_full={busy} rcu_nocbs={busy}"))
}

fn interrupts(host: &Host) -> Outcome {
    let busy = host.busy_cores();
    let housekeeping: CoreSet =
        host.cores("sys/devices/system/cpu/online").iter().filter(|core| !busy.contains(*core)).collect();
    let folder = match fs::read_dir(host.path("proc/irq")) {
        Ok(folder) => folder,
        Err(error) => return Outcome::not_applicable(format!("/proc/irq: {error}")),
    };
    let mut there: Vec<u32> = folder
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|irq| {
            // Where it may go is what counts; managed ones are the kernel's, and follow isolcpus=managed_irq.
            let cores = host.cores(&format!("proc/irq/{irq}/effective_affinity_list"));
            cores.iter().any(|core| busy.contains(core))
        })
        .collect();
    there.sort_unstable();
    match there.as_slice() {
        [] => Outcome::ok(format!("none goes to {busy}")),
        [first, ..] => Outcome::warning(
            format!("{} go to cores {busy}", there.len()),
            format!(
                "echo {housekeeping} > /proc/irq/{first}/smp_affinity_list, and so on; kernel command line: irqaffinity={housekeeping}"
            ),
        ),
    }
}

fn irqbalance(host: &Host) -> Outcome {
    let processes = fs::read_dir(host.path("proc")).into_iter().flatten().flatten();
    let named = |name: &str| {
        name.bytes().all(|byte| byte.is_ascii_digit())
            && host.text(&format!("proc/{name}/comm")).is_some_and(|comm| comm == "irqbalance")
    };
    let running = processes.filter_map(|entry| entry.file_name().into_string().ok()).find(|name| named(name));
    match running {
        None => Outcome::ok("does not run"),
        Some(pid) => Outcome::warning(
            format!("runs as process {pid}"),
            "systemctl disable --now irqbalance, or IRQBALANCE_BANNED_CPULIST in /etc/default/irqbalance",
        ),
    }
}

fn siblings(host: &Host) -> Outcome {
    let root = &host.root;
    let busy = host.busy_cores();
    let isolated = topology::boot_isolated_cores(root);
    let mut shared = Vec::new();
    let mut known = false;
    for core in busy.iter() {
        let Ok(threads) = topology::smt_siblings(root, core) else { continue };
        known = true;
        // Each pair once; and not those whose other thread is kept idle.
        let others = threads.iter().filter(|other| match busy.contains(*other) {
            true => *other > core,
            false => *other != core && !isolated.contains(*other),
        });
        shared.extend(others.map(|other| format!("{core} and {other}")));
    }
    match (known, shared.first()) {
        (false, _) => Outcome::not_applicable("the kernel does not say"),
        (true, None) => Outcome::ok("nobody is on the other thread of a core that polls"),
        (true, Some(first)) => Outcome::warning(
            format!("cores {first} are one physical core, and {} more pairs", shared.len() - 1),
            "give workers and vCPUs one thread of a core and leave the other idle, or echo off > /sys/devices/system/cpu/smt/control",
        ),
    }
}

fn workqueues(host: &Host) -> Outcome {
    let file = "sys/devices/virtual/workqueue/cpumask";
    let Some(cores) = host.text(file).and_then(|mask| CoreSet::from_mask(&mask).ok()) else {
        return Outcome::not_applicable("the kernel does not say");
    };
    let busy = host.busy_cores();
    let both: CoreSet = cores.iter().filter(|core| busy.contains(*core)).collect();
    if both.is_empty() {
        return Outcome::ok(format!("on cores {cores}"));
    }
    let left: CoreSet = cores.iter().filter(|core| !busy.contains(*core)).collect();
    let mask = left.mask();
    Outcome::warning(format!("on cores {both}, too"), format!("echo {mask} > /{file}"))
}

/// Wake-up times of the idle states that busy cores may enter (Linux, Documentation/admin-guide/pm/cpuidle.rst).
fn idle_states(host: &Host) -> Outcome {
    /// What C1 takes, and C1E on some; a microsecond is not worth a complaint.
    const SHALLOW_US: u32 = 10;
    let mut deepest: Option<(u32, String, u32)> = None;
    let mut known = false;
    for core in host.busy_cores().iter() {
        let folder = format!("sys/devices/system/cpu/cpu{core}");
        // 0 is no limit at all, and n/a is no sleep at all.
        let limit = match host.text(&format!("{folder}/power/pm_qos_resume_latency_us")).as_deref() {
            None | Some("0") => u32::MAX,
            Some(limit) => limit.parse().unwrap_or(0),
        };
        for state in 0.. {
            let of = |file: &str| host.text(&format!("{folder}/cpuidle/state{state}/{file}"));
            let Some(latency) = of("latency").and_then(|us| us.parse::<u32>().ok()) else { break };
            known = true;
            let enabled = of("disable").is_none_or(|disabled| disabled == "0");
            if enabled && latency <= limit && deepest.as_ref().is_none_or(|(_, _, most)| latency > *most) {
                deepest = Some((core, of("name").unwrap_or_default(), latency));
            }
        }
    }
    match deepest {
        _ if !known => Outcome::not_applicable("the kernel knows no idle states of these cores"),
        Some((core, name, us)) if us > SHALLOW_US => Outcome::warning(
            format!("core {core} may go to {name}, and needs {us} us to wake up"),
            format!(
                "echo 3 > /sys/devices/system/cpu/cpu{core}/power/pm_qos_resume_latency_us, and so on: cableway tune apply"
            ),
        ),
        _ => Outcome::ok(format!("none that takes more than {SHALLOW_US} us to wake up from")),
    }
}

fn governor(host: &Host) -> Outcome {
    let of = |core: u32| host.text(&format!("sys/devices/system/cpu/cpu{core}/cpufreq/scaling_governor"));
    let busy = host.busy_cores();
    let mut all = busy.iter().filter_map(|core| Some((core, of(core)?))).peekable();
    if all.peek().is_none() {
        return Outcome::not_applicable("the kernel does not govern these cores' clocks");
    }
    match all.find(|(_, governor)| governor != "performance") {
        None => Outcome::ok("performance"),
        Some((core, governor)) => {
            Outcome::warning(format!("{governor} on core {core}"), "cpupower frequency-set -g performance")
        }
    }
}

fn clock(host: &Host) -> Outcome {
    let file = "sys/devices/system/clocksource/clocksource0/current_clocksource";
    match host.text(file).as_deref() {
        None => Outcome::not_applicable("the kernel does not say"),
        Some("tsc") => Outcome::ok("tsc"),
        Some(clock @ ("kvm-clock" | "hyperv_clocksource_tsc_page")) => {
            Outcome::ok(format!("{clock}, which reads the time-stamp counter"))
        }
        Some(other) => Outcome::warning(
            other,
            "see dmesg for why the time-stamp counter is not trusted; kernel command line: tsc=reliable if it is steady",
        ),
    }
}

fn bare_metal(host: &Host) -> Outcome {
    let flags = host.text("proc/cpuinfo").unwrap_or_default();
    let flags = flags.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    if flags.is_empty() {
        Outcome::not_applicable("the kernel does not say")
    } else if flags.split_whitespace().any(|flag| flag == "hypervisor") {
        let fix =
            "cableway latency shows how long the pauses are; on its host, pin each vCPU to a core of its own";
        Outcome::warning("this is a virtual machine", fix)
    } else {
        Outcome::ok("no hypervisor below")
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Machine;
    use super::super::{Needs, State};

    fn cpu(core: u32, file: &str) -> String {
        format!("sys/devices/system/cpu/cpu{core}/{file}")
    }

    const ONLINE: (&str, &str) = ("sys/devices/system/cpu/online", "0-3\n");

    #[test]
    fn cores_that_poll_and_are_not_isolated_are_named_with_the_kernel_line() {
        Machine::with(&[ONLINE]).says("isolated-cores", State::Warning, "isolcpus=managed_irq,domain,1-3");
        let some = Machine::with(&[ONLINE, ("sys/devices/system/cpu/isolated", "2-3\n")]);
        some.says("isolated-cores", State::Warning, "2-3, but not 1");
        let both = Machine::with(&[
            ONLINE,
            ("sys/devices/system/cpu/isolated", "2-3\n"),
            ("sys/fs/cgroup/cpuset.cpus.isolated", "1\n"),
        ]);
        both.says("isolated-cores", State::Ok, "1-3");
        // Only those count that somebody wants to use.
        let needs = Needs { busy_cores: [3].into_iter().collect(), ..Needs::everything() };
        assert_eq!(some.finding("isolated-cores", needs).state, State::Ok);
        Machine::with(&[(ONLINE.0, "0\n")]).says("isolated-cores", State::Warning, "one core only");
    }

    #[test]
    fn a_partition_counts_and_where_one_can_be_made_that_is_the_fix() {
        let mounts = ("proc/self/mounts", "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n");
        let controllers = ("sys/fs/cgroup/cgroup.controllers", "cpuset cpu\n");
        let could = Machine::with(&[ONLINE, mounts, controllers]);
        could.says(
            "isolated-cores",
            State::Warning,
            "cableway tune apply --isolate 1-3, or kernel command line",
        );
        let has = Machine::with(&[
            ONLINE,
            mounts,
            controllers,
            ("sys/fs/cgroup/cableway/cpuset.cpus", "1-3\n"),
            ("sys/fs/cgroup/cableway/cpuset.cpus.partition", "isolated\n"),
        ]);
        has.says("isolated-cores", State::Ok, "1-3 isolated");
    }

    #[test]
    fn deferred_work_and_deep_sleep_on_busy_cores_are_told() {
        let mask = "sys/devices/virtual/workqueue/cpumask";
        Machine::with(&[ONLINE, (mask, "f\n")]).says(
            "workqueues",
            State::Warning,
            "1-3, too echo 00000001 >",
        );
        Machine::with(&[ONLINE, (mask, "00000001\n")]).says("workqueues", State::Ok, "cores 0");
        Machine::with(&[ONLINE]).says("workqueues", State::NotApplicable, "does not say");

        let (c1, c6) = (cpu(2, "cpuidle/state0/"), cpu(2, "cpuidle/state1/"));
        let states = [
            (format!("{c1}latency"), "2\n"),
            (format!("{c1}name"), "C1\n"),
            (format!("{c6}latency"), "133\n"),
            (format!("{c6}name"), "C6\n"),
        ];
        let with = |more: &[(&str, &str)]| {
            let states = states.iter().map(|(file, text)| (file.as_str(), *text));
            Machine::with(&[ONLINE].into_iter().chain(states).chain(more.iter().copied()).collect::<Vec<_>>())
        };
        with(&[]).says("idle-states", State::Warning, "core 2 may go to C6, and needs 133 us");
        let limit = cpu(2, "power/pm_qos_resume_latency_us");
        with(&[(&limit, "0\n")]).says("idle-states", State::Warning, "C6");
        for good in ["3\n", "n/a\n"] {
            with(&[(&limit, good)]).says("idle-states", State::Ok, "none that takes more");
        }
        with(&[(&format!("{c6}disable"), "1\n")]).says("idle-states", State::Ok, "none that");
        Machine::with(&[ONLINE]).says("idle-states", State::NotApplicable, "no idle states");
    }

    #[test]
    fn ticks_interrupts_and_irqbalance_on_busy_cores_are_told() {
        let machine = Machine::with(&[
            ONLINE,
            ("sys/devices/system/cpu/nohz_full", "2-3\n"),
            ("proc/irq/24/effective_affinity_list", "0\n"),
            ("proc/irq/25/effective_affinity_list", "2\n"),
            ("proc/irq/7/effective_affinity_list", "1-2\n"),
            ("proc/812/comm", "irqbalance\n"),
        ]);
        machine.says("tick", State::Warning, "1 tick");
        machine.says("interrupts", State::Warning, "echo 0 > /proc/irq/7/smp_affinity_list");
        machine.says("interrupts", State::Warning, "2 go to cores 1-3");
        machine.says("irqbalance", State::Warning, "process 812");
        let quiet = Machine::with(&[
            ONLINE,
            ("sys/devices/system/cpu/nohz_full", "1-3\n"),
            ("proc/irq/24/effective_affinity_list", "0\n"),
            ("proc/1/comm", "init\n"),
        ]);
        quiet.says("tick", State::Ok, "1-3");
        quiet.says("interrupts", State::Ok, "none");
        quiet.says("irqbalance", State::Ok, "does not run");
    }

    #[test]
    fn threads_of_one_core_governors_and_clocks_are_judged() {
        let (pair, alone) =
            (cpu(1, "topology/thread_siblings_list"), cpu(2, "topology/thread_siblings_list"));
        let governor = cpu(1, "cpufreq/scaling_governor");
        let clock = "sys/devices/system/clocksource/clocksource0/current_clocksource";
        let machine = Machine::with(&[
            ONLINE,
            (&pair, "1,3\n"),
            (&alone, "2\n"),
            (&governor, "powersave\n"),
            (clock, "hpet\n"),
        ]);
        machine.says("siblings", State::Warning, "cores 1 and 3 are one physical core, and 0 more");
        machine.says("governor", State::Warning, "powersave on core 1");
        machine.says("clock", State::Warning, "hpet");
        let good = Machine::with(&[ONLINE, (&alone, "2\n"), (&governor, "performance\n"), (clock, "tsc\n")]);
        good.says("siblings", State::Ok, "nobody");
        // The other thread is nobody's: isolated, and not used.
        let idle = Machine::with(&[ONLINE, (&pair, "1,3\n"), ("sys/devices/system/cpu/isolated", "1,3\n")]);
        let needs = Needs { busy_cores: [1].into_iter().collect(), ..Needs::everything() };
        assert_eq!(idle.finding("siblings", needs).state, State::Ok);
        Machine::with(&[ONLINE]).says("siblings", State::NotApplicable, "does not say");
        Machine::with(&[ONLINE]).says("governor", State::NotApplicable, "does not govern");
        Machine::with(&[]).says("clock", State::NotApplicable, "does not say");
        Machine::with(&[(clock, "kvm-clock\n")]).says("clock", State::Ok, "kvm-clock");
        good.says("governor", State::Ok, "performance");
        good.says("clock", State::Ok, "tsc");
    }

    #[test]
    fn kernel_switches_are_told_with_the_command_that_sets_them() {
        let machine = Machine::with(&[
            ("proc/sys/kernel/sched_rt_runtime_us", "950000\n"),
            ("proc/sys/kernel/nmi_watchdog", "0\n"),
            ("proc/cpuinfo", "processor\t: 0\nflags\t\t: fpu hypervisor\n"),
        ]);
        machine.says("rt-throttling", State::Warning, "echo -1 > /proc/sys/kernel/sched_rt_runtime_us");
        machine.says("nmi-watchdog", State::Ok, "0");
        let other = Machine::with(&[
            ("proc/sys/kernel/sched_rt_runtime_us", "-1\n"),
            ("proc/sys/kernel/nmi_watchdog", "1\n"),
            ("proc/sys/kernel/timer_migration", "1\n"),
            ("proc/cpuinfo", "flags\t\t: fpu\n"),
        ]);
        other.says("rt-throttling", State::Ok, "-1");
        other.says("nmi-watchdog", State::Warning, "echo 0 > /proc/sys/kernel/nmi_watchdog");
        other.says("timer-migration", State::Warning, "echo 0 > /proc/sys/kernel/timer_migration");
        other.says("bare-metal", State::Ok, "no hypervisor");
        Machine::with(&[("proc/sys/kernel/timer_migration", "0\n")]).says("timer-migration", State::Ok, "0");
        let nothing = Machine::with(&[]);
        nothing.says("bare-metal", State::NotApplicable, "does not say");
        nothing.says("rt-throttling", State::NotApplicable, "no /proc");
        nothing.says("nmi-watchdog", State::NotApplicable, "no /proc");
        nothing.says("interrupts", State::NotApplicable, "/proc/irq");
        machine.says("timer-migration", State::NotApplicable, "no /proc/sys/kernel/timer_migration");
        machine.says("bare-metal", State::Warning, "virtual machine");
    }
}
