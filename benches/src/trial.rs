//! One trial: a load on both ports for a time, and what became of every frame.
//!
//! Drives both ports from the thread that calls it; the switch has its own. Owns the numbering of streams, so that a frame
//! left over from an earlier trial is never mistaken for one of this.

use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;

use crate::clock::{Clock, cycles};
use crate::endpoint::Endpoint;
use crate::frame::{Addresses, Template, Verify};
use crate::histogram::Latencies;
use crate::pace::Schedule;
use crate::pinger::{Loop, Pinger};
use crate::reflector::Reflector;
use crate::silence::{NOTHING_MAY_BE_LOST, SOME_MAY_BE_LOST, Silence};
use crate::sink::{Arrivals, Sink};
use crate::station::{Done, Offer, Station, WhenFull};

/// What the frames of a trial look like.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Traffic {
    /// Bytes of each frame, without FCS.
    pub size: usize,
    /// Addresses behind each port, all of them used in turn.
    pub addresses: u32,
    /// How much of each received frame is read.
    pub verify: Verify,
}

/// How much is offered in an open-loop trial.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Frames a second and direction.
    pub rate: f64,
    /// Frames in each direction.
    pub frames: u64,
    /// Both directions, or only from the first port to the second.
    pub both: bool,
    /// What a full ring means.
    pub when_full: WhenFull,
    /// Seconds after the last frame was due in which overdue ones may still be sent.
    pub grace: f64,
    /// Seconds without any frame after which what has not come is lost.
    pub patience: f64,
}

impl Load {
    /// Both directions, `rate` frames a second each, for `seconds`. What is overdue at the end has half a percent of the
    /// time (at least 2 ms) to go out; the rest is lost.
    pub fn steady(rate: f64, seconds: f64) -> Self {
        let grace = (seconds * 0.005).max(0.002);
        Self {
            rate,
            frames: (rate * seconds) as u64,
            both: true,
            when_full: WhenFull::Wait,
            grace,
            patience: SOME_MAY_BE_LOST,
        }
    }
}

/// What became of the frames of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Passage {
    /// Frames that were due.
    pub due: u64,
    /// Frames that the ring took.
    pub sent: u64,
    /// What arrived.
    #[serde(flatten)]
    pub arrivals: Arrivals,
}

impl Passage {
    /// Frames that were due and did not arrive intact: not sent in time, lost on the way, or damaged.
    pub fn lost(&self) -> u64 {
        self.due.saturating_sub(self.arrivals.counts.received)
    }
}

/// What a trial found.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Seconds from the first frame that was due to the last that arrived.
    pub seconds: f64,
    /// Per direction.
    pub passages: Vec<Passage>,
    /// From due (open loop) or sent (closed loop) to found in the ring, all directions.
    pub latencies: Latencies,
    /// The part of its time that the generator had work to do, 0 to 1. Near 1 it may have been the bottleneck.
    pub generator_busy: f64,
}

impl Outcome {
    /// Frames that were due.
    pub fn due(&self) -> u64 {
        self.passages.iter().map(|p| p.due).sum()
    }

    /// Frames that did not arrive intact.
    pub fn lost(&self) -> u64 {
        self.passages.iter().map(Passage::lost).sum()
    }

    /// Frames that arrived damaged (they are lost, too).
    pub fn corrupt(&self) -> u64 {
        self.passages.iter().map(|p| p.arrivals.corrupt).sum()
    }

    /// Frames that arrived more than once.
    pub fn duplicates(&self) -> u64 {
        self.passages.iter().map(|p| p.arrivals.counts.duplicates).sum()
    }

    /// Frames that arrived intact.
    pub fn received(&self) -> u64 {
        self.passages.iter().map(|p| p.arrivals.counts.received).sum()
    }

    /// Intact frames a second, all directions together.
    pub fn rate(&self) -> f64 {
        if self.seconds > 0.0 { self.received() as f64 / self.seconds } else { 0.0 }
    }
}

/// Two ports, and what trials on them share.
pub struct Rig<'a, E: Endpoint> {
    ports: [E; 2],
    clock: Clock,
    /// Ends a trial early.
    stop: &'a AtomicBool,
    /// Give the core to others when there is nothing to do (there are too few cores).
    polite: bool,
    trials: u16,
}

impl<'a, E: Endpoint> Rig<'a, E> {
    /// A rig of two ports. `polite` yields the core whenever there is nothing to do.
    pub fn new(ports: [E; 2], clock: Clock, stop: &'a AtomicBool, polite: bool) -> Self {
        Self { ports, clock, stop, polite, trials: 0 }
    }

    /// The clock of the trials.
    pub fn clock(&self) -> Clock {
        self.clock
    }

    /// Whether the user wants to stop.
    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Runs an open-loop trial.
    pub fn open_loop(&mut self, traffic: Traffic, load: Load) -> Outcome {
        self.trials = self.trials.wrapping_add(1);
        let streams = [self.trials << 1, self.trials << 1 | 1];
        let start = cycles() + self.clock.cycles(0.0005);
        let reverse = if load.both { load.frames } else { 0 };
        let offer = |side: u8, stream: u16, frames: u64, start: u64| Offer {
            template: Template::new(stream, traffic.size, addresses(side, traffic)),
            schedule: Schedule::new(load.rate, start, &self.clock),
            frames,
            when_full: load.when_full,
        };
        // Half an interval apart, so that the two directions do not meet.
        let half = if load.rate.is_finite() { self.clock.cycles(0.5 / load.rate.max(1.0)) } else { 0 };
        let offers = [offer(0, streams[0], load.frames, start), offer(1, streams[1], reverse, start + half)];
        let [first, second] = &mut self.ports;
        let [a, b] = offers;
        let sink = |stream| Sink::new(stream, traffic.size, traffic.verify);
        let mut stations =
            [Station::new(first, a, sink(streams[1])), Station::new(second, b, sink(streams[0]))];
        let mut run = Run { clock: self.clock, stop: self.stop, polite: self.polite, busy: 0 };
        let length = if load.rate.is_finite() { load.frames as f64 / load.rate.max(1e-9) } else { 0.0 };
        let end = run.drive(&mut stations, start, length + load.grace, load.patience);
        let [a, b] = stations.map(Station::finish);
        outcome([load.frames, reverse], a, b, &run, start, end)
    }

    /// Runs a closed loop for `seconds`: the first port sends, the second reflects.
    pub fn closed_loop(&mut self, traffic: Traffic, in_flight: u64, seconds: f64) -> Outcome {
        self.trials = self.trials.wrapping_add(1);
        let setup = Loop {
            size: traffic.size,
            in_flight,
            stream: self.trials << 1,
            addresses: addresses(0, traffic),
            verify: traffic.verify,
            patience: self.clock.cycles(NOTHING_MAY_BE_LOST),
        };
        let [first, second] = &mut self.ports;
        let (mut pinger, mut reflector) = (Pinger::new(first, setup), Reflector::new(second));
        let start = cycles();
        let until = start + self.clock.cycles(seconds);
        let (mut now, mut busy) = (start, 0);
        while now < until && !self.stop.load(Ordering::Relaxed) {
            let moved = pinger.turn(false) + reflector.turn();
            let then = std::mem::replace(&mut now, cycles());
            busy += if moved > 0 { now - then } else { 0 };
            if moved == 0 && self.polite {
                std::thread::yield_now();
            }
        }
        let elapsed = now - start;
        // What is still on its way gets the time to come in; it does not count for the rate.
        let before = pinger.sink().arrivals().counts.received;
        let mut silence = Silence::new(self.clock.cycles(NOTHING_MAY_BE_LOST), cycles());
        while pinger.awaited() > 0 {
            if pinger.turn(true) + reflector.turn() > 0 {
                silence.heard(cycles());
            } else if silence.listen(cycles()) {
                break;
            } else if self.polite {
                std::thread::yield_now();
            }
        }
        let (_, sink, sent) = pinger.finish();
        reflector.into_endpoint();
        let arrivals = sink.arrivals();
        let seconds = self.clock.seconds(elapsed) * arrivals.counts.received as f64 / before.max(1) as f64;
        Outcome {
            seconds,
            passages: vec![Passage { due: sent, sent, arrivals }],
            latencies: sink.latencies,
            generator_busy: busy as f64 / elapsed.max(1) as f64,
        }
    }

    /// Sends one frame from every address, slowly enough for any switch, so that it knows where they are. Returns how many
    /// did not arrive.
    pub fn introduce(&mut self, traffic: Traffic) -> u64 {
        let traffic = Traffic { size: crate::frame::SMALLEST, ..traffic };
        let frames = u64::from(traffic.addresses).max(64);
        let load = Load { frames, grace: 1.0, patience: NOTHING_MAY_BE_LOST, ..Load::steady(200_000.0, 0.0) };
        // The first frames may be lost while rings come up, or flooded; then all must arrive.
        self.open_loop(traffic, load);
        self.open_loop(traffic, load).lost()
    }

    /// The ports.
    pub fn into_ports(self) -> [E; 2] {
        self.ports
    }
}

/// From `side` to the other.
fn addresses(side: u8, traffic: Traffic) -> Addresses {
    Addresses { from: side, to: 1 - side, count: traffic.addresses }
}

/// The loop around two stations.
struct Run<'a> {
    clock: Clock,
    stop: &'a AtomicBool,
    polite: bool,
    busy: u64,
}

impl Run<'_> {
    /// Until everything was sent (in `sending` seconds at most) and has arrived, or nothing has for `patience` seconds.
    /// Returns when sending ended.
    fn drive<E: Endpoint>(
        &mut self,
        stations: &mut [Station<E>; 2],
        start: u64,
        sending: f64,
        patience: f64,
    ) -> u64 {
        let until = start + self.clock.cycles(sending);
        let mut now = cycles();
        while now < until && !self.stop.load(Ordering::Relaxed) {
            let [a, b] = stations;
            let moved = a.turn() + b.turn();
            let then = std::mem::replace(&mut now, cycles());
            self.busy += if moved > 0 { now - then } else { 0 };
            if a.is_done() && b.is_done() {
                break;
            }
            if moved == 0 && self.polite {
                std::thread::yield_now();
            }
        }
        let end = now;
        let mut silence = Silence::new(self.clock.cycles(patience), now);
        loop {
            let [a, b] = stations;
            if a.sink().awaited(b.sent()) + b.sink().awaited(a.sent()) == 0 {
                break;
            }
            let moved = a.receive() + b.receive();
            if moved > 0 {
                silence.heard(cycles());
            } else if silence.listen(cycles()) {
                break;
            } else if self.polite {
                std::thread::yield_now();
            }
        }
        end
    }
}

fn outcome(due: [u64; 2], mut a: Done, mut b: Done, run: &Run<'_>, start: u64, end: u64) -> Outcome {
    a.sink.give_up(b.sent);
    b.sink.give_up(a.sent);
    let mut latencies = a.sink.latencies.clone();
    latencies.add(&b.sink.latencies);
    let last = a.last_arrival.max(b.last_arrival).max(start);
    Outcome {
        seconds: run.clock.seconds(last - start),
        passages: vec![
            Passage { due: due[0], sent: a.sent, arrivals: b.sink.arrivals() },
            Passage { due: due[1], sent: b.sent, arrivals: a.sink.arrivals() },
        ],
        latencies,
        generator_busy: run.busy as f64 / end.saturating_sub(start).max(1) as f64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::tests::{Fault, perfect, wire};
    use crate::endpoint::{Bytes, FrameBuffer};

    static GO: AtomicBool = AtomicBool::new(false);
    const SMALL: Traffic = Traffic { size: 64, addresses: 1, verify: Verify::Whole };

    fn rig(fault: Fault) -> Rig<'static, crate::endpoint::tests::Wire> {
        let (a, b) = wire(256, fault);
        Rig::new([a, b], Clock::of_this_machine(), &GO, false)
    }

    fn lossy(mut lose: impl FnMut(u64) -> bool + Send + 'static) -> Fault {
        let mut n = 0;
        Box::new(move |frame, queue| {
            n += 1;
            if !lose(n) {
                queue.push_back(frame);
            }
        })
    }

    #[test]
    fn a_paced_trial_takes_as_long_as_its_rate_says_and_loses_nothing_on_a_perfect_wire() {
        let mut rig = rig(perfect());
        let load = Load { grace: 2.0, ..Load::steady(100_000.0, 0.05) };
        let outcome = rig.open_loop(SMALL, load);
        assert_eq!((outcome.due(), outcome.received(), outcome.lost()), (10_000, 10_000, 0));
        assert_eq!(outcome.latencies.samples(), 10_000);
        assert!(outcome.seconds >= 0.0499, "{}", outcome.seconds);
    }

    #[test]
    fn loss_is_counted_in_the_direction_in_which_it_happened() {
        let mut rig = rig(lossy(|n| n % 10 == 0));
        let load = Load { grace: 2.0, ..Load::steady(200_000.0, 0.01) };
        let outcome = rig.open_loop(SMALL, load);
        assert_eq!(outcome.passages[0].lost(), 200);
        assert_eq!(outcome.passages[1].lost(), 0);
        assert_eq!(outcome.lost(), 200);
    }

    #[test]
    fn a_burst_beyond_the_ring_is_lost_as_on_a_wire() {
        // Nobody empties the other end while the burst goes out: the ring takes its depth and not one more.
        let (a, mut b) = wire(256, perfect());
        let template = Template::new(0, 64, Addresses { from: 0, to: 1, count: 1 });
        let schedule = Schedule::new(f64::INFINITY, cycles(), &Clock { hz: 1e9 });
        let offer = Offer { template, schedule, frames: 300, when_full: WhenFull::Lose };
        let mut station = Station::new(a, offer, Sink::new(1, 64, Verify::Whole));
        while !station.is_done() {
            station.turn();
        }
        let done = station.finish();
        assert_eq!((done.sent, done.refused), (256, 44));
        assert_eq!(b.receive(&mut Vec::new(), 1000), 256);
    }

    #[test]
    fn latency_counts_from_when_a_frame_was_due_not_from_when_it_was_sent() {
        // The wire takes nothing for 20 ms in the middle of the trial: most frames that were due then waited.
        let (a, b) = wire(256, perfect());
        struct Stalling<E>(E, u64, u64);
        impl<E: Endpoint> Endpoint for Stalling<E> {
            type Buffer = E::Buffer;
            fn receive(&mut self, into: &mut Vec<E::Buffer>, max: usize) -> usize {
                self.0.receive(into, max)
            }
            fn transmit(&mut self, from: &mut Vec<E::Buffer>) -> usize {
                let now = cycles();
                if (self.1..self.2).contains(&now) { 0 } else { self.0.transmit(from) }
            }
            fn allocate(&mut self) -> Option<E::Buffer> {
                self.0.allocate()
            }
            fn free(&mut self, buffer: E::Buffer) {
                self.0.free(buffer);
            }
            fn frame(&self, buffer: &E::Buffer) -> impl Bytes {
                self.0.frame(buffer)
            }
            fn frame_mut(&mut self, buffer: &mut E::Buffer) -> impl FrameBuffer {
                self.0.frame_mut(buffer)
            }
        }
        let clock = Clock::of_this_machine();
        let (from, to) = (cycles() + clock.cycles(0.02), cycles() + clock.cycles(0.04));
        let ports = [Stalling(a, from, to), Stalling(b, 0, 0)];
        let mut rig = Rig::new(ports, clock, &GO, false);
        let load = Load { both: false, grace: 2.0, ..Load::steady(50_000.0, 0.06) };
        let outcome = rig.open_loop(SMALL, load);
        assert_eq!(outcome.lost(), 0);
        // 20 of 60 ms: a third of the frames waited, on average 10 ms.
        let p80 = outcome.latencies.percentile(80.0, &clock).unwrap();
        assert!(p80 > 4e6, "{p80} ns");
    }

    #[test]
    fn frames_of_an_earlier_trial_are_strays_and_count_for_nothing() {
        let (mut a, mut b) = wire(256, perfect());
        let mut old = a.allocate().unwrap();
        Template::new(99, 64, Addresses { from: 0, to: 1, count: 1 }).write(&mut old, 0, 0);
        a.transmit(&mut vec![old]);
        let mut sink = Sink::new(2, 64, Verify::Whole);
        let mut frames = Vec::new();
        b.receive(&mut frames, 10);
        assert!(!sink.take(&frames[0], 0));
        assert_eq!(sink.arrivals(), Arrivals { stray: 1, ..Arrivals::default() });
    }

    #[test]
    fn a_closed_loop_counts_round_trips_and_losses() {
        let mut rig = rig(lossy(|n| n == 777));
        let outcome = rig.closed_loop(SMALL, 64, 0.05);
        assert_eq!(outcome.lost(), 1);
        assert!(outcome.received() > 10_000);
        assert_eq!(outcome.latencies.samples(), outcome.received());
        assert!(outcome.generator_busy > 0.5);
    }
}
