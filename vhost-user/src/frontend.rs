//! The front end: a driver's way to a back end, ours or anybody's (DPDK, OVS).
//!
//! Says each message of the protocol once and waits for the answer no longer than it was told. Where the two ends agreed on
//! REPLY_ACK every message is answered, so an error is known where it was made. Does not use the `vhost` crate's front end,
//! which waits for ever, has 16 bits for a ring's position and no way to say that nobody kicks; the layouts of the payloads
//! are the crate's.
//!
//! A front end that lost its back end is dropped, and another made: nothing of a session outlives its connection but the
//! inflight region, which the driver keeps.

mod error;
mod listener;
#[cfg(test)]
mod tests;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use vhost::vhost_user::message::{FrontendReq, MAX_MSG_SIZE};
use virtio::features;

use crate::ProtocolFeatures;
use crate::socket::check_path;
use crate::wire::{self, HEADER, NEED_REPLY, REPLY, VERSION, VERSION_MASK};

pub use error::FrontEndError;
pub use listener::FrontEndListener;

type Result<T> = std::result::Result<T, FrontEndError>;

/// A part of a memory file that both ends work on.
#[derive(Clone, Copy, Debug)]
pub struct MemoryRegion<'a> {
    /// The file, and where in it the region begins.
    pub file: BorrowedFd<'a>,
    /// Bytes.
    pub size: u64,
    /// Address by which descriptors refer to it.
    pub guest: u64,
    /// Address by which ring addresses refer to it.
    pub user: u64,
    /// Offset into the file.
    pub offset: u64,
}

/// All that the back end needs to run a ring.
#[derive(Clone, Copy, Debug)]
pub struct QueueConfig<'a> {
    /// Number of descriptors.
    pub size: u16,
    /// Descriptor table or packed ring, as an address of [`MemoryRegion::user`].
    pub descriptors: u64,
    /// Avail ring or driver event area.
    pub driver: u64,
    /// Used ring or device event area.
    pub device: u64,
    /// Where to begin: for a split ring the next avail index, for a packed one what [`FrontEnd::stop_queue`] returned, or
    /// `0x8000_8000` for a new one; `None` leaves it to the inflight region.
    pub base: Option<u32>,
    /// Guest address under which writes to the device area are logged.
    pub log: Option<u64>,
    /// The device signals the driver; `None`: the driver polls.
    pub call: Option<BorrowedFd<'a>>,
    /// The driver signals the device; `None`: the device must poll.
    pub kick: Option<BorrowedFd<'a>>,
    /// The back end reports a broken ring here.
    pub err: Option<BorrowedFd<'a>>,
}

/// What the two ends agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreement {
    /// Virtio features.
    pub features: u64,
    /// Protocol features.
    pub protocol: ProtocolFeatures,
}

/// An inflight region: kept by the driver, and handed to each back end in turn.
#[derive(Debug)]
pub struct InflightRegion {
    file: OwnedFd,
    bytes: u64,
    offset: u64,
    queues: u16,
    size: u16,
}

/// Waits until `fd` is readable or the time is up.
fn readable(fd: BorrowedFd<'_>, time: Duration) {
    let time = PollTimeout::try_from(time + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
    // Whatever this says, the caller looks again and knows how late it is.
    let _ = poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], time);
}

/// The payload of a message, put together from its words.
#[derive(Default)]
struct Payload(Vec<u8>);

impl Payload {
    fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn region(self, region: &MemoryRegion<'_>) -> Self {
        self.u64(region.guest).u64(region.size).u64(region.user).u64(region.offset)
    }
}

/// A driver's session with a back end.
#[derive(Debug)]
pub struct FrontEnd {
    socket: UnixStream,
    patience: Duration,
    /// When the answers that are waited for now must all be there, and how long that was.
    limit: Option<(Instant, Duration)>,
    protocol: ProtocolFeatures,
}

impl FrontEnd {
    /// Connects to the back end that listens on `path`. Each answer is waited for at most `patience`.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(path: &Path, patience: Duration) -> Result<Self> {
        check_path(path)?;
        let stream =
            connect_now(path).map_err(|source| FrontEndError::Connect { path: path.to_owned(), source })?;
        Self::from_stream(stream, patience)
    }

    /// Talks to the back end at the other end of `stream`.
    ///
    /// # Errors
    /// The kernel takes no time-out for it.
    pub fn from_stream(stream: UnixStream, patience: Duration) -> Result<Self> {
        let patience = patience.max(Duration::from_millis(1));
        let set = stream.set_write_timeout(Some(patience));
        set.map_err(|e| FrontEndError::Send {
            message: "SET_OWNER",
            source: nix::Error::from_raw(e.raw_os_error().unwrap_or(0)),
        })?;
        Ok(Self { socket: stream, patience, limit: None, protocol: ProtocolFeatures::empty() })
    }

    /// From now on all answers together, until this is said again, are waited for no longer than `all`: a back end that is just not
    /// too late each time holds nobody for as many times as there are messages.
    pub fn within(&mut self, all: Duration) {
        self.limit = Some((Instant::now() + all, all));
    }

    /// Agrees on features: those of `wanted` and `protocol` that the back end has. Whether these are enough is for the driver
    /// to say.
    ///
    /// # Errors
    /// See [`FrontEndError`].
    pub fn negotiate(&mut self, wanted: u64, protocol: ProtocolFeatures) -> Result<Agreement> {
        self.say(FrontendReq::SET_OWNER, "SET_OWNER", Payload::default(), &[])?;
        let offered = self.get(FrontendReq::GET_FEATURES, "GET_FEATURES")?;
        let extended = offered & features::VHOST_USER_PROTOCOL_FEATURES;
        if extended != 0 {
            let theirs = self.get(FrontendReq::GET_PROTOCOL_FEATURES, "GET_PROTOCOL_FEATURES")?;
            let agreed = ProtocolFeatures::from_bits_truncate(theirs) & protocol;
            let payload = Payload::default().u64(agreed.bits());
            // Not acknowledged: whether messages are is what it settles.
            self.say(FrontendReq::SET_PROTOCOL_FEATURES, "SET_PROTOCOL_FEATURES", payload, &[])?;
            self.protocol = agreed;
        }
        let features = offered & wanted & !features::VHOST_USER_PROTOCOL_FEATURES;
        self.set_features(features | extended)?;
        Ok(Agreement { features, protocol: self.protocol })
    }

    /// Acknowledges features again, with [`features::VHOST_LOG_ALL`] to begin a migration.
    ///
    /// # Errors
    /// See [`FrontEndError`].
    pub fn set_features(&mut self, features: u64) -> Result<()> {
        self.say(FrontendReq::SET_FEATURES, "SET_FEATURES", Payload::default().u64(features), &[])
    }

    /// How many queue pairs the back end has.
    ///
    /// # Errors
    /// See [`FrontEndError`].
    pub fn queue_pairs(&mut self) -> Result<u64> {
        self.needs(ProtocolFeatures::MQ, "several queue pairs (MQ)")?;
        self.get(FrontendReq::GET_QUEUE_NUM, "GET_QUEUE_NUM")
    }

    /// Replaces the memory that both ends work on.
    ///
    /// # Errors
    /// See [`FrontEndError`].
    pub fn set_memory(&mut self, regions: &[MemoryRegion<'_>]) -> Result<()> {
        // More than fit into a message are refused by the back end, if not by the kernel.
        let head = Payload::default().u32(regions.len() as u32).u32(0);
        let payload = regions.iter().fold(head, Payload::region);
        let files: Vec<_> = regions.iter().map(|r| r.file).collect();
        self.say(FrontendReq::SET_MEM_TABLE, "SET_MEM_TABLE", payload, &files)
    }

    /// Adds a region to the memory that both ends work on.
    ///
    /// # Errors
    /// See [`FrontEndError`].
    pub fn add_memory(&mut self, region: &MemoryRegion<'_>) -> Result<()> {
        self.needs(ProtocolFeatures::CONFIGURE_MEM_SLOTS, "memory slots (CONFIGURE_MEM_SLOTS)")?;
        let payload = Payload::default().u64(0).region(region);
        self.say(FrontendReq::ADD_MEM_REG, "ADD_MEM_REG", payload, &[region.file])
    }

    /// Asks the back end for an inflight region.
    ///
    /// # Errors
    /// See [`FrontEndError`].
    pub fn get_inflight(&mut self, queues: u16, size: u16) -> Result<InflightRegion> {
        const NAME: &str = "GET_INFLIGHT_FD";
        self.needs(ProtocolFeatures::INFLIGHT_SHMFD, "an inflight region (INFLIGHT_SHMFD)")?;
        let payload = inflight_payload(0, 0, queues, size);
        self.send(FrontendReq::GET_INFLIGHT_FD, NAME, 0, payload, &[])?;
        let (answer, mut files) = self.answer(FrontendReq::GET_INFLIGHT_FD, NAME)?;
        let (Some(bytes), Some(offset)) = (wide(&answer, 0), wide(&answer, 8)) else {
            return Err(FrontEndError::Answer { message: NAME, why: "it is too short" });
        };
        match (files.pop(), files.len()) {
            (Some(file), 0) => Ok(InflightRegion { file, bytes, offset, queues, size }),
            _ => Err(FrontEndError::Answer { message: NAME, why: "it should have one descriptor" }),
        }
    }

    /// Hands the inflight region to the back end, before the queues are started.
    ///
    /// # Errors
    /// See [`FrontEndError`].
    pub fn set_inflight(&mut self, region: &InflightRegion) -> Result<()> {
        self.needs(ProtocolFeatures::INFLIGHT_SHMFD, "an inflight region (INFLIGHT_SHMFD)")?;
        let payload = inflight_payload(region.bytes, region.offset, region.queues, region.size);
        self.say(FrontendReq::SET_INFLIGHT_FD, "SET_INFLIGHT_FD", payload, &[region.file.as_fd()])
    }

    /// Starts queue `index` (2n is receive ring n, 2n+1 transmit ring n), disabled where protocol features were negotiated.
    ///
    /// # Errors
    /// See [`FrontEndError`].
    pub fn start_queue(&mut self, index: u16, queue: &QueueConfig<'_>) -> Result<()> {
        let state = |value: u32| Payload::default().u32(index.into()).u32(value);
        // DPDK's back end counts a ring as ready only once it knows about the call descriptor.
        self.set_call(index, queue.call)?;
        if queue.err.is_some() {
            self.vring_descriptor(FrontendReq::SET_VRING_ERR, "SET_VRING_ERR", index, queue.err)?;
        }
        self.say(FrontendReq::SET_VRING_NUM, "SET_VRING_NUM", state(queue.size.into()), &[])?;
        if let Some(base) = queue.base {
            self.say(FrontendReq::SET_VRING_BASE, "SET_VRING_BASE", state(base), &[])?;
        }
        self.set_addresses(index, queue)?;
        self.vring_descriptor(FrontendReq::SET_VRING_KICK, "SET_VRING_KICK", index, queue.kick)
    }

    /// Says where queue `index` is, and whether writes to its device area are logged. For a queue that runs, only that may
    /// change.
    ///
    /// # Errors
    /// See [`FrontEndError`].
    pub fn set_addresses(&mut self, index: u16, queue: &QueueConfig<'_>) -> Result<()> {
        let head = Payload::default().u32(index.into()).u32(u32::from(queue.log.is_some()));
        let payload =
            head.u64(queue.descriptors).u64(queue.device).u64(queue.driver).u64(queue.log.unwrap_or(0));
        self.say(FrontendReq::SET_VRING_ADDR, "SET_VRING_ADDR", payload, &[])
    }

    /// Replaces the descriptor by which the device signals the driver.
    ///
    /// # Errors
    /// See [`FrontEndError`].
    pub fn set_call(&mut self, index: u16, call: Option<BorrowedFd<'_>>) -> Result<()> {
        self.vring_descriptor(FrontendReq::SET_VRING_CALL, "SET_VRING_CALL", index, call)
    }

    /// Enables or disables a queue. Without protocol features, queues are always enabled.
    ///
    /// # Errors
    /// See [`FrontEndError`].
    pub fn enable_queue(&mut self, index: u16, enabled: bool) -> Result<()> {
        let payload = Payload::default().u32(index.into()).u32(enabled.into());
        self.say(FrontendReq::SET_VRING_ENABLE, "SET_VRING_ENABLE", payload, &[])
    }

    /// Stops a queue. Returns where it would go on ([`QueueConfig::base`]); after it, the device touches it no more.
    ///
    /// # Errors
    /// See [`FrontEndError`].
    pub fn stop_queue(&mut self, index: u16) -> Result<u32> {
        const NAME: &str = "GET_VRING_BASE";
        let payload = Payload::default().u32(index.into()).u32(0);
        self.send(FrontendReq::GET_VRING_BASE, NAME, 0, payload, &[])?;
        let (answer, _) = self.answer(FrontendReq::GET_VRING_BASE, NAME)?;
        match (word(&answer, 0), word(&answer, 4)) {
            (Some(i), Some(base)) if i == u32::from(index) => Ok(base),
            _ => Err(FrontEndError::Answer { message: NAME, why: "it is about another queue" }),
        }
    }

    /// Lends the back end a dirty log of `bytes` at `offset` of `file`.
    ///
    /// # Errors
    /// See [`FrontEndError`].
    pub fn set_log(&mut self, file: BorrowedFd<'_>, offset: u64, bytes: u64) -> Result<()> {
        const NAME: &str = "SET_LOG_BASE";
        self.needs(ProtocolFeatures::LOG_SHMFD, "a dirty log (LOG_SHMFD)")?;
        let payload = Payload::default().u64(bytes).u64(offset);
        self.send(FrontendReq::SET_LOG_BASE, NAME, 0, payload, &[file])?;
        // Always answered, with whatever payload.
        self.answer(FrontendReq::SET_LOG_BASE, NAME).map(drop)
    }

    /// Tells the back end the guest's MTU.
    ///
    /// # Errors
    /// See [`FrontEndError`].
    pub fn set_mtu(&mut self, mtu: u16) -> Result<()> {
        self.needs(ProtocolFeatures::MTU, "an MTU (NET_MTU)")?;
        self.say(FrontendReq::NET_SET_MTU, "NET_SET_MTU", Payload::default().u64(mtu.into()), &[])
    }

    /// Tells the back end the device status (virtio 1.3, 2.1).
    ///
    /// # Errors
    /// See [`FrontEndError`].
    pub fn set_status(&mut self, status: u8) -> Result<()> {
        self.needs(ProtocolFeatures::STATUS, "the device status (STATUS)")?;
        self.say(FrontendReq::SET_STATUS, "SET_STATUS", Payload::default().u64(status.into()), &[])
    }

    /// Whether the back end is gone.
    pub fn is_closed(&self) -> bool {
        use nix::sys::socket::{MsgFlags, recv};
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        !matches!(recv(self.socket.as_raw_fd(), &mut [0], flags), Ok(1..) | Err(nix::Error::EAGAIN))
    }

    // The details.

    fn needs(&self, feature: ProtocolFeatures, what: &'static str) -> Result<()> {
        if self.protocol.contains(feature) { Ok(()) } else { Err(FrontEndError::NotNegotiated(what)) }
    }

    fn vring_descriptor(
        &mut self,
        code: FrontendReq,
        name: &'static str,
        index: u16,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<()> {
        // Bit 8: there is no descriptor.
        let value = u64::from(index) | if fd.is_none() { 0x100 } else { 0 };
        self.say(code, name, Payload::default().u64(value), fd.as_slice())
    }

    /// Sends a message that is answered with a number.
    fn get(&mut self, code: FrontendReq, name: &'static str) -> Result<u64> {
        self.send(code, name, 0, Payload::default(), &[])?;
        let (answer, _) = self.answer(code, name)?;
        wide(&answer, 0).ok_or(FrontEndError::Answer { message: name, why: "it is too short" })
    }

    /// Sends a message, and waits until the back end has done what it says where it agreed to tell.
    fn say(
        &mut self,
        code: FrontendReq,
        name: &'static str,
        payload: Payload,
        files: &[BorrowedFd<'_>],
    ) -> Result<()> {
        if !self.protocol.contains(ProtocolFeatures::REPLY_ACK) {
            return self.send(code, name, 0, payload, files);
        }
        self.send(code, name, NEED_REPLY, payload, files)?;
        let (answer, _) = self.answer(code, name)?;
        match wide(&answer, 0) {
            Some(0) => Ok(()),
            Some(status) => Err(FrontEndError::Refused { message: name, status }),
            None => Err(FrontEndError::Answer { message: name, why: "it is too short" }),
        }
    }

    fn send(
        &mut self,
        code: FrontendReq,
        message: &'static str,
        flags: u32,
        payload: Payload,
        files: &[BorrowedFd<'_>],
    ) -> Result<()> {
        self.in_time(message)?;
        match wire::send(&self.socket, &wire::encode(code.into(), flags, &payload.0), files) {
            Ok(()) => Ok(()),
            Err(nix::Error::EPIPE | nix::Error::ECONNRESET) => Err(FrontEndError::Closed { message }),
            Err(nix::Error::EAGAIN) => Err(FrontEndError::TimedOut { message, waited: self.patience }),
            Err(source) => Err(FrontEndError::Send { message, source }),
        }
    }

    /// Whether there is time left for `message`.
    fn in_time(&self, message: &'static str) -> Result<()> {
        match self.limit {
            Some((end, waited)) if Instant::now() >= end => Err(FrontEndError::Slow { message, waited }),
            _ => Ok(()),
        }
    }

    /// The payload of the answer to `code`, and the descriptors that came with it.
    fn answer(&mut self, code: FrontendReq, message: &'static str) -> Result<(Vec<u8>, Vec<OwnedFd>)> {
        let deadline = Instant::now() + self.patience;
        let mut files = Vec::new();
        let header = self.receive(HEADER, message, deadline, &mut files)?;
        let wrong = |why| FrontEndError::Answer { message, why };
        let (Some(to), Some(flags), Some(size)) = (word(&header, 0), word(&header, 4), word(&header, 8))
        else {
            return Err(wrong("it is too short"));
        };
        if to != u32::from(code) || flags & REPLY == 0 {
            return Err(wrong("it answers something else"));
        }
        if flags & VERSION_MASK != VERSION || size as usize > MAX_MSG_SIZE {
            return Err(wrong("its header is malformed"));
        }
        let payload = self.receive(size as usize, message, deadline, &mut files)?;
        Ok((payload, files))
    }

    fn receive(
        &mut self,
        count: usize,
        message: &'static str,
        deadline: Instant,
        files: &mut Vec<OwnedFd>,
    ) -> Result<Vec<u8>> {
        let mut bytes = vec![0; count];
        let mut left = bytes.as_mut_slice();
        while !left.is_empty() {
            match wire::receive(&self.socket, left, files) {
                Ok(0) | Err(nix::Error::ECONNRESET) => return Err(FrontEndError::Closed { message }),
                Ok(n) => left = left.get_mut(n..).unwrap_or_default(),
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => {
                    self.in_time(message)?;
                    let now = Instant::now();
                    let time = deadline.saturating_duration_since(now);
                    if time.is_zero() {
                        return Err(FrontEndError::TimedOut { message, waited: self.patience });
                    }
                    let all = self.limit.map_or(time, |(end, _)| end.saturating_duration_since(now));
                    readable(self.socket.as_fd(), time.min(all));
                }
                Err(source) => return Err(FrontEndError::Send { message, source }),
            }
        }
        Ok(bytes)
    }
}

impl AsFd for FrontEnd {
    /// The connection, to wait for its end.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Connects without waiting: where nobody accepts and the queue of connections is full, the kernel would wait without end.
fn connect_now(path: &Path) -> std::io::Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    match connect(socket.as_raw_fd(), &UnixAddr::new(path)?) {
        Ok(()) => {}
        Err(nix::Error::EAGAIN) => {
            let full = "it has not accepted the connections that it has";
            return Err(std::io::Error::new(std::io::ErrorKind::WouldBlock, full));
        }
        Err(error) => return Err(error.into()),
    }
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Sizes of 16 bits and padding to a multiple of 8, as the structure has it in C.
fn inflight_payload(bytes: u64, offset: u64, queues: u16, size: u16) -> Payload {
    Payload::default().u64(bytes).u64(offset).u32(u32::from(queues) | u32::from(size) << 16).u32(0)
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|b| u32::from_ne_bytes(*b))
}

fn wide(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|b| u64::from_ne_bytes(*b))
}
