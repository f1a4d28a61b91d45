//! A virtio-net device as its handle and its queues share it: registers, the memory of the rings, the state.
//!
//! Owns the order of things at the end: the device is reset, so that it uses no ring any more, bus mastering goes off, and only
//! then may memory go.

use std::sync::Arc;

use virtio::device::{Direction, Layout};
use virtio::driver::{AreaSizes, DriverRing, DriverSetup, IndirectTables};
use virtio::features;
use virtio::memory::HostRange;

use super::pci::{GONE8, Registers, status};
use crate::access::{NarrowBar, PciDevice, WaitError, set_bus_master};
use crate::dma::{Arena, Block};
use crate::nic::{DeviceError, MOST_BUFFERS, State};

/// Descriptors of a frame: its header and its buffers.
pub(super) const MOST_PIECES: usize = MOST_BUFFERS as usize + 1;

/// What handle and queues of a device share. The device stops when the last of them goes, at the latest.
pub(super) struct Core<D: PciDevice<Bar: NarrowBar>> {
    pub(super) state: State,
    pub(super) registers: Registers<D::Bar>,
    device: Arc<D>,
}

impl<D: PciDevice<Bar: NarrowBar>> Core<D> {
    /// Takes the device and resets it (virtio 1.3, section 3.1.1, step 1).
    pub(super) fn take(device: Arc<D>) -> Result<Self, DeviceError> {
        set_bus_master(&*device, false);
        // Its memory answers; it may not yet use ours.
        let command = device.config_read(crate::access::config::COMMAND) & 0xffff;
        device.config_write(
            crate::access::config::COMMAND,
            command & !crate::access::config::COMMAND_MASTER | crate::access::config::COMMAND_MEMORY,
        );
        let core = Self { state: State::default(), registers: Registers::find(&*device)?, device };
        core.registers.reset()?;
        Ok(core)
    }

    /// Lets the device use memory.
    pub(super) fn let_loose(&self) {
        set_bus_master(&*self.device, true);
    }

    /// Looks whether the device is there and well, and whether it has a link.
    pub(super) fn look(&self, has_link_status: bool) -> Result<bool, DeviceError> {
        let now = self.registers.status();
        if now == GONE8 {
            self.state.fail(DeviceError::Gone);
        } else if now & status::NEEDS_RESET != 0 {
            self.state.fail(DeviceError::NeedsReset);
        }
        // Section 5.1.4: status, VIRTIO_NET_S_LINK_UP.
        let up = !has_link_status || self.registers.device16(6) & 1 != 0;
        self.state.set_link(up)?;
        Ok(up)
    }

    /// Stops the device, once: afterwards it neither reads nor writes memory.
    pub(super) fn stop(&self) {
        self.state.stop(|| {
            if let Err(e @ WaitError::Timeout { .. }) = self.registers.reset() {
                tracing::warn!(
                    "virtio-net: the reset did not end ({e}); bus mastering is turned off under it"
                );
            }
            set_bus_master(&*self.device, false);
        });
    }
}

impl<D: PciDevice<Bar: NarrowBar>> Drop for Core<D> {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A ring that no device uses yet.
pub(super) struct NewRing {
    pub(super) ring: DriverRing,
    pub(super) size: u16,
    /// Descriptors, driver area, device area, as the device knows them.
    pub(super) areas: [u64; 3],
}

impl NewRing {
    /// A ring of `size` descriptors, in memory of its own. One that the device only reads has indirect tables, if these were
    /// negotiated.
    pub(super) fn new(
        arena: &Arc<Arena>,
        negotiated: u64,
        direction: Direction,
        size: u16,
    ) -> Result<Self, DeviceError> {
        let packed = negotiated & features::RING_PACKED != 0;
        let layout = if packed { Layout::Packed } else { Layout::Split };
        let with_tables = direction == Direction::Read && negotiated & features::RING_INDIRECT_DESC != 0;
        let table_bytes = if with_tables { 16 * MOST_PIECES * usize::from(size) } else { 0 };
        // Each in cache lines of its own.
        let sizes = AreaSizes::of(layout, size);
        let driver = sizes.descriptors.next_multiple_of(64);
        let device = (driver + sizes.driver).next_multiple_of(64);
        let tables = (device + sizes.device).next_multiple_of(64);
        let block = Arc::new(Block::new(arena, tables + table_bytes)?);
        let range = |offset: usize, len| HostRange {
            ptr: block.ptr().wrapping_add(offset),
            len,
            guest: block.iova() + offset as u64,
        };
        let indirect = IndirectTables { range: range(tables, table_bytes), entries: MOST_PIECES as u16 };
        let setup = DriverSetup {
            layout,
            direction,
            size,
            features: negotiated,
            descriptors: range(0, sizes.descriptors),
            driver: range(driver, sizes.driver),
            device: range(device, sizes.device),
            indirect: with_tables.then_some(indirect),
            mapping: block.clone(),
        };
        let areas = [0, driver, device].map(|offset| block.iova() + offset as u64);
        // SAFETY: the areas lie apart in the block, which `mapping` keeps and nobody else has; no device runs on it yet.
        Ok(Self { ring: unsafe { DriverRing::new(setup) }?, size, areas })
    }
}
