//! A guest's memory: a part for each of its nodes, files where other processes share it, where the guest sees them, and the way to write a kernel into it.
//!
//! Owns them and their place in the guest's address space. Huge pages, memory that others share and what is to be locked or filled
//! is present before the guest starts: no access fails later for want of it. Never hands out references to the bytes: the guest changes them.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use host::memory::{MemoryError, OwnMemory, Pages, SharedMemory};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use virtio::memory::{Region, RegionError};
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::config::{Config, PageSize};
use crate::layout;

/// Why a guest has no memory.
#[derive(Debug, thiserror::Error)]
pub enum GuestMemoryError {
    /// The host has too little of it, or does not permit it.
    #[error("the guest's memory: {0}")]
    Host(#[from] MemoryError),
    /// KVM does not take it.
    #[error("KVM refuses {} MiB of guest memory at {start:#x}: {source}", .len >> 20)]
    Kvm {
        /// Guest-physical.
        start: u64,
        /// Bytes.
        len: u64,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
    /// Our own rings do not take it.
    #[error("the guest's memory: {0}")]
    Regions(#[from] RegionError),
    /// Something is to be put where there is no memory.
    #[error("{what}: {len} bytes at {address:#x} are not in the guest's {} MiB of memory; give it more `memory`", .memory >> 20)]
    Outside {
        /// What.
        what: &'static str,
        /// Guest-physical.
        address: u64,
        /// Bytes.
        len: usize,
        /// Bytes of memory.
        memory: u64,
    },
}

/// A piece of guest memory that is contiguous for the guest and in its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryRegion {
    /// Guest-physical addresses.
    pub guest: Range<u64>,
    /// Which of the guest's nodes it belongs to.
    pub node: usize,
    /// Where it begins in that one's file.
    pub file_offset: u64,
    /// Where it begins in this process.
    pub host: u64,
}

/// The memory of one guest.
pub struct GuestMemory {
    // Before `parts`: it points there.
    view: GuestMemoryMmap,
    regions: Vec<MemoryRegion>,
    parts: Vec<Part>,
    len: u64,
}

/// The memory of one of the guest's nodes.
enum Part {
    Shared(SharedMemory),
    Own(OwnMemory),
}

impl Part {
    fn new(config: &Config, bytes: u64, node: Option<u32>) -> Result<Self, MemoryError> {
        let pages = match config.pages {
            PageSize::Auto => Pages::Auto,
            PageSize::Ordinary => Pages::Ordinary,
            PageSize::Huge2M => Pages::Huge2M,
            PageSize::Huge1G => Pages::Huge1G,
        };
        let len = usize::try_from(bytes).map_err(|_| MemoryError::Size(usize::MAX))?;
        let part = match pages {
            Pages::Ordinary if !config.shares_memory() => {
                Part::Own(OwnMemory::new(len, node, config.prefault || config.lock_memory)?)
            }
            _ => {
                let memory = SharedMemory::new(len, pages, node)?;
                if pages == Pages::Auto && memory.pages() == Pages::Ordinary {
                    tracing::info!(
                        "`pages` is \"auto\": too few huge pages are free, the memory is in pages of 4 KiB"
                    );
                }
                Part::Shared(memory)
            }
        };
        if config.lock_memory {
            match &part {
                Part::Shared(memory) => memory.lock()?,
                Part::Own(memory) => memory.lock()?,
            }
        }
        Ok(part)
    }

    fn start(&self) -> u64 {
        match self {
            Part::Shared(memory) => memory.as_ptr() as u64,
            Part::Own(memory) => memory.as_ptr() as u64,
        }
    }
}

impl GuestMemory {
    /// Memory as `config` has it.
    ///
    /// # Errors
    /// The host has too little, with figures, or does not permit to lock it.
    pub fn new(config: &Config) -> Result<Self, GuestMemoryError> {
        let parts = config.nodes.iter().map(|node| Part::new(config, node.memory, node.host));
        let parts = parts.collect::<Result<Vec<_>, _>>()?;
        let bytes: Vec<u64> = config.nodes.iter().map(|node| node.memory).collect();
        let region = |(node, guest, file_offset): layout::Piece| {
            let host = parts.get(node)?.start() + file_offset;
            Some(MemoryRegion { guest, node, file_offset, host })
        };
        let regions: Vec<_> = layout::ram_in_parts(&bytes).into_iter().filter_map(region).collect();
        let mapped = regions.iter().map(map).collect::<Option<Vec<_>>>();
        let view = mapped.and_then(|regions| GuestMemoryMmap::from_regions(regions).ok());
        let view = view.ok_or(MemoryError::Size(usize::MAX))?;
        Ok(Self { view, regions, parts, len: config.memory })
    }

    /// Gives the memory to a virtual machine: from here on the guest has it.
    ///
    /// # Errors
    /// KVM refuses it.
    pub fn attach(&self, vm: &VmFd) -> Result<(), GuestMemoryError> {
        for (slot, region) in (0..).zip(&self.regions) {
            let (start, len) = (region.guest.start, region.guest.end - region.guest.start);
            let slot = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: start,
                memory_size: len,
                userspace_addr: region.host,
            };
            // SAFETY: the range is mapped as long as `self` lives, and whoever owns the machine keeps `self` longer.
            unsafe { vm.set_user_memory_region(slot) }.map_err(|source| GuestMemoryError::Kvm {
                start,
                len,
                source,
            })?;
        }
        Ok(())
    }

    /// Writes `bytes` at a guest-physical address. `what` is named if they do not fit.
    ///
    /// # Errors
    /// They do not fit.
    pub fn write(&self, what: &'static str, address: u64, bytes: &[u8]) -> Result<(), GuestMemoryError> {
        let outside = |_| GuestMemoryError::Outside { what, address, len: bytes.len(), memory: self.len };
        self.view.write_slice(bytes, GuestAddress(address)).map_err(outside)
    }

    /// The memory as rust-vmm's crates want to see it.
    pub fn view(&self) -> &GuestMemoryMmap {
        &self.view
    }

    /// Where `len` bytes at a guest-physical address are in this process; `None` unless all of them are memory, in one
    /// region.
    pub fn host_address(&self, address: u64, len: u64) -> Option<u64> {
        let end = address.checked_add(len)?;
        let region = self.regions.iter().find(|r| r.guest.contains(&address) && end <= r.guest.end)?;
        Some(region.host + (address - region.guest.start))
    }

    /// The memory as our own rings want to see it.
    ///
    /// # Errors
    /// Never: its regions do not overlap.
    pub fn for_rings(self: &Arc<Self>) -> Result<Arc<virtio::memory::GuestMemory>, RegionError> {
        let region = |region: &MemoryRegion| Region {
            guest: region.guest.start,
            user: region.host,
            size: region.guest.end - region.guest.start,
            host: region.host as *mut u8,
        };
        let regions = self.regions.iter().map(region).collect();
        // SAFETY: the ranges stay mapped as long as `self` lives, which goes along; nobody makes references to them.
        Ok(Arc::new(unsafe { virtio::memory::GuestMemory::new(regions, Box::new(self.clone())) }?))
    }

    /// All of it, to share.
    pub fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    /// The file that a region lies in, if its memory can be shared.
    pub fn file(&self, region: &MemoryRegion) -> Option<BorrowedFd<'_>> {
        match self.parts.get(region.node)? {
            Part::Shared(memory) => Some(memory.file()),
            Part::Own(_) => None,
        }
    }

    /// Bytes of memory.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Never.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The first address above the memory below 4 GiB.
    pub fn low_end(&self) -> u64 {
        self.len.min(layout::HOLE.start)
    }
}

/// A view of a region; the mapping stays with its owner.
fn map(region: &MemoryRegion) -> Option<GuestRegionMmap> {
    let len = usize::try_from(region.guest.end - region.guest.start).ok()?;
    let builder = MmapRegionBuilder::new(len)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE);
    // SAFETY: the range is mapped by the `SharedMemory` that lives beside the view and is dropped after it.
    let mapped: MmapRegion = unsafe { builder.with_raw_mmap_pointer(region.host as *mut u8) }.build().ok()?;
    GuestRegionMmap::new(mapped, GuestAddress(region.guest.start))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(keys: &str) -> GuestMemory {
        let text = format!("[vm]\nkernel = 'k'\n{keys}");
        GuestMemory::new(&Config::parse(&text, std::path::Path::new("vm.toml")).unwrap()).unwrap()
    }

    #[test]
    fn each_node_has_memory_of_its_own_and_what_lies_on_the_border_is_written_whole() {
        let memory = memory("numa = [{ memory = '2 MiB', vcpus = [0] }, { memory = '4 MiB', node = 0 }]");
        let nodes: Vec<_> =
            memory.regions().iter().map(|r| (r.node, r.guest.clone(), r.file_offset)).collect();
        assert_eq!(nodes, [(0, 0..2 << 20, 0), (1, 2 << 20..6 << 20, 0)]);
        assert_eq!((memory.len(), memory.low_end()), (6 << 20, 6 << 20));
        let border = (2 << 20) - 2;
        memory.write("test", border, b"abcd").unwrap();
        let mut bytes = [0; 4];
        memory.view().read_slice(&mut bytes, GuestAddress(border)).unwrap();
        assert_eq!(&bytes, b"abcd");
        assert!(memory.host_address(border, 4).is_none(), "no address of this process is the next one there");
        assert!(memory.write("test", (6 << 20) - 1, b"ab").is_err());
    }

    #[test]
    fn only_memory_that_others_work_on_has_a_file() {
        let own = memory("memory = '2 MiB'");
        assert!(own.regions().iter().all(|region| own.file(region).is_none()));
        let shared = memory("memory = '2 MiB'\nnet = [{ kind = 'vhost-user', socket = 's' }]");
        assert!(shared.regions().iter().all(|region| shared.file(region).is_some()));
    }
}
