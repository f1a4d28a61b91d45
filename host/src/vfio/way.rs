//! By which of the kernel's two ways a function comes into this process: this is where it is chosen.
//!
//! The newer way is a character device of the function itself, and memory by `/dev/iommu` (CONFIG_VFIO_DEVICE_CDEV, CONFIG_IOMMUFD; Linux 6.6
//! and later); the older one is the function's group, and memory by a container. The newer one is taken where both of its files are there, and the older one
//! where they are not, or are not this process's to open.

use std::fmt;
use std::path::{Path, PathBuf};

use super::{FOLDER, IOMMU};
use crate::pci::{Function, VFIO};

/// How a function is opened, with the file for that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Way {
    /// By its own device, memory by iommufd.
    Device(PathBuf),
    /// By its IOMMU group, memory by a container.
    Group(PathBuf),
}

impl Way {
    /// How a function that is with vfio-pci would be opened on the machine below `root`, by someone who may open everything; none where it cannot be.
    pub fn of(root: &Path, function: &Function) -> Option<Self> {
        if function.driver.as_deref() != Some(VFIO) {
            return None;
        }
        let device = device_of(root, function).filter(|_| is_there(root, IOMMU) && !wants_group(function));
        device.map(Self::Device).or_else(|| function.group.map(|group| Self::Group(group_file(group))))
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device(file) => write!(f, "iommufd, {}", file.display()),
            Self::Group(file) => write!(f, "group, {}", file.display()),
        }
    }
}

/// The device of a function, if it has one.
pub(super) fn device_of(root: &Path, function: &Function) -> Option<PathBuf> {
    let file = Path::new(FOLDER).join("devices").join(function.vfio_device.as_ref()?);
    is_there(root, &file).then_some(file)
}

/// Where a group is opened.
pub(super) fn group_file(group: u32) -> PathBuf {
    Path::new(FOLDER).join(group.to_string())
}

/// Whether a function that comes without a token is opened by its group although it has a device: its virtual functions may be in use, by
/// somebody who relies on its token, and kernels before 6.17 ask only who comes by the group for that (drivers/vfio/device_cdev.c,
/// `vfio_df_check_token` is newer).
pub(super) fn wants_group(function: &Function) -> bool {
    !function.virtuals.is_empty()
}

fn is_there(root: &Path, file: impl AsRef<Path>) -> bool {
    root.join(file.as_ref().strip_prefix("/").unwrap_or(file.as_ref())).exists()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::{self, tests::Machine};

    #[test]
    fn the_device_is_the_way_where_its_file_and_the_iommus_are_there_else_the_group() {
        let machine = Machine::new();
        let bdf = machine.card("0000:01:00.0", 0x10d3, Some("vfio-pci"), Some(3));
        let way = |bdf| {
            let way = Way::of(machine.root(), &pci::find(machine.root(), bdf).unwrap());
            way.map_or_else(|| "none".to_owned(), |way| way.to_string())
        };
        assert_eq!(way(bdf), "group, /dev/vfio/3");
        machine.file("sys/bus/pci/devices/0000:01:00.0/vfio-dev/vfio5/dev", "511:5\n");
        assert_eq!(way(bdf), "group, /dev/vfio/3", "a kernel that shows it and has no devices");
        machine.file("dev/vfio/devices/vfio5", "");
        assert_eq!(way(bdf), "group, /dev/vfio/3", "no /dev/iommu");
        machine.file("dev/iommu", "");
        assert_eq!(way(bdf), "iommufd, /dev/vfio/devices/vfio5");
        // Somebody may rely on the token of its virtual functions.
        machine.file("sys/bus/pci/devices/0000:01:00.0/sriov_totalvfs", "7\n");
        machine.link("sys/bus/pci/devices/0000:01:00.0/virtfn0", "../0000:01:10.0");
        assert_eq!(way(bdf), "group, /dev/vfio/3");
        let kernels = machine.card("0000:02:00.0", 0x10d3, Some("e1000e"), Some(4));
        assert_eq!(way(kernels), "none");
    }
}
