//! A card as its handle and its queues share it: registers, the memory of the rings, the state.
//!
//! Owns the order of things at the end: queues off, bus mastering off, and only then may memory go.

use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::Card;
use super::descriptors::BYTES;
use super::regs::STATUS;
use crate::access::{GONE, PciDevice, Regs, WaitError, set_bus_master};
use crate::dma::{Arena, Block};
use crate::nic::{DeviceError, Options, State, check_device};

/// Bytes of a ring of `size` descriptors.
pub(crate) const fn ring_bytes(size: u32) -> usize {
    size as usize * BYTES
}

/// What handle and queues of a device share. The device stops when the last of them goes, at the latest.
pub(crate) struct Core<D: PciDevice, C: Card> {
    pub(crate) state: State,
    regs: Regs<D::Bar>,
    strips_tags: AtomicBool,
    receive_rings: Box<[Block]>,
    transmit_rings: Box<[Block]>,
    device: Arc<D>,
    card: PhantomData<C>,
}

impl<D: PciDevice, C: Card> Core<D, C> {
    /// Takes the device, with memory for its rings. Nothing is changed in it yet.
    pub(crate) fn take(device: Arc<D>, arena: &Arc<Arena>, options: &Options) -> Result<Self, DeviceError> {
        check_device(&*device, arena, C::NAME, C::IDS)?;
        let regs = Regs::new(device.bar(0, C::BAR_BYTES)?);
        let blocks = |size| (0..options.queues).map(|_| Block::new(arena, ring_bytes(size))).collect();
        let rings = |size| -> Result<Box<[Block]>, _> { blocks(size) };
        Ok(Self {
            state: State::default(),
            regs,
            strips_tags: AtomicBool::new(options.strip_tags),
            receive_rings: rings(options.receive_ring)?,
            transmit_rings: rings(options.transmit_ring)?,
            device,
            card: PhantomData,
        })
    }

    #[inline(always)]
    pub(crate) fn regs(&self) -> &Regs<D::Bar> {
        &self.regs
    }

    /// Lets the device use memory.
    pub(crate) fn let_loose(&self) {
        set_bus_master(&*self.device, true);
    }

    /// Where the receive ring of `queue` begins; there is one for each queue that was asked for.
    pub(crate) fn receive_ring(&self, queue: u32) -> *mut u8 {
        self.receive_rings.get(queue as usize).map_or(std::ptr::null_mut(), Block::ptr)
    }

    /// As [`Core::receive_ring`].
    pub(crate) fn transmit_ring(&self, queue: u32) -> *mut u8 {
        self.transmit_rings.get(queue as usize).map_or(std::ptr::null_mut(), Block::ptr)
    }

    /// The rings as the device knows them, receive and transmit, queue by queue.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = (u64, u64)> {
        self.receive_rings.iter().map(Block::iova).zip(self.transmit_rings.iter().map(Block::iova))
    }

    /// Whether VLAN tags are taken off by the device.
    #[inline(always)]
    pub(crate) fn strips_tags(&self) -> bool {
        self.strips_tags.load(Ordering::Relaxed)
    }

    /// Looks whether the device is there and has a link: for housekeeping, as it reads a register.
    pub(crate) fn look(&self) -> Result<u32, DeviceError> {
        let status = self.regs.read(STATUS);
        if status == GONE {
            self.state.fail(DeviceError::Gone);
        }
        self.state.set_link(STATUS::LU.are_in(status))?;
        Ok(status)
    }

    /// Stops the device, once: afterwards it neither reads nor writes memory.
    pub(crate) fn stop(&self) {
        self.state.stop(|| {
            if let Err(e @ WaitError::Timeout { .. }) = C::quiet(&self.regs) {
                tracing::warn!(
                    "{}: requests did not end ({e}); bus mastering is turned off under them",
                    C::NAME
                );
            }
            // Whatever the device thinks, the bus takes no more requests from it (PCI 3.0, 6.2.2).
            set_bus_master(&*self.device, false);
        });
    }
}

impl<D: PciDevice, C: Card> Drop for Core<D, C> {
    fn drop(&mut self) {
        self.stop();
    }
}
