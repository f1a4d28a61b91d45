//! What a session has negotiated, and what each message changes.
//!
//! Called from one thread, through the `vhost` crate ([`super::handler`]) or for the messages that it lacks
//! ([`super::door`]). Every message is checked whole before anything changes; the rings are in [`super::rings`].

use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtio::device::Layout;
use virtio::features;
use virtio::memory::{DirtyLog, GuestMemory};

use super::Options;
use super::memory::{MemoryTable, Wanted};
use super::refusal::{Complaints, Refusal};
use super::rings::Ring;
use crate::ProtocolFeatures;
use crate::device::Device;
use crate::inflight::{self, Inflight, Shape};
use crate::mapping::Mapping;

/// Largest dirty log: enough for guest addresses up to 32 TiB.
const MAX_LOG: u64 = 1 << 30;

/// One session after another, on the same device.
pub(crate) struct Session {
    pub(super) device: Box<dyn Device>,
    options: Options,
    complaints: Complaints,
    /// Who came and went.
    visits: Complaints,
    /// The message being handled, for reports.
    pub(super) message: String,
    /// Why it was refused.
    pub(super) refused: Option<Refusal>,

    /// Whether the front end asked what is on offer: only then the `vhost` crate answers where it need not.
    features_read: bool,
    pub(super) features: u64,
    /// What the device was told.
    told: Option<u64>,
    pub(super) protocol: ProtocolFeatures,
    pub(super) rings: Vec<Ring>,
    table: MemoryTable,
    pub(super) memory: Option<Arc<GuestMemory>>,
    pub(super) inflight: Option<Inflight>,
    log: Option<Arc<DirtyLog>>,
    status: u8,
}

impl Session {
    pub(super) fn new(options: Options, device: Box<dyn Device>) -> Self {
        let [complaints, visits] = [(); 2].map(|()| Complaints::new(&options.name));
        Self {
            device,
            options,
            complaints,
            visits,
            message: String::new(),
            refused: None,
            features_read: false,
            features: 0,
            told: None,
            protocol: ProtocolFeatures::empty(),
            rings: Vec::new(),
            table: MemoryTable::default(),
            memory: None,
            inflight: None,
            log: None,
            status: 0,
        }
    }

    /// A front end is there.
    pub(super) fn connected(&mut self) {
        self.forget();
        self.device.connected();
    }

    /// The front end is gone: nothing of it is left afterwards.
    pub(super) fn disconnected(&mut self, reason: &str) {
        self.stop_all();
        if self.memory.take().is_some() {
            self.device.memory(None);
        }
        self.forget();
        self.device.disconnected(reason);
    }

    fn forget(&mut self) {
        self.features_read = false;
        self.protocol = ProtocolFeatures::empty();
        self.table = MemoryTable::default();
        self.memory = None;
        self.inflight = None;
        self.log = None;
        self.refused = None;
        self.forget_driver();
    }

    /// What a driver negotiated, as opposed to what the front end lent us.
    fn forget_driver(&mut self) {
        let queues = usize::from(self.device.max_queue_pairs()) * 2;
        self.rings = (0..queues).map(|_| Ring::default()).collect();
        self.features = 0;
        self.told = None;
        self.status = 0;
    }

    /// Writes down that the current message, or what followed from it, went wrong.
    pub(super) fn report(&mut self, refusal: &Refusal) {
        let what = format!("{}: {refusal}", self.message);
        self.complaints.warn(&what);
        self.device.refused(&what);
    }

    /// Writes down something about the connection.
    pub(super) fn complain(&mut self, what: &str) {
        self.complaints.warn(what);
    }

    /// Writes down that a front end came or went.
    pub(super) fn visit(&mut self, what: &str) {
        self.visits.info(what);
    }

    /// Whether a front end that asks for an answer gets one.
    pub(super) fn acknowledges(&self) -> bool {
        self.features_read && self.protocol.contains(ProtocolFeatures::REPLY_ACK)
    }

    fn needs(&self, feature: ProtocolFeatures, name: &'static str) -> Result<(), Refusal> {
        if self.protocol.contains(feature) { Ok(()) } else { Err(Refusal::NotNegotiated(name)) }
    }

    // Features.

    pub(super) fn offered_features(&mut self) -> u64 {
        self.features_read = true;
        self.offer()
    }

    fn offer(&self) -> u64 {
        let log = self.options.protocol_features.contains(ProtocolFeatures::LOG_SHMFD);
        let log = if log { features::VHOST_LOG_ALL } else { 0 };
        self.device.features() | features::VHOST_USER_PROTOCOL_FEATURES | log
    }

    pub(super) fn set_features(&mut self, wanted: u64) -> Result<(), Refusal> {
        let unknown = wanted & !self.offer();
        if unknown != 0 {
            return Err(Refusal::Features(unknown));
        }
        // Logging and the protocol bit are the session's own, and may change at any time.
        let own = features::VHOST_LOG_ALL | features::VHOST_USER_PROTOCOL_FEATURES;
        let running = self.rings.iter().position(|r| r.running);
        if let Some(queue) = running.filter(|_| (wanted ^ self.features) & !own != 0) {
            return Err(Refusal::FeaturesWhileRunning(queue));
        }
        let log_changes = (wanted ^ self.features) & features::VHOST_LOG_ALL != 0;
        self.features = wanted;
        if wanted & features::VHOST_USER_PROTOCOL_FEATURES == 0 {
            self.rings.iter_mut().for_each(|r| r.enabled = true);
        }
        let virtio = wanted & !own;
        if self.told.replace(virtio) != Some(virtio) {
            self.device.negotiated(virtio);
        }
        if log_changes {
            self.tell_all_logs();
        }
        Ok(())
    }

    pub(super) fn offered_protocol(&self) -> ProtocolFeatures {
        self.options.protocol_features & super::SUPPORTED
    }

    pub(super) fn set_protocol(&mut self, wanted: u64) -> Result<(), Refusal> {
        let unknown = wanted & !self.offered_protocol().bits();
        if unknown != 0 {
            return Err(Refusal::ProtocolFeatures(unknown));
        }
        self.protocol = ProtocolFeatures::from_bits_truncate(wanted);
        Ok(())
    }

    /// For a network device this is counted in pairs, as QEMU and DPDK have it.
    pub(super) fn queue_pairs(&self) -> u64 {
        u64::from(self.device.max_queue_pairs())
    }

    // Memory.

    pub(super) fn set_memory(
        &mut self,
        regions: impl ExactSizeIterator<Item = (Wanted, OwnedFd)>,
    ) -> Result<(), Refusal> {
        let table = MemoryTable::new(regions, self.options.memory_limit)?;
        self.replace_memory(table)
    }

    pub(super) fn add_region(&mut self, wanted: Wanted, file: OwnedFd) -> Result<(), Refusal> {
        let table = self.table.with(wanted, file, self.options.memory_limit)?;
        self.replace_memory(table)
    }

    pub(super) fn remove_region(&mut self, wanted: Wanted) -> Result<(), Refusal> {
        let table = self.table.without(wanted)?;
        self.replace_memory(table)
    }

    /// Rings that run stop, and go on where they were in the new memory. When this returns, nobody touches the old one.
    fn replace_memory(&mut self, table: MemoryTable) -> Result<(), Refusal> {
        let memory = table.memory()?;
        self.stop_all();
        self.device.memory(memory.clone());
        (self.table, self.memory) = (table, memory);
        self.start_all();
        Ok(())
    }

    // Inflight region and dirty log.

    fn inflight_shape(&self, queues: u16, size: u16) -> Shape {
        let packed = self.features & features::RING_PACKED != 0;
        Shape { queues, size, layout: if packed { Layout::Packed } else { Layout::Split } }
    }

    /// Makes an inflight region for the front end to keep. Nothing of it stays here until the front end hands it back.
    pub(super) fn make_inflight(&mut self, queues: u16, size: u16) -> Result<(u64, OwnedFd), Refusal> {
        self.needs(ProtocolFeatures::INFLIGHT_SHMFD, "INFLIGHT_SHMFD")?;
        let shape = self.inflight_shape(queues, size);
        shape.check(self.rings.len())?;
        Ok((shape.bytes(), inflight::create(shape)?))
    }

    pub(super) fn set_inflight(
        &mut self,
        file: &OwnedFd,
        offset: u64,
        bytes: u64,
        queues: u16,
        size: u16,
    ) -> Result<(), Refusal> {
        self.needs(ProtocolFeatures::INFLIGHT_SHMFD, "INFLIGHT_SHMFD")?;
        let shape = self.inflight_shape(queues, size);
        let region = Inflight::map(file, offset, bytes, shape, self.rings.len())?;
        // Rings that run hold the region they were started with.
        self.stop_all();
        self.inflight = Some(region);
        self.start_all();
        Ok(())
    }

    pub(super) fn set_log(&mut self, file: &OwnedFd, offset: u64, bytes: u64) -> Result<(), Refusal> {
        self.needs(ProtocolFeatures::LOG_SHMFD, "LOG_SHMFD")?;
        if bytes > MAX_LOG {
            return Err(Refusal::LogSize(bytes));
        }
        let fd = std::os::fd::AsFd::as_fd(file);
        let mapping = Mapping::new(fd, offset, bytes, Arc::default()).map_err(Refusal::Log)?;
        // SAFETY: `size` bytes at `first` are mapped readable and writable until the mapping is dropped.
        let log = unsafe { DirtyLog::new(mapping.first(), mapping.size(), Box::new(mapping)) };
        self.log = Some(Arc::new(log));
        self.tell_all_logs();
        Ok(())
    }

    /// The log, while the front end wants one kept.
    pub(super) fn active_log(&self) -> Option<Arc<DirtyLog>> {
        self.log.clone().filter(|_| self.features & features::VHOST_LOG_ALL != 0)
    }

    fn tell_all_logs(&mut self) {
        for index in 0..self.rings.len() {
            if let Ok(index) = self.queue(index as u64) {
                self.tell_log(index);
            }
        }
    }

    // The rest.

    /// The driver starts afresh (RESET_DEVICE, RESET_OWNER): rings are forgotten, memory and what the two ends agreed on stay.
    pub(super) fn reset(&mut self) {
        self.stop_all();
        self.forget_driver();
        self.device.set_status(0);
    }

    pub(super) fn set_mtu(&mut self, mtu: u64) -> Result<(), Refusal> {
        self.needs(ProtocolFeatures::MTU, "NET_MTU")?;
        // 68 is the least that IPv4 allows, and the field is 16 bits wide (virtio 1.3, 5.1.4).
        let small = u16::try_from(mtu).ok().filter(|&m| m >= 68);
        let carried = small.ok_or_else(|| "an MTU is 68 to 65535".to_owned());
        carried.and_then(|m| self.device.set_mtu(m)).map_err(|reason| Refusal::Mtu { mtu, reason })
    }

    pub(super) fn announce(&mut self, payload: u64) -> Result<(), Refusal> {
        self.needs(ProtocolFeatures::RARP, "RARP")?;
        let [a, b, c, d, e, f, ..] = payload.to_ne_bytes();
        self.device.announce([a, b, c, d, e, f]);
        Ok(())
    }

    pub(super) fn set_status(&mut self, status: u64) -> Result<(), Refusal> {
        self.needs(ProtocolFeatures::STATUS, "STATUS")?;
        // The status is one byte (virtio 1.3, 2.1) in a field of eight.
        self.status = (status & 0xff) as u8;
        self.device.set_status(self.status);
        Ok(())
    }

    pub(super) fn status(&self) -> Result<u64, Refusal> {
        self.needs(ProtocolFeatures::STATUS, "STATUS")?;
        Ok(u64::from(self.status))
    }
}
