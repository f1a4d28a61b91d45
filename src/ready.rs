//! Telling whoever started this process how it goes: systemd (`Type=notify`), or `cableway up`.
//!
//! Owns what is said (sd_notify(3)). Who does not listen any more misses nothing.

use std::time::Duration;

use sd_notify::NotifyState;

/// It is ready.
pub(crate) fn tell() {
    if let Err(error) = sd_notify::notify(&[NotifyState::Ready]) {
        tracing::warn!("nobody is told that this is ready: $NOTIFY_SOCKET: {error}");
    }
}

/// What it does, in a line for `systemctl status`.
pub(crate) fn tell_status(status: &str) {
    say(&[NotifyState::Status(status)]);
}

/// It ends, which may take so long: systemd is to wait, whatever the unit says.
pub(crate) fn tell_end(patience: Duration) {
    let patience = u32::try_from(patience.as_micros()).unwrap_or(u32::MAX);
    say(&[NotifyState::Stopping, NotifyState::ExtendTimeoutUsec(patience)]);
}

/// Whether a message that was received says that its sender is ready.
pub(crate) fn is_ready(message: &[u8]) -> bool {
    message.split(|byte| *byte == b'\n').any(|line| line == b"READY=1")
}

fn say(state: &[NotifyState<'_>]) {
    // `cableway up --detach` listens until the node is up, and no longer.
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!("nobody hears what is told by $NOTIFY_SOCKET: {error}");
    }
}
