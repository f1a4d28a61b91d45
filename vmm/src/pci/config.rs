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

/// More registers of the header of an ordinary function.
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const BARS: usize = 0x10;
const SUBSYSTEM_VENDOR: usize = 0x2c;
const SUBSYSTEM: usize = 0x2e;
const CAPABILITIES: usize = 0x34;
/// Status: there is a list of capabilities (PCI 3.0, 6.2.3).
const HAS_CAPABILITIES: u16 = 1 << 4;
/// Command: answers to memory accesses.
const MEMORY_ENABLE: u8 = 1 << 1;
/// Where the list of capabilities begins, and the end of what a list may use.
const FIRST_CAPABILITY: usize = 0x40;
const HEADER_END: usize = 0x100;

/// Who a function is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Identity {
    pub(crate) vendor: u16,
    pub(crate) device: u16,
    pub(crate) subsystem: u16,
    /// Base class and subclass.
    pub(crate) class: u16,
    pub(crate) revision: u8,
}

/// The bytes, and a mask of what the guest may write.
pub(crate) struct ConfigSpace {
    bytes: Box<[u8; SIZE]>,
    writable: Box<[u8; SIZE]>,
    next_capability: usize,
    last_link: usize,
}

impl ConfigSpace {
    /// A host bridge with this vendor and device number.
    pub(super) fn host_bridge((vendor, device): (u16, u16)) -> Self {
        Self::endpoint(Identity { vendor, device, subsystem: 0, class: CLASS_HOST_BRIDGE, revision: 0 })
    }

    /// An ordinary function without BARs and capabilities so far.
    pub(crate) fn endpoint(identity: Identity) -> Self {
        let mut space = Self {
            bytes: Box::new([0; SIZE]),
            writable: Box::new([0; SIZE]),
            next_capability: FIRST_CAPABILITY,
            last_link: CAPABILITIES,
        };
        space.set(VENDOR, identity.vendor.to_le_bytes());
        space.set(DEVICE, identity.device.to_le_bytes());
        space.set(REVISION, [identity.revision]);
        space.set(CLASS, identity.class.to_le_bytes());
        if identity.subsystem != 0 {
            space.set(SUBSYSTEM_VENDOR, identity.vendor.to_le_bytes());
            space.set(SUBSYSTEM, identity.subsystem.to_le_bytes());
        }
        space.allow(COMMAND, COMMAND_WRITABLE.to_le_bytes());
        space.allow(INTERRUPT_LINE, [0xff]);
        space
    }

    /// Gives the function a 32-bit memory BAR 0 of `size` bytes, a power of two, at `address` (PCI 3.0, 6.2.5.1).
    pub(crate) fn add_bar(&mut self, size: u32, address: u32) {
        self.set(BARS, address.to_le_bytes());
        self.allow(BARS, (!(size - 1)).to_le_bytes());
    }

    /// Where BAR 0 is, if the function answers to memory accesses.
    pub(crate) fn bar(&self) -> Option<u64> {
        let mut data = [0; 4];
        self.read(BARS, &mut data);
        (self.bytes[COMMAND] & MEMORY_ENABLE != 0).then(|| u64::from(u32::from_le_bytes(data) & !0xf))
    }

    /// Adds a capability and returns where it is (PCI 3.0, 6.7). `body` is what follows its number and link. The list has
    /// room for what the devices here have; one more would be left out.
    pub(crate) fn add_capability(&mut self, number: u8, body: &[u8]) -> Option<usize> {
        let at = self.next_capability;
        let end = at + 2 + body.len();
        if end > HEADER_END {
            return None;
        }
        self.set(self.last_link, [at as u8]);
        self.set(at, [number, 0]);
        self.bytes.iter_mut().skip(at + 2).zip(body).for_each(|(to, from)| *to = *from);
        self.last_link = at + 1;
        self.next_capability = end.next_multiple_of(4);
        self.set(STATUS, HAS_CAPABILITIES.to_le_bytes());
        Some(at)
    }

    fn set<const N: usize>(&mut self, register: usize, value: [u8; N]) {
        self.bytes.iter_mut().skip(register).zip(value).for_each(|(byte, value)| *byte = value);
    }

    /// The guest may write these bits.
    pub(crate) fn allow<const N: usize>(&mut self, register: usize, mask: [u8; N]) {
        self.writable.iter_mut().skip(register).zip(mask).for_each(|(byte, mask)| *byte = mask);
    }

    /// The guest reads; beyond the end `data` stays as it is.
    pub(crate) fn read(&self, register: usize, data: &mut [u8]) {
        data.iter_mut().zip(self.bytes.iter().skip(register)).for_each(|(to, from)| *to = *from);
    }

    /// The guest writes; bits that it may not change stay.
    pub(crate) fn write(&mut self, register: usize, data: &[u8]) {
        let bytes = self.bytes.iter_mut().zip(self.writable.iter()).skip(register);
        for ((byte, mask), value) in bytes.zip(data) {
            *byte = *byte & !mask | value & mask;
        }
    }
}
