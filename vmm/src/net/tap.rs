//! A network card on a tap interface of the host's kernel.
//!
//! Owns the descriptor of the tap and the features that both sides agree on: checksums and segments may be left undone both
//! ways. Frames go between the kernel and the guest's memory by one system call each, on a thread a queue; what the tap does
//! not take is lost, as on a wire. The virtio-net header in front of a frame is the kernel's to judge.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use virtio::features;
use virtio::memory::GuestMemory;

use super::control::CardState;
use super::{KIND, NetError, QUEUES, configuration};
use crate::buffers::Request;
use crate::config::NetConfig;
use crate::control::report::QueueReport;
use crate::lifecycle::Lifecycle;
use crate::sandbox::ThreadKind;
use crate::virtio_pci::{Activation, VirtioDevice};
use crate::worker::{Serve, Served, Workers};

/// Bytes of the header in front of each frame (virtio 1.3, 5.1.6), and where in it the number of buffers is.
const HEADER: u64 = 12;
const NUM_BUFFERS: u64 = 10;
/// The longest frame that a guest may send, header included: 64 KiB of IP and what is around it.
const LONGEST: u64 = 66_000;
/// What is offered besides what every card has. Without NET_MRG_RXBUF, the driver's buffers are as large as frames may be.
const OFFERED: u64 = features::NET_CSUM
    | features::NET_GUEST_CSUM
    | features::NET_GUEST_TSO4
    | features::NET_GUEST_TSO6
    | features::NET_HOST_TSO4
    | features::NET_HOST_TSO6
    | features::RING_INDIRECT_DESC
    | features::RING_EVENT_IDX;

/// The card.
pub(crate) struct TapCard {
    state: CardState,
    mtu: Option<u16>,
    queue_size: u16,
    workers: Workers,
}

impl TapCard {
    /// A card on the tap `interface`.
    ///
    /// # Errors
    /// It is not there, or cannot be had.
    pub(crate) fn new(
        config: &NetConfig,
        interface: &str,
        memory: &Arc<GuestMemory>,
    ) -> Result<Self, NetError> {
        let file = Arc::new(open(interface)?);
        let server =
            |receives| Server { receives, file: Some(file.clone()), interface: interface.to_owned() };
        let workers = Workers::new(&config.name, memory, vec![server(true), server(false)])?;
        let state = CardState::new(config.mac, true);
        Ok(Self { state, mtu: config.mtu, queue_size: config.queue_size, workers })
    }
}

impl VirtioDevice for TapCard {
    fn kind(&self) -> (u16, u16) {
        KIND
    }

    fn features(&self) -> u64 {
        let mtu = if self.mtu.is_some() { features::NET_MTU } else { 0 };
        OFFERED | features::VERSION_1 | features::NET_MAC | features::NET_STATUS | mtu
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.queue_size; QUEUES]
    }

    fn config(&self) -> Vec<u8> {
        configuration(&self.state, 1, self.mtu)
    }

    fn activate(&mut self, activation: Activation) {
        self.workers.activate(activation);
    }

    fn reset(&mut self) {
        self.workers.reset();
    }

    fn lifecycle(&self) -> &dyn Lifecycle {
        &self.workers
    }

    fn queue_reports(&self) -> Vec<QueueReport> {
        self.workers.reports()
    }

    fn is_reset(&self) -> bool {
        self.workers.are_idle()
    }

    fn is_broken(&self) -> bool {
        self.workers.are_broken()
    }
}

/// What works on one of the queues.
struct Server {
    receives: bool,
    /// `None`: the interface is gone.
    file: Option<Arc<File>>,
    interface: String,
}

impl Serve for Server {
    const KIND: ThreadKind = ThreadKind::Tap;

    fn start(&mut self, features: u64) {
        if let Some(file) = self.file.as_ref().filter(|_| self.receives)
            && let Err(error) = allow(file, features)
        {
            tracing::warn!("the tap {} does not take the guest's offloads: {error}", self.interface);
        }
    }

    fn serve(&mut self, request: Request<'_>) -> Served {
        match self.receives {
            true => self.receive(request).map_or(Served::Kept, Served::Done),
            false => {
                self.transmit(&request);
                Served::Done(0)
            }
        }
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().filter(|_| self.receives).map(|file| file.as_fd())
    }
}

impl Server {
    /// Fills a buffer with the next frame; `None` when there is none.
    fn receive(&mut self, mut request: Request<'_>) -> Option<u32> {
        // A buffer for less than a header and a frame of minimal length is none.
        if request.writable.len() < HEADER + 60 {
            return Some(0);
        }
        let file = self.file.as_ref()?;
        let pieces = request.writable.pieces();
        // SAFETY: the pieces lie in guest memory that is mapped while the request is borrowed; the kernel writes there.
        let got = unsafe { libc::readv(file.as_raw_fd(), pieces.as_ptr(), pieces.len() as libc::c_int) };
        let Ok(got) = u32::try_from(got) else {
            let error = io::Error::last_os_error();
            if !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) {
                tracing::warn!(
                    "the tap {} is gone ({error}): its card receives nothing more",
                    self.interface
                );
                self.file = None;
            }
            return None;
        };
        // The kernel leaves the number of buffers to whoever knows it (5.1.6.3.1): one.
        request.writable.take(NUM_BUFFERS);
        request.writable.write(&1_u16.to_le_bytes());
        Some(got)
    }

    /// Sends a frame, or loses it.
    fn transmit(&self, request: &Request<'_>) {
        let (pieces, length) = (request.readable.pieces(), request.readable.len());
        if let Some(file) = self.file.as_ref().filter(|_| (HEADER..=LONGEST).contains(&length)) {
            // SAFETY: as in `receive`; the kernel reads there.
            let sent =
                unsafe { libc::writev(file.as_raw_fd(), pieces.as_ptr(), pieces.len() as libc::c_int) };
            if sent < 0 {
                tracing::trace!("the tap {}: {}", self.interface, io::Error::last_os_error());
            }
        }
    }
}

/// Opens the tap and sets the size of its header.
fn open(name: &str) -> Result<File, NetError> {
    use std::os::unix::fs::OpenOptionsExt;
    let refused = |doing: &'static str| {
        let name = name.to_owned();
        move |source: io::Error| NetError::Tap { name, doing, hint: hint(&source), source }
    };
    // The kernel would make one that is not there, which nobody connected to anything.
    if !std::path::Path::new("/sys/class/net").join(name).exists() {
        return Err(refused("use")(io::ErrorKind::NotFound.into()));
    }
    let mut tun = OpenOptions::new();
    tun.read(true).write(true).custom_flags(libc::O_NONBLOCK);
    let file = tun.open("/dev/net/tun").map_err(refused("opening /dev/net/tun because"))?;
    // SAFETY: an `ifreq` is plain data, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero.
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name.iter_mut().take(room).zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which outlives the call.
    let attached = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    check(attached).map_err(refused("use"))?;
    let size = HEADER as libc::c_int;
    // SAFETY: TUNSETVNETHDRSZ reads one int, which outlives the call.
    let sized = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) };
    check(sized).map_err(refused("setting the header"))?;
    Ok(file)
}

/// TUNSETOFFLOAD: the kernel may leave undone what the guest takes undone.
fn allow(file: &File, accepted: u64) -> io::Result<()> {
    let flags = [
        (features::NET_GUEST_CSUM, libc::TUN_F_CSUM),
        (features::NET_GUEST_TSO4, libc::TUN_F_TSO4),
        (features::NET_GUEST_TSO6, libc::TUN_F_TSO6),
    ];
    let flags = match accepted & features::NET_GUEST_CSUM {
        0 => 0, // everything else builds on it
        _ => flags.iter().filter(|(f, _)| accepted & f != 0).fold(0, |all, (_, flag)| all | flag),
    };
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What the user can do about a refusal.
fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        None => "; to make one: ip tuntap add NAME mode tap user USER && ip link set NAME up",
        Some(libc::EPERM | libc::EACCES) => "; give it to this user: ip tuntap add NAME mode tap user USER",
        Some(libc::EBUSY) => "; another process has it",
        Some(libc::EINVAL) => "; it is no tap, or was made with `multi_queue`",
        Some(libc::ENOENT | libc::ENODEV) => "; the kernel has no tun driver: modprobe tun",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixDatagram;

    use super::*;
    use crate::test_driver::{DATA, Driver};

    #[test]
    fn frames_pass_both_ways_and_what_is_no_frame_or_no_buffer_does_not() {
        let (kernel, tap) = UnixDatagram::pair().unwrap();
        kernel.set_nonblocking(true).unwrap();
        tap.set_nonblocking(true).unwrap();
        let file = Arc::new(File::from(OwnedFd::from(tap)));
        let server = |receives| Server { receives, file: Some(file.clone()), interface: "t".to_owned() };
        let mut driver = Driver::new();
        let workers = Workers::new("t", &driver.for_rings(), vec![server(true), server(false)]).unwrap();
        workers.activate(driver.activation(&[1], features::VERSION_1));
        for (at, length, writes) in [(DATA, 11, false), (DATA, 66_001, false), (DATA, 100, true)] {
            assert_eq!(driver.chain(&[(at, length, writes)]), 0);
        }
        driver.write(DATA, &[7; 72]);
        assert_eq!(driver.chain(&[(DATA, 12, false), (DATA + 12, 60, false)]), 0);
        let mut got = [0; 100];
        assert_eq!(kernel.recv(&mut got).unwrap(), 72);
        assert!(kernel.recv(&mut got).is_err(), "one frame and nothing else");
        workers.reset();
        driver.until("let go", |_| workers.are_idle());

        workers.activate(driver.activation(&[0], features::VERSION_1));
        assert_eq!(driver.chain(&[(DATA, 71, true)]), 0, "too small");
        driver.put(&[(DATA, 12, true), (DATA + 12, 200, true)]);
        kernel.send(&[9; 80]).unwrap();
        assert_eq!(driver.wait(), 80);
        assert_eq!(driver.read(DATA, 13), [9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 1, 0, 9]);
    }
}
