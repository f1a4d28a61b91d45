//! The control socket of the switch.

/// The control socket's name in the run directory.
pub const CONTROL_SOCKET: &str = "switch.sock";
