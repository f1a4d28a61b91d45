//! Ports that the kernel backs, for machines without a NIC of their own for the switch.
//!
//! Each module is one kind of device: it opens it, and implements [`port::Source`] and [`port::Sink`] over what the kernel
//! gives. All descriptors are non-blocking. Nothing here judges a frame, counts one, or knows a switch.

mod interface;
mod message;
pub mod null;
pub mod packet;
pub mod pcap;
pub mod tap;
pub mod xdp;

use std::io;

/// Why a device could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It is not there. It may come: worth another try.
    #[error("there is no interface {name}; {remedy}")]
    Absent {
        /// The interface.
        name: String,
        /// The command that makes one.
        remedy: String,
    },
    /// It is there, and switched off. It may be switched on: worth another try.
    #[error("interface {name} is down; to switch it on: ip link set {name} up")]
    Down {
        /// The interface.
        name: String,
    },
    /// It is there, and not as this kind of port needs it.
    #[error("interface {name}: {what}")]
    Unfit {
        /// The interface.
        name: String,
        /// What is wrong, and the way out.
        what: String,
    },
    /// A file is not what it should be.
    #[error("{}: {what}", .file.display())]
    File {
        /// The file.
        file: std::path::PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// It is there, and cannot be had.
    #[error("interface {name}: {what}: {source}{remedy}")]
    Refused {
        /// The interface.
        name: String,
        /// What was being done.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
        /// What to do about it; empty or with a leading separator.
        remedy: &'static str,
    },
}
