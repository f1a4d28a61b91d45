//! The rings of a session: what the front end said about each, and when that is enough to start it.

use std::os::fd::OwnedFd;

use virtio::device::{Direction, Layout, RingSetup};
use virtio::features;
use virtio::memory::{HostRange, packed, split};

use super::refusal::Refusal;
use super::session::Session;
use crate::device::QueueStart;

/// Where a ring's areas are, in the front end's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Addresses {
    pub(crate) descriptors: u64,
    pub(crate) driver: u64,
    pub(crate) device: u64,
    /// Guest-physical address under which writes to the device area are logged, if they are.
    pub(crate) log: Option<u64>,
}

/// How the driver signals us.
#[derive(Debug, Default)]
pub(crate) enum Kick {
    /// Not said yet: the ring does not run.
    #[default]
    Unknown,
    /// Not at all: we poll.
    Polled,
    /// By this eventfd.
    Event(OwnedFd),
}

/// What is known of a ring.
#[derive(Debug, Default)]
pub(crate) struct Ring {
    pub(crate) size: Option<u16>,
    pub(crate) addresses: Option<Addresses>,
    pub(crate) base: Option<u32>,
    pub(crate) kick: Kick,
    pub(crate) call: Option<OwnedFd>,
    pub(crate) err: Option<OwnedFd>,
    pub(crate) enabled: bool,
    pub(crate) running: bool,
}

/// A second descriptor of the same eventfd.
fn again(index: u16, fd: Option<&OwnedFd>) -> Result<Option<OwnedFd>, Refusal> {
    fd.map(OwnedFd::try_clone).transpose().map_err(|source| Refusal::Duplicate { index, source })
}

impl Session {
    /// Checks a queue index as the message has it, whole.
    pub(crate) fn queue(&self, index: impl Into<u64>) -> Result<u16, Refusal> {
        let index = index.into();
        let queues = self.rings.len();
        match u16::try_from(index) {
            Ok(i) if usize::from(i) < queues => Ok(i),
            _ => Err(Refusal::NoSuchQueue { index, queues }),
        }
    }

    /// The ring with a checked index.
    pub(super) fn ring(&mut self, index: u16) -> Result<&mut Ring, Refusal> {
        let queues = self.rings.len();
        self.rings.get_mut(usize::from(index)).ok_or(Refusal::NoSuchQueue { index: index.into(), queues })
    }

    fn stopped_ring(&mut self, index: u16, what: &'static str) -> Result<&mut Ring, Refusal> {
        let ring = self.ring(index)?;
        if ring.running { Err(Refusal::Running { index, what }) } else { Ok(ring) }
    }

    fn layout(&self) -> Layout {
        if self.features & features::RING_PACKED != 0 { Layout::Packed } else { Layout::Split }
    }

    pub(crate) fn set_size(&mut self, index: u32, size: u32) -> Result<(), Refusal> {
        let index = self.queue(index)?;
        let possible = u16::try_from(size).ok().filter(|&s| s <= 32_768);
        let size = possible.ok_or(Refusal::QueueSize { index, size })?;
        // DPDK's driver says 0 for the queues that it does not use: such a ring never starts.
        let size = Some(size).filter(|&s| s > 0);
        let ring = self.ring(index)?;
        if ring.running && ring.size != size {
            return Err(Refusal::Running { index, what: "size" });
        }
        ring.size = size;
        self.start_if_complete(index)
    }

    pub(crate) fn set_addresses(&mut self, index: u32, addresses: Addresses) -> Result<(), Refusal> {
        let index = self.queue(index)?;
        let ring = self.ring(index)?;
        let old = ring.addresses.replace(addresses);
        if ring.running {
            // A migration begins or ends: the same place, logged or not.
            if old.is_some_and(|old| Addresses { log: addresses.log, ..old } == addresses) {
                self.tell_log(index);
                return Ok(());
            }
            self.stop(index)?;
        }
        self.start_if_complete(index)
    }

    pub(crate) fn set_base(&mut self, index: u32, base: u32) -> Result<(), Refusal> {
        let index = self.queue(index)?;
        self.stopped_ring(index, "position")?.base = Some(base);
        self.start_if_complete(index)
    }

    /// Stops a ring and says where it would go on. Everything else that is known of it stays; to start it again takes a new
    /// SET_VRING_KICK.
    pub(crate) fn get_base(&mut self, index: u32) -> Result<u32, Refusal> {
        let index = self.queue(index)?;
        self.stop(index)?;
        let ring = self.ring(index)?;
        ring.kick = Kick::Unknown;
        Ok(ring.base.unwrap_or(0))
    }

    pub(crate) fn set_kick(&mut self, index: u8, kick: Option<OwnedFd>) -> Result<(), Refusal> {
        let index = self.queue(index)?;
        let kick = match kick {
            None => Kick::Polled,
            Some(fd) => Kick::Event(crate::descriptor::eventfd(fd)?),
        };
        self.stop(index)?;
        self.ring(index)?.kick = kick;
        self.start_if_complete(index)
    }

    pub(crate) fn set_call(&mut self, index: u8, call: Option<OwnedFd>) -> Result<(), Refusal> {
        let index = self.queue(index)?;
        let call = call.map(crate::descriptor::eventfd).transpose()?;
        let ring = self.ring(index)?;
        let running = ring.running;
        let copy = if running { again(index, call.as_ref())? } else { None };
        ring.call = call;
        if running {
            self.device.set_call(index, copy);
        }
        Ok(())
    }

    pub(crate) fn set_err(&mut self, index: u8, err: Option<OwnedFd>) -> Result<(), Refusal> {
        let index = self.queue(index)?;
        let err = err.map(crate::descriptor::eventfd).transpose()?;
        self.stop(index)?;
        self.ring(index)?.err = err;
        self.start_if_complete(index)
    }

    pub(crate) fn set_enabled(&mut self, index: u32, enabled: u32) -> Result<(), Refusal> {
        let index = self.queue(index)?;
        if enabled > 1 {
            return Err(Refusal::Enable(enabled));
        }
        let ring = self.ring(index)?;
        ring.enabled = enabled == 1;
        if ring.running {
            self.device.enable_queue(index, enabled == 1);
        }
        Ok(())
    }

    /// Stops a ring if it runs, and keeps its position.
    pub(super) fn stop(&mut self, index: u16) -> Result<(), Refusal> {
        if std::mem::take(&mut self.ring(index)?.running) {
            let base = self.device.stop_queue(index);
            let ring = self.ring(index)?;
            ring.base = base.or(ring.base);
        }
        Ok(())
    }

    /// Stops every ring that runs.
    pub(super) fn stop_all(&mut self) {
        for index in 0..self.rings.len() {
            // An index below the number of queues exists.
            let _ = self.queue(index as u64).and_then(|index| self.stop(index));
        }
    }

    /// Starts every ring that is complete. The message that made us was about something else: what goes wrong is reported, not
    /// answered.
    pub(super) fn start_all(&mut self) {
        for index in 0..self.rings.len() {
            let started = self.queue(index as u64).and_then(|index| self.start_if_complete(index));
            if let Err(refusal) = started {
                self.report(&refusal);
            }
        }
    }

    /// Starts a ring once size, addresses, position, kick and memory are known. A packed ring may have its position in the
    /// inflight region instead.
    pub(super) fn start_if_complete(&mut self, index: u16) -> Result<(), Refusal> {
        let layout = self.layout();
        let Some(memory) = self.memory.clone() else { return Ok(()) };
        let inflight = self.inflight.as_ref().filter(|i| i.shape().layout == layout);
        let made_for = inflight.map(|i| i.shape().size);
        let inflight = inflight.and_then(|i| i.area(index)).filter(|_| layout == Layout::Packed);
        let (log, features) = (self.active_log(), self.features);
        let ring = self.ring(index)?;
        let (Some(size), Some(at)) = (ring.size, ring.addresses) else { return Ok(()) };
        let positioned = ring.base.is_some() || inflight.is_some();
        if ring.running || !positioned || matches!(ring.kick, Kick::Unknown) {
            return Ok(());
        }

        if layout == Layout::Split && !size.is_power_of_two() {
            return Err(Refusal::QueueSize { index, size: size.into() });
        }
        if let Some(inflight) = made_for.filter(|&made_for| size > made_for) {
            return Err(Refusal::InflightSize { index, size, inflight });
        }
        let find = |area, address, len| -> Result<HostRange, Refusal> {
            memory.user_range(address, len).ok_or(Refusal::RingAddress { index, area, address, len })
        };
        let (driver, device) = match layout {
            Layout::Split => (split::avail_bytes(size), split::used_bytes(size)),
            Layout::Packed => (packed::Events::BYTES, packed::Events::BYTES),
        };
        let start = QueueStart {
            ring: RingSetup {
                layout,
                direction: if index.is_multiple_of(2) { Direction::Write } else { Direction::Read },
                size,
                descriptors: find("descriptor", at.descriptors, usize::from(size) * split::DESCRIPTOR)?,
                driver: find("driver", at.driver, driver)?,
                device: find("device", at.device, device)?,
                base: ring.base,
                features,
                memory: memory.clone(),
                log,
                log_used: at.log,
                inflight,
            },
            call: again(index, ring.call.as_ref())?,
            kick: match &ring.kick {
                Kick::Event(fd) => again(index, Some(fd))?,
                Kick::Unknown | Kick::Polled => None,
            },
            err: again(index, ring.err.as_ref())?,
            enabled: ring.enabled,
        };
        self.device.start_queue(index, start).map_err(|source| Refusal::Ring { index, source })?;
        self.ring(index)?.running = true;
        Ok(())
    }

    /// Tells the device where a running ring logs now.
    pub(super) fn tell_log(&mut self, index: u16) {
        let log = self.active_log();
        if let Some(ring) = self.rings.get(usize::from(index))
            && ring.running
        {
            self.device.set_log(index, log, ring.addresses.and_then(|a| a.log));
        }
    }
}
