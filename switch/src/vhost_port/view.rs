//! What a user sees of a port's rings, kept beside the rings themselves.
//!
//! Written by whoever starts, stops or changes a ring; read by the control thread. Never looks at a ring: looking would take
//! its claim, and a worker that finds a ring busy drops frames. Watching a switch must not cost any.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use virtio::device::{Layout, RingSetup};

/// A ring that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RingView {
    /// Virtqueue index.
    pub(crate) index: u16,
    /// Descriptors.
    pub(crate) size: u16,
    /// Packed rather than split.
    pub(crate) packed: bool,
    /// Whether the driver enabled it.
    pub(crate) enabled: bool,
}

/// The rings of a port that run, by virtqueue index.
#[derive(Debug, Default)]
pub(crate) struct RingViews(Mutex<BTreeMap<u16, RingView>>);

impl RingViews {
    pub(super) fn started(&self, index: u16, setup: &RingSetup, enabled: bool) {
        let packed = setup.layout == Layout::Packed;
        self.locked().insert(index, RingView { index, size: setup.size, packed, enabled });
    }

    pub(super) fn enabled(&self, index: u16, enabled: bool) {
        if let Some(view) = self.locked().get_mut(&index) {
            view.enabled = enabled;
        }
    }

    pub(super) fn stopped(&self, index: u16) {
        self.locked().remove(&index);
    }

    pub(super) fn all_stopped(&self) {
        self.locked().clear();
    }

    /// All of them, in order.
    pub(super) fn list(&self) -> Vec<RingView> {
        self.locked().values().copied().collect()
    }

    fn locked(&self) -> MutexGuard<'_, BTreeMap<u16, RingView>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::VhostPort;
    use crate::events::Events;

    #[test]
    fn the_rings_of_a_port_are_listed_while_a_worker_holds_them() {
        let port = VhostPort::new(0, "vnf1", 1, Events::channel(1).0);
        let receive = port.tx[0].ring.try_claim();
        let transmit = port.rx[0].state.try_claim();
        assert!(receive.is_some() && transmit.is_some());
        let (said, heard) = std::sync::mpsc::channel();
        let looking = port.clone();
        std::thread::spawn(move || said.send(looking.rings()));
        let rings =
            heard.recv_timeout(Duration::from_secs(60)).expect("an answer although the rings are held");
        assert!(rings.is_empty());
    }
}
