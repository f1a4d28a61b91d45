//! Why a message was refused, in words for the user, and how often the user is told.

use std::time::{Duration, Instant};

use virtio::device::RingError;
use virtio::memory::RegionError;

use crate::descriptor::DescriptorError;
use crate::inflight::InflightError;
use crate::mapping::MappingError;

/// Why a message was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("queue {index} does not exist, this port has {queues}")]
    NoSuchQueue { index: u64, queues: usize },
    #[error("virtio features {0:#x} are not on offer")]
    Features(u64),
    #[error("virtio features cannot change while rings run (queue {0} does)")]
    FeaturesWhileRunning(usize),
    #[error("protocol features {0:#x} are not on offer")]
    ProtocolFeatures(u64),
    #[error("protocol feature {0} was not negotiated")]
    NotNegotiated(&'static str),
    #[error("queue {index} cannot have {size} descriptors")]
    QueueSize { index: u16, size: u32 },
    #[error("queue {index} runs, and its {what} cannot change until it was stopped")]
    Running { index: u16, what: &'static str },
    #[error("a ring is either enabled (1) or disabled (0), not {0}")]
    Enable(u32),
    #[error("more than {0} memory regions")]
    TooManyRegions(usize),
    #[error(
        "{total:#x} bytes of guest memory are more than this port's limit of {limit:#x}; raise the port's memory limit"
    )]
    MemoryLimit { total: u64, limit: u64 },
    #[error("memory region at {guest:#x}: {source}")]
    Region { guest: u64, source: MappingError },
    #[error(transparent)]
    Regions(#[from] RegionError),
    #[error("memory regions at {0:#x} and {1:#x} overlap in the front end's address space")]
    UserOverlap(u64, u64),
    #[error("there is no memory region at {0:#x} of that size")]
    NoSuchRegion(u64),
    #[error(
        "queue {index} cannot start: its {area} area, {len} bytes at {address:#x}, is outside guest memory"
    )]
    RingAddress { index: u16, area: &'static str, address: u64, len: usize },
    #[error(
        "queue {index} cannot start: {size} descriptors, but the inflight region was made for {inflight}"
    )]
    InflightSize { index: u16, size: u16, inflight: u16 },
    #[error("queue {index} cannot start: {source}")]
    Ring { index: u16, source: RingError },
    #[error("queue {index} cannot start: {source}")]
    Duplicate { index: u16, source: std::io::Error },
    #[error(transparent)]
    Descriptor(#[from] DescriptorError),
    #[error("{got} descriptors came with it, and it takes {wanted}")]
    Descriptors { got: usize, wanted: usize },
    #[error(transparent)]
    Inflight(#[from] InflightError),
    #[error("dirty log: {0}")]
    Log(MappingError),
    #[error("a dirty log of {0:#x} bytes is larger than any guest needs")]
    LogSize(u64),
    #[error("MTU {mtu}: {reason}")]
    Mtu { mtu: u64, reason: String },
    #[error("{got} bytes of payload where {wanted} belong")]
    Payload { got: usize, wanted: usize },
    #[error("not supported here")]
    Unsupported,
}

impl Refusal {
    /// A ring that cannot start is a matter between the driver and that ring: the driver may set it up again. After any other
    /// refusal the two sides disagree about what is set, and a front end that did not ask for an answer would never know.
    pub(crate) fn is_about_a_ring_alone(&self) -> bool {
        matches!(
            self,
            Refusal::RingAddress { .. }
                | Refusal::InflightSize { .. }
                | Refusal::Ring { .. }
                | Refusal::Duplicate { .. }
        )
    }
}

/// Lines that a misbehaving front end can cause at once, and how long it takes to earn another.
const BURST: u32 = 8;
const INTERVAL: Duration = Duration::from_secs(1);

/// Writes about one port, at a bounded rate.
pub(crate) struct Complaints {
    port: String,
    allowed: u32,
    since: Instant,
    silent: u64,
}

impl Complaints {
    pub(crate) fn new(port: &str) -> Self {
        Self { port: port.to_owned(), allowed: BURST, since: Instant::now(), silent: 0 }
    }

    /// Whether another line may be written now.
    fn may(&mut self, now: Instant) -> bool {
        let seconds = now.saturating_duration_since(self.since).as_secs() / INTERVAL.as_secs();
        if seconds > 0 {
            self.allowed = BURST.min(self.allowed.saturating_add(u32::try_from(seconds).unwrap_or(BURST)));
            self.since = now;
        }
        let may = self.allowed > 0;
        self.allowed = self.allowed.saturating_sub(1);
        may
    }

    /// Writes what is wrong, unless too much was written lately; then how much was left out is written later.
    pub(crate) fn warn(&mut self, what: &str) {
        if let Some(left_out) = self.next() {
            tracing::warn!("port {}: {what}{left_out}", self.port);
        }
    }

    /// As [`Self::warn`], what is as it should be.
    pub(crate) fn info(&mut self, what: &str) {
        if let Some(left_out) = self.next() {
            tracing::info!("port {}: {what}{left_out}", self.port);
        }
    }

    /// What to say of the lines before that were left out, if another may be written.
    fn next(&mut self) -> Option<String> {
        if !self.may(Instant::now()) {
            self.silent += 1;
            return None;
        }
        Some(match std::mem::take(&mut self.silent) {
            0 => String::new(),
            left_out => format!(" ({left_out} lines before this were left out)"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_thousand_refusals_at_once_write_eight_lines() {
        let mut complaints = Complaints::new("v0");
        let start = complaints.since;
        let lines = (0..10_000).filter(|_| complaints.may(start)).count();
        assert_eq!(lines, 8);
        assert!(complaints.may(start + INTERVAL));
        assert!(!complaints.may(start + INTERVAL));
        let later = start + INTERVAL * 100;
        assert_eq!((0..100).filter(|_| complaints.may(later)).count(), 8);
    }
}
