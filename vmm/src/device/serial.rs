//! The first serial port, a 16550A (the registers are vm-superio's).
//!
//! Owns the registers and the interrupt. What the guest writes goes into a queue of bounded size that a thread of its own
//! empties ([`crate::console`]); a full queue drops bytes and never holds a vCPU.

use std::sync::Arc;

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};

use crate::console::Output;
use crate::interrupts::Interrupts;
use crate::layout;

/// The port's interrupt, edge triggered.
struct Edge(Arc<Interrupts>);

impl Trigger for Edge {
    type E = kvm_ioctls::Error;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.pulse(layout::SERIAL_IRQ)
    }
}

/// The port.
pub(crate) struct SerialPort(Serial<Edge, NoEvents, Output>);

impl SerialPort {
    /// A port whose bytes go to `output`.
    pub(crate) fn new(interrupts: Arc<Interrupts>, output: Output) -> Self {
        Self(Serial::new(Edge(interrupts), output))
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
