//! A PCI function changes hands: from the kernel's driver to vfio-pci, and back.
//!
//! Owns the order of the writes to `/sys`, the memory of which driver a function had, and the refusal to take away a network
//! interface that is in use. Everything is asked before anything is changed.

use std::path::{Path, PathBuf};
use std::{fs, io};

use super::{Bdf, Function, VFIO, find, folder, listed};

/// Below the root: which driver each function had before it was taken. Like the binding itself, it does not outlive the machine's
/// next start.
const REMEMBERED: &str = "run/cableway/nic";

/// Below the root: whether vfio-pci makes virtual functions. Off unless somebody wants it, as whoever has the physical function can
/// harm who has a virtual one: they prove to each other by a token that they know each other.
const SRIOV_SWITCH: &str = "sys/module/vfio_pci/parameters/enable_sriov";

/// Why a function stays with the driver that it has.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Not there.
    #[error("there is no PCI function {0}; `cableway nic list` shows what there is")]
    Unknown(Bdf),
    /// No IOMMU protects memory from it.
    #[error(
        "{0} is in no IOMMU group: switch the IOMMU on (VT-d or AMD-Vi in the firmware's settings; `intel_iommu=on` on the \
         kernel's command line for Intel), or keep the card with the kernel and use `kind = \"af_packet\"`"
    )]
    NoIommu(Bdf),
    /// The kernel's part is not loaded.
    #[error("this kernel has no vfio-pci: modprobe vfio-pci")]
    NoVfio,
    /// Others of the group are with the kernel.
    #[error(
        "{bdf}: IOMMU group {group} also holds {}, which the kernel drives; bind them too: cableway nic bind {bdf} {}",
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
    /// Somebody would miss it.
    #[error("{bdf} is interface {interface}, which {}; give --force to take it anyway", .uses.join(" and "))]
    InUse {
        /// The function.
        bdf: Bdf,
        /// Its interface.
        interface: String,
        /// What it carries.
        uses: Vec<String>,
    },
    /// It has virtual functions.
    #[error("{bdf} has {count} virtual functions, which would be gone: cableway nic vfs {bdf} 0 first")]
    HasVirtuals {
        /// The function.
        bdf: Bdf,
        /// How many.
        count: usize,
    },
    /// It is not with us.
    #[error("{bdf} is not bound to vfio-pci ({}), so there is nothing to give back", .driver.as_deref().map_or("it has no driver".to_owned(), |d| format!("its driver is {d}")))]
    NotBound {
        /// The function.
        bdf: Bdf,
        /// Its driver.
        driver: Option<String>,
    },
    /// The kernel did not do it.
    #[error("{bdf}: the driver {driver} did not take it; the kernel's log says why (dmesg)")]
    NotTaken {
        /// The function.
        bdf: Bdf,
        /// The driver that should have.
        driver: String,
    },
    /// A file of the kernel could not be written.
    #[error("cannot write {text:?} to {}: {source}{}", path.display(), hint(source))]
    Write {
        /// The file.
        path: PathBuf,
        /// What was to be written.
        text: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is no physical function.
    #[error("{0} can have no virtual functions (it has no SR-IOV)")]
    NoVirtuals(Bdf),
    /// It has fewer.
    #[error("{bdf} can have at most {most} virtual functions, not {wanted}")]
    TooManyVirtuals {
        /// The function.
        bdf: Bdf,
        /// Asked for.
        wanted: u16,
        /// What it has.
        most: u16,
    },
    /// vfio-pci was not told that it may, and cannot be told now.
    #[error(
        "{bdf} is bound to vfio-pci, which makes virtual functions only when allowed to ({source}): as root, echo Y > \
         /{SRIOV_SWITCH}, or modprobe vfio-pci enable_sriov=1"
    )]
    VfioMakesNoVirtuals {
        /// The function.
        bdf: Bdf,
        /// Why.
        source: io::Error,
    },
}

fn hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::PermissionDenied => "; this needs root",
        _ => "",
    }
}

/// What a network interface is used for, in words that follow "which": empty if nobody would miss it.
pub fn uses(root: &Path, interface: &str, addresses: &[String]) -> Vec<String> {
    let mut uses = Vec::new();
    let routes = [
        // Destination 0 with mask 0 (proc(5), /proc/net/route: interface, destination, …, mask in column 8).
        ("proc/net/route", 0, &[(1, "00000000"), (7, "00000000")][..]),
        // Destination ::/0 (interface in column 10). The kernel's own entry that refuses all has interface lo.
        ("proc/net/ipv6_route", 9, &[(0, "00000000000000000000000000000000"), (1, "00")][..]),
    ];
    let default = routes.iter().any(|(file, name, values)| {
        let text = fs::read_to_string(root.join(file)).unwrap_or_default();
        text.lines().any(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            words.get(*name) == Some(&interface)
                && values.iter().all(|(at, value)| words.get(*at) == Some(value))
        })
    });
    if default {
        uses.push("carries the default route".to_owned());
    }
    if !addresses.is_empty() {
        uses.push(format!("has the address {}", addresses.join(", ")));
    }
    if let Some(master) = super::link_name(&root.join("sys/class/net").join(interface).join("master")) {
        uses.push(format!("is part of {master}"));
    }
    uses
}

/// The addresses of an interface of this machine by which somebody may reach it; IPv6 gives every interface a link-local one, which
/// does not count.
pub fn addresses(interface: &str) -> Vec<String> {
    let Ok(all) = nix::ifaddrs::getifaddrs() else { return Vec::new() };
    let of = all.filter(|entry| entry.interface_name == interface).filter_map(|entry| entry.address);
    let shown = of.filter_map(|address| {
        if let Some(v4) = address.as_sockaddr_in() {
            return Some(v4.ip().to_string());
        }
        let v6 = address.as_sockaddr_in6()?.ip();
        (!v6.is_unicast_link_local()).then(|| v6.to_string())
    });
    shown.collect()
}

/// Whether `bdf` can be taken from the kernel, together with `along`. `force`: even if it is in use.
///
/// # Errors
/// Why not.
pub fn check(root: &Path, bdf: Bdf, along: &[Bdf], force: bool) -> Result<Function, BindError> {
    let function = find(root, bdf).ok_or(BindError::Unknown(bdf))?;
    let group = function.group.ok_or(BindError::NoIommu(bdf))?;
    if !root.join("sys/bus/pci/drivers").join(VFIO).is_dir() {
        return Err(BindError::NoVfio);
    }
    let mut others = function.in_the_way(root);
    others.retain(|other| !along.contains(other));
    if !others.is_empty() {
        return Err(BindError::GroupNotViable { bdf, group, others });
    }
    for interface in function.interfaces.iter().filter(|_| !force) {
        let uses = uses(root, interface, &addresses(interface));
        if !uses.is_empty() {
            return Err(BindError::InUse { bdf, interface: interface.clone(), uses });
        }
    }
    if !function.virtuals.is_empty() && function.driver.as_deref() != Some(VFIO) {
        return Err(BindError::HasVirtuals { bdf, count: function.virtuals.len() });
    }
    Ok(function)
}

/// Takes a function from the kernel's driver, which is remembered, and gives it to vfio-pci. True: it had it already.
///
/// # Errors
/// The kernel refuses; the function is with its former driver again.
pub fn bind(root: &Path, function: &Function) -> Result<bool, BindError> {
    let bdf = function.bdf;
    if function.driver.as_deref() == Some(VFIO) {
        return Ok(true);
    }
    if let Some(driver) = &function.driver {
        let file = remembered(root, bdf);
        let note = |source| BindError::Write { path: file.clone(), text: driver.clone(), source };
        file.parent()
            .map_or(Ok(()), fs::create_dir_all)
            .and_then(|()| fs::write(&file, driver))
            .map_err(note)?;
    }
    let taken = write(&folder(root, bdf).join("driver_override"), VFIO)
        .and_then(|()| release(root, bdf))
        .and_then(|()| write(&root.join("sys/bus/pci/drivers_probe"), &bdf.to_string()))
        .and_then(|()| is_with(root, bdf, VFIO));
    if let Err(error) = taken {
        // As it was, as far as the kernel lets us: what is reported is the first thing that went wrong.
        let _ = give_back(root, bdf);
        return Err(error);
    }
    Ok(false)
}

/// Gives a function back to the driver that it had, or to whichever takes it; says which that is.
///
/// # Errors
/// It is not with vfio-pci, or no driver takes it.
pub fn unbind(root: &Path, bdf: Bdf) -> Result<Option<String>, BindError> {
    let function = find(root, bdf).ok_or(BindError::Unknown(bdf))?;
    if function.driver.as_deref() != Some(VFIO) {
        return Err(BindError::NotBound { bdf, driver: function.driver });
    }
    give_back(root, bdf)?;
    Ok(find(root, bdf).and_then(|function| function.driver))
}

/// The driver that a function had before it was taken.
pub fn former_driver(root: &Path, bdf: Bdf) -> Option<String> {
    fs::read_to_string(remembered(root, bdf))
        .ok()
        .map(|name| name.trim().to_owned())
        .filter(|name| !name.is_empty())
}

fn give_back(root: &Path, bdf: Bdf) -> Result<(), BindError> {
    // An empty line takes the override away (Linux, Documentation/ABI/testing/sysfs-bus-pci).
    write(&folder(root, bdf).join("driver_override"), "\n")?;
    release(root, bdf)?;
    let former = former_driver(root, bdf);
    let bind = former.as_ref().map(|driver| root.join("sys/bus/pci/drivers").join(driver).join("bind"));
    match bind.filter(|file| file.exists()) {
        Some(bind) => write(&bind, &bdf.to_string())?,
        None => write(&root.join("sys/bus/pci/drivers_probe"), &bdf.to_string())?,
    }
    if let Some(driver) = former {
        is_with(root, bdf, &driver)?;
    }
    let _ = fs::remove_file(remembered(root, bdf));
    Ok(())
}

/// Makes so many virtual functions of `bdf`, in place of those that there are. Those of a function that is with vfio-pci are with it as
/// well, which is switched on to make any.
///
/// # Errors
/// It cannot have so many, or the kernel refuses.
pub fn set_virtuals(root: &Path, bdf: Bdf, count: u16) -> Result<(), BindError> {
    let function = find(root, bdf).ok_or(BindError::Unknown(bdf))?;
    let most = function.most_virtuals.ok_or(BindError::NoVirtuals(bdf))?;
    if count > most {
        return Err(BindError::TooManyVirtuals { bdf, wanted: count, most });
    }
    if function.driver.as_deref() == Some(VFIO) {
        let switch = root.join(SRIOV_SWITCH);
        if count > 0 && fs::read_to_string(&switch).unwrap_or_default().trim() != "Y" {
            let on = fs::OpenOptions::new().write(true).truncate(true).open(&switch);
            on.and_then(|mut file| io::Write::write_all(&mut file, b"Y"))
                .map_err(|source| BindError::VfioMakesNoVirtuals { bdf, source })?;
        }
    }
    let file = folder(root, bdf).join("sriov_numvfs");
    // From one number to another the kernel goes only by way of none.
    write(&file, "0")?;
    if count > 0 { write(&file, &count.to_string()) } else { Ok(()) }
}

fn remembered(root: &Path, bdf: Bdf) -> PathBuf {
    root.join(REMEMBERED).join(bdf.to_string())
}

/// Takes a function from whatever driver it has.
fn release(root: &Path, bdf: Bdf) -> Result<(), BindError> {
    let driver = folder(root, bdf).join("driver");
    if driver.exists() { write(&driver.join("unbind"), &bdf.to_string()) } else { Ok(()) }
}

fn is_with(root: &Path, bdf: Bdf, driver: &str) -> Result<(), BindError> {
    let now = find(root, bdf).and_then(|function| function.driver);
    if now.as_deref() == Some(driver) {
        Ok(())
    } else {
        Err(BindError::NotTaken { bdf, driver: driver.to_owned() })
    }
}

/// One write, which is one order to the kernel; the file is not made.
fn write(path: &Path, text: &str) -> Result<(), BindError> {
    let failed = |source| BindError::Write { path: path.to_owned(), text: text.to_owned(), source };
    let mut file = fs::OpenOptions::new().write(true).truncate(true).open(path).map_err(failed)?;
    io::Write::write_all(&mut file, text.as_bytes()).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::super::tests::Machine;
    use super::*;

    fn refused(machine: &Machine, bdf: Bdf, along: &[Bdf]) -> String {
        check(machine.root(), bdf, along, false).unwrap_err().to_string()
    }

    #[test]
    fn a_card_without_iommu_without_vfio_or_that_is_not_there_is_refused_with_the_way_out() {
        let machine = Machine::new();
        let card = machine.card("0000:01:00.0", 0x10d3, Some("e1000e"), None);
        assert!(refused(&machine, card, &[]).contains("intel_iommu=on"));
        let absent = "0000:09:00.0".parse().unwrap();
        assert!(refused(&machine, absent, &[]).contains("no PCI function 0000:09:00.0"));
        let grouped = machine.card("0000:01:00.1", 0x10d3, Some("e1000e"), Some(3));
        fs::remove_dir(machine.root().join("sys/bus/pci/drivers/vfio-pci")).unwrap();
        assert!(refused(&machine, grouped, &[]).contains("modprobe vfio-pci"));
    }

    #[test]
    fn others_of_the_group_that_stay_with_the_kernel_are_named() {
        let machine = Machine::new();
        let card = machine.card("0000:01:00.0", 0x10d3, Some("e1000e"), Some(3));
        let other = machine.card("0000:01:00.1", 0x10d3, Some("e1000e"), Some(3));
        let text = refused(&machine, card, &[card]);
        assert!(text.contains("group 3 also holds 0000:01:00.1"), "{text}");
        assert!(text.contains("cableway nic bind 0000:01:00.0 0000:01:00.1"), "{text}");
        assert!(check(machine.root(), card, &[card, other], false).is_ok());
    }

    #[test]
    fn an_interface_with_the_default_route_is_kept_unless_forced() {
        let machine = Machine::new();
        let card = machine.card("0000:01:00.0", 0x10d3, Some("e1000e"), Some(3));
        machine.file("sys/bus/pci/devices/0000:01:00.0/net/lab7/address", "");
        let header = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\n";
        machine.file("proc/net/route", &format!("{header}lab7\t0000000A\t00000000\t1\t0\t0\t0\t00FFFFFF\n"));
        assert!(check(machine.root(), card, &[], false).is_ok(), "a route to a network is no default route");
        machine.file("proc/net/route", &format!("{header}lab7\t00000000\t0100000A\t3\t0\t0\t0\t00000000\n"));
        let text = refused(&machine, card, &[]);
        assert!(text.contains("interface lab7, which carries the default route; give --force"), "{text}");
        assert!(check(machine.root(), card, &[], true).is_ok());
    }

    #[test]
    fn addresses_default_routes_of_ipv6_and_bridges_are_uses() {
        let machine = Machine::new();
        let zero = "0".repeat(32);
        machine.file("proc/net/ipv6_route", &format!("{zero} 00 {zero} 00 {zero} 0 1 0 0 lab7\n"));
        fs::create_dir_all(machine.root().join("sys/class/net/lab7")).unwrap();
        machine.link("sys/class/net/lab7/master", "../br0");
        let all = uses(machine.root(), "lab7", &["10.0.0.1".to_owned()]);
        assert_eq!(all, ["carries the default route", "has the address 10.0.0.1", "is part of br0"]);
        assert!(uses(machine.root(), "lab8", &[]).is_empty());
        assert!(addresses("lo").contains(&"127.0.0.1".to_owned()));
    }

    #[test]
    fn what_the_kernel_does_not_do_is_reported_and_undone() {
        let machine = Machine::new();
        let card = machine.card("0000:01:00.0", 0x10d3, Some("e1000e"), Some(3));
        let function = check(machine.root(), card, &[], false).unwrap();
        // These files do nothing: the card stays with its driver.
        let error = bind(machine.root(), &function).unwrap_err().to_string();
        assert!(error.contains("vfio-pci did not take it"), "{error}");
        assert_eq!(machine.read("sys/bus/pci/drivers/e1000e/unbind"), "0000:01:00.0");
        assert_eq!(machine.read("sys/bus/pci/drivers_probe"), "0000:01:00.0");
        assert_eq!(machine.read("sys/bus/pci/devices/0000:01:00.0/driver_override"), "\n");
        let error = unbind(machine.root(), card).unwrap_err().to_string();
        assert!(error.contains("its driver is e1000e"), "{error}");
    }

    #[test]
    fn virtual_functions_are_made_within_what_the_card_has_and_vfio_allows() {
        let machine = Machine::new();
        let card = machine.card("0000:01:00.0", 0x10c9, Some("igb"), Some(3));
        let at = "sys/bus/pci/devices/0000:01:00.0";
        let set = |count| set_virtuals(machine.root(), card, count).map_err(|e| e.to_string());
        assert!(set(1).unwrap_err().contains("no SR-IOV"));
        machine.file(&format!("{at}/sriov_totalvfs"), "7\n");
        machine.file(&format!("{at}/sriov_numvfs"), "0\n");
        assert!(set(8).unwrap_err().contains("at most 7"));
        assert_eq!(set(7), Ok(()));
        assert_eq!(machine.read(&format!("{at}/sriov_numvfs")), "7");
        fs::remove_file(machine.root().join(format!("{at}/driver"))).unwrap();
        machine.link(&format!("{at}/driver"), "../../drivers/vfio-pci");
        assert!(set(2).unwrap_err().contains("enable_sriov"));
        assert_eq!(set(0), Ok(()));
        machine.file("sys/module/vfio_pci/parameters/enable_sriov", "N\n");
        assert_eq!(set(2), Ok(()));
        assert_eq!(machine.read("sys/module/vfio_pci/parameters/enable_sriov"), "Y");
    }
}
