//! The socket of a port: listening with the mode and group that the user wants, or connecting.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};

/// Connections that may wait to be told that the port is taken.
const BACKLOG: i32 = 16;

/// How a port meets its front end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mode {
    /// We listen, the front end connects.
    Server {
        /// Permissions of the socket file.
        mode: u32,
        /// Group of the socket file; unchanged if none.
        group: Option<u32>,
    },
    /// The front end listens; we connect, and try again for ever.
    Client {
        /// Time between attempts.
        retry: Duration,
    },
}

impl Mode {
    /// Listening, for the owner and the group.
    pub fn server() -> Self {
        Mode::Server { mode: 0o660, group: None }
    }

    /// Connecting, once a second.
    pub fn client() -> Self {
        Mode::Client { retry: Duration::from_secs(1) }
    }
}

/// Why a port's socket cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// A path that no socket can have.
    #[error("socket path {path} is too long: {len} bytes, at most 107 are possible; use a shorter one")]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
    },
    /// Somebody listens there.
    #[error("socket {0} is in use: a process listens on it; end that process or use another path")]
    InUse(PathBuf),
    /// Something else is there.
    #[error("{0} exists and is no socket; remove it or use another path")]
    NoSocket(PathBuf),
    /// The kernel refused a step.
    #[error("cannot {doing} socket {path}: {source}")]
    Kernel {
        /// What was being done.
        doing: &'static str,
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// No thread for the port.
    #[error("cannot start a thread for a port: {0}")]
    Thread(io::Error),
}

/// A listening socket; its file goes when it is dropped.
#[derive(Debug)]
pub(crate) struct ListeningSocket {
    pub(crate) listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file, so that nobody else's is removed.
    file: Option<(u64, u64)>,
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let meta = std::fs::symlink_metadata(path).ok()?;
    meta.file_type().is_socket().then(|| (meta.dev(), meta.ino()))
}

/// Refuses paths that do not fit a socket address, before the kernel says so less clearly.
pub(crate) fn check_path(path: &Path) -> Result<(), SocketError> {
    let len = path.as_os_str().len();
    if len > 107 { Err(SocketError::TooLong { path: path.to_owned(), len }) } else { Ok(()) }
}

impl ListeningSocket {
    /// Listens on `path`. A socket file that nobody answers on is replaced.
    pub(crate) fn new(path: &Path, mode: u32, group: Option<u32>) -> Result<Self, SocketError> {
        check_path(path)?;
        let kernel =
            |doing| move |source: io::Error| SocketError::Kernel { doing, path: path.to_owned(), source };
        remove_stale(path)?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, flags, None)
            .map_err(|e| kernel("make")(e.into()))?;
        let address = UnixAddr::new(path).map_err(|e| kernel("name")(e.into()))?;
        bind(fd.as_raw_fd(), &address).map_err(|e| kernel("bind")(e.into()))?;
        // From here on, dropping `this` removes the file. Nobody can connect before listen().
        let this = Self { listener: fd.into(), path: path.to_owned(), file: identity(path) };
        if let Some(group) = group {
            std::os::unix::fs::chown(path, None, Some(group)).map_err(kernel("set the group of"))?;
        }
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
            .map_err(kernel("set the mode of"))?;
        let backlog = Backlog::new(BACKLOG).map_err(|e| kernel("listen on")(e.into()))?;
        listen(&this.listener, backlog).map_err(|e| kernel("listen on")(e.into()))?;
        Ok(this)
    }

    /// A connection that waits, if there is one.
    pub(crate) fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                Ok(Some(stream))
            }
            Err(e) => match e.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {
                    Ok(None)
                }
                _ => Err(e),
            },
        }
    }
}

impl Drop for ListeningSocket {
    fn drop(&mut self) {
        if self.file.is_some() && self.file == identity(&self.path) {
            // If it fails, the next start replaces the file.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let meta = match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(SocketError::Kernel { doing: "inspect", path: path.to_owned(), source }),
        Ok(meta) => meta,
    };
    if !meta.file_type().is_socket() {
        return Err(SocketError::NoSocket(path.to_owned()));
    }
    match UnixStream::connect(path) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path)
            .map_err(|source| SocketError::Kernel { doing: "replace stale", path: path.to_owned(), source }),
        Err(source) => Err(SocketError::Kernel { doing: "probe", path: path.to_owned(), source }),
        Ok(_) => Err(SocketError::InUse(path.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_file_is_replaced_and_removed_in_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v0.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let socket = ListeningSocket::new(&path, 0o640, None).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        UnixStream::connect(&path).unwrap();
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_socket_that_answers_is_an_error_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v0.sock");
        let _other = UnixListener::bind(&path).unwrap();
        assert!(matches!(ListeningSocket::new(&path, 0o660, None), Err(SocketError::InUse(_))));
        assert!(path.exists());
    }

    #[test]
    fn a_file_that_is_no_socket_is_never_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        std::fs::write(&path, "data").unwrap();
        assert!(matches!(ListeningSocket::new(&path, 0o660, None), Err(SocketError::NoSocket(_))));
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
    }

    #[test]
    fn a_socket_file_of_somebody_else_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v0.sock");
        let ours = ListeningSocket::new(&path, 0o660, None).unwrap();
        std::fs::rename(&path, dir.path().join("moved")).unwrap();
        let _theirs = UnixListener::bind(&path).unwrap();
        drop(ours);
        assert!(path.exists());
    }

    #[test]
    fn paths_that_are_too_long_or_lead_nowhere_are_named() {
        let long = Path::new("/tmp").join("x".repeat(120));
        let text = ListeningSocket::new(&long, 0o660, None).unwrap_err().to_string();
        assert!(text.contains("too long") && text.contains("107"), "{text}");
        let text =
            ListeningSocket::new(Path::new("/nowhere/at/all.sock"), 0o660, None).unwrap_err().to_string();
        assert!(text.contains("/nowhere/at/all.sock"), "{text}");
    }
}
