//! What a queue pair counts.

/// Frames, bytes and mishaps of one queue pair since it was made. Bytes are those of frames, without FCS or virtio-net header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames received.
    pub received: u64,
    /// Bytes of them.
    pub received_bytes: u64,
    /// Frames handed to the back end.
    pub transmitted: u64,
    /// Bytes of them.
    pub transmitted_bytes: u64,
    /// Frames dropped because the back end described them wrongly: shorter than their header, or an impossible number of
    /// buffers.
    pub malformed: u64,
    /// Frames given to transmit that can never be sent: of more buffers than the list holds, the ring has or 64.
    pub unsendable: u64,
    /// Times that a receive ring could not be refilled, because all buffers were in use.
    pub starved: u64,
    /// Notifications sent to the back end.
    pub kicks: u64,
    /// Frames that were in the back end's hands when it went away and were not processed again.
    pub abandoned: u64,
}
