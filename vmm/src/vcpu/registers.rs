//! The registers that the first vCPU starts with, as each boot protocol wants them.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use crate::boot::Entry;
use crate::layout;
use crate::memory::{GuestMemory, GuestMemoryError};

/// Selectors of the code and data segments (`__BOOT_CS`, `__BOOT_DS`; Linux, Documentation/arch/x86/boot.rst).
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

/// Control registers and EFER (Intel SDM volume 3, 2.5; 2.2.1).
const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 is always set.
const RFLAGS: u64 = 2;

/// IA32_MISC_ENABLE with fast strings; IA32_MTRR_DEF_TYPE: MTRRs on, all memory write-back (Intel SDM volume 4, table 2-2).
const MISC_ENABLE: (u32, u64) = (0x1a0, 1);
const MTRR_DEF_TYPE: (u32, u64) = (0x2ff, 1 << 11 | 6);

/// Model-specific registers that every vCPU starts with.
pub(crate) fn set_model_specific(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    for (index, data) in [MISC_ENABLE, MTRR_DEF_TYPE] {
        let entry = kvm_msr_entry { index, data, ..Default::default() };
        // A single entry always fits. A processor without the register starts without it, as it would on a board.
        if let Ok(msrs) = Msrs::from_entries(&[entry]) {
            vcpu.set_msrs(&msrs)?;
        }
    }
    Ok(())
}

/// Puts the first vCPU at the kernel's entry.
pub(crate) fn set_entry(vcpu: &VcpuFd, entry: Entry) -> Result<(), kvm_ioctls::Error> {
    let long = matches!(entry, Entry::Linux64 { .. });
    let mut special = vcpu.get_sregs()?;
    special.cs = segment(CODE, 0xb, long);
    let data = segment(DATA, 0x3, false);
    (special.ds, special.es, special.fs, special.gs, special.ss) = (data, data, data, data, data);
    special.tr = kvm_segment { selector: TASK, limit: 0x67, type_: 0xb, present: 1, ..Default::default() };
    special.gdt.base = layout::GDT;
    special.gdt.limit = (DESCRIPTORS.len() * 8 - 1) as u16;
    special.cr0 = CR0_PE | CR0_ET;
    let mut registers = kvm_regs { rflags: RFLAGS, ..Default::default() };
    match entry {
        Entry::Pvh { address } => {
            registers.rip = address;
            registers.rbx = layout::PVH_START;
        }
        Entry::Linux64 { address } => {
            special.cr0 |= CR0_PG;
            special.cr3 = layout::PAGE_TABLES;
            special.cr4 |= CR4_PAE;
            special.efer |= EFER_LME | EFER_LMA;
            registers.rip = address;
            registers.rsi = layout::ZERO_PAGE;
            registers.rsp = layout::BOOT_STACK;
        }
    }
    vcpu.set_sregs(&special)?;
    vcpu.set_regs(&registers)
}

/// A flat segment of 4 GiB; `long`: 64-bit code.
fn segment(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: (!long).into(),
        s: 1,
        l: long.into(),
        g: 1,
        ..Default::default()
    }
}

/// The same segments as descriptors in memory, for a kernel that reloads them: null, null, code, data, task (Intel SDM
/// volume 3, 3.4.5).
const DESCRIPTORS: [u64; 5] = [0, 0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067];
/// The code descriptor's L and D bits: 64-bit code has the one, 32-bit code the other.
const LONG: u64 = 1 << 53;
const WIDE: u64 = 1 << 54;

/// Puts the descriptor table into memory.
pub(crate) fn write_descriptors(memory: &GuestMemory, entry: Entry) -> Result<(), GuestMemoryError> {
    let mut table = DESCRIPTORS;
    if matches!(entry, Entry::Linux64 { .. }) {
        table[usize::from(CODE) / 8] = table[usize::from(CODE) / 8] & !WIDE | LONG;
    }
    let bytes: Vec<u8> = table.into_iter().flat_map(u64::to_le_bytes).collect();
    memory.write("descriptor table", layout::GDT, &bytes)
}
