//! What the kernel counted on a core: interrupts and softirqs by name, who else ran there, time that a hypervisor kept, and what the
//! processor counted: SMIs.
//!
//! Owns the parsing of `/proc/interrupts`, `/proc/softirqs`, `/proc/stat` and each thread's `schedstat`. Differences of two readings,
//! never causes: the kernel does not say which gap was whose ([`super::trace`] does).

use std::collections::BTreeMap;
use std::fs;

use serde::Serialize;

use super::QuietError;

/// Counters, or the difference of two readings of them.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Disturbance {
    /// Interrupts on the core by name (`LOC: Local timer interrupts`), without those that did not happen.
    pub interrupts: BTreeMap<String, u64>,
    /// Softirqs on the core by name (`TIMER`), without those that did not happen.
    pub softirqs: BTreeMap<String, u64>,
    /// Who else ran there: threads by name, and how often each was scheduled (`migration/1`: for moving threads).
    pub threads: BTreeMap<String, u64>,
    /// System management interrupts, which the firmware takes and nobody else sees; none if the processor's counter cannot be read.
    pub smis: Option<u64>,
    /// How often the measuring thread gave the core up itself: by sleeping.
    pub voluntary_switches: u64,
    /// How often it was taken from it.
    pub involuntary_switches: u64,
    /// Milliseconds in which the host of this virtual machine ran something else, to 10 ms.
    pub stolen_ms: u64,
}

impl Disturbance {
    /// The counters of `core` and of the calling thread.
    pub(super) fn now(core: u32) -> Result<Self, QuietError> {
        let read = |path: &str| fs::read_to_string(path).map_err(|e| QuietError::Counters(path.into(), e));
        let status = read("/proc/thread-self/status")?;
        Ok(Self {
            interrupts: interrupts(&read("/proc/interrupts")?, core),
            softirqs: softirqs(&read("/proc/softirqs").unwrap_or_default(), core),
            threads: BTreeMap::new(),
            smis: smis(core),
            voluntary_switches: field(&status, "voluntary_ctxt_switches:"),
            involuntary_switches: field(&status, "nonvoluntary_ctxt_switches:"),
            stolen_ms: 10 * stolen(&read("/proc/stat")?, core),
        })
    }

    /// What was added since `before`.
    pub(super) fn since(&self, before: &Self) -> Self {
        let added = |now: &BTreeMap<String, u64>, before: &BTreeMap<String, u64>| {
            let added = |(name, &now): (&String, &u64)| {
                let added = now.saturating_sub(before.get(name).copied().unwrap_or(0));
                (added > 0).then(|| (name.clone(), added))
            };
            now.iter().filter_map(added).collect()
        };
        Self {
            interrupts: added(&self.interrupts, &before.interrupts),
            softirqs: added(&self.softirqs, &before.softirqs),
            threads: BTreeMap::new(),
            smis: self.smis.zip(before.smis).map(|(now, before)| now.saturating_sub(before)),
            voluntary_switches: self.voluntary_switches.saturating_sub(before.voluntary_switches),
            involuntary_switches: self.involuntary_switches.saturating_sub(before.involuntary_switches),
            stolen_ms: self.stolen_ms.saturating_sub(before.stolen_ms),
        }
    }
}

/// How often each thread of the machine was scheduled, and where it ran last.
pub(super) struct Runs(BTreeMap<(u32, u32), (String, u32, u64)>);

impl Runs {
    /// As it is now. Threads come and go meanwhile.
    pub(super) fn now() -> Self {
        let numbered = |folder: String| {
            let entries = fs::read_dir(folder).into_iter().flatten().flatten();
            entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()).collect::<Vec<_>>()
        };
        let mut runs = BTreeMap::new();
        for pid in numbered("/proc".to_owned()) {
            for tid in numbered(format!("/proc/{pid}/task")) {
                let of = |file: &str| fs::read_to_string(format!("/proc/{pid}/task/{tid}/{file}")).ok();
                let found =
                    of("stat").zip(of("schedstat")).and_then(|(stat, schedstat)| run(&stat, &schedstat));
                runs.extend(found.map(|found| ((pid, tid), found)));
            }
        }
        Self(runs)
    }

    /// Who ran on `core` since `before`, this process excepted: names and how often.
    pub(super) fn since(&self, before: &Self, core: u32) -> BTreeMap<String, u64> {
        let own = std::process::id();
        let mut ran = BTreeMap::new();
        for (thread, (name, _, runs)) in
            self.0.iter().filter(|((pid, _), found)| *pid != own && found.1 == core)
        {
            let added = runs.saturating_sub(before.0.get(thread).map_or(0, |found| found.2));
            if added > 0 {
                *ran.entry(name.clone()).or_default() += added;
            }
        }
        ran
    }
}

/// A thread's name, where it ran last (`stat`, field 39), and how often it was scheduled (`schedstat`, the third number; proc(5)).
fn run(stat: &str, schedstat: &str) -> Option<(String, u32, u64)> {
    let (begin, rest) = stat.rsplit_once(") ")?;
    let last = rest.split_whitespace().nth(39 - 3)?.parse().ok()?;
    let runs = schedstat.split_whitespace().nth(2)?.parse().ok()?;
    Some((begin.split_once('(')?.1.to_owned(), last, runs))
}

/// Intel's counter of SMIs (MSR_SMI_COUNT, 0x34), where the msr module lets it be read.
fn smis(core: u32) -> Option<u64> {
    use std::os::unix::fs::FileExt;
    let mut count = [0; 8];
    fs::File::open(format!("/dev/cpu/{core}/msr")).ok()?.read_exact_at(&mut count, 0x34).ok()?;
    Some(u64::from_le_bytes(count) & 0xffff_ffff)
}

/// `/proc/softirqs`: as `/proc/interrupts`, with names in place of numbers.
fn softirqs(text: &str, core: u32) -> BTreeMap<String, u64> {
    let mut lines = text.lines();
    let name = format!("CPU{core}");
    let Some(column) = lines.next().unwrap_or_default().split_whitespace().position(|cpu| cpu == name) else {
        return BTreeMap::new();
    };
    let line = |line: &str| {
        let (name, counts) = line.split_once(':')?;
        Some((name.trim().to_owned(), counts.split_whitespace().nth(column)?.parse().ok()?))
    };
    lines.filter_map(line).collect()
}

/// `/proc/interrupts`: a header that names the cores, then a line for each interrupt, a column for each core (proc(5)).
fn interrupts(text: &str, core: u32) -> BTreeMap<String, u64> {
    let mut lines = text.lines();
    let header = lines.next().unwrap_or_default();
    let name = format!("CPU{core}");
    let Some(column) = header.split_whitespace().position(|cpu| cpu == name) else { return BTreeMap::new() };
    let columns = header.split_whitespace().count();
    let line = |line: &str| {
        let (id, rest) = line.split_once(':')?;
        let words: Vec<&str> = rest.split_whitespace().collect();
        // Lines without a column for each core (ERR, MIS) are of no core.
        let count = words.get(column)?.parse().ok()?;
        let what = words.get(columns..).filter(|w| !w.is_empty())?.join(" ");
        Some((format!("{}: {what}", id.trim()), count))
    };
    lines.filter_map(line).collect()
}

/// The number behind `name` at the beginning of a line.
fn field(text: &str, name: &str) -> u64 {
    text.lines().find_map(|l| l.strip_prefix(name)?.trim().parse().ok()).unwrap_or(0)
}

/// Ticks of 10 ms that were stolen from `core`: the eighth number of its line in `/proc/stat` (proc(5)).
fn stolen(text: &str, core: u32) -> u64 {
    let name = format!("cpu{core}");
    let line = text.lines().find(|l| l.split(' ').next() == Some(&name));
    line.and_then(|l| l.split_whitespace().nth(8)?.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERRUPTS: &str = "\
            CPU0       CPU2
  24:         17          3  PCI-MSI 512-edge      eth0-rx-0
 LOC:     901552    1048576  Local timer interrupts
 RES:          5          0  Rescheduling interrupts
 ERR:          9
 MIS:          0
";

    #[test]
    fn interrupts_are_those_of_the_core_even_where_another_is_offline() {
        let on_2 = interrupts(INTERRUPTS, 2);
        assert_eq!(on_2["LOC: Local timer interrupts"], 1_048_576);
        assert_eq!(on_2["24: PCI-MSI 512-edge eth0-rx-0"], 3);
        assert_eq!(on_2.len(), 3, "ERR and MIS are of no core: {on_2:?}");
        assert!(interrupts(INTERRUPTS, 1).is_empty());
        assert!(interrupts("", 0).is_empty());
    }

    #[test]
    fn softirqs_and_other_threads_are_those_of_the_core() {
        let text = "                    CPU0       CPU2\n          HI:          0          3\n       TIMER:        512         77\n";
        assert_eq!(softirqs(text, 2), BTreeMap::from([("HI".to_owned(), 3), ("TIMER".to_owned(), 77)]));
        assert!(softirqs(text, 1).is_empty());

        let stat = format!("7 (kworker/2:1) (x) S {}2 0 0\n", "0 ".repeat(35));
        assert_eq!(run(&stat, "100 200 9\n"), Some(("kworker/2:1) (x".to_owned(), 2, 9)));
        assert_eq!(run("7 (x) S 0", "1 2 3"), None);
        let runs = |all: &[(u32, &str, u32, u64)]| {
            Runs(
                all.iter()
                    .map(|(tid, name, core, runs)| ((1, *tid), ((*name).to_owned(), *core, *runs)))
                    .collect(),
            )
        };
        let before = runs(&[(5, "migration/2", 2, 10), (6, "bash", 1, 4)]);
        let now = runs(&[(5, "migration/2", 2, 13), (6, "bash", 1, 9), (7, "new", 2, 1), (8, "new", 2, 1)]);
        let ran = now.since(&before, 2);
        assert_eq!(ran, BTreeMap::from([("migration/2".to_owned(), 3), ("new".to_owned(), 2)]));
    }

    #[test]
    fn a_difference_leaves_out_what_did_not_happen() {
        let before =
            Disturbance { interrupts: interrupts(INTERRUPTS, 0), stolen_ms: 20, ..Default::default() };
        let now = INTERRUPTS.replace("901552", "901600");
        let now = Disturbance {
            interrupts: interrupts(&now, 0),
            involuntary_switches: 4,
            stolen_ms: 50,
            ..Default::default()
        };
        let since = now.since(&before);
        assert_eq!(since.interrupts, BTreeMap::from([("LOC: Local timer interrupts".to_owned(), 48)]));
        assert_eq!((since.involuntary_switches, since.stolen_ms), (4, 30));
    }

    #[test]
    fn switches_and_stolen_time_are_found_by_name() {
        let status = "Name:\tx\nvoluntary_ctxt_switches:\t12\nnonvoluntary_ctxt_switches:\t3\n";
        assert_eq!(
            (field(status, "voluntary_ctxt_switches:"), field(status, "nonvoluntary_ctxt_switches:")),
            (12, 3)
        );
        let stat = "cpu  1 2 3 4 5 6 7 8 9 10\ncpu1 1 1 1 1 1 1 1 77 0 0\ncpu10 1 1 1 1 1 1 1 5 0 0\n";
        assert_eq!((stolen(stat, 1), stolen(stat, 10), stolen(stat, 2)), (77, 5, 0));
    }

    #[test]
    fn this_machine_is_understood() {
        let core = host::topology::permitted_cores().unwrap().iter().next().unwrap();
        let now = Disturbance::now(core).unwrap();
        assert!(now.interrupts.keys().any(|name| name.starts_with("LOC: ")), "{now:?}");
    }
}
