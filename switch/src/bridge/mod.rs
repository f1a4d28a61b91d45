//! The bridge: decides, for each frame of a burst, where it goes.
//!
//! Reads nothing of a frame but its private head and its length, and never touches guest memory. Sends nothing: it groups
//! the frames by output, and counts each frame that has none under one drop reason. See docs/bridge.md.

mod classify;
pub mod fdb;
mod flow;
mod lead;
mod mac;
mod mtu;
mod outputs;
mod plan;
mod portset;
mod recent;
mod storm;
mod vlan;

pub use classify::{Classified, Clock, IngressState};
pub use fdb::{Fdb, FdbEntry, FdbError, StaticEntry};
pub use flow::flow_hash;
pub use mac::{Mac, MacError};
pub use outputs::Outputs;
pub use plan::{BridgePlan, PlanError, PortPlan};
pub use portset::MAX_PORTS;
pub use storm::{StormGuard, StormRate};
pub use vlan::{VlanMode, VlanSet, is_vlan};
