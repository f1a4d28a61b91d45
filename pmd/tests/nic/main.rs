//! The drivers of network cards against QEMU's models of these cards: devices that we did not write.
//!
//! Ignored by default, because they need QEMU: `./check nic` runs them.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod adapters;
mod back_end;
mod frames;
mod functions;
mod interrupts;
mod multiqueue;
mod queues;
mod selftest;
