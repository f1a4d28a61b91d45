//! What the kernel counted on a core: interrupts by name, switches to other threads, time that a hypervisor kept.
//!
//! Owns the parsing of `/proc/interrupts`, `/proc/stat` and `/proc/thread-self/status`. Differences of two readings, never
//! causes: the kernel does not say which gap was whose.

use std::collections::BTreeMap;
use std::fs;

use serde::Serialize;

use super::QuietError;

/// Counters, or the difference of two readings of them.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Disturbance {
    /// Interrupts on the core by name (`LOC: Local timer interrupts`), without those that did not happen.
    pub interrupts: BTreeMap<String, u64>,
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
            voluntary_switches: field(&status, "voluntary_ctxt_switches:"),
            involuntary_switches: field(&status, "nonvoluntary_ctxt_switches:"),
            stolen_ms: 10 * stolen(&read("/proc/stat")?, core),
        })
    }

    /// What was added since `before`.
    pub(super) fn since(&self, before: &Self) -> Self {
        let added = |(name, &now): (&String, &u64)| {
            let added = now.saturating_sub(before.interrupts.get(name).copied().unwrap_or(0));
            (added > 0).then(|| (name.clone(), added))
        };
        Self {
            interrupts: self.interrupts.iter().filter_map(added).collect(),
            voluntary_switches: self.voluntary_switches.saturating_sub(before.voluntary_switches),
            involuntary_switches: self.involuntary_switches.saturating_sub(before.involuntary_switches),
            stolen_ms: self.stolen_ms.saturating_sub(before.stolen_ms),
        }
    }
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
