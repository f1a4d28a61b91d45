//! The virtual machine monitor: real-time virtual machines on KVM.
//!
//! Owns guests: their memory, vCPUs, devices and boot. Knows nothing of switches: a guest's network card meets one at a
//! vhost-user socket. Whatever a guest writes, to memory or to a register, is read once and checked before it is used.

pub mod acpi;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
#[allow(clippy::unwrap_used, reason = "code of tests may panic")]
pub mod any_bytes;
pub mod boot;
mod buffers;
pub mod config;
mod console;
pub mod control;
mod device;
mod disk;
mod interrupts;
mod journal;
mod layout;
pub mod life;
mod lifecycle;
pub mod machine;
pub mod memory;
mod net;
mod pci;
pub mod preflight;
pub mod probe;
mod rng;
pub mod sandbox;
mod scrollback;
pub mod terminal;
#[cfg(any(test, fuzzing))]
#[cfg_attr(fuzzing, allow(dead_code))]
#[allow(clippy::unwrap_used, reason = "code of tests may panic")]
mod test_driver;
mod vcpu;
pub mod vfio;
mod virtio_console;
mod virtio_pci;
mod worker;

pub use vcpu::exits::{ExitCounters, ExitReason};
