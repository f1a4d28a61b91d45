//! AF_XDP sockets on an Ethernet interface of this machine: frames pass in bursts through memory shared with the kernel, before its
//! network stack sees them.
//!
//! One socket for each queue of the interface, with memory of its own: half of it for what comes in, half for what goes out. An XDP
//! program ([`program`]) hands the frames over. Where the driver can, it reads and writes the memory itself (zero copy); where it cannot,
//! the kernel copies. The rings are our own ([`ring`]) and not those of crate `xdp`: its memory belongs to one thread, where two
//! workers may have the two directions here; it believes what the kernel writes; and it does not show when the kernel wants to be called.
//!
//! Without offloads: what comes in must have its checksums, what goes out gets them before.

mod program;
mod receive;
mod ring;
mod socket;
mod transmit;

use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use host::memory::{Pages, SharedMemory};
use libc::{xdp_mmap_offsets, xdp_options, xdp_umem_reg};

use super::OpenError;
use super::interface::{self, Interface};
pub use program::COMMANDS;
use program::Program;
pub use receive::XdpSource;
use ring::{Consumer, Producer, Ring};
use socket::{CHUNK, Chunks, LONGEST, Socket};
pub use transmit::XdpSink;

/// Entries of every ring, and chunks of each direction.
const ENTRIES: u32 = 2048;

/// The longest packet of an interface whose frames fit: with addresses, type and two VLAN tags.
const LARGEST_MTU: u32 = LONGEST as u32 - 14 - 8;

/// Bytes that may wait to be sent where the kernel copies.
const SEND_BUFFER: libc::c_int = 4 << 20;

/// An interface whose frames are ours: its handle.
pub struct XdpDevice {
    /// Detaches the program when dropped.
    _program: Program,
    interface: Interface,
    /// Keeps it promiscuous.
    control: OwnedFd,
    sockets: Vec<Arc<Socket>>,
    zero_copy: bool,
    link: Option<bool>,
}

/// What opening one gives: a handle, and source and sink for each queue.
pub struct OpenedXdp {
    /// The interface. Frames come in while it lives.
    pub device: XdpDevice,
    /// By queue.
    pub queues: Vec<(XdpSource, XdpSink)>,
}

/// Takes queues 0 to `queues - 1` of the interface `name`, which must be up.
///
/// # Errors
/// It is not there or down, or cannot be had.
pub fn open(name: &str, queues: u16) -> Result<OpenedXdp, OpenError> {
    let refused = |what: &'static str| {
        move |source: io::Error| OpenError::Refused {
            name: name.to_owned(),
            what,
            remedy: remedy(what, &source),
            source,
        }
    };
    let control = control_socket().map_err(refused("opening a packet socket"))?;
    let interface = Interface::find(&control, name)?;
    let mtu = interface.mtu(&control).map_err(refused("asking for its MTU"))?;
    if mtu > LARGEST_MTU {
        return Err(OpenError::Unfit {
            name: name.to_owned(),
            what: format!(
                "its MTU is {mtu}, and a frame of AF_XDP has room for {LARGEST_MTU}: ip link set {name} mtu 1500, or use \
                 kind = \"af_packet\""
            ),
        });
    }
    let present = interface.receive_queues(&control).unwrap_or(1);
    if u32::from(queues) > present {
        return Err(OpenError::Unfit {
            name: name.to_owned(),
            what: format!("it has {present} receive queues, `queue_pairs` asks for {queues}"),
        });
    }
    if u32::from(queues) < present {
        tracing::warn!(
            "interface {name} has {present} receive queues, its port {queues}: what arrives on the others stays with the kernel; \
             queue_pairs = {present}, or: ethtool -L {name} combined {queues}"
        );
    }
    let mut opened = Vec::new();
    let (mut sockets, mut zero_copy) = (Vec::new(), true);
    for queue in 0..queues {
        let (socket, source, sink) =
            open_queue(interface.index, u32::from(queue)).map_err(|(what, source)| refused(what)(source))?;
        let options: Result<xdp_options, _> = socket.option(libc::XDP_OPTIONS);
        zero_copy &= options.is_ok_and(|o| o.flags & libc::XDP_OPTIONS_ZEROCOPY != 0);
        sockets.push(socket);
        opened.push((source, sink));
    }
    interface::promiscuous(control.as_fd(), interface.index).map_err(refused("making it promiscuous"))?;
    let descriptors: Vec<_> = sockets.iter().map(|socket| socket.as_fd()).collect();
    let program =
        Program::attach(interface.index, &descriptors).map_err(|(what, source)| refused(what)(source))?;
    let device = XdpDevice { _program: program, interface, control, sockets, zero_copy, link: None };
    Ok(OpenedXdp { device, queues: opened })
}

/// Whether this process can have XDP sockets at all.
///
/// # Errors
/// It cannot, and why, for the user.
pub fn check() -> Result<(), String> {
    let what = "opening an XDP socket";
    Socket::new().map(drop).map_err(|error| format!("{error}{}", remedy(what, &error)))
}

/// What the user can do about a refusal.
fn remedy(what: &'static str, error: &io::Error) -> &'static str {
    match (what, error.raw_os_error()) {
        (_, Some(libc::EPERM | libc::EACCES)) => {
            "; run the switch with CAP_NET_RAW, CAP_NET_ADMIN and CAP_BPF (kernels before 5.8: CAP_SYS_ADMIN)"
        }
        (_, Some(libc::EAFNOSUPPORT)) => {
            "; this kernel has no AF_XDP (CONFIG_XDP_SOCKETS): kind = \"af_packet\" does without"
        }
        (_, Some(libc::ENOSYS)) => "; this kernel has no bpf(2): kind = \"af_packet\" does without",
        (REGISTERING, Some(libc::ENOBUFS | libc::ENOMEM)) => {
            "; the kernel locks 16 MiB for each queue: ulimit -l unlimited, or run the switch with CAP_IPC_LOCK"
        }
        (BINDING, Some(libc::EINVAL)) => "; it has no such queue: lower `queue_pairs`",
        (BINDING, Some(libc::EBUSY)) => "; another process has that queue",
        ("attaching its XDP program", Some(libc::EBUSY)) => {
            "; another XDP program is attached: ip link show tells which, ip link set … xdp off takes it off"
        }
        ("attaching its XDP program", Some(libc::ERANGE | libc::EINVAL)) => {
            "; its driver takes no XDP program as it is set up: lower its MTU (and that of the other end of a veth), switch off \
             LRO, or use kind = \"af_packet\""
        }
        _ => "",
    }
}

const REGISTERING: &str = "sharing memory with it";
const BINDING: &str = "binding an XDP socket to its queue";

/// A packet socket that receives nothing: to ask questions by, and to keep the interface promiscuous.
fn control_socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: no memory is involved.
    let socket = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
    interface::check(socket)?;
    // SAFETY: just opened, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(socket) })
}

type Step<T> = Result<T, (&'static str, io::Error)>;

/// A socket on one queue, with its memory and rings.
fn open_queue(interface: libc::c_int, queue: u32) -> Step<(Arc<Socket>, XdpSource, XdpSink)> {
    let doing = |what: &'static str| move |error: io::Error| (what, error);
    let socket = Socket::new().map_err(doing("opening an XDP socket"))?;
    let fd = socket.as_fd();
    let memory = SharedMemory::new(2 * ENTRIES as usize * CHUNK, Pages::Auto, None)
        .map_err(|error| (REGISTERING, io::Error::other(error)))?;
    let umem = xdp_umem_reg {
        addr: memory.as_ptr().expose_provenance() as u64,
        len: memory.len() as u64,
        chunk_size: CHUNK as u32,
        headroom: 0,
        flags: 0,
        tx_metadata_len: 0,
    };
    let set = |option, value: &u32| interface::set_option(fd, libc::SOL_XDP, option, value);
    interface::set_option(fd, libc::SOL_XDP, libc::XDP_UMEM_REG, &umem).map_err(doing(REGISTERING))?;
    for option in
        [libc::XDP_UMEM_FILL_RING, libc::XDP_UMEM_COMPLETION_RING, libc::XDP_RX_RING, libc::XDP_TX_RING]
    {
        set(option, &ENTRIES).map_err(doing("making the rings of its XDP socket"))?;
    }
    let mapping = doing("mapping the rings of its XDP socket");
    let at: xdp_mmap_offsets = socket.option(libc::XDP_MMAP_OFFSETS).map_err(mapping)?;
    let fill_page = libc::XDP_UMEM_PGOFF_FILL_RING as libc::off_t;
    let done_page = libc::XDP_UMEM_PGOFF_COMPLETION_RING as libc::off_t;
    let received = Consumer::of(Ring::map(fd, libc::XDP_PGOFF_RX_RING, &at.rx, ENTRIES).map_err(mapping)?);
    let send = Producer::of(Ring::map(fd, libc::XDP_PGOFF_TX_RING, &at.tx, ENTRIES).map_err(mapping)?);
    let fill = Producer::of(Ring::map(fd, fill_page, &at.fr, ENTRIES).map_err(mapping)?);
    let done = Consumer::of(Ring::map(fd, done_page, &at.cr, ENTRIES).map_err(mapping)?);
    interface::send_buffer(fd, SEND_BUFFER);
    let (memory, socket) = (Arc::new(memory), Arc::new(socket));
    let to_fill = Chunks::new(memory.clone(), 0, ENTRIES);
    let to_send = Chunks::new(memory, ENTRIES, ENTRIES);
    let source = XdpSource::new(received, fill, to_fill, socket.clone());
    let sink = XdpSink::new(send, done, to_send, socket.clone());
    bind(&socket, interface, queue).map_err(doing(BINDING))?;
    Ok((socket, source, sink))
}

/// Without copies where the driver can, else with: the kernel tries in this order.
fn bind(socket: &Socket, interface: libc::c_int, queue: u32) -> io::Result<()> {
    let address = libc::sockaddr_xdp {
        sxdp_family: libc::AF_XDP as u16,
        sxdp_flags: libc::XDP_USE_NEED_WAKEUP,
        sxdp_ifindex: interface.unsigned_abs(),
        sxdp_queue_id: queue,
        sxdp_shared_umem_fd: 0,
    };
    let len = size_of::<libc::sockaddr_xdp>() as libc::socklen_t;
    let fd = std::os::fd::AsRawFd::as_raw_fd(&socket.as_fd());
    // SAFETY: `len` bytes of an address, which outlives the call.
    interface::check(unsafe { libc::bind(fd, (&raw const address).cast(), len) })
}

impl XdpDevice {
    /// Whether the driver itself reads and writes the memory, on all queues.
    pub fn zero_copy(&self) -> bool {
        self.zero_copy
    }

    /// Whether its link came or went since this was last asked; the first time, whether there is one.
    ///
    /// # Errors
    /// The interface is gone or down.
    pub fn look(&mut self) -> Result<Option<bool>, OpenError> {
        let (up, link) = self.interface.state(&self.control)?;
        if !up {
            return Err(OpenError::Down { name: self.interface.name().to_owned() });
        }
        let changed = self.link != Some(link);
        self.link = Some(link);
        Ok(changed.then_some(link))
    }

    /// What the kernel counted, over all queues, by its names (XDP_STATISTICS).
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let each: Vec<_> = self.sockets.iter().filter_map(|socket| socket.statistics().ok()).collect();
        let sum = |of: fn(&libc::xdp_statistics) -> u64| each.iter().map(of).sum();
        vec![
            ("rx_dropped", sum(|s| s.rx_dropped)),
            ("rx_ring_full", sum(|s| s.rx_ring_full)),
            ("rx_fill_ring_empty_descs", sum(|s| s.rx_fill_ring_empty_descs)),
            ("rx_invalid_descs", sum(|s| s.rx_invalid_descs)),
            ("tx_invalid_descs", sum(|s| s.tx_invalid_descs)),
            ("tx_ring_empty_descs", sum(|s| s.tx_ring_empty_descs)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_that_is_not_there_is_absent_not_refused() {
        match open("no-such-if-0", 1).map(|_| ()) {
            Err(OpenError::Absent { name, .. }) => assert_eq!(name, "no-such-if-0"),
            // Without the right to packet sockets nobody gets as far as the interface.
            Err(OpenError::Refused { remedy, .. }) => assert!(remedy.contains("CAP_NET_RAW"), "{remedy}"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn loopback_whose_frames_are_too_long_is_refused_with_the_way_out() {
        match open("lo", 1).map(|_| ()) {
            Err(OpenError::Unfit { what, .. }) => assert!(what.contains("ip link set lo mtu 1500"), "{what}"),
            Err(OpenError::Refused { .. } | OpenError::Down { .. }) => {}
            other => panic!("{other:?}"),
        }
    }
}
