//! What a node is at the moment, on disk: so that `status` and `down` know it, and a new supervisor takes over where the last
//! one was killed.
//!
//! Owns the file. It is written before a change is made, never after: whatever was changed is in it.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::changes::Change;
use super::process::Identity;

/// In the run directory.
const NAME: &str = "node.json";

/// A node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct State {
    /// Its configuration.
    pub(super) file: PathBuf,
    /// Who supervises it.
    pub(super) supervisor: Identity,
    /// What was changed on the host, in order.
    pub(super) changes: Vec<Change>,
    /// The switch, then the machines in the order of the file.
    pub(super) children: Vec<ChildState>,
}

/// One process of a node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct ChildState {
    /// `switch`, or the machine's name.
    pub(super) name: String,
    /// What it is.
    pub(super) kind: Kind,
    /// The process, if it runs.
    pub(super) process: Option<Identity>,
    /// Whether it said that it is ready.
    pub(super) ready: bool,
    /// Since when it is as it is: seconds since 1970.
    pub(super) since: u64,
    /// How often it was started again.
    pub(super) restarts: u64,
    /// How it ended the last time.
    pub(super) last_end: Option<String>,
    /// How long it may take to end when asked, in seconds.
    pub(super) patience_s: u64,
}

/// What a child is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum Kind {
    /// The switch.
    Switch,
    /// A virtual machine.
    Vm,
}

impl ChildState {
    /// How long it may take to end when asked.
    pub(super) fn patience(&self) -> Duration {
        Duration::from_secs(self.patience_s)
    }

    /// A word for what it does.
    pub(super) fn word(&self) -> &'static str {
        match (self.process.is_some_and(|process| process.is_alive()), self.ready, self.kind) {
            (true, true, _) => "running",
            (true, false, Kind::Vm) => "waiting",
            (true, false, Kind::Switch) => "starting",
            (false, ..) => "down",
        }
    }
}

/// Why a state is of no use.
#[derive(Debug, thiserror::Error)]
pub(super) enum StateError {
    /// It cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is not what we write.
    #[error("{} is not a node's state ({why}): remove it if no node is up", path.display())]
    Form {
        /// The file.
        path: PathBuf,
        /// What was met instead.
        why: serde_json::Error,
    },
}

impl State {
    /// The node in `run_dir`, if there is one.
    ///
    /// # Errors
    /// There is something, but it cannot be used.
    pub(super) fn read(run_dir: &Path) -> Result<Option<Self>, StateError> {
        let path = run_dir.join(NAME);
        match fs::read(&path) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).map(Some).map_err(|why| StateError::Form { path, why })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(StateError::Read { path, source }),
        }
    }

    /// Writes it in place of what was there, whole or not at all.
    ///
    /// # Errors
    /// The run directory is full or gone.
    pub(super) fn write(&self, run_dir: &Path) -> io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(run_dir)?;
        file.write_all(&serde_json::to_vec_pretty(self)?)?;
        file.as_file().sync_all()?;
        file.persist(run_dir.join(NAME))?;
        Ok(())
    }

    /// Forgets it: the node is down.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub(super) fn remove(run_dir: &Path) -> io::Result<()> {
        match fs::remove_file(run_dir.join(NAME)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_what_is_damaged_is_said() {
        let dir = tempfile::tempdir().unwrap();
        assert!(State::read(dir.path()).unwrap().is_none());
        let state = State {
            file: "/etc/node.toml".into(),
            supervisor: Identity::own().unwrap(),
            changes: vec![Change::HugePages { node: 0, page_size: 2 << 20, before: 3 }],
            children: vec![],
        };
        state.write(dir.path()).unwrap();
        let read = State::read(dir.path()).unwrap().unwrap();
        assert_eq!((read.file, read.changes), (state.file, state.changes));
        assert!(read.supervisor.is_alive());
        fs::write(dir.path().join(NAME), "{\"file\":").unwrap();
        let error = State::read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("is not a node's state") && error.contains("remove it"), "{error}");
        State::remove(dir.path()).unwrap();
        State::remove(dir.path()).unwrap();
        assert!(State::read(dir.path()).unwrap().is_none());
    }
}
