//! Threads of the kernel: where they may run, and how they are scheduled.
//!
//! Owns finding them by name, and both settings. Never touches a thread of a process: what is set is verified to be the kernel's.

use std::fs;
use std::io;
use std::path::Path;

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::topology::CoreSet;

/// Flags of a task (Linux, include/linux/sched.h).
const KERNEL: u64 = 0x0020_0000;
const BOUND: u64 = 0x0400_0000;

/// A thread of the kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct KernelThread {
    pid: i32,
    /// When it was started, in the kernel's ticks: another one may have its number later.
    started: u64,
    /// Its name.
    pub name: String,
}

/// What is set of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Aspect {
    /// The cores on which it may run.
    Cores,
    /// Its policy, and the priority that goes with it: `other`, `fifo:2`.
    Schedule,
}

/// `/proc/PID/stat` as far as it matters (proc(5)).
struct Stat {
    name: String,
    flags: u64,
    started: u64,
    priority: i32,
    policy: i32,
}

impl Stat {
    fn read(root: &Path, pid: i32) -> io::Result<Self> {
        let text = fs::read_to_string(root.join(format!("proc/{pid}/stat")))?;
        let parse = || {
            let (begin, rest) = text.rsplit_once(") ")?;
            let words: Vec<&str> = rest.split_whitespace().collect();
            // The third field is the first of these.
            let field = |n: usize| words.get(n - 3);
            Some(Self {
                name: begin.split_once('(')?.1.to_owned(),
                flags: field(9)?.parse().ok()?,
                started: field(22)?.parse().ok()?,
                priority: field(40)?.parse().ok()?,
                policy: field(41)?.parse().ok()?,
            })
        };
        parse().ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat has an unknown form")))
    }
}

impl KernelThread {
    /// All that a name of `patterns` fits and none of `except`; of those whose cores are to be set only the ones that the kernel
    /// lets go.
    pub(super) fn all(root: &Path, patterns: &[String], except: &[String], aspect: Aspect) -> Vec<Self> {
        let entries = fs::read_dir(root.join("proc")).into_iter().flatten().flatten();
        let mut pids: Vec<i32> =
            entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        pids.sort_unstable();
        let fits = |patterns: &[String], name: &str| patterns.iter().any(|pattern| fits(pattern, name));
        let found = pids.into_iter().filter_map(|pid| {
            let Stat { name, flags, started, .. } = Stat::read(root, pid).ok()?;
            let ours = flags & KERNEL != 0
                && (aspect == Aspect::Schedule || flags & BOUND == 0)
                && fits(patterns, &name)
                && !fits(except, &name);
            ours.then_some(Self { pid, started, name })
        });
        found.collect()
    }

    /// Where the kernel shows it.
    pub(super) fn folder(&self) -> String {
        format!("/proc/{}", self.pid)
    }

    /// What it is set to. It must still be the same thread.
    pub(super) fn get(&self, root: &Path, aspect: Aspect) -> io::Result<String> {
        let stat = self.verified(root)?;
        match aspect {
            Aspect::Cores => {
                let status = fs::read_to_string(root.join(format!("proc/{}/status", self.pid)))?;
                let cores = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
                cores
                    .map(|cores| cores.trim().to_owned())
                    .ok_or_else(|| io::Error::other("its cores are not told"))
            }
            Aspect::Schedule => Ok(match stat.policy {
                libc::SCHED_OTHER => "other".to_owned(),
                libc::SCHED_FIFO => format!("fifo:{}", stat.priority),
                libc::SCHED_RR => format!("rr:{}", stat.priority),
                other => format!("policy {other}"),
            }),
        }
    }

    /// Sets it.
    pub(super) fn set(&self, root: &Path, aspect: Aspect, value: &str) -> io::Result<()> {
        if root != Path::new("/") {
            return Err(io::Error::other("threads are those of the kernel that runs"));
        }
        self.verified(root)?;
        match aspect {
            Aspect::Cores => {
                let mut set = CpuSet::new();
                for core in value.parse::<CoreSet>().map_err(io::Error::other)?.iter() {
                    set.set(core as usize)?;
                }
                Ok(sched_setaffinity(Pid::from_raw(self.pid), &set)?)
            }
            Aspect::Schedule => {
                let (policy, priority) =
                    schedule(value).ok_or_else(|| io::Error::other(format!("`{value}` cannot be set")))?;
                // SAFETY: all zeros is a valid parameter block.
                let mut parameters: libc::sched_param = unsafe { std::mem::zeroed() };
                parameters.sched_priority = priority;
                // SAFETY: the kernel reads the parameters, and knows of a thread that is gone.
                let result = unsafe { libc::sched_setscheduler(self.pid, policy, &raw const parameters) };
                Ok(Errno::result(result).map(drop)?)
            }
        }
    }

    /// What it is, as long as it is the same thread, and the kernel's.
    fn verified(&self, root: &Path) -> io::Result<Stat> {
        let stat = Stat::read(root, self.pid)?;
        if stat.flags & KERNEL == 0 || stat.started != self.started {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the thread is gone"));
        }
        Ok(stat)
    }
}

/// `other`, `fifo:1` to `fifo:99`, `rr:1` to `rr:99`.
pub(super) fn schedule(text: &str) -> Option<(i32, i32)> {
    let (policy, priority) = match text.split_once(':') {
        None if text == "other" => return Some((libc::SCHED_OTHER, 0)),
        Some(("fifo", priority)) => (libc::SCHED_FIFO, priority),
        Some(("rr", priority)) => (libc::SCHED_RR, priority),
        _ => return None,
    };
    let priority = priority.parse().ok().filter(|priority| (1..=99).contains(priority))?;
    Some((policy, priority))
}

/// Whether a name is what `pattern` says, in which one `*` stands for anything.
fn fits(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((begin, end)) => {
            name.len() >= begin.len() + end.len() && name.starts_with(begin) && name.ends_with(end)
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// `/proc/PID` of a thread.
    pub(crate) fn lay_out(root: &Path, pid: i32, name: &str, flags: u64, cores: &str, policy: (i32, i32)) {
        let folder = root.join(format!("proc/{pid}"));
        fs::create_dir_all(&folder).unwrap();
        let mut fields = vec!["0".to_owned(); 50];
        fields[9 - 3] = flags.to_string();
        fields[22 - 3] = "77".to_owned();
        fields[40 - 3] = policy.1.to_string();
        fields[41 - 3] = policy.0.to_string();
        fields[0] = "S".to_owned();
        fs::write(folder.join("stat"), format!("{pid} ({name}) {}\n", fields.join(" "))).unwrap();
        fs::write(folder.join("status"), format!("Name:\t{name}\nCpus_allowed_list:\t{cores}\n")).unwrap();
    }

    fn machine() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        lay_out(root.path(), 9, "ksoftirqd/0", KERNEL | BOUND, "0", (0, 0));
        lay_out(root.path(), 20, "ksoftirqd/1", KERNEL | BOUND, "1", (1, 2));
        lay_out(root.path(), 30, "kswapd0", KERNEL, "0-3", (0, 0));
        lay_out(root.path(), 31, "irq/24-a) (b", KERNEL, "0", (1, 50));
        lay_out(root.path(), 700, "kswapd0", 0x40_0000, "0-3", (0, 0));
        root
    }

    #[test]
    fn only_threads_of_the_kernel_are_found_and_only_those_that_can_move_where_that_is_wanted() {
        let root = machine();
        let all = |patterns: &[&str], except: &[&str], aspect| {
            let owned = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
            let found = KernelThread::all(root.path(), &owned(patterns), &owned(except), aspect);
            found.into_iter().map(|thread| thread.pid).collect::<Vec<_>>()
        };
        assert_eq!(all(&["*"], &[], Aspect::Cores), [30, 31]);
        assert_eq!(all(&["*"], &["irq/*"], Aspect::Cores), [30]);
        assert_eq!(all(&["ksoftirqd/*", "rcuc/*"], &[], Aspect::Schedule), [9, 20]);
    }

    #[test]
    fn a_thread_says_how_it_is_set_and_another_one_of_its_number_is_not_it() {
        let root = machine();
        let [of_core_0, of_core_1] =
            KernelThread::all(root.path(), &["ksoftirqd/*".to_owned()], &[], Aspect::Schedule)
                .try_into()
                .unwrap();
        let get = |thread: &KernelThread, aspect| thread.get(root.path(), aspect).unwrap();
        assert_eq!(
            (get(&of_core_0, Aspect::Schedule), get(&of_core_0, Aspect::Cores)),
            ("other".into(), "0".into())
        );
        assert_eq!(get(&of_core_1, Aspect::Schedule), "fifo:2");
        let later = KernelThread { started: 78, ..of_core_0.clone() };
        let gone = later.get(root.path(), Aspect::Cores).unwrap_err();
        assert_eq!(gone.kind(), io::ErrorKind::NotFound);
        let process = KernelThread { pid: 700, ..of_core_0 };
        assert!(process.get(root.path(), Aspect::Cores).is_err(), "it is a process's");
        assert!(
            of_core_1.set(root.path(), Aspect::Schedule, "other").is_err(),
            "no thread of this machine is meant"
        );
    }

    #[test]
    fn priorities_have_a_policy_and_a_range() {
        assert_eq!(schedule("other"), Some((0, 0)));
        assert_eq!(schedule("fifo:4"), Some((libc::SCHED_FIFO, 4)));
        assert_eq!(schedule("rr:99"), Some((libc::SCHED_RR, 99)));
        for wrong in ["", "fifo", "fifo:", "fifo:0", "fifo:100", "deadline:1", "fifo:-1", "other:1"] {
            assert_eq!(schedule(wrong), None, "{wrong}");
        }
        assert!(fits("a*c", "abc") && fits("*", "") && !fits("aa*a", "aa") && !fits("a", "ab"));
    }
}
