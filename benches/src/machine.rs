//! The machine that a measurement was made on, in the words that explain a difference between two of them.

use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

/// What a report says of the machine.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// The processor's model.
    pub cpu: String,
    /// Cores that this process may use.
    pub cores: usize,
    /// Whether it is a virtual machine: its cores may be shared with others at any time.
    pub virtual_machine: bool,
    /// Frequency of the time stamp counter in Hz.
    pub tsc_hz: u64,
    /// Whether the counter is invariant.
    pub tsc_invariant: bool,
    /// Kernel release.
    pub kernel: String,
    /// Boot parameters that matter: isolcpus, nohz_full, …
    pub tuning: Vec<String>,
    /// Huge pages: total and free, by size.
    pub huge_pages: Vec<String>,
    /// When, in UTC.
    pub date: String,
    /// Version of this program.
    pub version: &'static str,
}

impl Machine {
    /// Reads it from below `root` (`/`).
    pub fn read(root: &Path) -> Self {
        let text = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
        let cpuinfo = text("proc/cpuinfo");
        let field = |name: &str| {
            cpuinfo
                .lines()
                .find(|l| l.starts_with(name))
                .and_then(|l| l.split_once(": "))
                .map(|(_, v)| v.trim())
        };
        let interesting =
            ["isolcpus", "nohz_full", "rcu_nocbs", "mitigations", "idle=", "intel_idle", "processor."];
        let pools = host::topology::huge_pools(root);
        let pools = pools
            .iter()
            .filter(|p| p.total > 0)
            .map(|p| format!("{} of {} MiB on node {}, {} free", p.total, p.page_size >> 20, p.node, p.free));
        Self {
            cpu: field("model name").unwrap_or("unknown").to_owned(),
            cores: host::topology::permitted_cores().map_or(0, |c| c.len()),
            virtual_machine: field("flags").is_some_and(|f| f.split(' ').any(|f| f == "hypervisor")),
            tsc_hz: host::cpu::tsc_hz(),
            tsc_invariant: host::cpu::tsc_is_invariant(),
            kernel: text("proc/sys/kernel/osrelease").trim().to_owned(),
            tuning: text("proc/cmdline")
                .split_whitespace()
                .filter(|word| interesting.iter().any(|i| word.starts_with(i)))
                .map(str::to_owned)
                .collect(),
            huge_pages: pools.collect(),
            date: date(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())),
            version: env!("CARGO_PKG_VERSION"),
        }
    }

    /// Label and value, for people.
    pub fn lines(&self) -> Vec<(&'static str, String)> {
        let or_none = |list: &[String]| if list.is_empty() { "none".to_owned() } else { list.join(", ") };
        let kind = if self.virtual_machine { " (a virtual machine)" } else { "" };
        let invariant = if self.tsc_invariant { "invariant" } else { "not invariant: times are not exact" };
        vec![
            ("Processor", format!("{}{kind}, {} cores for this program", self.cpu, self.cores)),
            ("Time stamp counter", format!("{:.3} GHz, {invariant}", self.tsc_hz as f64 / 1e9)),
            ("Kernel", self.kernel.clone()),
            ("Isolation", or_none(&self.tuning)),
            ("Huge pages", or_none(&self.huge_pages)),
            ("Date", self.date.clone()),
            ("Cableway", self.version.to_owned()),
        ]
    }
}

/// Seconds since 1970 as `2026-01-31 12:34 UTC` (days to civil date after Howard Hinnant).
fn date(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let era = days / 146_097;
    let day_of_era = days % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march + 2) / 5 + 1;
    let month = if march < 10 { march + 3 } else { march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02} {:02}:{:02} UTC", second / 3_600, second / 60 % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(date(0), "1970-01-01 00:00 UTC");
        assert_eq!(date(951_782_399), "2000-02-28 23:59 UTC");
        assert_eq!(date(951_782_400), "2000-02-29 00:00 UTC");
        assert_eq!(date(1_798_761_599), "2026-12-31 23:59 UTC");
    }

    #[test]
    fn a_machine_is_described_from_its_files() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("proc/cpuinfo", "processor\t: 0\nmodel name\t: Test CPU 9000\nflags\t\t: fpu hypervisor sse\n");
        write("proc/sys/kernel/osrelease", "6.12.1-rt\n");
        write("proc/cmdline", "root=/dev/vda isolcpus=1 quiet nohz_full=1\n");
        let machine = Machine::read(root.path());
        assert_eq!((machine.cpu.as_str(), machine.virtual_machine), ("Test CPU 9000", true));
        assert_eq!(machine.kernel, "6.12.1-rt");
        assert_eq!(machine.tuning, ["isolcpus=1", "nohz_full=1"]);
        assert!(machine.lines().iter().any(|(_, v)| v.contains("a virtual machine")));
    }
}
