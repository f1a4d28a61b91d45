//! Which files a running switch may open, make and remove: Landlock rules (Linux 5.13 and later) out of its configuration.
//!
//! Owns the lists of directories and devices, and how they are put in force for housekeeping, sessions, the control socket and main.
//! Workers need none: their seccomp filter lets them open nothing. What is in force can never be widened, so a reload has to
//! live within what the start named (`config::machine` says so to the user). Connecting to a socket is not restricted:
//! which VMM a client port connects to may change at any time.

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, BitFlags, RestrictionStatus, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetStatus, Scope, path_beneath_rules,
};

use super::{Devices, TUN};
use crate::config::Config;

/// The rights that are withheld unless a rule grants them. Later versions add the right to connect to a socket.
const KNOWN: ABI = ABI::V7;

/// Cores and memory nodes, which placement and reports look up.
const MACHINE: &str = "/sys/devices/system";

/// What is known of network cards, and their groups; huge pages for them; what the IOMMU refused them.
const CARDS: [&str; 4] = ["/sys/devices", "/sys/bus/pci", "/sys/kernel", host::vfio::LOG];

/// The files could not be confined.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot confine the switch to its own files with Landlock: {0}; `confine_files = false` in [switch] starts it without"
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

/// Directories that a switch uses after its start, each with all that lies beneath.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// What `config` needs. Directories, not files: an editor puts a new file in the old one's place, and rules follow the
    /// old one. `None` if the configuration wants no confinement.
    pub fn of(config: &Config, run_dir: &Path) -> Option<Self> {
        if !config.switch.confine_files {
            return None;
        }
        let mut read = vec![PathBuf::from(MACHINE)];
        // Where the file is named, and where it lies if that is a symbolic link.
        for file in [std::path::absolute(&config.file), std::fs::canonicalize(&config.file)] {
            read.extend(file.ok().as_deref().and_then(Path::parent).map(Path::to_owned));
        }
        let mut sockets = vec![run_dir.to_owned()];
        let ours = config.ports.iter().filter_map(|port| port.behind.listens_on());
        sockets.extend(ours.filter_map(|socket| Some(directory_of(socket)?.to_owned())));
        let kinds = Devices::of(config);
        let tun = kinds.contains(Devices::TUN).then(|| PathBuf::from(TUN));
        let vfio = kinds.contains(Devices::VFIO).then(|| PathBuf::from(host::vfio::FOLDER));
        read.extend(CARDS.iter().map(PathBuf::from).filter(|_| vfio.is_some()));
        let directory = |file: &Path| directory_of(file).map(Path::to_owned);
        read.extend(config.ports.iter().filter_map(|p| directory(p.behind.reads()?)));
        let written = config.ports.iter().flat_map(|port| port.writes());
        let mut write: Vec<_> = written.filter_map(directory).collect();
        for list in [&mut read, &mut sockets, &mut write] {
            list.sort_unstable();
            list.dedup();
        }
        Some(Self { read, sockets, write, devices: tun.into_iter().chain(vfio).collect() })
    }

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
pub(crate) fn directory_of(socket: &Path) -> Option<&Path> {
    let dir = socket.parent()?;
    Some(if dir.as_os_str().is_empty() { Path::new(".") } else { dir })
}
