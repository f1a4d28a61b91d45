//! Interrupt controllers, and the ways of an interrupt into KVM.
//!
//! Owns where the I/O APIC is: in KVM, or here ("split", as QEMU calls it), with the local APICs in KVM either way. Devices signal
//! vectors (messages), pulse an input of the I/O APIC, or have a line on one, and do not see the difference.

mod io_apic;
mod pins;
mod routes;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex};

use kvm_bindings::{KVM_CAP_SPLIT_IRQCHIP, kvm_enable_cap, kvm_msi};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use crate::config::IrqChip;
use crate::device::lock;
use pins::Pins;
use routes::Routes;

/// Inputs of the I/O APIC: interrupts below this number are its.
const PINS: u32 = io_apic::PINS as u32;

/// What a device writes to interrupt a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Message {
    pub(crate) address: u64,
    pub(crate) data: u32,
}

/// The controllers of a machine.
pub(crate) struct Interrupts {
    routes: Routes,
    /// `None`: KVM has the I/O APIC.
    split: Option<Mutex<Pins>>,
}

impl Interrupts {
    /// Gives a machine without vCPUs its controllers.
    ///
    /// # Errors
    /// KVM refuses.
    pub(crate) fn new(vm: Arc<VmFd>, chip: IrqChip) -> Result<Self, kvm_ioctls::Error> {
        let split = match chip {
            IrqChip::Kernel => {
                vm.create_irq_chip()?;
                None
            }
            IrqChip::Split => {
                // Routes of the inputs are among the first `PINS`: KVM tells of the ends of their interrupts.
                let args = [PINS.into(), 0, 0, 0];
                vm.enable_cap(&kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, args, ..Default::default() })?;
                Some(Mutex::new(Pins::new()))
            }
        };
        Ok(Self { routes: Routes::new(vm, split.is_none()), split })
    }

    /// The machine that they belong to.
    pub(crate) fn vm(&self) -> &Arc<VmFd> {
        self.routes.vm()
    }

    /// A number for a vector; `None` when all are given away.
    pub(crate) fn number(&self) -> Option<u32> {
        self.routes.number()
    }

    /// Routes vector `number` to `message`.
    ///
    /// # Errors
    /// KVM does not take the message.
    pub(crate) fn route(&self, number: u32, message: Message) -> Result<(), kvm_ioctls::Error> {
        self.routes.route(number, message)
    }

    /// Makes input `pin` of the I/O APIC active and inactive again: an edge. Whoever causes an interrupt raises it so, a vCPU most
    /// often. An irqfd would leave that to a kworker on the vCPU's core for any interrupt that is no message, and the vCPU would
    /// be scheduled away for it.
    ///
    /// # Errors
    /// KVM does not do it; a guest that does not want the interrupt is no error.
    pub(crate) fn pulse(&self, pin: u32) -> Result<(), kvm_ioctls::Error> {
        let vm = self.vm();
        let Some(pins) = &self.split else {
            vm.set_irq_line(pin, true)?;
            return vm.set_irq_line(pin, false);
        };
        match lock(pins).pulse(pin) {
            Some(message) => vm.signal_msi(message.into()).map(drop),
            None => Ok(()),
        }
    }

    /// The guest reads a register of the I/O APIC here; `data` stays as it is if that is KVM's.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(pins) = &self.split {
            lock(pins).read(offset, data);
        }
    }

    /// The guest writes a register of the I/O APIC here.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) {
        if let Some(pins) = &self.split {
            lock(pins).write(offset, data, &self.routes);
        }
    }

    /// A vCPU ended an interrupt with this vector that the I/O APIC here has for a level.
    pub(crate) fn end(&self, vector: u8) {
        if let Some(pins) = &self.split {
            lock(pins).end(vector);
        }
    }
}

impl From<Message> for kvm_msi {
    fn from(message: Message) -> Self {
        Self {
            address_lo: message.address as u32,
            address_hi: (message.address >> 32) as u32,
            data: message.data,
            ..Default::default()
        }
    }
}

/// A device's line on an input of the I/O APIC, active as long as the device says so, for as long as this lives.
pub(crate) struct Line {
    /// Makes it active. The device signals it once and then waits for `done`.
    pub(crate) signal: EventFd,
    /// Says that the guest is done with it: a device that is still active signals anew.
    pub(crate) done: EventFd,
    pin: u32,
    /// What it is called there, if the I/O APIC is here.
    name: Option<u64>,
    interrupts: Arc<Interrupts>,
}

impl Line {
    /// A line on input `pin`.
    ///
    /// # Errors
    /// No more eventfds or interrupts are to be had.
    pub(crate) fn new(interrupts: Arc<Interrupts>, pin: u32) -> std::io::Result<Self> {
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let (signal, done) = (event()?, event()?);
        let name = match &interrupts.split {
            Some(pins) => Some(lock(pins).add(pin, &signal, &done, &interrupts.routes)?),
            None => {
                interrupts.vm().register_irqfd_with_resample(&signal, &done, pin)?;
                None
            }
        };
        Ok(Self { signal, done, pin, name, interrupts })
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        match (&self.interrupts.split, self.name) {
            (Some(pins), Some(name)) => lock(pins).remove(name, self.interrupts.vm()),
            _ => drop(self.interrupts.vm().unregister_irqfd(&self.signal, self.pin)),
        }
    }
}
