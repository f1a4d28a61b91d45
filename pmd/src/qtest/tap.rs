//! An interface of this host as a modelled card's network cable: several queues, which a socket has not. Frames go in and out by a
//! packet socket on it.
//!
//! The kernel chooses the queue by which the card gets a frame: that by which the card sent the last frame of this flow, or one by the
//! flow's hash. QEMU makes the interface, and it goes with QEMU.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::{MachineError, io_error};

/// Longest IP packet: frames of 9,018 bytes without a tag.
const MTU: libc::c_int = 9_004;

/// Bytes that may wait to be received.
const BUFFER: libc::c_int = 32 << 20;

/// Sends frames to the card and receives what it sends. The kernel loses frames that find no room: 64 of any size have it.
pub struct Tap {
    socket: OwnedFd,
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

impl Tap {
    /// A name that no other has.
    pub(super) fn name() -> String {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        format!("cw{}q{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
    }

    /// Turns the interface `name` on, and opens a socket on it.
    pub(super) fn new(name: &str) -> Result<Self, MachineError> {
        // The kernel has nothing to say there by itself.
        let silence = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
        let _ = fs::write(silence, "1");
        Self::open(name).map_err(io_error("cannot use the tap interface that QEMU made (as root?)"))
    }

    fn open(name: &str) -> io::Result<Self> {
        let every = (libc::ETH_P_ALL as u16).to_be();
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: a new descriptor, which is nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(check(libc::socket(libc::AF_PACKET, kind, 0))?) };
        // SAFETY: an `ifreq` is plain data, for which zeros are valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        let room = request.ifr_name.len() - 1;
        for (to, from) in request.ifr_name.iter_mut().take(room).zip(name.bytes()) {
            *to = from.cast_signed();
        }
        let mut ask = |question, fill: &dyn Fn(&mut libc::ifreq)| {
            fill(&mut request);
            // SAFETY: each of these reads and writes one `ifreq`, which outlives the call.
            check(unsafe { libc::ioctl(socket.as_raw_fd(), question, &raw mut request) })?;
            io::Result::Ok(request)
        };
        ask(libc::SIOCSIFMTU, &|r| r.ifr_ifru.ifru_mtu = MTU)?;
        ask(libc::SIOCSIFFLAGS, &|r| r.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_PROMISC) as _)?;
        // SAFETY: SIOCGIFINDEX has written this member.
        let index = unsafe { ask(libc::SIOCGIFINDEX, &|_| ())?.ifr_ifru.ifru_ifindex };
        let set = |level, option, value: libc::c_int| {
            let (value, len) = ((&raw const value).cast(), size_of::<libc::c_int>() as libc::socklen_t);
            // SAFETY: the option reads `len` bytes of a value that outlives the call.
            check(unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, value, len) })
        };
        set(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, BUFFER)?;
        set(libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, BUFFER)?;
        set(libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, 1)?;
        // SAFETY: a `sockaddr_ll` is plain data, for which zeros are valid.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = every;
        address.sll_ifindex = index;
        let (at, len) = ((&raw const address).cast(), size_of::<libc::sockaddr_ll>() as libc::socklen_t);
        // SAFETY: an address of `len` bytes that outlives the call.
        check(unsafe { libc::bind(socket.as_raw_fd(), at, len) })?;
        Ok(Self { socket })
    }

    /// Sends a frame, without FCS.
    ///
    /// # Errors
    /// The interface is gone, or has no room.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        // SAFETY: as many bytes as the frame has.
        let sent = unsafe { libc::send(self.socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Waits for a frame, at most `limit`; its length, or nothing.
    ///
    /// # Errors
    /// The interface is gone.
    pub fn receive(&self, frame: &mut [u8], limit: Duration) -> io::Result<Option<usize>> {
        let mut poll = libc::pollfd { fd: self.socket.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let limit = limit.as_millis().try_into().unwrap_or(libc::c_int::MAX);
        // SAFETY: one `pollfd`, which outlives the call.
        if check(unsafe { libc::poll(&raw mut poll, 1, limit) })? == 0 {
            return Ok(None);
        }
        // SAFETY: as many bytes as there is room.
        let len = unsafe { libc::recv(self.socket.as_raw_fd(), frame.as_mut_ptr().cast(), frame.len(), 0) };
        usize::try_from(len).map(Some).map_err(|_| io::Error::last_os_error())
    }
}
