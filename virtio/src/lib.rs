//! Virtqueues as the specification has them (virtio 1.3): split and packed layouts, the device side and the driver side,
//! event suppression, the virtio-net header.
//!
//! Works on raw memory that others mapped; everything that a guest controls is read once through [`memory`], checked, and
//! only then used. No sockets, no threads, no ports.

pub mod device;
pub mod driver;
mod event;
pub mod features;
pub mod memory;
pub mod net;
