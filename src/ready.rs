//! Telling whoever started this process that it is ready: systemd (`Type=notify`), or `cableway up`.

/// Says so, if somebody wants to know (sd_notify(3)). Who does not listen any more misses nothing.
pub(crate) fn tell() {
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        tracing::warn!("nobody is told that this is ready: $NOTIFY_SOCKET: {error}");
    }
}
