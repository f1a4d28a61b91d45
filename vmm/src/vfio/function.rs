//! A passed-through function on the guest's bus: its regions where the guest put them, every access that is trapped.
//!
//! Owns the order of things: memory slots are gone before the device stops answering to memory accesses (the guest cleared
//! memory enable, or put it to sleep), and come back after it answers again, so that a touched BAR reads all ones and never ends
//! the machine. A device that is taken away reads all ones from then on.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;

use super::Hardware;
use super::bars::{self, PAGE, Windows};
use super::lines::Lines;
use super::space::Space;
use super::watch::Watch;
use crate::device::lock;
use crate::interrupts::Interrupts;
use crate::pci::Function;
use crate::pci::msix::ENTRY;

/// The function, and the thread that hears of its end.
pub(super) struct Passed {
    // Dropped first: it has the function too.
    _watch: Watch,
    inner: Arc<Mutex<Inner>>,
}

/// What it is made of.
pub(super) struct Inner {
    space: Space,
    lines: Lines,
    parts: Vec<Part>,
    asleep: bool,
    vm: Arc<VmFd>,
    /// `None`: it was taken away.
    device: Option<Box<dyn Hardware>>,
}

/// A part of a region that the guest reaches without us.
struct Part {
    bar: usize,
    at: Range<u64>,
    window: super::Window,
    slot: u32,
    /// Where the guest has it now.
    guest: Option<u64>,
}

/// What a trapped access goes to.
enum Target {
    Table(u64),
    Pending(u64),
    Region(u32, u64),
    /// It lies in a region and ends outside of it, or the device sleeps.
    Nothing,
}

impl Passed {
    /// Makes a function of `device`: its regions in `windows`, its parts in memory slots from `next_slot` on, its line on input
    /// `line` of the I/O APIC if it has one.
    ///
    /// # Errors
    /// No more eventfds, interrupts or addresses are to be had.
    pub(super) fn new(
        device: Box<dyn Hardware>,
        windows: &mut Windows,
        next_slot: &mut u32,
        line: u32,
        interrupts: &Arc<Interrupts>,
    ) -> Result<Self, super::PassError> {
        let mut raw = vec![0xff; device.config_len().min(4096)];
        for (n, bytes) in raw.chunks_mut(4).enumerate() {
            device.config_read(4 * n as u16, bytes);
        }
        let regions: [super::Extent; 6] = std::array::from_fn(|index| device.region(index as u32));
        let has_line = device.has_line();
        let mut space =
            Space::new(&raw, std::array::from_fn(|n| regions.get(n).map_or(0, |r| r.len)), has_line);
        // It answers to nothing before the guest says so.
        device.config_write(4, &[0, 0]);
        let mut parts = Vec::new();
        for (bar, extent) in regions.iter().enumerate() {
            let Some(shown) = space.bars.get(bar).copied().flatten() else { continue };
            let none = || super::PassError::Window { name: device.name(), bar, len: shown.len };
            space.place(bar, windows.take(shown.len, shown.wide).ok_or_else(none)?);
            for at in bars::parts(shown.len, &extent.mappable, &trapped(&space, bar)) {
                // What cannot be mapped is trapped, and slower.
                let Some(window) = device.map(bar as u32, at.clone()) else { continue };
                parts.push(Part { bar, at, window, slot: *next_slot, guest: None });
                *next_slot += 1;
            }
        }
        let lines = Lines::new(&space, has_line.then_some(line), interrupts)
            .map_err(|source| super::PassError::Interrupts { name: device.name(), source })?;
        let vm = interrupts.vm().clone();
        let (name, alarms) = (device.name(), device.alarms());
        let mut inner = Inner { space, lines, parts, asleep: false, vm, device: Some(device) };
        inner.follow();
        let inner = Arc::new(Mutex::new(inner));
        let watch = Watch::start(inner.clone(), &name, alarms);
        let watch = watch.map_err(|source| super::PassError::Interrupts { name, source })?;
        Ok(Self { _watch: watch, inner })
    }
}

/// The MSI-X structures that lie in region `bar`.
fn trapped(space: &Space, bar: usize) -> Vec<Range<u64>> {
    let Some(msix) = space.msix else { return Vec::new() };
    let count = u64::from(msix.count);
    let (table, pending) = (count * ENTRY as u64, count.div_ceil(64) * 8);
    [(msix.table, table), (msix.pending, pending)]
        .into_iter()
        .filter(|((of, _), _)| *of == bar)
        .map(|((_, at), len)| at..at + len)
        .collect()
}

impl Function for Passed {
    fn read_config(&self, register: usize, data: &mut [u8]) {
        let inner = lock(&self.inner);
        match &inner.device {
            Some(device) => inner.space.read(register, data, device.as_ref()),
            None => data.fill(0xff),
        }
    }

    fn write_config(&self, register: usize, data: &[u8]) {
        lock(&self.inner).write_config(register, data);
    }

    fn read_memory(&self, address: u64, data: &mut [u8]) -> bool {
        let inner = lock(&self.inner);
        let Some(target) = inner.target(address, data.len()) else { return false };
        data.fill(0xff);
        match (target, &inner.device) {
            (Target::Table(offset), _) => inner.lines.read_table(offset, data),
            (Target::Pending(offset), _) => inner.lines.read_pending(offset, data),
            (Target::Region(index, offset), Some(device)) => device.read(index, offset, data),
            _ => {}
        }
        true
    }

    fn write_memory(&self, address: u64, data: &[u8]) -> bool {
        let mut inner = lock(&self.inner);
        let Some(target) = inner.target(address, data.len()) else { return false };
        let Inner { lines, device: Some(device), .. } = &mut *inner else { return true };
        match target {
            Target::Table(offset) => lines.write_table(offset, data, device.as_ref()),
            Target::Region(index, offset) => device.write(index, offset, data),
            Target::Pending(_) | Target::Nothing => {}
        }
        true
    }
}

impl Inner {
    fn write_config(&mut self, register: usize, data: &[u8]) {
        let forwards = self.space.write(register, data);
        let power = self.space.power_change(&forwards);
        self.asleep |= power.is_some_and(|state| state != 0);
        // Away before the device stops to answer …
        self.map();
        let Some(device) = &self.device else { return };
        forwards.iter().for_each(|forward| device.config_write(forward.at, &forward.bytes));
        if power.is_some() {
            self.asleep = self.space.power_state(device.as_ref()) != 0;
        }
        self.follow();
    }

    /// … and there again after it answers. Interrupts as the guest has set them.
    fn follow(&mut self) {
        self.map();
        if let Some(device) = &self.device {
            self.lines.follow(&self.space, device.as_ref());
        }
    }

    /// Puts the parts of the regions where the guest has them now: first away, then there, as one may go to where another was.
    fn map(&mut self) {
        let awake = !self.asleep && self.device.is_some();
        let wanted: Vec<Option<u64>> = self
            .parts
            .iter()
            .map(|part| self.space.bar(part.bar).filter(|_| awake)?.checked_add(part.at.start))
            .collect();
        for (part, wanted) in self.parts.iter_mut().zip(&wanted) {
            if part.guest.is_some() && part.guest != *wanted {
                part.set(&self.vm, None);
            }
        }
        for (part, wanted) in self.parts.iter_mut().zip(wanted) {
            if part.guest != wanted {
                part.set(&self.vm, wanted);
            }
        }
    }

    /// What is at a guest-physical address.
    fn target(&self, address: u64, len: usize) -> Option<Target> {
        let (index, offset, of) = (0..self.space.bars.len()).find_map(|index| {
            let of = self.space.bars.get(index).copied().flatten()?.len;
            let offset = address.checked_sub(self.space.bar(index)?).filter(|offset| *offset < of)?;
            Some((index, offset, of))
        })?;
        if self.asleep || self.device.is_none() || offset + len as u64 > of {
            return Some(Target::Nothing);
        }
        if let Some(msix) = self.space.msix {
            let within = |(bar, at): (usize, u64), len: u64| {
                offset.checked_sub(at).filter(|offset| bar == index && *offset < len)
            };
            let count = u64::from(msix.count);
            if let Some(offset) = within(msix.table, count * ENTRY as u64) {
                return Some(Target::Table(offset));
            }
            if let Some(offset) = within(msix.pending, count.div_ceil(64) * 8) {
                return Some(Target::Pending(offset));
            }
        }
        Some(Target::Region(index as u32, offset))
    }

    /// The kernel takes the device away: from here on everything reads all ones.
    pub(super) fn take_away(&mut self) {
        let device = self.device.take();
        self.map();
        self.parts.clear();
        if let Some(device) = device {
            self.lines.stop(device.as_ref());
        }
    }

    /// Why the device must be given away, if it must.
    pub(super) fn must_go(&self) -> Option<(String, &'static str)> {
        let device = self.device.as_ref()?;
        Some((device.name(), device.must_go()?))
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Before the regions are unmapped in this process.
        self.take_away();
    }
}

impl Part {
    /// Gives the part to the guest at an address, or takes it away.
    fn set(&mut self, vm: &VmFd, guest: Option<u64>) {
        let len = self.at.end - self.at.start;
        let region = kvm_userspace_memory_region {
            slot: self.slot,
            flags: 0,
            guest_phys_addr: guest.or(self.guest).unwrap_or(0),
            memory_size: if guest.is_some() { len } else { 0 },
            userspace_addr: self.window.start,
        };
        debug_assert!(len.is_multiple_of(PAGE));
        // SAFETY: the window is mapped as long as `self` lives, and the slot is taken away before it goes.
        let done = unsafe { vm.set_user_memory_region(region) };
        match (done, guest) {
            (Ok(()), _) => self.guest = guest,
            // A place where something else is, or beyond what the processor can address: the guest's own mistake. The region
            // is trapped there, as far as accesses reach us at all.
            (Err(error), Some(at)) => {
                tracing::debug!("a device's region cannot be at {at:#x}: {error}");
            }
            (Err(error), None) => tracing::warn!("KVM keeps a device's region: {error}"),
        }
    }
}
