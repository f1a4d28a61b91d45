//! How a running switch is asked and told: HTTP and JSON on a UNIX socket in the run directory.
//!
//! Owns the paths and the types of all answers; the socket itself is [`control`]'s. Knows the switch only as a [`SwitchState`];
//! never touches a worker.

mod features;
pub mod report;
mod routes;
#[cfg(test)]
mod tests;
mod vf;

use std::path::Path;

use control::Door;

use crate::capture::Filter;
use report::{
    CaptureReport, CardReport, FdbReport, PortsReport, ReloadReport, StatsReport, SwitchInfo, VfReport,
};

pub use features::feature_names;
pub use routes::{openapi, router};
pub use vf::VfChange;

/// The control socket's name in the run directory.
pub const CONTROL_SOCKET: &str = "switch.sock";

/// Where the switch of a run directory is asked.
pub fn door(run_dir: &Path) -> Door {
    let dir = run_dir.display();
    Door {
        socket: run_dir.join(CONTROL_SOCKET),
        what: "switch".to_owned(),
        absent: format!(
            "no switch is running in {dir}: start one with `cableway switch FILE`, or say where it runs with --run-dir"
        ),
        taken: "end it first, or give this one another --run-dir",
    }
}

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

    /// Begins to copy the frames of a port: the first `longest` bytes of each that `filter` wants. It ends when nobody fetches
    /// frames for some seconds.
    ///
    /// # Errors
    /// There is no such port, or there are too many captures already.
    fn capture(&self, port: &str, longest: u32, filter: Filter) -> Result<CaptureReport, String>;

    /// The frames of a capture since the last call, as blocks of a pcapng file; all calls together make one file. `None`: there
    /// is no such capture.
    fn captured(&self, id: u64) -> Option<Vec<u8>>;

    /// Ends a capture. `None`: there is no such capture.
    fn end_capture(&self, id: u64) -> Option<CaptureReport>;

    /// What a port's card counts, and what its registers read.
    ///
    /// # Errors
    /// There is no such port, or it has no card open; for the user.
    fn card(&self, port: &str) -> Result<CardReport, String>;

    /// Changes what virtual function `number` of a port's card may, until the next reload. Its driver begins anew.
    ///
    /// # Errors
    /// There is none, or it may not have that; for the user.
    fn set_vf(&self, port: &str, number: u16, change: VfChange) -> Result<VfReport, String>;

    /// Reads the configuration file again and applies it as one transaction.
    ///
    /// # Errors
    /// What is wrong, for the user; everything is as it was.
    fn reload(&self) -> Result<ReloadReport, String>;
}
