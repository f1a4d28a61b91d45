//! Profiles: which knobs, with which values, why, and who says so. They are data, in `configs/profiles`.
//!
//! Owns their form, and the ones that are part of the program.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::place::{self, Place, is_knob};
use super::thread::{self, KernelThread};
use super::{CONTROLLER, Division, PARTITION};

pub use super::thread::Aspect;

/// The profiles that are part of the program: name and text.
pub const BUILT_IN: &[(&str, &str)] = &[
    ("nfv", include_str!("../../../configs/profiles/nfv.toml")),
    ("realtime", include_str!("../../../configs/profiles/realtime.toml")),
];

/// A profile.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// What it is good for.
    pub about: String,
    /// The built-in profile whose words and knobs come first.
    #[serde(default)]
    pub extends: Option<String>,
    /// Words for the kernel's command line.
    #[serde(default)]
    pub cmdline: Vec<String>,
    /// Its knobs, in the order in which they are set.
    #[serde(rename = "knob", default)]
    pub knobs: Vec<Knob>,
}

/// A knob.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "Written")]
pub struct Knob {
    /// Its name in tables.
    pub name: String,
    /// What is set.
    pub what: What,
    /// Why.
    pub why: String,
    /// Who says so.
    pub source: String,
}

/// What a knob sets. Values may hold the names of sets of cores in braces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// Files of the kernel.
    File {
        /// In /proc/sys, /proc/irq or /sys; one component may hold a `*`, or a set of cores in braces: one for each.
        file: String,
        /// What it should hold.
        value: String,
        /// How its text is compared.
        form: Form,
        /// Values that are as good.
        keep: Vec<String>,
    },
    /// Threads of the kernel, by their names; a `*` stands for anything.
    Threads {
        /// Those.
        threads: Vec<String>,
        /// But for those.
        except: Vec<String>,
        /// Which of both settings.
        aspect: Aspect,
        /// What it should be.
        value: String,
    },
    /// The isolated partition of cores.
    Partition(String),
}

/// A knob as a file has it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    name: String,
    file: Option<String>,
    value: Option<String>,
    #[serde(default)]
    form: Form,
    #[serde(default)]
    keep: Vec<String>,
    threads: Option<Vec<String>>,
    #[serde(default)]
    except: Vec<String>,
    cores: Option<String>,
    schedule: Option<String>,
    partition: Option<String>,
    why: String,
    source: String,
}

impl TryFrom<Written> for Knob {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, String> {
        let Written {
            name,
            file,
            value,
            form,
            keep,
            threads,
            except,
            cores,
            schedule,
            partition,
            why,
            source,
        } = written;
        let threads = threads.map(|threads| (threads, except));
        let what = match (file, value, threads, cores, schedule, partition) {
            (Some(file), Some(value), None, None, None, None) => What::File { file, value, form, keep },
            (None, None, Some((threads, except)), Some(value), None, None) => {
                What::Threads { threads, except, aspect: Aspect::Cores, value }
            }
            (None, None, Some((threads, except)), None, Some(value), None) => {
                if thread::schedule(&value).is_none() {
                    return Err(format!(
                        "knob `{name}`: `schedule` is `other`, or `fifo:N` or `rr:N` with N from 1 to 99"
                    ));
                }
                What::Threads { threads, except, aspect: Aspect::Schedule, value }
            }
            (None, None, None, None, None, Some(cores)) => What::Partition(cores),
            _ => {
                return Err(format!(
                    "knob `{name}`: give `file` and `value`, `threads` with `cores` or with `schedule`, or `partition`"
                ));
            }
        };
        Ok(Self { name, what, why, source })
    }
}

/// How a knob's text is compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// As it is.
    #[default]
    Plain,
    /// One of several words, in brackets.
    Choice,
    /// A list of cores.
    Cores,
    /// A list of cores, which may be shorter than what is wanted, and is only made shorter.
    Within,
    /// A mask of cores.
    Mask,
}

/// Why a profile is none.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// No such profile.
    #[error("there is no profile `{0}`; there are {1}, or name a file (TOML)")]
    Unknown(String, String),
    /// The file cannot be read.
    #[error("cannot read the profile {0}: {1}")]
    Read(String, std::io::Error),
    /// It is not understood.
    #[error("profile {0}: {1}")]
    Form(String, Box<toml::de::Error>),
    /// It names a file that is no knob.
    #[error("profile {0}: knob `{1}`: {2} is not in /proc/sys, /proc/irq or /sys, or leaves it again")]
    NoKnob(String, String, String),
}

impl Profile {
    /// The profile of this name, or in this file.
    ///
    /// # Errors
    /// See [`ProfileError`].
    pub fn load(name: &str) -> Result<Self, ProfileError> {
        if let Some((_, text)) = BUILT_IN.iter().find(|(built_in, _)| *built_in == name) {
            return Self::parse(name, text);
        }
        if !name.contains(['/', '.']) {
            return Err(ProfileError::Unknown(name.to_owned(), names()));
        }
        let text = fs::read_to_string(name).map_err(|error| ProfileError::Read(name.to_owned(), error))?;
        Self::parse(name, &text)
    }

    /// The profile that `text` describes; `name` is what messages call it.
    ///
    /// # Errors
    /// See [`ProfileError`].
    pub fn parse(name: &str, text: &str) -> Result<Self, ProfileError> {
        let mut profile: Self =
            toml::from_str(text).map_err(|error| ProfileError::Form(name.to_owned(), Box::new(error)))?;
        let wrong = profile.knobs.iter().find_map(|knob| match &knob.what {
            What::File { file, .. } if !is_knob(Path::new(file)) => Some((knob.name.clone(), file.clone())),
            _ => None,
        });
        match wrong {
            Some((knob, file)) => Err(ProfileError::NoKnob(name.to_owned(), knob, file)),
            None => {
                if let Some(base) = profile.extends.take() {
                    profile.follow(&base)?;
                }
                Ok(profile)
            }
        }
    }

    /// Puts the words and knobs of a built-in profile before its own.
    fn follow(&mut self, base: &str) -> Result<(), ProfileError> {
        let Some((_, text)) = BUILT_IN.iter().find(|(name, _)| *name == base) else {
            return Err(ProfileError::Unknown(base.to_owned(), names()));
        };
        let base = Self::parse(base, text)?;
        self.cmdline.splice(0..0, base.cmdline);
        self.knobs.splice(0..0, base.knobs);
        Ok(())
    }
}

/// The built-in profiles, for messages.
fn names() -> String {
    BUILT_IN.iter().map(|(name, _)| format!("`{name}`")).collect::<Vec<_>>().join(" and ")
}

impl Knob {
    /// Where its values are on this machine, in order.
    pub(super) fn places(&self, root: &Path, division: &Division) -> Vec<Place> {
        match &self.what {
            What::File { file, form, .. } => files(root, file, division)
                .into_iter()
                .map(|file| Place::File { file, form: *form })
                .collect(),
            What::Threads { threads, except, aspect, .. } => {
                let found = KernelThread::all(root, threads, except, *aspect);
                found.into_iter().map(|thread| Place::Thread { thread, aspect: *aspect }).collect()
            }
            What::Partition(_) => vec![CONTROLLER, PARTITION],
        }
    }

    /// Where its values are, as the profile says it.
    pub fn place(&self) -> String {
        match &self.what {
            What::File { file, .. } => file.clone(),
            What::Threads { threads, .. } => threads.join(", "),
            What::Partition(_) => "cgroup v2: cpuset.cpus.partition".to_owned(),
        }
    }

    /// Its value, as the profile says it.
    pub fn value(&self) -> &str {
        let (What::File { value, .. } | What::Threads { value, .. } | What::Partition(value)) = &self.what;
        value
    }

    /// What it should hold on a machine that is divided so.
    pub(super) fn wanted(&self, division: &Division) -> String {
        division.fill(self.value())
    }

    /// Whether a value is as good as the one that is wanted.
    pub(super) fn keeps(&self, now: &str) -> bool {
        matches!(&self.what, What::File { keep, .. } if keep.iter().any(|keep| keep == now))
    }
}

/// The files that `pattern` means, as far as they are there.
fn files(root: &Path, pattern: &str, division: &Division) -> Vec<PathBuf> {
    let mut found = vec![PathBuf::from("/")];
    for part in pattern.split('/').filter(|part| !part.is_empty()) {
        let cores = [("{isolated}", &division.isolated), ("{housekeeping}", &division.housekeeping)];
        if let Some((name, cores)) = cores.into_iter().find(|(name, _)| part.contains(name)) {
            let of_each = |path: &PathBuf| {
                cores.iter().map(|core| path.join(part.replace(name, &core.to_string()))).collect::<Vec<_>>()
            };
            found = found.iter().flat_map(of_each).collect();
            continue;
        }
        let Some((begin, end)) = part.split_once('*') else {
            found.iter_mut().for_each(|path| path.push(part));
            continue;
        };
        let inside = |path: &PathBuf| {
            let entries = fs::read_dir(place::below(root, path)).into_iter().flatten().flatten();
            let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
            let mut names: Vec<_> = names
                .filter(|name| name.len() >= part.len() - 1 && name.starts_with(begin) && name.ends_with(end))
                .collect();
            names.sort_unstable_by_key(|name| (name.len(), name.clone()));
            names.into_iter().map(|name| path.join(name)).collect::<Vec<_>>()
        };
        found = found.iter().flat_map(inside).collect();
    }
    found.retain(|path| place::below(root, path).exists());
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_built_in_profile_is_understood_and_gives_reasons() {
        for (name, _) in BUILT_IN {
            let profile = Profile::load(name).unwrap();
            assert!(profile.knobs.len() >= 10 && !profile.cmdline.is_empty(), "{name}");
            for knob in &profile.knobs {
                assert!(!knob.why.is_empty() && !knob.source.is_empty(), "{name}: {}", knob.name);
            }
        }
    }

    #[test]
    fn what_is_no_profile_is_said() {
        let said = |name: &str, text: &str| Profile::parse(name, text).unwrap_err().to_string();
        assert!(Profile::load("fast").unwrap_err().to_string().contains("`nfv` and `realtime`"));
        assert!(Profile::load("/nonexistent.toml").unwrap_err().to_string().contains("cannot read"));
        assert!(said("x", "about = 1").contains("profile x:"));
        let knob = |file: &str| {
            format!(
                "about = \"\"\n[[knob]]\nname = \"k\"\nfile = \"{file}\"\nvalue = \"1\"\nwhy = \"w\"\nsource = \"s\"\n"
            )
        };
        for file in ["/etc/passwd", "/proc/sys/../../etc/passwd", "/sysfs/x"] {
            assert!(said("x", &knob(file)).contains("is not in /proc/sys"), "{file}");
        }
        assert!(Profile::parse("x", &knob("/sys/a/b")).is_ok());
        assert!(said("x", "about = \"\"\nextends = \"y\"").contains("there is no profile `y`"));
    }

    #[test]
    fn a_profile_that_extends_another_has_its_knobs_first() {
        let (nfv, realtime) = (Profile::load("nfv").unwrap(), Profile::load("realtime").unwrap());
        let names =
            |profile: &Profile| profile.knobs.iter().map(|knob| knob.name.clone()).collect::<Vec<_>>();
        assert!(names(&realtime).starts_with(&names(&nfv)) && realtime.knobs.len() > nfv.knobs.len());
        let all = names(&realtime);
        assert!(all.iter().all(|name| all.iter().filter(|n| *n == name).count() == 1), "{all:?}");
    }

    #[test]
    fn a_star_stands_for_every_file_there_is() {
        let root = tempfile::tempdir().unwrap();
        for cpu in ["cpu0", "cpu2", "cpu10", "cpufreq"] {
            let folder = root.path().join("sys").join(cpu);
            fs::create_dir_all(&folder).unwrap();
            if cpu != "cpu2" {
                fs::write(folder.join("governor"), "x").unwrap();
            }
        }
        let text = "about = \"\"\n[[knob]]\nname = \"k\"\nfile = \"/sys/cpu*/governor\"\nvalue = \"1\"\nwhy = \"w\"\nsource = \"s\"\n";
        let profile = Profile::parse("x", text).unwrap();
        let division = Division::new("2,10".parse().unwrap(), &(0..12).collect()).unwrap();
        let files = files(root.path(), &profile.knobs[0].place(), &division);
        let names: Vec<_> = files.iter().map(|file| file.to_str().unwrap()).collect();
        assert_eq!(names, ["/sys/cpu0/governor", "/sys/cpu10/governor", "/sys/cpufreq/governor"]);
        // A set of cores stands for those, as far as they have such a file.
        let of_isolated = super::files(root.path(), "/sys/cpu{isolated}/governor", &division);
        assert_eq!(of_isolated, [PathBuf::from("/sys/cpu10/governor")]);
    }

    #[test]
    fn a_knob_is_one_thing_and_threads_have_a_priority_that_exists() {
        let said = |keys: &str| {
            let text = format!("about = \"\"\n[[knob]]\nname = \"k\"\nwhy = \"w\"\nsource = \"s\"\n{keys}");
            Profile::parse("x", &text).map(|profile| profile.knobs[0].what.clone()).map_err(|e| e.to_string())
        };
        assert_eq!(said("partition = \"{isolated}\""), Ok(What::Partition("{isolated}".to_owned())));
        assert!(said("threads = [\"a/*\"]\nschedule = \"fifo:2\"").is_ok());
        assert!(said("threads = [\"a/*\"]\nschedule = \"fifo\"").unwrap_err().contains("N from 1 to 99"));
        for wrong in
            ["", "file = \"/sys/a\"", "threads = []", "file = \"/sys/a\"\nvalue = \"\"\npartition = \"\""]
        {
            assert!(said(wrong).unwrap_err().contains("give `file` and `value`"), "{wrong}");
        }
    }
}
