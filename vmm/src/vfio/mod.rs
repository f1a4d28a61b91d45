//! PCI functions of the host, passed through to the guest by VFIO: network cards, their virtual functions, whatever has memory
//! regions and interrupts.
//!
//! Owns how they are opened: one address space for all of them in which the guest's memory has the guest's addresses, whole and
//! pinned, before the guest starts; the machine is known to KVM's side of VFIO. A function is reset when it is opened and
//! when it is closed, so a reboot of the guest, which builds the machine anew, resets it too. What the guest sees of it is
//! [`space`]'s, where its regions are [`function`]'s, its interrupts [`lines`]'s.

mod bars;
mod function;
mod hardware;
mod lines;
mod space;
#[cfg(test)]
mod tests;
mod watch;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::Arc;

use host::vfio::{Container, Interrupt, VfioError};
use kvm_bindings::{
    KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_VFIO,
};
use kvm_ioctls::{DeviceFd, VmFd};

use crate::config::PciConfig;
use crate::interrupts::Interrupts;
use crate::layout;
use crate::memory::GuestMemory;
use crate::pci::Function;
pub(crate) use bars::Windows;
use function::Passed;
use hardware::Real;

/// Memory slots of devices' regions begin here; those of the guest's memory are below.
const FIRST_SLOT: u32 = 0x100;

/// Why a function cannot be passed through.
#[derive(Debug, thiserror::Error)]
pub enum PassError {
    /// It cannot be had, or the guest's memory not be mapped for it.
    #[error("`pci`: {0}")]
    Vfio(#[from] VfioError),
    /// A region is too large.
    #[error(
        "`pci`: {name}: there is no room for its region {bar} of {} KiB below 4 GiB; pass fewer functions through", .len >> 10
    )]
    Window {
        /// The function.
        name: String,
        /// The region.
        bar: usize,
        /// Bytes.
        len: u64,
    },
    /// No more eventfds or interrupts, or no thread.
    #[error(
        "`pci`: {name}: cannot set up its interrupts: {source}; a limit of open files may be too small (ulimit -n)"
    )]
    Interrupts {
        /// The function.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// KVM does not want to know of it.
    #[error("`pci`: KVM does not take the device: {0}")]
    Kvm(kvm_ioctls::Error),
}

/// A region of a device: its length, 0 if it is not there, and what the kernel lets anybody map of it.
#[derive(Clone, Debug, Default)]
struct Extent {
    len: u64,
    mappable: Vec<Range<u64>>,
}

/// A part of a region in this process's memory, as long as this lives.
struct Window {
    start: u64,
    _owner: Box<dyn Send + Sync>,
}

/// What a device can do. Everything that it answers is anything at all.
trait Hardware: Send + Sync {
    /// Its address, for messages.
    fn name(&self) -> String;
    /// Bytes of configuration space.
    fn config_len(&self) -> usize;
    /// Reads configuration space.
    fn config_read(&self, at: u16, data: &mut [u8]);
    /// Writes configuration space.
    fn config_write(&self, at: u16, data: &[u8]);
    /// Region 0 to 5.
    fn region(&self, index: u32) -> Extent;
    /// Maps a part of a region.
    fn map(&self, index: u32, part: Range<u64>) -> Option<Window>;
    /// Reads a region.
    fn read(&self, index: u32, offset: u64, data: &mut [u8]);
    /// Writes a region.
    fn write(&self, index: u32, offset: u64, data: &[u8]);
    /// Whether it has an interrupt line.
    fn has_line(&self) -> bool;
    /// Whether interrupts of a kind can be tied to events one by one.
    fn interrupts_grow(&self, kind: Interrupt) -> bool;
    /// Ties interrupts from the `first` on to events; all of the kind to nothing if there are none.
    fn signal(&self, kind: Interrupt, first: u32, events: &[BorrowedFd<'_>]) -> io::Result<()>;
    /// Lets an event unmask the line.
    fn unmask_by(&self, event: BorrowedFd<'_>) -> io::Result<()>;
    /// Why it must be given away, if it must.
    fn must_go(&self) -> Option<&'static str>;
    /// What becomes readable when it must.
    fn alarms(&self) -> Vec<OwnedFd>;
}

/// What all functions of a machine share, and that ends with the last of them.
struct Shared {
    // In this order: KVM lets go of the groups, the IOMMU of the memory, then the memory may go.
    kvm: KvmsList,
    _groups: Vec<File>,
    _container: Arc<Container>,
    _memory: Arc<GuestMemory>,
}

/// The input of the I/O APIC that the interrupt line of device `number` of bus 0 goes to.
pub(crate) fn line_of(number: usize) -> u32 {
    layout::PCI_LINES.start + number as u32 % (layout::PCI_LINES.end - layout::PCI_LINES.start)
}

/// Opens all functions of `config`, in order: devices 1 and on of bus 0.
///
/// # Errors
/// One of them cannot be had; none is kept.
pub(crate) fn open(
    config: &[PciConfig],
    mut windows: Windows,
    memory: &Arc<GuestMemory>,
    interrupts: &Arc<Interrupts>,
) -> Result<Vec<Arc<dyn Function>>, PassError> {
    if config.is_empty() {
        return Ok(Vec::new());
    }
    let container = Container::new()?;
    let mut devices = Vec::new();
    for function in config {
        let device = container.open(function.device, function.vf_token.as_deref())?;
        if !device.resets() {
            tracing::warn!("{}: it cannot be reset: it keeps what its last user set", function.device);
        }
        // The first one brings the IOMMU along.
        if devices.is_empty() {
            map(&container, memory)?;
        }
        devices.push(device);
    }
    let groups = container.groups();
    let kvm = KvmsList::new(interrupts.vm()).map_err(PassError::Kvm)?;
    let themselves = devices.iter().filter_map(|device| device.itself());
    for file in groups.iter().map(AsFd::as_fd).chain(themselves) {
        kvm.change(KVM_DEV_VFIO_FILE_ADD, file).map_err(PassError::Kvm)?;
    }
    let shared = Arc::new(Shared { kvm, _groups: groups, _container: container, _memory: memory.clone() });
    let mut slot = FIRST_SLOT;
    let mut functions: Vec<Arc<dyn Function>> = Vec::new();
    for (number, device) in (1..).zip(devices) {
        let real = Box::new(Real { device, shared: shared.clone() });
        let passed = Passed::new(real, &mut windows, &mut slot, line_of(number), interrupts)?;
        functions.push(Arc::new(passed));
    }
    Ok(functions)
}

/// All of the guest's memory, at the guest's addresses: drivers in the guest tell devices these.
fn map(container: &Container, memory: &GuestMemory) -> Result<(), VfioError> {
    for region in memory.regions() {
        let len = usize::try_from(region.guest.end - region.guest.start).unwrap_or(0);
        let Some(start) = NonNull::new(region.host as *mut u8).filter(|_| len > 0) else { continue };
        // SAFETY: the memory is mapped as long as `Shared` keeps it, longer than the container; nobody makes references to it.
        unsafe { container.map_at(start, len, region.guest.start) }?;
    }
    Ok(())
}

/// What KVM knows of devices that write to the guest's memory: it cares for caches and posted interrupts then (Linux,
/// Documentation/virt/kvm/devices/vfio.rst). It keeps the files that it is given, groups' or functions' own.
struct KvmsList(DeviceFd);

impl KvmsList {
    fn new(vm: &VmFd) -> Result<Self, kvm_ioctls::Error> {
        let mut device = kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_VFIO, fd: 0, flags: 0 };
        vm.create_device(&mut device).map(Self)
    }

    /// A file comes or goes. Before Linux 6.6 these were groups only, by the same numbers.
    fn change(&self, how: u32, file: BorrowedFd<'_>) -> Result<(), kvm_ioctls::Error> {
        let fd: RawFd = file.as_raw_fd();
        self.0.set_device_attr(&kvm_device_attr {
            group: KVM_DEV_VFIO_FILE,
            attr: how.into(),
            addr: std::ptr::from_ref(&fd) as u64,
            flags: 0,
        })
    }
}
