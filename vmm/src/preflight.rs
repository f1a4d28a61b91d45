//! What must be true before a machine is built: everything that can be wrong is found here, before anything is taken.
//!
//! Owns the order of the checks and their wording. Opens what only costs a descriptor (KVM, the kernel); never takes memory,
//! never starts anything, so that `--check` and a start ask the same questions.

use std::path::Path;
use std::sync::Arc;

use host::memory::{MemoryError, Pages};
use host::topology::{self, CoreSet};
use host::vfio::{self, VfioError};
use kvm_ioctls::{Cap, Kvm};

use crate::boot::{BootError, Initramfs, Kernel};
use crate::config::{Config, DisabledExit, IrqChip, PageSize};
use crate::disk::DiskError;
use crate::disk::image::{Image, SECTOR};

/// Where KVM is.
const DEVICE: &str = "/dev/kvm";
/// The version that every KVM since Linux 2.6.22 has (KVM API, 4.1).
const API_VERSION: i32 = 12;
/// Without these no machine can be built.
const NEEDED: &[(Cap, &str)] = &[
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// Why a machine cannot be built here.
#[derive(Debug, thiserror::Error)]
pub enum PreflightError {
    /// KVM is not there.
    #[error(
        "there is no {DEVICE}: modprobe kvm_intel (or kvm_amd); if that fails, virtualization is off in the firmware, or, in a \
         virtual machine, not passed on (nested)"
    )]
    NoKvm,
    /// KVM is not permitted.
    #[error("{DEVICE} is not permitted to this user: usermod -aG kvm USER, then log in again")]
    NotPermitted,
    /// KVM cannot be opened.
    #[error("cannot open {DEVICE}: {0}")]
    Kvm(kvm_ioctls::Error),
    /// It lacks something.
    #[error("this kernel's KVM lacks {0}; a machine needs Linux 5.14 or later")]
    Lacks(String),
    /// It has no split interrupt controllers.
    #[error("`irqchip`: this kernel's KVM lacks KVM_CAP_SPLIT_IRQCHIP; say `irqchip = \"kernel\"`")]
    NoSplit,
    /// More vCPUs than KVM gives.
    #[error("`vcpus`: {wanted}, but KVM here gives a machine at most {most}")]
    TooManyVcpus {
        /// Asked for.
        wanted: u32,
        /// Possible.
        most: usize,
    },
    /// A core that cannot be used.
    #[error("`{key}`: core {core} {why}")]
    Core {
        /// The key that names it.
        key: &'static str,
        /// The core.
        core: u32,
        /// What is wrong with it.
        why: String,
    },
    /// The machine could not be read.
    #[error(transparent)]
    Topology(#[from] topology::TopologyError),
    /// No such memory node.
    #[error("`node`: there is no memory node {node}; this machine has {nodes}")]
    Node {
        /// Asked for.
        node: u32,
        /// What there is.
        nodes: String,
    },
    /// Too little memory.
    #[error("`memory`: {0}")]
    Memory(#[from] MemoryError),
    /// The kernel or initramfs.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A function to pass through.
    #[error("`pci`: {0}")]
    Pci(#[from] VfioError),
}

/// What was opened on the way, and stays open: a guest that reboots finds the kernel and the disks that it had, whatever has their names
/// by then.
pub struct Preflight {
    pub(crate) kvm: Kvm,
    pub(crate) kernel: Kernel,
    pub(crate) initramfs: Option<Initramfs>,
    pub(crate) disks: Vec<Arc<Image>>,
    refused: Vec<DisabledExit>,
}

impl Preflight {
    /// Checks everything; the first problem ends it.
    ///
    /// # Errors
    /// What is wrong, and what to do about it.
    pub fn new(config: &Config) -> Result<Self, PreflightError> {
        cores(config)?;
        let kernel = Kernel::open(&config.kernel)?;
        let initramfs = config.initramfs.as_deref().map(Initramfs::open).transpose()?;
        let disks =
            config.disk.iter().map(|disk| Image::open(disk).map(Arc::new)).collect::<Result<_, _>>()?;
        can_be_had(config)?;
        let kvm = open_kvm()?;
        vcpus(config, &kvm)?;
        irqchip(config, &kvm)?;
        let granted = grantable_exits(&kvm);
        let refused = config.disable_exits.iter().copied().filter(|exit| granted & bit(*exit) == 0).collect();
        Ok(Self { kvm, kernel, initramfs, disks, refused })
    }

    /// Checks what may have changed since the machine started the last time. Cores are not among it: the process is
    /// confined by now.
    ///
    /// # Errors
    /// As [`Preflight::new`].
    pub fn again(&self, config: &Config) -> Result<(), PreflightError> {
        can_be_had(config)
    }

    /// What is wrong with everything but the amount of memory, each with the key that it is about: for who plans several machines
    /// and counts their pages together.
    pub fn problems_besides_memory(config: &Config) -> Vec<(&'static str, PreflightError)> {
        let mut found = Vec::new();
        let mut note = |key, result: Result<(), PreflightError>| found.extend(result.err().map(|e| (key, e)));
        let in_key = |error: &PreflightError| match error {
            PreflightError::Core { key, .. } => key,
            _ => "vcpu_cores",
        };
        if let Err(error) = cores(config) {
            note(in_key(&error), Err(error));
        }
        note("kernel", Kernel::open(&config.kernel).map(drop).map_err(Into::into));
        let initramfs = config.initramfs.as_deref().map(Initramfs::open).transpose();
        note("initramfs", initramfs.map(drop).map_err(Into::into));
        for disk in &config.disk {
            note("disk", Image::open(disk).map(drop).map_err(Into::into));
        }
        note("node", node(config));
        match open_kvm() {
            Ok(kvm) => {
                note("vcpus", vcpus(config, &kvm));
                note("irqchip", irqchip(config, &kvm));
            }
            Err(error) => note("kernel", Err(error)),
        }
        found
    }

    /// Exits that were to be disabled and that this kernel does not let go.
    pub fn refused_exits(&self) -> &[DisabledExit] {
        &self.refused
    }

    /// Bytes of each disk.
    pub fn disk_sizes(&self) -> impl Iterator<Item = u64> {
        self.disks.iter().map(|disk| disk.sectors() * SECTOR)
    }

    /// What the kernel is.
    pub fn kernel_format(&self) -> crate::boot::Format {
        self.kernel.format()
    }
}

/// Whether KVM is there, permitted, and has what machines need.
///
/// # Errors
/// What is missing, and what to do about it.
pub fn kvm_is_there() -> Result<(), PreflightError> {
    open_kvm().map(drop)
}

/// What is taken anew at each start.
fn can_be_had(config: &Config) -> Result<(), PreflightError> {
    for function in &config.pci {
        vfio::try_open(Path::new("/"), function.device)?;
    }
    memory(config)
}

fn open_kvm() -> Result<Kvm, PreflightError> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => PreflightError::NoKvm,
        libc::EACCES | libc::EPERM => PreflightError::NotPermitted,
        _ => PreflightError::Kvm(error),
    })?;
    let version = kvm.get_api_version();
    if version != API_VERSION {
        return Err(PreflightError::Lacks(format!("API version {API_VERSION} (it has {version})")));
    }
    match NEEDED.iter().find(|(capability, _)| !kvm.check_extension(*capability)) {
        Some((_, name)) => Err(PreflightError::Lacks((*name).to_owned())),
        None => Ok(kvm),
    }
}

/// Exits that KVM lets a machine disable (KVM API, 7.13).
fn grantable_exits(kvm: &Kvm) -> u32 {
    let granted = kvm.check_extension_raw(kvm_bindings::KVM_CAP_X86_DISABLE_EXITS.into());
    u32::try_from(granted).unwrap_or(0)
}

/// An exit's bit in KVM_CAP_X86_DISABLE_EXITS.
pub(crate) fn bit(exit: DisabledExit) -> u32 {
    match exit {
        DisabledExit::Mwait => kvm_bindings::KVM_X86_DISABLE_EXITS_MWAIT,
        DisabledExit::Hlt => kvm_bindings::KVM_X86_DISABLE_EXITS_HLT,
        DisabledExit::Pause => kvm_bindings::KVM_X86_DISABLE_EXITS_PAUSE,
        DisabledExit::Cstate => kvm_bindings::KVM_X86_DISABLE_EXITS_CSTATE,
    }
}

fn cores(config: &Config) -> Result<(), PreflightError> {
    let of_disks = config.disk.iter().any(|disk| disk.iothread_cores.is_some());
    if config.vcpu_cores.is_none() && config.emulator_cores.is_none() && !of_disks {
        return Ok(());
    }
    let online = topology::online_cores(Path::new("/"))?;
    let permitted = topology::usable_cores(Path::new("/"))?;
    let check = |key, core: u32| {
        let why = if !online.contains(core) {
            format!("does not exist or is offline: this machine has {online}")
        } else if !permitted.contains(core) {
            format!(
                "is not permitted to this process, {permitted} are: see its affinity (taskset) and its control group (cpuset)"
            )
        } else {
            return Ok(());
        };
        Err(PreflightError::Core { key, core, why })
    };
    let of = |key: &'static str, cores: &Option<Vec<u32>>| {
        cores.iter().flatten().try_for_each(|core| check(key, *core))
    };
    of("vcpu_cores", &config.vcpu_cores)?;
    of("emulator_cores", &config.emulator_cores)?;
    config.disk.iter().try_for_each(|disk| of("iothread_cores", &disk.iothread_cores))
}

fn vcpus(config: &Config, kvm: &Kvm) -> Result<(), PreflightError> {
    let (wanted, most) = (config.topology.vcpus(), kvm.get_max_vcpus());
    if wanted as usize > most {
        return Err(PreflightError::TooManyVcpus { wanted, most });
    }
    Ok(())
}

fn irqchip(config: &Config, kvm: &Kvm) -> Result<(), PreflightError> {
    if config.irqchip == IrqChip::Split && !kvm.check_extension(Cap::SplitIrqchip) {
        return Err(PreflightError::NoSplit);
    }
    Ok(())
}

fn node(config: &Config) -> Result<(), PreflightError> {
    let wanted = config.host_nodes();
    if wanted.is_empty() {
        return Ok(());
    }
    let root = Path::new("/sys/devices/system/node");
    let online = std::fs::read_to_string(root.join("online")).unwrap_or_else(|_| "0".to_owned());
    let nodes: CoreSet = online.parse().unwrap_or_default();
    match wanted.into_iter().find(|node| !nodes.contains(*node)) {
        Some(node) => Err(PreflightError::Node { node, nodes: nodes.to_string() }),
        None => Ok(()),
    }
}

fn memory(config: &Config) -> Result<(), PreflightError> {
    node(config)?;
    let pages = match config.pages {
        PageSize::Auto | PageSize::Ordinary => Pages::Ordinary,
        PageSize::Huge2M => Pages::Huge2M,
        PageSize::Huge1G => Pages::Huge1G,
    };
    for (node, bytes) in config.memory_by_host_node() {
        let len = usize::try_from(bytes).map_err(|_| MemoryError::Size(usize::MAX))?;
        // `auto` may take either; the larger pages are asked for first, and their shortage is no error.
        if config.pages == PageSize::Auto && host::memory::check_available(len, Pages::Huge2M, node).is_ok() {
            continue;
        }
        host::memory::check_available(len, pages, node)?;
    }
    Ok(())
}
