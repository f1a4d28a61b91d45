//! Tuning: the kernel's knobs that a host of packets wants set otherwise, and everything back as it was.
//!
//! Owns what is done with a profile's knobs: looking, setting, and giving back. What the knobs are is data
//! ([`profile`]); what was found before is on disk before anything is changed ([`saved`]).

pub mod profile;
pub mod saved;

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::topology::CoreSet;
use profile::{Form, Knob, Profile};
use saved::{Saved, SavedError};

/// The cores of a machine, as a profile divides them.
#[derive(Clone, Debug)]
pub struct Division {
    /// Those that poll or run vCPUs.
    pub isolated: CoreSet,
    /// All others that are online.
    pub housekeeping: CoreSet,
}

/// Why cores cannot be divided so.
#[derive(Debug, thiserror::Error)]
pub enum DivisionError {
    /// Nothing would be left.
    #[error("all cores ({0}) would be isolated: leave at least one to everything else")]
    NothingLeft(CoreSet),
    /// Not there.
    #[error("core {core} does not exist or is offline; this machine has {online}")]
    Missing {
        /// The core.
        core: u32,
        /// What there is.
        online: CoreSet,
    },
}

impl Division {
    /// `isolated` apart from what else is online.
    ///
    /// # Errors
    /// A core that is not there, or none would be left.
    pub fn new(isolated: CoreSet, online: &CoreSet) -> Result<Self, DivisionError> {
        if let Some(core) = isolated.iter().find(|core| !online.contains(*core)) {
            return Err(DivisionError::Missing { core, online: online.clone() });
        }
        let housekeeping: CoreSet = online.iter().filter(|core| !isolated.contains(*core)).collect();
        if housekeeping.is_empty() {
            return Err(DivisionError::NothingLeft(isolated));
        }
        Ok(Self { isolated, housekeeping })
    }

    /// `text` with this division's cores in place of their names.
    pub fn fill(&self, text: &str) -> String {
        text.replace("{isolated}", &self.isolated.to_string())
            .replace("{housekeeping}", &self.housekeeping.to_string())
            .replace("{housekeeping:mask}", &mask(&self.housekeeping))
    }
}

/// What became of a knob.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Effect {
    /// It is as it should be.
    AsWanted,
    /// It is not, and was not touched.
    Differs,
    /// It was set.
    Set,
    /// It was put back.
    GivenBack,
    /// The kernel does not want it: with its reason.
    Refused(String),
    /// This kernel has none.
    Missing,
}

/// One file of a knob.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// The knob's name.
    pub knob: String,
    /// The file.
    pub file: PathBuf,
    /// What it holds, or held before.
    pub now: String,
    /// What it should hold.
    pub wanted: String,
    /// What became of it.
    pub effect: Effect,
}

/// Looks at every knob of a profile.
pub fn check(root: &Path, profile: &Profile, division: &Division) -> Vec<Line> {
    let mut lines = Vec::new();
    for knob in &profile.knobs {
        let wanted = division.fill(&knob.value);
        let files = knob.files(root);
        if files.is_empty() {
            let file = PathBuf::from(&knob.file);
            lines.push(Line {
                knob: knob.name.clone(),
                file,
                now: "-".to_owned(),
                wanted: wanted.clone(),
                effect: Effect::Missing,
            });
        }
        for file in files {
            let (now, effect) = match read(root, &file, knob.form) {
                Ok(now) if good(knob, &now, &wanted) => (now, Effect::AsWanted),
                Ok(now) => (now, Effect::Differs),
                Err(error) => ("-".to_owned(), Effect::Refused(error.to_string())),
            };
            lines.push(Line { knob: knob.name.clone(), file, now, wanted: wanted.clone(), effect });
        }
    }
    lines
}

/// Sets every knob that is not as it should be. What it held is written to `saved` first; what was saved by an earlier call stays
/// what is given back.
///
/// # Errors
/// Nothing could be saved, and nothing was changed. What the kernel refuses is in the lines, and no error.
pub fn apply(
    root: &Path,
    profile: &Profile,
    division: &Division,
    saved: &Path,
) -> Result<Vec<Line>, SavedError> {
    let mut lines = check(root, profile, division);
    let form = |name: &str| {
        profile.knobs.iter().find(|knob| knob.name == name).map_or(Form::Plain, |knob| knob.form)
    };
    let mut record = Saved::read(saved)?.unwrap_or_default();
    for line in lines.iter().filter(|line| line.effect == Effect::Differs) {
        record.add(&line.knob, &line.file, &line.now, form(&line.knob));
    }
    record.write(saved)?;
    for line in lines.iter_mut().filter(|line| line.effect == Effect::Differs) {
        line.effect = match write(root, &line.file, &line.wanted) {
            Ok(()) => match read(root, &line.file, form(&line.knob)) {
                Ok(now) if same(&now, &line.wanted, form(&line.knob)) => Effect::Set,
                Ok(now) => Effect::Refused(format!("it holds {now} after it was written")),
                Err(error) => Effect::Refused(error.to_string()),
            },
            Err(error) => Effect::Refused(error.to_string()),
        };
    }
    Ok(lines)
}

/// Puts everything back that is in `saved`, the last first, and forgets it. What cannot be put back stays saved.
///
/// # Errors
/// What is saved cannot be read, is not to be trusted, or cannot be written.
pub fn restore(root: &Path, saved: &Path) -> Result<Vec<Line>, SavedError> {
    let Some(mut record) = Saved::read(saved)? else { return Ok(Vec::new()) };
    let mut lines = Vec::new();
    let mut left = Vec::new();
    while let Some(entry) = record.entries.pop() {
        let now = read(root, &entry.file, entry.form);
        let effect = match &now {
            Ok(now) if same(now, &entry.before, entry.form) => Effect::AsWanted,
            // A device that is gone took its knobs with it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Effect::Missing,
            _ => match write(root, &entry.file, &entry.before) {
                Ok(()) => Effect::GivenBack,
                Err(error) => Effect::Refused(error.to_string()),
            },
        };
        lines.push(Line {
            knob: entry.knob.clone(),
            file: entry.file.clone(),
            now: now.unwrap_or_else(|_| "-".to_owned()),
            wanted: entry.before.clone(),
            effect: effect.clone(),
        });
        if matches!(effect, Effect::Refused(_)) {
            left.push(entry);
        }
    }
    left.reverse();
    record.entries = left;
    record.write(saved)?;
    Ok(lines)
}

/// Whether a knob's value is as it should be.
fn good(knob: &Knob, now: &str, wanted: &str) -> bool {
    same(now, wanted, knob.form) || knob.keep.iter().any(|keep| keep == now)
}

/// Whether two texts mean the same.
fn same(a: &str, b: &str, form: Form) -> bool {
    match form {
        Form::Plain | Form::Choice => a == b,
        Form::Cores => a.parse::<CoreSet>().ok().zip(b.parse::<CoreSet>().ok()).is_some_and(|(a, b)| a == b),
        Form::Mask => digits(a) == digits(b),
    }
}

/// A mask without what makes no difference: commas, leading zeros.
fn digits(mask: &str) -> String {
    mask.replace(',', "").trim_start_matches('0').to_lowercase()
}

/// A set of cores as the kernel writes masks: 32 bits a group, the highest first.
fn mask(cores: &CoreSet) -> String {
    let highest = cores.iter().max().unwrap_or(0);
    let group = |n: u32| -> u32 {
        cores.iter().filter(|core| core / 32 == n).fold(0, |bits, core| bits | 1 << (core % 32))
    };
    let groups: Vec<String> = (0..=highest / 32).rev().map(|n| format!("{:08x}", group(n))).collect();
    groups.join(",")
}

/// What a file says, in a word: of a choice what is chosen (`always [madvise] never`).
fn read(root: &Path, file: &Path, form: Form) -> io::Result<String> {
    let text = fs::read_to_string(below(root, file))?;
    let text = text.trim();
    let chosen = || text.split_once('[')?.1.split_once(']').map(|(chosen, _)| chosen);
    Ok(match form {
        Form::Choice => chosen().unwrap_or(text).to_owned(),
        _ => text.to_owned(),
    })
}

/// One write, which is one order to the kernel. The file is not made.
fn write(root: &Path, file: &Path, value: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).truncate(true).open(below(root, file))?;
    file.write_all(value.as_bytes())
}

fn below(root: &Path, file: &Path) -> PathBuf {
    root.join(file.strip_prefix("/").unwrap_or(file))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    const PROFILE: &str = r#"
        about = "for tests"
        cmdline = ["isolcpus={isolated}"]
        [[knob]]
        name = "irq"
        file = "/proc/irq/*/smp_affinity_list"
        value = "{housekeeping}"
        form = "cores"
        why = "w"
        source = "s"
        [[knob]]
        name = "thp"
        file = "/sys/thp"
        value = "madvise"
        form = "choice"
        why = "w"
        source = "s"
        [[knob]]
        name = "ksm"
        file = "/sys/ksm"
        value = "2"
        keep = ["0"]
        why = "w"
        source = "s"
        [[knob]]
        name = "queues"
        file = "/sys/mask"
        value = "{housekeeping:mask}"
        form = "mask"
        why = "w"
        source = "s"
        [[knob]]
        name = "none"
        file = "/sys/none"
        value = "1"
        why = "w"
        source = "s"
    "#;

    struct Machine(tempfile::TempDir);

    impl Machine {
        fn new() -> Self {
            let machine = Self(tempfile::tempdir().unwrap());
            for (file, text) in [
                ("proc/irq/1/smp_affinity_list", "0-3\n"),
                ("proc/irq/2/smp_affinity_list", "0\n"),
                ("sys/thp", "always madvise never\n"),
                ("sys/ksm", "0\n"),
                ("sys/mask", "0000000f\n"),
            ] {
                let path = machine.0.path().join(file);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            machine
        }

        fn saved(&self) -> PathBuf {
            self.0.path().join("saved/tune.json")
        }

        fn holds(&self) -> BTreeMap<&'static str, String> {
            let files = [
                "proc/irq/1/smp_affinity_list",
                "proc/irq/2/smp_affinity_list",
                "sys/thp",
                "sys/ksm",
                "sys/mask",
            ];
            files
                .map(|file| (file, fs::read_to_string(self.0.path().join(file)).unwrap().trim().to_owned()))
                .into()
        }
    }

    fn division() -> Division {
        Division::new([2, 3].into_iter().collect(), &(0..4).collect()).unwrap()
    }

    #[test]
    fn a_profile_is_applied_and_everything_is_given_back() {
        let (machine, profile) = (Machine::new(), Profile::parse("test", PROFILE).unwrap());
        let before = machine.holds();
        let lines = apply(machine.0.path(), &profile, &division(), &machine.saved()).unwrap();
        let effects: Vec<_> = lines.iter().map(|line| (line.knob.as_str(), &line.effect)).collect();
        use Effect::{AsWanted, Missing, Set};
        // Both interrupts; a mere file holds what was written, without the brackets of the kernel's.
        assert_eq!(
            effects,
            [
                ("irq", &Set),
                ("irq", &Set),
                ("thp", &Set),
                ("ksm", &AsWanted),
                ("queues", &Set),
                ("none", &Missing)
            ]
        );
        let now = machine.holds();
        assert_eq!(
            (now["proc/irq/1/smp_affinity_list"].as_str(), now["sys/mask"].as_str()),
            ("0-1", "00000003")
        );
        // Again: nothing to do, and what was found first is what is given back.
        let again = apply(machine.0.path(), &profile, &division(), &machine.saved()).unwrap();
        assert!(again.iter().all(|line| matches!(line.effect, AsWanted | Missing)), "{again:?}");
        let other = Division::new([3].into_iter().collect(), &(0..4).collect()).unwrap();
        apply(machine.0.path(), &profile, &other, &machine.saved()).unwrap();
        assert_eq!(machine.holds()["proc/irq/1/smp_affinity_list"], "0-2");
        restore(machine.0.path(), &machine.saved()).unwrap();
        assert_eq!(machine.holds(), before);
        assert!(!machine.saved().exists());
        assert!(restore(machine.0.path(), &machine.saved()).unwrap().is_empty());
    }

    #[test]
    fn whatever_was_done_when_it_was_killed_is_given_back() {
        let (machine, profile) = (Machine::new(), Profile::parse("test", PROFILE).unwrap());
        let before = machine.holds();
        apply(machine.0.path(), &profile, &division(), &machine.saved()).unwrap();
        // As if it had been killed between the second knob and the third.
        for file in ["sys/thp", "sys/mask"] {
            fs::write(machine.0.path().join(file), &before[file]).unwrap();
        }
        restore(machine.0.path(), &machine.saved()).unwrap();
        assert_eq!(machine.holds(), before);
    }

    #[test]
    fn a_knob_that_is_refused_is_told_and_no_reason_to_stop() {
        let (machine, profile) = (Machine::new(), Profile::parse("test", PROFILE).unwrap());
        let irq = machine.0.path().join("proc/irq/1/smp_affinity_list");
        fs::remove_file(&irq).unwrap();
        // A folder can be neither read nor written.
        fs::create_dir(&irq).unwrap();
        let lines = apply(machine.0.path(), &profile, &division(), &machine.saved()).unwrap();
        assert!(matches!(lines[0].effect, Effect::Refused(_)), "{lines:?}");
        assert_eq!(lines[1].effect, Effect::Set);
    }

    #[test]
    fn what_cannot_be_put_back_stays_saved_and_the_rest_is_put_back() {
        let (machine, profile) = (Machine::new(), Profile::parse("test", PROFILE).unwrap());
        apply(machine.0.path(), &profile, &division(), &machine.saved()).unwrap();
        let irq = machine.0.path().join("proc/irq/1/smp_affinity_list");
        fs::remove_file(&irq).unwrap();
        fs::create_dir(&irq).unwrap();
        let lines = restore(machine.0.path(), &machine.saved()).unwrap();
        let stuck: Vec<_> = lines.iter().filter(|line| matches!(line.effect, Effect::Refused(_))).collect();
        assert_eq!(stuck.len(), 1, "{lines:?}");
        fs::remove_dir(&irq).unwrap();
        fs::write(&irq, "0-1").unwrap();
        let lines = restore(machine.0.path(), &machine.saved()).unwrap();
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert_eq!(machine.holds()["proc/irq/1/smp_affinity_list"], "0-3");
        assert!(!machine.saved().exists());
    }

    #[test]
    fn cores_are_divided_or_it_is_said_why_not() {
        let online: CoreSet = (0..40).collect();
        let some = Division::new([1, 33].into_iter().collect(), &online).unwrap();
        assert_eq!(some.fill("a={isolated} b={housekeeping:mask}"), "a=1,33 b=000000fd,fffffffd");
        let all = Division::new(online.clone(), &online).unwrap_err().to_string();
        assert!(all.contains("at least one"), "{all}");
        let missing = Division::new([40].into_iter().collect(), &online).unwrap_err().to_string();
        assert!(missing.contains("core 40 does not exist"), "{missing}");
        assert!(same("ff,ffffffff", "000000ff,ffffffff", Form::Mask) && !same("f", "1f", Form::Mask));
        assert!(same("0,1,2", "0-2", Form::Cores) && !same("0", "0-1", Form::Cores));
    }
}
