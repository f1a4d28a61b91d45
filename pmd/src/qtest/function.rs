//! The modelled device as a [`PciDevice`]: found behind the root port, its BARs assigned, as firmware would.

use std::sync::Arc;

use super::protocol::Width;
use super::{BARS, ECAM, MachineError, ROOT_PORT, Shared};
use crate::access::{AccessError, Bar, GONE, IovaSpace, NarrowBar, PciDevice, config};

/// Configuration space of the root port and of the device behind it (PCI Express 4.0, section 7.2.2: a bus has 1 MiB, a
/// device 32 KiB).
pub(super) const PORT: u64 = ECAM + (ROOT_PORT << 15);
pub(super) const DEVICE: u64 = ECAM + (1 << 20);

/// Memory behind the root port.
const WINDOW: u64 = 16 << 20;

/// The device of a [`super::Machine`], or one of its virtual functions.
pub struct Function {
    pub(super) shared: Arc<Shared>,
    name: String,
    /// Its configuration space.
    at: u64,
    /// What a virtual function is, which its own configuration space does not say (SR-IOV 1.1, section 3.4.1).
    id: Option<u32>,
    bars: [Option<(u64, u32)>; 6],
}

/// One of its memory regions.
pub struct Window {
    shared: Arc<Shared>,
    base: u64,
    len: u32,
}

impl Function {
    /// Does what firmware does: opens the configuration space, numbers the bus behind the root port, assigns memory.
    pub(super) fn find(shared: &Arc<Shared>, name: &str) -> Result<Self, MachineError> {
        {
            // PCIEXBAR of the host bridge, 00:00.0 offset 0x60, through the ports 0xcf8 and 0xcfc (Q35 datasheet, 5.1.15).
            let mut qtest = shared.qtest();
            for (offset, value) in [(0x64, 0), (0x60, ECAM as u32 | 1)] {
                qtest.port_write(0xcf8, 1 << 31 | offset);
                qtest.port_write(0xcfc, value);
            }
        }
        let write = |address, value| shared.write(address, Width::Long, value);
        let read = |address| shared.read(address, Width::Long);
        // Type 1 header (PCI-to-PCI bridge 1.2, section 3.2.5): buses 0, 1, 1; memory window; then let it through.
        write(PORT + 0x18, 0x01_01_00);
        write(PORT + 0x20, (BARS + WINDOW - 1) & 0xfff0_0000 | BARS >> 16);
        write(PORT + 0x04, 0x7);
        if matches!(read(DEVICE) as u32, 0 | GONE) {
            return Err(MachineError::NoDevice(name.to_owned()));
        }
        let mut bars = [None; 6];
        let (mut next, mut index) = (BARS, 0);
        while let Some(bar) = bars.get_mut(index) {
            let at = DEVICE + 0x10 + 4 * index as u64;
            write(at, 0xffff_ffff);
            let found = read(at);
            index += 1;
            // Bit 0 marks I/O ports, which no driver here uses; bits 2:1 = 2 an address of 64 bits (PCI 3.0, 6.2.5.1).
            if found == 0 || found & 1 == 1 {
                continue;
            }
            let size = ((!(found & !0xf) + 1) & 0xffff_ffff).max(16);
            next = next.next_multiple_of(size);
            write(at, next);
            *bar = Some((next, size as u32));
            next += size;
            if found >> 1 & 3 == 2 {
                write(at + 4, 0);
                index += 1;
            }
        }
        write(DEVICE + u64::from(config::COMMAND), u64::from(config::COMMAND_MEMORY));
        Ok(Self { shared: shared.clone(), name: name.to_owned(), at: DEVICE, id: None, bars })
    }

    /// A virtual function, whose configuration space is at `at`, and its regions.
    pub(super) fn of(
        shared: &Arc<Shared>,
        number: u16,
        at: u64,
        id: u32,
        bars: [Option<(u64, u32)>; 6],
    ) -> Self {
        Self { shared: shared.clone(), name: format!("virtual function {number}"), at, id: Some(id), bars }
    }

    /// Where region `index` begins in the machine's memory.
    pub(super) fn region(&self, index: u8) -> Option<u64> {
        self.bars.get(usize::from(index)).copied().flatten().map(|(base, _)| base)
    }

    /// Powers the root port's slot off, as the guest's answer to its attention button (PCI Express 4.0, section 7.5.3.10).
    pub(super) fn power_off_slot(&self) {
        let read = |offset| self.shared.read(PORT + offset, Width::Long);
        let mut capability = read(0x34) & 0xfc;
        // A list of capabilities is at most 48 long: the space has no more room.
        for _ in 0..48 {
            let header = read(capability);
            if header & 0xff == 0x10 || capability == 0 {
                break;
            }
            capability = header >> 8 & 0xfc;
        }
        // Slot control: power indicator off (bits 9:8 = 3), power controller off (bit 10).
        let control = self.shared.read(PORT + capability + 0x18, Width::Word);
        self.shared.write(PORT + capability + 0x18, Width::Word, control | 0x700);
    }
}

impl PciDevice for Function {
    type Bar = Window;

    fn bar(&self, index: u8, len: u32) -> Result<Window, AccessError> {
        match self.bars.get(usize::from(index)) {
            Some(&Some((base, size))) if size >= len => {
                Ok(Window { shared: self.shared.clone(), base, len: size })
            }
            _ => Err(AccessError::NoBar { device: self.name.clone(), index, len }),
        }
    }

    fn config_read(&self, offset: u16) -> u32 {
        if let (config::ID, Some(id)) = (offset, self.id) {
            return id;
        }
        self.shared.read(self.at + u64::from(offset & 0xffc), Width::Long) as u32
    }

    fn config_write(&self, offset: u16, value: u32) {
        self.shared.write(self.at + u64::from(offset & 0xffc), Width::Long, value.into());
    }

    fn iova_space(&self) -> Arc<dyn IovaSpace> {
        self.shared.clone()
    }
}

impl Window {
    /// Reads an aligned value of so many bytes; none from a device that is gone, or outside of the region.
    fn read(&self, offset: u32, bytes: u32, width: Width) -> Option<u64> {
        if !offset.is_multiple_of(bytes) || offset >= self.len {
            return None;
        }
        match self.shared.read(self.base + u64::from(offset), width) {
            // QEMU reads addresses that nobody answers for as zeros, where a bus reads ones. Its configuration space does
            // tell whether the device is there.
            0 if self.shared.read(DEVICE, Width::Long) as u32 == GONE => None,
            value => Some(value),
        }
    }

    fn write(&self, offset: u32, bytes: u32, width: Width, value: u64) {
        if offset.is_multiple_of(bytes) && offset < self.len {
            self.shared.write(self.base + u64::from(offset), width, value);
        }
    }
}

impl Bar for Window {
    fn read32(&self, offset: u32) -> u32 {
        self.read(offset, 4, Width::Long).map_or(GONE, |value| value as u32)
    }

    fn write32(&self, offset: u32, value: u32) {
        self.write(offset, 4, Width::Long, value.into());
    }
}

impl NarrowBar for Window {
    fn read8(&self, offset: u32) -> u8 {
        self.read(offset, 1, Width::Byte).map_or(u8::MAX, |value| value as u8)
    }

    fn write8(&self, offset: u32, value: u8) {
        self.write(offset, 1, Width::Byte, value.into());
    }

    fn read16(&self, offset: u32) -> u16 {
        self.read(offset, 2, Width::Word).map_or(u16::MAX, |value| value as u16)
    }

    fn write16(&self, offset: u32, value: u16) {
        self.write(offset, 2, Width::Word, value.into());
    }
}
