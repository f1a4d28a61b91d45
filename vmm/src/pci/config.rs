//! Configuration space of a PCI function: bytes, and which of their bits the guest may change (PCI 3.0, chapter 6).

/// Bytes of a function's configuration space by ECAM.
const SIZE: usize = 4096;

/// Registers of the header (PCI 3.0, figure 6-1).
const VENDOR: usize = 0x00;
const DEVICE: usize = 0x02;
const COMMAND: usize = 0x04;
const CLASS: usize = 0x0a;
const INTERRUPT_LINE: usize = 0x3c;
/// A host bridge (PCI Code and ID Assignment 1.11, 1.7).
const CLASS_HOST_BRIDGE: u16 = 0x0600;
/// Command: bus master, memory and I/O enable; interrupts off (PCI 3.0, 6.2.2).
const COMMAND_WRITABLE: u16 = 1 << 10 | 0b111;

/// The bytes, and a mask of what the guest may write.
pub(super) struct ConfigSpace {
    bytes: Box<[u8; SIZE]>,
    writable: Box<[u8; SIZE]>,
}

impl ConfigSpace {
    /// A host bridge with this vendor and device number.
    pub(super) fn host_bridge((vendor, device): (u16, u16)) -> Self {
        let mut space = Self { bytes: Box::new([0; SIZE]), writable: Box::new([0; SIZE]) };
        space.set(VENDOR, vendor.to_le_bytes());
        space.set(DEVICE, device.to_le_bytes());
        space.set(CLASS, CLASS_HOST_BRIDGE.to_le_bytes());
        space.allow(COMMAND, COMMAND_WRITABLE.to_le_bytes());
        space.allow(INTERRUPT_LINE, [0xff]);
        space
    }

    fn set<const N: usize>(&mut self, register: usize, value: [u8; N]) {
        self.bytes.iter_mut().skip(register).zip(value).for_each(|(byte, value)| *byte = value);
    }

    fn allow<const N: usize>(&mut self, register: usize, mask: [u8; N]) {
        self.writable.iter_mut().skip(register).zip(mask).for_each(|(byte, mask)| *byte = mask);
    }

    /// The guest reads; beyond the end `data` stays as it is.
    pub(super) fn read(&self, register: usize, data: &mut [u8]) {
        data.iter_mut().zip(self.bytes.iter().skip(register)).for_each(|(to, from)| *to = *from);
    }

    /// The guest writes; bits that it may not change stay.
    pub(super) fn write(&mut self, register: usize, data: &[u8]) {
        let bytes = self.bytes.iter_mut().zip(self.writable.iter()).skip(register);
        for ((byte, mask), value) in bytes.zip(data) {
            *byte = *byte & !mask | value & mask;
        }
    }
}
