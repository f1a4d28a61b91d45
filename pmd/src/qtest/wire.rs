//! The other end of a modelled card's network cable: a datagram socket, a frame a datagram.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{RcvBuf, SndBuf};

use super::{MachineError, io_error};

/// Sends frames to the card and receives what it sends. No frame is lost: a full socket makes its sender wait.
pub struct Wire {
    socket: UnixDatagram,
    peer: PathBuf,
}

impl Wire {
    pub(super) fn new(ours: &Path, peer: &Path) -> Result<Self, MachineError> {
        let socket = UnixDatagram::bind(ours).map_err(io_error("cannot make a socket for frames"))?;
        // Larger buffers only save waiting; the system's limit may say no.
        let _ = setsockopt(&socket, RcvBuf, &(4 << 20));
        let _ = setsockopt(&socket, SndBuf, &(4 << 20));
        Ok(Self { socket, peer: peer.to_owned() })
    }

    /// Sends a frame, without FCS. Waits while QEMU has no room.
    ///
    /// # Errors
    /// QEMU is gone.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        self.socket.send_to(frame, &self.peer).map(drop)
    }

    /// Waits for a frame, at most `limit`; its length, or nothing.
    ///
    /// # Errors
    /// The socket's.
    pub fn receive(&self, frame: &mut [u8], limit: Duration) -> io::Result<Option<usize>> {
        self.socket.set_read_timeout(Some(limit))?;
        match self.socket.recv(frame) {
            Ok(len) => Ok(Some(len)),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => Ok(None),
            Err(e) => Err(e),
        }
    }
}
