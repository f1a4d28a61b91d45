//! Where things are in a guest's physical address space and among its I/O ports.
//!
//! Owns numbers and nothing else. Everything below 1 MiB that a kernel is given at its start is listed here, so that two
//! things never meet.

use std::ops::Range;

/// Below this, RAM; then, up to 4 GiB, devices; RAM goes on at 4 GiB.
pub(crate) const HOLE: Range<u64> = 0xc000_0000..0x1_0000_0000;

/// Where PCI functions have their 32-bit BARs.
pub(crate) const PCI_WINDOW_32: Range<u64> = 0xc000_0000..0xe000_0000;

/// PCI buses. Linux looks for devices on each that it is told of and does not find behind a bridge: 256 buses cost a boot
/// 16,384 exits (`pcibios_fixup_peer_bridges`).
pub(crate) const PCI_BUSES: u64 = 1;

/// PCI configuration space, memory mapped (ECAM, PCI Express 7.2.2): 1 MiB a bus.
pub(crate) const ECAM: Range<u64> = 0xe000_0000..0xe000_0000 + (PCI_BUSES << 20);

/// The I/O APIC, where PCs have it, and as much as it answers to (82093AA, 3.0).
pub(crate) const IO_APIC: Range<u64> = 0xfec0_0000..0xfec0_0100;

/// The local APIC, where it is at reset (Intel SDM volume 3, 11.4.1).
pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;

/// One page that KVM on Intel wants for itself, and three more behind it (KVM API, 4.35 and 4.6).
pub(crate) const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// See [`KVM_IDENTITY_MAP`].
pub(crate) const KVM_TSS: usize = 0xfffb_d000;

/// AMD processors have their HyperTransport space from here to 1 TiB: no BARs above it on those with 40 address bits or
/// more (AMD APM volume 2, 2.4).
pub(crate) const HYPER_TRANSPORT: u64 = 0xfd_0000_0000;

// --- what the kernel finds in low memory ------------------------------------------------------------------------------

/// Global descriptor table.
pub(crate) const GDT: u64 = 0x500;
/// PVH: `hvm_start_info`, and behind it the module list.
pub(crate) const PVH_START: u64 = 0x6000;
/// PVH: the module list.
pub(crate) const PVH_MODULES: u64 = 0x6040;
/// PVH: the memory map.
pub(crate) const PVH_MEMORY_MAP: u64 = 0x6100;
/// bzImage: `boot_params`, one page.
pub(crate) const ZERO_PAGE: u64 = 0x7000;
/// bzImage: top of a stack for the first instructions.
pub(crate) const BOOT_STACK: u64 = 0x8ff0;
/// bzImage: page tables, one page of each kind and four page directories.
pub(crate) const PAGE_TABLES: u64 = 0x9000;
/// The command line; up to [`COMMAND_LINE_MAX`] bytes with its zero.
pub(crate) const COMMAND_LINE: u64 = 0x2_0000;
/// Linux refuses longer ones (COMMAND_LINE_SIZE of x86).
pub(crate) const COMMAND_LINE_MAX: usize = 2048;
/// End of conventional memory.
pub(crate) const LOW_MEMORY_END: u64 = 0xa_0000;
/// ACPI tables, in the range that is searched for the RSDP (ACPI 6.5, 5.2.5.1).
pub(crate) const ACPI: Range<u64> = 0xe_0000..0xf_fff0;
/// Where a processor in real mode begins after a reset, FFFF:0000, and where Linux jumps to for one.
pub(crate) const RESET_VECTOR: u64 = 0xf_fff0;
/// RAM above the first MiB: kernels are loaded from here on.
pub(crate) const HIGH_MEMORY: u64 = 0x10_0000;

// --- I/O ports and interrupts -----------------------------------------------------------------------------------------

/// First serial port, where PCs have it.
pub(crate) const SERIAL: Range<u16> = 0x3f8..0x400;
/// Interrupt of the first serial port.
pub(crate) const SERIAL_IRQ: u32 = 4;
/// pvpanic, where QEMU has it.
pub(crate) const PANIC_PORT: u16 = 0x505;
/// ACPI sleep control, sleep status, reset: a byte each.
pub(crate) const SLEEP_CONTROL_PORT: u16 = 0x600;
/// See [`SLEEP_CONTROL_PORT`].
pub(crate) const SLEEP_STATUS_PORT: u16 = 0x601;
/// See [`SLEEP_CONTROL_PORT`].
pub(crate) const RESET_PORT: u16 = 0x602;
/// Interrupt of the generic event device (power button).
pub(crate) const EVENT_IRQ: u32 = 9;
/// Inputs of the I/O APIC that the interrupt lines of PCI functions share.
pub(crate) const PCI_LINES: Range<u32> = 16..24;
/// PCI configuration: address, and data (PCI 3.0, 3.2.2.3.2).
pub(crate) const PCI_ADDRESS_PORT: u16 = 0xcf8;
/// See [`PCI_ADDRESS_PORT`].
pub(crate) const PCI_DATA_PORT: u16 = 0xcfc;

/// Guest-physical ranges of RAM for `bytes` of it, in order, with the offset of each in the memory file.
pub(crate) fn ram(bytes: u64) -> Vec<(Range<u64>, u64)> {
    let low = bytes.min(HOLE.start);
    let mut ranges = vec![(0..low, 0)];
    if bytes > low {
        ranges.push((HOLE.end..HOLE.end + (bytes - low), low));
    }
    ranges
}

/// A piece of RAM: which part it belongs to, where it is, and its offset in that part.
pub(crate) type Piece = (usize, Range<u64>, u64);

/// The same for RAM in several parts, one after the other; a part on both sides of the hole is two pieces.
pub(crate) fn ram_in_parts(parts: &[u64]) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut start = 0;
    for (n, bytes) in parts.iter().enumerate() {
        let below = (HOLE.start.saturating_sub(start)).min(*bytes);
        if below > 0 {
            pieces.push((n, start..start + below, 0));
        }
        if *bytes > below {
            let at = (start + below).max(HOLE.start) - HOLE.start + HOLE.end;
            pieces.push((n, at..at + (bytes - below), below));
        }
        start += bytes;
    }
    pieces
}

/// Where PCI functions have their 64-bit BARs: from the end of RAM to what the processor can address, in whole GiB; empty
/// if there is no room.
pub(crate) fn pci_window_64(ram: u64, address_bits: u8) -> Range<u64> {
    let end_of_ram = self::ram(ram).last().map_or(0, |(range, _)| range.end).max(HOLE.end);
    let start = end_of_ram.next_multiple_of(1 << 30);
    let end = (1_u64 << address_bits.clamp(32, 52)).min(HYPER_TRANSPORT) & !((1 << 30) - 1);
    start..end.max(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_goes_around_the_hole() {
        assert_eq!(ram(512 << 20), [(0..512 << 20, 0)]);
        assert_eq!(ram(3 << 30), [(0..3 << 30, 0)]);
        assert_eq!(ram(5 << 30), [(0..3 << 30, 0), (4 << 30..6 << 30, 3 << 30)]);
    }

    #[test]
    fn parts_of_ram_follow_each_other_around_the_hole() {
        const GIB: u64 = 1 << 30;
        assert_eq!(ram_in_parts(&[GIB, GIB]), [(0, 0..GIB, 0), (1, GIB..2 * GIB, 0)]);
        assert_eq!(
            ram_in_parts(&[2 * GIB, 2 * GIB, GIB]),
            [
                (0, 0..2 * GIB, 0),
                (1, 2 * GIB..3 * GIB, 0),
                (1, 4 * GIB..5 * GIB, GIB),
                (2, 5 * GIB..6 * GIB, 0)
            ]
        );
        assert_eq!(ram_in_parts(&[3 * GIB, GIB]), [(0, 0..3 * GIB, 0), (1, 4 * GIB..5 * GIB, 0)]);
        for bytes in [GIB, 3 * GIB, 5 * GIB] {
            let one: Vec<_> = ram_in_parts(&[bytes]).into_iter().map(|(_, range, at)| (range, at)).collect();
            assert_eq!(one, ram(bytes));
        }
    }

    #[test]
    fn the_64_bit_window_lies_above_ram_and_within_what_is_addressable() {
        assert_eq!(pci_window_64(512 << 20, 39), 4 << 30..512 << 30);
        assert_eq!(pci_window_64(5 << 30, 48), 6 << 30..HYPER_TRANSPORT);
        assert!(pci_window_64(64 << 30, 36).is_empty());
    }
}
