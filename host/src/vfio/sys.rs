//! The calls to the kernel: one function each, and the list of them.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use iommufd_bindings::{
    IOMMUFD_CMD_IOAS_ALLOC, IOMMUFD_CMD_IOAS_IOVA_RANGES, IOMMUFD_CMD_IOAS_MAP, IOMMUFD_CMD_IOAS_UNMAP,
    IOMMUFD_CMD_VFIO_IOAS, IOMMUFD_TYPE,
};
use vfio_bindings::bindings::vfio::{VFIO_BASE, VFIO_TYPE};

/// `_IO(VFIO_TYPE, VFIO_BASE + n)` of include/uapi/linux/vfio.h.
const fn request(n: u32) -> u64 {
    (VFIO_TYPE as u64) << 8 | (VFIO_BASE + n) as u64
}

/// `_IO(IOMMUFD_TYPE, n)` of include/uapi/linux/iommufd.h.
const fn of_iommufd(n: u32) -> u64 {
    (IOMMUFD_TYPE as u64) << 8 | n as u64
}

pub(super) const GET_API_VERSION: u64 = request(0);
pub(super) const CHECK_EXTENSION: u64 = request(1);
pub(super) const SET_IOMMU: u64 = request(2);
pub(super) const GROUP_GET_STATUS: u64 = request(3);
pub(super) const GROUP_SET_CONTAINER: u64 = request(4);
pub(super) const GROUP_GET_DEVICE_FD: u64 = request(6);
pub(super) const DEVICE_GET_INFO: u64 = request(7);
pub(super) const DEVICE_GET_REGION_INFO: u64 = request(8);
pub(super) const DEVICE_GET_IRQ_INFO: u64 = request(9);
pub(super) const DEVICE_SET_IRQS: u64 = request(10);
pub(super) const DEVICE_RESET: u64 = request(11);
pub(super) const DEVICE_GET_PCI_HOT_RESET_INFO: u64 = request(12);
pub(super) const DEVICE_PCI_HOT_RESET: u64 = request(13);
pub(super) const DEVICE_BIND_IOMMUFD: u64 = request(18);
pub(super) const DEVICE_ATTACH_IOMMUFD: u64 = request(19);
// Of containers; the numbers are taken twice.
pub(super) const IOMMU_GET_INFO: u64 = request(12);
pub(super) const IOMMU_MAP_DMA: u64 = request(13);
pub(super) const IOMMU_UNMAP_DMA: u64 = request(14);
// Of iommufd.
pub(super) const IOAS_ALLOC: u64 = of_iommufd(IOMMUFD_CMD_IOAS_ALLOC);
pub(super) const IOAS_IOVA_RANGES: u64 = of_iommufd(IOMMUFD_CMD_IOAS_IOVA_RANGES);
pub(super) const IOAS_MAP: u64 = of_iommufd(IOMMUFD_CMD_IOAS_MAP);
pub(super) const IOAS_UNMAP: u64 = of_iommufd(IOMMUFD_CMD_IOAS_UNMAP);
pub(super) const VFIO_IOAS: u64 = of_iommufd(IOMMUFD_CMD_VFIO_IOAS);

/// Every request that this module makes: for a filter of system calls.
pub const REQUESTS: [u64; 21] = [
    GET_API_VERSION,
    CHECK_EXTENSION,
    SET_IOMMU,
    GROUP_GET_STATUS,
    GROUP_SET_CONTAINER,
    GROUP_GET_DEVICE_FD,
    DEVICE_GET_INFO,
    DEVICE_GET_REGION_INFO,
    DEVICE_GET_IRQ_INFO,
    DEVICE_SET_IRQS,
    DEVICE_RESET,
    IOMMU_GET_INFO,
    IOMMU_MAP_DMA,
    IOMMU_UNMAP_DMA,
    DEVICE_BIND_IOMMUFD,
    DEVICE_ATTACH_IOMMUFD,
    IOAS_ALLOC,
    IOAS_IOVA_RANGES,
    IOAS_MAP,
    IOAS_UNMAP,
    VFIO_IOAS,
];

/// What of it the interrupts of an open function take.
pub const INTERRUPT_REQUESTS: [u64; 2] = [DEVICE_GET_IRQ_INFO, DEVICE_SET_IRQS];

/// A request whose argument is a number.
pub(super) fn with_number(fd: BorrowedFd<'_>, request: u64, number: u64) -> io::Result<i32> {
    // SAFETY: the requests made this way take a number, or nothing, and touch no memory of ours.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), request, number) })
}

/// A request whose argument is a structure.
///
/// # Safety
/// The kernel takes a `T` for `request`, as long as it says itself (`argsz`) where it does, and whatever it points to is valid.
pub(super) unsafe fn with<T>(fd: BorrowedFd<'_>, request: u64, argument: &mut T) -> io::Result<i32> {
    // SAFETY: the caller's promise.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(argument)) })
}

/// A request whose argument is a run of bytes.
///
/// # Safety
/// As for [`with`]; the length is where the kernel expects it, and at most that of `argument`, which is aligned as it must be.
pub(super) unsafe fn with_bytes<T>(fd: BorrowedFd<'_>, request: u64, argument: &mut [T]) -> io::Result<i32> {
    // SAFETY: the caller's promise.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), request, argument.as_mut_ptr()) })
}

fn result(value: i32) -> io::Result<i32> {
    if value < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_requests_have_the_kernels_numbers() {
        // As strace(1) shows them.
        assert_eq!((GET_API_VERSION, GROUP_GET_DEVICE_FD, IOMMU_UNMAP_DMA), (0x3b64, 0x3b6a, 0x3b72));
        assert_eq!((DEVICE_BIND_IOMMUFD, DEVICE_ATTACH_IOMMUFD), (0x3b76, 0x3b77));
        assert_eq!((IOAS_ALLOC, IOAS_MAP, VFIO_IOAS), (0x3b81, 0x3b85, 0x3b88));
    }
}
