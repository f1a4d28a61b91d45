//! Stopping ports that broke, each for its reason, and nobody else's.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use virtio::device::RingError;

use super::{Attached, Behind, Housekeeper, PortState};

/// How often the log tells that a port stopped: its guest may break it again and again.
const TELL: Duration = Duration::from_secs(1);

impl Housekeeper {
    /// A guest broke a ring: its port stops, with the reason where a user sees it. Nobody else notices.
    pub(super) fn broken(&mut self, number: u16, queue: u16, reason: &str) {
        if !self.is_broken(number) {
            return;
        }
        let ring = if queue % 2 == 1 { "tx" } else { "rx" };
        self.stop_port(number, &format!("{ring} ring {}: {reason}", queue / 2));
    }

    /// A device failed: its port stops until it can be opened again.
    pub(super) fn device_gone(&mut self, number: u16, reason: &str) {
        let port = self.ports.iter().find(|p| p.port.number() == number);
        let Some(port) = port.filter(|_| self.is_broken(number)) else { return };
        let text = match &port.config.behind {
            Behind::Pcap(_) => format!("recording ended ({reason}); to go on, take the port out and reload"),
            Behind::Nic { device, .. } => format!("card {device}: {reason}"),
            other => format!("interface {} is gone or down ({reason})", other.device().unwrap_or_default()),
        };
        self.stop_port(number, &text);
    }

    /// Whether what was told of this port is still true: it may have been started anew since, or its number be another port's.
    fn is_broken(&self, number: u16) -> bool {
        let port = self.ports.iter().find(|p| p.port.number() == number);
        port.is_some_and(|p| p.port.shared().broken.load(Ordering::Acquire))
    }

    /// Stops a port, unless it was started anew meanwhile. The log has at most a line a second for each.
    pub(super) fn stop_port(&mut self, number: u16, text: &str) {
        let Some(port) = self.ports.iter_mut().find(|p| p.port.number() == number) else { return };
        if port.port.stop(text) && port.told.is_none_or(|told| told.elapsed() >= TELL) {
            port.told = Some(Instant::now());
            tracing::warn!("port {} stopped: {text}", port.config.name);
        }
        self.republish();
    }

    /// Finds what no worker told of: a guest that cut off its memory file while no frame flies, and rings that broke when more
    /// happened than the channel has room for.
    pub(super) fn find_broken(&mut self) {
        let mut found = Vec::new();
        for running in &self.ports {
            let shared = running.port.shared();
            if matches!(shared.state(), PortState::Stopped(_)) || matches!(running.port, Attached::Device(_))
            {
                continue;
            }
            if running.port.memory_gone() {
                shared.broken.store(true, Ordering::Release);
                found.push((shared.number, RingError::MemoryGone.to_string()));
            } else if shared.broken.load(Ordering::Acquire) {
                found.push((shared.number, "a ring broke".to_owned()));
            }
        }
        for (number, reason) in found {
            self.stop_port(number, &reason);
        }
    }
}
