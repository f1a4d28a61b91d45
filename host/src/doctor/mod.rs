//! What on this machine stands in the way of fast packets: one named check for each trap, with what was found and the fix.
//!
//! Owns the checks that need only the kernel's files, read below a root that the caller gives. Changes nothing, needs no
//! privilege to answer (what it may not read it says).

mod cores;
mod devices;
mod memory;
mod threads;

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::pci::Bdf;
use crate::topology::CoreSet;

/// How a check ended. In the order of severity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// There is nothing here that it could be about.
    NotApplicable,
    /// As it should be.
    Ok,
    /// Works, and costs latency or safety.
    Warning,
    /// Something does not work.
    Error,
}

impl State {
    /// For tables.
    pub fn word(self) -> &'static str {
        match self {
            Self::NotApplicable => "n/a",
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// What a check found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The check's name.
    pub name: &'static str,
    /// How it ended.
    pub state: State,
    /// What there is.
    pub found: String,
    /// Why it matters.
    pub why: &'static str,
    /// What to do, unless all is well.
    pub fix: Option<String>,
}

/// What a check says, before it has a name.
#[derive(Debug)]
pub struct Outcome {
    state: State,
    found: String,
    fix: Option<String>,
}

impl Outcome {
    /// As it should be.
    pub fn ok(found: impl Into<String>) -> Self {
        Self { state: State::Ok, found: found.into(), fix: None }
    }

    /// Not about this machine.
    pub fn not_applicable(found: impl Into<String>) -> Self {
        Self { state: State::NotApplicable, found: found.into(), fix: None }
    }

    /// Works, at a price.
    pub fn warning(found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { state: State::Warning, found: found.into(), fix: Some(fix.into()) }
    }

    /// Does not work.
    pub fn error(found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { state: State::Error, found: found.into(), fix: Some(fix.into()) }
    }

    /// With its name, and why it matters.
    pub fn named(self, name: &'static str, why: &'static str) -> Finding {
        Finding { name, state: self.state, found: self.found, why, fix: self.fix }
    }
}

/// What the machine is to be good for: checks that matter to nothing of it are left out.
#[derive(Clone, Debug)]
pub struct Needs {
    /// Cores that poll or run vCPUs; empty: not decided yet, so that all but the first are looked at.
    pub busy_cores: CoreSet,
    /// Network cards by VFIO.
    pub cards: bool,
    /// These; empty: all that there are.
    pub devices: Vec<Bdf>,
    /// Virtual machines.
    pub machines: bool,
    /// vCPUs as real-time threads.
    pub real_time: bool,
}

impl Needs {
    /// Everything, on cores that nobody chose yet.
    pub fn everything() -> Self {
        Self {
            busy_cores: CoreSet::default(),
            cards: true,
            devices: Vec::new(),
            machines: true,
            // Only a file says that they are to be.
            real_time: false,
        }
    }
}

/// The machine, as its files show it.
pub struct Host {
    root: PathBuf,
    needs: Needs,
}

/// A check: its name, why it matters, whether it is about what is needed, and how to do it.
struct Check {
    name: &'static str,
    why: &'static str,
    matters: fn(&Needs) -> bool,
    run: fn(&Host) -> Outcome,
}

fn always(_: &Needs) -> bool {
    true
}

fn with_cards(needs: &Needs) -> bool {
    needs.cards
}

impl Host {
    /// The machine below `root` (`/`), for these needs.
    pub fn new(root: &Path, needs: Needs) -> Self {
        Self { root: root.to_owned(), needs }
    }

    /// Does all checks, in the order in which one would repair things.
    pub fn findings(&self) -> Vec<Finding> {
        let checks = cores::CHECKS.iter().chain(threads::CHECKS).chain(memory::CHECKS).chain(devices::CHECKS);
        let matter = checks.filter(|check| (check.matters)(&self.needs));
        matter.map(|check| (check.run)(self).named(check.name, check.why)).collect()
    }

    fn path(&self, file: &str) -> PathBuf {
        self.root.join(file.trim_start_matches('/'))
    }

    /// The text of a file, without its last line's end; `None` if it is not there or not for us.
    fn text(&self, file: &str) -> Option<String> {
        Some(fs::read_to_string(self.path(file)).ok()?.trim().to_owned())
    }

    fn exists(&self, file: &str) -> bool {
        self.path(file).exists()
    }

    /// A list of cores, empty if there is none.
    fn cores(&self, file: &str) -> CoreSet {
        self.text(file).and_then(|text| text.parse().ok()).unwrap_or_default()
    }

    /// Cores that poll or will: those that were named, else all but the first.
    fn busy_cores(&self) -> CoreSet {
        if !self.needs.busy_cores.is_empty() {
            return self.needs.busy_cores.clone();
        }
        let online = self.cores("sys/devices/system/cpu/online");
        online.iter().skip(1).collect()
    }
}

/// What this process may do beyond its limits and other users' files (linux/capability.h).
#[derive(Clone, Copy)]
enum Capability {
    DacOverride = 1,
    IpcLock = 14,
    SysNice = 23,
}

impl Host {
    /// Whether this process has it.
    fn capable(&self, of: Capability) -> bool {
        let status = self.text("proc/self/status").unwrap_or_default();
        let effective = status
            .lines()
            .find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok());
        effective.is_some_and(|caps| caps >> of as u32 & 1 == 1)
    }

    /// A limit of this process, as `/proc/self/limits` names and writes it.
    fn limit(&self, name: &str) -> Option<String> {
        let limits = self.text("proc/self/limits")?;
        let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.split_whitespace().next()?.to_owned())
    }
}

/// A switch of the kernel that should have a value: what it is now, what becomes of it.
fn knob(host: &Host, file: &str, good: &[&str], write: &str) -> Outcome {
    match host.text(file) {
        None => Outcome::not_applicable(format!("this kernel has no /{file}")),
        Some(now) if good.contains(&now.as_str()) => Outcome::ok(now),
        Some(now) => Outcome::warning(now, format!("echo {write} > /{file}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine as files.
    pub(super) struct Machine(tempfile::TempDir);

    impl Machine {
        pub(super) fn with(files: &[(&str, &str)]) -> Self {
            let machine = Self(tempfile::tempdir().unwrap());
            for (path, text) in files {
                let path = machine.0.path().join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            machine
        }

        pub(super) fn root(&self) -> &Path {
            self.0.path()
        }

        pub(super) fn finding(&self, name: &str, needs: Needs) -> Finding {
            let findings = Host::new(self.root(), needs).findings();
            findings.into_iter().find(|f| f.name == name).unwrap_or_else(|| panic!("no check {name}"))
        }

        /// Checks that `name` ends as `state`, found and fix holding these words.
        pub(super) fn says(&self, name: &str, state: State, words: &str) {
            let finding = self.finding(name, Needs::everything());
            let text = format!("{} {}", finding.found, finding.fix.clone().unwrap_or_default());
            assert!(finding.state == state && text.contains(words), "{finding:?}");
        }
    }

    #[test]
    fn a_machine_without_files_is_judged_without_a_panic_and_every_complaint_has_a_fix() {
        let machine = Machine::with(&[]);
        let findings = Host::new(machine.root(), Needs::everything()).findings();
        assert!(findings.len() >= 30, "{}", findings.len());
        for finding in &findings {
            assert_eq!(finding.fix.is_some(), finding.state >= State::Warning, "{finding:?}");
            assert!(!finding.found.is_empty() && !finding.why.is_empty(), "{finding:?}");
        }
        let mut names: Vec<_> = findings.iter().map(|f| f.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), findings.len(), "a name is there twice");
    }

    #[test]
    fn what_nobody_needs_is_not_checked() {
        let machine = Machine::with(&[]);
        let needs = Needs { cards: false, ..Needs::everything() };
        let findings = Host::new(machine.root(), needs).findings();
        assert!(findings.iter().all(|f| f.name != "iommu" && f.name != "vfio"), "{findings:?}");
        assert!(findings.iter().any(|f| f.name == "clock"));
    }

    #[test]
    fn this_machine_can_be_judged() {
        let findings = Host::new(Path::new("/"), Needs::everything()).findings();
        assert!(findings.iter().any(|f| f.state == State::Ok), "{findings:?}");
    }
}
