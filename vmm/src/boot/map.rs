//! The memory map that a kernel is given: which addresses are RAM, which belong to ACPI or devices.

use std::ops::Range;

use crate::layout;
use crate::memory::GuestMemory;

/// What a range is for, in the numbers that e820 and PVH share (ACPI 6.5, table 15.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Kind {
    Ram = 1,
    Reserved = 2,
}

/// All ranges, ascending.
pub(super) fn ranges(memory: &GuestMemory) -> Vec<(Range<u64>, Kind)> {
    let mut ranges = vec![
        (0..layout::LOW_MEMORY_END, Kind::Ram),
        // The tables, and the reset vector behind them, must survive the kernel's own use of low memory.
        (layout::ACPI.start..layout::HIGH_MEMORY, Kind::Reserved),
        (layout::HIGH_MEMORY..memory.low_end(), Kind::Ram),
        // Linux uses ECAM only where it is reserved (PCI firmware specification 3.3, 4.1.2).
        (layout::ECAM, Kind::Reserved),
    ];
    let high = layout::ram(memory.len()).into_iter().skip(1).map(|(range, _)| (range, Kind::Ram));
    ranges.extend(high);
    ranges
}
