//! Starting an ELF kernel by its PVH entry (Xen, docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h).

use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use vm_memory::{Address, ByteValued, GuestAddress};

use super::{BootError, Entry, Initramfs, Kernel, from_start, map};
use crate::layout;
use crate::memory::GuestMemory;

/// The start information has a memory map since this version.
const WITH_MEMORY_MAP: u32 = 1;

/// Loads the kernel and what it is to find at its start.
pub(super) fn load(
    kernel: &Kernel,
    memory: &GuestMemory,
    initramfs: Option<&Initramfs>,
) -> Result<Entry, BootError> {
    let highmem = Some(GuestAddress(layout::HIGH_MEMORY));
    let loaded = Elf::load(memory.view(), None, &mut from_start(&kernel.file), highmem)
        .map_err(kernel.failed(memory))?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(BootError::NoPvh(kernel.path.clone()));
    };

    let mut modules = 0;
    if let Some(initramfs) = initramfs {
        let at = initramfs.load(memory, loaded.kernel_end, u32::MAX.into())?;
        let module =
            Plain(hvm_modlist_entry { paddr: at.start, size: at.end - at.start, ..Default::default() });
        memory.write("module list", layout::PVH_MODULES, module.as_slice())?;
        modules = 1;
    }
    let ranges = map::ranges(memory);
    let mut to = layout::PVH_MEMORY_MAP;
    for (range, kind) in &ranges {
        let entry = hvm_memmap_table_entry {
            addr: range.start,
            size: range.end - range.start,
            type_: *kind as u32,
            reserved: 0,
        };
        memory.write("memory map", to, Plain(entry).as_slice())?;
        to += size_of::<hvm_memmap_table_entry>() as u64;
    }
    let start = Plain(hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: WITH_MEMORY_MAP,
        flags: 0,
        nr_modules: modules,
        modlist_paddr: layout::PVH_MODULES,
        cmdline_paddr: layout::COMMAND_LINE,
        rsdp_paddr: layout::ACPI.start,
        memmap_paddr: layout::PVH_MEMORY_MAP,
        memmap_entries: ranges.len() as u32,
        reserved: 0,
    });
    memory.write("start information", layout::PVH_START, start.as_slice())?;
    Ok(Entry::Pvh { address: entry.raw_value() })
}

/// A structure of the interface, as the bytes that it is.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct Plain<T>(T);

// SAFETY: whole numbers in C order; linux-loader asserts the sizes at which they have no padding.
unsafe impl ByteValued for Plain<hvm_start_info> {}
// SAFETY: as above.
unsafe impl ByteValued for Plain<hvm_modlist_entry> {}
// SAFETY: as above.
unsafe impl ByteValued for Plain<hvm_memmap_table_entry> {}
