//! A function in our hands: its regions, interrupts, reset.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::Arc;

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_RESET, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE,
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX,
    VFIO_REGION_INFO_FLAG_MMAP, vfio_device_info, vfio_irq_info, vfio_region_info,
};

use super::{Container, VfioError, sys};
use crate::pci::{Bdf, Function};

/// PCI's command register, and its bits for memory regions and bus mastering (PCI 3.0, section 6.2.2).
const COMMAND: u64 = 4;
const COMMAND_MEMORY: u32 = 1 << 1;
const COMMAND_MASTER: u32 = 1 << 2;

/// A kind of interrupt of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupt {
    /// Messages, one for each vector (PCI 3.0, section 6.8.2).
    Msix,
    /// The bus reports an error that cannot be corrected (PCI Express 4.0, section 6.2): the function may be in any state.
    Error,
    /// The kernel wants the function back: it waits until it is closed.
    Request,
}

impl Interrupt {
    fn index(self) -> u32 {
        match self {
            Self::Msix => VFIO_PCI_MSIX_IRQ_INDEX,
            Self::Error => VFIO_PCI_ERR_IRQ_INDEX,
            Self::Request => VFIO_PCI_REQ_IRQ_INDEX,
        }
    }
}

/// A memory region of a function, mapped: loads and stores go to the device. Unmapped when dropped.
pub struct Region {
    start: NonNull<u8>,
    len: NonZeroUsize,
    _device: Arc<Device>,
}

// SAFETY: a mapping belongs to no thread; whoever uses its address answers for that.
unsafe impl Send for Region {}
// SAFETY: as above; `&Region` gives nothing but the address.
unsafe impl Sync for Region {}

impl Region {
    /// The first byte.
    pub fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// How many there are.
    pub fn bytes(&self) -> NonZeroUsize {
        self.len
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `Device::map` made, and its user is gone.
        let _ = unsafe { munmap(self.start.cast(), self.len.get()) };
    }
}

/// An open function. Closed when dropped, with all its regions: the kernel then turns interrupts and bus mastering off.
pub struct Device {
    /// Taken when it is closed, before its group is told.
    file: Option<File>,
    container: Arc<Container>,
    group: u32,
    bdf: Bdf,
    resets: bool,
    config_at: u64,
    error: Option<EventFd>,
    request: Option<EventFd>,
}

impl Device {
    /// Opens a function of a group that is in `container`.
    pub(super) fn open(
        container: Arc<Container>,
        function: &Function,
        group: u32,
        group_file: &File,
        token: Option<&str>,
    ) -> Result<Self, VfioError> {
        let bdf = function.bdf;
        let failed = |doing| move |source| VfioError::Kernel { what: bdf.to_string(), doing, source };
        // The name, and the token behind it (vfio_pci_core_match).
        let mut name = match token {
            Some(token) => format!("{bdf} vf_token={token}\0"),
            None => format!("{bdf}\0"),
        }
        .into_bytes();
        // SAFETY: the request takes a text that ends with a zero.
        let opened = unsafe { sys::with_bytes(group_file.as_fd(), sys::GROUP_GET_DEVICE_FD, &mut name) };
        // vfio_pci_validate_vf_token says which is which.
        let fd: RawFd = opened.map_err(|source| match (source.raw_os_error(), function.physical, token) {
            (Some(libc::EACCES), Some(physical), None) => VfioError::NoToken { bdf, physical },
            (Some(libc::EACCES), Some(physical), Some(_)) => VfioError::WrongToken { bdf, physical },
            (Some(libc::EACCES), None, _) => VfioError::PhysicalToken(bdf),
            (Some(libc::EINVAL), _, Some(_)) => VfioError::TokenUnwanted(bdf),
            (Some(libc::EBUSY), ..) => VfioError::Busy { bdf, group },
            _ => failed("opening it")(source),
        })?;
        // SAFETY: the kernel made this descriptor for us just now.
        let file = unsafe { File::from_raw_fd(fd) };
        let size = |n: usize| n as u32;
        let mut info =
            vfio_device_info { argsz: size(size_of::<vfio_device_info>()), ..vfio_device_info::default() };
        // SAFETY: the structure of this request, of the size that it says.
        unsafe { sys::with(file.as_fd(), sys::DEVICE_GET_INFO, &mut info) }
            .map_err(failed("asking what it has"))?;
        let config = region_info(&file, VFIO_PCI_CONFIG_REGION_INDEX)
            .map_err(failed("finding its configuration space"))?;
        let device = Self {
            resets: info.flags & VFIO_DEVICE_FLAGS_RESET != 0,
            config_at: config.offset,
            error: watch(&file, Interrupt::Error),
            request: watch(&file, Interrupt::Request),
            file: Some(file),
            container,
            group,
            bdf,
        };
        // Whatever it did for whoever had it before ends here.
        if device.resets {
            device.reset().map_err(failed("resetting it"))?;
        }
        let command = device.config_read(COMMAND as u16) & 0xffff;
        device.config_write(COMMAND as u16, command & !COMMAND_MASTER | COMMAND_MEMORY);
        Ok(device)
    }

    /// Where it is.
    pub fn bdf(&self) -> Bdf {
        self.bdf
    }

    /// The address space that it is in.
    pub fn container(&self) -> &Arc<Container> {
        &self.container
    }

    /// Whether it can be reset. One that cannot keeps what its last user set.
    pub fn resets(&self) -> bool {
        self.resets
    }

    /// Resets it, as far as it can be.
    ///
    /// # Errors
    /// It cannot be, or not now.
    pub fn reset(&self) -> io::Result<()> {
        sys::with_number(self.fd()?, sys::DEVICE_RESET, 0).map(drop)
    }

    /// 32 bits of the configuration space, at a multiple of 4; all ones if it is gone.
    pub fn config_read(&self, offset: u16) -> u32 {
        let mut bytes = [0xff; 4];
        let at = self.config_at + u64::from(offset & 0xffc);
        match self.file.as_ref().map(|file| file.read_exact_at(&mut bytes, at)) {
            Some(Ok(())) => u32::from_le_bytes(bytes),
            _ => u32::MAX,
        }
    }

    /// Writes 32 bits of the configuration space. The kernel passes on what a driver may change.
    pub fn config_write(&self, offset: u16, value: u32) {
        let at = self.config_at + u64::from(offset & 0xffc);
        if let Some(file) = &self.file {
            // A function that is gone takes nothing; whoever reads it is told.
            let _ = file.write_all_at(&value.to_le_bytes(), at);
        }
    }

    /// Maps memory region `index` (0 to 5).
    ///
    /// # Errors
    /// There is none, it cannot be mapped, or the kernel refuses.
    pub fn map(self: &Arc<Self>, index: u32) -> Result<Region, VfioError> {
        let none = VfioError::Region { bdf: self.bdf, index };
        let failed = |source| VfioError::Kernel {
            what: self.bdf.to_string(),
            doing: "mapping a memory region",
            source,
        };
        let Some(file) = self.file.as_ref().filter(|_| index <= 5) else { return Err(none) };
        let info = region_info(file, index).map_err(failed)?;
        let len = usize::try_from(info.size).ok().and_then(NonZeroUsize::new);
        let (Some(len), true) = (len, info.flags & VFIO_REGION_INFO_FLAG_MMAP != 0) else { return Err(none) };
        let offset = i64::try_from(info.offset).map_err(|_| none)?;
        // SAFETY: a new mapping at an address of the kernel's choice; it touches no memory that is in use.
        let start = unsafe {
            mmap(None, len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, file, offset)
        };
        let start = start.map_err(|e| failed(e.into()))?.cast();
        Ok(Region { start, len, _device: self.clone() })
    }

    /// How many interrupts of this kind it has.
    pub fn interrupts(&self, kind: Interrupt) -> u32 {
        self.file.as_ref().map_or(0, |file| interrupts(file, kind))
    }

    /// Lets the first interrupts of this kind signal `events`, one each; without any, turns the kind off.
    ///
    /// # Errors
    /// It has fewer, or the kernel refuses.
    pub fn signal(&self, kind: Interrupt, events: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.file.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        set_interrupts(self.fd()?, kind, events)
    }

    /// Whether it must be closed, and why: the bus reported an error, or the kernel wants it back.
    pub fn must_go(&self) -> Option<&'static str> {
        let rang = |event: &Option<EventFd>| event.as_ref().is_some_and(|event| event.read().is_ok());
        if rang(&self.error) {
            return Some(
                "the bus reported an error of the device that cannot be corrected (PCI Express AER)",
            );
        }
        rang(&self.request).then_some("the kernel asked for the device back (it is being unbound or removed)")
    }

    fn fd(&self) -> io::Result<BorrowedFd<'_>> {
        self.file.as_ref().map(AsFd::as_fd).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // First the function, then perhaps its group, then perhaps the IOMMU.
        drop(self.file.take());
        self.container.leave(self.group);
    }
}

fn region_info(file: &File, index: u32) -> io::Result<vfio_region_info> {
    let argsz = size_of::<vfio_region_info>() as u32;
    let mut info = vfio_region_info { argsz, index, ..vfio_region_info::default() };
    // SAFETY: the structure of this request, of the size that it says.
    unsafe { sys::with(file.as_fd(), sys::DEVICE_GET_REGION_INFO, &mut info) }?;
    Ok(info)
}

fn interrupts(file: &File, kind: Interrupt) -> u32 {
    let argsz = size_of::<vfio_irq_info>() as u32;
    let mut info = vfio_irq_info { argsz, index: kind.index(), ..vfio_irq_info::default() };
    // SAFETY: the structure of this request, of the size that it says.
    match unsafe { sys::with(file.as_fd(), sys::DEVICE_GET_IRQ_INFO, &mut info) } {
        Ok(_) => info.count,
        Err(_) => 0,
    }
}

/// Hears of `kind`, where the function has it.
fn watch(file: &File, kind: Interrupt) -> Option<EventFd> {
    if interrupts(file, kind) == 0 {
        return None;
    }
    let event = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).ok()?;
    set_interrupts(file.as_fd(), kind, &[event.as_fd()]).ok()?;
    Some(event)
}

/// One request: `struct vfio_irq_set`, five words, and the descriptors behind it.
fn set_interrupts(fd: BorrowedFd<'_>, kind: Interrupt, events: &[BorrowedFd<'_>]) -> io::Result<()> {
    let data = if events.is_empty() { VFIO_IRQ_SET_DATA_NONE } else { VFIO_IRQ_SET_DATA_EVENTFD };
    let size = 4 * (5 + events.len()) as u32;
    let mut set = vec![size, data | VFIO_IRQ_SET_ACTION_TRIGGER, kind.index(), 0, events.len() as u32];
    set.extend(events.iter().map(|event| event.as_raw_fd().cast_unsigned()));
    // SAFETY: the structure of this request and what it says follows, of the size that it says.
    unsafe { sys::with_bytes(fd, sys::DEVICE_SET_IRQS, &mut set) }.map(drop)
}
