#![doc = include_str!("README.md")]

mod counters;
mod descriptors;
mod device;
mod error;
mod filter;
mod receive;
mod regs;
#[cfg(test)]
mod standin;
mod statistics;
#[cfg(test)]
mod tests;
mod transmit;

use std::sync::Arc;
use std::time::Duration;

pub use counters::{Counter, Drops, RECEIVE_ERRORS, ReceiveCounters, TransmitCounters};
pub use error::DeviceError;
pub use filter::{Filter, Mac};
pub use receive::Receive;
pub use statistics::Statistics;
pub use transmit::Transmit;

use crate::access::PciDevice;
use crate::dma::{Arena, Pool};
use device::Core;
use regs::{RAH, RAL, STATUS};

/// The queue that is used, of the device's two.
const QUEUE: u32 = 0;

/// Shortest frame that is taken: an Ethernet header.
const MIN_FRAME: u32 = 14;

/// Descriptors that a frame may have: 16 KiB, which is what the device can store (datasheet 10.2.5.1, LPE).
const MAX_DESCRIPTORS: u32 = 8;

/// How a device is used.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Descriptors of the receive ring: a power of two, 64 to 4,096.
    pub receive_ring: u32,
    /// Descriptors of the transmit ring: as above.
    pub transmit_ring: u32,
    /// Receive buffers beyond one for each descriptor: as many frames may be under way in other cards' transmit rings before
    /// this ring runs short.
    pub spare: u32,
    /// Longest IP packet, 68 to 9,000 bytes. Frames may be 18 longer: an Ethernet header and a VLAN tag.
    pub mtu: u32,
    /// Take VLAN tags off received frames ([`Receive::tag`]). The device then also inserts tags ([`port::TagEdit::Push`]);
    /// else they are inserted as the frame is copied.
    pub strip_tags: bool,
    /// Which frames are received.
    pub promiscuous: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            receive_ring: 512,
            transmit_ring: 512,
            spare: 512,
            mtu: 1500,
            strip_tags: false,
            promiscuous: true,
        }
    }
}

/// Bytes of a ring of `size` descriptors.
const fn ring_bytes(size: u32) -> usize {
    size as usize * descriptors::BYTES
}

/// The state of the cable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Whether there is a link.
    pub up: bool,
    /// Mbit/s.
    pub speed: u32,
    /// Both ways at once.
    pub full_duplex: bool,
}

/// An 82574L. Its queues live apart from it, each on the thread that polls it; the device stops when any of the three goes.
pub struct E1000e<D: PciDevice> {
    core: Arc<Core<D>>,
    statistics: Statistics,
}

impl<D: PciDevice> E1000e<D> {
    /// Takes `device` and starts it, with rings and buffers in `arena`.
    ///
    /// # Errors
    /// See [`DeviceError`]. The device is stopped then.
    #[allow(clippy::type_complexity)]
    pub fn open(
        device: Arc<D>,
        arena: &Arc<Arena>,
        options: Options,
    ) -> Result<(Self, Receive<D>, Transmit<D>), DeviceError> {
        for size in [options.receive_ring, options.transmit_ring] {
            if !size.is_power_of_two() || !(64..=4096).contains(&size) {
                return Err(DeviceError::RingSize(size));
            }
        }
        if !(68..=9000).contains(&options.mtu) {
            return Err(DeviceError::Mtu(options.mtu));
        }
        let max = options.mtu + 18;
        let receive_pool = Pool::new(arena, options.receive_ring + options.spare)?;
        let transmit_pool = Pool::new(arena, options.transmit_ring)?;
        let core = Arc::new(Core::open(device, arena, &options)?);
        core.start_receive(&options, max);
        core.start_transmit(&options);
        let receive = Receive::new(core.clone(), options.receive_ring, max, receive_pool);
        let transmit = Transmit::new(core.clone(), options.transmit_ring, max, transmit_pool);
        let mut device = Self { core, statistics: Statistics::default() };
        device.set_filter(&Filter { promiscuous: options.promiscuous, ..Filter::default() });
        // What was counted before is not ours.
        device.statistics();
        device.statistics = Statistics::default();
        device.link()?;
        Ok((device, receive, transmit))
    }

    /// The address that the device has: that of its EEPROM, until it is set.
    pub fn mac(&self) -> Mac {
        let (low, high) = (self.core.regs().read(RAL(0)), self.core.regs().read(RAH(0)));
        let [a, b, c, d] = low.to_le_bytes();
        let [e, f, ..] = high.to_le_bytes();
        [a, b, c, d, e, f]
    }

    /// The state of the cable, and whether the device is there at all. For housekeeping, ten times a second or so: it is what
    /// tells the queues that the link went, and takes a register read.
    ///
    /// # Errors
    /// [`DeviceError::Down`]: why nothing moves any more. The device is stopped then; close it.
    pub fn link(&mut self) -> Result<Link, DeviceError> {
        match self.core.look() {
            Ok(status) => {
                let speed = match STATUS::SPEED.of(status) {
                    0 => 10,
                    1 => 100,
                    _ => 1000,
                };
                Ok(Link { up: STATUS::LU.are_in(status), speed, full_duplex: STATUS::FD.are_in(status) })
            }
            Err(e) => {
                self.core.stop();
                Err(e)
            }
        }
    }

    /// Waits for a link, at most `limit`.
    ///
    /// # Errors
    /// There is none by then, or the device is gone.
    pub fn wait_for_link(&mut self, limit: Duration) -> Result<Link, DeviceError> {
        self.core.regs().wait_set(STATUS, STATUS::LU, limit)?;
        self.link()
    }

    /// The hardware's counters since it was opened. Reads 16 registers.
    pub fn statistics(&mut self) -> Statistics {
        self.statistics.update(self.core.regs());
        self.statistics
    }

    /// Stops the device: frames in its rings are lost, and their buffers go home when the queues are dropped.
    pub fn stop(&mut self) {
        self.core.stop();
    }
}

impl<D: PciDevice> Drop for E1000e<D> {
    fn drop(&mut self) {
        self.core.stop();
    }
}
