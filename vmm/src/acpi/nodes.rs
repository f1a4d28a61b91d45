//! The tables of memory nodes: what is near which (SRAT, ACPI 6.5, 5.2.16), and how far they are (SLIT, 5.2.17).

use acpi_tables::sdt::Sdt;

use super::{Machine, OEM, REVISION, TABLE};
use crate::layout;

/// The entry is valid (tables 5.63 and 5.64).
const ENABLED: u32 = 1;

/// Which node each vCPU and each piece of memory belongs to.
pub(super) fn affinities(machine: &Machine) -> Vec<u8> {
    let mut table = Sdt::new(*b"SRAT", 48, 3, OEM, TABLE, REVISION);
    // Reserved, "must be set to 1 for backward compatibility".
    table.write_u32(36, 1);
    let mut words = |kind: u8, words: &[u32]| {
        table.append_slice(&[kind, words.len() as u8 * 4 + 4, 0, 0]);
        words.iter().for_each(|word| table.append_slice(&word.to_le_bytes()));
    };
    for (node, of_node) in (0_u32..).zip(&machine.nodes) {
        let ids = of_node.vcpus.iter().filter_map(|vcpu| machine.apic_ids.get(*vcpu as usize));
        // Type 2, 24 bytes: node, x2APIC identifier, flags, clock domain, reserved.
        ids.for_each(|id| words(2, &[node, *id, ENABLED, 0, 0]));
    }
    let memory: Vec<u64> = machine.nodes.iter().map(|node| node.memory).collect();
    for (node, range, _) in layout::ram_in_parts(&memory) {
        // Type 1, 40 bytes, whose node stands in two halves around a boundary of double words.
        table.append_slice(&[1, 40]);
        table.append_slice(&(node as u32).to_le_bytes());
        table.append_slice(&[0; 2]);
        table.append_slice(&range.start.to_le_bytes());
        table.append_slice(&(range.end - range.start).to_le_bytes());
        table.append_slice(&[0; 4]);
        table.append_slice(&ENABLED.to_le_bytes());
        table.append_slice(&[0; 8]);
    }
    table.as_slice().to_vec()
}

/// How far each node is from each.
pub(super) fn distances(machine: &Machine) -> Vec<u8> {
    let mut table = Sdt::new(*b"SLIT", 36, 1, OEM, TABLE, REVISION);
    table.append_slice(&(machine.nodes.len() as u64).to_le_bytes());
    machine.nodes.iter().for_each(|node| table.append_slice(&node.distances));
    table.as_slice().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::GuestNode;

    #[test]
    fn every_vcpu_and_every_piece_of_memory_has_its_node() {
        let node = |vcpus: &[u32], distances: [u8; 2]| GuestNode {
            memory: 2 << 30,
            vcpus: vcpus.to_vec(),
            host: None,
            distances: distances.to_vec(),
            devices: false,
        };
        let machine = Machine {
            apic_ids: vec![0, 1, 4],
            address_bits: 39,
            serial: false,
            nodes: vec![node(&[2], [10, 31]), node(&[0, 1], [21, 10])],
            lines: Vec::new(),
        };
        let table = affinities(&machine);
        let word = |at: usize| u32::from_le_bytes(table[at..at + 4].try_into().unwrap());
        let long = |at: usize| u64::from_le_bytes(table[at..at + 8].try_into().unwrap());
        let vcpus: Vec<_> = (0..3).map(|n| 48 + 24 * n).map(|at| (word(at + 4), word(at + 8))).collect();
        assert_eq!(vcpus, [(0, 4), (1, 0), (1, 1)]);
        let memory: Vec<_> =
            (0..3).map(|n| 120 + 40 * n).map(|at| (word(at + 2), long(at + 8), long(at + 16))).collect();
        assert_eq!(memory, [(0, 0, 2 << 30), (1, 2 << 30, 1 << 30), (1, 4 << 30, 1 << 30)]);
        assert_eq!((table.len(), word(4) as usize), (240, 240));
        assert_eq!(distances(&machine)[36..], [2, 0, 0, 0, 0, 0, 0, 0, 10, 31, 21, 10]);
    }
}
