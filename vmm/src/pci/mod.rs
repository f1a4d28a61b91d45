//! PCI: one bus with a host bridge, reached through ports and through memory (ECAM).
//!
//! Owns which function a configuration access goes to and the checks of its offset and length. Never knows what a function
//! is: that is its configuration space's.

mod config;
pub(crate) mod msix;

use std::sync::{Arc, Mutex};

use crate::control::report::DeviceReport;
use crate::device::lock;
use crate::lifecycle::Lifecycle;
pub(crate) use config::{ConfigSpace, Identity};

/// A function on the bus. Offsets and lengths of configuration accesses were checked; those into its memory were not.
pub(crate) trait Function: Send + Sync {
    /// Reads 1, 2 or 4 bytes within a double word.
    fn read_config(&self, register: usize, data: &mut [u8]);
    /// Writes 1, 2 or 4 bytes within a double word.
    fn write_config(&self, register: usize, data: &[u8]);
    /// Reads device memory at a guest-physical address; `false`: it is none of this function's.
    fn read_memory(&self, address: u64, data: &mut [u8]) -> bool;
    /// Writes device memory at a guest-physical address; `false`: it is none of this function's.
    fn write_memory(&self, address: u64, data: &[u8]) -> bool;
    /// What of it runs by itself.
    fn lifecycle(&self) -> Option<&dyn Lifecycle> {
        None
    }
    /// What it tells about itself.
    fn report(&self) -> Option<DeviceReport> {
        None
    }
}

/// The host bridge has configuration space and nothing else.
impl Function for Mutex<ConfigSpace> {
    fn read_config(&self, register: usize, data: &mut [u8]) {
        lock(self).read(register, data);
    }

    fn write_config(&self, register: usize, data: &[u8]) {
        lock(self).write(register, data);
    }

    fn read_memory(&self, _: u64, _: &mut [u8]) -> bool {
        false
    }

    fn write_memory(&self, _: u64, _: &[u8]) -> bool {
        false
    }
}

/// Configuration space of a function by ECAM: 4 KiB each, 8 functions a device, 32 devices a bus (PCI Express 6.0, 7.2.2).
const FUNCTION_BITS: u32 = 12;
/// Functions of bus 0.
const FUNCTIONS: u64 = 256;
/// Host bridges have no identity of their own here; Intel's 82G33 host bridge is what QEMU's q35 shows, and Linux has no
/// quirks for it.
const HOST_BRIDGE: (u16, u16) = (0x8086, 0x29c0);

/// Bus 0.
pub(crate) struct PciBus {
    functions: Vec<(u64, Arc<dyn Function>)>,
}

impl PciBus {
    /// Devices that the bus has room for.
    pub(crate) const PLACES: u64 = FUNCTIONS / 8;

    /// A bus with a host bridge and nothing else.
    pub(crate) fn new() -> Self {
        Self { functions: vec![(0, Arc::new(Mutex::new(ConfigSpace::host_bridge(HOST_BRIDGE))))] }
    }

    /// Puts a function into the next device's place; the bus has 32.
    pub(crate) fn add(&mut self, function: Arc<dyn Function>) {
        self.functions.push((self.functions.len() as u64 * 8, function));
    }

    /// All functions.
    pub(crate) fn functions(&self) -> impl Iterator<Item = &dyn Function> {
        self.functions.iter().map(|(_, function)| function.as_ref())
    }

    /// The guest reads device memory. `data` stays as it is where nothing is.
    pub(crate) fn read_memory(&self, address: u64, data: &mut [u8]) {
        let _ = self.functions.iter().any(|(_, function)| function.read_memory(address, data));
    }

    /// The guest writes device memory.
    pub(crate) fn write_memory(&self, address: u64, data: &[u8]) {
        let _ = self.functions.iter().any(|(_, function)| function.write_memory(address, data));
    }

    /// Reads at an offset into ECAM. `data` stays as it is where nothing is.
    pub(crate) fn read_ecam(&self, offset: u64, data: &mut [u8]) {
        self.with(offset, data.len(), |function, register| function.read_config(register, data));
    }

    /// Writes at an offset into ECAM.
    pub(crate) fn write_ecam(&self, offset: u64, data: &[u8]) {
        self.with(offset, data.len(), |function, register| function.write_config(register, data));
    }

    /// Finds the function and register of an access that is 1, 2 or 4 bytes long and lies within a double word, as all that
    /// software may do (PCI Express 6.0, 7.2.2.1).
    fn with(&self, offset: u64, length: usize, access: impl FnOnce(&dyn Function, usize)) {
        let (function, register) = (offset >> FUNCTION_BITS, (offset & 0xfff) as usize);
        if !matches!(length, 1 | 2 | 4) || register & 3 > 4 - length || function >= FUNCTIONS {
            return;
        }
        if let Some((_, function)) = self.functions.iter().find(|(address, _)| *address == function) {
            access(function.as_ref(), register);
        }
    }
}

/// The two configuration ports: an address, and the register behind it (PCI 3.0, 3.2.2.3.2).
#[derive(Default)]
pub(crate) struct PciPorts {
    address: u32,
}

/// The address register's enable bit.
const ENABLE: u32 = 1 << 31;

impl PciPorts {
    /// Reads the address register, which only takes whole accesses.
    pub(crate) fn read_address(&self, data: &mut [u8]) {
        if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = self.address.to_le_bytes();
        }
    }

    /// Writes the address register.
    pub(crate) fn write_address(&mut self, data: &[u8]) {
        if let Ok(data) = <[u8; 4]>::try_from(data) {
            self.address = u32::from_le_bytes(data);
        }
    }

    /// Reads the register behind the address; `offset` is the byte in it.
    pub(crate) fn read(&self, bus: &PciBus, offset: u16, data: &mut [u8]) {
        if let Some(at) = self.ecam(offset) {
            bus.read_ecam(at, data);
        }
    }

    /// Writes the register behind the address.
    pub(crate) fn write(&self, bus: &PciBus, offset: u16, data: &[u8]) {
        if let Some(at) = self.ecam(offset) {
            bus.write_ecam(at, data);
        }
    }

    /// The same register as an offset into ECAM.
    fn ecam(&self, offset: u16) -> Option<u64> {
        let address = u64::from(self.address);
        let function = address >> 8 & 0xffff;
        (self.address & ENABLE != 0)
            .then_some(function << FUNCTION_BITS | address & 0xfc | u64::from(offset & 3))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_bridge_is_the_same_through_ports_and_memory_and_nothing_else_is_there() {
        let (bus, mut ports) = (PciBus::new(), PciPorts::default());
        let mut data = [0xff; 4];
        ports.read(&bus, 0, &mut data);
        assert_eq!(data, [0xff; 4], "not enabled");
        ports.write_address(&ENABLE.to_le_bytes());
        ports.read(&bus, 0, &mut data);
        assert_eq!(u32::from_le_bytes(data), 0x29c0_8086);
        let mut vendor = [0xff; 2];
        bus.read_ecam(0, &mut vendor);
        assert_eq!(u16::from_le_bytes(vendor), 0x8086);
        let mut class = [0xff; 1];
        bus.read_ecam(0xb, &mut class);
        assert_eq!(class, [6], "a bridge");
        for function in 1..2 * FUNCTIONS {
            let mut data = [0xff; 4];
            bus.read_ecam(function << FUNCTION_BITS, &mut data);
            assert_eq!(data, [0xff; 4]);
        }
    }

    #[test]
    fn accesses_of_any_offset_and_length_are_answered() {
        let bus = PciBus::new();
        for offset in (0..0x1010).chain([crate::layout::ECAM.end - crate::layout::ECAM.start - 1]) {
            for length in 0..=9 {
                let mut data = vec![0xff; length];
                bus.read_ecam(offset, &mut data);
                bus.write_ecam(offset, &data);
                let crosses = offset as usize & 3 > 4_usize.saturating_sub(length);
                assert!(!crosses || data.iter().all(|byte| *byte == 0xff), "{length} bytes at {offset:#x}");
            }
        }
        let mut identity = [0; 4];
        bus.read_ecam(0, &mut identity);
        assert_eq!(u32::from_le_bytes(identity), 0x29c0_8086, "written over, and unchanged");
    }
}
