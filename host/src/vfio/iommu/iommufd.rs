//! An address space of iommufd (Linux, Documentation/userspace-api/iommufd.rst), and the functions that are bound to it by devices of
//! their own.
//!
//! What is mapped stays mapped while no device is there. Structures come from the crate iommufd-bindings.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;

use iommufd_bindings::{
    iommu_ioas_alloc, iommu_ioas_iova_ranges, iommu_ioas_map, iommu_ioas_unmap, iommu_iova_range,
    iommu_vfio_ioas, iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA as FIXED,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE as READABLE,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE as WRITEABLE,
    iommufd_vfio_ioas_op_IOMMU_VFIO_IOAS_SET as FOR_GROUPS,
};
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_BIND_FLAG_TOKEN, vfio_device_attach_iommufd_pt, vfio_device_bind_iommufd,
};

use super::super::{IOMMU, sys};
use super::Mapped;

/// Ranges of addresses that are asked for at first, and at most.
const FEW: usize = 64;
const MANY: usize = 4096;

/// The address space.
pub(in super::super) struct Iommufd {
    file: File,
    /// Its number in the file.
    id: u32,
}

/// A structure's size, as the kernel wants it in its first field.
const fn size<T>() -> u32 {
    size_of::<T>() as u32
}

impl Iommufd {
    /// Whether the machine below `root` has it.
    pub(super) fn is_there(root: &Path) -> bool {
        root.join(IOMMU.trim_start_matches('/')).exists()
    }

    /// An empty one.
    pub(super) fn open(root: &Path) -> io::Result<Self> {
        let path = root.join(IOMMU.trim_start_matches('/'));
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let mut alloc = iommu_ioas_alloc { size: size::<iommu_ioas_alloc>(), ..Default::default() };
        // SAFETY: the structure of this request, of the size that it says.
        unsafe { sys::with(file.as_fd(), sys::IOAS_ALLOC, &mut alloc) }?;
        Ok(Self { file, id: alloc.out_ioas_id })
    }

    /// A group that joins this is in the same address space as functions that are bound by their devices.
    pub(super) fn for_groups(&self) -> io::Result<BorrowedFd<'_>> {
        let mut set = iommu_vfio_ioas {
            size: size::<iommu_vfio_ioas>(),
            ioas_id: self.id,
            op: FOR_GROUPS as u16,
            ..Default::default()
        };
        // SAFETY: the structure of this request, of the size that it says.
        unsafe { sys::with(self.file.as_fd(), sys::VFIO_IOAS, &mut set) }?;
        Ok(self.file.as_fd())
    }

    /// Makes a function, whose device `file` is, this process's, with the token that its owner set.
    ///
    /// # Errors
    /// As the kernel says: EINVAL for a token that it does not know of (before Linux 6.17) or that is not wanted, and for a function that somebody has.
    pub(in super::super) fn bind(&self, file: &File, token: Option<[u8; 16]>) -> io::Result<()> {
        let mut bind = vfio_device_bind_iommufd {
            argsz: size::<vfio_device_bind_iommufd>(),
            flags: token.map_or(0, |_| VFIO_DEVICE_BIND_FLAG_TOKEN),
            iommufd: self.file.as_raw_fd(),
            token_uuid_ptr: token.as_ref().map_or(0, |token| token.as_ptr().expose_provenance() as u64),
            ..Default::default()
        };
        // SAFETY: the structure of this request, of the size that it says; the token lives longer than the request.
        unsafe { sys::with(file.as_fd(), sys::DEVICE_BIND_IOMMUFD, &mut bind) }.map(drop)
    }

    /// Lets a function that is bound reach what is mapped, now and later, until its file is closed.
    pub(in super::super) fn attach(&self, file: &File) -> io::Result<()> {
        let mut attach = vfio_device_attach_iommufd_pt {
            // Without the number of a process's address space, which is the newer kernels'.
            argsz: std::mem::offset_of!(vfio_device_attach_iommufd_pt, pasid) as u32,
            pt_id: self.id,
            ..Default::default()
        };
        // SAFETY: the structure of this request, which is longer than it says.
        unsafe { sys::with(file.as_fd(), sys::DEVICE_ATTACH_IOMMUFD, &mut attach) }.map(drop)
    }

    pub(super) fn ranges(&self) -> io::Result<Vec<RangeInclusive<u64>>> {
        let mut found = vec![iommu_iova_range::default(); FEW];
        loop {
            let mut ask = iommu_ioas_iova_ranges {
                size: size::<iommu_ioas_iova_ranges>(),
                ioas_id: self.id,
                num_iovas: found.len() as u32,
                allowed_iovas: found.as_mut_ptr().expose_provenance() as u64,
                ..Default::default()
            };
            // SAFETY: the structure of this request, of the size that it says, and room for as many ranges as it says.
            let done = unsafe { sys::with(self.file.as_fd(), sys::IOAS_IOVA_RANGES, &mut ask) };
            let there = ask.num_iovas as usize;
            match done {
                Ok(_) => return Ok(found.iter().take(there).map(|range| range.start..=range.last).collect()),
                Err(error)
                    if error.raw_os_error() == Some(libc::EMSGSIZE)
                        && there > found.len()
                        && there <= MANY =>
                {
                    found.resize(there, iommu_iova_range::default());
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// One mapping: the kernel pins the pages where a device is there, and joins huge ones.
    ///
    /// # Safety
    /// As [`super::Iommu::map`].
    pub(super) unsafe fn map(&self, mapped: Mapped) -> io::Result<()> {
        let mut map = iommu_ioas_map {
            size: size::<iommu_ioas_map>(),
            flags: FIXED | READABLE | WRITEABLE,
            ioas_id: self.id,
            user_va: mapped.start as u64,
            length: mapped.len,
            iova: mapped.iova,
            ..Default::default()
        };
        // SAFETY: the structure of this request; the memory stays by the caller's promise.
        unsafe { sys::with(self.file.as_fd(), sys::IOAS_MAP, &mut map) }.map(drop)
    }

    pub(super) fn unmap(&self, mapped: Mapped) {
        let mut unmap = iommu_ioas_unmap {
            size: size::<iommu_ioas_unmap>(),
            ioas_id: self.id,
            iova: mapped.iova,
            length: mapped.len,
        };
        // SAFETY: the structure of this request, of the size that it says.
        // What is mapped can be unmapped; and if not, the kernel keeps the pages until the file is closed.
        let _ = unsafe { sys::with(self.file.as_fd(), sys::IOAS_UNMAP, &mut unmap) };
    }
}
