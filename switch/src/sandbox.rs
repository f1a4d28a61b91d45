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

use host::sandbox::{
    Action, Allowed, Argument, BackendError, BpfProgram, FilterError, all_but, calls, put_in_force,
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
    pub source: FilterError,
}

/// Confines the calling thread, and the threads that it starts later, to what its kind does and what `devices` take. To be called when the thread has its core and its
/// memory. Housekeeping may start workers, which confine themselves further.
///
/// # Errors
/// The kernel has no seccomp filters.
pub fn apply(kind: ThreadKind, devices: Devices) -> Result<(), SandboxError> {
    let failed = |source| SandboxError { kind, source };
    put_in_force(&programs(kind, devices).map_err(|e| failed(e.into()))?).map_err(failed)
}

/// The filters for a kind of thread. Where several answer, the hardest answer holds, and among equals the last.
fn programs(kind: ThreadKind, devices: Devices) -> Result<Vec<BpfProgram>, BackendError> {
    let refused = Action::Errno(libc::EPERM.unsigned_abs());
    let xdp = devices.contains(Devices::XDP);
    match kind {
        ThreadKind::Worker => {
            let mut allowed = Allowed::new(&[calls::THREAD, &[libc::SYS_openat]])?
                // Builds with debug assertions ask whether a descriptor is open before they close it.
                .when(libc::SYS_fcntl, &[Argument::Is(1, libc::F_GETFD.unsigned_abs().into())])?;
            if xdp {
                // Of nothing: it only makes the kernel look at the rings.
                for call in [libc::SYS_sendto, libc::SYS_recvfrom] {
                    allowed = allowed.when(call, &[Argument::IsLong(2, 0)])?;
                }
            }
            // When glibc shrinks a thread's heap, it reads /proc/sys/vm/overcommit_memory, and can do without.
            Ok(vec![all_but(&[libc::SYS_openat], refused)?, allowed.or(Action::KillProcess)?])
        }
        ThreadKind::Housekeeping => {
            let mut allowed = Allowed::new(&[calls::THREAD, calls::SERVICE, &[libc::SYS_clone3]])?
                .when(libc::SYS_socket, &sockets(devices))?
                .when(libc::SYS_ioctl, &requests(devices))?;
            if xdp {
                // What loads and attaches an XDP program.
                let commands = pmd::kernel::xdp::COMMANDS.iter();
                let commands: Vec<_> = commands.map(|c| Argument::Is(0, c.unsigned_abs())).collect();
                allowed = allowed.when(libc::SYS_bpf, &commands)?;
            }
            Ok(vec![
                all_but(calls::FATAL, Action::KillProcess)?,
                all_but(if xdp { &[] } else { &[libc::SYS_bpf] }, Action::KillProcess)?,
                // Its flags lie in memory, where no filter sees them; the C library then takes clone, whose flags can be seen.
                all_but(&[libc::SYS_clone3], Action::Errno(libc::ENOSYS.unsigned_abs()))?,
                allowed.or(refused)?,
            ])
        }
    }
}

/// Kinds of sockets besides UNIX sockets.
fn sockets(devices: Devices) -> Vec<Argument> {
    let packet = devices.intersects(Devices::PACKET | Devices::XDP).then_some(libc::AF_PACKET);
    let xdp = devices.contains(Devices::XDP).then_some(libc::AF_XDP);
    [packet, xdp].into_iter().flatten().map(|f| Argument::Is(0, f.unsigned_abs().into())).collect()
}

/// What devices are asked for.
fn requests(devices: Devices) -> Vec<Argument> {
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
    tun.chain(packet).chain(xdp).chain(vfio).map(|request| Argument::Is(1, *request)).collect()
}
