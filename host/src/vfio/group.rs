//! The older way: a group of functions, opened as one file, and its functions out of that.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd};
use std::path::Path;
use std::sync::Arc;

use vfio_bindings::bindings::vfio::{VFIO_GROUP_FLAGS_VIABLE, vfio_group_status};

use super::refusal::{busy, forbidden, refusal};
use super::{VfioError, sys, way};
use crate::pci::Function;

/// A group that is open: a file of its own, which can be opened once.
pub(super) struct Group {
    pub(super) file: Arc<File>,
    /// Functions that were opened out of it.
    pub(super) devices: usize,
}

impl Group {
    /// Opens the group of `function`, which only one process can at a time, and makes sure that all of it can be used.
    pub(super) fn open(function: &Function, group: u32) -> Result<Self, VfioError> {
        let file = open(function, group)?;
        let mut status = vfio_group_status { argsz: size_of::<vfio_group_status>() as u32, flags: 0 };
        // SAFETY: the structure of this request, of the size that it says.
        unsafe { sys::with(file.as_fd(), sys::GROUP_GET_STATUS, &mut status) }.map_err(|source| {
            VfioError::Kernel { what: named(function, group), doing: "asking for its group's state", source }
        })?;
        if status.flags & VFIO_GROUP_FLAGS_VIABLE == 0 {
            let others = function.in_the_way(Path::new("/"));
            return Err(VfioError::GroupNotViable { bdf: function.bdf, group, others });
        }
        Ok(Self { file: Arc::new(file), devices: 0 })
    }

    /// Puts it into an address space: a container, or iommufd.
    pub(super) fn join(&self, space: BorrowedFd<'_>) -> std::io::Result<()> {
        let mut space = std::os::fd::AsRawFd::as_raw_fd(&space);
        // SAFETY: the request takes a pointer to a descriptor.
        unsafe { sys::with(self.file.as_fd(), sys::GROUP_SET_CONTAINER, &mut space) }.map(drop)
    }

    /// Opens a function of it.
    pub(super) fn function(
        &self,
        function: &Function,
        group: u32,
        token: Option<&str>,
    ) -> Result<File, VfioError> {
        let bdf = function.bdf;
        // The name, and the token behind it (vfio_pci_core_match).
        let mut name = match token {
            Some(token) => format!("{bdf} vf_token={token}\0"),
            None => format!("{bdf}\0"),
        }
        .into_bytes();
        // SAFETY: the request takes a text that ends with a zero.
        let opened = unsafe { sys::with_bytes(self.file.as_fd(), sys::GROUP_GET_DEVICE_FD, &mut name) };
        let fd = opened.map_err(|source| refusal(source, function, group, token.is_some()))?;
        // SAFETY: the kernel made this descriptor for us just now.
        Ok(unsafe { File::from_raw_fd(fd) })
    }
}

/// Opens a group's file.
pub(super) fn open(function: &Function, group: u32) -> Result<File, VfioError> {
    let opened = OpenOptions::new().read(true).write(true).open(way::group_file(group));
    opened.map_err(|source| match source.raw_os_error() {
        Some(libc::EBUSY) => busy(function, group),
        Some(libc::EACCES | libc::EPERM) => forbidden(function, group),
        _ => VfioError::Kernel { what: named(function, group), doing: "opening its group", source },
    })
}

/// A function and its group, for messages.
pub(super) fn named(function: &Function, group: u32) -> String {
    format!("{}, group {group}", function.bdf)
}
