//! What the vhost-user session does to a port: starts, stops and changes its rings.
//!
//! Each change takes the ring's claim, so that no worker is in the middle of it, and is complete when the call returns.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use vhost_user::{Device, QueueStart};
use virtio::device::{DeviceRing, Direction, Ring, RingError};
use virtio::features;
use virtio::memory::{DirtyLog, GuestMemory};
use virtio::with_ring;

use super::{RunningRing, VhostPort, header_len};
use crate::events::Event;
use crate::offload::Accepts;
use crate::sleeper::Kick;
use crate::slot::{PortInfo, PortState};

/// The device side of one port's session.
pub struct VhostDevice {
    port: Arc<VhostPort>,
    offered: u64,
    mtu: Option<u16>,
}

impl VhostDevice {
    /// A device that offers these virtio features; `mtu` is the largest that the port carries.
    pub fn new(port: Arc<VhostPort>, offered: u64, mtu: Option<u16>) -> Self {
        Self { port, offered, mtu }
    }

    /// Applies `change` to the ring `index`, if it runs.
    fn with_ring<T>(&self, index: u16, change: impl FnOnce(&mut RunningRing) -> T) -> Option<T> {
        let pair = usize::from(index / 2);
        if index % 2 == 1 {
            self.port.rx.get(pair)?.state.take().ring.as_mut().map(change)
        } else {
            self.port.tx.get(pair)?.ring.take().as_mut().map(change)
        }
    }

    fn put_ring(&self, index: u16, ring: Option<RunningRing>) -> Option<RunningRing> {
        let pair = usize::from(index / 2);
        if index % 2 == 1 {
            let mut state = self.port.rx.get(pair)?.state.take();
            state.likely = u16::MAX;
            std::mem::replace(&mut state.ring, ring)
        } else {
            std::mem::replace(&mut *self.port.tx.get(pair)?.ring.take(), ring)
        }
    }

    fn info(&self, change: impl FnOnce(&mut PortInfo)) {
        self.port.shared.change_info(change);
    }

    /// Counts the receive rings that can be sent to, and derives what a user sees of the port.
    fn rings_changed(&self) {
        let live = |ring: &Option<RunningRing>| ring.as_ref().is_some_and(RunningRing::live);
        let active = self.port.tx.iter().take_while(|slot| live(&slot.ring.take())).count();
        let mut receiving = false;
        for slot in &self.port.rx {
            let running = live(&slot.state.take().ring);
            slot.live.store(running, Ordering::Release);
            receiving |= running;
        }
        let shared = &self.port.shared;
        shared.active.store(active as u16, Ordering::Release);
        if !shared.broken.load(Ordering::Acquire) {
            let up = active > 0 && receiving;
            if up && shared.state() != PortState::Up {
                // What was refused on the way here is past; what is refused from now on is not.
                self.info(|i| i.refused = None);
            }
            shared.set_state(if up { PortState::Up } else { PortState::Connected });
        }
        shared.events.send(Event::RingsChanged);
    }
}

impl Device for VhostDevice {
    fn features(&self) -> u64 {
        self.offered
    }

    fn max_queue_pairs(&self) -> u16 {
        self.port.rx.len() as u16
    }

    fn connected(&mut self) {
        let shared = &self.port.shared;
        shared.broken.store(false, Ordering::Release);
        self.info(|i| *i = PortInfo { last_end: i.last_end.take(), ..PortInfo::default() });
        shared.set_state(PortState::Connected);
    }

    fn negotiated(&mut self, features: u64) {
        self.info(|i| i.features = features);
    }

    fn memory(&mut self, memory: Option<Arc<GuestMemory>>) {
        let size = memory.as_deref().map(|m| (m.regions().iter().map(|r| r.size).sum(), m.regions().len()));
        self.info(|i| i.memory = size.unwrap_or_default());
        let node = memory.as_deref().and_then(|m| m.regions().first().map(|r| r.host)).and_then(node_of);
        for slot in &self.port.rx {
            slot.node.store(node.map_or(0, |n| n + 1), Ordering::Relaxed);
        }
        *self.port.memory.lock().unwrap_or_else(PoisonError::into_inner) = memory;
    }

    fn start_queue(&mut self, index: u16, start: QueueStart) -> Result<(), RingError> {
        let negotiated = start.ring.features;
        // Counted against the direction that the index stands for, whatever the caller thinks.
        let direction = if index % 2 == 1 { Direction::Read } else { Direction::Write };
        let mut ring = DeviceRing::start(virtio::device::RingSetup { direction, ..start.ring })?;
        ring.set_notify(false);
        // A front end that starts a ring anew has repaired what broke.
        self.port.shared.broken.store(false, Ordering::Release);
        let running = RunningRing {
            ring,
            call: start.call,
            kick: start.kick.map(Kick::new),
            err: start.err,
            enabled: start.enabled,
            header: header_len(negotiated),
            mergeable: negotiated & features::NET_MRG_RXBUF != 0,
            accepts: Accepts::of_features(negotiated),
            broken: false,
        };
        with_ring!(&running.ring, r => self.port.views.started(index, r.setup(), running.enabled));
        drop(self.put_ring(index, Some(running)));
        self.rings_changed();
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Option<u32> {
        let base = self.put_ring(index, None).map(|running| running.ring.base());
        self.port.views.stopped(index);
        self.rings_changed();
        base
    }

    fn enable_queue(&mut self, index: u16, enabled: bool) {
        self.with_ring(index, |r| r.enabled = enabled);
        self.port.views.enabled(index, enabled);
        self.rings_changed();
    }

    fn set_call(&mut self, index: u16, call: Option<OwnedFd>) {
        // The driver may have waited for a notification that went to the old descriptor.
        let old = self.with_ring(index, |r| {
            let old = std::mem::replace(&mut r.call, call);
            r.signal();
            old
        });
        drop(old);
    }

    fn set_log(&mut self, index: u16, log: Option<Arc<DirtyLog>>, used: Option<u64>) {
        self.with_ring(index, |r| {
            let setup = r.ring.setup_mut();
            (setup.log, setup.log_used) = (log, used);
        });
    }

    fn set_mtu(&mut self, mtu: u16) -> Result<(), String> {
        if let Some(most) = self.mtu
            && mtu > most
        {
            return Err(format!("the guest's MTU {mtu} is above this port's {most}"));
        }
        self.info(|i| i.mtu = Some(mtu));
        Ok(())
    }

    fn announce(&mut self, mac: [u8; 6]) {
        self.port.shared.events.send(Event::Announce { port: self.port.shared.number, mac });
    }

    fn set_status(&mut self, status: u8) {
        self.info(|i| i.status = Some(status));
    }

    fn refused(&mut self, what: &str) {
        let shared = &self.port.shared;
        self.info(|i| i.refused = Some(what.to_owned()));
        if shared.state() != PortState::Up {
            shared.broken.store(true, Ordering::Release);
            shared.set_state(PortState::Stopped(what.to_owned()));
        }
    }

    fn disconnected(&mut self, reason: &str) {
        self.port.halt();
        *self.port.memory.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let shared = &self.port.shared;
        // What broke is gone with its front end: housekeeping, if it hears of it only now, has nothing to stop.
        shared.broken.store(false, Ordering::Release);
        self.info(|i| i.last_end = Some(reason.to_owned()));
        shared.set_state(PortState::Waiting);
        shared.events.send(Event::RingsChanged);
    }
}

/// The NUMA node of the page at `at`, if the kernel says.
fn node_of(at: *mut u8) -> Option<u32> {
    /// MPOL_F_NODE | MPOL_F_ADDR: which node does this address live on?
    const NODE_OF_ADDRESS: libc::c_ulong = 1 | 2;
    let mut node: libc::c_int = -1;
    let no_mask = std::ptr::null_mut::<libc::c_ulong>();
    // SAFETY: the kernel writes one int to `node`, reads no mask, and checks the address.
    let r = unsafe {
        libc::syscall(libc::SYS_get_mempolicy, &raw mut node, no_mask, 0usize, at, NODE_OF_ADDRESS)
    };
    if r == 0 { u32::try_from(node).ok() } else { None }
}
