//! Profiles: which knobs, with which values, why, and who says so. They are data, in `configs/profiles`.
//!
//! Owns their form, and the ones that are part of the program.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

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
#[serde(deny_unknown_fields)]
pub struct Knob {
    /// Its name in tables.
    pub name: String,
    /// A file in /proc/sys, /proc/irq or /sys; one component may hold a `*`.
    pub file: String,
    /// What it should hold, with names of sets of cores in braces.
    pub value: String,
    /// How its text is compared.
    #[serde(default)]
    pub form: Form,
    /// Values that are as good.
    #[serde(default)]
    pub keep: Vec<String>,
    /// Why.
    pub why: String,
    /// Who says so.
    pub source: String,
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
        match profile.knobs.iter().find(|knob| !is_knob(Path::new(&knob.file))) {
            Some(wrong) => Err(ProfileError::NoKnob(name.to_owned(), wrong.name.clone(), wrong.file.clone())),
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

/// Whether a file may be written in the name of tuning.
pub(super) fn is_knob(file: &Path) -> bool {
    let inside =
        ["/proc/sys/", "/proc/irq/", "/sys/"].iter().any(|folder| file.to_string_lossy().starts_with(folder));
    inside && !file.components().any(|part| part == std::path::Component::ParentDir)
}

impl Knob {
    /// Its files on this machine, in order.
    pub(super) fn files(&self, root: &Path) -> Vec<PathBuf> {
        let mut found = vec![PathBuf::from("/")];
        for part in self.file.split('/').filter(|part| !part.is_empty()) {
            let Some((begin, end)) = part.split_once('*') else {
                found.iter_mut().for_each(|path| path.push(part));
                continue;
            };
            let inside = |path: &PathBuf| {
                let entries = fs::read_dir(super::below(root, path)).into_iter().flatten().flatten();
                let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
                let mut names: Vec<_> = names
                    .filter(|name| {
                        name.len() >= part.len() - 1 && name.starts_with(begin) && name.ends_with(end)
                    })
                    .collect();
                names.sort_unstable_by_key(|name| (name.len(), name.clone()));
                names.into_iter().map(|name| path.join(name)).collect::<Vec<_>>()
            };
            found = found.iter().flat_map(inside).collect();
        }
        found.retain(|path| super::below(root, path).exists());
        found
    }
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
        let files = profile.knobs[0].files(root.path());
        let names: Vec<_> = files.iter().map(|file| file.to_str().unwrap()).collect();
        assert_eq!(names, ["/sys/cpu0/governor", "/sys/cpu10/governor", "/sys/cpufreq/governor"]);
    }
}
