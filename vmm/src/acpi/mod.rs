//! The ACPI tables of a guest: hardware-reduced, so that the guest looks for nothing that is not there.
//!
//! Owns the tables' contents and their place. Says what there is (processors, PCI, serial port, power button) and, as loudly,
//! what there is not: no RTC, no keyboard controller, no VGA, no PM timer. A missing device that a kernel probes for costs it
//! seconds.

mod dsdt;
mod nodes;

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use crate::config::GuestNode;
use crate::layout;
use crate::memory::{GuestMemory, GuestMemoryError};

const OEM: [u8; 6] = *b"CABLEW";
const TABLE: [u8; 8] = *b"CABLEWAY";
const REVISION: u32 = 1;

/// IA-PC boot architecture flags (ACPI 6.5, 5.2.9.3).
const NO_VGA: u16 = 1 << 2;
const NO_RTC: u16 = 1 << 5;
/// What the guest writes to the reset port.
pub(crate) const RESET_VALUE: u8 = 1;
/// SLP_TYP of S5, as the DSDT's `_S5_` has it, and where it is in the sleep control register (ACPI 6.5, 4.8.3.7).
pub(crate) const SLEEP_TYPE_S5: u8 = 5;
/// See [`SLEEP_TYPE_S5`].
pub(crate) const SLEEP_ENABLE: u8 = 1 << 5;

/// What the tables tell about this machine.
#[derive(Clone, Debug)]
pub struct Machine {
    /// APIC identifier of each vCPU.
    pub apic_ids: Vec<u32>,
    /// Address bits of the vCPUs.
    pub address_bits: u8,
    /// Whether there is a serial port.
    pub serial: bool,
    /// The guest's memory nodes, if it is told of them.
    pub nodes: Vec<GuestNode>,
    /// Inputs of the I/O APIC that interrupt lines of PCI devices go to: number of the device, input.
    pub lines: Vec<(u32, u32)>,
}

/// Puts the tables into memory, the RSDP first.
///
/// # Errors
/// They do not fit, which is a mistake of ours: their size is bounded by the number of vCPUs and nodes.
pub fn write(memory: &GuestMemory, machine: &Machine) -> Result<(), GuestMemoryError> {
    let mut next = layout::ACPI.start + Rsdp::len() as u64;
    let mut put = |table: &[u8]| -> Result<u64, GuestMemoryError> {
        let at = next.next_multiple_of(16);
        next = at + table.len() as u64;
        if next > layout::ACPI.end {
            return Err(GuestMemoryError::Outside {
                what: "ACPI tables",
                address: at,
                len: table.len(),
                memory: memory.len(),
            });
        }
        memory.write("ACPI tables", at, table)?;
        Ok(at)
    };
    let dsdt = put(&dsdt::table(machine, memory.len()))?;
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    xsdt.add_entry(put(&bytes(&fadt(dsdt)))?);
    xsdt.add_entry(put(&madt(machine))?);
    let mut mcfg = MCFG::new(OEM, TABLE, REVISION);
    mcfg.add_ecam(layout::ECAM.start, 0, 0, (layout::PCI_BUSES - 1) as u8);
    xsdt.add_entry(put(&bytes(&mcfg))?);
    if !machine.nodes.is_empty() {
        xsdt.add_entry(put(&nodes::affinities(machine))?);
        xsdt.add_entry(put(&nodes::distances(machine))?);
    }
    let xsdt = put(&bytes(&xsdt))?;
    memory.write("ACPI tables", layout::ACPI.start, &bytes(&Rsdp::new(OEM, xsdt)))
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// Fixed description (ACPI 6.5, 5.2.9).
fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let port = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // The button is a device of the DSDT, not a fixed register.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (NO_VGA | NO_RTC).into();
    fadt.reset_reg = port(layout::RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(layout::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(layout::SLEEP_STATUS_PORT);
    fadt.finalize()
}

/// Interrupt controllers (ACPI 6.5, 5.2.12): a local x2APIC for each vCPU, one I/O APIC.
fn madt(machine: &Machine) -> Vec<u8> {
    let mut madt = Sdt::new(*b"APIC", 44, 5, OEM, TABLE, REVISION);
    madt.write_u32(36, layout::LOCAL_APIC);
    // Flags: no 8259s.
    madt.write_u32(40, 0);
    for (uid, id) in (0_u32..).zip(&machine.apic_ids) {
        // Type 9, 16 bytes (5.2.12.12).
        madt.append_slice(&[9, 16, 0, 0]);
        madt.append_slice(&id.to_le_bytes());
        madt.append_slice(&1_u32.to_le_bytes());
        madt.append_slice(&uid.to_le_bytes());
    }
    // Type 1, 12 bytes (5.2.12.3): identifier 0, first interrupt 0.
    madt.append_slice(&[1, 12, 0, 0]);
    madt.append_slice(&(layout::IO_APIC.start as u32).to_le_bytes());
    madt.append_slice(&0_u32.to_le_bytes());
    madt.as_slice().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, MAX_VCPUS};
    use std::path::Path;
    use vm_memory::{Bytes, GuestAddress};

    fn two_nodes() -> Vec<GuestNode> {
        let node = |vcpus: std::ops::Range<u32>, distances: [u8; 2]| GuestNode {
            memory: 2 << 30,
            vcpus: vcpus.collect(),
            host: None,
            distances: distances.to_vec(),
            devices: distances[1] == 10,
        };
        vec![node(0..2, [10, 21]), node(2..MAX_VCPUS, [21, 10])]
    }

    fn memory() -> GuestMemory {
        let config =
            Config::parse("[vm]\nkernel = \"x\"\nmemory = \"2 MiB\"", Path::new("test.toml")).unwrap();
        GuestMemory::new(&config).unwrap()
    }

    fn read(memory: &GuestMemory, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        memory.view().read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn number(memory: &GuestMemory, at: u64, length: usize) -> u64 {
        read(memory, at, length).iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte))
    }

    #[test]
    fn every_table_is_found_from_the_rsdp_and_its_bytes_add_up_to_zero() {
        let memory = memory();
        let apic_ids = (0..MAX_VCPUS).collect();
        let lines = vec![(1, 17), (2, 18)];
        write(&memory, &Machine { apic_ids, address_bits: 39, serial: true, nodes: two_nodes(), lines })
            .unwrap();
        let sum = |at: u64, length: u64| {
            read(&memory, at, length as usize).iter().fold(0_u8, |s, b| s.wrapping_add(*b))
        };
        let rsdp = layout::ACPI.start;
        assert_eq!(read(&memory, rsdp, 8), b"RSD PTR ");
        assert_eq!((sum(rsdp, 20), sum(rsdp, 36)), (0, 0));
        let xsdt = number(&memory, rsdp + 24, 8);
        let length = |at| number(&memory, at + 4, 4);
        assert_eq!((read(&memory, xsdt, 4).as_slice(), sum(xsdt, length(xsdt))), (b"XSDT".as_slice(), 0));
        let mut found = Vec::new();
        for entry in (xsdt + 36..xsdt + length(xsdt)).step_by(8) {
            let table = number(&memory, entry, 8);
            assert_eq!(sum(table, length(table)), 0);
            found.push(read(&memory, table, 4));
            if found.last().unwrap() == b"FACP" {
                let dsdt = number(&memory, table + 140, 8);
                assert_eq!(
                    (read(&memory, dsdt, 4).as_slice(), sum(dsdt, length(dsdt))),
                    (b"DSDT".as_slice(), 0)
                );
            }
        }
        assert_eq!(found, [b"FACP", b"APIC", b"MCFG", b"SRAT", b"SLIT"]);
    }
}
