//! What workers tell housekeeping: rare things, over a bounded channel that never blocks a worker.

use crossbeam::channel::{Receiver, Sender, bounded};
use virtio::device::RingError;

/// Something happened on the data path that a person may want to know.
#[derive(Debug)]
pub enum Event {
    /// A guest broke its ring; it is not polled any more.
    RingBroken {
        /// Port number.
        port: u16,
        /// Virtqueue index.
        queue: u16,
        /// What is wrong.
        error: RingError,
    },
    /// A guest moved here: tell the others where its address is now.
    Announce {
        /// Port number.
        port: u16,
        /// Its address.
        mac: [u8; 6],
    },
    /// A network device failed or went away; it is not polled any more.
    DeviceGone {
        /// Port number.
        port: u16,
        /// What the system said.
        error: std::io::Error,
    },
    /// A ring was started or stopped: queues may want another place.
    RingsChanged,
}

/// The sending end.
#[derive(Clone)]
pub struct Events(Sender<Event>);

impl Events {
    /// A channel for `room` events.
    pub fn channel(room: usize) -> (Self, Receiver<Event>) {
        let (sender, receiver) = bounded(room);
        (Self(sender), receiver)
    }

    /// Sends, or forgets the event if nobody keeps up: the state it tells of is kept elsewhere too.
    pub fn send(&self, event: Event) {
        let _ = self.0.try_send(event);
    }
}
