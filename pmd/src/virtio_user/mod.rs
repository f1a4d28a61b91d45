//! virtio-user: a poll-mode virtio-net driver over a vhost-user socket, without a VM.
//!
//! ```text
//!   VirtioUser ── Session ── socket ──── back end (a switch)
//!      │ memory: rings and buffers, a file that both map
//!      └ QueuePair ── receive ring ◄─┐
//!                  └─ transmit ring ─┴── polled by both sides
//! ```
//!
//! Supported: split and packed rings; IN_ORDER, EVENT_IDX, INDIRECT_DESC, MRG_RXBUF; frames over several buffers both ways;
//! the virtio-net header of each frame, to be read and set (checksum and segmentation requests); several queue pairs;
//! connecting to a back end or listening for it; a back end that goes away and comes back, with the frames that it had
//! (INFLIGHT where offered). Works with our switch, DPDK's `net_vhost` and OVS-DPDK.
//!
//! Not supported: a control queue (a vhost-user back end never sees it: rings are enabled by message), interrupts (the driver
//! polls), back-end requests, an IOMMU, postcopy, dirty logging (nothing here migrates).
//!
//! The bytes of a frame are copied in and out ([`QueuePair::read`], [`QueuePair::write`]): the back end is another process
//! that maps the same memory and could write to it at any time, which a `&[u8]` must never see.

mod buffer;
mod counters;
mod memory;
mod queue;
#[cfg(test)]
mod queue_tests;
mod session;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use host::memory::{MemoryError, Pages};
use vhost_user::frontend::{FrontEndError, InflightRegion};
use virtio::device::Layout;
use virtio::driver::{DriverFault, SetupError};
use virtio::features;

use memory::{DeviceMemory, HEADROOM, Plan};
use session::{Meeting, Session};

pub use buffer::Buffer;
pub use counters::Counters;
pub use queue::QueuePair;

/// Who opens the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketMode {
    /// The back end listens (our switch in server mode, DPDK's `net_vhost`).
    Connect,
    /// The back end connects to us (OVS's `dpdkvhostuserclient`).
    Listen,
}

/// How a device is made.
#[derive(Clone, Debug)]
pub struct Options {
    /// Who opens the socket.
    pub mode: SocketMode,
    /// Split or packed rings.
    pub layout: Layout,
    /// Descriptors of each ring: for split rings a power of two, at most 32,768.
    pub queue_size: u16,
    /// Pairs of a receive and a transmit ring, 1 to 128.
    pub queue_pairs: u16,
    /// Features wanted (masks of [`virtio::features`]); what the back end does not offer is left out. RING_PACKED follows
    /// `layout`.
    pub features: u64,
    /// The address that the device goes by.
    pub mac: [u8; 6],
    /// Packet buffers of all pairs together; receive rings are kept filled with them.
    pub buffers: u32,
    /// Bytes of each, of which 64 lie before the frame.
    pub buffer_size: u32,
    /// Pages for rings and buffers.
    pub pages: Pages,
    /// How long to wait for a back end, and for each of its answers.
    pub timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            mode: SocketMode::Connect,
            layout: Layout::Split,
            queue_size: 256,
            queue_pairs: 1,
            features: features::VERSION_1
                | features::NET_MRG_RXBUF
                | features::IN_ORDER
                | features::RING_EVENT_IDX
                | features::RING_INDIRECT_DESC,
            mac: [0x02, 0, 0, 0, 0, 1],
            buffers: 4096,
            buffer_size: 2048,
            pages: Pages::Auto,
            timeout: Duration::from_secs(5),
        }
    }
}

/// Why a device could not be opened, or a back end not be taken into service.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum OpenError {
    #[error("{0} queue pairs: a device has 1 to 128")]
    Pairs(u16),
    #[error(
        "{buffers} buffers are too few for {queue_pairs} queue pairs of {queue_size}: give at least {least}, twice the receive rings"
    )]
    Buffers { buffers: u32, queue_pairs: u16, queue_size: u16, least: u32 },
    #[error("buffers of {0} bytes: give 192 to 65535, of which 64 lie before the frame")]
    BufferSize(u32),
    #[error("this process has opened 65535 devices already, and cannot tell more apart; start it again")]
    Devices,
    #[error("cannot make the device's memory: {0}")]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Ring(#[from] SetupError),
    #[error(transparent)]
    FrontEnd(#[from] FrontEndError),
    #[error("cannot create an eventfd: {0}; raise the limit of open files (ulimit -n)")]
    EventFd(nix::Error),
    #[error("the ring is broken: {0}")]
    Fault(#[from] DriverFault),
    #[error("the back end does not offer packed rings; use split ones, or enable packed rings there")]
    NotPacked,
    #[error(
        "the back end has {offered} queue pairs, {wanted} are wanted; ask for fewer, or give the port more"
    )]
    TooManyPairs { wanted: u16, offered: u64 },
}

/// How a device came back into service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reconnected {
    /// The new back end goes on where the old one stopped.
    Resumed,
    /// The rings began anew, because the old back end broke them or the new one has other features: frames in flight are lost
    /// ([`Counters::abandoned`]).
    Afresh,
}

/// A virtio-net device whose back end is at the other end of a vhost-user socket.
pub struct VirtioUser {
    // Before the memory: a back end that is told nothing more may still write, to its own mapping.
    session: Session,
    pairs: Vec<QueuePair>,
    memory: Arc<DeviceMemory>,
    meeting: Meeting,
    inflight: Option<InflightRegion>,
    options: Options,
}

/// Buffers name the device that they belong to.
static DEVICES: AtomicU16 = AtomicU16::new(0);

impl VirtioUser {
    /// Makes a device, waits for its back end and starts it.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(path: &Path, options: Options) -> Result<Self, OpenError> {
        let Options { layout, queue_size, queue_pairs, buffers, buffer_size, .. } = options;
        if !(1..=128).contains(&queue_pairs) {
            return Err(OpenError::Pairs(queue_pairs));
        }
        let least = 2 * u32::from(queue_pairs) * u32::from(queue_size);
        if buffers < least || buffers >= 1 << 31 {
            return Err(OpenError::Buffers { buffers, queue_pairs, queue_size, least });
        }
        if buffer_size < 2 * HEADROOM as u32 + 64 || buffer_size > u32::from(u16::MAX) {
            return Err(OpenError::BufferSize(buffer_size));
        }
        let meeting = Meeting::at(path, options.mode)?;
        let plan = Plan { layout, queue_size, queue_pairs, buffers, buffer_size };
        let memory = DeviceMemory::new(plan, options.pages)?;
        let session = Session::begin(&meeting, &options)?;
        // No number is used twice, or a buffer of one device could be taken for another's.
        let owner = DEVICES
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_add(1))
            .map_err(|_| OpenError::Devices)?;
        let each = buffers / u32::from(queue_pairs);
        let mut pairs = Vec::with_capacity(usize::from(queue_pairs));
        for i in 0..queue_pairs {
            let pool = u32::from(i) * each..(u32::from(i) + 1) * each;
            pairs.push(QueuePair::new(memory.clone(), owner, i, queue_size, session.negotiated, pool)?);
        }
        let mut device = Self { session, pairs, memory, meeting, inflight: None, options };
        device.start()?;
        Ok(device)
    }

    /// Features that both sides agreed on.
    pub fn features(&self) -> u64 {
        self.session.negotiated
    }

    /// The pages that rings and buffers got; never [`Pages::Auto`].
    pub fn pages(&self) -> Pages {
        self.memory.shared().pages()
    }

    /// The address that the device goes by.
    pub fn mac(&self) -> [u8; 6] {
        self.options.mac
    }

    /// The queue pairs. Each may be polled by a thread of its own.
    pub fn queue_pairs(&mut self) -> &mut [QueuePair] {
        &mut self.pairs
    }

    /// Whether the back end is there. Asks the kernel: not for every burst.
    pub fn connected(&self) -> bool {
        self.session.is_alive()
    }

    /// Waits for the back end to come back, and goes on with it. Frames that the old one had used are received; those that it
    /// had taken and not used are processed again.
    ///
    /// # Errors
    /// See [`OpenError`]. The device is at rest then; try again.
    pub fn reconnect(&mut self) -> Result<Reconnected, OpenError> {
        self.pairs.iter_mut().for_each(QueuePair::pause);
        let before = self.session.negotiated;
        self.session = Session::begin(&self.meeting, &self.options)?;
        let sound = self.pairs.iter().all(|p| p.resume_positions().is_ok());
        let outcome = if sound && self.session.negotiated == before {
            Reconnected::Resumed
        } else {
            for pair in &mut self.pairs {
                pair.reset(self.session.negotiated)?;
            }
            self.inflight = None;
            Reconnected::Afresh
        };
        self.start()?;
        Ok(outcome)
    }

    /// Tells the back end everything and lets the rings run.
    fn start(&mut self) -> Result<(), OpenError> {
        let Options { queue_size, queue_pairs, .. } = self.options;
        let session = &mut self.session;
        session.share_inflight(&mut self.inflight, 2 * queue_pairs, queue_size)?;
        session.share_memory(&self.memory)?;
        let mut kicks = Vec::with_capacity(self.pairs.len());
        for (i, pair) in (0..queue_pairs).zip(&mut self.pairs) {
            let (receive, transmit) = pair.resume_positions()?;
            pair.refill();
            let receive = session.start_ring(&self.memory, 2 * i, queue_size, receive)?;
            let transmit = session.start_ring(&self.memory, 2 * i + 1, queue_size, transmit)?;
            kicks.push((receive, transmit));
        }
        session.run(2 * queue_pairs)?;
        for (pair, (receive, transmit)) in self.pairs.iter_mut().zip(kicks) {
            pair.start(Some(receive), Some(transmit));
        }
        Ok(())
    }
}
