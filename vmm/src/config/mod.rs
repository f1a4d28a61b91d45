//! The configuration of a virtual machine: one value, from a file or from flags, validated whole before anything starts.
//!
//! Owns the vocabulary of `[vm]` and what its combinations mean. Finds all problems in one pass. Never opens a device, never
//! starts anything.

mod flags;
mod keys;
mod nodes;
#[cfg(test)]
mod tests;
mod validate;
mod values;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use host::pci::Bdf;
pub use keys::vocabulary;
pub use settings::{ConfigErrors, Problem};
use settings::{DeTable, Fill, Problems};
pub use values::{
    DisabledExit, DiskAio, DiskFormat, IrqChip, NetKind, NetMode, OnReboot, PageSize, Seccomp, SerialTo,
};

/// The most vCPUs of a machine: their APIC identifiers fit a byte.
pub const MAX_VCPUS: u32 = 254;

/// A whole configuration, every default filled in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// What the machine is called.
    pub name: String,
    /// The kernel: an ELF with a PVH entry, or a bzImage.
    pub kernel: PathBuf,
    /// The initial file system.
    pub initramfs: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Bytes of memory in all, a multiple of the page size.
    pub memory: u64,
    /// What the memory is made of.
    pub pages: PageSize,
    /// The parts of it, one at least, and the vCPUs that are near each.
    pub nodes: Vec<GuestNode>,
    /// Whether the guest is told of its nodes.
    pub numa: bool,
    /// Whether all of it is there from the start, also where nothing asks for that: huge pages, a lock, a back end.
    pub prefault: bool,
    /// Whether it is locked in memory.
    pub lock_memory: bool,
    /// How many vCPUs, and how the guest sees them.
    pub topology: Topology,
    /// The host's core of each vCPU.
    pub vcpu_cores: Option<Vec<u32>>,
    /// SCHED_FIFO priority of the vCPU threads.
    pub vcpu_priority: Option<u8>,
    /// The host's cores of every other thread.
    pub emulator_cores: Option<Vec<u32>>,
    /// What the guest does without leaving the guest.
    pub disable_exits: Vec<DisabledExit>,
    /// How long KVM polls before it puts a halted vCPU to sleep; `None`: as the kernel is set.
    pub halt_poll: Option<Duration>,
    /// Whether the guest is told that its vCPUs have their cores to themselves.
    pub hint_dedicated: bool,
    /// Where the I/O APIC is.
    pub irqchip: IrqChip,
    /// Whether the guest has performance counters.
    pub pmu: bool,
    /// Network cards, in the order in which the guest finds them.
    pub net: Vec<NetConfig>,
    /// Disks, in the order in which the guest finds them, behind the cards.
    pub disk: Vec<DiskConfig>,
    /// Functions of the host's, in the order in which the guest finds them, before the cards.
    pub pci: Vec<PciConfig>,
    /// Where the serial console goes.
    pub serial: SerialTo,
    /// Where the virtio console goes.
    pub console: SerialTo,
    /// Whether the guest has a source of randomness.
    pub rng: bool,
    /// What a reset by the guest does.
    pub on_reboot: OnReboot,
    /// How long a guest may take to shut down when asked.
    pub shutdown_timeout: Duration,
    /// What a system call does that a kind of thread has no use for ([`crate::sandbox`]).
    pub seccomp: Seccomp,
    /// Whether the process is held to its own files.
    pub confine_files: bool,
}

/// A memory node of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestNode {
    /// Bytes of memory.
    pub memory: u64,
    /// The vCPUs that are near it.
    pub vcpus: Vec<u32>,
    /// The host's memory node that it lies on, if that matters.
    pub host: Option<u32>,
    /// How far each of the guest's nodes is.
    pub distances: Vec<u8>,
    /// Whether the PCI devices are near it.
    pub devices: bool,
}

/// One of `net`: a network card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// In logs.
    pub name: String,
    /// What is behind it.
    pub back: NetBack,
    /// The card's address.
    pub mac: [u8; 6],
    /// Entries of each queue: a power of two.
    pub queue_size: u16,
    /// The largest layer-3 packet, if the guest is told one.
    pub mtu: Option<u16>,
}

/// What is behind a network card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetBack {
    /// A vhost-user back end.
    VhostUser(VhostUserConfig),
    /// The tap interface of this name.
    Tap(String),
}

/// Where a vhost-user back end is met, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VhostUserConfig {
    /// The back end's socket.
    pub socket: PathBuf,
    /// Whether we listen on it.
    pub listen: bool,
    /// Queue pairs, if the back end has as many.
    pub pairs: u16,
    /// Whether packed rings are offered.
    pub packed: bool,
    /// Whether the guest starts only when the back end is there.
    pub wait: bool,
}

/// One of `disk`: a raw image or a block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// In logs.
    pub name: String,
    /// The image.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    pub read_only: bool,
    /// Whether reads and writes pass by the host's page cache.
    pub direct: bool,
    /// What the guest sees as its serial number, up to 20 bytes.
    pub serial: String,
    /// Whether the guest may give back what it does not need any more.
    pub discard: bool,
    /// How reads and writes are done.
    pub aio: DiskAio,
    /// Queues.
    pub queues: u16,
    /// Threads that work on them.
    pub iothreads: u16,
    /// The host's cores of these threads, in turn.
    pub iothread_cores: Option<Vec<u32>>,
    /// Entries of each queue: a power of two.
    pub queue_size: u16,
}

/// One of `pci`: a function of the host's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciConfig {
    /// Which.
    pub device: Bdf,
    /// The token of the physical function's user, for a virtual one.
    pub vf_token: Option<String>,
}

/// Sockets of cores of threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// Sockets.
    pub sockets: u32,
    /// Cores of a socket.
    pub cores: u32,
    /// Threads of a core.
    pub threads: u32,
}

impl Topology {
    /// vCPUs in all.
    pub fn vcpus(&self) -> u32 {
        self.sockets * self.cores * self.threads
    }
}

impl Config {
    /// Reads and validates a file.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub fn load(file: &Path) -> Result<Self, ConfigErrors> {
        Self::parse(&settings::read_file(file)?, file)
    }

    /// Validates the text of a configuration; `file` is what messages call it.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub fn parse(text: &str, file: &Path) -> Result<Self, ConfigErrors> {
        settings::parse(text, file, |document, problems| validate::document(document, file, problems))
    }

    /// Reads the machine `name` of a node's file, which `cableway up` takes whole: a list, `[[vm]]`. Relative sockets are in
    /// `run_dir`, as the switch's are. `decide` gives the values that the file leaves open (`vcpu_cores = "auto"`).
    ///
    /// # Errors
    /// Everything that is wrong with this machine, or that there is none of this name.
    pub fn load_of_node(
        file: &Path,
        name: &str,
        run_dir: &Path,
        decide: impl FnOnce(&DeTable<'_>, &mut Problems<'_>) -> Vec<Fill>,
    ) -> Result<Self, ConfigErrors> {
        let text = settings::read_file(file)?;
        settings::parse(&text, file, |document, problems| {
            let decided = decide(document, problems);
            let document = settings::filled(document, &decided);
            validate::machine_of_node(&document, name, file, run_dir, problems)
        })
    }

    /// Validates one element of a node's `[[vm]]`, whose header is at `at`. Problems go to `problems`; `None`: something
    /// essential was wrong.
    pub fn of_table(
        table: &DeTable<'_>,
        at: &Range<usize>,
        file: &Path,
        run_dir: &Path,
        problems: &mut Problems<'_>,
    ) -> Option<Self> {
        validate::of_table(table, at, file, run_dir, problems)
    }

    /// The host's memory node that the memory near a vCPU is to lie on.
    pub fn host_node_of(&self, vcpu: usize) -> Option<u32> {
        let near = |node: &&GuestNode| node.vcpus.iter().any(|number| *number as usize == vcpu);
        self.nodes.iter().find(near)?.host
    }

    /// The host's memory nodes that its memory is to lie on, each once, ascending.
    pub fn host_nodes(&self) -> Vec<u32> {
        let mut nodes: Vec<u32> = self.nodes.iter().filter_map(|node| node.host).collect();
        nodes.sort_unstable();
        nodes.dedup();
        nodes
    }

    /// Bytes of memory by the host's node that they are to lie on.
    pub fn memory_by_host_node(&self) -> BTreeMap<Option<u32>, u64> {
        let mut sums = BTreeMap::new();
        for node in &self.nodes {
            *sums.entry(node.host).or_default() += node.memory;
        }
        sums
    }

    /// Whether other processes work on its memory.
    pub(crate) fn shares_memory(&self) -> bool {
        self.net.iter().any(|card| matches!(card.back, NetBack::VhostUser(_)))
    }

    /// Validates keys that were given as flags: pairs of a key of `[vm]` and its value as text.
    ///
    /// # Errors
    /// Everything that is wrong with them.
    pub fn from_flags(flags: &[(&str, String)]) -> Result<Self, ConfigErrors> {
        flags::parse(flags)
    }
}
