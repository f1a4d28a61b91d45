//! What the kernel says of an interface, and how a socket makes it promiscuous.
//!
//! Owns the questions (`ioctl`s on any socket). Changes nothing that outlives the socket.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use super::OpenError;

/// The kernel's number for asking how many queues an interface has (linux/ethtool.h).
const ETHTOOL_GCHANNELS: u32 = 0x3c;

/// An interface that is there.
pub(super) struct Interface {
    name: String,
    pub(super) index: libc::c_int,
}

/// `struct ethtool_channels`: most and present queues, by what they are for.
#[repr(C)]
#[derive(Default)]
struct Channels {
    command: u32,
    most: [u32; 4],
    receive: u32,
    transmit: u32,
    other: u32,
    combined: u32,
}

impl Interface {
    /// The interface `name`, which must be up.
    ///
    /// # Errors
    /// It is not there, or down.
    pub(super) fn find(socket: &impl AsFd, name: &str) -> Result<Self, OpenError> {
        let mut this = Self { name: name.to_owned(), index: 0 };
        let (up, _) = this.state(socket)?;
        if !up {
            return Err(OpenError::Down { name: name.to_owned() });
        }
        let answer = this.ask(socket, libc::SIOCGIFINDEX).map_err(|_| this.absent())?;
        // SAFETY: SIOCGIFINDEX has written this member.
        this.index = unsafe { answer.ifr_ifru.ifru_ifindex };
        Ok(this)
    }

    /// Its name.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    fn absent(&self) -> OpenError {
        OpenError::Absent { name: self.name.clone(), remedy: "ip link shows those that are".to_owned() }
    }

    /// Whether it is switched on, and whether it has a link.
    ///
    /// # Errors
    /// It is not there.
    pub(super) fn state(&self, socket: &impl AsFd) -> Result<(bool, bool), OpenError> {
        let answer = self.ask(socket, libc::SIOCGIFFLAGS).map_err(|_| self.absent())?;
        // SAFETY: SIOCGIFFLAGS has written this member.
        let flags = libc::c_int::from(unsafe { answer.ifr_ifru.ifru_flags });
        Ok((flags & libc::IFF_UP != 0, flags & libc::IFF_RUNNING != 0))
    }

    /// The longest packet that it sends.
    pub(super) fn mtu(&self, socket: &impl AsFd) -> io::Result<u32> {
        let answer = self.ask(socket, libc::SIOCGIFMTU)?;
        // SAFETY: SIOCGIFMTU has written this member.
        Ok(unsafe { answer.ifr_ifru.ifru_mtu }.unsigned_abs())
    }

    /// Its receive queues; `None` where its driver does not say, which then has one as a rule.
    pub(super) fn receive_queues(&self, socket: &impl AsFd) -> Option<u32> {
        let mut channels = Channels { command: ETHTOOL_GCHANNELS, ..Channels::default() };
        let mut request = self.request();
        request.ifr_ifru.ifru_data = (&raw mut channels).cast();
        // SAFETY: SIOCETHTOOL reads one `ifreq`, and writes what its command says, a `Channels`; both outlive the call.
        let asked = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) };
        (asked == 0).then(|| channels.receive.saturating_add(channels.combined))
    }

    fn request(&self) -> libc::ifreq {
        // SAFETY: an `ifreq` is plain data, for which zeros are valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // The last byte stays zero.
        let room = request.ifr_name.len() - 1;
        for (to, from) in request.ifr_name.iter_mut().take(room).zip(self.name.bytes()) {
            *to = from.cast_signed();
        }
        request
    }

    fn ask(&self, socket: &impl AsFd, question: libc::c_ulong) -> io::Result<libc::ifreq> {
        let mut request = self.request();
        // SAFETY: each question reads and writes one `ifreq`, which outlives the call.
        check(unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), question, &raw mut request) })?;
        Ok(request)
    }
}

/// Frames to anybody come in, for as long as the packet socket `socket` lives: they are for those behind the switch.
pub(super) fn promiscuous(socket: BorrowedFd<'_>, index: libc::c_int) -> io::Result<()> {
    let membership = libc::packet_mreq {
        mr_ifindex: index,
        mr_type: libc::PACKET_MR_PROMISC as libc::c_ushort,
        mr_alen: 0,
        mr_address: [0; 8],
    };
    set_option(socket, libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &membership)
}

/// Asks for more room for what waits to be sent than the default; what the kernel gives is enough to work.
pub(super) fn send_buffer(socket: BorrowedFd<'_>, bytes: libc::c_int) {
    let _ = set_option(socket, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &bytes)
        .or_else(|_| set_option(socket, libc::SOL_SOCKET, libc::SO_SNDBUF, &bytes));
}

/// Sets an option of a socket.
pub(super) fn set_option<T>(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    option: libc::c_int,
    value: &T,
) -> io::Result<()> {
    let (value, len) = (std::ptr::from_ref(value).cast(), size_of::<T>() as libc::socklen_t);
    // SAFETY: the option reads `len` bytes of a value that outlives the call.
    check(unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, value, len) })
}

/// What a system call that returns a descriptor or zero said.
pub(super) fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
