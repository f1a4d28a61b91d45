//! A function in our hands: its regions, interrupts, reset.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::Arc;

use nix::sys::eventfd::EventFd;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_RESET, VFIO_PCI_CONFIG_REGION_INDEX, vfio_device_info,
};

use super::interrupts::{self, Interrupt};
use super::regions::{self, RegionInfo};
use super::{Container, VfioError, reset, sys};
use crate::pci::{Bdf, Function};

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
    /// Taken when it is closed, before its group is told.
    file: Option<File>,
    container: Arc<Container>,
    group: u32,
    bdf: Bdf,
    resets: bool,
    config_at: u64,
    config_len: u64,
    /// Memory and I/O regions 0 to 5; none where nothing is.
    regions: [Option<RegionInfo>; 6],
    error: Option<EventFd>,
    request: Option<EventFd>,
}

/// What the kernel means by not opening a function: vfio_pci_validate_vf_token says which is which.
fn refusal(source: io::Error, bdf: Bdf, group: u32, physical: Option<Bdf>, with_token: bool) -> VfioError {
    match (source.raw_os_error(), physical, with_token) {
        (Some(libc::EACCES), Some(physical), false) => VfioError::NoToken { bdf, physical },
        (Some(libc::EACCES), Some(physical), true) => VfioError::WrongToken { bdf, physical },
        (Some(libc::EACCES), None, _) => VfioError::PhysicalToken(bdf),
        (Some(libc::EINVAL), _, true) => VfioError::TokenUnwanted(bdf),
        (Some(libc::EBUSY), ..) => VfioError::Busy { bdf, group },
        _ => VfioError::Kernel { what: bdf.to_string(), doing: "opening it", source },
    }
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
        let why = |source| refusal(source, bdf, group, function.physical, token.is_some());
        let fd: RawFd = opened.map_err(why)?;
        // SAFETY: the kernel made this descriptor for us just now.
        let file = unsafe { File::from_raw_fd(fd) };
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
            file: Some(file),
            container,
            group,
            bdf,
        };
        // Whatever it did for whoever had it before ends here.
        if let Some(file) = device.file.as_ref().filter(|_| device.resets) {
            let read = |at| device.config_read(at);
            reset::reset(file, group_file.as_fd(), bdf, read).map_err(failed("resetting it"))?;
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
        if self.file.as_ref().is_none_or(|file| file.read_exact_at(data, at).is_err()) {
            data.fill(0xff);
        }
    }

    /// Writes configuration space: no byte beside these. The kernel passes on what a driver may change.
    pub fn config_write_bytes(&self, offset: u16, data: &[u8]) {
        if let Some(file) = &self.file {
            // A function that is gone takes nothing; whoever reads it is told.
            let _ = file.write_all_at(data, self.config_at + u64::from(offset));
        }
    }

    /// What memory or I/O region `index` (0 to 5) is, if it is there.
    pub fn region(&self, index: u32) -> Option<&RegionInfo> {
        self.regions.get(index as usize)?.as_ref()
    }

    /// Reads a region through the kernel, where it is not or cannot be mapped; all ones where it does not answer.
    pub fn region_read(&self, index: u32, offset: u64, data: &mut [u8]) {
        let at = self.region_at(index, offset, data.len());
        let read = at.zip(self.file.as_ref()).map(|(at, file)| file.read_exact_at(data, at));
        if !matches!(read, Some(Ok(()))) {
            data.fill(0xff);
        }
    }

    /// Writes a region through the kernel. What does not answer takes nothing.
    pub fn region_write(&self, index: u32, offset: u64, data: &[u8]) {
        if let Some((at, file)) = self.region_at(index, offset, data.len()).zip(self.file.as_ref()) {
            let _ = file.write_all_at(data, at);
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
        let (Some(file), Some(info)) = (&self.file, self.region(index)) else { return Err(none) };
        let len = part.end.checked_sub(part.start).and_then(|len| usize::try_from(len).ok());
        let inside = |whole: &Range<u64>| whole.start <= part.start && part.end <= whole.end;
        let len = len.and_then(NonZeroUsize::new).filter(|_| info.mappable.iter().any(inside));
        let offset = info.at.checked_add(part.start).and_then(|offset| i64::try_from(offset).ok());
        let (Some(len), Some(offset)) = (len, offset) else { return Err(none) };
        // SAFETY: a new mapping at an address of the kernel's choice; it touches no memory that is in use.
        let start = unsafe {
            mmap(None, len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, file, offset)
        };
        let start = start.map_err(|e| failed(e.into()))?.cast();
        Ok(Region { start, len, _device: self.clone() })
    }

    /// How many interrupts of this kind it has.
    pub fn interrupts(&self, kind: Interrupt) -> u32 {
        self.file.as_ref().map_or(0, |file| interrupts::count(file, kind))
    }

    /// Whether more interrupts of this kind can be given events while others have them already.
    pub fn interrupts_grow(&self, kind: Interrupt) -> bool {
        self.file.as_ref().is_some_and(|file| interrupts::grow(file, kind))
    }

    /// Lets the interrupts of this kind from the `first` on signal `events`, one each; without any, turns the kind off.
    ///
    /// # Errors
    /// It has fewer, or the kernel refuses.
    pub fn signal(&self, kind: Interrupt, first: u32, events: &[BorrowedFd<'_>]) -> io::Result<()> {
        interrupts::signal(self.fd()?, kind, first, events)
    }

    /// Lets `event` unmask the interrupt line, which the kernel masks each time that it signals.
    ///
    /// # Errors
    /// The line signals nobody, or the kernel refuses.
    pub fn unmask_by(&self, event: BorrowedFd<'_>) -> io::Result<()> {
        interrupts::unmask_by(self.fd()?, event)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_that_is_not_opened_is_told_why_and_what_to_do() {
        let (bdf, physical) = ("0000:01:10.0".parse().unwrap(), Some("0000:01:00.0".parse().unwrap()));
        let said = |code, physical, token| {
            refusal(io::Error::from_raw_os_error(code), bdf, 7, physical, token).to_string()
        };
        for (text, wanted) in [
            (
                said(libc::EACCES, physical, false),
                "0000:01:10.0 is a virtual function of 0000:01:00.0, which is with vfio-pci: give the token",
            ),
            (
                said(libc::EACCES, physical, true),
                "give both the same `vf_token`, and start the user of 0000:01:00.0",
            ),
            (said(libc::EACCES, None, true), "end their users first"),
            (said(libc::EINVAL, None, true), "take `vf_token` out"),
            (
                said(libc::EBUSY, None, false),
                "another process has /dev/vfio/7 (fuser /dev/vfio/7 shows which)",
            ),
            (said(libc::ENODEV, None, false), "0000:01:10.0: opening it: No such device"),
        ] {
            assert!(text.contains(wanted), "{text}");
        }
    }
}
