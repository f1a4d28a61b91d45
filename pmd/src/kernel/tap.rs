//! A tap interface: frames that the host's kernel sends into it come in here, frames that go out here arrive in the kernel.
//!
//! Both directions leave checksums and segmentation to the other side by a virtio-net header (Linux,
//! Documentation/networking/tuntap.rst and include/uapi/linux/if_tun.h), so that a TCP stream crosses in pieces of up to
//! 64 KiB. A system call a frame. Never makes an interface by itself unless it is told to, never configures one.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use host::cpu::{rdtsc, tsc_hz};
use port::{Frame, MAX_BURST, MAX_FRAME, Offload, PutError, Segment, Sink, Source};
use virtio::features;

use super::OpenError;
use super::message::{HEADER, Message, read_header};

/// Where the header of a received frame begins in its slot, so that the frame begins on a cache line.
const HEADER_AT: usize = 64 - HEADER;

/// Room for one received frame, its header in front.
const SLOT: usize = (64 + MAX_FRAME as usize).next_multiple_of(64);

/// After so many bytes a burst is full, however few frames it has: whoever has to cut 64 KiB frames has a budget for eight of
/// them in a burst ([`port::Scratch`]).
const BURST_BYTES: usize = 6 * 65_536;

/// How long a tap that had nothing is left alone: asking again is a system call, which the other ports of the worker pay for.
const REST_MICROSECONDS: u64 = 2;

/// How to open a tap.
#[derive(Clone, Debug)]
pub struct TapOptions {
    /// Its name, at most 15 bytes.
    pub name: String,
    /// How many queues, at least 1.
    pub queues: u16,
    /// What may be left undone, as the features of a virtio-net device ([`virtio::features`]): `NET_CSUM` and `NET_HOST_…` by the
    /// kernel in what comes in, `NET_GUEST_…` by us in what goes out.
    pub features: u64,
    /// Whether an interface that is not there is made. It ends with its last descriptor.
    pub create: bool,
}

/// A receive queue: what the kernel sent into the tap.
pub struct TapSource {
    file: Arc<File>,
    slots: Box<[u8]>,
    /// Bytes in each slot, header included; the first `ready` count.
    lens: Box<[usize; MAX_BURST]>,
    ready: usize,
    /// Time stamp before which the kernel is not asked again.
    rests_until: u64,
    rest: u64,
}

/// A transmit queue: what the kernel receives from the tap.
pub struct TapSink {
    file: Arc<File>,
    features: u64,
    message: Message,
}

/// Opens all queues of a tap.
///
/// # Errors
/// It is not there, or cannot be had.
pub fn open(options: &TapOptions) -> Result<Vec<(TapSource, TapSink)>, OpenError> {
    let name = &options.name;
    if !options.create && !Path::new("/sys/class/net").join(name).exists() {
        let several = if options.queues > 1 { " multi_queue" } else { "" };
        let remedy = format!("to make one: ip tuntap add {name} mode tap{several} && ip link set {name} up");
        return Err(OpenError::Absent { name: name.clone(), remedy });
    }
    (0..options.queues.max(1)).map(|_| open_queue(options)).collect()
}

fn open_queue(options: &TapOptions) -> Result<(TapSource, TapSink), OpenError> {
    let refused = |what: &'static str| {
        let name = options.name.clone();
        move |source: io::Error| OpenError::Refused { name, what, remedy: remedy(&source), source }
    };
    let mut tun = OpenOptions::new();
    tun.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
    let file = tun.open("/dev/net/tun").map_err(refused("opening /dev/net/tun"))?;
    let several = if options.queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several;
    attach(&file, &options.name, flags).map_err(refused("attaching to it as a tap"))?;
    header_size(&file).map_err(refused("setting the size of its virtio-net header"))?;
    let features = allow(&file, options.features).map_err(refused("setting its offloads"))?;
    let file = Arc::new(file);
    let source = TapSource {
        file: file.clone(),
        slots: vec![0; SLOT * MAX_BURST].into(),
        lens: Box::new([0; MAX_BURST]),
        ready: 0,
        rests_until: 0,
        rest: tsc_hz() / 1_000_000 * REST_MICROSECONDS,
    };
    Ok((source, TapSink { file, features, message: Message::new() }))
}

/// What the user can do about a refusal.
fn remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "; run the switch with CAP_NET_ADMIN, or give it the tap: ip tuntap add … mode tap user USER"
        }
        Some(libc::EBUSY) => "; another process has it",
        Some(libc::EINVAL) => {
            "; it is no tap, or was made with another number of queues (ip tuntap: `multi_queue` where queue_pairs is above 1)"
        }
        Some(libc::ENOENT | libc::ENODEV) => "; the kernel has no tun driver: modprobe tun",
        _ => "",
    }
}

/// TUNSETIFF: from here on the descriptor is a queue of the interface.
fn attach(file: &File, name: &str, flags: libc::c_int) -> io::Result<()> {
    // SAFETY: an `ifreq` is plain data, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let name = CString::new(name)?;
    // The last byte stays zero.
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name.iter_mut().take(room).zip(name.as_bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which outlives the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })
}

fn header_size(file: &File) -> io::Result<()> {
    let size = HEADER as libc::c_int;
    // SAFETY: TUNSETVNETHDRSZ reads one int, which outlives the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) })
}

/// TUNSETOFFLOAD: what the kernel may leave undone in what it sends to us. Returns the features that are in force: kernels before
/// 6.2 know no runs of UDP datagrams, neither way.
fn allow(file: &File, wanted: u64) -> io::Result<u64> {
    let set = |wanted: u64| {
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, offload_flags(wanted)) })
    };
    let uso = features::NET_HOST_USO | features::NET_GUEST_USO4 | features::NET_GUEST_USO6;
    match set(wanted | features::NET_HOST_USO) {
        // It knows them, even if the user does not want them.
        Ok(()) => set(wanted).map(|()| wanted),
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => set(wanted & !uso).map(|()| wanted & !uso),
        Err(e) => Err(e),
    }
}

/// The flags of TUNSETOFFLOAD for a device that may be sent what these features say.
fn offload_flags(wanted: u64) -> libc::c_ulong {
    if wanted & features::NET_CSUM == 0 {
        return 0; // everything else builds on it
    }
    let flags = [
        (features::NET_CSUM, libc::TUN_F_CSUM),
        (features::NET_HOST_TSO4, libc::TUN_F_TSO4),
        (features::NET_HOST_TSO6, libc::TUN_F_TSO6),
        (features::NET_HOST_ECN, libc::TUN_F_TSO_ECN),
        (features::NET_HOST_UFO, libc::TUN_F_UFO),
        (features::NET_HOST_USO, libc::TUN_F_USO4 | libc::TUN_F_USO6),
    ];
    flags.iter().filter(|(f, _)| wanted & f != 0).fold(0, |all, (_, flag)| all | libc::c_ulong::from(*flag))
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl Source for TapSource {
    fn look(&mut self, limit: usize) -> io::Result<usize> {
        if self.ready > 0 || rdtsc() < self.rests_until {
            return Ok(self.ready);
        }
        let mut bytes = 0;
        let slots = self.slots.chunks_exact_mut(SLOT).zip(&mut self.lens[..]).take(limit);
        for (slot, len) in slots {
            let Some(room) = slot.get_mut(HEADER_AT..) else { break };
            match (&*self.file).read(room) {
                Ok(n) => (*len, bytes) = (n, bytes + n),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    if self.ready == 0 {
                        self.rests_until = rdtsc() + self.rest;
                    }
                    break;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => break,
                // What came before it is still good; the next look finds the same error.
                Err(_) if self.ready > 0 => break,
                Err(e) => return Err(e),
            }
            self.ready += 1;
            if bytes >= BURST_BYTES {
                break;
            }
        }
        Ok(self.ready)
    }

    fn lend(&mut self, frames: &mut [Frame]) -> usize {
        let ready = self.ready.min(frames.len());
        let slots = self.slots.chunks_exact(SLOT).zip(&self.lens[..]);
        for ((slot, &len), frame) in slots.zip(frames).take(ready) {
            let (header, bytes) = slot.split_at(HEADER_AT + HEADER);
            *frame = Frame {
                ptr: bytes.as_ptr(),
                first_len: len.saturating_sub(HEADER) as u32,
                len: len.saturating_sub(HEADER) as u32,
                offload: read_header(header.get(HEADER_AT..).unwrap_or_default()),
                ..Frame::EMPTY
            };
        }
        ready
    }

    fn take_back(&mut self) {
        self.ready = 0;
    }

    fn waker(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }
}

impl TapSink {
    /// What it takes undone, as the `NET_GUEST_…` features of a guest that takes the same.
    pub fn features(&self) -> u64 {
        self.features
    }
}

impl Sink for TapSink {
    fn put(
        &mut self,
        offload: Offload,
        _: usize,
        pieces: impl Iterator<Item = Segment>,
    ) -> Result<(), PutError> {
        let list = self.message.fill(offload, pieces)?;
        // SAFETY: each entry is a piece of the frame (mapped for as long as the burst lives, by the caller) or of
        // `self.message`; the kernel only reads them, and fails with EFAULT where it cannot.
        let n = unsafe { libc::writev(self.file.as_raw_fd(), list.as_ptr(), list.len() as libc::c_int) };
        if n >= 0 { Ok(()) } else { Err(refusal(io::Error::last_os_error())) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What an error of a write means (drivers/net/tun.c, tun_get_user).
fn refusal(error: io::Error) -> PutError {
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM | libc::EINTR) => PutError::Full,
        Some(libc::EIO) => PutError::Down,
        Some(libc::EBADFD | libc::EBADF | libc::ENODEV) => PutError::Gone(error),
        _ => PutError::Refused,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_checksums_left_undone_nothing_else_is() {
        assert_eq!(offload_flags(features::NET_HOST_TSO4 | features::NET_HOST_USO), 0);
        let tcp = features::NET_CSUM | features::NET_HOST_TSO4 | features::NET_HOST_TSO6;
        assert_eq!(offload_flags(tcp), 7);
        assert_eq!(
            offload_flags(tcp | features::NET_GUEST_TSO4),
            7,
            "what goes out is not the kernel's to leave"
        );
    }

    #[test]
    fn an_interface_that_is_not_there_is_not_made_unasked_and_the_error_says_how_to() {
        let options = TapOptions { name: "no-such-tap-0".into(), queues: 2, features: 0, create: false };
        let error = open(&options).map(|_| ()).unwrap_err().to_string();
        assert_eq!(
            error,
            "there is no interface no-such-tap-0; to make one: ip tuntap add no-such-tap-0 mode tap multi_queue && ip link \
             set no-such-tap-0 up"
        );
    }
}
