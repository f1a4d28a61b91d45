//! One port in an open-loop trial: sends what is due, takes what comes.

use crate::clock::cycles;
use crate::endpoint::Endpoint;
use crate::frame::Template;
use crate::pace::Schedule;
use crate::reflector::BURST;
use crate::sink::Sink;

/// What happens to frames that are due while the ring is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenFull {
    /// They wait, due as they were: the delay counts as latency, and what waits at the end was not delivered.
    Wait,
    /// They are lost, as on a wire.
    Lose,
}

/// The frames that a port offers.
pub struct Offer {
    /// What they look like.
    pub template: Template,
    /// When they are due.
    pub schedule: Schedule,
    /// How many in all.
    pub frames: u64,
    /// What a full ring means.
    pub when_full: WhenFull,
}

/// A port that offers frames and takes those of the other.
pub struct Station<E: Endpoint> {
    endpoint: E,
    offer: Offer,
    sink: Sink,
    inbox: Vec<E::Buffer>,
    outbox: Vec<E::Buffer>,
    stamped: u64,
    sent: u64,
    refused: u64,
    last_arrival: u64,
}

/// What a station did.
pub struct Done {
    /// Frames given to the ring.
    pub sent: u64,
    /// Frames that met a full ring under [`WhenFull::Lose`].
    pub refused: u64,
    /// The receiving end.
    pub sink: Sink,
    /// When the last burst was found, in cycles; 0 if there was none.
    pub last_arrival: u64,
}

impl<E: Endpoint> Station<E> {
    /// Offers and takes on `endpoint`.
    pub fn new(endpoint: E, offer: Offer, sink: Sink) -> Self {
        Self {
            endpoint,
            offer,
            sink,
            inbox: Vec::with_capacity(2 * BURST),
            outbox: Vec::with_capacity(2 * BURST),
            stamped: 0,
            sent: 0,
            refused: 0,
            last_arrival: 0,
        }
    }

    /// Takes a burst and sends what is due, up to a burst. Returns how many frames moved.
    #[inline]
    pub fn turn(&mut self) -> usize {
        let received = self.receive();
        received + self.send()
    }

    /// Takes a burst.
    #[inline]
    pub fn receive(&mut self) -> usize {
        let received = self.endpoint.receive(&mut self.inbox, 2 * BURST);
        if received > 0 {
            let now = cycles();
            self.last_arrival = now;
            for frame in self.inbox.drain(..) {
                self.sink.take(self.endpoint.frame(&frame), now);
                self.endpoint.free(frame);
            }
        }
        received
    }

    #[inline]
    fn send(&mut self) -> usize {
        let now = cycles();
        while self.outbox.len() < BURST && self.stamped < self.offer.frames {
            let due = self.offer.schedule.due();
            if now.wrapping_sub(due) as i64 <= 0 && due != now {
                break;
            }
            let Some(mut frame) = self.endpoint.allocate() else { break };
            self.offer.template.write(self.endpoint.frame_mut(&mut frame), self.stamped, due);
            self.offer.schedule.advance();
            self.stamped += 1;
            self.outbox.push(frame);
        }
        if self.outbox.is_empty() {
            return 0;
        }
        let sent = self.endpoint.transmit(&mut self.outbox);
        self.sent += sent as u64;
        if self.offer.when_full == WhenFull::Lose {
            self.refused += self.outbox.len() as u64;
            for frame in self.outbox.drain(..) {
                self.endpoint.free(frame);
            }
        }
        sent
    }

    /// Whether every frame was sent or refused.
    pub fn is_done(&self) -> bool {
        self.sent + self.refused == self.offer.frames
    }

    /// Frames given to the ring so far.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// The receiving end.
    pub fn sink(&self) -> &Sink {
        &self.sink
    }

    /// Ends: what was not sent is freed.
    pub fn finish(mut self) -> Done {
        for frame in self.outbox.drain(..) {
            self.endpoint.free(frame);
        }
        Done { sent: self.sent, refused: self.refused, sink: self.sink, last_arrival: self.last_arrival }
    }
}
