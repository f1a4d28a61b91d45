//! The server of a control socket: one thread, a bounded number of connections, each bounded in time and size.
//!
//! A client that sends half a request, or does not read its answer, costs its own connection and delays nobody.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use nix::sys::socket::sockopt::{self, PeerCredentials};
use nix::sys::socket::{SockType, getsockopt};
use nix::sys::stat::{Mode, fchmod};
use tokio::sync::{Semaphore, oneshot};

use crate::Door;

/// Connections at a time; further ones are closed at once.
const CONNECTIONS: usize = 32;
/// Longest time for the head of a request to arrive.
const REQUEST_TIME: Duration = Duration::from_secs(5);
/// Longest life of a connection, its answers read or not.
const CONNECTION_TIME: Duration = Duration::from_secs(30);
/// Largest head of a request, in bytes.
pub const HEAD_MAX: usize = 16_384;
/// Who may ask: owner and group.
const SOCKET_MODE: u32 = 0o660;

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Another process serves it.
    #[error("a {what} is already running{} in {}: {taken}", pid_text(*pid), run_dir.display())]
    AlreadyRunning {
        /// What it is.
        what: String,
        /// What to do.
        taken: &'static str,
        /// Its process, if the kernel tells.
        pid: Option<i32>,
        /// The run directory.
        run_dir: PathBuf,
    },
    /// Something else is at the socket's path.
    #[error("{} exists and is not a socket: move it away", .0.display())]
    NotASocket(PathBuf),
    /// What was handed over is not this socket.
    #[error("the socket that was handed over is {found}: ListenStream={} in its unit", socket.display())]
    NotThis {
        /// Where it should listen.
        socket: PathBuf,
        /// What it is instead.
        found: String,
    },
    /// The kernel refused.
    #[error("control socket {}: {doing}: {source}", path.display())]
    System {
        /// The socket.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

fn pid_text(pid: Option<i32>) -> String {
    pid.map_or_else(String::new, |pid| format!(" (pid {pid})"))
}

/// A control socket that is bound and not yet served. Removes its file when dropped, if it made it.
pub struct ControlSocket {
    listener: UnixListener,
    path: PathBuf,
    file: Option<SocketFile>,
}

impl ControlSocket {
    /// Takes the door for this process; a socket that nobody answers is replaced. Connections wait until it is served.
    ///
    /// # Errors
    /// Another process answers there, or the kernel refuses.
    pub fn bind(door: &Door) -> Result<Self, ControlError> {
        let path = door.socket.clone();
        let failed = |doing| {
            let path = path.clone();
            move |source: io::Error| ControlError::System { path, doing, source }
        };
        if let Ok(found) = std::fs::symlink_metadata(&path) {
            if !found.file_type().is_socket() {
                return Err(ControlError::NotASocket(path));
            }
            match UnixStream::connect(&path) {
                Ok(other) => {
                    let pid = getsockopt(&other, PeerCredentials).ok().map(|peer| peer.pid());
                    let run_dir = door.run_dir().to_owned();
                    let what = door.what.clone();
                    return Err(ControlError::AlreadyRunning { what, taken: door.taken, pid, run_dir });
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    std::fs::remove_file(&path)
                        .map_err(failed("removing the one of a process that is gone"))?;
                }
                Err(error) => return Err(failed("asking whether somebody is there")(error)),
            }
        }
        let listener = bind_private(&path).map_err(failed("listening"))?;
        let inode = std::fs::symlink_metadata(&path).map_err(failed("listening"))?.ino();
        let file = Some(SocketFile { path: path.clone(), inode });
        // The umask may have taken the group's right away.
        let mode = std::os::unix::fs::PermissionsExt::from_mode(SOCKET_MODE);
        std::fs::set_permissions(&path, mode).map_err(failed("setting its permissions"))?;
        Ok(Self { listener, path, file })
    }

    /// Takes the door by a socket that listens there already, and whose file is somebody else's: of systemd's socket units.
    ///
    /// # Errors
    /// It is another socket, or does not listen.
    pub fn take(door: &Door, handed: OwnedFd) -> Result<Self, ControlError> {
        let socket = door.socket.clone();
        let not_this = |found: String| ControlError::NotThis { socket: socket.clone(), found };
        let listens = getsockopt(&handed, sockopt::AcceptConn).unwrap_or(false)
            && getsockopt(&handed, sockopt::SockType).is_ok_and(|kind| kind == SockType::Stream);
        if !listens {
            return Err(not_this("none that takes connections (ListenStream=)".to_owned()));
        }
        let listener = UnixListener::from(handed);
        let address = listener.local_addr().map_err(|_| not_this("no UNIX socket".to_owned()))?;
        let found = address.as_pathname().ok_or_else(|| not_this("without a path".to_owned()))?;
        // Not by their names: /var/run is /run on many machines.
        let inode = |path: &Path| std::fs::metadata(path).map(|file| (file.dev(), file.ino()));
        match (inode(found), inode(&socket)) {
            (Ok(theirs), Ok(ours)) if theirs == ours => Ok(Self { listener, path: socket, file: None }),
            _ => Err(not_this(found.display().to_string())),
        }
    }

    /// Serves it from a thread of its own, which does `first` before anything else.
    ///
    /// # Errors
    /// The kernel refuses a thread or what it needs.
    pub fn serve(
        self,
        router: axum::Router,
        first: impl FnOnce() + Send + 'static,
    ) -> Result<ControlServer, ControlError> {
        let Self { listener, path, file } = self;
        let failed = |source| ControlError::System { path, doing: "serving", source };
        let (stop, stopped) = oneshot::channel();
        let start = || {
            listener.set_nonblocking(true)?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let listener = {
                let _inside = runtime.enter();
                tokio::net::UnixListener::from_std(listener)?
            };
            let serve = move || {
                first();
                runtime.block_on(accept(listener, router, stopped));
            };
            std::thread::Builder::new().name("control".into()).spawn(serve)
        };
        let thread = start().map_err(failed)?;
        Ok(ControlServer { stop: Some(stop), thread: Some(thread), _file: file })
    }
}

/// Listens, with no moment in which others than owner and group may connect: the mode of an unbound socket is the mode of
/// the file that binding makes.
fn bind_private(path: &Path) -> io::Result<UnixListener> {
    use nix::sys::socket::{AddressFamily, Backlog, SockFlag, UnixAddr, bind, listen, socket};
    let unbound = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    fchmod(unbound.as_fd(), Mode::from_bits_truncate(SOCKET_MODE))?;
    bind(std::os::fd::AsRawFd::as_raw_fd(&unbound), &UnixAddr::new(path)?)?;
    listen(&unbound, Backlog::new(128)?)?;
    Ok(UnixListener::from(unbound))
}

/// A served control socket. Ends when dropped: open connections are closed, the socket's file is removed.
pub struct ControlServer {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    _file: Option<SocketFile>,
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Accepts until told to stop (the sender of `stopped` is dropped).
async fn accept(
    listener: tokio::net::UnixListener,
    router: axum::Router,
    mut stopped: oneshot::Receiver<()>,
) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let stream = tokio::select! {
            _ = &mut stopped => return,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors: whoever has them may give some back.
                    tracing::warn!("control socket: accepting a connection: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        let Ok(slot) = slots.clone().try_acquire_owned() else { continue };
        let router = router.clone();
        tokio::spawn(async move {
            converse(stream, router).await;
            drop(slot);
        });
    }
}

/// Answers one client until it is gone, for a bounded time.
pub async fn converse(stream: tokio::net::UnixStream, router: axum::Router) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_TIME)
        .max_buf_size(HEAD_MAX)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    // A client that misbehaves or vanishes is its own problem: there is nobody to tell.
    let _ = tokio::time::timeout(CONNECTION_TIME, connection).await;
}

/// The file of our socket; removed when dropped, unless it is somebody else's by now.
struct SocketFile {
    path: PathBuf,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if std::fs::symlink_metadata(&self.path).is_ok_and(|found| found.ino() == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
