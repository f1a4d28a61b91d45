#![doc = include_str!("README.md")]

mod core;
mod pci;
mod receive;
#[cfg(test)]
mod standin;
#[cfg(test)]
mod tests;
mod transmit;

use std::sync::Arc;
use std::time::Duration;

use virtio::device::{Direction, Layout};
use virtio::features;

use crate::access::{NarrowBar, PciDevice, Reading, WaitError};
use crate::dma::{Arena, Block, Pool};
use crate::nic::selftest::{Found, SelfTest};
use crate::nic::{DeviceError, Filter, Link, Mac, Nic, Opened, Options, check_device};
use core::{Core, RingMemory};
use pci::{Registers, status};
use transmit::{HEADER_STRIDE, Use};

pub use receive::Receive;
pub use transmit::Transmit;

const NAME: &str = "a modern virtio network device";

/// Network device of the 1.x specification (virtio 1.3, section 4.1.2: 0x1040 + 1), and a transitional one.
const IDS: &[u32] = &[0x1041_1af4, 0x1000_1af4];

/// Features that are used where they are offered. None of segmentation: the frames of a switch that need it are cut before.
const WANTED: u64 = features::VERSION_1
    | features::NET_MAC
    | features::NET_STATUS
    | features::NET_CSUM
    | features::NET_GUEST_CSUM
    | features::NET_MRG_RXBUF
    | features::RING_INDIRECT_DESC
    | features::RING_PACKED
    | features::RING_EVENT_IDX
    | features::ACCESS_PLATFORM
    | features::ORDER_PLATFORM;

/// A virtio-net device on PCI.
pub struct VirtioNet<D: PciDevice<Bar: NarrowBar>> {
    core: Arc<Core<D>>,
    negotiated: u64,
    mac: Mac,
}

impl<D: PciDevice<Bar: NarrowBar>> VirtioNet<D> {
    /// Features that both sides agreed on.
    pub fn features(&self) -> u64 {
        self.negotiated
    }
}

impl<D: PciDevice<Bar: NarrowBar>> Nic for VirtioNet<D> {
    type Device = D;
    type Receive = Receive<D>;
    type Transmit = Transmit<D>;

    const NAME: &'static str = NAME;
    const IDS: &'static [u32] = IDS;
    /// Of those that the device has: more need its control queue.
    const QUEUES: u16 = 1;
    const RECEIVE_ERRORS: [&'static str; 8] = [""; 8];

    /// The order of virtio 1.3, section 3.1.1.
    fn open(device: Arc<D>, arena: &Arc<Arena>, options: Options) -> Result<Opened<Self>, DeviceError> {
        options.check(NAME, Self::QUEUES, 9000)?;
        if options.strip_tags {
            return Err(DeviceError::Unsupported { card: NAME, what: "taking VLAN tags off (strip_tags)" });
        }
        check_device(&*device, arena, NAME, IDS)?;
        let core = Arc::new(Core::take(device)?);
        let registers = &core.registers;
        registers.set_status(status::ACKNOWLEDGE);
        registers.set_status(status::ACKNOWLEDGE | status::DRIVER);
        let negotiated = registers.offered() & WANTED;
        if negotiated & features::VERSION_1 == 0 {
            return Err(DeviceError::Legacy);
        }
        if options.longest() > receive::ROOM && negotiated & features::NET_MRG_RXBUF == 0 {
            let what = "an MTU of more than a buffer, without mergeable buffers";
            return Err(DeviceError::Unsupported { card: NAME, what });
        }
        registers.accept(negotiated);
        let ready = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        registers.set_status(ready);
        if registers.status() & status::FEATURES_OK == 0 {
            return Err(DeviceError::Features(negotiated));
        }
        let layout = if negotiated & features::RING_PACKED != 0 { Layout::Packed } else { Layout::Split };
        // A ring is as long as the device allows, and no longer than asked for.
        let size = |queue: u16, wanted: u32| match registers.queue_size(queue) {
            0 => Err(DeviceError::NoQueue(queue)),
            most => Ok(1 << u32::from(most).min(wanted).ilog2()),
        };
        let (receive_size, transmit_size) = (size(0, options.receive_ring)?, size(1, options.transmit_ring)?);
        let receive_pool = Pool::new(arena, u32::from(receive_size) + options.spare)?;
        let transmit_pool = Pool::new(arena, options.transmit_ring)?;
        let receive_memory = RingMemory::new(arena, layout, receive_size)?;
        let transmit_memory = RingMemory::new(arena, layout, transmit_size)?;
        let headers = Block::new(arena, HEADER_STRIDE * usize::from(transmit_size))?;
        let receive_ring = receive_memory.ring(Direction::Write, negotiated)?;
        let transmit_ring = transmit_memory.ring(Direction::Read, negotiated)?;
        let started = (
            registers.start_queue(0, receive_size, receive_memory.areas(), Some(0)),
            registers.start_queue(1, transmit_size, transmit_memory.areas(), None),
        );
        core.let_loose();
        registers.set_status(ready | status::DRIVER_OK);

        let max = options.longest();
        let has = |bit: u64| negotiated & bit != 0;
        let mut receive = Receive::new(
            core.clone(),
            receive_ring,
            (0, started.0),
            has(features::NET_MRG_RXBUF),
            max,
            receive_pool,
        );
        receive.refill();
        let how = Use {
            number: 1,
            doorbell: started.1.doorbell,
            indirect: has(features::RING_INDIRECT_DESC),
            finishes: has(features::NET_CSUM),
            max,
            most: options.transmit_ring,
        };
        let transmit = Transmit::new(core.clone(), transmit_ring, headers, how, transmit_pool);
        // Section 5.1.4: the address, if it has one; else one that is local to this machine.
        let mut mac = [0x02, 0, 0, 0, 0, 1];
        if has(features::NET_MAC) {
            for (offset, byte) in (0..).zip(&mut mac) {
                *byte = registers.device8(offset);
            }
        }
        let mut nic = Self { core, negotiated, mac };
        nic.link()?;
        Ok(Opened { nic, receive: vec![receive], transmit: vec![transmit] })
    }

    fn mac(&self) -> Mac {
        self.mac
    }

    fn set_mac(&mut self, _: Mac) -> Result<(), DeviceError> {
        Err(DeviceError::Unsupported { card: NAME, what: "another address (its control queue is not used)" })
    }

    /// A device whose control queue is not used sends everything that reaches it (section 5.1.6.5.1).
    fn set_filter(&mut self, _: &Filter) -> Result<(), DeviceError> {
        Ok(())
    }

    fn link(&mut self) -> Result<Link, DeviceError> {
        match self.core.look(self.negotiated & features::NET_STATUS != 0) {
            Ok(up) => Ok(Link { up, speed: 0, full_duplex: true }),
            Err(e) => {
                self.core.stop();
                Err(e)
            }
        }
    }

    fn wait_for_link(&mut self, limit: Duration) -> Result<Link, DeviceError> {
        let step = Duration::from_millis(1);
        let mut waited = Duration::ZERO;
        loop {
            let link = self.link()?;
            if link.up {
                return Ok(link);
            }
            if waited >= limit {
                let register = "status.LINK_UP".to_owned();
                return Err(WaitError::Timeout { register, wanted: 1, got: 0, waited }.into());
            }
            self.core.registers.pause(step);
            waited += step;
        }
    }

    /// The device has none.
    fn statistics(&mut self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }

    fn stop(&mut self) {
        self.core.stop();
    }

    fn registers(device: &D) -> Result<Vec<Reading>, DeviceError> {
        Ok(Registers::find(device)?.look())
    }
}

impl<D: PciDevice<Bar: NarrowBar>> SelfTest for VirtioNet<D> {
    /// None of its registers holds just anything.
    fn try_registers(_: &D) -> Found {
        Ok(None)
    }
}

impl<D: PciDevice<Bar: NarrowBar>> Drop for VirtioNet<D> {
    fn drop(&mut self) {
        self.core.stop();
    }
}
