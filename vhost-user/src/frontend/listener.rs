//! A front end that listens: the back end connects to it.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{FrontEnd, FrontEndError, Result, readable};
use crate::socket::{ListeningSocket, SocketError};

/// A socket on which a back end is awaited.
#[derive(Debug)]
pub struct FrontEndListener {
    socket: ListeningSocket,
    path: PathBuf,
}

impl FrontEndListener {
    /// Listens on `path`, for the owner and the group; a socket file that nobody answers on is replaced.
    ///
    /// # Errors
    /// Somebody answers; the path is impossible; the kernel refuses.
    pub fn bind(path: &Path) -> Result<Self> {
        Ok(Self { socket: ListeningSocket::new(path, 0o660, None)?, path: path.to_owned() })
    }

    /// Waits for a back end, at most `patience`; later answers of it are waited for as long.
    ///
    /// # Errors
    /// None came.
    pub fn accept(&self, patience: Duration) -> Result<FrontEnd> {
        let deadline = Instant::now() + patience;
        loop {
            let accepted = self.socket.accept();
            let kernel = |source| SocketError::Kernel { doing: "accept on", path: self.path.clone(), source };
            if let Some(stream) = accepted.map_err(kernel)? {
                return FrontEnd::from_stream(stream, patience);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(FrontEndError::Nobody { path: self.path.clone(), waited: patience });
            }
            readable(self.socket.listener.as_fd(), left);
        }
    }
}

impl AsFd for FrontEndListener {
    /// The listening socket, to wait for a back end beside other things.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.listener.as_fd()
    }
}
