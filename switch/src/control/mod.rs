//! How a running switch is asked and told: HTTP and JSON on a UNIX socket in the run directory.
//!
//! Owns the run directory, the types of all answers, the server (one housekeeping thread) and the client. Knows the switch
//! only as a [`SwitchState`]; never touches a worker.

pub mod client;
mod features;
pub mod report;
mod routes;
mod run_dir;
mod server;
#[cfg(test)]
mod tests;

use report::{FdbReport, PortsReport, ReloadReport, StatsReport, SwitchInfo};

pub use features::feature_names;
pub use routes::openapi;
pub use run_dir::{RunDirError, run_dir_of_client, run_dir_of_server};
pub use server::{ControlError, ControlServer, ControlSocket};

/// The control socket's name in the run directory.
pub const CONTROL_SOCKET: &str = "switch.sock";

/// What the control socket can ask and tell. Every call is answered in bounded time, without waiting for a guest or a VMM.
pub trait SwitchState: Send + Sync {
    /// Which switch this is.
    fn info(&self) -> SwitchInfo;

    /// All counters, read now.
    fn stats(&self) -> StatsReport;

    /// All ports.
    fn ports(&self) -> PortsReport;

    /// The learning table, by VLAN and address.
    fn fdb(&self) -> FdbReport;

    /// Reads the configuration file again and applies it as one transaction.
    ///
    /// # Errors
    /// What is wrong, for the user; everything is as it was.
    fn reload(&self) -> Result<ReloadReport, String>;
}
