//! The virtual switch: vhost-user ports, the pipeline, workers, and their control.

pub mod bridge;
pub mod config;
pub mod control;
pub mod offload;
pub mod sandbox;
