//! Interrupts of a function, each a number of a kind, and the eventfds that they signal.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::sys::eventfd::{EfdFlags, EventFd};
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_NORESIZE, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_UNMASK,
    VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE, VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_INTX_IRQ_INDEX,
    VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX, vfio_irq_info,
};

use super::sys;

/// A kind of interrupt of a function. One of the first three works at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupt {
    /// The line, which is masked by the kernel each time that it signals (PCI 3.0, section 2.2.6).
    Line,
    /// Messages, neighbouring numbers (PCI 3.0, section 6.8.1).
    Msi,
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
            Self::Line => VFIO_PCI_INTX_IRQ_INDEX,
            Self::Msi => VFIO_PCI_MSI_IRQ_INDEX,
            Self::Msix => VFIO_PCI_MSIX_IRQ_INDEX,
            Self::Error => VFIO_PCI_ERR_IRQ_INDEX,
            Self::Request => VFIO_PCI_REQ_IRQ_INDEX,
        }
    }
}

fn info(file: &File, kind: Interrupt) -> Option<vfio_irq_info> {
    let argsz = size_of::<vfio_irq_info>() as u32;
    let mut info = vfio_irq_info { argsz, index: kind.index(), ..vfio_irq_info::default() };
    // SAFETY: the structure of this request, of the size that it says.
    unsafe { sys::with(file.as_fd(), sys::DEVICE_GET_IRQ_INFO, &mut info) }.ok()?;
    Some(info)
}

/// How many there are.
pub(super) fn count(file: &File, kind: Interrupt) -> u32 {
    info(file, kind).map_or(0, |info| info.count)
}

/// Whether more can be added while some are in use (Linux 6.5 and later, where the platform can).
pub(super) fn grow(file: &File, kind: Interrupt) -> bool {
    info(file, kind).is_some_and(|info| info.flags & VFIO_IRQ_INFO_NORESIZE == 0)
}

/// Hears of `kind`, where the function has it.
pub(super) fn watch(file: &File, kind: Interrupt) -> Option<EventFd> {
    if count(file, kind) == 0 {
        return None;
    }
    let event = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).ok()?;
    signal(file.as_fd(), kind, 0, &[event.as_fd()]).ok()?;
    Some(event)
}

/// Ties interrupts to events, or all of the kind to nothing.
pub(super) fn signal(
    fd: BorrowedFd<'_>,
    kind: Interrupt,
    first: u32,
    events: &[BorrowedFd<'_>],
) -> io::Result<()> {
    set(fd, VFIO_IRQ_SET_ACTION_TRIGGER, kind, first, events)
}

/// Ties the unmasking of the line to an event.
pub(super) fn unmask_by(fd: BorrowedFd<'_>, event: BorrowedFd<'_>) -> io::Result<()> {
    set(fd, VFIO_IRQ_SET_ACTION_UNMASK, Interrupt::Line, 0, &[event])
}

/// One request: `struct vfio_irq_set`, five words, and the descriptors behind it.
fn set(
    fd: BorrowedFd<'_>,
    action: u32,
    kind: Interrupt,
    first: u32,
    events: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let data = if events.is_empty() { VFIO_IRQ_SET_DATA_NONE } else { VFIO_IRQ_SET_DATA_EVENTFD };
    let size = 4 * (5 + events.len()) as u32;
    let mut set = vec![size, data | action, kind.index(), first, events.len() as u32];
    set.extend(events.iter().map(|event| event.as_raw_fd().cast_unsigned()));
    // SAFETY: the structure of this request and what it says follows, of the size that it says.
    unsafe { sys::with_bytes(fd, sys::DEVICE_SET_IRQS, &mut set) }.map(drop)
}
