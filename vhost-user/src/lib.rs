//! Both ends of the vhost-user protocol: sessions, descriptor passing, memory tables, inflight tracking, the dirty log,
//! and what the `vhost` crate lacks. Knows rings only as things that are started and stopped.
//!
//! [`backend`] is the switch's end: it drives a [`Device`]. [`frontend`] is the driver's end. What a front end sends is never trusted: descriptors are checked
//! for what they are, sizes against their files, indices against the queues there are.

pub mod backend;
mod descriptor;
mod device;
pub mod frontend;
mod inflight;
mod mapping;
mod socket;
mod wire;

pub use device::{Device, QueueStart};
pub use socket::{Mode, SocketError};
pub use vhost::vhost_user::VhostUserProtocolFeatures as ProtocolFeatures;
