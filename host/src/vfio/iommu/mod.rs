//! What translates the addresses that devices use: a container with a type 1 IOMMU, or an address space of iommufd.
//!
//! Owns which of the two an address space is made of, and asks them the same. Which memory is where is the caller's to know.

mod iommufd;
mod type1;

use std::io;
use std::ops::RangeInclusive;
use std::os::fd::BorrowedFd;
use std::path::Path;

pub(super) use iommufd::Iommufd;
pub(super) use type1::Type1;

use super::{VfioError, way};
use crate::pci::Function;

/// Memory that devices reach.
#[derive(Clone, Copy)]
pub(super) struct Mapped {
    /// In this process.
    pub(super) start: usize,
    /// Bytes.
    pub(super) len: u64,
    /// For devices.
    pub(super) iova: u64,
}

/// One of the two.
pub(super) enum Iommu {
    Type1(Type1),
    Iommufd(Iommufd),
}

impl Iommu {
    /// Whether this machine has either; its container at once where that is the only one.
    pub(super) fn there(root: &Path) -> Result<Option<Self>, VfioError> {
        if Iommufd::is_there(root) {
            return Ok(None);
        }
        Type1::open(root).map(|type1| Some(Self::Type1(type1)))
    }

    /// What `function`, the first one of an address space, goes well with: the newer one if it has a device and `/dev/iommu` is this
    /// process's to open, and where nothing else is there.
    pub(super) fn for_function(root: &Path, function: &Function) -> Result<Self, VfioError> {
        let iommufd = || Iommufd::open(root).map(Self::Iommufd);
        let refused = match way::device_of(root, function).map(|_| iommufd()) {
            Some(Ok(iommu)) => return Ok(iommu),
            Some(Err(refused)) => Some(refused),
            None => None,
        };
        match (Type1::open(root), refused) {
            (Ok(type1), _) => Ok(Self::Type1(type1)),
            (Err(VfioError::NoVfio(_)), Some(refused)) => Err(VfioError::NoIommufd(refused)),
            // A kernel with groups, and without containers.
            (Err(VfioError::NoVfio(none)), None) => iommufd().map_err(|_| VfioError::NoVfio(none)),
            (Err(error), _) => Err(error),
        }
    }

    /// What a group joins.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn for_groups(&self) -> io::Result<BorrowedFd<'_>> {
        match self {
            Self::Type1(type1) => Ok(type1.fd()),
            Self::Iommufd(iommufd) => iommufd.for_groups(),
        }
    }

    /// Devices of the first group in it may use it from here on.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn first_group(&self) -> io::Result<()> {
        match self {
            Self::Type1(type1) => type1.choose(),
            Self::Iommufd(_) => Ok(()),
        }
    }

    /// Whether it forgets what is mapped when the last device leaves.
    pub(super) fn forgets(&self) -> bool {
        matches!(self, Self::Type1(_))
    }

    /// Which addresses it translates, for the devices that are in it. None where the kernel does not tell.
    pub(super) fn ranges(&self) -> io::Result<Vec<RangeInclusive<u64>>> {
        match self {
            Self::Type1(type1) => type1.ranges(),
            Self::Iommufd(iommufd) => iommufd.ranges(),
        }
    }

    /// Makes memory reachable for its devices.
    ///
    /// # Safety
    /// The memory stays until it is unmapped, and nobody has a Rust reference to it.
    pub(super) unsafe fn map(&self, mapped: Mapped) -> io::Result<()> {
        match self {
            // SAFETY: the caller's promise.
            Self::Type1(type1) => unsafe { type1.map(mapped) },
            // SAFETY: the caller's promise.
            Self::Iommufd(iommufd) => unsafe { iommufd.map(mapped) },
        }
    }

    /// No device reaches that memory when this returns.
    pub(super) fn unmap(&self, mapped: Mapped) {
        match self {
            Self::Type1(type1) => type1.unmap(mapped),
            Self::Iommufd(iommufd) => iommufd.unmap(mapped),
        }
    }

    /// Whether what is locked counts for all processes of a user together, not for each.
    pub(super) fn counts_by_user(&self) -> bool {
        matches!(self, Self::Iommufd(_))
    }
}
