//! What a configuration needs to know of the machine: cores, groups, and whether a socket can be where it is wanted.

use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use host::topology::{self, CoreSet};
use nix::unistd::{AccessFlags, Gid, Group};

use super::SocketSide;

/// What validation asks of the machine. Each error is a sentence for the user.
pub trait Surroundings {
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
}

/// The machine and the process that we are, as they were when this was made.
#[derive(Clone, Debug)]
pub struct ThisMachine {
    online: Option<CoreSet>,
    permitted: Option<CoreSet>,
    ours: Vec<PathBuf>,
}

impl ThisMachine {
    /// Asks the kernel. Ask before the process pins its threads: a pinned thread may run nowhere else.
    pub fn now() -> Self {
        // Where the kernel does not tell, pinning the worker will.
        let online = topology::online_cores(Path::new("/")).ok();
        Self { online, permitted: topology::permitted_cores().ok(), ours: Vec::new() }
    }

    /// The same machine when this process listens on these sockets: that they answer is no problem.
    #[must_use]
    pub fn listening_on(&self, ours: Vec<PathBuf>) -> Self {
        Self { ours, ..self.clone() }
    }
}

impl Surroundings for ThisMachine {
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
            Err(_) => match Group::from_name(name) {
                Ok(Some(group)) => group.gid,
                Ok(None) => return Err(format!("there is no group {name:?}; see /etc/group")),
                Err(error) => return Err(format!("group {name:?} cannot be looked up: {error}")),
            },
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
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
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
}
