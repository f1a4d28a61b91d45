//! The first serial port, a 16550A (the registers are vm-superio's).
//!
//! Owns the registers and the interrupt. What the guest writes goes into a queue of bounded size that a thread of its own
//! empties ([`crate::console`]); a full queue drops bytes and never holds a vCPU.

use std::sync::Arc;

use kvm_ioctls::VmFd;
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};

use crate::console::Output;

/// The port's interrupt line, edge triggered.
///
/// Whoever causes the interrupt raises it, a vCPU most often. An irqfd would leave that to a kworker on the vCPU's core for any
/// interrupt that is no message, and the vCPU would be scheduled away for it.
pub(crate) struct Line {
    vm: Arc<VmFd>,
    number: u32,
}

impl Line {
    /// The machine's interrupt `number`.
    pub(crate) fn new(vm: Arc<VmFd>, number: u32) -> Self {
        Self { vm, number }
    }
}

impl Trigger for Line {
    type E = kvm_ioctls::Error;

    fn trigger(&self) -> Result<(), Self::E> {
        self.vm.set_irq_line(self.number, true)?;
        self.vm.set_irq_line(self.number, false)
    }
}

/// The port.
pub(crate) struct SerialPort(Serial<Line, NoEvents, Output>);

impl SerialPort {
    /// A port whose interrupt is `line` and whose bytes go to `output`.
    pub(crate) fn new(line: Line, output: Output) -> Self {
        Self(Serial::new(line, output))
    }

    /// The guest reads a register.
    pub(crate) fn read(&mut self, register: u16) -> u8 {
        u8::try_from(register).map_or(0xff, |register| self.0.read(register))
    }

    /// The guest writes a register.
    pub(crate) fn write(&mut self, register: u16, value: u8) {
        if let Ok(register) = u8::try_from(register) {
            // A loopback that overflows, or an interrupt that cannot be raised: the guest's character is lost, as on a wire.
            let _ = self.0.write(register, value);
        }
    }

    /// Bytes for the guest; returns how many the port took.
    pub(crate) fn receive(&mut self, bytes: &[u8]) -> usize {
        let room = self.0.fifo_capacity().min(bytes.len());
        match bytes.get(..room) {
            Some(bytes) if !bytes.is_empty() => self.0.enqueue_raw_bytes(bytes).unwrap_or(0),
            _ => 0,
        }
    }
}
