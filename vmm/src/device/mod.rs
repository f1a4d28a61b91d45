//! The devices of a machine, and which one an access goes to.
//!
//! Owns the dispatch of I/O ports and device memory. Addresses, lengths and bytes come from the guest: whatever they are, an
//! access is answered, by all ones where nothing is. Never blocks.

mod power;
pub(crate) mod serial;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::control::report::DeviceReport;
use crate::interrupts::Interrupts;
use crate::layout;
use crate::lifecycle::Lifecycle;
use crate::pci::{PciBus, PciPorts};
pub(crate) use power::Outcome;
use serial::SerialPort;

/// Everything that a vCPU can reach by leaving the guest.
pub(crate) struct Devices {
    serial: Option<Arc<Mutex<SerialPort>>>,
    pci_ports: Mutex<PciPorts>,
    pci: PciBus,
    interrupts: Arc<Interrupts>,
}

impl Devices {
    pub(crate) fn new(
        serial: Option<Arc<Mutex<SerialPort>>>,
        pci: PciBus,
        interrupts: Arc<Interrupts>,
    ) -> Self {
        Self { serial, pci_ports: Mutex::new(PciPorts::default()), pci, interrupts }
    }

    /// The devices that run by themselves.
    pub(crate) fn parts(&self) -> Vec<&dyn Lifecycle> {
        self.pci.functions().filter_map(|function| function.lifecycle()).collect()
    }

    /// What the devices tell about themselves.
    pub(crate) fn reports(&self) -> Vec<DeviceReport> {
        self.pci.functions().filter_map(|function| function.report()).collect()
    }

    /// The guest reads a port; `data` is filled whole.
    pub(crate) fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if layout::SERIAL.contains(&port)
            && let Some(serial) = &self.serial
        {
            let mut serial = lock(serial);
            let register = port - layout::SERIAL.start;
            // More than one byte: a string instruction that reads one register again and again.
            data.iter_mut().for_each(|byte| *byte = serial.read(register));
        } else if let Some(offset) = pci_data(port) {
            lock(&self.pci_ports).read(&self.pci, offset, data);
        } else if port == layout::PCI_ADDRESS_PORT {
            lock(&self.pci_ports).read_address(data);
        } else if let Some(value) = power::port_read(port) {
            data.fill(value);
        }
    }

    /// The guest writes a port.
    pub(crate) fn port_write(&self, port: u16, data: &[u8]) -> Outcome {
        if layout::SERIAL.contains(&port)
            && let Some(serial) = &self.serial
        {
            let mut serial = lock(serial);
            let register = port - layout::SERIAL.start;
            data.iter().for_each(|byte| serial.write(register, *byte));
        } else if let Some(offset) = pci_data(port) {
            lock(&self.pci_ports).write(&self.pci, offset, data);
        } else if port == layout::PCI_ADDRESS_PORT {
            lock(&self.pci_ports).write_address(data);
        } else if let [value, ..] = data {
            return power::port_write(port, *value);
        }
        Outcome::Done
    }

    /// The guest reads a device's memory; `data` is filled whole.
    pub(crate) fn mmio_read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if layout::ECAM.contains(&address) {
            self.pci.read_ecam(address - layout::ECAM.start, data);
        } else if layout::IO_APIC.contains(&address) {
            self.interrupts.read(address - layout::IO_APIC.start, data);
        } else {
            self.pci.read_memory(address, data);
        }
    }

    /// The guest writes a device's memory.
    pub(crate) fn mmio_write(&self, address: u64, data: &[u8]) {
        if layout::ECAM.contains(&address) {
            self.pci.write_ecam(address - layout::ECAM.start, data);
        } else if layout::IO_APIC.contains(&address) {
            self.interrupts.write(address - layout::IO_APIC.start, data);
        } else {
            self.pci.write_memory(address, data);
        }
    }

    /// The guest ended an interrupt with this vector that KVM does not have the I/O APIC of.
    pub(crate) fn end_of_interrupt(&self, vector: u8) {
        self.interrupts.end(vector);
    }
}

/// The byte of the PCI data register that a port is.
fn pci_data(port: u16) -> Option<u16> {
    port.checked_sub(layout::PCI_DATA_PORT).filter(|offset| *offset < 4)
}

/// The state of a device is whole between two accesses, whatever became of the thread that had it last.
pub(crate) fn lock<T>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}
