//! The virtual switch: vhost-user ports, the pipeline, workers, and their control.

pub mod bridge;
mod claim;
pub mod config;
pub mod control;
pub mod counters;
pub mod events;
pub mod offload;
pub mod plan;
pub mod runtime;
pub mod sandbox;
pub mod sleeper;
pub mod vhost_port;
pub mod worker;
