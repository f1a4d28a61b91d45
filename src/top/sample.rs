//! What there is at one moment: times of cores and threads from /proc, counters from the control sockets of the switch and of
//! virtual machines.
//!
//! Reads and asks only. A process or thread that ends meanwhile is left out; one that does not answer is not waited for.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use control::client;
use switch::control::door;
use switch::control::report::{PortsReport, StatsReport, SwitchInfo};
use vmm::control::report::MachineInfo;

/// The commands of `cableway vm` that ask.
const ASK: [&str; 9] = ["list", "info", "pause", "resume", "reboot", "shutdown", "kill", "console", "events"];

/// How long machines may take to answer, all together: a stopped one must not stop who looks.
const PATIENCE: Duration = Duration::from_millis(500);

/// Everything at one moment.
pub(super) struct Sample {
    pub(super) at: Instant,
    /// By number.
    pub(super) cores: BTreeMap<u32, CoreTimes>,
    /// The switch of the run directory, or why it does not answer.
    pub(super) switch: Result<Switch, String>,
    /// Processes of ours: the switch and virtual machines.
    pub(super) processes: Vec<Process>,
}

/// What the switch told.
pub(super) struct Switch {
    pub(super) info: SwitchInfo,
    pub(super) stats: StatsReport,
    pub(super) ports: PortsReport,
}

/// A core's clock ticks since the start of the machine (proc(5), /proc/stat).
#[derive(Clone, Copy, Default)]
pub(super) struct CoreTimes {
    pub(super) busy: u64,
    pub(super) steal: u64,
    pub(super) all: u64,
}

/// A process of ours.
pub(super) struct Process {
    pub(super) pid: u32,
    /// `switch`, or the machine's name.
    pub(super) name: String,
    pub(super) is_machine: bool,
    /// What the machine told; `None`: it has no control socket, or does not answer.
    pub(super) told: Option<MachineInfo>,
    pub(super) threads: Vec<Thread>,
}

/// A thread.
#[derive(Clone)]
pub(super) struct Thread {
    pub(super) id: u32,
    pub(super) name: String,
    /// The core that it ran on last.
    pub(super) core: u32,
    /// Nanoseconds that it ran, and that it waited for a core (Documentation/scheduler/sched-stats.rst).
    pub(super) ran: u64,
    pub(super) waited: u64,
}

impl Sample {
    /// Looks at everything.
    pub(super) fn take(run_dir: &Path) -> Self {
        let proc = Path::new("/proc");
        let switch = ask(run_dir);
        let mut processes = Vec::new();
        if let Ok(switch) = &switch {
            processes.push(Process::new(proc, switch.info.pid, "switch".to_owned()));
        }
        let found = machines(proc);
        let mut told = ask_machines(run_dir, &found);
        processes.extend(found.into_iter().map(|found| {
            let told = told.remove(&found.pid);
            let name = told.as_ref().map_or(found.name, |told| told.name.clone());
            Process { is_machine: true, told, ..Process::new(proc, found.pid, name) }
        }));
        let stat = fs::read_to_string(proc.join("stat")).unwrap_or_default();
        Self { at: Instant::now(), cores: cores(&stat), switch, processes }
    }
}

fn ask(run_dir: &Path) -> Result<Switch, String> {
    let door = door(run_dir);
    let asked = || {
        Ok(Switch {
            info: client::get(&door, "/v1/switch")?.value,
            stats: client::get(&door, "/v1/stats")?.value,
            ports: client::get(&door, "/v1/ports")?.value,
        })
    };
    asked().map_err(|error: client::ClientError| error.to_string())
}

fn cores(stat: &str) -> BTreeMap<u32, CoreTimes> {
    let core = |line: &str| {
        let (number, times) = line.strip_prefix("cpu")?.split_once(' ')?;
        // user, nice, system, idle, iowait, irq, softirq, steal; a guest's time is in user already.
        let times: Vec<u64> = times.split_whitespace().take(8).filter_map(|time| time.parse().ok()).collect();
        let [user, nice, system, idle, iowait, irq, softirq, steal] = times.try_into().ok()?;
        let busy = user + nice + system + irq + softirq;
        Some((number.parse().ok()?, CoreTimes { busy, steal, all: busy + steal + idle + iowait }))
    };
    stat.lines().filter_map(core).collect()
}

/// A machine as its command line tells it.
#[derive(Debug, PartialEq)]
struct Found {
    pid: u32,
    name: String,
    /// Where its control socket is, unless where they are by default.
    run_dir: Option<PathBuf>,
}

/// Virtual machines of this machine, whoever started them.
fn machines(proc: &Path) -> Vec<Found> {
    let mut found = Vec::new();
    for entry in fs::read_dir(proc).into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if let Some((name, run_dir)) = machine_of(&words) {
            let run_dir =
                run_dir.map(|dir| fs::read_link(entry.path().join("cwd")).unwrap_or_default().join(dir));
            found.push(Found { pid, name, run_dir });
        }
    }
    found.sort_unstable_by_key(|found| found.pid);
    found
}

/// What machines say of themselves, by their processes: those of `run_dir`, of the default one, and wherever else `found` are.
fn ask_machines(run_dir: &Path, found: &[Found]) -> BTreeMap<u32, MachineInfo> {
    if found.is_empty() {
        return BTreeMap::new();
    }
    let mut dirs: BTreeSet<PathBuf> = found.iter().filter_map(|found| found.run_dir.clone()).collect();
    dirs.insert(run_dir.to_owned());
    dirs.extend(control::run_dir_of_client(None));
    let (answers, come) = mpsc::channel();
    for dir in dirs {
        for name in vmm::control::names(&dir).unwrap_or_default() {
            let (answers, door) = (answers.clone(), vmm::control::door(&dir, &name));
            let ask = move || {
                let answer = client::get_within::<MachineInfo>(&door, "/v1/vm", PATIENCE);
                let _ = answers.send(answer.map(|answer| answer.value));
            };
            let _ = std::thread::Builder::new().spawn(ask);
        }
    }
    drop(answers);
    let mut told = BTreeMap::new();
    let end = Instant::now() + PATIENCE;
    while let Ok(answer) = come.recv_timeout(end.saturating_duration_since(Instant::now())) {
        told.extend(answer.ok().map(|told| (told.pid, told)));
    }
    told
}

/// The name of the machine that a process runs, by its command line, and the run directory that it names.
fn machine_of(words: &[u8]) -> Option<(String, Option<PathBuf>)> {
    let words: Vec<_> = words.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
    let program = Path::new(words.first()?.as_ref()).file_name()?.to_str()?.to_owned();
    // Commands that ask a machine end at once; none has a configuration as its first word.
    if program != "cableway" || words.get(1)? != "vm" || ASK.contains(&words.get(2)?.as_ref()) {
        return None;
    }
    let behind = |flag: &str| words.iter().position(|word| word == flag).and_then(|at| words.get(at + 1));
    let file = words.get(2).filter(|word| !word.starts_with('-'));
    let stem =
        || file.and_then(|file| Some(Path::new(file.as_ref()).file_stem()?.to_string_lossy().into_owned()));
    let given = behind("--vm").or_else(|| behind("--name")).map(ToString::to_string);
    let name = given.or_else(stem).unwrap_or_else(|| "vm".to_owned());
    Some((name, behind("--run-dir").map(|dir| PathBuf::from(dir.as_ref()))))
}

impl Process {
    /// A process that is no machine.
    fn new(proc: &Path, pid: u32, name: String) -> Self {
        let tasks = fs::read_dir(proc.join(pid.to_string()).join("task")).into_iter().flatten().flatten();
        let thread = |task: fs::DirEntry| {
            let id = task.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(task.path().join("stat")).ok()?;
            let times = fs::read_to_string(task.path().join("schedstat")).ok()?;
            thread(id, &stat, &times)
        };
        let mut threads: Vec<_> = tasks.filter_map(thread).collect();
        threads.sort_by_key(|thread: &Thread| thread.id);
        Self { pid, name, is_machine: false, told: None, threads }
    }
}

fn thread(id: u32, stat: &str, times: &str) -> Option<Thread> {
    let (before, after) = stat.rsplit_once(')')?;
    let name = before.split_once('(')?.1.to_owned();
    // The 39th number; the name is the second.
    let core = after.split_whitespace().nth(36)?.parse().ok()?;
    let mut times = times.split_whitespace().map(str::parse);
    let (ran, waited) = (times.next()?.ok()?, times.next()?.ok()?);
    Some(Thread { id, name, core, ran, waited })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_writes_is_read() {
        let cores = cores(
            "cpu  9 9 9 9 9 9 9 9 9 9\ncpu0 10 1 5 100 4 1 3 6 0 0\ncpu12 1 1 1 1 1 1 1 1 0 0\nintr 5\n",
        );
        assert_eq!(cores.keys().copied().collect::<Vec<_>>(), [0, 12]);
        assert_eq!((cores[&0].busy, cores[&0].steal, cores[&0].all), (20, 6, 130));
        let stat = "7 (a b) c) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 \
                    17 3 0 3 0 0 0 0 0 0 0 0 0 0 0";
        let read = thread(7, stat, "500 20 3\n").unwrap();
        assert_eq!((read.name.as_str(), read.ran, read.waited), ("a b) c", 500, 20));
        assert!(thread(7, "7 (a) S 1", "1 2 3").is_none());
        // Of this very thread, as the kernel tells it.
        let own = fs::read_to_string("/proc/thread-self/stat").unwrap();
        assert!(thread(1, &own, "1 2 3").is_some_and(|thread| thread.core < 4096), "{own}");
    }

    #[test]
    fn a_machine_is_known_by_its_command_line() {
        let read = |words: &str| machine_of(words.replace(' ', "\0").as_bytes());
        let of = |words: &str| read(words).map(|(name, _)| name);
        assert_eq!(of("/usr/bin/cableway vm node.toml --vm fw").as_deref(), Some("fw"));
        assert_eq!(of("cableway vm /etc/web.toml").as_deref(), Some("web"));
        assert_eq!(of("cableway vm --kernel k --name db").as_deref(), Some("db"));
        let dir = |words: &str| read(words).unwrap().1;
        assert_eq!(dir("cableway vm node.toml --vm fw --run-dir /run/x"), Some("/run/x".into()));
        assert_eq!(dir("cableway vm node.toml --vm fw"), None);
        assert_eq!(of("cableway vm console fw"), None);
        assert_eq!(of("cableway switch vm"), None);
        assert_eq!(of(""), None);
    }
}
