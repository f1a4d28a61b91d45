//! A packet socket on any Ethernet interface of this machine (AF_PACKET): what arrives there comes in here, what goes out here
//! leaves by it. The kernel goes on using the interface too, if it has an address.
//!
//! Comes in through a ring of shared memory ([`ring`]), goes out by a system call a frame; both ways with a virtio-net header, so
//! that checksums and segmentation stay undone where the interface's driver (or its peer, of a veth) can do them.

mod ring;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use host::cpu::{rdtsc, tsc_hz};
use port::{Frame, Offload, PutError, Segment, Sink, Source};
use virtio::features;

use super::OpenError;
use super::interface::{self, Interface, check};
use super::message::Message;
use ring::Ring;

/// How often a socket that has nothing is asked whether its interface is still there.
const ASK_MILLISECONDS: u64 = 10;

/// Bytes that may wait to be sent. A frame of 64 KiB counts more than its bytes.
const SEND_BUFFER: libc::c_int = 4 << 20;

/// What the kernel does for what goes out, as a guest that takes the same: it cuts by itself where the interface cannot. Runs of
/// UDP datagrams are left out: kernels before 6.2 know none, and do not say.
const TAKES: u64 = features::NET_GUEST_CSUM
    | features::NET_GUEST_TSO4
    | features::NET_GUEST_TSO6
    | features::NET_GUEST_ECN
    | features::NET_GUEST_UFO;

/// What arrives at the interface.
pub struct PacketSource {
    ring: Ring,
    socket: Arc<OwnedFd>,
    limit: usize,
    /// Time stamp when the interface is asked for again.
    asks_at: u64,
    ask: u64,
}

/// What leaves by the interface.
pub struct PacketSink {
    socket: Arc<OwnedFd>,
    message: Message,
}

/// Opens a socket on the interface `name`, which must be up.
///
/// # Errors
/// It is not there or down ([`OpenError::Absent`]), or cannot be had.
pub fn open(name: &str) -> Result<(PacketSource, PacketSink), OpenError> {
    let refused = |what: &'static str| {
        move |source: io::Error| OpenError::Refused {
            name: name.to_owned(),
            what,
            remedy: remedy(&source),
            source,
        }
    };
    // Of no protocol yet: nothing comes in before everything is set.
    let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: no memory is involved.
    let socket = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
    check(socket).map_err(refused("opening a packet socket"))?;
    // SAFETY: just opened, and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let index = Interface::find(&socket, name)?.index;
    let fd = socket.as_fd();
    set_option(fd, libc::PACKET_VERSION, &(libc::tpacket_versions::TPACKET_V3 as libc::c_int))
        .and_then(|()| set_option(fd, libc::PACKET_VNET_HDR, &1))
        .and_then(|()| set_option(fd, libc::PACKET_IGNORE_OUTGOING, &1))
        .map_err(refused("setting up its packet socket"))?;
    // Past the queueing discipline: a switch port shapes nothing, and a full driver is told at once.
    set_option(fd, libc::PACKET_QDISC_BYPASS, &1).map_err(refused("setting up its packet socket"))?;
    let ring = Ring::new(fd).map_err(refused("mapping its receive ring"))?;
    interface::send_buffer(fd, SEND_BUFFER);
    bind(fd, index).map_err(refused("binding a socket to it"))?;
    interface::promiscuous(fd, index).map_err(refused("making it promiscuous"))?;
    let socket = Arc::new(socket);
    let ask = tsc_hz() / 1000 * ASK_MILLISECONDS;
    let source = PacketSource { ring, socket: socket.clone(), limit: 0, asks_at: 0, ask };
    Ok((source, PacketSink { socket, message: Message::new() }))
}

/// What the user can do about a refusal.
fn remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => "; run the switch with CAP_NET_RAW",
        Some(libc::EAFNOSUPPORT) => "; the kernel has no packet sockets: modprobe af_packet",
        Some(libc::ENOMEM) => "; its ring needs 4 MiB of memory",
        _ => "",
    }
}

fn bind(socket: BorrowedFd<'_>, index: libc::c_int) -> io::Result<()> {
    // SAFETY: a `sockaddr_ll` is plain data, for which zeros are valid.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = index;
    let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: `len` bytes of an address, which outlives the call.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) })
}

/// Sets an option of packet sockets.
fn set_option<T>(socket: BorrowedFd<'_>, option: libc::c_int, value: &T) -> io::Result<()> {
    interface::set_option(socket, libc::SOL_PACKET, option, value)
}

impl PacketSource {
    /// Whether the socket has an error pending: its interface went down or away.
    #[cold]
    fn ask(&mut self, now: u64) -> io::Result<()> {
        self.asks_at = now + self.ask;
        let mut asked = libc::pollfd { fd: self.socket.as_raw_fd(), events: 0, revents: 0 };
        // SAFETY: one `pollfd`, which outlives the call; a timeout of zero never waits.
        let answered = unsafe { libc::poll(&raw mut asked, 1, 0) };
        if answered > 0 && asked.revents & libc::POLLERR != 0 {
            return Err(io::Error::from_raw_os_error(libc::ENETDOWN));
        }
        Ok(())
    }
}

impl Source for PacketSource {
    fn look(&mut self, limit: usize) -> io::Result<usize> {
        self.limit = limit;
        let ready = self.ring.ready();
        if ready == 0 {
            let now = rdtsc();
            if now >= self.asks_at {
                self.ask(now)?;
            }
        }
        Ok(ready.min(limit))
    }

    fn lend(&mut self, frames: &mut [Frame]) -> usize {
        let mut lent = 0;
        for slot in frames.iter_mut().take(self.limit) {
            let Some(frame) = self.ring.next() else { break };
            *slot = frame;
            lent += 1;
        }
        lent
    }

    fn take_back(&mut self) {
        self.ring.take_back();
    }

    fn waker(&self) -> Option<BorrowedFd<'_>> {
        Some(self.socket.as_fd())
    }
}

impl PacketSink {
    /// What it takes undone, as the `NET_GUEST_…` features of a guest that takes the same.
    pub fn features(&self) -> u64 {
        TAKES
    }
}

impl Sink for PacketSink {
    fn put(
        &mut self,
        offload: Offload,
        _: usize,
        pieces: impl Iterator<Item = Segment>,
    ) -> Result<(), PutError> {
        let list = self.message.fill(offload, pieces)?;
        // SAFETY: each entry is a piece of the frame (mapped for as long as the burst lives, by the caller) or of
        // `self.message`; the kernel only reads them, and fails with EFAULT where it cannot.
        let n = unsafe { libc::writev(self.socket.as_raw_fd(), list.as_ptr(), list.len() as libc::c_int) };
        if n >= 0 { Ok(()) } else { Err(refusal(io::Error::last_os_error())) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What an error of a write means (net/packet/af_packet.c, packet_snd).
fn refusal(error: io::Error) -> PutError {
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM | libc::EINTR) => PutError::Full,
        Some(libc::ENETDOWN | libc::ENXIO | libc::ENODEV) => PutError::Gone(error),
        _ => PutError::Refused,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_that_is_not_there_is_absent_not_refused() {
        match open("no-such-if-0").map(|_| ()) {
            Err(OpenError::Absent { name, .. }) => assert_eq!(name, "no-such-if-0"),
            // Without the right to packet sockets nobody gets as far as the interface.
            Err(OpenError::Refused { remedy, .. }) => assert!(remedy.contains("CAP_NET_RAW"), "{remedy}"),
            other => panic!("{other:?}"),
        }
    }
}
