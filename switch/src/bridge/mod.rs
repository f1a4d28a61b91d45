//! The bridge: decides, for each frame of a burst, where it goes.
//!
//! Reads nothing of a frame but its private head and its length, and never touches guest memory. Sends nothing: it groups
//! the frames by output, and counts each frame that has none under one drop reason. See docs/bridge.md.

pub mod fdb;
mod mac;
mod portset;

pub use fdb::{Fdb, FdbEntry, FdbError, StaticEntry};
pub use mac::{Mac, MacError};
pub use portset::{MAX_PORTS, PortSet};
