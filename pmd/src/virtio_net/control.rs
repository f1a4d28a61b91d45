//! The control queue: orders to the device, one at a time, each with a bounded wait for its answer (virtio 1.3, section 5.1.6.5).
//!
//! An order is a chain of two buffers: class, command and data, which the device reads, and a byte that it answers with. It is for
//! housekeeping: who gives an order sleeps until it is answered. Knows no queue of frames.

use std::sync::Arc;
use std::time::Duration;

use virtio::device::Direction;
use virtio::driver::{DriverRing, Piece};

use super::core::{Core, NewRing};
use super::pci::{Doorbell, GONE8};
use crate::access::{NarrowBar, PciDevice, WaitError};
use crate::dma::{Arena, Block};
use crate::nic::{DeviceError, Mac};

/// The answer that an order was carried out, and what stands there before there is one. The specification has one other, 1.
const OK: u8 = 0;
const NONE: u8 = 0xff;

/// How long an answer may take. Devices that are software answer within microseconds, but a busy host may keep one from running for
/// seconds.
const LIMIT: Duration = Duration::from_secs(5);
const STEP: Duration = Duration::from_micros(100);

/// Descriptors: two for the one order under way.
const SIZE: u16 = 2;

/// Addresses of a table that the device is given at most.
pub(super) const MOST_ADDRESSES: usize = 64;

/// Where the answer lies in the memory of an order, in a cache line of its own.
const ANSWER_AT: usize = 2048;
const _: () = assert!(2 + 2 * (4 + 6 * MOST_ADDRESSES) <= ANSWER_AT, "the longest order fits");

/// Something that the device is to do.
pub(super) enum Order<'a> {
    /// Take every frame, or no longer (5.1.6.5.1).
    Promiscuous(bool),
    /// Take every frame to a group, or no longer.
    AllGroups(bool),
    /// Take every frame to a single address, or no longer.
    AllAddresses(bool),
    /// Take frames to these addresses and groups too, and to no others of before (5.1.6.5.2).
    Addresses(&'a [Mac], &'a [Mac]),
    /// Have this address.
    OwnAddress(Mac),
    /// Use so many queue pairs (5.1.6.5.5).
    Pairs(u16),
}

impl Order<'_> {
    /// As the specification calls it, without VIRTIO_NET_CTRL_.
    fn name(&self) -> &'static str {
        match self {
            Order::Promiscuous(_) => "RX_PROMISC",
            Order::AllGroups(_) => "RX_ALLMULTI",
            Order::AllAddresses(_) => "RX_ALLUNI",
            Order::Addresses(..) => "MAC_TABLE_SET",
            Order::OwnAddress(_) => "MAC_ADDR_SET",
            Order::Pairs(_) => "MQ_VQ_PAIRS_SET",
        }
    }

    /// Class, command and data.
    fn bytes(&self) -> Vec<u8> {
        let table = |macs: &[Mac]| {
            let count = macs.len().min(MOST_ADDRESSES);
            let all = macs.iter().take(count).flatten().copied();
            (count as u32).to_le_bytes().into_iter().chain(all).collect::<Vec<u8>>()
        };
        match *self {
            Order::Promiscuous(on) => vec![0, 0, on.into()],
            Order::AllGroups(on) => vec![0, 1, on.into()],
            Order::AllAddresses(on) => vec![0, 2, on.into()],
            Order::Addresses(single, groups) => [vec![1, 0], table(single), table(groups)].concat(),
            Order::OwnAddress(mac) => [&[1, 1][..], &mac].concat(),
            Order::Pairs(pairs) => [[4, 0], pairs.to_le_bytes()].concat(),
        }
    }
}

/// The control queue of a device.
pub(super) struct Control {
    ring: DriverRing,
    number: u16,
    doorbell: Doorbell,
    /// Order and answer.
    memory: Block,
    /// The order that the device has and has not answered.
    unanswered: Option<&'static str>,
}

impl Control {
    /// Sets the queue up, as number `number` of the device.
    pub(super) fn new<D: PciDevice<Bar: NarrowBar>>(
        core: &Core<D>,
        arena: &Arc<Arena>,
        negotiated: u64,
        number: u16,
    ) -> Result<Self, DeviceError> {
        if core.registers.queue_size(number) < SIZE {
            return Err(DeviceError::NoQueue(number));
        }
        let NewRing { ring, size, areas } = NewRing::new(arena, negotiated, Direction::Both, SIZE)?;
        let started = core.registers.start_queue(number, size, areas, None);
        let memory = Block::new(arena, ANSWER_AT + 1)?;
        Ok(Self { ring, number, doorbell: started.doorbell, memory, unanswered: None })
    }

    /// Gives the device an order, and waits until it is done.
    ///
    /// # Errors
    /// The device refuses it, is gone, does not answer in time, or broke the ring, which stops it.
    pub(super) fn order<D: PciDevice<Bar: NarrowBar>>(
        &mut self,
        core: &Core<D>,
        order: &Order<'_>,
    ) -> Result<(), DeviceError> {
        // An answer to the one before that is late: its memory is the device's until then.
        self.wait(core)?;
        let bytes = order.bytes();
        for (i, byte) in (0..ANSWER_AT).zip(&bytes) {
            // SAFETY: the block has more than `ANSWER_AT` bytes, and the device has no order that lies in it.
            unsafe { self.memory.ptr().add(i).write_volatile(*byte) };
        }
        // SAFETY: as above; the answer lies behind.
        unsafe { self.memory.ptr().add(ANSWER_AT).write_volatile(NONE) };
        let at = self.memory.iova();
        let pieces = [
            Piece { address: at, len: bytes.len() as u32 },
            Piece { address: at + ANSWER_AT as u64, len: 1 },
        ];
        if self.ring.offer_request(&pieces, 1, 0).is_err() {
            return Err(DeviceError::NoQueue(self.number));
        }
        self.unanswered = Some(order.name());
        if self.ring.publish() {
            core.registers.ring(&self.doorbell, self.number);
        }
        self.wait(core)?;
        match self.answer() {
            OK => Ok(()),
            answer => Err(DeviceError::NotDone { order: order.name(), answer }),
        }
    }

    fn answer(&self) -> u8 {
        // SAFETY: a byte of the block, which stays mapped; the device may write it at any time.
        unsafe { self.memory.ptr().add(ANSWER_AT).read_volatile() }
    }

    /// Waits until the device has given the order under way back, if there is one.
    fn wait<D: PciDevice<Bar: NarrowBar>>(&mut self, core: &Core<D>) -> Result<(), DeviceError> {
        let Some(order) = self.unanswered else { return Ok(()) };
        let register = || format!("answer to {order}");
        let mut waited = Duration::ZERO;
        loop {
            match self.ring.reclaim(1, |_, _| ()) {
                Ok(0) => {}
                Ok(_) => {
                    self.unanswered = None;
                    return Ok(());
                }
                Err(fault) => {
                    core.state.fail(DeviceError::Ring(fault));
                    return Err(DeviceError::Ring(fault));
                }
            }
            if core.registers.status() == GONE8 {
                return Err(WaitError::Gone { register: register() }.into());
            }
            if waited >= LIMIT {
                let (wanted, got) = (OK.into(), self.answer().into());
                return Err(WaitError::Timeout { register: register(), wanted, got, waited }.into());
            }
            core.registers.pause(STEP);
            waited += STEP;
        }
    }
}
