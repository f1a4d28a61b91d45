//! A network card whose data path is a vhost-user back end: a switch, ours or anybody's.
//!
//! Owns what the guest's driver sees: features, address, link, MTU. The conversation with the back end has a thread of its own
//! ([`session`]), so that one that answers late or never holds no vCPU; frames pass neither.

mod session;
pub(crate) mod tap;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use crossbeam::channel::{Sender, unbounded};
use nix::sys::eventfd::{EfdFlags, EventFd};
use virtio::features;

use crate::config::{NetConfig, VhostUserConfig};
use crate::memory::GuestMemory;
use crate::virtio_pci::{Activation, VirtioDevice};
use session::{Command, Session};

/// virtio's number of a network card (virtio 1.3, 5.1), and PCI's class of one.
const KIND: (u16, u16) = (1, 0x0200);
/// Receive and transmit queue.
const QUEUES: usize = 2;

/// What is the back end's to offer and passes through to the driver. What needs a control queue is not among it.
const OF_BACK_END: u64 = features::NET_CSUM
    | features::NET_GUEST_CSUM
    | features::NET_GUEST_TSO4
    | features::NET_GUEST_TSO6
    | features::NET_GUEST_ECN
    | features::NET_GUEST_UFO
    | features::NET_HOST_TSO4
    | features::NET_HOST_TSO6
    | features::NET_HOST_ECN
    | features::NET_HOST_UFO
    | features::NET_MRG_RXBUF
    | features::NET_GUEST_USO4
    | features::NET_GUEST_USO6
    | features::NET_HOST_USO
    | features::RING_INDIRECT_DESC
    | features::RING_EVENT_IDX
    | features::VERSION_1
    | features::IN_ORDER;

/// Configuration (5.1.4): where the link status, the number of pairs and the MTU are.
const LINK_UP: u16 = 1;

/// Why a card cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The socket to listen on.
    #[error("`net`: {0}")]
    Socket(#[from] vhost_user::frontend::FrontEndError),
    /// A tap.
    #[error("`net`: {doing} of the tap {name}: {source}{hint}")]
    Tap {
        /// Which.
        name: String,
        /// What was refused.
        doing: &'static str,
        /// Why.
        source: std::io::Error,
        /// What may help.
        hint: &'static str,
    },
    /// No more descriptors or threads.
    #[error("`net`: {0}")]
    System(#[from] std::io::Error),
}

/// A card's configuration, whatever is behind it: address, link status, pairs of queues, MTU.
fn configuration(mac: [u8; 6], mtu: Option<u16>) -> Vec<u8> {
    let mut config = mac.to_vec();
    config.extend(LINK_UP.to_le_bytes());
    config.extend(1_u16.to_le_bytes());
    config.extend(mtu.unwrap_or(0).to_le_bytes());
    config
}

/// The card.
pub(crate) struct Net {
    offered: u64,
    mac: [u8; 6],
    mtu: Option<u16>,
    queue_size: u16,
    commands: Sender<Command>,
    wake: Arc<EventFd>,
    idle: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Net {
    /// Meets the back end and makes a card that offers what it offers.
    ///
    /// # Errors
    /// The socket cannot be listened on.
    pub(crate) fn new(
        config: &NetConfig,
        back: &VhostUserConfig,
        memory: Arc<GuestMemory>,
    ) -> Result<Self, NetError> {
        let packed = if back.packed { features::RING_PACKED } else { 0 };
        let wanted = OF_BACK_END | packed;
        let (commands, received) = unbounded();
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC);
        let wake = Arc::new(wake.map_err(std::io::Error::from)?);
        let idle = Arc::new(AtomicBool::new(true));
        let (mut session, theirs) =
            Session::begin(config, back, wanted, memory, received, wake.clone(), idle.clone())?;
        let mtu = if config.mtu.is_some() { features::NET_MTU } else { 0 };
        let offered = theirs & wanted | features::VERSION_1 | features::NET_MAC | features::NET_STATUS | mtu;
        let thread =
            std::thread::Builder::new().name(format!("net {}", config.name)).spawn(move || session.run())?;
        Ok(Self {
            offered,
            mac: config.mac,
            mtu: config.mtu,
            queue_size: config.queue_size,
            commands,
            wake,
            idle,
            thread: Some(thread),
        })
    }

    fn tell(&self, command: Command) {
        // Its thread only ends when this is dropped.
        let _ = self.commands.send(command);
        let _ = self.wake.write(1);
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> (u16, u16) {
        KIND
    }

    fn features(&self) -> u64 {
        self.offered
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.queue_size; QUEUES]
    }

    fn config(&self) -> Vec<u8> {
        configuration(self.mac, self.mtu)
    }

    fn activate(&mut self, activation: Activation) {
        self.idle.store(false, Ordering::Release);
        self.tell(Command::Start(activation));
    }

    fn reset(&mut self) {
        // A card that has no queues is reset already: its thread, late with this, would say so of those that it gets next.
        if !self.is_reset() {
            self.tell(Command::Stop);
        }
    }

    fn is_reset(&self) -> bool {
        self.idle.load(Ordering::Acquire)
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.tell(Command::End);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn a_card_that_was_reset_before_it_was_started_holds_its_queues_until_the_reset_after() {
        let dir = tempfile::tempdir().unwrap();
        let text = format!(
            "[vm]\nkernel = 'k'\nmemory = '4 MiB'\n[[vm.net]]\nkind = 'vhost-user'\nsocket = '{}'\nwait = false",
            dir.path().join("nobody.sock").display()
        );
        let config = Config::parse(&text, std::path::Path::new("vm.toml")).unwrap();
        let memory = Arc::new(GuestMemory::new(&config).unwrap());
        let crate::config::NetBack::VhostUser(back) = &config.net[0].back else { panic!("not a socket") };
        let mut card = Net::new(&config.net[0], back, memory).unwrap();
        // A driver resets a card that it finds (virtio 1.3, 3.1.1).
        card.reset();
        assert!(card.is_reset(), "there is nothing to let go of");
        card.activate(Activation { features: features::VERSION_1, queues: Vec::new() });
        // Longer than the thread takes to hear of both.
        for _ in 0..20 {
            std::thread::sleep(std::time::Duration::from_millis(25));
            assert!(!card.is_reset(), "nobody asked for it");
        }
        card.reset();
        let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while !card.is_reset() {
            assert!(std::time::Instant::now() < end, "it keeps its queues");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
}
