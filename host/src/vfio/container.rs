//! A container: the address space that functions of any number of groups share.
//!
//! Owns the groups that are open in it and the memory that is mapped. The kernel forgets mappings when the last group leaves; they
//! are made anew when one comes back, so that memory outlives a device that is away.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::resource::{Resource, getrlimit};
use vfio_bindings::bindings::vfio::{
    VFIO_API_VERSION, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_GROUP_FLAGS_VIABLE,
    VFIO_TYPE1v2_IOMMU, vfio_group_status, vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap,
};

use super::addresses::{Addresses, ranges};
use super::device::Device;
use super::{FOLDER, VfioError, sys};
use crate::pci::{self, Bdf, Function};

/// The most that is read of what the kernel says of an IOMMU.
const INFO: usize = 4096;

/// An address space for devices.
pub struct Container {
    file: File,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    groups: BTreeMap<u32, Group>,
    mapped: Vec<Mapped>,
    /// Known once a group is here.
    addresses: Option<Addresses>,
}

/// A group that is open: a file of its own, which can be opened once.
struct Group {
    file: File,
    devices: usize,
}

/// Memory that devices reach.
#[derive(Clone, Copy)]
struct Mapped {
    start: usize,
    len: u64,
    iova: u64,
}

impl Container {
    /// An empty one.
    ///
    /// # Errors
    /// The kernel's part is not there, or another one.
    pub fn new() -> Result<Arc<Self>, VfioError> {
        Self::in_folder(Path::new(FOLDER))
    }

    /// By the files in `folder`.
    fn in_folder(folder: &Path) -> Result<Arc<Self>, VfioError> {
        let path = folder.join("vfio");
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(VfioError::NoVfio)?;
        let version = sys::with_number(file.as_fd(), sys::GET_API_VERSION, 0);
        let type1 = sys::with_number(file.as_fd(), sys::CHECK_EXTENSION, VFIO_TYPE1v2_IOMMU.into());
        if !matches!((version, type1), (Ok(v), Ok(1)) if v as u32 == VFIO_API_VERSION) {
            return Err(VfioError::NoType1);
        }
        Ok(Arc::new(Self { file, state: Mutex::default() }))
    }

    /// Opens the function at `bdf`, with a token if one is needed (of a virtual function whose physical one
    /// is with vfio-pci) or to be set (of that one), and resets it.
    ///
    /// # Errors
    /// It cannot be had; the message says why and what to do.
    pub fn open(self: &Arc<Self>, bdf: Bdf, token: Option<&str>) -> Result<Arc<Device>, VfioError> {
        let root = Path::new("/");
        let function = pci::find(root, bdf).ok_or(VfioError::Unknown(bdf))?;
        super::check(root, bdf)?;
        let group = function.group.ok_or(VfioError::NoIommu(bdf))?;
        let mut state = self.state();
        if !state.groups.contains_key(&group) {
            let file = self.join(&mut state, &function, group)?;
            state.groups.insert(group, Group { file, devices: 0 });
        }
        let Some(entry) = state.groups.get_mut(&group) else { return Err(VfioError::Empty) };
        let opened = Device::open(self.clone(), &function, group, &entry.file, token);
        match &opened {
            Ok(_) => entry.devices += 1,
            Err(_) if entry.devices == 0 => drop(state.groups.remove(&group)),
            Err(_) => {}
        }
        drop(state);
        opened.map(Arc::new)
    }

    /// Opens a group and puts it into this container.
    fn join(&self, state: &mut State, function: &Function, group: u32) -> Result<File, VfioError> {
        let bdf = function.bdf;
        let failed =
            |doing| move |source| VfioError::Kernel { what: format!("{bdf}, group {group}"), doing, source };
        let file = open_group(bdf, group)?;
        let mut status = vfio_group_status { argsz: size_of::<vfio_group_status>() as u32, flags: 0 };
        // SAFETY: the structure of this request, of the size that it says.
        unsafe { sys::with(file.as_fd(), sys::GROUP_GET_STATUS, &mut status) }
            .map_err(failed("asking for its group's state"))?;
        if status.flags & VFIO_GROUP_FLAGS_VIABLE == 0 {
            let others = function.in_the_way(Path::new("/"));
            return Err(VfioError::GroupNotViable { bdf, group, others });
        }
        let mut container = self.file.as_raw_fd();
        // SAFETY: the request takes a pointer to a descriptor.
        unsafe { sys::with(file.as_fd(), sys::GROUP_SET_CONTAINER, &mut container) }
            .map_err(failed("joining the other devices' memory"))?;
        if state.groups.is_empty() {
            sys::with_number(self.file.as_fd(), sys::SET_IOMMU, VFIO_TYPE1v2_IOMMU.into())
                .map_err(failed("choosing its IOMMU"))?;
            if state.addresses.is_none() {
                state.addresses =
                    Some(Addresses::new(self.ranges().map_err(failed("asking what its IOMMU can"))?));
            }
            for mapped in &state.mapped {
                self.map_in_iommu(*mapped).map_err(failed("mapping memory anew"))?;
            }
        }
        Ok(file)
    }

    /// The groups in this container, for KVM, which wants to know of devices that write to a machine's memory.
    pub fn groups(&self) -> Vec<File> {
        self.state().groups.values().filter_map(|group| group.file.try_clone().ok()).collect()
    }

    /// What the IOMMU translates.
    fn ranges(&self) -> io::Result<Vec<std::ops::RangeInclusive<u64>>> {
        let mut info = [0u64; INFO / 8];
        if let Some(first) = info.first_mut() {
            *first = INFO as u64;
        }
        // SAFETY: the structure of this request begins with its size, and the kernel writes no more than that.
        unsafe { sys::with_bytes(self.file.as_fd(), sys::IOMMU_GET_INFO, &mut info) }?;
        let bytes: Vec<u8> = info.iter().flat_map(|long| long.to_ne_bytes()).collect();
        Ok(ranges(&bytes))
    }

    /// Makes the `len` bytes at `start` reachable for all devices of this container, now and later; returns the address of the
    /// first. One mapping: the kernel pins the pages, and joins huge ones.
    ///
    /// # Errors
    /// No device is open, the process may not pin so much, or the kernel refuses.
    ///
    /// # Safety
    /// The memory stays mapped until [`Container::unmap`], and nobody has a Rust reference to it: devices write to it.
    pub unsafe fn map(&self, start: NonNull<u8>, len: usize) -> Result<u64, VfioError> {
        let mut guard = self.state();
        let state = &mut *guard;
        if state.groups.is_empty() {
            return Err(VfioError::Empty);
        }
        let len = len as u64;
        let Some(addresses) = &mut state.addresses else { return Err(VfioError::Empty) };
        let iova = addresses.take(len).ok_or(VfioError::NoAddresses(len))?;
        let mapped = Mapped { start: start.as_ptr().addr(), len, iova };
        let done = self.map_new(&mut state.mapped, mapped);
        if done.is_err() {
            addresses.give(iova, len);
        }
        done.map(|()| iova)
    }

    /// As [`Container::map`], at an address of the caller's choice: for a guest, whose drivers tell devices the addresses that the guest knows.
    /// A container has either such mappings or those of [`Container::map`].
    ///
    /// # Errors
    /// As [`Container::map`], or the IOMMU cannot translate that address.
    ///
    /// # Safety
    /// As [`Container::map`].
    pub unsafe fn map_at(&self, start: NonNull<u8>, len: usize, iova: u64) -> Result<(), VfioError> {
        let mut state = self.state();
        if state.groups.is_empty() {
            return Err(VfioError::Empty);
        }
        let mapped = Mapped { start: start.as_ptr().addr(), len: len as u64, iova };
        self.map_new(&mut state.mapped, mapped)
    }

    fn map_new(&self, all: &mut Vec<Mapped>, mapped: Mapped) -> Result<(), VfioError> {
        let Err(source) = self.map_in_iommu(mapped) else {
            all.push(mapped);
            return Ok(());
        };
        let (len, iova) = (mapped.len, mapped.iova);
        let limit = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(0, |(soft, _)| soft);
        // A sandbox may hide what the kernel counts.
        let pinned = locked().max(all.iter().map(|mapped| mapped.len).sum());
        // The kernel's answer to too small a limit (drivers/vfio/vfio_iommu_type1.c, vfio_pin_pages_remote).
        if source.raw_os_error() == Some(libc::ENOMEM) && limit < pinned.saturating_add(len) {
            return Err(VfioError::Memlock { needed: pinned.saturating_add(len), limit });
        }
        Err(VfioError::Kernel {
            what: format!("{len} bytes at {iova:#x}"),
            doing: "mapping them for devices",
            source,
        })
    }

    fn map_in_iommu(&self, mapped: Mapped) -> io::Result<()> {
        let mut map = vfio_iommu_type1_dma_map {
            argsz: size_of::<vfio_iommu_type1_dma_map>() as u32,
            flags: VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
            vaddr: mapped.start as u64,
            iova: mapped.iova,
            size: mapped.len,
        };
        // SAFETY: the structure of this request; the memory stays by the promise of `map`'s caller.
        unsafe { sys::with(self.file.as_fd(), sys::IOMMU_MAP_DMA, &mut map) }.map(drop)
    }

    /// Takes away what [`Container::map`] gave: no device reaches it when this returns.
    pub fn unmap(&self, iova: u64) {
        let mut state = self.state();
        let Some(at) = state.mapped.iter().position(|mapped| mapped.iova == iova) else { return };
        let Mapped { len, .. } = state.mapped.swap_remove(at);
        if !state.groups.is_empty() {
            let mut unmap = vfio_iommu_type1_dma_unmap {
                argsz: size_of::<vfio_iommu_type1_dma_unmap>() as u32,
                iova,
                size: len,
                ..vfio_iommu_type1_dma_unmap::default()
            };
            // SAFETY: the structure of this request, of the size that it says.
            // What is mapped can be unmapped; and if not, the kernel keeps the pages until the container goes.
            let _ = unsafe { sys::with(self.file.as_fd(), sys::IOMMU_UNMAP_DMA, &mut unmap) };
        }
        if let Some(addresses) = &mut state.addresses {
            addresses.give(iova, len);
        }
    }

    /// A device of `group` is closed.
    pub(super) fn leave(&self, group: u32) {
        let mut state = self.state();
        if let Some(entry) = state.groups.get_mut(&group) {
            entry.devices = entry.devices.saturating_sub(1);
            if entry.devices == 0 {
                state.groups.remove(&group);
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Opens a group, which only one process can at a time.
pub(super) fn open_group(bdf: Bdf, group: u32) -> Result<File, VfioError> {
    let path = PathBuf::from(FOLDER).join(group.to_string());
    OpenOptions::new().read(true).write(true).open(path).map_err(|source| match source.raw_os_error() {
        Some(libc::EBUSY) => VfioError::Busy { bdf, group },
        Some(libc::EACCES | libc::EPERM) => VfioError::Forbidden { bdf, group },
        _ => VfioError::Kernel { what: format!("{bdf}, group {group}"), doing: "opening its group", source },
    })
}

/// Bytes that this process has locked in memory, by mlock(2) or for devices: the kernel holds their sum against the limit.
fn locked() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmLck:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(folder: &Path) -> String {
        Container::in_folder(folder).err().unwrap().to_string()
    }

    #[test]
    fn a_machine_whose_kernel_lacks_a_part_is_told_which_modules_to_load() {
        let folder = tempfile::tempdir().unwrap();
        let none = refused(folder.path());
        assert!(none.contains("has no /dev/vfio/vfio (No such file or directory"), "{none}");
        assert!(none.ends_with("modprobe vfio-pci vfio_iommu_type1"), "{none}");
        // A file that answers no such question.
        std::fs::write(folder.path().join("vfio"), "").unwrap();
        assert!(
            refused(folder.path())
                .ends_with("knows no IOMMU of type 1, version 2: modprobe vfio_iommu_type1")
        );
    }
}
