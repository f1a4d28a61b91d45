//! A container with a type 1 IOMMU (Linux, Documentation/driver-api/vfio.rst): what groups share.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use vfio_bindings::bindings::vfio::{
    VFIO_API_VERSION, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_TYPE1v2_IOMMU,
    vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap,
};

use super::super::addresses::ranges;
use super::super::{VfioError, sys};
use super::Mapped;

/// The most that is read of what the kernel says of an IOMMU.
const INFO: usize = 4096;

/// The container.
pub(in super::super) struct Type1(File);

impl Type1 {
    /// An empty one, of the machine below `root`.
    pub(super) fn open(root: &Path) -> Result<Self, VfioError> {
        let path = root.join("dev/vfio/vfio");
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(VfioError::NoVfio)?;
        let version = sys::with_number(file.as_fd(), sys::GET_API_VERSION, 0);
        let type1 = sys::with_number(file.as_fd(), sys::CHECK_EXTENSION, VFIO_TYPE1v2_IOMMU.into());
        if !matches!((version, type1), (Ok(v), Ok(1)) if v as u32 == VFIO_API_VERSION) {
            return Err(VfioError::NoType1);
        }
        Ok(Self(file))
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Chooses the IOMMU, which takes a group that is there.
    pub(super) fn choose(&self) -> io::Result<()> {
        sys::with_number(self.fd(), sys::SET_IOMMU, VFIO_TYPE1v2_IOMMU.into()).map(drop)
    }

    pub(super) fn ranges(&self) -> io::Result<Vec<RangeInclusive<u64>>> {
        let mut info = [0u64; INFO / 8];
        if let Some(first) = info.first_mut() {
            *first = INFO as u64;
        }
        // SAFETY: the structure of this request begins with its size, and the kernel writes no more than that.
        unsafe { sys::with_bytes(self.fd(), sys::IOMMU_GET_INFO, &mut info) }?;
        let bytes: Vec<u8> = info.iter().flat_map(|long| long.to_ne_bytes()).collect();
        Ok(ranges(&bytes))
    }

    /// One mapping: the kernel pins the pages, and joins huge ones.
    ///
    /// # Safety
    /// As [`super::Iommu::map`].
    pub(super) unsafe fn map(&self, mapped: Mapped) -> io::Result<()> {
        let mut map = vfio_iommu_type1_dma_map {
            argsz: size_of::<vfio_iommu_type1_dma_map>() as u32,
            flags: VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
            vaddr: mapped.start as u64,
            iova: mapped.iova,
            size: mapped.len,
        };
        // SAFETY: the structure of this request; the memory stays by the caller's promise.
        unsafe { sys::with(self.fd(), sys::IOMMU_MAP_DMA, &mut map) }.map(drop)
    }

    pub(super) fn unmap(&self, mapped: Mapped) {
        let mut unmap = vfio_iommu_type1_dma_unmap {
            argsz: size_of::<vfio_iommu_type1_dma_unmap>() as u32,
            iova: mapped.iova,
            size: mapped.len,
            ..vfio_iommu_type1_dma_unmap::default()
        };
        // SAFETY: the structure of this request, of the size that it says.
        // What is mapped can be unmapped; and if not, the kernel keeps the pages until the container goes.
        let _ = unsafe { sys::with(self.fd(), sys::IOMMU_UNMAP_DMA, &mut unmap) };
    }
}
