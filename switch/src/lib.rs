//! The virtual switch: ports for guests and devices, the pipeline, workers, and their control.

pub mod bridge;
pub mod capture;
mod claim;
pub mod config;
pub mod control;
pub mod counters;
pub mod device_port;
pub mod events;
pub mod inject;
pub mod offload;
mod outgoing;
pub mod plan;
pub mod runtime;
pub mod sandbox;
pub mod sleeper;
pub mod slot;
pub mod vhost_port;
pub mod worker;
