//! Tuning: the kernel's knobs that a host of packets wants set otherwise, and everything back as it was.
//!
//! Owns what is done with a profile's knobs: looking, setting, and giving back. What the knobs are is data
//! ([`profile`]), where their values are is `place`; what was found before is on disk before anything is changed ([`saved`]).

mod place;
pub mod profile;
pub mod saved;
mod thread;

use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::partition;
use crate::topology::{self, CoreSet};
use place::{Group, Place};
use profile::{Knob, Profile};
use saved::{Saved, SavedError};
use thread::Aspect;

/// What a knob with a partition is made of.
const CONTROLLER: Place = Place::Group { group: Group::Controller };
const PARTITION: Place = Place::Group { group: Group::Partition };

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
            .replace("{housekeeping:mask}", &self.housekeeping.mask())
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
    /// It was to be put back, and stays: others use it by now, and it is theirs to give back.
    InUse,
    /// The kernel does not want it: with its reason.
    Refused(String),
    /// This kernel has none.
    Missing,
}

/// One place of a knob.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// The knob's name.
    pub knob: String,
    /// The file, or the folder of a thread.
    pub file: PathBuf,
    /// The name of a kernel thread, if it is about one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub thread: Option<String>,
    /// What it holds, or held before.
    pub now: String,
    /// What it should hold.
    pub wanted: String,
    /// What became of it.
    pub effect: Effect,
}

/// Looks at every knob of a profile.
pub fn check(root: &Path, profile: &Profile, division: &Division) -> Vec<Line> {
    look(root, profile, division).into_iter().map(|(line, _)| line).collect()
}

/// What there is, and where.
fn look(root: &Path, profile: &Profile, division: &Division) -> Vec<(Line, Option<Place>)> {
    let mut found = Vec::new();
    for knob in &profile.knobs {
        let (places, wanted) = (knob.places(root, division), knob.wanted(division));
        if places.is_empty() {
            let (knob, file) = (knob.name.clone(), knob.place().into());
            let now = "-".to_owned();
            found.push((
                Line { knob, file, thread: None, now, wanted: wanted.clone(), effect: Effect::Missing },
                None,
            ));
        }
        for place in places {
            let wanted = if place == CONTROLLER { "on".to_owned() } else { wanted.clone() };
            found.push((line(root, knob, &place, wanted, division), Some(place)));
        }
    }
    found
}

fn line(root: &Path, knob: &Knob, place: &Place, wanted: String, division: &Division) -> Line {
    let (file, thread) = place.shown(root);
    let line = |now: String, wanted, effect| Line {
        knob: knob.name.clone(),
        file: file.clone(),
        thread: thread.clone(),
        now,
        wanted,
        effect,
    };
    let now = match place.get(root) {
        Ok(now) => now,
        Err(error) => return line("-".to_owned(), wanted, Effect::Refused(error.to_string())),
    };
    let wanted = place.narrowed(&now, &wanted).unwrap_or(wanted);
    if place.same(&now, &wanted) || knob.keeps(&now) {
        return line(now, wanted, Effect::AsWanted);
    }
    if matches!(place, Place::Group { .. }) && isolated_at_boot(root, division) {
        return line("isolated at boot".to_owned(), wanted, Effect::AsWanted);
    }
    let effect = place.locked(root).map_or(Effect::Differs, Effect::Refused);
    line(now, wanted, effect)
}

/// Whether the kernel took all of these cores from the scheduler when it started: a partition has nothing to add to that.
fn isolated_at_boot(root: &Path, division: &Division) -> bool {
    let isolated = topology::boot_isolated_cores(root);
    partition::Hierarchy::find(root).is_none_or(|groups| groups.cores().is_empty())
        && division.isolated.iter().all(|core| isolated.contains(core))
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
    let mut found = look(root, profile, division);
    let differs = |line: &Line| line.effect == Effect::Differs;
    // A partition moves threads, and its end moves them again: to everywhere.
    let moves = found.iter().any(|(line, place)| differs(line) && *place == Some(PARTITION));
    let mut record = Saved::read(saved)?.unwrap_or_default();
    for (line, place) in &found {
        let Some(place) = place else { continue };
        let moved = moves
            && line.effect == Effect::AsWanted
            && matches!(place, Place::Thread { aspect: Aspect::Cores, .. });
        if differs(line) || moved {
            record.add(&line.knob, place, &line.now);
        }
    }
    record.write(saved)?;
    for (line, place) in &mut found {
        let Some(place) = place.as_ref().filter(|_| line.effect == Effect::Differs) else { continue };
        line.effect = match place.set(root, &line.wanted) {
            Ok(()) => match place.get(root) {
                Ok(now) if place.same(&now, &line.wanted) => Effect::Set,
                Ok(now) => Effect::Refused(format!("it holds {now} after it was written")),
                Err(error) => Effect::Refused(error.to_string()),
            },
            Err(error) => Effect::Refused(place.refusal(&error)),
        };
    }
    Ok(found.into_iter().map(|(line, _)| line).collect())
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
        let place = &entry.place;
        let now = place.get(root);
        let effect = match &now {
            Ok(now) if place.same(now, &entry.before) => Effect::AsWanted,
            // A device that is gone took its knobs with it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Effect::Missing,
            _ => match place.set(root, &entry.before) {
                Ok(()) => Effect::GivenBack,
                Err(error) if place.is_others(root, &error) => Effect::InUse,
                Err(error) => Effect::Refused(place.refusal(&error)),
            },
        };
        let (file, thread) = place.shown(root);
        lines.push(Line {
            knob: entry.knob.clone(),
            file,
            thread,
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

#[cfg(test)]
mod tests;
