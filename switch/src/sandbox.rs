//! What each kind of thread may ask of the kernel: `no_new_privs` and seccomp filters. Which files: [`files`].
//!
//! A filter holds for the thread that asks for it and for all that it starts; filters only ever add up. Everything that a
//! filter does not list is refused. What lies in memory is not protected by this: all threads share it.
//!
//! Two kinds of answer, on purpose. A *worker* reads what guests wrote and has use for few system calls; any other means
//! that a guest has taken it over, so the process ends at once (SIGSYS, a line in the audit log) and a supervisor
//! starts it again. (Only opening a file fails instead: the C library's allocator tries that, and can do without.)
//! *Housekeeping* runs library code (the C library, HTTP) whose calls differ between versions; there, an unknown call
//! fails with "Operation not permitted" and costs that one request. Only calls that nothing here has any use for, such as
//! execve, end the process there too.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};

use crate::config::{Config, PortKind};

pub mod files;
#[cfg(test)]
mod tests;

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// Moves frames.
    Worker,
    /// Everything else: sessions with front ends, control socket, configuration, ageing.
    Housekeeping,
}

bitflags::bitflags! {
    /// What kinds of devices a switch opens: each takes system calls that no other has use for.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Devices: u8 {
        /// Taps.
        const TUN = 1;
        /// Packet sockets.
        const PACKET = 1 << 1;
        /// Network cards.
        const VFIO = 1 << 2;
        /// XDP sockets.
        const XDP = 1 << 3;
    }
}

/// Where taps come from.
pub const TUN: &str = "/dev/net/tun";

impl Devices {
    /// What a port of this kind needs.
    pub fn of_kind(kind: PortKind) -> Self {
        match kind {
            PortKind::Tap => Self::TUN,
            PortKind::Packet => Self::PACKET,
            PortKind::Xdp => Self::XDP,
            PortKind::Nic => Self::VFIO,
            PortKind::VhostUser | PortKind::Pcap | PortKind::Null => Self::empty(),
        }
    }

    /// What the ports of a switch need.
    pub fn of(config: &Config) -> Self {
        config.ports.iter().map(|port| Self::of_kind(port.behind.kind())).collect()
    }
}

/// A thread cannot be confined.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot confine a {kind:?} thread with seccomp: {source}; a kernel without CONFIG_SECCOMP_FILTER cannot"
)]
pub struct SandboxError {
    /// Which kind.
    pub kind: ThreadKind,
    /// What the kernel said.
    pub source: seccompiler::Error,
}

/// Confines the calling thread, and the threads that it starts later, to what its kind does and what `devices` take. To be called when the thread has its core and its
/// memory. Housekeeping may start workers, which confine themselves further.
///
/// # Errors
/// The kernel has no seccomp filters.
pub fn apply(kind: ThreadKind, devices: Devices) -> Result<(), SandboxError> {
    let failed = |source| SandboxError { kind, source };
    for program in programs(kind, devices).map_err(|e| failed(e.into()))? {
        apply_filter(&program).map_err(failed)?;
    }
    Ok(())
}

/// The filters for a kind of thread. Where several answer, the hardest answer holds, and among equals the last.
fn programs(kind: ThreadKind, devices: Devices) -> Result<Vec<BpfProgram>, BackendError> {
    let refused = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    // An XDP port loads a program for its interface, and its workers call the kernel without handing it anything.
    let xdp = devices.contains(Devices::XDP);
    let calls: &[c_long] = if xdp { &[libc::SYS_sendto, libc::SYS_recvfrom] } else { &[] };
    let programs: &[c_long] = if xdp { &[libc::SYS_bpf] } else { &[] };
    match kind {
        ThreadKind::Worker => Ok(vec![
            // When glibc shrinks a thread's heap, it reads /proc/sys/vm/overcommit_memory, and can do without.
            all_but(&[libc::SYS_openat], refused)?,
            only(kind, devices, &[BOTH, &[libc::SYS_openat], calls], SeccompAction::KillProcess)?,
        ]),
        ThreadKind::Housekeeping => Ok(vec![
            all_but(FATAL, SeccompAction::KillProcess)?,
            all_but(if xdp { &[] } else { &[libc::SYS_bpf] }, SeccompAction::KillProcess)?,
            // Its flags lie in memory, where no filter sees them; the C library then takes clone, whose flags can be seen.
            all_but(&[libc::SYS_clone3], SeccompAction::Errno(libc::ENOSYS.unsigned_abs()))?,
            only(kind, devices, &[BOTH, HOUSEKEEPING, &[libc::SYS_clone3], programs], refused)?,
        ]),
    }
}

/// Lets the listed calls pass, under the conditions of [`rules_of`].
fn only(
    kind: ThreadKind,
    devices: Devices,
    lists: &[&[c_long]],
    otherwise: SeccompAction,
) -> Result<BpfProgram, BackendError> {
    let mut rules = BTreeMap::new();
    for &call in lists.iter().copied().flatten() {
        rules.insert(call, rules_of(kind, devices, call)?);
    }
    SeccompFilter::new(rules, otherwise, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}

/// Lets all but the listed calls pass.
fn all_but(calls: &[c_long], answer: SeccompAction) -> Result<BpfProgram, BackendError> {
    let rules = calls.iter().map(|&call| (call, Vec::new())).collect();
    SeccompFilter::new(rules, SeccompAction::Allow, answer, TargetArch::x86_64)?.try_into()
}

/// Under which conditions a call passes; none means always.
fn rules_of(kind: ThreadKind, devices: Devices, call: c_long) -> Result<Vec<SeccompRule>, BackendError> {
    use SeccompCmpOp::{Eq, MaskedEq};
    let one = |argument: u8, op: SeccompCmpOp, value: i64| {
        // All arguments that are compared here are `int`s, whose upper halves the kernel ignores.
        let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, op, value.unsigned_abs())?;
        SeccompRule::new(vec![condition])
    };
    let rules = match call {
        // No memory that can be executed: code that a guest smuggles in stays data.
        libc::SYS_mmap | libc::SYS_mprotect => {
            vec![one(2, MaskedEq(libc::PROT_EXEC.unsigned_abs().into()), 0)?]
        }
        // Threads, no processes.
        libc::SYS_clone => {
            let thread = libc::CLONE_THREAD;
            vec![one(0, MaskedEq(thread.unsigned_abs().into()), thread.into())?]
        }
        // No network but UNIX sockets.
        libc::SYS_socket => {
            let packet = devices.intersects(Devices::PACKET | Devices::XDP).then_some(libc::AF_PACKET);
            let xdp = devices.contains(Devices::XDP).then_some(libc::AF_XDP);
            let families = [Some(libc::AF_UNIX), packet, xdp];
            families.into_iter().flatten().map(|f| one(0, Eq, f.into())).collect::<Result<_, _>>()?
        }
        // Of nothing: it only makes the kernel look at the rings.
        libc::SYS_sendto | libc::SYS_recvfrom if kind == ThreadKind::Worker => {
            vec![SeccompRule::new(vec![SeccompCondition::new(2, SeccompCmpArgLen::Qword, Eq, 0)?])?]
        }
        // What loads and attaches an XDP program.
        libc::SYS_bpf => {
            pmd::kernel::xdp::COMMANDS.iter().map(|c| one(0, Eq, *c)).collect::<Result<_, _>>()?
        }
        libc::SYS_socketpair => vec![one(0, Eq, libc::AF_UNIX.into())?],
        libc::SYS_ioctl => {
            let requests = [libc::FIONBIO, libc::FIONREAD, libc::FIOCLEX, libc::TCGETS, libc::TIOCGWINSZ];
            // A tap is attached to, and told what it may leave undone.
            let tun = [libc::TUNSETIFF, libc::TUNSETVNETHDRSZ, libc::TUNSETOFFLOAD];
            let tun = tun.iter().filter(|_| devices.contains(Devices::TUN));
            // A packet socket finds its interface.
            let packet = [libc::SIOCGIFFLAGS, libc::SIOCGIFINDEX];
            let packet = packet.iter().filter(|_| devices.intersects(Devices::PACKET | Devices::XDP));
            // An XDP socket asks how long its frames can be, and how many queues there are.
            let xdp = [libc::SIOCGIFMTU, libc::SIOCETHTOOL];
            let xdp = xdp.iter().filter(|_| devices.contains(Devices::XDP));
            // A card is opened, reset, mapped and given back.
            let vfio = host::vfio::REQUESTS.iter().filter(|_| devices.contains(Devices::VFIO));
            requests
                .iter()
                .chain(tun)
                .chain(packet)
                .chain(xdp)
                .chain(vfio)
                .map(|&r| one(1, Eq, r.cast_signed()))
                .collect::<Result<_, _>>()?
        }
        // Builds with debug assertions ask whether a descriptor is open before they close it.
        libc::SYS_fcntl if kind == ThreadKind::Worker => vec![one(1, Eq, libc::F_GETFD.into())?],
        libc::SYS_prctl => {
            let options = [libc::PR_SET_NAME, libc::PR_GET_NAME, libc::PR_SET_NO_NEW_PRIVS];
            options.iter().map(|&o| one(0, Eq, o.into())).collect::<Result<_, _>>()?
        }
        _ => Vec::new(),
    };
    Ok(rules)
}

/// What every thread may do, and all that a worker may: signal and sleep, get and give back memory, end.
const BOTH: &[c_long] = &[
    // Signal guests, look at what woke us; a last word on standard error.
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_read,
    // Signal guests without ever waiting (host::signal).
    libc::SYS_eventfd2,
    libc::SYS_io_setup,
    libc::SYS_io_submit,
    libc::SYS_io_getevents,
    libc::SYS_io_destroy,
    // Sleep, wait, wake.
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_epoll_ctl,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_futex,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_sched_yield,
    libc::SYS_restart_syscall,
    libc::SYS_membarrier,
    // The clock, where the kernel's page for it does not serve.
    libc::SYS_clock_gettime,
    libc::SYS_gettimeofday,
    // Memory: the allocator; dropping the last reference to a mapping; zero pages for memory that went away (host::fault).
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_close,
    libc::SYS_fcntl,
    // Fragment identifications; how many arenas the allocator may have.
    libc::SYS_getrandom,
    libc::SYS_sched_getaffinity,
    // Signals: return from SIGBUS, or die of it.
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_sigaltstack,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_tgkill,
    // Threads begin and end.
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// What housekeeping may do besides.
const HOUSEKEEPING: &[c_long] = &[
    // UNIX sockets.
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_recvmmsg,
    // Descriptors.
    libc::SYS_epoll_create1,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_timerfd_gettime,
    libc::SYS_signalfd4,
    libc::SYS_pipe2,
    libc::SYS_dup,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_ioctl,
    libc::SYS_select,
    libc::SYS_pselect6,
    libc::SYS_close_range,
    // Memory of guests and for them, bound to nodes.
    libc::SYS_memfd_create,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_statfs,
    libc::SYS_mbind,
    libc::SYS_get_mempolicy,
    libc::SYS_mincore,
    libc::SYS_msync,
    libc::SYS_mlock,
    libc::SYS_mlock2,
    libc::SYS_munlock,
    // Files: the configuration, /sys and /proc, sockets' files with their modes and groups.
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_lseek,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_readv,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_flock,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_rmdir,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_chmod,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_chown,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_lchown,
    libc::SYS_umask,
    libc::SYS_getcwd,
    // Threads: start, place and confine them.
    libc::SYS_clone,
    libc::SYS_set_tid_address,
    libc::SYS_prctl,
    libc::SYS_seccomp,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_setscheduler,
    libc::SYS_sched_getscheduler,
    libc::SYS_sched_getparam,
    libc::SYS_setpriority,
    libc::SYS_getcpu,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_rt_sigsuspend,
    libc::SYS_rt_sigpending,
    libc::SYS_kill,
    // Who and where we are.
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getgroups,
    libc::SYS_getppid,
    libc::SYS_getrusage,
    libc::SYS_prlimit64,
    libc::SYS_getrlimit,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    libc::SYS_times,
    libc::SYS_clock_getres,
];

/// What nothing here ever does, and everybody who breaks in wants to.
const FATAL: &[c_long] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_open_by_handle_at,
];
