//! What a configuration needs to know of the machine: cores, groups, and whether a socket can be where it is wanted.
//!
//! A switch that runs is confined, and can use less of the machine than one that starts: no group that it has not looked
//! up before, no directory that it did not name. What it cannot do is refused here, before anything is touched.

use std::collections::BTreeMap;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use host::pci::{Bdf, NotABdf};
use host::sandbox::TUN;
use host::sandbox::files::{FileAccess, directory_of};
use host::topology::{self, CoreSet};
use nix::unistd::{AccessFlags, Gid, Group};
use settings::{DeTable, Fill, Problems};

use super::{PortKind, SocketSide};
use crate::sandbox::Devices;

/// Decides values that a document leaves to the machine (`workers = "auto"`).
pub type Decide = dyn Fn(&DeTable<'_>, &mut Problems<'_>) -> Vec<Fill> + Send + Sync;

/// What validation asks of the machine. Each error is a sentence for the user.
pub trait Surroundings {
    /// Values that `document` leaves to the machine. What keeps them from being decided goes to `problems`.
    fn decide(&self, _document: &DeTable<'_>, _problems: &mut Problems<'_>) -> Vec<Fill> {
        Vec::new()
    }

    /// Whether this process may run on `core`.
    ///
    /// # Errors
    /// It may not, or there is no such core.
    fn core(&self, core: u32) -> Result<(), String>;

    /// The number of a group that a socket can be given to.
    ///
    /// # Errors
    /// There is no such group, or we may not give files to it.
    fn group(&self, name: &str) -> Result<u32, String>;

    /// Whether we can listen on, or connect to, a socket at `path`.
    ///
    /// # Errors
    /// We cannot, and why.
    fn socket(&self, path: &Path, side: SocketSide) -> Result<(), String>;

    /// Whether we can read the file at `path`.
    ///
    /// # Errors
    /// We cannot, and why.
    fn reads(&self, path: &Path) -> Result<(), String>;

    /// Whether we can make or empty the file at `path`.
    ///
    /// # Errors
    /// We cannot, and why.
    fn writes(&self, path: &Path) -> Result<(), String>;

    /// Bytes of memory that the machine has: no guest's is more.
    fn memory(&self) -> u64;

    /// Whether ports of this kind can have devices here.
    ///
    /// # Errors
    /// They cannot, and why. That the device is not there is none: it may come.
    fn device(&self, name: &str, kind: PortKind) -> Result<(), String>;
}

/// The machine and the process that we are, as they were when this was made.
#[derive(Clone)]
pub struct ThisMachine {
    online: Option<CoreSet>,
    permitted: Option<CoreSet>,
    memory: u64,
    ours: Vec<PathBuf>,
    /// Groups that were looked up, by name.
    groups: Arc<Mutex<BTreeMap<String, Gid>>>,
    confined: Option<Confined>,
    decide: Option<Arc<Decide>>,
}

/// Directories with all that lies beneath, and device and inode of each when the switch started.
type Known = Vec<(PathBuf, (u64, u64))>;

fn known(directories: &[PathBuf]) -> Known {
    directories.iter().filter_map(|dir| Some((dir.clone(), identity(dir)?))).collect()
}

/// What a switch that runs is confined to.
#[derive(Clone, Debug)]
struct Confined {
    /// Where sockets can be made; `None`: wherever permissions allow.
    sockets: Option<Known>,
    /// Where files can be read.
    read: Option<Known>,
    /// Where files can be written.
    write: Option<Known>,
    /// What kinds of devices it may open.
    devices: Devices,
}

fn identity(directory: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(directory).ok().map(|found| (found.dev(), found.ino()))
}

impl ThisMachine {
    /// Asks the kernel. Ask before the process pins its threads: a pinned thread may run nowhere else.
    pub fn now() -> Self {
        // Where the kernel does not tell, pinning the worker will.
        let online = topology::online_cores(Path::new("/")).ok();
        let permitted = topology::usable_cores(Path::new("/")).ok();
        // The kernel always tells; were it not to, a machine of a common size is supposed.
        let memory = nix::sys::sysinfo::sysinfo().map_or(64 << 30, |info| info.ram_total());
        Self {
            online,
            permitted,
            memory,
            ours: Vec::new(),
            groups: Arc::default(),
            confined: None,
            decide: None,
        }
    }

    /// The same machine, on which somebody decides what documents leave open. He is asked again at each reload, by a thread that
    /// is confined by then: whatever he reads of the machine he has read before.
    #[must_use]
    pub fn deciding(&self, decide: Arc<Decide>) -> Self {
        Self { decide: Some(decide), ..self.clone() }
    }

    /// The same machine for a switch that runs, held to `devices`, and to `files` if to any. Ask before the thread is confined.
    #[must_use]
    pub(crate) fn confined(&self, files: Option<&FileAccess>, devices: Devices) -> Self {
        // Other sources of groups are asked through code that is loaded, which confinement forbids.
        let text = std::fs::read_to_string("/etc/group").unwrap_or_default();
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        for line in text.lines() {
            let mut fields = line.split(':');
            if let (Some(name), Some(Ok(gid))) = (fields.next(), fields.nth(1).map(str::parse)) {
                groups.entry(name.to_owned()).or_insert_with(|| Gid::from_raw(gid));
            }
        }
        drop(groups);
        let confined = Confined {
            sockets: files.map(|files| known(&files.sockets)),
            read: files.map(|files| known(&files.read)),
            write: files.map(|files| known(&files.write)),
            devices,
        };
        Self { confined: Some(confined), ..self.clone() }
    }

    /// The same machine when this process listens on these sockets: that they answer is no problem.
    #[must_use]
    pub fn listening_on(&self, ours: Vec<PathBuf>) -> Self {
        Self { ours, ..self.clone() }
    }

    fn find_group(&self, name: &str) -> Result<Gid, String> {
        let known = self.groups.lock().unwrap_or_else(PoisonError::into_inner).get(name).copied();
        if let Some(gid) = known {
            return Ok(gid);
        }
        if self.confined.is_some() {
            return Err(format!(
                "group {name:?} was not in /etc/group when the switch started, and a running switch asks nobody else: \
                 give the group's number, or restart the switch"
            ));
        }
        match Group::from_name(name) {
            Ok(Some(group)) => {
                self.groups.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), group.gid);
                Ok(group.gid)
            }
            Ok(None) => Err(format!("there is no group {name:?}; see /etc/group")),
            Err(error) => Err(format!("group {name:?} cannot be looked up: {error}")),
        }
    }

    /// Whether a running switch can use `dir` as it uses the directories of `list`: it is one of them, or beneath one.
    fn reaches(&self, dir: &Path, list: fn(&Confined) -> Option<&Known>) -> Result<(), String> {
        let Some(directories) = self.confined.as_ref().and_then(list) else { return Ok(()) };
        let real = std::fs::canonicalize(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
        let known =
            |dir: &Path| identity(dir).is_some_and(|id| directories.iter().any(|known| known.1 == id));
        if real.ancestors().any(known) {
            return Ok(());
        }
        let names: Vec<String> = directories.iter().map(|known| known.0.display().to_string()).collect();
        Err(format!(
            "directory {} is none of those that the switch confined itself to when it started ({}): restart the \
             switch, or use one of them",
            dir.display(),
            names.join(", ")
        ))
    }
}

impl Surroundings for ThisMachine {
    fn decide(&self, document: &DeTable<'_>, problems: &mut Problems<'_>) -> Vec<Fill> {
        self.decide.as_ref().map_or_else(Vec::new, |decide| decide(document, problems))
    }

    fn core(&self, core: u32) -> Result<(), String> {
        if let Some(online) = self.online.as_ref().filter(|online| !online.contains(core)) {
            return Err(format!("there is no core {core}: this machine has {online}"));
        }
        match self.permitted.as_ref().filter(|permitted| !permitted.contains(core)) {
            Some(permitted) => Err(format!(
                "core {core} is not permitted to this process, {permitted} are: see its affinity (taskset) and its \
                 control group (cpuset)"
            )),
            None => Ok(()),
        }
    }

    fn group(&self, name: &str) -> Result<u32, String> {
        let gid = match name.parse::<u32>() {
            Ok(number) => Gid::from_raw(number),
            Err(_) => self.find_group(name)?,
        };
        let member = gid == nix::unistd::getegid()
            || nix::unistd::getgroups().is_ok_and(|groups| groups.contains(&gid))
            || nix::unistd::geteuid().is_root();
        if member {
            return Ok(gid.as_raw());
        }
        Err(format!(
            "this process is not in group {name:?} and so cannot give it a socket: usermod -aG {name} USER"
        ))
    }

    fn socket(&self, path: &Path, side: SocketSide) -> Result<(), String> {
        let dir = directory_of(path).unwrap_or(Path::new("."));
        if !dir.is_dir() {
            return Err(format!("directory {} does not exist: mkdir -p {}", dir.display(), dir.display()));
        }
        let wanted = match side {
            SocketSide::Server => AccessFlags::W_OK | AccessFlags::X_OK,
            SocketSide::Client => AccessFlags::X_OK,
        };
        if nix::unistd::access(dir, wanted).is_err() {
            let whom = nix::unistd::geteuid();
            return Err(format!("directory {} is not permitted to user {whom}: see ls -ld", dir.display()));
        }
        if side == SocketSide::Server {
            self.reaches(dir, |confined| confined.sockets.as_ref())?;
        }
        let Ok(found) = std::fs::symlink_metadata(path) else { return Ok(()) };
        if !found.file_type().is_socket() {
            return Err(format!("{} exists and is not a socket: move it away", path.display()));
        }
        if side == SocketSide::Server
            && !self.ours.iter().any(|ours| ours == path)
            && UnixStream::connect(path).is_ok()
        {
            return Err(format!(
                "{} is in use, another process answers there: give this port another `socket`, or end that process \
                 (ss -xlp shows it)",
                path.display()
            ));
        }
        Ok(())
    }

    fn reads(&self, path: &Path) -> Result<(), String> {
        self.reaches(directory_of(path).unwrap_or(Path::new(".")), |confined| confined.read.as_ref())?;
        if !path.is_file() {
            return Err(format!("{} is not there, or is no file", path.display()));
        }
        nix::unistd::access(path, AccessFlags::R_OK).map_err(|error| format!("{}: {error}", path.display()))
    }

    fn writes(&self, path: &Path) -> Result<(), String> {
        let dir = directory_of(path).unwrap_or(Path::new("."));
        self.reaches(dir, |confined| confined.write.as_ref())?;
        if path.exists() && !path.is_file() {
            return Err(format!("{} exists and is no file: choose another", path.display()));
        }
        let place = if path.exists() { path } else { dir };
        nix::unistd::access(place, AccessFlags::W_OK).map_err(|error| format!("{}: {error}", place.display()))
    }

    fn memory(&self) -> u64 {
        self.memory
    }

    fn device(&self, name: &str, kind: PortKind) -> Result<(), String> {
        let needed = Devices::of_kind(kind);
        if self.confined.as_ref().is_some_and(|confined| !confined.devices.contains(needed)) {
            return Err(format!(
                "the switch confined itself when it started, and had no port of kind {:?} then: restart the switch",
                kind.word()
            ));
        }
        if needed.contains(Devices::PACKET) {
            use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
            let tried = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None);
            tried.map_err(|error| {
                format!("no packet socket on {name}: {error}; run the switch with CAP_NET_RAW")
            })?;
        }
        if needed.contains(Devices::XDP) {
            pmd::kernel::xdp::check().map_err(|why| format!("no XDP socket on {name}: {why}"))?;
        }
        if needed.contains(Devices::VFIO) {
            let bdf: Bdf = name.parse().map_err(|error: NotABdf| error.to_string())?;
            host::vfio::check(Path::new("/"), bdf).map_err(|error| error.to_string())?;
        }
        if needed.contains(Devices::TUN) {
            let wanted = AccessFlags::R_OK | AccessFlags::W_OK;
            nix::unistd::access(TUN, wanted).map_err(|error| {
                format!("{name} cannot be a tap here, {TUN}: {error} (modprobe tun; ls -l {TUN})")
            })?;
        }
        Ok(())
    }
}
