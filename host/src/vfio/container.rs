//! An address space that functions of any number of groups share.
//!
//! Owns what is open in it, groups and functions by devices of their own, and the memory that is mapped. A container of the kernel's forgets mappings when
//! the last group leaves; they are made anew when one comes back, so that memory outlives a device that is away.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::resource::{Resource, getrlimit};

use super::addresses::Addresses;
use super::device::Device;
use super::group::{self, Group};
use super::iommu::{Iommu, Mapped};
use super::{VfioError, itself, way};
use crate::pci::{self, Bdf, Function};

/// An address space for devices.
pub struct Container {
    root: PathBuf,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Chosen when the first function is opened, if there is a choice.
    iommu: Option<Iommu>,
    groups: BTreeMap<u32, Group>,
    /// Functions that were opened by devices of their own.
    devices: usize,
    mapped: Vec<Mapped>,
    /// Known once a function is here.
    addresses: Option<Addresses>,
}

impl State {
    fn is_empty(&self) -> bool {
        self.groups.is_empty() && self.devices == 0
    }
}

/// That a function is open in a container; told to it when this is dropped.
pub(super) struct Seat {
    container: Arc<Container>,
    /// The group that it was opened out of.
    group: Option<u32>,
}

impl Seat {
    pub(super) fn container(&self) -> &Arc<Container> {
        &self.container
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut state = self.container.state();
        let Some(group) = self.group else {
            state.devices = state.devices.saturating_sub(1);
            return;
        };
        if let Some(entry) = state.groups.get_mut(&group) {
            entry.devices = entry.devices.saturating_sub(1);
            if entry.devices == 0 {
                state.groups.remove(&group);
            }
        }
    }
}

impl Container {
    /// An empty one.
    ///
    /// # Errors
    /// The kernel's part is not there, or another one.
    pub fn new() -> Result<Arc<Self>, VfioError> {
        Self::on(Path::new("/"))
    }

    /// On the machine below `root`.
    fn on(root: &Path) -> Result<Arc<Self>, VfioError> {
        let state = State { iommu: Iommu::there(root)?, ..State::default() };
        Ok(Arc::new(Self { root: root.to_owned(), state: Mutex::new(state) }))
    }

    /// Opens the function at `bdf`, with a token if one is needed (of a virtual function whose physical one
    /// is with vfio-pci) or to be set (of that one), and resets it.
    ///
    /// # Errors
    /// It cannot be had; the message says why and what to do.
    pub fn open(self: &Arc<Self>, bdf: Bdf, token: Option<&str>) -> Result<Arc<Device>, VfioError> {
        let function = pci::find(&self.root, bdf).ok_or(VfioError::Unknown(bdf))?;
        super::check(&self.root, bdf)?;
        let group = function.group.ok_or(VfioError::NoIommu(bdf))?;
        let mut guard = self.state();
        let state = &mut *guard;
        let iommu = match state.iommu.take() {
            Some(iommu) => iommu,
            None => Iommu::for_function(&self.root, &function)?,
        };
        let iommu = &*state.iommu.insert(iommu);
        let opened = match iommu {
            // What has joined as a group goes on as one.
            Iommu::Iommufd(iommufd) if !state.groups.contains_key(&group) => {
                itself::open(&self.root, iommufd, &function, group, token)?
            }
            Iommu::Iommufd(_) | Iommu::Type1(_) => None,
        };
        let (file, group) = match opened {
            Some(file) => {
                state.devices += 1;
                (file, None)
            }
            None => (open_of_group(state, &function, group, token)?, Some(group)),
        };
        let group_file = group.and_then(|group| Some(state.groups.get(&group)?.file.clone()));
        let ranges = state.iommu.as_ref().filter(|_| state.addresses.is_none()).map(Iommu::ranges);
        if let Some(Ok(ranges)) = &ranges {
            state.addresses = Some(Addresses::new(ranges.clone()));
        }
        drop(guard);
        // From here on it leaves by itself.
        let seat = Seat { container: self.clone(), group };
        if let Some(Err(source)) = ranges {
            drop(file);
            return Err(VfioError::Kernel {
                what: bdf.to_string(),
                doing: "asking what its IOMMU can",
                source,
            });
        }
        Device::new(seat, bdf, file, group_file.as_deref()).map(Arc::new)
    }

    /// The groups in this container, for KVM, which wants to know of devices that write to a machine's memory. Functions that were opened by devices of their
    /// own are in none: see [`Device::itself`].
    pub fn groups(&self) -> Vec<File> {
        self.state().groups.values().filter_map(|group| group.file.try_clone().ok()).collect()
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
        if state.is_empty() {
            return Err(VfioError::Empty);
        }
        let len = len as u64;
        let Some(addresses) = &mut state.addresses else { return Err(VfioError::Empty) };
        let iova = addresses.take(len).ok_or(VfioError::NoAddresses(len))?;
        let mapped = Mapped { start: start.as_ptr().addr(), len, iova };
        let done = map_new(state.iommu.as_ref(), &mut state.mapped, mapped);
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
        let mut guard = self.state();
        let state = &mut *guard;
        if state.is_empty() {
            return Err(VfioError::Empty);
        }
        let mapped = Mapped { start: start.as_ptr().addr(), len: len as u64, iova };
        map_new(state.iommu.as_ref(), &mut state.mapped, mapped)
    }

    /// Takes away what [`Container::map`] gave: no device reaches it when this returns.
    pub fn unmap(&self, iova: u64) {
        let mut guard = self.state();
        let state = &mut *guard;
        let Some(at) = state.mapped.iter().position(|mapped| mapped.iova == iova) else { return };
        let mapped = state.mapped.swap_remove(at);
        let empty = state.is_empty();
        if let Some(iommu) = state.iommu.as_ref().filter(|iommu| !(empty && iommu.forgets())) {
            iommu.unmap(mapped);
        }
        if let Some(addresses) = &mut state.addresses {
            addresses.give(iova, mapped.len);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Opens a function out of its group, which joins the address space if it has not yet.
fn open_of_group(
    state: &mut State,
    function: &Function,
    group: u32,
    token: Option<&str>,
) -> Result<File, VfioError> {
    if !state.groups.contains_key(&group) {
        let joined = join(state, function, group)?;
        state.groups.insert(group, joined);
    }
    let Some(entry) = state.groups.get_mut(&group) else { return Err(VfioError::Empty) };
    let opened = entry.function(function, group, token);
    match &opened {
        Ok(_) => entry.devices += 1,
        Err(_) if entry.devices == 0 => drop(state.groups.remove(&group)),
        Err(_) => {}
    }
    opened
}

/// Opens a group and puts it into this address space.
fn join(state: &State, function: &Function, group: u32) -> Result<Group, VfioError> {
    let what = || group::named(function, group);
    let failed = |doing| move |source| VfioError::Kernel { what: what(), doing, source };
    let Some(iommu) = &state.iommu else { return Err(VfioError::Empty) };
    let joined = Group::open(function, group)?;
    iommu
        .for_groups()
        .and_then(|space| joined.join(space))
        .map_err(failed("joining the other devices' memory"))?;
    if state.groups.is_empty() {
        iommu.first_group().map_err(failed("choosing its IOMMU"))?;
        for mapped in state.mapped.iter().filter(|_| iommu.forgets()) {
            // SAFETY: what is mapped is there until it is unmapped, as was promised to `map`.
            unsafe { iommu.map(*mapped) }.map_err(failed("mapping memory anew"))?;
        }
    }
    Ok(joined)
}

fn map_new(iommu: Option<&Iommu>, all: &mut Vec<Mapped>, mapped: Mapped) -> Result<(), VfioError> {
    let Some(iommu) = iommu else { return Err(VfioError::Empty) };
    // SAFETY: the promise of `map`'s caller.
    let Err(source) = (unsafe { iommu.map(mapped) }) else {
        all.push(mapped);
        return Ok(());
    };
    let (len, iova) = (mapped.len, mapped.iova);
    let limit = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(0, |(soft, _)| soft);
    // A sandbox may hide what the kernel counts.
    let pinned = locked().max(all.iter().map(|mapped| mapped.len).sum());
    let needed = pinned.saturating_add(len);
    // The kernel's answer to too small a limit (drivers/vfio/vfio_iommu_type1.c, vfio_pin_pages_remote; drivers/iommu/iommufd/pages.c,
    // incr_user_locked_vm).
    if source.raw_os_error() == Some(libc::ENOMEM) && limit < needed {
        return Err(VfioError::Memlock { needed, limit });
    }
    if source.raw_os_error() == Some(libc::ENOMEM) && limit != u64::MAX && iommu.counts_by_user() {
        return Err(VfioError::MemlockOfUser { needed, limit });
    }
    Err(VfioError::Kernel {
        what: format!("{len} bytes at {iova:#x}"),
        doing: "mapping them for devices",
        source,
    })
}

/// Whether the function can be opened now: nobody else has it, and this process may.
pub(super) fn try_open(root: &Path, function: &Function, group: u32) -> Result<(), VfioError> {
    let iommu = match Iommu::there(root)? {
        Some(iommu) => iommu,
        None => Iommu::for_function(root, function)?,
    };
    let device = way::device_of(root, function).filter(|_| matches!(iommu, Iommu::Iommufd(_)));
    let may = device.is_some_and(|device| OpenOptions::new().read(true).write(true).open(device).is_ok());
    match group::open(function, group) {
        // The device is enough, and whoever has it keeps the group from being opened.
        Err(VfioError::Forbidden { .. } | VfioError::Kernel { .. }) if may => Ok(()),
        opened => opened.map(drop),
    }
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

    fn refused(root: &Path) -> String {
        Container::on(root).err().unwrap().to_string()
    }

    #[test]
    fn a_machine_whose_kernel_lacks_a_part_is_told_which_modules_to_load() {
        let folder = tempfile::tempdir().unwrap();
        let none = refused(folder.path());
        assert!(none.contains("has no /dev/vfio/vfio (No such file or directory"), "{none}");
        assert!(none.ends_with("modprobe vfio-pci vfio_iommu_type1"), "{none}");
        // A file that answers no such question.
        std::fs::create_dir_all(folder.path().join("dev/vfio")).unwrap();
        std::fs::write(folder.path().join("dev/vfio/vfio"), "").unwrap();
        assert!(
            refused(folder.path())
                .ends_with("knows no IOMMU of type 1, version 2: modprobe vfio_iommu_type1")
        );
    }
}
