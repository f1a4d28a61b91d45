//! What the drivers of all network cards have in common, for whoever uses one without knowing which.
//!
//! Owns the contract ([`Nic`] and its queues), the options, the words for addresses, links and errors, and the state that a
//! card's handle shares with its queues. Knows no device.

mod any;
mod copy;
mod counters;
mod error;
pub mod selftest;
mod single;
mod state;

use std::sync::Arc;
use std::time::Duration;

use port::{RxQueue, TxQueue};

pub use any::{AnyNic, AnyReceive, AnyTransmit, OpenedAny, driver_for, open, registers, self_test};
pub(crate) use copy::{MOST_BUFFERS, Plan, Writer, pieces};
pub use counters::{Counter, Drops, ReceiveCounters, TransmitCounters};
pub use error::DeviceError;
pub use single::Single;
pub(crate) use state::State;

use crate::access::{PciDevice, Reading};
use crate::dma::Arena;

/// Shortest frame that is taken: an Ethernet header.
pub(crate) const MIN_FRAME: u32 = 14;

/// Bytes that a frame may be longer than the IP packet in it: an Ethernet header and a VLAN tag.
pub(crate) const AROUND: u32 = 18;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// How a card is used.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Pairs of a receive and a transmit queue, 1 to what such a card can have ([`Nic::QUEUES`]). Received frames are spread over them
    /// by a hash of their addresses and ports, so that those of one flow stay in order.
    pub queues: u16,
    /// Descriptors of each receive ring: a power of two, 64 to 4,096.
    pub receive_ring: u32,
    /// Descriptors of each transmit ring: as above.
    pub transmit_ring: u32,
    /// Receive buffers of each queue beyond one for each descriptor: as many frames may be under way in other cards' transmit
    /// rings before this ring runs short.
    pub spare: u32,
    /// Longest IP packet in bytes, 68 to what the card can. Frames may be 18 longer: an Ethernet header and a VLAN tag.
    pub mtu: u32,
    /// Take VLAN tags off received frames ([`ReceiveQueue::tag`]). The device then also inserts tags ([`port::TagEdit::Push`]);
    /// else they are inserted as the frame is copied.
    pub strip_tags: bool,
    /// Which frames are received.
    pub promiscuous: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            queues: 1,
            receive_ring: 512,
            transmit_ring: 512,
            spare: 512,
            mtu: 1500,
            strip_tags: false,
            promiscuous: true,
        }
    }
}

impl Options {
    /// Whether a card with so many queue pairs and such an MTU can be used like this.
    pub(crate) fn check(&self, card: &'static str, queues: u16, mtu: u32) -> Result<(), DeviceError> {
        if !(1..=queues).contains(&self.queues) {
            return Err(DeviceError::Queues { card, wanted: self.queues, most: queues });
        }
        for size in [self.receive_ring, self.transmit_ring] {
            if !size.is_power_of_two() || !(64..=4096).contains(&size) {
                return Err(DeviceError::RingSize(size));
            }
        }
        if !(68..=mtu).contains(&self.mtu) {
            return Err(DeviceError::Mtu { card, wanted: self.mtu, most: mtu });
        }
        Ok(())
    }

    /// The longest frame in bytes, without FCS.
    pub(crate) fn longest(&self) -> u32 {
        self.mtu + AROUND
    }
}

/// The state of the cable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Whether there is a link.
    pub up: bool,
    /// Mbit/s; 0 where the card does not know.
    pub speed: u32,
    /// Both ways at once.
    pub full_duplex: bool,
}

/// Which frames are taken, besides broadcasts and those to the device's own address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Every frame.
    pub promiscuous: bool,
    /// Every multicast frame.
    pub all_multicast: bool,
    /// Further addresses. More than the card compares with make it take all.
    pub unicast: Vec<Mac>,
    /// Groups. Cards compare hashes: others with the same hash are taken too.
    pub multicast: Vec<Mac>,
}

/// The receive side of a card's queue pair. One thread polls it at a time.
pub trait ReceiveQueue: RxQueue + Send + 'static {
    /// What it counts.
    fn counters(&self) -> Arc<ReceiveCounters>;

    /// The VLAN tag that the device took off frame `i` of the burst polled last, where it does that.
    fn tag(&self, i: usize) -> Option<u16>;

    /// The device's interrupt that tells of frames in this queue: a number in its table of MSI-X vectors. None if there is none,
    /// and the queue can only be polled.
    fn vector(&self) -> Option<u16>;

    /// For who polls and is about to sleep: [`ReceiveQueue::vector`] tells of the next frame. True if frames wait already, or no
    /// interrupt would come; then nothing was changed, and who sleeps now may sleep for long.
    fn arm(&mut self) -> bool;

    /// For who has slept: no more interrupts. One may still be on its way.
    fn disarm(&mut self);
}

/// The transmit side of a card's queue pair. One thread uses it at a time.
pub trait TransmitQueue: TxQueue + Send + 'static {
    /// What it counts.
    fn counters(&self) -> Arc<TransmitCounters>;
}

/// A card as its driver opened it. Its queues live apart from it, each on the thread that polls it; the device stops when any of
/// them goes, or the card itself.
pub struct Opened<N: Nic> {
    /// For housekeeping.
    pub nic: N,
    /// As many as [`Options::queues`], or as the device has, where that is fewer and is a matter of who made the device
    /// (virtio-net); the log says so then.
    pub receive: Vec<N::Receive>,
    /// As many.
    pub transmit: Vec<N::Transmit>,
}

/// A network card and its driver: what housekeeping does with it. All of it reads or writes registers, and none of it is for a
/// thread that polls.
pub trait Nic: Sized + Send + 'static {
    /// How the device is reached.
    type Device: PciDevice;
    /// Its receive queues.
    type Receive: ReceiveQueue;
    /// Its transmit queues.
    type Transmit: TransmitQueue;

    /// What the card is called.
    const NAME: &'static str;
    /// The PCI functions that this driver is for: vendor in the low half, device in the high half, as at
    /// [`crate::access::config::ID`].
    const IDS: &'static [u32];
    /// Most queue pairs.
    const QUEUES: u16;
    /// The names of [`ReceiveCounters::errors`]; an empty one is reserved.
    const RECEIVE_ERRORS: [&'static str; 8];

    /// Takes `device` and starts it, with rings and buffers in `arena`.
    ///
    /// # Errors
    /// See [`DeviceError`]. The device is stopped then.
    fn open(
        device: Arc<Self::Device>,
        arena: &Arc<Arena>,
        options: Options,
    ) -> Result<Opened<Self>, DeviceError>;

    /// The address that the device has: its own, until it is set.
    fn mac(&self) -> Mac;

    /// Changes the device's own address.
    ///
    /// # Errors
    /// The device, or who administers it, does not allow that.
    fn set_mac(&mut self, mac: Mac) -> Result<(), DeviceError>;

    /// Changes which frames are taken.
    ///
    /// # Errors
    /// The device, or who administers it, does not allow that.
    fn set_filter(&mut self, filter: &Filter) -> Result<(), DeviceError>;

    /// The state of the cable, and whether the device is there at all. For housekeeping, ten times a second or so: it is what
    /// tells the queues that the link went.
    ///
    /// # Errors
    /// [`DeviceError::Down`]: why nothing moves any more. The device is stopped then; close it.
    fn link(&mut self) -> Result<Link, DeviceError>;

    /// Waits for a link, at most `limit`.
    ///
    /// # Errors
    /// There is none by then, or the device is gone.
    fn wait_for_link(&mut self, limit: Duration) -> Result<Link, DeviceError>;

    /// The hardware's counters since it was opened, by name.
    fn statistics(&mut self) -> Vec<(&'static str, u64)>;

    /// Stops the device: frames in its rings are lost, and their buffers go home when the queues are dropped.
    fn stop(&mut self);

    /// What the registers read that the driver uses and that reading does not change. At any time, for who looks at a card.
    ///
    /// # Errors
    /// The device has no such registers.
    fn registers(device: &Self::Device) -> Result<Vec<Reading>, DeviceError>;
}

/// Whether `device` is one of `ids`, and finds its memory where `arena` is mapped.
pub(crate) fn check_device<D: PciDevice>(
    device: &D,
    arena: &Arena,
    card: &'static str,
    ids: &[u32],
) -> Result<(), DeviceError> {
    let id = device.config_read(crate::access::config::ID);
    if id == crate::access::GONE {
        return Err(DeviceError::Gone);
    }
    if !ids.contains(&id) {
        return Err(DeviceError::Unknown { vendor: id as u16, device: (id >> 16) as u16, card });
    }
    if !std::ptr::addr_eq(Arc::as_ptr(arena.space()), Arc::as_ptr(&device.iova_space())) {
        return Err(DeviceError::OtherSpace);
    }
    Ok(())
}
