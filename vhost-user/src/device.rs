//! What a back-end session drives.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtio::device::{RingError, RingSetup};
use virtio::memory::{DirtyLog, GuestMemory};

/// A ring that is complete: everything the front end said about it, checked and translated.
pub struct QueueStart {
    /// What the ring itself needs.
    pub ring: RingSetup,
    /// Signals the driver (an eventfd, or none: the driver polls).
    pub call: Option<OwnedFd>,
    /// The driver signals us (an eventfd, or none: we must poll).
    pub kick: Option<OwnedFd>,
    /// Tells the front end that the ring broke (an eventfd).
    pub err: Option<OwnedFd>,
    /// Whether the ring is enabled (VHOST_USER_SET_VRING_ENABLE).
    pub enabled: bool,
}

/// The device behind a back-end session: a port of a switch.
///
/// A session is one thread; all calls come from it, in order. Queue indices are virtqueue indices: 2n is the guest's
/// receive ring n, 2n+1 its transmit ring n. When a call that takes something away returns ([`Device::stop_queue`],
/// [`Device::memory`], [`Device::disconnected`]), no thread touches it any more.
pub trait Device: Send {
    /// Virtio features on offer (masks of [`virtio::features`]; the session adds VHOST_USER_PROTOCOL_FEATURES and LOG_ALL).
    fn features(&self) -> u64;

    /// Largest number of queue pairs.
    fn max_queue_pairs(&self) -> u16;

    /// A front end is connected.
    fn connected(&mut self);

    /// The front end acknowledged these features.
    fn negotiated(&mut self, features: u64);

    /// The guest's memory was replaced (a fault handler may want to know the ranges). Rings that ran were stopped before
    /// and are started again after.
    fn memory(&mut self, memory: Option<Arc<GuestMemory>>);

    /// A ring is complete and may be processed (if enabled).
    ///
    /// # Errors
    /// The ring is impossible; the session refuses the message that completed it.
    fn start_queue(&mut self, index: u16, start: QueueStart) -> Result<(), RingError>;

    /// The ring stops. Returns where it would go on, as VHOST_USER_GET_VRING_BASE wants it, or `None` if it never ran.
    fn stop_queue(&mut self, index: u16) -> Option<u32>;

    /// VHOST_USER_SET_VRING_ENABLE for a ring that runs.
    fn enable_queue(&mut self, index: u16, enabled: bool);

    /// A new call eventfd for a ring that runs.
    fn set_call(&mut self, index: u16, call: Option<OwnedFd>);

    /// Dirty logging starts, moves or stops for a ring that runs.
    fn set_log(&mut self, index: u16, log: Option<Arc<DirtyLog>>, used: Option<u64>);

    /// The front end tells the guest's MTU (VHOST_USER_NET_SET_MTU).
    ///
    /// # Errors
    /// A sentence, if the port cannot carry it.
    fn set_mtu(&mut self, mtu: u16) -> Result<(), String>;

    /// The front end asks to announce the guest at its new place (VHOST_USER_SEND_RARP): send a RARP with this address.
    fn announce(&mut self, mac: [u8; 6]);

    /// The device status byte that the front end forwards (VHOST_USER_SET_STATUS).
    fn set_status(&mut self, status: u8);

    /// A message was refused, or a ring that is complete cannot start: `what` says which and why. The session goes on, or
    /// [`Device::disconnected`] follows.
    fn refused(&mut self, _what: &str) {}

    /// The front end is gone: all rings were stopped. `reason` says how the session ended.
    fn disconnected(&mut self, reason: &str);
}
