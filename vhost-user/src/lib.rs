//! Both ends of the vhost-user protocol: sessions, descriptor passing, memory tables, inflight tracking, the dirty log,
//! and what the `vhost` crate lacks. Knows rings only as things that are started and stopped.
//!
//! [`backend`] is the switch's end: it drives a [`Device`]. What a front end sends is never trusted: descriptors are checked
//! for what they are, sizes against their files, indices against the queues there are.

pub mod backend;
mod descriptor;
mod device;
mod inflight;
mod mapping;

pub use device::{Device, QueueStart};
pub use vhost::vhost_user::VhostUserProtocolFeatures as ProtocolFeatures;
