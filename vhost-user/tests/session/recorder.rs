//! A device that writes down what a session does with it.

use std::sync::{Arc, Mutex, MutexGuard};

use virtio::device::RingError;
use virtio::features;
use virtio::memory::{DirtyLog, GuestMemory};

use vhost_user::{Device, QueueStart};

/// What the recorder saw.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) calls: Vec<String>,
    pub(crate) starts: Vec<(u16, QueueStart)>,
    pub(crate) memory: Option<Arc<GuestMemory>>,
    pub(crate) log: Option<Arc<DirtyLog>>,
    /// What `stop_queue` answers.
    pub(crate) base: u32,
    /// Whether `start_queue` refuses.
    pub(crate) refuse: bool,
    /// Keep what is started and said. The endurance tests do not: memory must stay constant.
    pub(crate) forgetful: bool,
}

impl Seen {
    fn note(&mut self, call: String) {
        if !self.forgetful {
            self.calls.push(call);
        }
    }
}

/// Shared with the test.
#[derive(Clone, Default)]
pub(crate) struct Recorder(Arc<Mutex<Seen>>);

pub(crate) const FEATURES: u64 = features::VERSION_1
    | features::NET_MRG_RXBUF
    | features::RING_PACKED
    | features::RING_INDIRECT_DESC
    | features::RING_EVENT_IDX;

/// Pairs of the device: few, so that an index just beyond can be tried.
pub(crate) const PAIRS: u16 = 4;

impl Recorder {
    pub(crate) fn seen(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap()
    }

    /// Whether a call that begins like this was made.
    pub(crate) fn was_called(&self, call: &str) -> bool {
        self.seen().calls.iter().any(|c| c.starts_with(call))
    }
}

impl Device for Recorder {
    fn features(&self) -> u64 {
        FEATURES
    }

    fn max_queue_pairs(&self) -> u16 {
        PAIRS
    }

    fn connected(&mut self) {
        self.seen().note("connected".into());
    }

    fn negotiated(&mut self, features: u64) {
        self.seen().note(format!("negotiated {features:#x}"));
    }

    fn memory(&mut self, memory: Option<Arc<GuestMemory>>) {
        let mut seen = self.seen();
        let regions = memory.as_ref().map_or(0, |m| m.regions().len());
        seen.note(format!("memory {regions}"));
        seen.starts.clear();
        seen.memory = memory;
    }

    fn start_queue(&mut self, index: u16, start: QueueStart) -> Result<(), RingError> {
        let mut seen = self.seen();
        if seen.refuse {
            return Err(RingError::NoPosition);
        }
        let (base, enabled) = (start.ring.base, start.enabled);
        seen.note(format!("start {index} base {base:x?} enabled {enabled}"));
        seen.starts.retain(|(i, _)| *i != index);
        seen.starts.push((index, start));
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Option<u32> {
        let mut seen = self.seen();
        seen.note(format!("stop {index}"));
        seen.starts.retain(|(i, _)| *i != index);
        Some(seen.base)
    }

    fn enable_queue(&mut self, index: u16, enabled: bool) {
        self.seen().note(format!("enable {index} {enabled}"));
    }

    fn set_call(&mut self, index: u16, call: Option<std::os::fd::OwnedFd>) {
        self.seen().note(format!("call {index} {}", call.is_some()));
    }

    fn set_log(&mut self, index: u16, log: Option<Arc<DirtyLog>>, used: Option<u64>) {
        let mut seen = self.seen();
        seen.note(format!("log {index} {} {used:x?}", log.is_some()));
        seen.log = log;
    }

    fn set_mtu(&mut self, mtu: u16) -> Result<(), String> {
        self.seen().note(format!("mtu {mtu}"));
        if mtu > 9_000 { Err("this port carries 9000".into()) } else { Ok(()) }
    }

    fn announce(&mut self, mac: [u8; 6]) {
        self.seen().note(format!("announce {mac:02x?}"));
    }

    fn set_status(&mut self, status: u8) {
        self.seen().note(format!("status {status}"));
    }

    fn refused(&mut self, what: &str) {
        self.seen().note(format!("refused {what}"));
    }

    fn disconnected(&mut self, reason: &str) {
        self.seen().note(format!("disconnected {reason}"));
    }
}
