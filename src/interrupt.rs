//! Ctrl-C and SIGTERM for commands that end with a result: the first sets a flag, the second ends the process.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Context;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// A flag that Ctrl-C and SIGTERM set.
///
/// # Errors
/// The system refuses the handlers.
pub(crate) fn flag() -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // In this order: a second signal finds the flag set and ends the process as if there were no handler.
        flag::register_conditional_default(signal, stop.clone()).context("handling Ctrl-C")?;
        flag::register(signal, stop.clone()).context("handling Ctrl-C")?;
    }
    Ok(stop)
}
