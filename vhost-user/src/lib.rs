//! Both ends of the vhost-user protocol: sessions, descriptor passing, memory tables, inflight tracking, the dirty log,
//! and what the `vhost` crate lacks. Knows rings only as things that are started and stopped.

mod device;

pub use device::{Device, QueueStart};
