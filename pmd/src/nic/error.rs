//! Why a device cannot be used, or not any more.

use virtio::driver::{DriverFault, SetupError};

use crate::access::{AccessError, WaitError};
use crate::dma::ArenaError;

/// What went wrong with a device.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum DeviceError {
    #[error(transparent)]
    Access(#[from] AccessError),
    #[error(transparent)]
    Wait(#[from] WaitError),
    #[error(transparent)]
    Arena(#[from] ArenaError),
    #[error("PCI device {vendor:04x}:{device:04x} is not {card}; use the driver for that device")]
    Unknown { vendor: u16, device: u16, card: &'static str },
    #[error(
        "there is no driver for PCI device {vendor:04x}:{device:04x}; docs/drivers.md lists those that there are"
    )]
    NoDriver { vendor: u16, device: u16 },
    #[error("the arena is mapped for other devices: make one with this device's IOVA space")]
    OtherSpace,
    #[error("a ring of {0} descriptors: give a power of two, 64 to 4096")]
    RingSize(u32),
    #[error("{wanted} queue pairs: {card} has 1 to {most}")]
    Queues { card: &'static str, wanted: u16, most: u16 },
    #[error("an MTU of {wanted}: {card} has 68 to {most}")]
    Mtu { card: &'static str, wanted: u32, most: u32 },
    #[error("{card} cannot do this: {what}")]
    Unsupported { card: &'static str, what: &'static str },
    #[error("the virtio device speaks no version 1; give it a modern interface (QEMU: disable-modern=off)")]
    Legacy,
    #[error("the virtio device does not accept the features {0:#x}, which it offered")]
    Features(u64),
    #[error("the virtio device has no queue {0}")]
    NoQueue(u16),
    #[error(
        "the virtio device does not carry out {order}: its control queue answers {answer:#x}, not 0x0 (VIRTIO_NET_OK)"
    )]
    NotDone { order: &'static str, answer: u8 },
    #[error("the virtio device asks for a reset (DEVICE_NEEDS_RESET), and was stopped; open it again")]
    NeedsReset,
    #[error("cannot set up a ring: {0}")]
    RingSetup(#[from] SetupError),
    #[error("the ring is broken, and the device was stopped: {0}")]
    Ring(DriverFault),
    #[error("the device is gone: its registers read all ones (removed, or powered down)")]
    Gone,
    #[error(
        "receive descriptor {descriptor}: {what}; the device does not keep to its datasheet, and was stopped"
    )]
    Broken { descriptor: u32, what: String },
    #[error("the adapter of this virtual function refuses {0}")]
    Refused(&'static str),
    #[error("the card has another number of virtual functions than when it was opened; open it again")]
    OtherFunctions,
    #[error(
        "{0}; nobody drives the adapter of this virtual function: start its port (or with the kernel: ip link set dev … up)"
    )]
    NoAdapter(WaitError),
    #[error("the adapter of this virtual function was reset, or has changed what it may; open it again")]
    Revoked,
    #[error("the port is down: {0}")]
    Down(String),
}
