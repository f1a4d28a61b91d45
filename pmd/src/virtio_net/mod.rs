#![doc = include_str!("README.md")]

mod control;
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

use virtio::device::Direction;
use virtio::features;

use crate::access::{NarrowBar, PciDevice, Reading, WaitError};
use crate::dma::{Arena, Block, Pool};
use crate::nic::selftest::{Found, SelfTest};
use crate::nic::{DeviceError, Filter, Link, Mac, Nic, Opened, Options, check_device};
use control::{Control, MOST_ADDRESSES, Order};
use core::{Core, NewRing};
use pci::{Registers, status};
use transmit::{HEADER_STRIDE, Use};

pub use receive::Receive;
pub use transmit::Transmit;

const NAME: &str = "a modern virtio network device";

/// Network device of the 1.x specification (virtio 1.3, section 4.1.2: 0x1040 + 1), and a transitional one.
const IDS: &[u32] = &[0x1041_1af4, 0x1000_1af4];

/// Features that are used where they are offered. None of segmentation: the frames of a switch that need it are cut before. Not the
/// filter of VLANs: a device without it takes frames of all, as every other card here.
const WANTED: u64 = features::VERSION_1
    | features::NET_MAC
    | features::NET_STATUS
    | features::NET_CSUM
    | features::NET_GUEST_CSUM
    | features::NET_MRG_RXBUF
    | features::NET_CTRL_VQ
    | OF_CONTROL
    | features::RING_INDIRECT_DESC
    | features::RING_PACKED
    | features::RING_EVENT_IDX
    | features::ACCESS_PLATFORM
    | features::ORDER_PLATFORM;

/// Those of them that need the control queue (section 5.1.3.1).
const OF_CONTROL: u64 =
    features::NET_CTRL_RX | features::NET_CTRL_RX_EXTRA | features::NET_CTRL_MAC_ADDR | features::NET_MQ;

/// Most queue pairs that are counted with, whatever a device says: its queues have numbers of 16 bits.
const MOST_PAIRS: u16 = 0x7fff;

/// A virtio-net device on PCI.
pub struct VirtioNet<D: PciDevice<Bar: NarrowBar>> {
    core: Arc<Core<D>>,
    negotiated: u64,
    control: Option<Control>,
    mac: Mac,
}

/// Features that both sides have, of those that are used with so many queue pairs.
fn common(offered: u64, pairs: u16) -> u64 {
    let mut both = offered & WANTED;
    if both & features::NET_CTRL_VQ == 0 {
        both &= !OF_CONTROL;
    }
    if pairs == 1 {
        both &= !features::NET_MQ;
    }
    both
}

impl<D: PciDevice<Bar: NarrowBar>> VirtioNet<D> {
    /// Features that both sides agreed on.
    pub fn features(&self) -> u64 {
        self.negotiated
    }

    fn has(&self, feature: u64) -> bool {
        self.negotiated & feature != 0
    }

    /// Gives the device an order.
    fn order(&mut self, order: &Order<'_>) -> Result<(), DeviceError> {
        match &mut self.control {
            Some(control) => control.order(&self.core, order),
            None => Err(DeviceError::Unsupported { card: NAME, what: "orders: it has no control queue" }),
        }
    }
}

/// Reset, features (virtio 1.3, section 3.1.1, steps 1 to 6).
fn negotiate<D: PciDevice<Bar: NarrowBar>>(core: &Core<D>, options: &Options) -> Result<u64, DeviceError> {
    let registers = &core.registers;
    registers.set_status(status::ACKNOWLEDGE);
    registers.set_status(status::ACKNOWLEDGE | status::DRIVER);
    let negotiated = common(registers.offered(), options.queues);
    if negotiated & features::VERSION_1 == 0 {
        return Err(DeviceError::Legacy);
    }
    if options.longest() > receive::ROOM && negotiated & features::NET_MRG_RXBUF == 0 {
        let what = "an MTU of more than a buffer, without mergeable buffers";
        return Err(DeviceError::Unsupported { card: NAME, what });
    }
    registers.accept(negotiated);
    registers.set_status(READY);
    if registers.status() & status::FEATURES_OK == 0 {
        return Err(DeviceError::Features(negotiated));
    }
    Ok(negotiated)
}

/// The status of a device whose features are agreed on.
const READY: u8 = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;

/// Sets a queue pair up, with nothing in it.
fn pair<D: PciDevice<Bar: NarrowBar>>(
    core: &Arc<Core<D>>,
    arena: &Arc<Arena>,
    options: &Options,
    negotiated: u64,
    pair: u16,
) -> Result<(Receive<D>, Transmit<D>), DeviceError> {
    let registers = &core.registers;
    let has = |bit: u64| negotiated & bit != 0;
    // A ring is as long as the device allows, and no longer than asked for.
    let size = |queue: u16, wanted: u32| match registers.queue_size(queue) {
        0 => Err(DeviceError::NoQueue(queue)),
        most => Ok(1 << u32::from(most).min(wanted).ilog2()),
    };
    let (receive_number, transmit_number) = (2 * pair, 2 * pair + 1);
    let receive_size = size(receive_number, options.receive_ring)?;
    let transmit_size: u16 = size(transmit_number, options.transmit_ring)?;
    let receive_pool = Pool::new(arena, u32::from(receive_size) + options.spare)?;
    let transmit_pool = Pool::new(arena, options.transmit_ring)?;
    let receive = NewRing::new(arena, negotiated, Direction::Write, receive_size)?;
    let transmit = NewRing::new(arena, negotiated, Direction::Read, transmit_size)?;
    let headers = Block::new(arena, HEADER_STRIDE * usize::from(transmit_size))?;
    let max = options.longest();
    let started = registers.start_queue(receive_number, receive.size, receive.areas, Some(pair));
    let mergeable = has(features::NET_MRG_RXBUF);
    let receive =
        Receive::new(core.clone(), receive.ring, (receive_number, started), mergeable, max, receive_pool);
    let started = registers.start_queue(transmit_number, transmit.size, transmit.areas, None);
    let how = Use {
        number: transmit_number,
        doorbell: started.doorbell,
        indirect: has(features::RING_INDIRECT_DESC),
        finishes: has(features::NET_CSUM),
        max,
        most: options.transmit_ring,
    };
    Ok((receive, Transmit::new(core.clone(), transmit.ring, headers, how, transmit_pool)))
}

impl<D: PciDevice<Bar: NarrowBar>> Nic for VirtioNet<D> {
    type Device = D;
    type Receive = Receive<D>;
    type Transmit = Transmit<D>;

    const NAME: &'static str = NAME;
    const IDS: &'static [u32] = IDS;
    /// The device may have fewer, and is used with those.
    const QUEUES: u16 = 16;
    const RECEIVE_ERRORS: [&'static str; 8] = [""; 8];

    /// The order of virtio 1.3, section 3.1.1; then what is asked of the control queue.
    fn open(device: Arc<D>, arena: &Arc<Arena>, options: Options) -> Result<Opened<Self>, DeviceError> {
        options.check(NAME, Self::QUEUES, 9000)?;
        if options.strip_tags {
            return Err(DeviceError::Unsupported { card: NAME, what: "taking VLAN tags off (strip_tags)" });
        }
        check_device(&*device, arena, NAME, IDS)?;
        let core = Arc::new(Core::take(device)?);
        let registers = &core.registers;
        let negotiated = negotiate(&core, &options)?;
        let has = |bit: u64| negotiated & bit != 0;
        // Section 5.1.4: max_virtqueue_pairs.
        let there = if has(features::NET_MQ) { registers.device16(8).clamp(1, MOST_PAIRS) } else { 1 };
        let pairs = options.queues.min(there);
        if pairs < options.queues {
            tracing::warn!(
                "virtio-net: {} queue pairs were wanted, and the device has {there}{}; it is used with {pairs}",
                options.queues,
                if has(features::NET_MQ) { "" } else { ", as it offers no VIRTIO_NET_F_MQ (QEMU: mq=on)" },
            );
        }
        let (mut receive, mut transmit) = (Vec::new(), Vec::new());
        for number in 0..pairs {
            let (receives, transmits) = pair(&core, arena, &options, negotiated, number)?;
            receive.push(receives);
            transmit.push(transmits);
        }
        // Behind all pairs that the device has (section 5.1.2).
        let control = has(features::NET_CTRL_VQ).then(|| Control::new(&core, arena, negotiated, 2 * there));
        let control = control.transpose()?;
        core.let_loose();
        registers.set_status(READY | status::DRIVER_OK);
        receive.iter_mut().for_each(Receive::refill);
        // Section 5.1.4: the address, if it has one; else one that is local to this machine.
        let mut mac = [0x02, 0, 0, 0, 0, 1];
        if has(features::NET_MAC) {
            for (offset, byte) in (0..).zip(&mut mac) {
                *byte = registers.device8(offset);
            }
        }
        let mut nic = Self { core, negotiated, control, mac };
        if pairs > 1 {
            nic.order(&Order::Pairs(pairs))?;
        }
        match nic.set_filter(&Filter { promiscuous: options.promiscuous, ..Filter::default() }) {
            // What it takes then is its owner's to say; the port works.
            Err(refused @ DeviceError::NotDone { .. }) => tracing::warn!("virtio-net: {refused}"),
            other => other?,
        }
        nic.link()?;
        Ok(Opened { nic, receive, transmit })
    }

    fn mac(&self) -> Mac {
        self.mac
    }

    fn set_mac(&mut self, mac: Mac) -> Result<(), DeviceError> {
        if !self.has(features::NET_CTRL_MAC_ADDR) {
            let what = "another address: it does not offer that (VIRTIO_NET_F_CTRL_MAC_ADDR)";
            return Err(DeviceError::Unsupported { card: NAME, what });
        }
        self.order(&Order::OwnAddress(mac))?;
        self.mac = mac;
        Ok(())
    }

    /// A device that cannot be told sends everything that reaches it (section 5.1.6.5.1).
    fn set_filter(&mut self, filter: &Filter) -> Result<(), DeviceError> {
        if !self.has(features::NET_CTRL_RX) {
            return Ok(());
        }
        let too_many = filter.unicast.len() > MOST_ADDRESSES;
        let finer = self.has(features::NET_CTRL_RX_EXTRA);
        let all_groups = filter.all_multicast || filter.multicast.len() > MOST_ADDRESSES;
        self.order(&Order::Promiscuous(filter.promiscuous || too_many && !finer))?;
        if finer {
            self.order(&Order::AllAddresses(too_many))?;
        }
        self.order(&Order::AllGroups(all_groups))?;
        self.order(&Order::Addresses(&filter.unicast, &filter.multicast))
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
