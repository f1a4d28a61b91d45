//! A function in our hands: its regions, interrupts, reset.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::Arc;

use nix::sys::eventfd::EventFd;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_RESET, VFIO_PCI_CONFIG_REGION_INDEX, vfio_device_info,
};

use super::container::{Container, Seat};
use super::interrupts::{self, Interrupt};
use super::regions::{self, RegionInfo};
use super::{VfioError, reset, sys};
use crate::pci::Bdf;

/// PCI's command register, and its bits for memory regions and bus mastering (PCI 3.0, section 6.2.2).
const COMMAND: u64 = 4;
const COMMAND_MEMORY: u32 = 1 << 1;
const COMMAND_MASTER: u32 = 1 << 2;

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
    // In this order they are dropped: first the function, then perhaps its group, then perhaps the IOMMU.
    file: File,
    seat: Seat,
    /// Whether it was opened by a device of its own.
    itself: bool,
    bdf: Bdf,
    resets: bool,
    config_at: u64,
    config_len: u64,
    /// Memory and I/O regions 0 to 5; none where nothing is.
    regions: [Option<RegionInfo>; 6],
    error: Option<EventFd>,
    request: Option<EventFd>,
}

impl Device {
    /// Takes a function that was opened, out of the group with `group_file` or by a device of its own, and resets it.
    pub(super) fn new(
        seat: Seat,
        bdf: Bdf,
        file: File,
        group_file: Option<&File>,
    ) -> Result<Self, VfioError> {
        let failed = |doing| move |source| VfioError::Kernel { what: bdf.to_string(), doing, source };
        let size = |n: usize| n as u32;
        let mut info =
            vfio_device_info { argsz: size(size_of::<vfio_device_info>()), ..vfio_device_info::default() };
        // SAFETY: the structure of this request, of the size that it says.
        unsafe { sys::with(file.as_fd(), sys::DEVICE_GET_INFO, &mut info) }
            .map_err(failed("asking what it has"))?;
        let config = regions::info(&file, VFIO_PCI_CONFIG_REGION_INDEX)
            .map_err(failed("finding its configuration space"))?;
        let region = |index: usize| regions::info(&file, index as u32).ok().filter(|info| info.len > 0);
        let regions = std::array::from_fn(region);
        let device = Self {
            resets: info.flags & VFIO_DEVICE_FLAGS_RESET != 0,
            config_at: config.at,
            config_len: config.len,
            regions,
            error: interrupts::watch(&file, Interrupt::Error),
            request: interrupts::watch(&file, Interrupt::Request),
            file,
            seat,
            itself: group_file.is_none(),
            bdf,
        };
        // Whatever it did for whoever had it before ends here.
        if device.resets {
            let read = |at| device.config_read(at);
            reset::reset(&device.file, group_file.map(AsFd::as_fd), bdf, read)
                .map_err(failed("resetting it"))?;
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
        self.seat.container()
    }

    /// Its file, if it was opened by a device of its own and not out of a group: for KVM, as [`Container::groups`]. Whoever keeps a copy of it keeps the function.
    pub fn itself(&self) -> Option<BorrowedFd<'_>> {
        self.itself.then(|| self.file.as_fd())
    }

    /// Whether it can be reset. One that cannot keeps what its last user set.
    pub fn resets(&self) -> bool {
        self.resets
    }

    /// 32 bits of the configuration space, at a multiple of 4; all ones if it is gone.
    pub fn config_read(&self, offset: u16) -> u32 {
        let mut bytes = [0xff; 4];
        self.config_read_bytes(offset & 0xffc, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Writes 32 bits of the configuration space. The kernel passes on what a driver may change.
    pub fn config_write(&self, offset: u16, value: u32) {
        self.config_write_bytes(offset & 0xffc, &value.to_le_bytes());
    }

    /// Bytes of configuration space: 4,096 for PCI Express, else 256.
    pub fn config_len(&self) -> u64 {
        self.config_len
    }

    /// Reads configuration space; all ones where nothing is, or if the function is gone.
    pub fn config_read_bytes(&self, offset: u16, data: &mut [u8]) {
        let at = self.config_at + u64::from(offset);
        if self.file.read_exact_at(data, at).is_err() {
            data.fill(0xff);
        }
    }

    /// Writes configuration space: no byte beside these. The kernel passes on what a driver may change.
    pub fn config_write_bytes(&self, offset: u16, data: &[u8]) {
        // A function that is gone takes nothing; whoever reads it is told.
        let _ = self.file.write_all_at(data, self.config_at + u64::from(offset));
    }

    /// What memory or I/O region `index` (0 to 5) is, if it is there.
    pub fn region(&self, index: u32) -> Option<&RegionInfo> {
        self.regions.get(index as usize)?.as_ref()
    }

    /// Reads a region through the kernel, where it is not or cannot be mapped; all ones where it does not answer.
    pub fn region_read(&self, index: u32, offset: u64, data: &mut [u8]) {
        let at = self.region_at(index, offset, data.len());
        let read = at.map(|at| self.file.read_exact_at(data, at));
        if !matches!(read, Some(Ok(()))) {
            data.fill(0xff);
        }
    }

    /// Writes a region through the kernel. What does not answer takes nothing.
    pub fn region_write(&self, index: u32, offset: u64, data: &[u8]) {
        if let Some(at) = self.region_at(index, offset, data.len()) {
            let _ = self.file.write_all_at(data, at);
        }
    }

    /// Where these bytes of a region are in the function's file, if they all lie in it.
    fn region_at(&self, index: u32, offset: u64, len: usize) -> Option<u64> {
        let region = self.region(index)?;
        let end = offset.checked_add(len as u64)?;
        (end <= region.len).then(|| region.at + offset)
    }

    /// Maps memory region `index` (0 to 5).
    ///
    /// # Errors
    /// There is none, it cannot be mapped, or the kernel refuses.
    pub fn map(self: &Arc<Self>, index: u32) -> Result<Region, VfioError> {
        let len = self.region(index).map_or(0, |region| region.len);
        self.map_part(index, 0..len)
    }

    /// Maps a part of memory region `index`: whole pages of what its [`RegionInfo`] calls mappable.
    ///
    /// # Errors
    /// There is none, it cannot be mapped, or the kernel refuses.
    pub fn map_part(self: &Arc<Self>, index: u32, part: Range<u64>) -> Result<Region, VfioError> {
        let none = VfioError::Region { bdf: self.bdf, index };
        let failed = |source| VfioError::Kernel {
            what: self.bdf.to_string(),
            doing: "mapping a memory region",
            source,
        };
        let Some(info) = self.region(index) else { return Err(none) };
        let len = part.end.checked_sub(part.start).and_then(|len| usize::try_from(len).ok());
        let inside = |whole: &Range<u64>| whole.start <= part.start && part.end <= whole.end;
        let len = len.and_then(NonZeroUsize::new).filter(|_| info.mappable.iter().any(inside));
        let offset = info.at.checked_add(part.start).and_then(|offset| i64::try_from(offset).ok());
        let (Some(len), Some(offset)) = (len, offset) else { return Err(none) };
        // SAFETY: a new mapping at an address of the kernel's choice; it touches no memory that is in use.
        let start = unsafe {
            mmap(
                None,
                len,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                &self.file,
                offset,
            )
        };
        let start = start.map_err(|e| failed(e.into()))?.cast();
        Ok(Region { start, len, _device: self.clone() })
    }

    /// How many interrupts of this kind it has.
    pub fn interrupts(&self, kind: Interrupt) -> u32 {
        interrupts::count(&self.file, kind)
    }

    /// Whether more interrupts of this kind can be given events while others have them already.
    pub fn interrupts_grow(&self, kind: Interrupt) -> bool {
        interrupts::grow(&self.file, kind)
    }

    /// Lets the interrupts of this kind from the `first` on signal `events`, one each; without any, turns the kind off.
    ///
    /// # Errors
    /// It has fewer, or the kernel refuses.
    pub fn signal(&self, kind: Interrupt, first: u32, events: &[BorrowedFd<'_>]) -> io::Result<()> {
        interrupts::signal(self.file.as_fd(), kind, first, events)
    }

    /// Lets `event` unmask the interrupt line, which the kernel masks each time that it signals.
    ///
    /// # Errors
    /// The line signals nobody, or the kernel refuses.
    pub fn unmask_by(&self, event: BorrowedFd<'_>) -> io::Result<()> {
        interrupts::unmask_by(self.file.as_fd(), event)
    }

    /// What becomes readable when [`Device::must_go`] has something to say.
    pub fn alarms(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        [&self.error, &self.request].into_iter().flatten().map(AsFd::as_fd)
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
}
