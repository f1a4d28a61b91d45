//! Why a front end's request failed, in words for the user.

use std::path::PathBuf;
use std::time::Duration;

use crate::socket::SocketError;

/// Why a front end's request failed. All but [`FrontEndError::Refused`] and [`FrontEndError::NotNegotiated`] end the session.
#[derive(Debug, thiserror::Error)]
pub enum FrontEndError {
    /// Nobody listens.
    #[error("cannot connect to {path}: {source}; is a switch serving that socket?")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The socket cannot be listened on.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// Nobody came.
    #[error("no back end connected to {path} within {} s", .waited.as_secs_f32())]
    Nobody {
        /// The socket.
        path: PathBuf,
        /// How long it was waited.
        waited: Duration,
    },
    /// A message could not be sent.
    #[error("cannot send {message}: {source}")]
    Send {
        /// Which.
        message: &'static str,
        /// What the kernel said.
        source: nix::Error,
    },
    /// No answer came.
    #[error("the back end did not answer {message} within {} s", .waited.as_secs_f32())]
    TimedOut {
        /// To which message.
        message: &'static str,
        /// How long it was waited.
        waited: Duration,
    },
    /// Each answer came in time, and all of them together did not.
    #[error("the back end was not done within {} s with all that it was told; given up at {message}", .waited.as_secs_f32())]
    Slow {
        /// At which message.
        message: &'static str,
        /// How long it was waited.
        waited: Duration,
    },
    /// The back end went away instead of answering.
    #[error("the back end closed the connection at {message}; its log may say why")]
    Closed {
        /// At which message.
        message: &'static str,
    },
    /// The back end said no.
    #[error("the back end refused {message} (status {status}); its log may say why")]
    Refused {
        /// Which.
        message: &'static str,
        /// What it said; not 0.
        status: u64,
    },
    /// The answer makes no sense.
    #[error("the back end's answer to {message} makes no sense: {why}")]
    Answer {
        /// To which message.
        message: &'static str,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A request whose feature the back end does not have.
    #[error("the back end does not support {0}")]
    NotNegotiated(&'static str),
}
