//! What knobs held before they were set, on disk: so that it is given back also after a crash.
//!
//! Owns the file, and whether it is to be trusted: whoever can write it has the kernel's knobs written for him.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::place::Place;

/// Everything that was found.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Saved {
    /// In the order in which it was changed.
    pub(super) entries: Vec<Entry>,
}

/// One place, and what it held.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Entry {
    pub(super) knob: String,
    #[serde(flatten)]
    pub(super) place: Place,
    pub(super) before: String,
}

/// Why what was saved is of no use.
#[derive(Debug, thiserror::Error)]
pub enum SavedError {
    /// It cannot be read or written.
    #[error("{}: {error}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// It is not what we write.
    #[error("{} is not what `cableway tune apply` writes: {why}; nothing was changed", file.display())]
    Form {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

impl Saved {
    /// What is in `file`; `None` if there is none.
    ///
    /// # Errors
    /// It cannot be read, belongs to somebody else, or names something that is no knob.
    pub fn read(file: &Path) -> Result<Option<Self>, SavedError> {
        let failed = |error| SavedError::Io { file: file.to_owned(), error };
        let wrong = |why: String| SavedError::Form { file: file.to_owned(), why };
        let found = match fs::symlink_metadata(file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            found => found.map_err(failed)?,
        };
        let us = nix::unistd::geteuid().as_raw();
        if !found.is_file() || found.uid() != us || found.mode() & 0o022 != 0 {
            return Err(wrong(format!("it is no file that only user {us} can write")));
        }
        let saved: Self =
            serde_json::from_slice(&fs::read(file).map_err(failed)?).map_err(|e| wrong(e.to_string()))?;
        match saved.entries.iter().find_map(|entry| entry.place.forbidden()) {
            Some(why) => Err(wrong(why)),
            None => Ok(Some(saved)),
        }
    }

    /// Remembers what a place held, unless it is remembered already.
    pub(super) fn add(&mut self, knob: &str, place: &Place, before: &str) {
        if self.entries.iter().all(|entry| !entry.place.is(place)) {
            let (knob, place, before) = (knob.to_owned(), place.clone(), before.to_owned());
            self.entries.push(Entry { knob, place, before });
        }
    }

    /// Writes it in place of what was there, whole or not at all; with nothing in it, removes it.
    ///
    /// # Errors
    /// The folder cannot be made or written.
    pub(super) fn write(&self, file: &Path) -> Result<(), SavedError> {
        let failed = |error| SavedError::Io { file: file.to_owned(), error };
        if self.entries.is_empty() {
            return match fs::remove_file(file) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(error)),
                _ => Ok(()),
            };
        }
        let folder = file.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder).map_err(failed)?;
        let mut new = tempfile::NamedTempFile::new_in(folder).map_err(failed)?;
        let text = serde_json::to_vec_pretty(self).map_err(|error| failed(error.into()))?;
        new.write_all(&text).and_then(|()| new.as_file().sync_all()).map_err(failed)?;
        new.persist(file).map_err(|error| failed(error.error))?;
        fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tune::profile::Form;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn what_others_could_have_written_is_not_obeyed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a/tune.json");
        let mut saved = Saved::default();
        let place = |form| Place::File { file: "/sys/a".into(), form };
        saved.add("k", &place(Form::Plain), "1");
        saved.add("k", &place(Form::Cores), "2");
        saved.write(&file).unwrap();
        let read = Saved::read(&file).unwrap().unwrap();
        assert_eq!(read.entries.iter().map(|e| e.before.as_str()).collect::<Vec<_>>(), ["1"]);

        fs::set_permissions(&file, fs::Permissions::from_mode(0o666)).unwrap();
        let said = Saved::read(&file).unwrap_err().to_string();
        assert!(said.contains("only user"), "{said}");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&file, fs::read_to_string(&file).unwrap().replace("/sys/a", "/etc/passwd")).unwrap();
        let said = Saved::read(&file).unwrap_err().to_string();
        assert!(said.contains("/etc/passwd is no knob"), "{said}");
        fs::write(&file, "{").unwrap();
        assert!(Saved::read(&file).is_err());
        fs::remove_file(&file).unwrap();
        assert!(Saved::read(&file).unwrap().is_none());
    }
}
