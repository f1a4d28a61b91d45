//! How a running switch is asked and told: HTTP and JSON on a UNIX socket in the run directory.
//!
//! Owns the run directory, the types of all answers, the server (one housekeeping thread) and the client. Knows the switch
//! only as a [`SwitchState`]; never touches a worker.

mod features;
pub mod report;

use report::{FdbReport, PortsReport, ReloadReport, StatsReport, SwitchInfo};

pub use features::feature_names;

/// The control socket's name in the run directory.
pub const CONTROL_SOCKET: &str = "switch.sock";

/// What the control socket can ask and tell. Every call is answered from the control thread in bounded time, without
/// waiting for a guest or a VMM.
pub trait SwitchState: Send + Sync {
    /// Which switch this is.
    fn info(&self) -> SwitchInfo;

    /// All counters, read now.
    fn stats(&self) -> StatsReport;

    /// All ports.
    fn ports(&self) -> PortsReport;

    /// The learning table.
    fn fdb(&self) -> FdbReport;

    /// Reads the configuration file again and applies it as one transaction.
    ///
    /// # Errors
    /// What is wrong, for the user; everything is as it was.
    fn reload(&self) -> Result<ReloadReport, String>;
}
