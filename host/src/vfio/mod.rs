//! PCI functions in the hands of this process: VFIO, by devices of their own and iommufd, or by groups and a container with a type 1
//! IOMMU; [`Way`] is which of them.
//!
//! Owns how a function is opened, reset, mapped and given back, and what each refusal means ([`VfioError`]). Knows no device and
//! no driver. [`Container`] is an address space for memory; [`Device`] is a function opened in one.
//!
//! The kernel's side is Documentation/driver-api/vfio.rst, Documentation/userspace-api/iommufd.rst and include/uapi/linux/{vfio,iommufd}.h of
//! Linux 6.12. Structures and numbers come from the crates vfio-bindings and iommufd-bindings; the calls are made here, as vfio-ioctls knows no
//! tokens of virtual functions and shares no container among functions of one group that come and go, and iommufd-ioctls maps nothing but files.
//!
//! When the process ends, however it ends, the kernel turns interrupts and bus mastering off and resets the function.

mod addresses;
mod container;
mod device;
mod faults;
mod group;
mod interrupts;
mod iommu;
mod itself;
#[cfg(test)]
mod real;
mod refusal;
mod regions;
mod reset;
mod sys;
mod way;

use std::io;
use std::path::Path;

pub use container::Container;
pub use device::{Device, Region};
pub use faults::{Fault, Faults, LOG};
pub use interrupts::Interrupt;
pub use regions::RegionInfo;
pub use sys::{INTERRUPT_REQUESTS, REQUESTS};
pub use way::Way;

use crate::pci::{self, Bdf, VFIO, listed};

/// Where VFIO's files are.
pub const FOLDER: &str = "/dev/vfio";

/// Where iommufd is.
pub const IOMMU: &str = "/dev/iommu";

/// All that is opened to have a function.
pub const FILES: [&str; 2] = [FOLDER, IOMMU];

/// Why a function cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum VfioError {
    /// Not there.
    #[error("there is no PCI function {0}; `cableway nic list` shows what there is")]
    Unknown(Bdf),
    /// No IOMMU protects memory from it.
    #[error(
        "{0} is in no IOMMU group: switch the IOMMU on (VT-d or AMD-Vi in the firmware's settings; `intel_iommu=on` on the \
         kernel's command line for Intel)"
    )]
    NoIommu(Bdf),
    /// The kernel's part is not there.
    #[error("this machine has no {FOLDER}/vfio ({0}): modprobe vfio-pci vfio_iommu_type1")]
    NoVfio(io::Error),
    /// The kernel's part is another one.
    #[error("{FOLDER}/vfio knows no IOMMU of type 1, version 2: modprobe vfio_iommu_type1")]
    NoType1,
    /// Iommufd is all that there is, and this process may not have it.
    #[error(
        "{IOMMU} cannot be opened ({0}), and this machine has no {FOLDER}/vfio: chown {IOMMU} to this process's user"
    )]
    NoIommufd(io::Error),
    /// The IOMMU does not tell interrupts of one device from those of others.
    #[error(
        "{0}: its interrupts cannot be told from other devices' (no interrupt remapping): switch that on in the firmware's settings, or, where \
         whoever uses the device is trusted, echo 1 > /sys/module/iommufd/parameters/allow_unsafe_interrupts"
    )]
    Interrupts(Bdf),
    /// It has another driver.
    #[error("{bdf} is not bound to vfio-pci ({}): cableway nic bind {bdf}", .driver.as_deref().map_or("it has no driver".to_owned(), |d| format!("its driver is {d}")))]
    NotBound {
        /// The function.
        bdf: Bdf,
        /// Its driver.
        driver: Option<String>,
    },
    /// Others of the group are with the kernel.
    #[error(
        "{bdf}: IOMMU group {group} also holds {}, which the kernel drives; bind them too: cableway nic bind {}",
        listed(others),
        listed(others)
    )]
    GroupNotViable {
        /// The function.
        bdf: Bdf,
        /// Its group.
        group: u32,
        /// Those in the way.
        others: Vec<Bdf>,
    },
    /// Another process has it.
    #[error("{bdf} is in use: another process has {} (fuser {} shows which)", files.join(" or "), files.join(" "))]
    Busy {
        /// The function.
        bdf: Bdf,
        /// What it is opened by.
        files: Vec<String>,
    },
    /// This process may not have it.
    #[error("{bdf}: {} is not permitted to this process: chown it to its user", files.join(" or "))]
    Forbidden {
        /// The function.
        bdf: Bdf,
        /// What it is opened by.
        files: Vec<String>,
    },
    /// A virtual function whose physical one is also with vfio-pci.
    #[error(
        "{bdf} is a virtual function of {physical}, which is with vfio-pci: give the token that the user of {physical} set, \
         as in `vf_token = \"2ab74924-c335-45f4-9b16-8569e5b08258\"`"
    )]
    NoToken {
        /// The function.
        bdf: Bdf,
        /// The physical function.
        physical: Bdf,
    },
    /// The same, with a token that is not that of the physical one.
    #[error(
        "{bdf}: the token is not the one that the user of its physical function {physical} set, or nobody has opened {physical} \
         yet: give both the same `vf_token`, and start the user of {physical}"
    )]
    WrongToken {
        /// The function.
        bdf: Bdf,
        /// The physical function.
        physical: Bdf,
    },
    /// A physical function whose virtual ones were opened with another token, or none was given.
    #[error(
        "virtual functions of {0} are in use, with a token that is not the one given: give the `vf_token` with which {0} was \
         opened before, or end their users first"
    )]
    PhysicalToken(Bdf),
    /// A token where none belongs.
    #[error(
        "{0} takes no token: it is no virtual function whose physical one is with vfio-pci, and has none of its own; take \
         `vf_token` out"
    )]
    TokenUnwanted(Bdf),
    /// The process may pin too little memory.
    #[error(
        "cannot pin {} MiB of memory for devices, the limit is {} MiB: ulimit -l {}, or LimitMEMLOCK={}M in the service's unit",
        .needed.div_ceil(1 << 20), .limit >> 20, .needed.div_ceil(1 << 10), .needed.div_ceil(1 << 20)
    )]
    Memlock {
        /// Bytes, with those that are pinned already.
        needed: u64,
        /// RLIMIT_MEMLOCK, bytes.
        limit: u64,
    },
    /// The same, where what counts is all that the user's processes pin together.
    #[error(
        "cannot pin {} MiB of memory for devices beside what other processes of this user pin, the limit of all is {} MiB: raise it (ulimit -l, or \
         LimitMEMLOCK= in the service's unit)",
        .needed.div_ceil(1 << 20), .limit >> 20
    )]
    MemlockOfUser {
        /// Bytes, with those that this process has pinned already.
        needed: u64,
        /// RLIMIT_MEMLOCK, bytes.
        limit: u64,
    },
    /// The IOMMU has no place for so much.
    #[error("the IOMMU has no {0} bytes of addresses left for devices")]
    NoAddresses(u64),
    /// No function is open.
    #[error("memory cannot be mapped before a device is open")]
    Empty,
    /// A region that cannot be reached by loads and stores.
    #[error(
        "{bdf}: memory region {index} cannot be mapped (it is not there, or shares a page with interrupt vectors)"
    )]
    Region {
        /// The function.
        bdf: Bdf,
        /// Number of the region.
        index: u32,
    },
    /// The kernel refused a step.
    #[error("{what}: {doing}: {source}")]
    Kernel {
        /// The function or the container.
        what: String,
        /// What was being done.
        doing: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

impl VfioError {
    /// Whether it may be otherwise in a moment: a function whose former user is just ending, or that is just being bound, or whose
    /// physical function is not open yet.
    pub fn may_pass(&self) -> bool {
        matches!(
            self,
            Self::Unknown(_)
                | Self::NotBound { .. }
                | Self::GroupNotViable { .. }
                | Self::Busy { .. }
                | Self::WrongToken { .. }
                | Self::PhysicalToken(_)
        )
    }
}

/// Whether the function at `bdf` can be opened, as far as can be told without doing it.
///
/// # Errors
/// It cannot, and why.
pub fn check(root: &Path, bdf: Bdf) -> Result<(), VfioError> {
    let function = pci::find(root, bdf).ok_or(VfioError::Unknown(bdf))?;
    let group = function.group.ok_or(VfioError::NoIommu(bdf))?;
    if function.driver.as_deref() != Some(VFIO) {
        return Err(VfioError::NotBound { bdf, driver: function.driver });
    }
    let others = function.in_the_way(root);
    if !others.is_empty() {
        return Err(VfioError::GroupNotViable { bdf, group, others });
    }
    Ok(())
}

/// Whether it can be opened now, which [`check`] cannot see: another process may have it, or this one may not.
///
/// # Errors
/// It cannot, and why.
pub fn try_open(root: &Path, bdf: Bdf) -> Result<(), VfioError> {
    check(root, bdf)?;
    let function = pci::find(root, bdf).ok_or(VfioError::Unknown(bdf))?;
    let group = function.group.ok_or(VfioError::NoIommu(bdf))?;
    container::try_open(root, &function, group)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::tests::Machine;

    #[test]
    fn a_limit_that_is_too_small_is_told_with_the_number_and_the_command() {
        let text = VfioError::Memlock { needed: (64 << 20) + 1, limit: 8 << 20 }.to_string();
        assert_eq!(
            text,
            "cannot pin 65 MiB of memory for devices, the limit is 8 MiB: ulimit -l 65537, or LimitMEMLOCK=65M in the service's unit"
        );
    }

    #[test]
    fn a_function_that_cannot_be_opened_is_told_why_and_what_to_do() {
        let machine = Machine::new();
        let card = |bdf, driver, group| machine.card(bdf, 0x10d3, driver, group);
        let ours = card("0000:01:00.0", Some("vfio-pci"), Some(3));
        assert!(check(machine.root(), ours).is_ok());
        let kernels = card("0000:02:00.0", Some("e1000e"), Some(4));
        let nobodys = card("0000:03:00.0", None, Some(5));
        let bare = card("0000:04:00.0", Some("vfio-pci"), None);
        let together = card("0000:05:00.0", Some("vfio-pci"), Some(6));
        card("0000:05:00.1", Some("e1000e"), Some(6));
        card("0000:05:00.2", None, Some(6));
        for (bdf, wanted) in [
            (
                "0000:09:00.0".parse().unwrap(),
                "there is no PCI function 0000:09:00.0; `cableway nic list` shows",
            ),
            (kernels, "not bound to vfio-pci (its driver is e1000e): cableway nic bind 0000:02:00.0"),
            (nobodys, "not bound to vfio-pci (it has no driver): cableway nic bind 0000:03:00.0"),
            (bare, "0000:04:00.0 is in no IOMMU group: switch the IOMMU on"),
            (
                together,
                "IOMMU group 6 also holds 0000:05:00.1, which the kernel drives; bind them too: cableway nic bind 0000:05:00.1",
            ),
        ] {
            let text = check(machine.root(), bdf).unwrap_err().to_string();
            assert!(text.contains(wanted), "{text}");
        }
    }
}
