//! Interrupts of a passed-through function: from its vectors or its line into KVM, without us in between.
//!
//! Owns which kind is in use, as the guest sets it: MSI-X over MSI over the line. A vector is tied to the device when the guest
//! first unmasks it, and routed by KVM then: vectors that nobody uses cost nothing.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use host::vfio::Interrupt;
use vmm_sys_util::eventfd::EventFd;

use super::Hardware;
use super::space::{Msi, Space};
use crate::interrupts::{Interrupts, Line};
use crate::pci::msix::{ENTRY, MsiX};

/// Message control of MSI-X: on (PCI 3.0, 6.8.2.3).
const MSIX_ENABLE: u16 = 1 << 15;
/// Where a table entry has its parts.
const ENTRY_DATA: usize = 8;
const ENTRY_CONTROL: usize = 12;

/// All of a function's interrupts.
pub(super) struct Lines {
    msix: Option<MsiX>,
    /// The one message of MSI: a table of one vector that the guest does not see.
    msi: Option<MsiX>,
    line: Option<Line>,
    active: Option<Interrupt>,
    /// Vectors that the device signals already.
    tied: Vec<bool>,
}

impl Lines {
    /// As many vectors as `space` shows the guest, and a line on input `number` of the I/O APIC if the device has one.
    ///
    /// # Errors
    /// No more eventfds or interrupts are to be had.
    pub(super) fn new(
        space: &Space,
        number: Option<u32>,
        interrupts: &Arc<Interrupts>,
    ) -> std::io::Result<Self> {
        let vectors = |count| MsiX::new(count, interrupts.clone());
        let msix = space.msix.map(|msix| vectors(msix.count)).transpose()?;
        Ok(Self {
            tied: vec![false; msix.as_ref().map_or(0, |msix| msix.count().into())],
            msix,
            msi: space.msi.map(|_| vectors(1)).transpose()?,
            line: number.map(|number| Line::new(interrupts.clone(), number)).transpose()?,
            active: None,
        })
    }

    /// Reads the MSI-X table.
    pub(super) fn read_table(&self, offset: u64, data: &mut [u8]) {
        if let Some(msix) = &self.msix {
            msix.read_table(offset as usize, data);
        }
    }

    /// Writes the MSI-X table.
    pub(super) fn write_table(&mut self, offset: u64, data: &[u8], device: &dyn Hardware) {
        if let Some(msix) = &mut self.msix {
            msix.write_table(offset as usize, data);
            self.tie(offset as usize / ENTRY..offset as usize / ENTRY + 1, device);
        }
    }

    /// Reads the pending bits of MSI-X.
    pub(super) fn read_pending(&self, offset: u64, data: &mut [u8]) {
        if let Some(msix) = &self.msix {
            msix.read_pending(offset as usize, data);
        }
    }

    /// Does what the guest wrote to configuration space.
    pub(super) fn follow(&mut self, space: &Space, device: &dyn Hardware) {
        let control = space.msix_control();
        if let Some(msix) = &mut self.msix {
            msix.set_control(control);
        }
        let message = space.msi_message();
        if let (Some(msi), Some(message)) = (&mut self.msi, message) {
            set_message(msi, message);
        }
        let wanted = if self.msix.is_some() && control & MSIX_ENABLE != 0 {
            Some(Interrupt::Msix)
        } else if message.is_some_and(|message| message.enabled) {
            Some(Interrupt::Msi)
        } else {
            self.line.as_ref().map(|_| Interrupt::Line)
        };
        if wanted != self.active {
            if let Some(before) = self.active.take() {
                told(device.signal(before, 0, &[]), before, device);
            }
            self.tied.fill(false);
            if let Some(kind) = wanted {
                told(self.begin(kind, device), kind, device);
            }
            self.active = wanted;
        }
        self.tie(0..self.tied.len(), device);
    }

    /// The device goes away: it signals nothing any more.
    pub(super) fn stop(&mut self, device: &dyn Hardware) {
        if let Some(kind) = self.active.take() {
            // Closing it does the same.
            let _ = device.signal(kind, 0, &[]);
        }
    }

    /// Lets the device signal by another kind of interrupt than before.
    fn begin(&mut self, kind: Interrupt, device: &dyn Hardware) -> std::io::Result<()> {
        match (kind, &self.line) {
            (Interrupt::Line, Some(line)) => {
                device.signal(kind, 0, &[borrowed(&line.signal)])?;
                device.unmask_by(borrowed(&line.done))
            }
            (Interrupt::Line, None) => Ok(()),
            _ => {
                // The first vector stands for the kind: with it, the device has it switched on.
                let vectors = if kind == Interrupt::Msi { &self.msi } else { &self.msix };
                let event = vectors.as_ref().and_then(|vectors| vectors.event(0));
                let event = event.ok_or(std::io::ErrorKind::NotFound)?;
                if kind == Interrupt::Msix
                    && let Some(first) = self.tied.first_mut()
                {
                    *first = true;
                }
                device.signal(kind, 0, &[borrowed(&event)])
            }
        }
    }

    /// Ties those of the vectors `which` that the guest uses and the device does not signal yet.
    fn tie(&mut self, which: std::ops::Range<usize>, device: &dyn Hardware) {
        let Some(msix) = self.msix.as_ref().filter(|_| self.active == Some(Interrupt::Msix)) else { return };
        for n in which {
            let is_new = self.tied.get(n) == Some(&false) && msix.is_connected(n);
            let Some(event) = msix.event(n as u16).filter(|_| is_new) else { continue };
            let done = if device.interrupts_grow(Interrupt::Msix) {
                if let Some(tied) = self.tied.get_mut(n) {
                    *tied = true;
                }
                device.signal(Interrupt::Msix, n as u32, &[borrowed(&event)])
            } else {
                // All of them anew, and those between along: a kernel before 6.5 sets them up once.
                let events: Vec<EventFd> =
                    (0..self.tied.len()).filter_map(|n| msix.event(n as u16)).collect();
                let events: Vec<BorrowedFd<'_>> = events.iter().map(borrowed).collect();
                self.tied.fill(true);
                let off = device.signal(Interrupt::Msix, 0, &[]);
                off.and_then(|()| device.signal(Interrupt::Msix, 0, &events))
            };
            told(done, Interrupt::Msix, device);
        }
    }
}

/// A guest whose device cannot interrupt is better off with a device that is silent than without a machine.
fn told(done: std::io::Result<()>, kind: Interrupt, device: &dyn Hardware) {
    if let Err(error) = done {
        tracing::warn!(
            "{}: the host's kernel refuses to set up its interrupts ({kind:?}): {error}",
            device.name()
        );
    }
}

fn set_message(msi: &mut MsiX, message: Msi) {
    msi.write_table(0, &message.address.to_le_bytes());
    msi.write_table(ENTRY_DATA, &message.data.to_le_bytes());
    msi.write_table(ENTRY_CONTROL, &[0; 4]);
    msi.set_control(if message.enabled { MSIX_ENABLE } else { 0 });
}

fn borrowed(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: it is open as long as `event` is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
