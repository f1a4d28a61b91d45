//! What each kind of thread of a machine may ask of the kernel (seccomp), and which files the process may open (Landlock).
//!
//! Owns the decision; how filters are built and put in force is [`host::sandbox`]'s. A process has one sandbox, for good: it begins
//! after the configuration was checked and before a guest has memory, so that a machine starts under it, and starts again under it
//! when its guest reboots. A thread has the filter of the main thread from its birth and adds that of its kind before it does
//! anything for a guest.
//!
//! A vCPU and whoever works on a guest's queue have use for few system calls; any other means that a guest has taken the thread over,
//! and ends the process (SIGSYS; the kernel's log has the number of the call), or is only logged if that is asked for.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::thread::JoinHandle;

use host::sandbox::files::{FileAccess, FilesError, Held, directory_of};
use host::sandbox::{
    Action, Allowed, Argument, BackendError, BpfProgram, FilterError, TUN, all_but, calls, put_in_force,
};
use host::vfio;
use libc::c_long;
use nix::sys::signal::{SigSet, Signal};

use crate::config::{Config, IrqChip, NetBack, Seccomp};

#[cfg(test)]
mod tests;

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// Builds the machine, waits for its end, takes it apart.
    Main,
    /// Runs the guest.
    Vcpu,
    /// Works on a disk's queue.
    Disk,
    /// Works on a queue of a card on a tap.
    Tap,
    /// Works on another queue: console, randomness, a card's commands.
    Queue,
    /// Looks after a card's vhost-user back end.
    BackEnd,
    /// Writes what a console prints, or reads what is typed.
    Console,
    /// Hears of the end of a passed-through function.
    Watch,
    /// Serves the control socket.
    Control,
    /// Waits for signals.
    Signals,
}

impl ThreadKind {
    /// All of them.
    pub const ALL: [ThreadKind; 10] = [
        Self::Main,
        Self::Vcpu,
        Self::Disk,
        Self::Tap,
        Self::Queue,
        Self::BackEnd,
        Self::Console,
        Self::Watch,
        Self::Control,
        Self::Signals,
    ];
}

/// The process cannot be confined.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// No privileges can be given up.
    #[error("giving up new privileges: {0}")]
    Privileges(nix::Error),
    /// Its files.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// A filter makes no sense.
    #[error("the filter of a {0:?} thread: {1}")]
    Filter(ThreadKind, BackendError),
    /// The kernel does not take a filter.
    #[error(
        "cannot confine a {kind:?} thread with seccomp: {source}; a kernel without CONFIG_SECCOMP_FILTER cannot: \
         `seccomp = \"off\"` starts the machine without"
    )]
    Kernel {
        /// Of which kind.
        kind: ThreadKind,
        /// What it said.
        source: FilterError,
    },
}

/// The filters of each kind of thread; empty where there are to be none.
struct Filters(Vec<(ThreadKind, Vec<BpfProgram>)>);

static FILTERS: OnceLock<Filters> = OnceLock::new();

/// How far the process is confined, as long as this lives: see [`FileAccess`].
pub struct Confined {
    /// To its files.
    pub files: Held,
    _kept: Vec<File>,
}

/// Confines the process: the calling thread, which is to be its only one, and all that it starts from then on.
///
/// # Errors
/// The kernel refuses.
pub fn begin(config: &Config, run_dir: Option<&Path>) -> Result<Confined, SandboxError> {
    // Whatever a guest might make of this process, it gains nothing by starting a program.
    nix::sys::prctl::set_no_new_privs().map_err(SandboxError::Privileges)?;
    // What is known of this process and of free memory is the kernel's, which makes these files anew after it forgot them: rules
    // follow those that are kept.
    let kept = [OWN, MEMORY].iter().filter_map(|path| File::open(path).ok()).collect();
    let files = match files(config, run_dir) {
        Some(files) => files.confine()?,
        None => Held::NotAtAll,
    };
    prepare(config)?;
    apply(ThreadKind::Main)?;
    Ok(Confined { files, _kept: kept })
}

/// Builds the filters, and confines the threads that are started from then on to their kind, but not this one. The first time
/// counts: a process has one sandbox.
///
/// # Errors
/// A filter makes no sense.
pub fn prepare(config: &Config) -> Result<(), SandboxError> {
    let mut filters = Vec::new();
    for kind in ThreadKind::ALL {
        let programs = programs(kind, config).map_err(|error| SandboxError::Filter(kind, error))?;
        filters.push((kind, programs));
    }
    let _ = FILTERS.set(Filters(filters));
    Ok(())
}

/// Confines the calling thread, and those that it starts, to what its kind does.
///
/// # Errors
/// The kernel refuses.
pub fn apply(kind: ThreadKind) -> Result<(), SandboxError> {
    if kind != ThreadKind::Main {
        // The main thread's to handle: their handlers write to sockets.
        let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
        let _ = signals.thread_block();
    }
    let Some(filters) = FILTERS.get() else { return Ok(()) };
    let of_kind = filters.0.iter().find(|(of, _)| *of == kind);
    let programs = of_kind.map_or(&[][..], |(_, programs)| programs);
    put_in_force(programs).map_err(|source| SandboxError::Kernel { kind, source })
}

/// Starts a thread, and returns when it is confined.
///
/// # Errors
/// No thread is to be had, or it cannot be confined.
pub(crate) fn spawn<T: Send + 'static>(
    kind: ThreadKind,
    name: String,
    run: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<Option<T>>> {
    let (confined, is_confined) = crossbeam::channel::bounded(1);
    let thread = std::thread::Builder::new().name(name).spawn(move || {
        let applied = apply(kind);
        let failed = applied.is_err();
        if confined.send(applied).is_err() || failed {
            return None;
        }
        Some(run())
    })?;
    match is_confined.recv() {
        Ok(Ok(())) => Ok(thread),
        Ok(Err(error)) => Err(io::Error::other(error)),
        Err(_) => Err(io::Error::other("the thread ended at once")),
    }
}

/// What is known of cores, of this process, of memory, of PCI functions.
const CORES: &str = "/sys/devices/system";
const OWN: &str = "/proc/self";
const MEMORY: &str = "/proc/meminfo";
const FUNCTIONS: [&str; 3] = ["/sys/devices", "/sys/bus/pci", "/sys/kernel"];

/// The files that a machine opens after its start, or when its guest reboots; `None` if it is not to be held to them. Its kernel, its
/// initial file system, its disks, the files of its consoles and KVM are open by then, and stay.
pub fn files(config: &Config, run_dir: Option<&Path>) -> Option<FileAccess> {
    if !config.confine_files {
        return None;
    }
    let passes = !config.pci.is_empty();
    let taps = config.net.iter().any(|card| matches!(card.back, NetBack::Tap(_)));
    let listens = config.net.iter().filter_map(|card| match &card.back {
        NetBack::VhostUser(back) if back.listen => directory_of(&back.socket),
        _ => None,
    });
    let owned = |paths: &[&str]| paths.iter().map(PathBuf::from).collect::<Vec<_>>();
    let mut read = owned(&[CORES, OWN, MEMORY]);
    let mut devices = Vec::new();
    if taps {
        devices.push(PathBuf::from(TUN));
    }
    if passes {
        read.extend(owned(&FUNCTIONS));
        devices.extend(owned(&vfio::FILES));
    }
    let mut sockets: Vec<PathBuf> = run_dir.into_iter().chain(listens).map(Path::to_owned).collect();
    sockets.sort_unstable();
    sockets.dedup();
    Some(FileAccess { read, sockets, write: Vec::new(), devices })
}

/// KVM's requests have this type; so many bits of a request are its type and its number.
const KVM: u64 = 0xae << 8;
const TYPE: u64 = 0xff00;
const TYPE_AND_NUMBER: u64 = 0xffff;

/// To raise an input of KVM's I/O APIC; or, with an I/O APIC of ours, to send its message: what is typed at the serial port does,
/// whoever brings it.
const RAISE: u64 = 0x61;
const SEND: u64 = 0xa5;
/// To move a region of a passed-through function.
const MOVE_MEMORY: u64 = 0x46;
/// To let go of a passed-through function.
const FORGET: u64 = 0xe1;

fn to_raise(config: &Config) -> u64 {
    match config.irqchip {
        IrqChip::Kernel => RAISE,
        IrqChip::Split => SEND,
    }
}

/// What a running vCPU asks of KVM, by number (linux/kvm.h), the most frequent one first: to run; to raise an input of the I/O APIC;
/// to tie eventfds to interrupts and to accesses, and interrupts to messages; to excuse a rest.
fn of_vcpu(config: &Config) -> [u64; 6] {
    [0x80, to_raise(config), 0x76, 0x79, 0x6a, 0xad]
}

/// The filters of a kind. Where several answer, the hardest answer holds.
fn programs(kind: ThreadKind, config: &Config) -> Result<Vec<BpfProgram>, BackendError> {
    use ThreadKind::{BackEnd, Console, Control, Disk, Main, Queue, Signals, Tap, Vcpu, Watch};
    let otherwise = match config.seccomp {
        Seccomp::Off => return Ok(Vec::new()),
        Seccomp::Log => Action::Log,
        Seccomp::Kill => Action::KillProcess,
    };
    let passes = !config.pci.is_empty();
    let is = |requests: &[u64]| requests.iter().map(|request| Argument::Is(1, *request)).collect::<Vec<_>>();
    let of_kvm = |numbers: &[u64]| {
        numbers.iter().map(|n| Argument::Bits(1, TYPE_AND_NUMBER, KVM | n)).collect::<Vec<_>>()
    };
    let lists: &[&[c_long]] = match kind {
        // All others have its filter, too: it lets everything pass that one of theirs does.
        Main if !config.disk.is_empty() => {
            &[calls::THREAD, calls::SERVICE, &[libc::SYS_clone3], OF_DISK, OF_RINGS]
        }
        Main => &[calls::THREAD, calls::SERVICE, &[libc::SYS_clone3]],
        // The regions and configuration space of passed-through functions are files.
        Vcpu if passes => &[calls::THREAD, FILE_AT],
        Watch => &[calls::THREAD, FILE_AT],
        Disk => &[calls::THREAD, FILE_AT, OF_DISK],
        // A frame, or what is typed, goes to several buffers.
        Tap | Queue => &[calls::THREAD, &[libc::SYS_readv]],
        BackEnd => &[calls::THREAD, CONNECTION, &[libc::SYS_socket, libc::SYS_connect]],
        Control => &[calls::THREAD, CONNECTION, OF_CONTROL],
        Signals => &[calls::THREAD, &[libc::SYS_recvfrom]],
        Vcpu | Console => &[calls::THREAD],
    };
    // When the C library shrinks a thread's heap, it reads /proc/sys/vm/overcommit_memory, and can do without.
    let opens = matches!(kind, Main | Control);
    let allowed = Allowed::new(&[lists, if opens { &[] } else { &[&[libc::SYS_openat]] }].concat())?;
    let allowed = match kind {
        Main => {
            // Of the terminal that a console has.
            let terminal =
                [libc::TCSETS, libc::TCSETSW, libc::TCSETSF, libc::TCSETS2, libc::TCSETSW2, libc::TCSETSF2];
            let terminal = is(&terminal);
            let taps = is(&[libc::TUNSETIFF, libc::TUNSETVNETHDRSZ, libc::TUNSETOFFLOAD]);
            let requests = is(if passes { &vfio::REQUESTS } else { &[] });
            allowed
                .when(libc::SYS_ioctl, &[terminal, taps, requests].concat())?
                .when(libc::SYS_ioctl, &[Argument::Bits(1, TYPE, KVM)])?
        }
        Vcpu => allowed
            .when(libc::SYS_ioctl, &is(if passes { &vfio::INTERRUPT_REQUESTS } else { &[] }))?
            .when(libc::SYS_ioctl, &of_kvm(if passes { &[MOVE_MEMORY] } else { &[] }))?
            .when(libc::SYS_ioctl, &of_kvm(&of_vcpu(config)))?,
        // What it takes from the guest it closes, perhaps as the last one that the IOMMU serves.
        Watch => allowed
            .when(libc::SYS_ioctl, &is(&vfio::REQUESTS))?
            .when(libc::SYS_ioctl, &of_kvm(&[&of_vcpu(config)[..], &[MOVE_MEMORY, FORGET]].concat()))?,
        Tap => allowed.when(libc::SYS_ioctl, &is(&[libc::TUNSETOFFLOAD]))?,
        Console | Control => allowed.when(libc::SYS_ioctl, &of_kvm(&[to_raise(config)]))?,
        _ => allowed,
    };
    let no = |error: i32| Action::Errno(error.unsigned_abs());
    Ok(match kind {
        // Its flags lie in memory, where no filter sees them; the C library then takes clone, whose flags can be seen.
        Main => vec![all_but(&[libc::SYS_clone3], no(libc::ENOSYS))?, allowed.or(otherwise)?],
        Control => vec![allowed.or(otherwise)?],
        _ => vec![all_but(&[libc::SYS_openat], no(libc::EPERM))?, allowed.or(otherwise)?],
    })
}

/// Reads and writes at a place in a file.
const FILE_AT: &[c_long] = &[libc::SYS_pread64, libc::SYS_pwrite64];

/// A disk's requests.
const OF_DISK: &[c_long] = &[
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_io_uring_enter,
    libc::SYS_flock,
];

/// Makes the rings of disks' requests, each of which can reach its image and nothing else (`disk::under_way`).
const OF_RINGS: &[c_long] = &[libc::SYS_io_uring_setup, libc::SYS_io_uring_register];

/// A connection over a UNIX socket, from its accepting to its end.
const CONNECTION: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_shutdown,
    libc::SYS_ioctl,
];

/// The control socket's thread besides: reports tell of threads, out of /proc.
const OF_CONTROL: &[c_long] = &[
    libc::SYS_openat,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_lseek,
    libc::SYS_readv,
];
