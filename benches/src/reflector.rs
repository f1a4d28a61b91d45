//! A network function that sends every frame back: swaps the Ethernet addresses in place, in the buffer it came in.

use crate::endpoint::Endpoint;
use crate::frame::swap_addresses;

/// Frames taken from a ring at once.
pub const BURST: usize = 32;

/// Sends back what comes in.
pub struct Reflector<E: Endpoint> {
    endpoint: E,
    held: Vec<E::Buffer>,
    reflected: u64,
}

impl<E: Endpoint> Reflector<E> {
    /// Reflects on `endpoint`.
    pub fn new(endpoint: E) -> Self {
        Self { endpoint, held: Vec::with_capacity(2 * BURST), reflected: 0 }
    }

    /// Takes a burst and sends it back. Frames that the ring has no room for are held, and nothing more is taken until
    /// they are gone. Returns how many frames moved.
    #[inline]
    pub fn turn(&mut self) -> usize {
        let from = self.held.len();
        let received = if from < BURST { self.endpoint.receive(&mut self.held, BURST) } else { 0 };
        for frame in self.held.iter_mut().skip(from) {
            swap_addresses(self.endpoint.frame_mut(frame));
        }
        let sent = if self.held.is_empty() { 0 } else { self.endpoint.transmit(&mut self.held) };
        self.reflected += sent as u64;
        received + sent
    }

    /// Frames sent back so far.
    pub fn reflected(&self) -> u64 {
        self.reflected
    }

    /// The port, and what it held is freed.
    pub fn into_endpoint(mut self) -> E {
        for frame in self.held.drain(..) {
            self.endpoint.free(frame);
        }
        self.endpoint
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::tests::{perfect, wire};
    use crate::endpoint::{Bytes, FrameBuffer};

    #[test]
    fn frames_come_back_in_order_with_swapped_addresses_and_none_is_held_for_ever() {
        let (mut near, far) = wire(40, perfect());
        let mut reflector = Reflector::new(far);
        for i in 0..40 {
            let mut frame = near.allocate().unwrap();
            frame.set_len(64);
            frame.store(0, [1, 1, 1, 1, 1, i, 2, 2, 2, 2, 2, 2]);
            near.transmit(&mut vec![frame]);
        }
        while reflector.turn() > 0 {}
        let mut back = Vec::new();
        assert_eq!(near.receive(&mut back, 100), 40);
        for (i, frame) in (0..).zip(&back) {
            assert_eq!(frame.load(0), [2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, i]);
        }
        assert_eq!((reflector.reflected(), reflector.into_endpoint().lent), (40, 0));
    }
}
