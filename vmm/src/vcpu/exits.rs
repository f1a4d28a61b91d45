//! How often and why a vCPU left the guest.
//!
//! Owns the counters; each has one writer, its vCPU, and any readers.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! reasons {
    ($($(#[doc = $meaning:literal])+ $variant:ident = $name:literal;)+) => {
        /// Why a vCPU left the guest.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum ExitReason { $($(#[doc = $meaning])+ $variant,)+ }

        impl ExitReason {
            /// All of them.
            pub const ALL: &'static [ExitReason] = &[$(ExitReason::$variant,)+];

            /// As it is printed.
            pub fn name(self) -> &'static str {
                match self { $(ExitReason::$variant => $name,)+ }
            }

            /// What it is, as a sentence.
            pub fn sentence(self) -> &'static str {
                match self { $(ExitReason::$variant => concat!($($meaning,)+).trim_ascii(),)+ }
            }
        }

        const REASONS: usize = [$(ExitReason::$variant,)+].len();
    };
}

reasons! {
    /// The guest read an I/O port.
    PortRead = "port_read";
    /// The guest wrote an I/O port.
    PortWrite = "port_write";
    /// The guest read a device's memory.
    MmioRead = "mmio_read";
    /// The guest wrote a device's memory.
    MmioWrite = "mmio_write";
    /// The guest ended a level-triggered interrupt of the I/O APIC (`irqchip = "split"`).
    EndOfInterrupt = "end_of_interrupt";
    /// The vCPU halted and KVM left that to us.
    Halt = "halt";
    /// We, or a signal, called it out.
    Interrupted = "interrupted";
    /// The vCPU cannot go on: a triple fault.
    Shutdown = "shutdown";
    /// KVM reported an event of the whole machine.
    SystemEvent = "system_event";
    /// Anything else.
    Other = "other";
}

/// Counters of one vCPU.
#[derive(Debug, Default)]
pub struct ExitCounters([AtomicU64; REASONS]);

impl ExitCounters {
    /// Counts one exit; only the vCPU's own thread does that.
    pub(crate) fn count(&self, reason: ExitReason) {
        if let Some(counter) = self.0.get(reason as usize) {
            counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        }
    }

    /// Exits for one reason until now.
    pub fn get(&self, reason: ExitReason) -> u64 {
        self.0.get(reason as usize).map_or(0, |counter| counter.load(Ordering::Relaxed))
    }
}
