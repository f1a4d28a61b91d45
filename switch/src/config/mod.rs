//! The configuration of a switch: one value, read from a file and validated whole before anything is started or changed.
//!
//! Owns the vocabulary of `[switch]` and `[[port]]` and what its combinations mean. Finds all problems in one pass, each with
//! its line and what to write instead. Never opens a socket, never starts anything; what it needs to know of the machine
//! it asks [`Surroundings`], so that a test can be any machine.

mod behind;
mod feature;
mod inject;
mod keys;
mod machine;
mod nodes;
#[cfg(test)]
mod tests;
mod validate;
mod values;

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use behind::{Behind, Side, VirtualFunction};
pub use feature::{Feature, FeatureSet};
pub use inject::{Inject, Share};
pub use keys::vocabulary;
pub use machine::{Decide, Surroundings, ThisMachine};
pub use nodes::far_cards;
pub use settings::{ConfigErrors, Problem};
use settings::{DeTable, Problems};
pub use values::{Direction, Idle, PortKind, SocketSide};

/// The longest Ethernet frame (without FCS) that is forwarded unless it is left for segmentation.
pub const FRAME_MAX: u32 = 9_216;

/// A whole configuration, every default filled in, every path absolute or relative to the working directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The file that it was read from.
    pub file: PathBuf,
    /// `[switch]`.
    pub switch: SwitchConfig,
    /// `[[port]]`, in the order of the file. Names, sockets and devices are unique.
    pub ports: Vec<PortConfig>,
}

/// `[switch]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SwitchConfig {
    /// Cores of the workers: at least one, no core twice.
    pub workers: Vec<u32>,
    /// Cores for everything else; `None`: wherever the process may run, save on the workers' cores.
    pub housekeeping: Option<Vec<u32>>,
    /// What a worker does when nothing comes in.
    pub idle: Idle,
    /// Frames taken from a queue at a time, 1 to [`port::MAX_BURST`].
    pub burst: usize,
    /// Entries of the learning table: a power of two.
    pub fdb_size: usize,
    /// How long an address that was not heard from is remembered.
    pub fdb_age: Duration,
    /// Whether frames to the reserved addresses 01:80:c2:00:00:00 to 0f are forwarded.
    pub forward_reserved: bool,
    /// Whether the running switch is held to its own files ([`crate::sandbox::files`]).
    pub confine_files: bool,
}

/// One `[[port]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortConfig {
    /// Unique in the switch.
    pub name: String,
    /// What is behind it.
    pub behind: Behind,
    /// Most queue pairs that the guest may use, or as many as the device has; 1 to 128.
    pub queue_pairs: u16,
    /// The core of the worker of each queue pair, if the user pinned them (as many as there are queue pairs).
    pub queue_workers: Option<Vec<u32>>,
    /// VLANs.
    pub vlan: Vlan,
    /// Ports with the same group do not talk to each other.
    pub isolation: Option<String>,
    /// Largest layer-3 packet that is sent to this port, in bytes; `None`: whatever fits [`FRAME_MAX`].
    pub mtu: Option<u16>,
    /// Limits on what comes in here and has to be flooded.
    pub storm: Storm,
    /// Addresses that always are at this port.
    pub addresses: Vec<StaticAddress>,
    /// Whether source addresses are learnt.
    pub learn: bool,
    /// Most addresses that this port may occupy in the learning table.
    pub learn_limit: u32,
    /// Whether only `addresses` may be used as source.
    pub source_check: bool,
    /// Features that are not offered to the guest.
    pub disable: FeatureSet,
    /// Most bytes of memory that a guest may share with us.
    pub max_memory: u64,
    /// Faults on purpose.
    pub inject: Option<Inject>,
    /// A pcapng file that is written of all its frames.
    pub trace: Option<PathBuf>,
}

impl PortConfig {
    /// The files that are written for it.
    pub fn writes(&self) -> impl Iterator<Item = &Path> {
        self.behind.writes().into_iter().chain(self.trace.as_deref())
    }

    /// Whether both write the same file.
    pub(crate) fn shares_a_file(&self, other: &Self) -> bool {
        self.writes().any(|file| other.writes().any(|others| file == others))
    }
}

/// The VLANs of a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Vlan {
    /// Tags are not looked at.
    Unaware,
    /// Untagged frames belong to this VLAN; tagged ones do not come in.
    Access(u16),
    /// Tagged frames of these VLANs, in ascending order and apart from each other.
    Trunk {
        /// VLANs with a tag (`native` may be among them: then its tagged frames come in as well).
        allowed: Vec<RangeInclusive<u16>>,
        /// The VLAN of untagged frames; `None`: they do not come in.
        native: Option<u16>,
    },
}

impl std::fmt::Display for Vlan {
    /// In the words of the configuration: `access 10`, `trunk 10,20-29, native 1`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Vlan::Unaware => f.write_str("unaware"),
            Vlan::Access(vlan) => write!(f, "access {vlan}"),
            Vlan::Trunk { allowed, native } => {
                let range = |range: &RangeInclusive<u16>| match (range.start(), range.end()) {
                    (first, last) if first == last => first.to_string(),
                    (first, last) => format!("{first}-{last}"),
                };
                write!(f, "trunk {}", allowed.iter().map(range).collect::<Vec<_>>().join(","))?;
                native.map_or(Ok(()), |native| write!(f, ", native {native}"))
            }
        }
    }
}

/// Limits in frames a second; `None`: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Storm {
    /// Frames to ff:ff:ff:ff:ff:ff.
    pub broadcast: Option<u32>,
    /// Frames to unicast addresses that are at no known port.
    pub unknown: Option<u32>,
    /// Frames to group addresses.
    pub multicast: Option<u32>,
}

/// An address that always is at one port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StaticAddress {
    /// A unicast address.
    pub address: [u8; 6],
    /// In this VLAN; `None`: the port is VLAN-unaware.
    pub vlan: Option<u16>,
}

impl Config {
    /// Reads and validates a file. Relative socket paths resolve in `run_dir`.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub fn load(file: &Path, run_dir: &Path, surroundings: &dyn Surroundings) -> Result<Self, ConfigErrors> {
        let text = settings::read_file(file)?;
        Self::parse(&text, file, run_dir, surroundings)
    }

    /// Validates the text of a configuration; `file` is what messages call it.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub fn parse(
        text: &str,
        file: &Path,
        run_dir: &Path,
        surroundings: &dyn Surroundings,
    ) -> Result<Self, ConfigErrors> {
        settings::parse(text, file, |document, problems| {
            let decided = surroundings.decide(document, problems);
            let document = settings::filled(document, &decided);
            validate::document(&document, file, run_dir, surroundings, problems)
        })
    }

    /// Validates the switch's part of a document that is being read: `[switch]` and `[[port]]` of a node's file. Problems go
    /// to `problems`; `None`: something essential was wrong.
    pub fn of_document(
        document: &DeTable<'_>,
        file: &Path,
        run_dir: &Path,
        surroundings: &dyn Surroundings,
        problems: &mut Problems<'_>,
    ) -> Option<Self> {
        validate::document(document, file, run_dir, surroundings, problems)
    }

    /// The port of this name.
    pub fn port(&self, name: &str) -> Option<&PortConfig> {
        self.ports.iter().find(|port| port.name == name)
    }
}
