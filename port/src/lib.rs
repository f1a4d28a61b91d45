//! The contract between a port and whoever polls it.
//!
//! A port's [`RxQueue`] lends a [`Burst`] of [`Frame`]s that still lie in the memory of whoever sent them; the pipeline
//! judges each by a private copy of its first bytes ([`Head`]) and hands sets of frames ([`FrameSet`]) to the
//! [`TxQueue`]s of other ports, which copy each frame once. No I/O happens here, and nothing here knows what kind of port
//! is behind a queue.

mod burst;
mod device;
mod drops;
mod offload;
mod scratch;

pub use burst::{
    Burst, BurstBuffer, Frame, FrameSet, HEAD, Head, MAX_BURST, MAX_SEGMENTS, MIN_FRAME, Nobody, Release,
    Segment,
};
pub use device::{PutError, Sink, Source};
pub use drops::DropReason;
pub use offload::{Gso, Offload, OffloadError};
pub use scratch::Scratch;

/// The longest frame that any port accepts: a 64 KiB segmentation-offload packet with its Ethernet header and VLAN tags.
pub const MAX_FRAME: u32 = 65_535 + 14 + 8;

/// What happens to the VLAN tag of the frames in one call of [`TxQueue::send`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TagEdit {
    /// Sent as it came.
    Keep,
    /// A tag with this control information (PCP, DEI, VID) goes between the source address and the type.
    Push(u16),
    /// The outermost tag is removed.
    Pop,
    /// The outermost tag keeps its priority and gets this VLAN identifier.
    SetVid(u16),
}

/// The side of a port that frames come in on.
pub trait RxQueue {
    /// How many frames wait, at most a burst: exact enough to know whether there is none. Starts fetching them from memory;
    /// writes nothing, so that polling an idle queue disturbs nobody.
    fn peek(&mut self) -> usize;

    /// Takes up to [`MAX_BURST`] frames. They stay in the sender's memory until the burst is released or dropped.
    fn poll<'q>(&'q mut self, buffer: &'q mut BurstBuffer) -> Burst<'q>;
}

/// The side of a port that frames go out of.
pub trait TxQueue {
    /// A hint that up to `frames` frames are about to be sent here: fetch and translate buffers now, while the sender's
    /// descriptors are still on their way to this core.
    fn prepare(&mut self, frames: usize);

    /// Copies the frames of `set` out. Each is sent or counted under one [`DropReason`] of this queue. The receiver may
    /// sleep on until [`TxQueue::notify`].
    fn send(&mut self, burst: &Burst<'_>, set: FrameSet, edit: TagEdit, scratch: &mut Scratch);

    /// Wakes the receiver if it asked for that. All writes of `send` must be ordered before (a full memory fence, as
    /// [`Release::release`] ends with one).
    fn notify(&mut self);
}
