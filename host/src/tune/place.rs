//! One place of a knob: a file of the kernel's, a thread of the kernel's, or the isolated partition. Reading it, setting it, comparing.
//!
//! Owns what may be set at all in the name of tuning. Never decides what should be set.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::profile::Form;
use super::thread::{Aspect, KernelThread};
use crate::partition::{self, Hierarchy};
use crate::topology::CoreSet;

/// Where a value is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub(super) enum Place {
    /// A file.
    File {
        /// Which.
        file: PathBuf,
        /// How its text is compared.
        form: Form,
    },
    /// A kernel thread's cores, or its priority.
    Thread {
        /// Whose.
        thread: KernelThread,
        /// Which of both.
        aspect: Aspect,
    },
    /// The control groups.
    Group {
        /// What of them.
        group: Group,
    },
}

/// What is set of the control groups, version 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Group {
    /// Whether they have the controller cpuset: `on`, `off`.
    Controller,
    /// The cores of the isolated partition, or `none`.
    Partition,
}

impl Place {
    /// Why it must not be written in the name of tuning.
    pub(super) fn forbidden(&self) -> Option<String> {
        match self {
            Self::File { file, .. } if !is_knob(file) => Some(format!("{} is no knob", file.display())),
            _ => None,
        }
    }

    /// Whether both are the same place.
    pub(super) fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::File { file: a, .. }, Self::File { file: b, .. }) => a == b,
            _ => self == other,
        }
    }

    /// For tables: a path, and the name of what is behind it.
    pub(super) fn shown(&self, root: &Path) -> (PathBuf, Option<String>) {
        let group = |file: fn(&Hierarchy) -> PathBuf| {
            let file = Hierarchy::find(root).map_or_else(|| "/sys/fs/cgroup".into(), |groups| file(&groups));
            (file.strip_prefix(root).map_or(file.clone(), |file| Path::new("/").join(file)), None)
        };
        match self {
            Self::File { file, .. } => (file.clone(), None),
            Self::Thread { thread, .. } => (thread.folder().into(), Some(thread.name.clone())),
            Self::Group { group: Group::Controller } => group(Hierarchy::controller_file),
            Self::Group { group: Group::Partition } => group(Hierarchy::partition_file),
        }
    }

    /// What it holds, in a word: of a choice what is chosen (`always [madvise] never`).
    pub(super) fn get(&self, root: &Path) -> io::Result<String> {
        match self {
            Self::File { file, form } => {
                let text = fs::read_to_string(below(root, file))?;
                let text = text.trim();
                let chosen = || text.split_once('[')?.1.split_once(']').map(|(chosen, _)| chosen);
                Ok(match form {
                    Form::Choice => chosen().unwrap_or(text).to_owned(),
                    _ => text.to_owned(),
                })
            }
            Self::Thread { thread, aspect } => thread.get(root, *aspect),
            Self::Group { group: Group::Controller } => {
                Ok(if groups(root)?.has_controller()? { "on" } else { "off" }.to_owned())
            }
            Self::Group { group: Group::Partition } => groups(root)?.partition(),
        }
    }

    /// Sets it.
    pub(super) fn set(&self, root: &Path, value: &str) -> io::Result<()> {
        match self {
            // One write, which is one order to the kernel. The file is not made.
            Self::File { file, .. } => {
                let mut file = fs::OpenOptions::new().write(true).truncate(true).open(below(root, file))?;
                file.write_all(value.as_bytes())
            }
            Self::Thread { thread, aspect } => thread.set(root, *aspect, value),
            Self::Group { group: Group::Controller } => groups(root)?.set_controller(value == "on"),
            Self::Group { group: Group::Partition } => {
                let groups = groups(root)?;
                let Ok(cores) = value.parse::<CoreSet>() else { return groups.remove() };
                if let Some(who) = partition::in_the_way(root, &cores) {
                    return Err(io::Error::other(who));
                }
                groups.isolate(&cores)
            }
        }
    }

    /// Whether it cannot be given back as others use it by now: systemd has units with cores of their own (`AllowedCPUs=`), and takes
    /// the controller from all when the last of these is gone.
    pub(super) fn is_others(&self, root: &Path, refused: &io::Error) -> bool {
        matches!(self, Self::Group { group: Group::Controller })
            && refused.raw_os_error() == Some(libc::EBUSY)
            && groups(root).is_ok_and(|groups| !groups.folder().exists())
    }

    /// Why the kernel would not let it be set, as far as that can be seen.
    pub(super) fn locked(&self, root: &Path) -> Option<String> {
        match self {
            Self::File { file, .. } => {
                let mode = fs::metadata(below(root, file)).ok()?.permissions().mode();
                let interrupt = "its driver places it (managed), or it belongs to a core; isolcpus=managed_irq moves managed ones";
                let why = if file.starts_with("/proc/irq") {
                    interrupt
                } else {
                    "this kernel lets it only be read"
                };
                (mode & 0o222 == 0).then(|| why.to_owned())
            }
            Self::Thread { .. } => None,
            Self::Group { .. } => groups(root).map_or_else(|error| Some(error.to_string()), |g| g.obstacle()),
        }
    }

    /// Whether two texts mean the same.
    pub(super) fn same(&self, a: &str, b: &str) -> bool {
        let cores =
            || a.parse::<CoreSet>().ok().zip(b.parse().ok()).is_some_and(|(a, b): (_, CoreSet)| a == b);
        match self {
            Self::File { form: Form::Plain | Form::Choice, .. } => a == b,
            Self::File { form: Form::Cores | Form::Within, .. } => cores(),
            Self::File { form: Form::Mask, .. } => digits(a) == digits(b),
            Self::Thread { aspect: Aspect::Cores, .. } => cores(),
            Self::Thread { aspect: Aspect::Schedule, .. } => a == b,
            Self::Group { .. } => a == b || cores(),
        }
    }

    /// What it should hold, where `wanted` says within which cores it should be: what it holds without all others.
    pub(super) fn narrowed(&self, now: &str, wanted: &str) -> Option<String> {
        let within = matches!(
            self,
            Self::File { form: Form::Within, .. } | Self::Thread { aspect: Aspect::Cores, .. }
        );
        let (now, wanted) = (now.parse::<CoreSet>().ok()?, wanted.parse::<CoreSet>().ok()?);
        let left: CoreSet = now.iter().filter(|core| wanted.contains(*core)).collect();
        (within && !left.is_empty()).then(|| left.to_string())
    }

    /// What the kernel says when it refuses to set it.
    pub(super) fn refusal(&self, error: &io::Error) -> String {
        match self {
            Self::File { file, .. }
                if file.starts_with("/proc/irq") && error.raw_os_error() == Some(libc::EIO) =>
            {
                format!(
                    "{error}: its driver places it (managed); isolcpus=managed_irq on the kernel's command line moves it"
                )
            }
            Self::Group { group: Group::Controller } if error.raw_os_error() == Some(libc::EBUSY) => {
                format!("{error}: another group uses it by now")
            }
            _ => error.to_string(),
        }
    }
}

fn groups(root: &Path) -> io::Result<Hierarchy> {
    let none = || {
        io::Error::new(
            io::ErrorKind::NotFound,
            "cgroup v2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup",
        )
    };
    Hierarchy::find(root).ok_or_else(none)
}

/// Whether a file may be written in the name of tuning.
pub(super) fn is_knob(file: &Path) -> bool {
    let inside =
        ["/proc/sys/", "/proc/irq/", "/sys/"].iter().any(|folder| file.to_string_lossy().starts_with(folder));
    inside && !file.components().any(|part| part == Component::ParentDir)
}

/// A mask without what makes no difference: commas, leading zeros.
fn digits(mask: &str) -> String {
    mask.replace(',', "").trim_start_matches('0').to_lowercase()
}

pub(super) fn below(root: &Path, file: &Path) -> PathBuf {
    root.join(file.strip_prefix("/").unwrap_or(file))
}
