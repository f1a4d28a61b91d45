//! Checks of threads: whether those that run in real time can, and what they starve.

use std::fs;

use super::{Capability, Check, Host, Outcome, always};
use crate::topology::CoreSet;

pub(super) const CHECKS: &[Check] = &[
    Check {
        name: "real-time-threads",
        why: "a SCHED_FIFO thread that polls or never sleeps starves its core's kernel threads: memory locking and RCU hang elsewhere",
        matters: always,
        run: starving,
    },
    Check {
        name: "preempt-rt",
        why: "without PREEMPT_RT a real-time vCPU waits for whatever the kernel does just then, for milliseconds at times",
        matters: |needs| needs.real_time,
        run: preempt_rt,
    },
    Check {
        name: "rtprio",
        why: "vCPUs as SCHED_FIFO need leave to be that",
        matters: |needs| needs.real_time,
        run: rtprio,
    },
];

/// A thread as `/proc/PID/task/TID/stat` describes it: its name, and its priority if it is SCHED_FIFO or SCHED_RR (proc(5), 40, 41).
fn described(stat: &str) -> Option<(String, u32)> {
    let (begin, rest) = stat.rsplit_once(") ")?;
    let mut words = rest.split_whitespace().skip(37);
    let (priority, policy) = (words.next()?.parse().ok()?, words.next()?);
    Some((begin.split_once('(')?.1.to_owned(), if matches!(policy, "1" | "2") { priority } else { 0 }))
}

/// Threads of processes that are pinned to a busy core, and come before the kernel's own there.
fn starving(host: &Host) -> Outcome {
    let numbered = |folder: &str| {
        let entries = fs::read_dir(host.path(folder)).into_iter().flatten().flatten();
        let mut numbers: Vec<u32> =
            entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        numbers.sort_unstable();
        numbers
    };
    let mut softirqs: Vec<(String, u32)> = Vec::new();
    let mut pinned: Vec<(u32, String, u32, u32)> = Vec::new();
    let busy = host.busy_cores();
    for (pid, tid) in numbered("proc")
        .into_iter()
        .flat_map(|pid| numbered(&format!("proc/{pid}/task")).into_iter().map(move |tid| (pid, tid)))
    {
        let of = |file: &str| host.text(&format!("proc/{pid}/task/{tid}/{file}"));
        let Some((name, priority)) = of("stat").as_deref().and_then(described) else { continue };
        if name.starts_with("ksoftirqd/") {
            softirqs.push((name, priority));
            continue;
        }
        let status = of("status").unwrap_or_default();
        let cores = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        let cores: CoreSet = cores.and_then(|cores| cores.parse().ok()).unwrap_or_default();
        // Threads of the kernel have no memory of their own.
        let ours = status.contains("VmSize:") && priority > 0 && cores.len() == 1;
        if let Some(core) = cores.iter().next().filter(|core| ours && busy.contains(*core)) {
            pinned.push((tid, name, priority, core));
        }
    }
    let starving = pinned.iter().find(|(_, _, priority, core)| {
        softirqs.iter().any(|(name, theirs)| *name == format!("ksoftirqd/{core}") && theirs <= priority)
    });
    match starving {
        Some((tid, name, priority, core)) => Outcome::warning(
            format!(
                "thread {tid} ({name}) on core {core} has priority {priority}, ksoftirqd/{core} no higher one"
            ),
            format!(
                "cableway tune apply --profile realtime --isolate {busy} puts the kernel's threads above vCPUs; a worker stays an \
                 ordinary thread"
            ),
        ),
        None if pinned.is_empty() => Outcome::ok("none on these cores"),
        None => Outcome::ok(format!("{}, all below the kernel's", pinned.len())),
    }
}

fn preempt_rt(host: &Host) -> Outcome {
    let version = host.text("proc/version").unwrap_or_default();
    if host.text("sys/kernel/realtime").as_deref() == Some("1") || version.contains("PREEMPT_RT") {
        return Outcome::ok("this kernel is PREEMPT_RT");
    }
    Outcome::warning("this kernel is not", "start one that is; Debian: apt install linux-image-rt-amd64")
}

fn rtprio(host: &Host) -> Outcome {
    match host.limit("Max realtime priority").as_deref() {
        _ if host.capable(Capability::SysNice) => Outcome::ok("this process may (CAP_SYS_NICE)"),
        None => Outcome::not_applicable("the kernel does not say"),
        Some("0") => Outcome::error(
            "this process may not",
            "run it as root, or ulimit -r 98; LimitRTPRIO=98 in a systemd unit; rtprio in /etc/security/limits.conf for a user",
        ),
        Some(priority) => Outcome::ok(format!("up to priority {priority}")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Machine;
    use super::super::{Needs, State};

    fn stat(name: &str, policy: u32, priority: u32) -> String {
        format!("7 ({name}) S {}{priority} {policy} 0 0\n", "0 ".repeat(36))
    }

    #[test]
    fn a_real_time_thread_above_its_cores_kernel_threads_is_told() {
        let with = |theirs: (u32, u32), ours: (u32, u32), cores: &str| {
            Machine::with(&[
                ("sys/devices/system/cpu/online", "0-3\n"),
                ("proc/20/task/20/stat", &stat("ksoftirqd/2", theirs.0, theirs.1)),
                ("proc/20/task/20/status", "Cpus_allowed_list:\t2\n"),
                ("proc/90/task/91/stat", &stat("vcpu0 (a) b", ours.0, ours.1)),
                ("proc/90/task/91/status", &format!("VmSize:\t1 kB\nCpus_allowed_list:\t{cores}\n")),
            ])
        };
        let name = "real-time-threads";
        with((0, 0), (1, 1), "2").says(
            name,
            State::Warning,
            "thread 91 (vcpu0 (a) b) on core 2 has priority 1",
        );
        with((1, 2), (1, 1), "2").says(name, State::Ok, "1, all below");
        with((1, 2), (1, 2), "2").says(name, State::Warning, "--profile realtime --isolate 1-3");
        with((0, 0), (0, 0), "2").says(name, State::Ok, "none on these");
        with((0, 0), (1, 50), "0-3").says(name, State::Ok, "none on these");
    }

    #[test]
    fn a_file_with_real_time_vcpus_wants_the_kernel_and_the_leave_for_it() {
        let needs = Needs { real_time: true, ..Needs::everything() };
        let state = |files: &[(&str, &str)], name| Machine::with(files).finding(name, needs.clone()).state;
        assert_eq!(state(&[], "preempt-rt"), State::Warning);
        assert_eq!(state(&[("sys/kernel/realtime", "1\n")], "preempt-rt"), State::Ok);
        assert_eq!(state(&[("proc/version", "Linux #1 SMP PREEMPT_RT\n")], "preempt-rt"), State::Ok);
        let limits = |soft: &str| format!("Limit  Soft Limit\nMax realtime priority     {soft}    0\n");
        assert_eq!(state(&[("proc/self/limits", &limits("0"))], "rtprio"), State::Error);
        assert_eq!(state(&[("proc/self/limits", &limits("98"))], "rtprio"), State::Ok);
        let root = ("proc/self/status", "CapEff:\t0000000000800000\n");
        assert_eq!(state(&[("proc/self/limits", &limits("0")), root], "rtprio"), State::Ok);
        assert_eq!(state(&[], "rtprio"), State::NotApplicable);
        let findings = super::super::Host::new(Machine::with(&[]).root(), Needs::everything()).findings();
        assert!(findings.iter().all(|finding| finding.name != "rtprio"));
    }
}
