//! virtio over PCI (virtio 1.3, 4.1): a modern device's registers, its queues' set-up, its vectors.
//!
//! Owns everything up to DRIVER_OK, when the device gets its queues and their registers freeze. Whatever a guest writes is
//! masked, checked or ignored here; a device sees queues that lie whole in memory. Notifications go by ioeventfd from KVM to
//! whoever works on the queue, interrupts by irqfd back: neither passes here.

mod registers;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex};

use kvm_ioctls::{IoEventAddress, NoDatamatch};
use virtio::memory::HostRange;
use vmm_sys_util::eventfd::EventFd;

use crate::control::report::{DeviceReport, QueueReport};
use crate::device::lock;
use crate::interrupts::Interrupts;
use crate::lifecycle::Lifecycle;
use crate::memory::GuestMemory;
use crate::pci::msix::{ENTRY, MsiX};
use crate::pci::{ConfigSpace, Function, Identity};
use registers::{NO_VECTOR, Registers, Wanted};

/// BAR 0: a page for each structure, so that notifications share a page with nothing else.
pub(crate) const BAR_SIZE: u32 = 0x8000;
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;
/// Two pages: a card with 128 pairs of queues has 258 vectors.
const MSIX_PENDING: u64 = 0x6000;
const PAGE: u64 = 0x1000;
/// Bytes between the notification addresses of two queues.
const NOTIFY_STEP: u32 = 4;

/// Capabilities: vendor specific (virtio 4.1.4) and MSI-X (PCI 3.0, 6.8.2), and the latter's message control.
const CAPABILITY_VIRTIO: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;
const MSIX_CONTROL_WRITABLE: u16 = 1 << 15 | 1 << 14;
/// Red Hat's vendor number; modern devices are their virtio number above 0x1040 (4.1.2).
const VENDOR: u16 = 0x1af4;
const MODERN: u16 = 0x1040;

/// A queue as the driver set it up: it lies whole in the guest's memory.
#[derive(Debug)]
pub(crate) struct QueueSetup {
    /// Which of the device's.
    pub(crate) index: u16,
    /// Entries.
    pub(crate) size: u16,
    /// Descriptor table or ring, driver area, device area.
    pub(crate) descriptors: HostRange,
    pub(crate) driver: HostRange,
    pub(crate) device: HostRange,
    /// Signalled by the driver.
    pub(crate) kick: EventFd,
    /// Interrupts the driver; `None`: it polls.
    pub(crate) call: Option<EventFd>,
}

/// What a device gets when its driver is ready.
#[derive(Debug)]
pub(crate) struct Activation {
    /// What driver and device agreed on.
    pub(crate) features: u64,
    /// The queues that it enabled.
    pub(crate) queues: Vec<QueueSetup>,
    /// Tells the driver that the device's configuration changed; `None`: it does not want to know.
    pub(crate) changed: Option<EventFd>,
}

/// A kind of device. Its methods run on vCPU threads: none may wait.
pub(crate) trait VirtioDevice: Send {
    /// Its number (virtio 1.3, chapter 5), and PCI's base class and subclass for it.
    fn kind(&self) -> (u16, u16);
    /// What it offers.
    fn features(&self) -> u64;
    /// The most entries of each queue.
    fn queue_sizes(&self) -> Vec<u16>;
    /// Its own configuration, whole.
    fn config(&self) -> Vec<u8>;
    /// Another number after each change of the configuration (4.1.4.3.1).
    fn generation(&self) -> u8 {
        0
    }
    /// The driver is ready.
    fn activate(&mut self, activation: Activation);
    /// Begins to let go of the queues.
    fn reset(&mut self);
    /// Whether it has let go of the queues.
    fn is_reset(&self) -> bool;
    /// What of it runs by itself.
    fn lifecycle(&self) -> &dyn Lifecycle;
    /// Whether its back end is connected, if it has one.
    fn back_end(&self) -> Option<bool> {
        None
    }
    /// The queues that this process works on.
    fn queue_reports(&self) -> Vec<QueueReport> {
        Vec::new()
    }
    /// Whether it cannot go on before it is reset, because of something that the driver did.
    fn is_broken(&self) -> bool {
        false
    }
}

/// A device on the bus.
pub(crate) struct VirtioPci(Mutex<Inner>);

struct Inner {
    space: ConfigSpace,
    msix_at: usize,
    msix: MsiX,
    registers: Registers,
    device: Box<dyn VirtioDevice>,
    resetting: bool,
    memory: Arc<GuestMemory>,
    interrupts: Arc<Interrupts>,
    kicks: Vec<EventFd>,
    /// Notifications that took an exit.
    kicked: u64,
    /// Where BAR 0 is and KVM knows the notification addresses.
    mapped: Option<u64>,
}

impl VirtioPci {
    /// Makes a function of `device`, with BAR 0 at `bar`.
    ///
    /// # Errors
    /// No more eventfds or interrupts are to be had.
    pub(crate) fn new(
        device: Box<dyn VirtioDevice>,
        bar: u32,
        memory: Arc<GuestMemory>,
        interrupts: Arc<Interrupts>,
    ) -> std::io::Result<Self> {
        let (kind, class) = device.kind();
        let sizes = device.queue_sizes();
        let identity =
            Identity { vendor: VENDOR, device: MODERN + kind, subsystem: MODERN + kind, class, revision: 1 };
        let mut space = ConfigSpace::endpoint(identity);
        space.add_bar(BAR_SIZE, bar);
        // A vector for each queue and one for changes of the configuration.
        let vectors = sizes.len() as u16 + 1;
        let mut msix = vec![];
        msix.extend((vectors - 1).to_le_bytes());
        msix.extend((MSIX_TABLE as u32).to_le_bytes());
        msix.extend((MSIX_PENDING as u32).to_le_bytes());
        let no_room = || std::io::Error::from(std::io::ErrorKind::OutOfMemory);
        let msix_at = space.add_capability(CAPABILITY_MSIX, &msix).ok_or_else(no_room)?;
        space.allow(msix_at + 2, MSIX_CONTROL_WRITABLE.to_le_bytes());
        // Types of structures: 4.1.4.
        for (kind, at, length) in [
            (1, COMMON, registers::LENGTH as u32),
            (3, ISR, 1),
            (4, DEVICE, PAGE as u32),
            (2, NOTIFY, PAGE as u32),
        ] {
            let step = if kind == 2 { &NOTIFY_STEP.to_le_bytes()[..] } else { &[] };
            let mut body = vec![16 + step.len() as u8, kind, 0, 0, 0, 0];
            body.extend((at as u32).to_le_bytes());
            body.extend(length.to_le_bytes());
            body.extend(step);
            space.add_capability(CAPABILITY_VIRTIO, &body).ok_or_else(no_room)?;
        }
        let kicks = sizes.iter().map(|_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC));
        Ok(Self(Mutex::new(Inner {
            space,
            msix_at,
            msix: MsiX::new(vectors, interrupts.clone())?,
            registers: Registers::new(device.features(), &sizes, vectors),
            kicks: kicks.collect::<std::io::Result<_>>()?,
            device,
            resetting: false,
            kicked: 0,
            memory,
            interrupts,
            mapped: None,
        })))
    }
}

impl Function for VirtioPci {
    fn read_config(&self, register: usize, data: &mut [u8]) {
        lock(&self.0).space.read(register, data);
    }

    fn write_config(&self, register: usize, data: &[u8]) {
        let mut inner = lock(&self.0);
        inner.space.write(register, data);
        let mut control = [0; 2];
        inner.space.read(inner.msix_at + 2, &mut control);
        inner.msix.set_control(u16::from_le_bytes(control));
        inner.map();
    }

    fn read_memory(&self, address: u64, data: &mut [u8]) -> bool {
        let mut inner = lock(&self.0);
        let Some(offset) = inner.offset(address) else { return false };
        inner.read(offset, data);
        true
    }

    fn write_memory(&self, address: u64, data: &[u8]) -> bool {
        let mut inner = lock(&self.0);
        let Some(offset) = inner.offset(address) else { return false };
        inner.write(offset, data);
        true
    }

    fn lifecycle(&self) -> Option<&dyn Lifecycle> {
        Some(self)
    }

    fn report(&self) -> Option<DeviceReport> {
        let inner = lock(&self.0);
        let kind = match inner.device.kind().0 {
            1 => "net",
            2 => "disk",
            3 => "console",
            4 => "rng",
            _ => "other",
        };
        Some(DeviceReport {
            name: inner.device.lifecycle().name(),
            kind: kind.to_owned(),
            back_end: inner.device.back_end(),
            kicks: inner.kicked,
            queues: inner.device.queue_reports(),
        })
    }
}

impl Lifecycle for VirtioPci {
    fn name(&self) -> String {
        lock(&self.0).device.lifecycle().name()
    }

    fn pause(&self) {
        lock(&self.0).device.lifecycle().pause();
    }

    fn is_paused(&self) -> bool {
        lock(&self.0).device.lifecycle().is_paused()
    }

    fn resume(&self) {
        lock(&self.0).device.lifecycle().resume();
    }
}

impl Inner {
    /// The offset into BAR 0.
    fn offset(&self, address: u64) -> Option<u64> {
        address.checked_sub(self.mapped?).filter(|offset| *offset < BAR_SIZE.into())
    }

    /// Tells KVM where notifications are now, after BAR 0 moved or was switched on or off.
    fn map(&mut self) {
        let bar = self.space.bar();
        if bar == self.mapped {
            return;
        }
        let at = |bar: u64, n: usize| IoEventAddress::Mmio(bar + NOTIFY + n as u64 * u64::from(NOTIFY_STEP));
        for (n, kick) in self.kicks.iter().enumerate() {
            let vm = self.interrupts.vm();
            // What KVM refuses (a place that another device has) still works, by an exit.
            if let Some(before) = self.mapped {
                let _ = vm.unregister_ioevent(kick, &at(before, n), NoDatamatch);
            }
            if let Some(now) = bar {
                let _ = vm.register_ioevent(kick, &at(now, n), NoDatamatch);
            }
        }
        self.mapped = bar;
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let within = (offset % PAGE) as usize;
        match offset - offset % PAGE {
            COMMON => {
                if !self.is_resetting() && self.device.is_broken() {
                    self.registers.needs_reset();
                }
                self.registers.set_generation(self.device.generation());
                self.registers.read(within, data);
            }
            DEVICE => {
                let config = self.device.config();
                data.iter_mut().zip(config.iter().skip(within)).for_each(|(to, from)| *to = *from);
            }
            MSIX_TABLE..MSIX_PENDING => self.msix.read_table((offset - MSIX_TABLE) as usize, data),
            MSIX_PENDING => self.msix.read_pending(within, data),
            // The ISR status serves interrupt lines, which these devices have not.
            _ => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let within = (offset % PAGE) as usize;
        match offset - offset % PAGE {
            // A driver waits until the status reads 0 (4.1.4.3.2). What one writes that does not wait would reach the device
            // beside its reset, or pile up before it.
            COMMON if self.is_resetting() => {}
            COMMON => match self.registers.write(within, data) {
                Wanted::Nothing => {}
                Wanted::Reset => {
                    self.resetting = true;
                    self.device.reset();
                }
                Wanted::Start => self.start(),
            },
            NOTIFY => {
                if let Some(kick) = self.kicks.get(within / NOTIFY_STEP as usize) {
                    // SAFETY: it is open as long as `self` lives.
                    let kick =
                        unsafe { std::os::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(kick)) };
                    // A back end holds it too, and may have filled it: this never waits.
                    host::signal::signal(kick);
                    self.kicked += 1;
                }
            }
            MSIX_TABLE..MSIX_PENDING if offset - MSIX_TABLE < u64::from(self.msix.count()) * ENTRY as u64 => {
                self.msix.write_table((offset - MSIX_TABLE) as usize, data)
            }
            _ => {}
        }
    }

    /// Whether the device still holds the queues of before its reset.
    fn is_resetting(&mut self) -> bool {
        if self.resetting && self.device.is_reset() {
            self.resetting = false;
            self.registers.reset();
        }
        self.resetting
    }

    /// Gives the device its queues, or asks the driver to reset it if these make no sense.
    fn start(&mut self) {
        let features = self.registers.features();
        let mut queues = Vec::new();
        for (index, (registers, kick)) in (0..).zip(self.registers.queues().iter().zip(&self.kicks)) {
            // A driver uses as many queues as it has vCPUs, say.
            if !registers.enabled {
                continue;
            }
            let lengths = registers.lengths(features);
            let host = |address: u64, length: u64, align: u64| {
                let at =
                    self.memory.host_address(address, length).filter(|_| address.is_multiple_of(align))?;
                Some(HostRange { ptr: at as *mut u8, len: usize::try_from(length).ok()?, guest: address })
            };
            let (descriptors, driver, device) = (
                host(registers.descriptors, lengths.descriptors, 16),
                host(registers.driver, lengths.driver, lengths.driver_align),
                host(registers.device, lengths.device, 4),
            );
            let call = self.event(registers.vector);
            let (Some(descriptors), Some(driver), Some(device), Ok(kick)) =
                (descriptors, driver, device, kick.try_clone())
            else {
                tracing::warn!(
                    "the guest's driver set up a virtqueue that is not in its memory: {registers:x?}"
                );
                self.registers.needs_reset();
                return;
            };
            queues.push(QueueSetup { index, size: registers.size, descriptors, driver, device, kick, call });
        }
        let changed = self.event(self.registers.config_vector());
        self.device.activate(Activation { features, queues, changed });
    }

    /// What signals a vector that the driver chose.
    fn event(&self, vector: u16) -> Option<EventFd> {
        if vector == NO_VECTOR { None } else { self.msix.event(vector) }
    }
}
