//! The machine that everything else runs on: its processor, cores, memory nodes and huge pages.
//!
//! Owns what is asked of the kernel and nothing of what is done with it: no sockets, no rings, no frames. What is read
//! from `/sys` is read below a root that the caller gives, so that tests can lay out a machine as files.

pub mod cpu;
pub mod doctor;
pub mod fault;
pub mod huge_pool;
pub mod machine;
pub mod memory;
pub mod partition;
pub mod pci;
pub mod plan;
pub mod program;
pub mod sandbox;
pub mod signal;
pub mod thread;
pub mod topology;
pub mod tune;
pub mod vfio;
