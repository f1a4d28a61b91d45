//! The run directory: where sockets live.
//!
//! `--run-dir` if it was given; else /run/cableway, or `$XDG_RUNTIME_DIR/cableway` for a user other than root. Only the
//! default is created: a directory that the user named and that is not there is a mistake.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::unistd::{AccessFlags, access, geteuid};

use crate::SOCKET_PATH_MAX;

/// The shortest name of a control socket: where it does not fit, none does.
const SHORTEST: &str = "switch.sock";

/// Why there is no run directory to work in.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// It is not there.
    #[error("run directory {} does not exist: mkdir -p {}", .0.display(), .0.display())]
    Missing(PathBuf),
    /// It is a file.
    #[error("run directory {} is not a directory: name another one with --run-dir", .0.display())]
    NotADirectory(PathBuf),
    /// We may not create files in it.
    #[error("run directory {} is not permitted to user {}: name another one with --run-dir, or change its owner", .0.display(), geteuid())]
    NotPermitted(PathBuf),
    /// Even the control socket would not fit.
    #[error("run directory {} is too long: the path of a socket has at most {SOCKET_PATH_MAX} bytes; name another one with --run-dir", .0.display())]
    TooLong(PathBuf),
    /// The default cannot be created.
    #[error("run directory {} cannot be created: {source}; name another one with --run-dir", path.display())]
    Create {
        /// The directory.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// There is no default for this user.
    #[error("no run directory: XDG_RUNTIME_DIR is not set; name one with --run-dir")]
    NoDefault,
}

/// The run directory of a process that will open sockets in it.
///
/// # Errors
/// It cannot.
pub fn run_dir_of_server(given: Option<&Path>) -> Result<PathBuf, RunDirError> {
    let path = match given {
        Some(given) => given.to_owned(),
        None => {
            let path = default_dir()?;
            match DirBuilder::new().mode(0o755).create(&path) {
                Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(RunDirError::Create { path, source });
                }
                _ => path,
            }
        }
    };
    match std::fs::metadata(&path) {
        Ok(found) if !found.is_dir() => Err(RunDirError::NotADirectory(path)),
        Ok(_) if access(&path, AccessFlags::W_OK | AccessFlags::X_OK).is_err() => {
            Err(RunDirError::NotPermitted(path))
        }
        Ok(_) if path.join(SHORTEST).as_os_str().len() > SOCKET_PATH_MAX => Err(RunDirError::TooLong(path)),
        Ok(_) => Ok(path),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(RunDirError::NotPermitted(path)),
        Err(_) => Err(RunDirError::Missing(path)),
    }
}

/// The run directory of a process that asks.
///
/// # Errors
/// There is no default for this user.
pub fn run_dir_of_client(given: Option<&Path>) -> Result<PathBuf, RunDirError> {
    given.map_or_else(default_dir, |given| Ok(given.to_owned()))
}

fn default_dir() -> Result<PathBuf, RunDirError> {
    if geteuid().is_root() {
        return Ok(PathBuf::from("/run/cableway"));
    }
    let base = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty());
    Ok(PathBuf::from(base.ok_or(RunDirError::NoDefault)?).join("cableway"))
}
