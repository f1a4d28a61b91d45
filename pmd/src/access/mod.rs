//! What a driver sees of its device: registers, PCI configuration, an IOVA space. Nothing else.
//!
//! A driver is generic over [`PciDevice`], so that the same code runs on hardware and on models. Memory-mapped registers
//! ([`Mmio`]) compile to plain loads and stores. Knows no device and starts nothing.
//!
//! Registers are described by a table that reads like the datasheet ([`crate::registers!`]); every wait for one of their bits
//! is bounded ([`Regs::wait`]).

mod mmio;
mod registers;
pub mod vfio;

use std::sync::Arc;
use std::time::Duration;

use host::memory::SharedMemory;

pub use mmio::Mmio;
pub use registers::{Bits, Entry, Field, Readable, Reading, Register, Regs, Scratch, WaitError, Writable};

/// What a register of a device reads that is no longer there (PCI Express 4.0, section 2.3.2: completions of requests that
/// nobody claims).
pub const GONE: u32 = u32::MAX;

/// A memory region of a PCI function (a "BAR"). Offsets are in bytes and aligned to the access.
pub trait Bar: Send + Sync + 'static {
    /// Reads 32 bits. A device that is gone, and an offset outside of the region, read as [`GONE`].
    fn read32(&self, offset: u32) -> u32;

    /// Writes 32 bits; nothing happens to a device that is gone, or outside of the region.
    fn write32(&self, offset: u32, value: u32);

    /// Lets time pass between two looks at a register.
    fn pause(&self, time: Duration) {
        std::thread::sleep(time);
    }
}

/// A PCI function that a driver owns.
pub trait PciDevice: Send + Sync + 'static {
    /// Its memory regions.
    type Bar: Bar;

    /// Region `index` (0 to 5), at least `len` bytes of it.
    ///
    /// # Errors
    /// It has none of that number, or a shorter one.
    fn bar(&self, index: u8, len: u32) -> Result<Self::Bar, AccessError>;

    /// 32 bits of the configuration space at `offset`, a multiple of 4. [`GONE`] if the device is.
    fn config_read(&self, offset: u16) -> u32;

    /// Writes 32 bits of the configuration space.
    fn config_write(&self, offset: u16, value: u32);

    /// The addresses that the device knows memory by.
    fn iova_space(&self) -> Arc<dyn IovaSpace>;
}

/// The addresses by which one or more devices reach memory. All network cards of a switch share one, which never holds a
/// guest's memory.
pub trait IovaSpace: Send + Sync {
    /// Makes all of `memory`, which is one contiguous run, reachable; returns the address of its first byte.
    ///
    /// # Errors
    /// It cannot be done; the text says what to do.
    fn map(&self, memory: &SharedMemory) -> Result<u64, MapError>;

    /// Takes away what [`IovaSpace::map`] gave. No device of the space uses it any more.
    fn unmap(&self, iova: u64, len: usize);
}

/// Memory could not be made reachable for a device.
#[derive(Debug, thiserror::Error)]
#[error("cannot map {len} bytes for the device: {reason}")]
pub struct MapError {
    /// Bytes.
    pub len: usize,
    /// Why, and what to do.
    pub reason: String,
}

/// A device could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// No such region.
    #[error(
        "{device} has no memory region {index} of {len} bytes; is it the device that this driver is for?"
    )]
    NoBar {
        /// Its name or address.
        device: String,
        /// Number of the region.
        index: u8,
        /// Bytes wanted.
        len: u32,
    },
}

/// Offsets and bits of the configuration space that every function has (PCI 3.0, section 6.1).
pub mod config {
    /// Vendor in the low half, device in the high half.
    pub const ID: u16 = 0x00;
    /// Command in the low half; status in the high half, where writing zeros changes nothing.
    pub const COMMAND: u16 = 0x04;
    /// Where the list of capabilities begins (section 6.7).
    pub const CAPABILITIES: u16 = 0x34;
    /// In [`COMMAND`]: memory regions answer.
    pub const COMMAND_MEMORY: u32 = 1 << 1;
    /// In [`COMMAND`]: the function may read and write memory.
    pub const COMMAND_MASTER: u32 = 1 << 2;
}

/// Lets the device use memory, or forbids it.
pub fn set_bus_master<D: PciDevice>(device: &D, on: bool) {
    let command = device.config_read(config::COMMAND) & 0xffff;
    if command == GONE & 0xffff {
        return;
    }
    let wanted = if on {
        command | config::COMMAND_MASTER | config::COMMAND_MEMORY
    } else {
        command & !config::COMMAND_MASTER
    };
    device.config_write(config::COMMAND, wanted);
}

/// A memory region that is also accessed by 8 and 16 bits: devices whose fields have those widths are only to be accessed by them
/// (virtio 1.3, section 4.1.3.1).
pub trait NarrowBar: Bar {
    /// Reads 8 bits. A device that is gone, and an offset outside of the region, read as all ones.
    fn read8(&self, offset: u32) -> u8;

    /// Writes 8 bits; nothing happens to a device that is gone, or outside of the region.
    fn write8(&self, offset: u32, value: u8);

    /// As [`NarrowBar::read8`], 16 bits.
    fn read16(&self, offset: u32) -> u16;

    /// As [`NarrowBar::write8`], 16 bits.
    fn write16(&self, offset: u32, value: u16);
}
