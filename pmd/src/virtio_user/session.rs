//! The conversation with a back end: where it is met, what is agreed, how it is told about memory and rings.
//!
//! Asks and tells once, when a back end appears; afterwards the connection only shows whether it is still there.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use vhost_user::ProtocolFeatures as Protocol;
use vhost_user::frontend::{
    FrontEnd, FrontEndError, FrontEndListener, InflightRegion, MemoryRegion, QueueConfig,
};
use virtio::device::Layout;
use virtio::features;
use virtio::memory::HostRange;

use super::memory::{DeviceMemory, GUEST_BASE};
use super::{OpenError, Options, SocketMode};

/// How often it is tried to connect.
const RETRY: Duration = Duration::from_millis(5);

/// Device status (virtio 1.3, section 2.1): ACKNOWLEDGE, DRIVER, FEATURES_OK.
const STATUS_FEATURES_OK: u8 = 1 | 2 | 8;
/// The same with DRIVER_OK.
const STATUS_DRIVER_OK: u8 = STATUS_FEATURES_OK | 4;

/// Where back ends are met.
pub(super) enum Meeting {
    /// They listen.
    There(PathBuf),
    /// We listen.
    Here(FrontEndListener),
}

impl Meeting {
    pub(super) fn at(path: &Path, mode: SocketMode) -> Result<Self, OpenError> {
        Ok(match mode {
            SocketMode::Connect => Self::There(path.to_owned()),
            SocketMode::Listen => Self::Here(FrontEndListener::bind(path)?),
        })
    }

    /// A connection to a back end, within `timeout`: one that does not listen yet may only be starting.
    fn wait(&self, timeout: Duration) -> Result<FrontEnd, FrontEndError> {
        let path = match self {
            Self::Here(listener) => return listener.accept(timeout),
            Self::There(path) => path,
        };
        let end = Instant::now() + timeout;
        loop {
            match FrontEnd::connect(path, timeout) {
                Err(FrontEndError::Connect { source, .. })
                    if Instant::now() < end
                        && matches!(
                            source.kind(),
                            std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused
                        ) =>
                {
                    sleep(RETRY);
                }
                other => return other,
            }
        }
    }
}

/// A back end that answered, and what was agreed with it.
pub(super) struct Session {
    front: FrontEnd,
    protocol: Protocol,
    pub(super) negotiated: u64,
}

impl Session {
    /// Waits for a back end and agrees on features with it.
    pub(super) fn begin(meeting: &Meeting, options: &Options) -> Result<Self, OpenError> {
        let packed = if options.layout == Layout::Packed { features::RING_PACKED } else { 0 };
        let multi = if options.queue_pairs > 1 { features::NET_MQ } else { 0 };
        let wanted = options.features & !features::RING_PACKED | packed | multi;
        let protocol = Protocol::REPLY_ACK | Protocol::MQ | Protocol::INFLIGHT_SHMFD | Protocol::STATUS;

        let mut front = meeting.wait(options.timeout)?;
        let agreed = front.negotiate(wanted, protocol)?;
        if agreed.features & packed != packed {
            return Err(OpenError::NotPacked);
        }
        if options.queue_pairs > 1 {
            let offered = front.queue_pairs()?;
            if offered < u64::from(options.queue_pairs) {
                return Err(OpenError::TooManyPairs { wanted: options.queue_pairs, offered });
            }
        }
        if agreed.protocol.contains(Protocol::STATUS) {
            front.set_status(STATUS_FEATURES_OK)?;
        }
        Ok(Self { front, protocol: agreed.protocol, negotiated: agreed.features })
    }

    /// Passes the record of buffers in flight, which makes a back end's successor know where to go on: the one that was
    /// kept, or a new one of this back end's making.
    pub(super) fn share_inflight(
        &mut self,
        kept: &mut Option<InflightRegion>,
        queues: u16,
        queue_size: u16,
    ) -> Result<(), FrontEndError> {
        if !self.protocol.contains(Protocol::INFLIGHT_SHMFD) {
            *kept = None;
            return Ok(());
        }
        let region = match kept.take() {
            Some(region) => region,
            None => self.front.get_inflight(queues, queue_size)?,
        };
        self.front.set_inflight(kept.insert(region))
    }

    pub(super) fn share_memory(&mut self, memory: &DeviceMemory) -> Result<(), FrontEndError> {
        let shared = memory.shared();
        self.front.set_memory(&[MemoryRegion {
            file: shared.file(),
            size: shared.len() as u64,
            guest: GUEST_BASE,
            user: shared.as_ptr().addr() as u64,
            offset: 0,
        }])
    }

    /// Describes virtqueue `queue`, to go on at `base`; returns the eventfd by which the back end is notified.
    pub(super) fn start_ring(
        &mut self,
        memory: &DeviceMemory,
        queue: u16,
        size: u16,
        base: u32,
    ) -> Result<OwnedFd, OpenError> {
        let kick = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC);
        let kick = OwnedFd::from(kick.map_err(OpenError::EventFd)?);
        let ring = memory.ring(queue);
        let user = |range: HostRange| range.ptr.addr() as u64;
        self.front.start_queue(
            queue,
            &QueueConfig {
                size,
                descriptors: user(ring.descriptors),
                driver: user(ring.driver),
                device: user(ring.device),
                base: Some(base),
                log: None,
                call: None,
                kick: Some(kick.as_fd()),
                err: None,
            },
        )?;
        Ok(kick)
    }

    /// Lets virtqueues 0 to `queues - 1` run.
    pub(super) fn run(&mut self, queues: u16) -> Result<(), FrontEndError> {
        // Without protocol features rings run as soon as they are described.
        if !self.protocol.is_empty() {
            (0..queues).try_for_each(|queue| self.front.enable_queue(queue, true))?;
        }
        if self.protocol.contains(Protocol::STATUS) {
            self.front.set_status(STATUS_DRIVER_OK)?;
        }
        Ok(())
    }

    /// Whether the back end still holds its end of the connection.
    pub(super) fn is_alive(&self) -> bool {
        !self.front.is_closed()
    }
}
