//! PCI functions as the kernel lists them in `/sys/bus/pci`: what they are, who drives them, which IOMMU group they are in.
//!
//! Reads only, below a root that the caller gives; what changes a function's driver is in [`bind`]. Knows no device: which of
//! them can be driven is for who has drivers.

pub mod bind;
pub mod vf;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The driver that hands a function to a process.
pub const VFIO: &str = "vfio-pci";

/// The kernel's drivers of bridges and of nothing, which do not keep a group from being handed out (Linux,
/// Documentation/driver-api/vfio.rst: they let nobody map memory for DMA).
const HARMLESS: &[&str] = &["pcieport", "pci-stub"];

/// Where a PCI function is: domain, bus, device, function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bdf {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

impl Bdf {
    /// The address so many functions further on: of the next buses, too (PCI Express 6.0, 9.2.1.2).
    fn further(self, by: u16) -> Option<Self> {
        let here = u16::from(self.bus) << 8 | u16::from(self.device) << 3 | u16::from(self.function);
        let [bus, place] = here.checked_add(by)?.to_be_bytes();
        Some(Self { bus, device: place >> 3, function: place & 7, ..self })
    }
}

/// Text that is not the address of a PCI function.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no PCI address such as 0000:01:00.0; `cableway nic list` shows them")]
pub struct NotABdf(pub String);

impl FromStr for Bdf {
    type Err = NotABdf;

    /// As `lspci` prints it; the domain may be left out, and is 0 then.
    fn from_str(text: &str) -> Result<Self, NotABdf> {
        let wrong = || NotABdf(text.to_owned());
        let hex = |digits: &str, most: u32, widest: usize| {
            let plain = digits.bytes().all(|b| b.is_ascii_hexdigit()) && (1..=widest).contains(&digits.len());
            let value = u32::from_str_radix(digits, 16).ok().filter(|value| plain && *value <= most);
            value.ok_or_else(wrong)
        };
        let (place, function) = text.rsplit_once('.').ok_or_else(wrong)?;
        let (place, device) = place.rsplit_once(':').ok_or_else(wrong)?;
        let (domain, bus) = place.rsplit_once(':').unwrap_or(("0", place));
        Ok(Self {
            domain: hex(domain, u32::MAX, 8)?,
            bus: hex(bus, 0xff, 2)? as u8,
            device: hex(device, 0x1f, 2)? as u8,
            function: hex(function, 7, 1)? as u8,
        })
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{}", self.domain, self.bus, self.device, self.function)
    }
}

/// Addresses, one behind the other.
pub fn listed(functions: &[Bdf]) -> String {
    functions.iter().map(Bdf::to_string).collect::<Vec<_>>().join(" ")
}

/// A PCI function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Where it is.
    pub bdf: Bdf,
    /// Who made it.
    pub vendor: u16,
    /// Which of the vendor's.
    pub device: u16,
    /// What it is: base class, subclass, programming interface (PCI Code and ID Assignment 1.11, section 1).
    pub class: u32,
    /// The driver that has it.
    pub driver: Option<String>,
    /// Its memory node, where the firmware says.
    pub node: Option<u32>,
    /// Its IOMMU group; none on a machine without IOMMU.
    pub group: Option<u32>,
    /// The others of its group.
    pub companions: Vec<Bdf>,
    /// Its own device for user space (`vfio0`), while vfio-pci has it and the kernel makes such.
    pub vfio_device: Option<String>,
    /// The kernel's network interfaces on it.
    pub interfaces: Vec<String>,
    /// The physical function that it is a virtual one of.
    pub physical: Option<Bdf>,
    /// Its virtual functions, in order.
    pub virtuals: Vec<Bdf>,
    /// How many of these it could have; none if it cannot have any.
    pub most_virtuals: Option<u16>,
    /// How far from it the first of them is, and each from the one before it, where the kernel says (PCI Express 6.0, 9.3.3.9 and
    /// 9.3.3.10).
    pub virtual_distances: Option<(u16, u16)>,
}

impl Function {
    /// Whether it is a network card (base class 2).
    pub fn is_network(&self) -> bool {
        self.class >> 16 == 2
    }

    /// Vendor in the low half, device in the high half: as in configuration space.
    pub fn id(&self) -> u32 {
        u32::from(self.device) << 16 | u32::from(self.vendor)
    }

    /// Where its virtual function `number` is, or will be when it is made.
    pub fn virtual_at(&self, number: u16) -> Option<Bdf> {
        if number >= self.most_virtuals? {
            return None;
        }
        let (first, apart) = self.virtual_distances?;
        let at = number.checked_mul(apart)?.checked_add(first)?;
        self.virtuals.get(usize::from(number)).copied().or_else(|| self.bdf.further(at))
    }

    /// Those of its group that keep it from being handed to a process, as they have a driver of the kernel's.
    pub fn in_the_way(&self, root: &Path) -> Vec<Bdf> {
        let kept = |bdf: &&Bdf| {
            let driver = link_name(&folder(root, **bdf).join("driver"));
            driver.is_some_and(|driver| driver != VFIO && !HARMLESS.contains(&&*driver))
        };
        self.companions.iter().filter(kept).copied().collect()
    }
}

/// Where the kernel describes a function.
pub fn folder(root: &Path, bdf: Bdf) -> PathBuf {
    root.join("sys/bus/pci/devices").join(bdf.to_string())
}

/// The function at `bdf`, if there is one.
pub fn find(root: &Path, bdf: Bdf) -> Option<Function> {
    let folder = folder(root, bdf);
    let hex = |file: &str| {
        let text = fs::read_to_string(folder.join(file)).ok()?;
        u32::from_str_radix(text.trim().strip_prefix("0x")?, 16).ok()
    };
    let number = |file: &str| fs::read_to_string(folder.join(file)).ok()?.trim().parse::<i32>().ok();
    let link_bdf = |path: &Path| link_name(path)?.parse::<Bdf>().ok();
    let count = |file: &str| number(file).and_then(|n| u16::try_from(n).ok()).filter(|n| *n > 0);
    let most_virtuals = count("sriov_totalvfs");
    Some(Function {
        bdf,
        vendor: hex("vendor")? as u16,
        device: hex("device")? as u16,
        class: hex("class")?,
        driver: link_name(&folder.join("driver")),
        // -1: the firmware does not say.
        node: number("numa_node").and_then(|n| u32::try_from(n).ok()),
        group: link_name(&folder.join("iommu_group")).and_then(|name| name.parse().ok()),
        companions: names_in(&folder.join("iommu_group/devices")).filter(|other| *other != bdf).collect(),
        vfio_device: entries(&folder.join("vfio-dev")).find(|name| name.starts_with("vfio")),
        interfaces: interfaces(&folder),
        physical: link_bdf(&folder.join("physfn")),
        virtuals: (0..most_virtuals.unwrap_or(0))
            .map_while(|n| link_bdf(&folder.join(format!("virtfn{n}"))))
            .collect(),
        most_virtuals,
        virtual_distances: count("sriov_offset")
            .zip(number("sriov_stride").and_then(|n| u16::try_from(n).ok())),
    })
}

/// All PCI functions, in order of their addresses.
pub fn list(root: &Path) -> Vec<Function> {
    names_in(&root.join("sys/bus/pci/devices")).filter_map(|bdf| find(root, bdf)).collect()
}

/// The function whose network interface is called `name`.
pub fn of_interface(root: &Path, name: &str) -> Option<Bdf> {
    link_name(&root.join("sys/class/net").join(name).join("device"))?.parse().ok()
}

/// The network interfaces on a function, in order; those of a virtio device hang below a folder of their own (`virtio0`).
fn interfaces(folder: &Path) -> Vec<String> {
    let below =
        entries(folder).filter(|name| name.starts_with("virtio")).map(|name| folder.join(name).join("net"));
    let folders = std::iter::once(folder.join("net")).chain(below);
    let mut names: Vec<String> = folders.flat_map(|folder| entries(&folder)).collect();
    names.sort_unstable();
    names
}

/// Whether an interface has a link; unknown while it is switched off.
pub fn has_link(root: &Path, interface: &str) -> Option<bool> {
    let carrier = fs::read_to_string(root.join("sys/class/net").join(interface).join("carrier")).ok()?;
    Some(carrier.trim() == "1")
}

/// Functions that a folder's entries are named for, in order.
fn names_in(folder: &Path) -> impl Iterator<Item = Bdf> + use<> {
    let mut found: Vec<Bdf> = entries(folder).filter_map(|name| name.parse().ok()).collect();
    found.sort_unstable();
    found.into_iter()
}

fn entries(folder: &Path) -> impl Iterator<Item = String> + use<> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok())
}

/// The last part of what a symbolic link points to: how `/sys` names drivers, groups and functions.
fn link_name(path: &Path) -> Option<String> {
    Some(fs::read_link(path).ok()?.file_name()?.to_str()?.to_owned())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A machine of files: functions and groups as `/sys` shows them.
    pub(crate) struct Machine(pub(crate) tempfile::TempDir);

    impl Machine {
        pub(crate) fn new() -> Self {
            let machine = Self(tempfile::tempdir().unwrap());
            for folder in ["sys/bus/pci/devices", "sys/bus/pci/drivers/vfio-pci", "proc/net", "run"] {
                fs::create_dir_all(machine.root().join(folder)).unwrap();
            }
            machine.file("sys/bus/pci/drivers_probe", "");
            machine
        }

        pub(crate) fn root(&self) -> &Path {
            self.0.path()
        }

        pub(crate) fn file(&self, path: &str, text: &str) {
            let path = self.root().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        pub(crate) fn read(&self, path: &str) -> String {
            fs::read_to_string(self.root().join(path)).unwrap()
        }

        /// A network card with a driver, in a group.
        pub(crate) fn card(&self, bdf: &str, device: u16, driver: Option<&str>, group: Option<u32>) -> Bdf {
            let at = format!("sys/bus/pci/devices/{bdf}");
            self.file(&format!("{at}/vendor"), "0x8086\n");
            self.file(&format!("{at}/device"), &format!("{device:#06x}\n"));
            self.file(&format!("{at}/class"), "0x020000\n");
            self.file(&format!("{at}/numa_node"), "-1\n");
            self.file(&format!("{at}/driver_override"), "(null)\n");
            if let Some(driver) = driver {
                self.file(&format!("sys/bus/pci/drivers/{driver}/unbind"), "");
                self.link(&format!("{at}/driver"), &format!("../../drivers/{driver}"));
            }
            if let Some(group) = group {
                let members = self.root().join(format!("sys/kernel/iommu_groups/{group}/devices"));
                fs::create_dir_all(&members).unwrap();
                self.link(&format!("{at}/iommu_group"), &format!("../../../../kernel/iommu_groups/{group}"));
                symlink(self.root().join(&at), members.join(bdf)).unwrap();
            }
            bdf.parse().unwrap()
        }

        pub(crate) fn link(&self, path: &str, to: &str) {
            symlink(to, self.root().join(path)).unwrap();
        }
    }

    #[test]
    fn addresses_are_read_as_lspci_prints_them_and_nothing_else_is() {
        for (text, shown) in
            [("0000:01:00.0", "0000:01:00.0"), ("a1:1f.7", "0000:a1:1f.7"), ("10000:0:1.2", "10000:00:01.2")]
        {
            assert_eq!(text.parse::<Bdf>().unwrap().to_string(), shown);
        }
        for text in [
            "",
            "eth0",
            "01:00",
            "0000:01:20.0",
            "0000:01:00.8",
            "0:0:+1.0",
            "0000:100:00.0",
            "1.2.3.4",
            "é:0.0",
        ] {
            assert!(text.parse::<Bdf>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_function_is_described_with_its_driver_group_interfaces_and_virtual_functions() {
        let machine = Machine::new();
        let card = machine.card("0000:02:00.0", 0x10c9, Some("igb"), Some(7));
        let other = machine.card("0000:02:00.1", 0x10c9, Some("igb"), Some(7));
        let vf = machine.card("0000:03:10.0", 0x10ca, None, None);
        machine.file("sys/bus/pci/devices/0000:03:10.0/virtio3/net/eth9/address", "");
        let at = "sys/bus/pci/devices/0000:02:00.0";
        machine.file(&format!("{at}/numa_node"), "1\n");
        machine.file(&format!("{at}/net/eth0/address"), "");
        machine.file(&format!("{at}/sriov_totalvfs"), "7\n");
        machine.link(&format!("{at}/virtfn0"), "../0000:03:10.0");
        machine.link("sys/bus/pci/devices/0000:03:10.0/physfn", "../0000:02:00.0");
        fs::create_dir_all(machine.root().join("sys/class/net/eth0")).unwrap();
        machine.link("sys/class/net/eth0/device", "../../../devices/pci0000:00/0000:02:00.0");

        let found = find(machine.root(), card).unwrap();
        assert_eq!((found.vendor, found.device, found.id()), (0x8086, 0x10c9, 0x10c9_8086));
        assert_eq!((found.driver.as_deref(), found.node, found.group), (Some("igb"), Some(1), Some(7)));
        assert_eq!((found.companions, found.virtuals, found.most_virtuals), (vec![other], vec![vf], Some(7)));
        assert_eq!((found.interfaces, found.physical), (vec!["eth0".to_owned()], None));
        let found = find(machine.root(), vf).unwrap();
        assert_eq!(found.interfaces, ["eth9"]);
        assert_eq!((found.node, found.group, found.driver, found.physical), (None, None, None, Some(card)));
        assert_eq!(of_interface(machine.root(), "eth0"), Some(card));
        assert_eq!(list(machine.root()).iter().map(|f| f.bdf).collect::<Vec<_>>(), [card, other, vf]);
        assert_eq!(find(machine.root(), "0000:09:00.0".parse().unwrap()), None);
    }

    #[test]
    fn the_address_of_a_virtual_function_is_known_before_it_is_made() {
        let machine = Machine::new();
        let card = machine.card("0000:01:00.0", 0x10c9, Some("igb"), Some(7));
        let at = "sys/bus/pci/devices/0000:01:00.0";
        let of = |number| find(machine.root(), card).unwrap().virtual_at(number).map(|bdf| bdf.to_string());
        assert_eq!(of(0), None, "it can have none");
        machine.file(&format!("{at}/sriov_totalvfs"), "7\n");
        assert_eq!(of(0), None, "the kernel does not say");
        machine.file(&format!("{at}/sriov_offset"), "128\n");
        machine.file(&format!("{at}/sriov_stride"), "2\n");
        assert_eq!([of(0), of(6), of(7)], [Some("0000:01:10.0".into()), Some("0000:01:11.4".into()), None]);
        machine.file(&format!("{at}/sriov_offset"), "384\n");
        assert_eq!(of(1).as_deref(), Some("0000:02:10.2"), "on the next bus");
        machine.file(&format!("{at}/sriov_offset"), "65535\n");
        assert_eq!(of(0), None, "beyond the last bus");
    }

    #[test]
    fn in_the_way_are_those_of_the_group_that_the_kernel_drives_but_for_bridges() {
        let machine = Machine::new();
        let card = machine.card("0000:02:00.0", 0x10c9, Some("igb"), Some(7));
        let igb = machine.card("0000:02:00.1", 0x10c9, Some("igb"), Some(7));
        machine.card("0000:02:00.2", 0x10c9, Some("vfio-pci"), Some(7));
        machine.card("0000:02:00.3", 0x10c9, Some("pcieport"), Some(7));
        machine.card("0000:02:00.4", 0x10c9, None, Some(7));
        assert_eq!(find(machine.root(), card).unwrap().in_the_way(machine.root()), [igb]);
    }
}
