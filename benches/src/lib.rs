//! The measuring tools: what makes traffic, what counts it, what searches for a rate, what draws the result.
//!
//! Everything here is a *guest* of what it measures: it sees two ports that take and give frames ([`endpoint::Endpoint`])
//! and nothing of the switch between them, so the same figures can be had of any switch. Starts no switch and parses no
//! command line.

pub mod accounting;
pub mod campaign;
pub mod clock;
pub mod endpoint;
pub mod frame;
pub mod histogram;
pub mod machine;
pub mod pace;
pub mod pinger;
pub mod quiet;
pub mod reflector;
pub mod report;
pub mod search;
pub mod seats;
pub mod silence;
pub mod sink;
pub mod station;
pub mod trial;
pub mod virtio_user;
pub mod vnfs;
