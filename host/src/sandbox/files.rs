//! Which files a running process may open, make and remove: Landlock rules (Linux 5.13 and later).
//!
//! Owns how lists of directories and devices are put in force for the calling thread and those that it starts. What is in force can
//! never be widened, and follows files, not names: who replaces a file puts it out of reach, unless its directory is on the list.
//! Connecting to a UNIX socket that has a path is not restricted; TCP is refused, and sockets in the abstract namespace are.

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, RestrictionStatus, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetStatus, Scope, path_beneath_rules,
};

/// The rights that are withheld unless a rule grants them. Later versions add the right to connect to a socket.
const KNOWN: ABI = ABI::V7;

/// The files could not be confined.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot confine this process to its own files with Landlock: {0}; `confine_files = false` starts it without"
)]
pub struct FilesError(#[from] landlock::RulesetError);

/// How far the kernel holds a thread to its files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// In every respect that this program knows of.
    Fully,
    /// As far as this kernel can: it is older than some of the rights.
    Partly,
    /// Not at all: this kernel has no Landlock, or does not use it.
    NotAtAll,
}

/// Directories that a process uses after its start, each with all that lies beneath.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileAccess {
    /// Where it reads.
    pub read: Vec<PathBuf>,
    /// Where it makes and removes sockets.
    pub sockets: Vec<PathBuf>,
    /// Where it makes files, empties and writes them.
    pub write: Vec<PathBuf>,
    /// Devices that it opens to read and write.
    pub devices: Vec<PathBuf>,
}

impl FileAccess {
    /// Holds the calling thread, and those that it starts later, to these directories.
    ///
    /// # Errors
    /// The kernel has Landlock and refuses: a process can be confined 16 times.
    pub fn confine(&self) -> Result<Held, FilesError> {
        let RestrictionStatus { ruleset, .. } = self.restrict()?;
        Ok(match ruleset {
            RulesetStatus::FullyEnforced => Held::Fully,
            RulesetStatus::PartiallyEnforced => Held::Partly,
            RulesetStatus::NotEnforced => Held::NotAtAll,
        })
    }

    fn restrict(&self) -> Result<RestrictionStatus, landlock::RulesetError> {
        let read: BitFlags<AccessFs> = AccessFs::ReadFile | AccessFs::ReadDir;
        let sockets: BitFlags<AccessFs> = AccessFs::MakeSock | AccessFs::RemoveFile;
        let write = AccessFs::MakeReg | AccessFs::WriteFile | AccessFs::Truncate;
        let devices = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
        // Directories that are not there are left out.
        Ruleset::default()
            .handle_access(AccessFs::from_all(KNOWN))?
            .handle_access(AccessNet::from_all(KNOWN))?
            .scope(Scope::AbstractUnixSocket)?
            .create()?
            .add_rules(path_beneath_rules(&self.read, read))?
            .add_rules(path_beneath_rules(&self.sockets, sockets))?
            .add_rules(path_beneath_rules(&self.write, write))?
            .add_rules(path_beneath_rules(&self.devices, devices))?
            .restrict_self()
    }
}

/// Where a socket's file lies.
pub fn directory_of(socket: &Path) -> Option<&Path> {
    let dir = socket.parent()?;
    Some(if dir.as_os_str().is_empty() { Path::new(".") } else { dir })
}
