//! Starting a bzImage by its 64-bit entry (Linux, Documentation/arch/x86/boot.rst).

use linux_loader::loader::KernelLoader;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::bzimage::BzImage;
use vm_memory::{Address, ByteValued, GuestAddress};

use super::{BootError, Entry, Initramfs, Kernel, from_start, map};
use crate::layout;
use crate::memory::{GuestMemory, GuestMemoryError};

/// `type_of_loader`: a loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// `xloadflags`: there is a 64-bit entry.
const XLF_KERNEL_64: u16 = 1;
/// The first boot protocol with `xloadflags`.
const VERSION_2_12: u16 = 0x020c;
/// The 64-bit entry lies this far into the kernel.
const ENTRY_64: u64 = 0x200;
/// Page-table bits: present, writable; in a page directory also: a page of 2 MiB.
const TABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7 | TABLE;
/// Identity-mapped GiB.
const MAPPED_GIB: u64 = 4;

/// Loads the kernel and what it is to find at its start.
pub(super) fn load(
    kernel: &Kernel,
    memory: &GuestMemory,
    initramfs: Option<&Initramfs>,
    cmdline_length: usize,
) -> Result<Entry, BootError> {
    let highmem = Some(GuestAddress(layout::HIGH_MEMORY));
    let loaded = BzImage::load(memory.view(), None, &mut from_start(&kernel.file), highmem)
        .map_err(kernel.failed(memory))?;
    let mut header = loaded.setup_header.unwrap_or_default();
    let (version, xloadflags) = (header.version, header.xloadflags);
    if version < VERSION_2_12 || xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BootError::No64BitEntry { path: kernel.path.clone(), version });
    }

    let start = loaded.kernel_load.raw_value();
    // While it unpacks itself the kernel uses more memory than the file: `init_size` from where it will run.
    let (preferred, init_size, initrd_max) = (header.pref_address, header.init_size, header.initrd_addr_max);
    let end = preferred.max(start).saturating_add(init_size.into()).max(loaded.kernel_end);
    if end > memory.low_end() {
        return Err(BootError::Memory(GuestMemoryError::Outside {
            what: "the kernel, unpacked",
            address: start,
            len: usize::try_from(end - start).unwrap_or(usize::MAX),
            memory: memory.len(),
        }));
    }

    header.type_of_loader = LOADER_UNDEFINED;
    header.cmd_line_ptr = layout::COMMAND_LINE as u32;
    header.cmdline_size = cmdline_length as u32;
    if let Some(initramfs) = initramfs {
        let at = initramfs.load(memory, end, u64::from(initrd_max) + 1)?;
        // Below 4 GiB: `load` puts it below the hole.
        header.ramdisk_image = at.start as u32;
        header.ramdisk_size = (at.end - at.start) as u32;
    }
    let mut zero_page = boot_params { hdr: header, acpi_rsdp_addr: layout::ACPI.start, ..Default::default() };
    let mut entries = 0;
    let mut table = zero_page.e820_table;
    for ((range, kind), slot) in map::ranges(memory).into_iter().zip(&mut table) {
        *slot = boot_e820_entry { addr: range.start, size: range.end - range.start, r#type: kind as u32 };
        entries += 1;
    }
    zero_page.e820_table = table;
    zero_page.e820_entries = entries;
    memory.write("zero page", layout::ZERO_PAGE, zero_page.as_slice())?;
    page_tables(memory)?;
    Ok(Entry::Linux64 { address: start + ENTRY_64 })
}

/// An identity map of the first 4 GiB: one PML4, one page of pointers, four page directories of 2 MiB pages.
fn page_tables(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    let page = |n: u64| layout::PAGE_TABLES + n * 4096;
    let write = |at: u64, entry: u64| memory.write("page table", at, &entry.to_le_bytes());
    write(page(0), page(1) | TABLE)?;
    for gib in 0..MAPPED_GIB {
        write(page(1) + gib * 8, page(2 + gib) | TABLE)?;
        let directory: Vec<u8> =
            (0..512_u64).flat_map(|n| ((gib << 30 | n << 21) | LARGE_PAGE).to_le_bytes()).collect();
        memory.write("page table", page(2 + gib), &directory)?;
    }
    Ok(())
}
