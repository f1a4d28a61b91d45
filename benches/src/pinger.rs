//! The closed loop: a fixed number of frames circulates, each one that comes back is judged and sent out again.
//!
//! The slower side sets the pace and nothing has to be lost, so this finds what a switch can carry in one go; its round
//! trip is that of a full pipe (frames in flight divided by rate), not that of a lonely frame.

use crate::clock::cycles;
use crate::endpoint::Endpoint;
use crate::frame::{Addresses, Template, Verify};
use crate::reflector::BURST;
use crate::silence::Silence;
use crate::sink::Sink;

/// What a closed loop is made of.
#[derive(Clone, Copy, Debug)]
pub struct Loop {
    /// Bytes of each frame, without FCS.
    pub size: usize,
    /// Frames in flight.
    pub in_flight: u64,
    /// The number of the stream.
    pub stream: u16,
    /// Who is behind the two ports.
    pub addresses: Addresses,
    /// How much of each frame is read when it comes back.
    pub verify: Verify,
    /// After this many cycles without any frame, those in flight are lost.
    pub patience: u64,
}

/// Keeps frames in flight.
pub struct Pinger<E: Endpoint> {
    endpoint: E,
    template: Template,
    sink: Sink,
    setup: Loop,
    inbox: Vec<E::Buffer>,
    outbox: Vec<E::Buffer>,
    sent: u64,
    stamped: u64,
    silence: Silence,
}

impl<E: Endpoint> Pinger<E> {
    /// Sends on `endpoint` what comes back on it.
    pub fn new(endpoint: E, setup: Loop) -> Self {
        Self {
            endpoint,
            template: Template::new(setup.stream, setup.size, setup.addresses),
            sink: Sink::new(setup.stream, setup.size, setup.verify),
            setup,
            inbox: Vec::with_capacity(2 * BURST),
            outbox: Vec::with_capacity(2 * BURST),
            sent: 0,
            stamped: 0,
            silence: Silence::new(setup.patience, cycles()),
        }
    }

    /// Takes a burst, judges it, and fills up what is in flight unless `stop`. Returns how many frames moved.
    #[inline]
    pub fn turn(&mut self, stop: bool) -> usize {
        let received = self.endpoint.receive(&mut self.inbox, BURST);
        let now = cycles();
        if received > 0 {
            self.silence.heard(now);
            self.judge(now, stop);
        } else if self.silence.listen(now) {
            self.silence.heard(now);
            self.sink.give_up(self.sent);
        }
        let sent = if stop { 0 } else { self.fill_up(now) };
        received + sent
    }

    #[inline]
    fn judge(&mut self, now: u64, stop: bool) {
        for mut frame in self.inbox.drain(..) {
            let intact = self.sink.take(self.endpoint.frame(&frame), now);
            let again = intact && !stop && self.outbox.len() < BURST;
            if again && self.sink.awaited(self.stamped) < self.setup.in_flight {
                // The buffer is warm, and if all of it was read, its filling is right as it is.
                if self.setup.verify == Verify::Whole {
                    self.template.rewrite(self.endpoint.frame_mut(&mut frame), self.stamped, now);
                } else {
                    self.template.write(self.endpoint.frame_mut(&mut frame), self.stamped, now);
                }
                self.stamped += 1;
                self.outbox.push(frame);
            } else {
                self.endpoint.free(frame);
            }
        }
    }

    #[inline]
    fn fill_up(&mut self, now: u64) -> usize {
        while self.outbox.len() < BURST && self.sink.awaited(self.stamped) < self.setup.in_flight {
            let Some(mut frame) = self.endpoint.allocate() else { break };
            self.template.write(self.endpoint.frame_mut(&mut frame), self.stamped, now);
            self.stamped += 1;
            self.outbox.push(frame);
        }
        if self.outbox.is_empty() {
            return 0;
        }
        let sent = self.endpoint.transmit(&mut self.outbox);
        self.sent += sent as u64;
        sent
    }

    /// Frames sent so far.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Frames that may still come.
    pub fn awaited(&self) -> u64 {
        self.sink.awaited(self.sent)
    }

    /// What came back.
    pub fn sink(&mut self) -> &mut Sink {
        &mut self.sink
    }

    /// Counts what has not come back as missing, and returns the port. What was stamped but never sent is freed.
    pub fn finish(mut self) -> (E, Sink, u64) {
        self.sink.give_up(self.sent);
        for frame in self.outbox.drain(..) {
            self.endpoint.free(frame);
        }
        (self.endpoint, self.sink, self.sent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::tests::{Fault, perfect, wire};
    use crate::reflector::Reflector;
    use crate::sink::Arrivals;

    fn circulate(size: usize, rounds: usize, fault: Fault) -> (Arrivals, u64, usize) {
        let (near, far) = wire(256, fault);
        let addresses = Addresses { from: 0, to: 1, count: 1 };
        let setup =
            Loop { size, in_flight: 100, stream: 3, addresses, verify: Verify::Whole, patience: 2_000_000 };
        let (mut pinger, mut reflector) = (Pinger::new(near, setup), Reflector::new(far));
        for _ in 0..rounds {
            pinger.turn(false);
            assert!(pinger.awaited() <= 100);
            reflector.turn();
        }
        while reflector.turn() + pinger.turn(true) > 0 {}
        let (endpoint, sink, sent) = pinger.finish();
        (sink.arrivals(), sent, endpoint.lent)
    }

    #[test]
    fn everything_comes_back_over_a_perfect_wire() {
        for size in [64, 1500] {
            let (arrivals, sent, _) = circulate(size, 10_000, perfect());
            assert!(sent > 100_000, "{sent}");
            assert_eq!(arrivals.counts.received, sent);
            assert_eq!((arrivals.corrupt, arrivals.counts.missing, arrivals.counts.duplicates), (0, 0, 0));
        }
    }

    #[test]
    fn losses_duplicates_and_damage_are_counted_exactly() {
        let mut n = 0;
        let (arrivals, sent, _) = circulate(
            256,
            10_000,
            Box::new(move |mut frame, queue| {
                n += 1;
                match n {
                    1_000 | 2_000 | 2_001 => {}
                    3_000 => queue.extend([frame.clone(), frame]),
                    4_000 => {
                        frame.bytes[200] ^= 4;
                        queue.push_back(frame);
                    }
                    _ => queue.push_back(frame),
                }
            }),
        );
        assert_eq!((arrivals.counts.missing, arrivals.counts.duplicates, arrivals.corrupt), (4, 1, 1));
        assert_eq!(arrivals.counts.received, sent - 4);
    }

    #[test]
    fn when_all_frames_in_flight_are_lost_it_starts_again() {
        let mut n = 0;
        let (arrivals, sent, _) = circulate(
            64,
            60_000,
            Box::new(move |frame, queue| {
                n += 1;
                if !(5_000..5_100).contains(&n) {
                    queue.push_back(frame);
                }
            }),
        );
        assert_eq!(arrivals.counts.missing, 100);
        assert!(sent > 5_200);
        assert_eq!(arrivals.counts.received, sent - 100);
    }
}
