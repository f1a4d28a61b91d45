//! What the kernel did on a core during its longest gaps, from the kernel's own trace.
//!
//! Owns an instance of tracefs while it lives: interrupts, softirqs and switches of the measured cores, stamped with the same
//! time-stamp counter that the busy loop reads. Each event costs its core some 100 ns more, so that nobody traces who is not asked to.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::PathBuf;

use host::topology::CoreSet;

use super::QuietError;

/// Events that tell who has the core (Linux, Documentation/trace/events.rst); not every kernel has all.
const EVENTS: [&str; 10] = [
    "irq/irq_handler_entry",
    "irq/softirq_entry",
    "irq_vectors/local_timer_entry",
    "irq_vectors/reschedule_entry",
    "irq_vectors/call_function_entry",
    "irq_vectors/call_function_single_entry",
    "irq_vectors/irq_work_entry",
    "nmi/nmi_handler",
    "sched/sched_switch",
    "sched/sched_migrate_task",
];

/// What an instance is called, with the process behind it.
const NAME: &str = "cableway-";

/// What a core's buffer holds, in KiB: some 100,000 events.
const BUFFER_KIB: u32 = 8_192;

/// A trace that runs.
pub(super) struct Trace {
    folder: PathBuf,
}

/// An event: when, and what of it is told.
#[derive(Debug, PartialEq)]
struct Event {
    at: u64,
    what: String,
}

impl Trace {
    /// Begins, on these cores.
    pub(super) fn start(cores: &[u32]) -> Result<Self, QuietError> {
        let failed = |error| QuietError::Trace(error);
        let tracefs = tracefs()?;
        // What was left by one who was killed goes on costing.
        for entry in fs::read_dir(tracefs.join("instances")).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let pid = name.to_str().and_then(|name| name.strip_prefix(NAME)?.parse::<u32>().ok());
            if pid.is_some_and(|pid| !PathBuf::from(format!("/proc/{pid}")).exists()) {
                drop(Self { folder: entry.path() });
            }
        }
        let folder = tracefs.join(format!("instances/{NAME}{}", std::process::id()));
        fs::create_dir(&folder).map_err(failed)?;
        let trace = Self { folder };
        trace.arrange(cores).map_err(failed)?;
        Ok(trace)
    }

    fn arrange(&self, cores: &[u32]) -> io::Result<()> {
        let write = |file: &str, text: &str| fs::write(self.folder.join(file), text);
        write("tracing_on", "0")?;
        write("trace_clock", "x86-tsc")?;
        write("tracing_cpumask", &cores.iter().copied().collect::<CoreSet>().mask())?;
        for core in cores {
            write(&format!("per_cpu/cpu{core}/buffer_size_kb"), &BUFFER_KIB.to_string())?;
        }
        for event in EVENTS {
            if self.folder.join("events").join(event).exists() {
                write(&format!("events/{event}/enable"), "1")?;
            }
        }
        write("tracing_on", "1")
    }

    /// Ends it; what it holds can still be read.
    pub(super) fn stop(&self) -> Result<(), QuietError> {
        fs::write(self.folder.join("tracing_on"), "0").map_err(QuietError::Trace)
    }

    /// What happened on `core` during each of these times, given by begin and end in ticks of the counter.
    pub(super) fn during(&self, core: u32, times: &[(u64, u64)]) -> Result<Vec<Vec<String>>, QuietError> {
        let file = self.folder.join(format!("per_cpu/cpu{core}/trace"));
        let text = fs::read_to_string(file).map_err(QuietError::Trace)?;
        Ok(attribute(&text, times))
    }
}

/// Where tracefs is.
///
/// # Errors
/// Nowhere, or nothing can be traced there.
pub(super) fn tracefs() -> Result<PathBuf, QuietError> {
    let mounts = fs::read_to_string("/proc/self/mounts").map_err(QuietError::Trace)?;
    let tracefs = mounts.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip(1);
        let place = words.next()?;
        (words.next()? == "tracefs").then(|| PathBuf::from(place))
    });
    let hint = "tracefs is not mounted: mount -t tracefs tracefs /sys/kernel/tracing";
    let tracefs = tracefs.ok_or_else(|| QuietError::Trace(io::Error::other(hint)))?;
    nix::unistd::access(&tracefs.join("instances"), nix::unistd::AccessFlags::W_OK)
        .map_err(|error| QuietError::Trace(error.into()))?;
    Ok(tracefs)
}

impl Drop for Trace {
    fn drop(&mut self) {
        let _ = fs::write(self.folder.join("tracing_on"), "0");
        let _ = fs::write(self.folder.join("events/enable"), "0");
        let _ = fs::remove_dir(&self.folder);
    }
}

fn attribute(text: &str, times: &[(u64, u64)]) -> Vec<Vec<String>> {
    let events: Vec<Event> = text.lines().filter_map(event).collect();
    let first = events.first().map_or(u64::MAX, |event| event.at);
    let overrun = text.lines().any(|line| {
        // `# entries-in-buffer/entries-written: 12/345   #P:2`
        let counts = line.strip_prefix("# entries-in-buffer/entries-written: ");
        let counts = counts.and_then(|counts| counts.split_whitespace().next()?.split_once('/'));
        counts.is_some_and(|(held, written)| held != written)
    });
    times
        .iter()
        .map(|&(begin, end)| {
            if overrun && begin < first {
                return vec!["the trace does not go back so far".to_owned()];
            }
            let mut seen: BTreeMap<&str, u32> = BTreeMap::new();
            for event in events.iter().filter(|event| (begin..=end).contains(&event.at)) {
                *seen.entry(&event.what).or_default() += 1;
            }
            if seen.is_empty() {
                return vec![
                    "nothing of this kernel's (firmware, a hypervisor, the core's other thread)".to_owned(),
                ];
            }
            let mut seen: Vec<_> = seen.into_iter().collect();
            seen.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
            let told = |(what, count): (&str, u32)| {
                if count > 1 { format!("{what} x {count}") } else { what.to_owned() }
            };
            seen.into_iter().map(told).collect()
        })
        .collect()
}

/// `  bash-812   [001] d.h1. 123456: local_timer_entry: vector=236`
fn event(line: &str) -> Option<Event> {
    if line.starts_with('#') {
        return None;
    }
    // The name of a thread may hold anything.
    let (_, rest) = line.split_once("] ")?;
    let (stamp, rest) = rest.split_once(": ")?;
    let at = stamp.split_whitespace().last()?.parse().ok()?;
    let (name, details) = rest.split_once(':')?;
    let value = |key: &str, until: &str| {
        let (_, rest) = details.split_once(&format!("{key}="))?;
        Some(rest.split_once(until).map_or(rest, |(value, _)| value).trim().to_owned())
    };
    let what = match name {
        "local_timer_entry" => "timer".to_owned(),
        "irq_handler_entry" => format!("interrupt {} ({})", value("irq", " ")?, value("name", "\n")?),
        "softirq_entry" => format!("softirq {}", value("action", "]")?),
        "sched_switch" => match value("next_comm", " next_pid=")? {
            idle if idle.starts_with("swapper/") => return None,
            name => format!("thread {name}"),
        },
        "sched_migrate_task" => format!("migration of {}", value("comm", " pid=")?),
        "nmi_handler" => "NMI".to_owned(),
        vector => vector.trim_end_matches("_entry").replace('_', " "),
    };
    Some(Event { at, what })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "\
# tracer: nop
#
# entries-in-buffer/entries-written: 7/7   #P:2
#
            a] b-812     [001] d.h1. 1000: local_timer_entry: vector=236
            a] b-812     [001] ..s1. 1010: softirq_entry: vec=1 [action=TIMER]
            a] b-812     [001] d..2. 1020: sched_switch: prev_comm=a] b prev_pid=812 prev_prio=120 prev_state=R ==> next_comm=kworker/1:1 next_pid=60 next_prio=120
     kworker/1:1-60      [001] d..2. 1400: sched_switch: prev_comm=kworker/1:1 prev_pid=60 prev_prio=120 prev_state=I ==> next_comm=quiet next_pid=812 next_prio=120
           quiet-812     [001] d.h1. 5000: irq_handler_entry: irq=24 name=eth0-rx-0
           quiet-812     [001] d.h1. 5100: reschedule_entry: vector=253
           quiet-812     [001] d.h1. 5200: reschedule_entry: vector=253
";

    #[test]
    fn a_gap_is_told_with_whatever_happened_in_it() {
        let told = attribute(TRACE, &[(990, 1500), (4900, 5300), (6000, 7000)]);
        assert_eq!(told[0], ["softirq TIMER", "thread kworker/1:1", "thread quiet", "timer"]);
        assert_eq!(told[1], ["reschedule x 2", "interrupt 24 (eth0-rx-0)"]);
        assert!(told[2][0].starts_with("nothing of this kernel's"), "{told:?}");
    }

    #[test]
    fn what_the_trace_has_lost_is_not_told_as_nothing() {
        let short = TRACE.replace("7/7", "7/900");
        assert_eq!(attribute(&short, &[(10, 20)])[0], ["the trace does not go back so far"]);
        assert!(attribute(TRACE, &[(10, 20)])[0][0].starts_with("nothing"));
        assert!(attribute("", &[(10, 20)])[0][0].starts_with("nothing"));
    }
}
