//! What is on the inputs of an I/O APIC in user space, and what KVM knows of them.
//!
//! Owns the lines of devices: an eventfd that makes an input active and one that says that the guest is done with it. While the
//! input is unmasked, KVM takes the first and interrupts the guest by itself; when it is unmasked, the device is asked. KVM tells
//! of an interrupt's end only where it has a route with a level: an input gets one when the guest first unmasks it so, and keeps
//! it while it is masked, since an interrupt may be under way.

use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use super::io_apic::{IoApic, Written};
use super::{Message, PINS, Routes};

/// The inputs.
pub(super) struct Pins {
    chip: IoApic,
    lines: Vec<Line>,
    /// Lines until now.
    added: u64,
}

/// Of one device.
struct Line {
    name: u64,
    pin: u32,
    signal: EventFd,
    done: EventFd,
    /// KVM listens to `signal`.
    connected: bool,
}

impl Pins {
    pub(super) fn new() -> Self {
        Self { chip: IoApic::new(), lines: Vec::new(), added: 0 }
    }

    /// The guest reads a register.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        self.chip.read(offset, data);
    }

    /// The guest writes a register.
    pub(super) fn write(&mut self, offset: u64, data: &[u8], routes: &Routes) {
        match self.chip.write(offset, data) {
            Written::Nothing => {}
            Written::Entry(pin) => self.settle(pin as u32, routes),
            Written::End(vector) => self.end(vector),
        }
    }

    /// Input `pin` becomes active, and inactive again. What to send.
    pub(super) fn pulse(&mut self, pin: u32) -> Option<Message> {
        self.chip.pulse(pin as usize)
    }

    /// The guest ended the interrupt with this vector: a device that is still active says so anew.
    pub(super) fn end(&mut self, vector: u8) {
        let ended = self.chip.end(vector);
        for line in self.lines.iter().filter(|line| ended >> line.pin & 1 != 0) {
            line.ask();
        }
    }

    /// Puts a device's line on input `pin`; what it is called.
    ///
    /// # Errors
    /// No more eventfds are to be had, or there is no such input.
    pub(super) fn add(
        &mut self,
        pin: u32,
        signal: &EventFd,
        done: &EventFd,
        routes: &Routes,
    ) -> std::io::Result<u64> {
        if pin >= PINS {
            return Err(std::io::ErrorKind::InvalidInput.into());
        }
        let name = self.added;
        self.added += 1;
        let (signal, done) = (signal.try_clone()?, done.try_clone()?);
        self.lines.push(Line { name, pin, signal, done, connected: false });
        self.settle(pin, routes);
        Ok(name)
    }

    /// Takes a line away.
    pub(super) fn remove(&mut self, name: u64, vm: &VmFd) {
        let of_name = self.lines.iter().position(|line| line.name == name);
        if let Some(mut line) = of_name.map(|at| self.lines.swap_remove(at)) {
            line.connect(false, vm);
        }
    }

    /// Has KVM do what the entry of input `pin` says.
    fn settle(&mut self, pin: u32, routes: &Routes) {
        let at = pin as usize;
        let on = !self.chip.is_masked(at);
        let mut lines = self.lines.iter_mut().filter(|line| line.pin == pin).peekable();
        let routed = if !on {
            Ok(())
        } else if self.chip.is_level(at) || lines.peek().is_some() {
            routes.route(pin, self.chip.message(at))
        } else {
            routes.unroute(pin)
        };
        if let Err(error) = &routed {
            // The guest's own mistake: this input stays silent.
            tracing::debug!("input {pin} of the I/O APIC has no message: {error}");
        }
        lines.for_each(|line| line.connect(on && routed.is_ok(), routes.vm()));
    }
}

impl Line {
    /// Has KVM listen to the device, or not. Whatever became of its last interrupt, a device that is still active says so anew.
    fn connect(&mut self, on: bool, vm: &VmFd) {
        if on == self.connected {
            return;
        }
        // What it signalled while nobody listened may be over: it is asked below.
        let _ = self.signal.read();
        let done = match on {
            true => vm.register_irqfd(&self.signal, self.pin),
            false => vm.unregister_irqfd(&self.signal, self.pin),
        };
        if let Err(error) = done {
            tracing::warn!("KVM does not change who signals input {} of the I/O APIC: {error}", self.pin);
            return;
        }
        self.connected = on;
        if on {
            self.ask();
        }
    }

    /// Asks the device whether it is active.
    fn ask(&self) {
        // It does not block: one that is asked already is not asked twice.
        let _ = self.done.write(1);
    }
}
