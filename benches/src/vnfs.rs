//! Two network functions at work: one offers frames in a closed loop, one reflects them, on one thread or on two.
//!
//! Owns their threads. Tells its caller once a second how things stand; the caller prints.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};

use crate::clock::{Clock, cycles};
use crate::endpoint::Endpoint;
use crate::histogram::Latencies;
use crate::pinger::{Loop, Pinger};
use crate::reflector::Reflector;
use crate::silence::{NOTHING_MAY_BE_LOST, Silence};
use crate::sink::Arrivals;

/// What they are to do.
#[derive(Clone, Copy, Debug)]
pub struct Job {
    /// The frames. The stream before its number is used to warm up.
    pub frames: Loop,
    /// Seconds before anything counts.
    pub warm_up: f64,
    /// Seconds that count.
    pub seconds: f64,
    /// Core of the offering function.
    pub offering: Option<u32>,
    /// Core of the reflecting one; none: it shares the other's thread.
    pub reflecting: Option<u32>,
    /// Give the core to others when there is nothing to do.
    pub polite: bool,
}

/// How things stand, from the moment that frames count.
#[derive(Clone, Debug)]
pub struct Standing {
    /// Seconds since then.
    pub seconds: f64,
    /// Frames sent.
    pub sent: u64,
    /// What came back.
    pub arrivals: Arrivals,
    /// Round trips since the last standing.
    pub latencies: Latencies,
}

/// What happens.
pub enum Event {
    /// From now on frames count.
    Started,
    /// About a second has passed.
    Second(Standing),
    /// Sending has ended; what was in flight has come back or is lost. The latencies are those of the last part.
    Ended(Standing),
}

/// Why they did not run.
#[derive(Debug, thiserror::Error)]
pub enum VnfError {
    /// A thread could not be put on its core.
    #[error(transparent)]
    Pin(#[from] host::thread::PinError),
    /// A thread panicked; its message was printed.
    #[error("a network function's thread ended unexpectedly")]
    Thread,
}

/// Runs both until the time is up or `stop` is set. `tell` is called on this thread, as things happen.
///
/// # Errors
/// See [`VnfError`].
pub fn run<E: Endpoint + Send>(
    offering: E,
    reflecting: E,
    job: Job,
    clock: Clock,
    stop: &AtomicBool,
    mut tell: impl FnMut(Event),
) -> Result<(), VnfError> {
    let (events, inbox) = channel();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let mut reflector = Some(Reflector::new(reflecting));
        let beside = job.reflecting.and_then(|core| Some((core, reflector.take()?)));
        let reflecting = beside.map(|(core, reflector)| {
            let over = &over;
            scope.spawn(move || reflect(reflector, core, over, job.polite))
        });
        let over = &over;
        let offering = scope.spawn(move || {
            let result = offer(offering, reflector, job, clock, stop, &events);
            over.store(true, Ordering::Release);
            result
        });
        for event in inbox {
            tell(event);
        }
        offering.join().map_err(|_| VnfError::Thread)??;
        reflecting.map_or(Ok(Ok(())), |thread| thread.join()).map_err(|_| VnfError::Thread)?
    })
}

fn reflect<E: Endpoint>(
    mut reflector: Reflector<E>,
    core: u32,
    over: &AtomicBool,
    polite: bool,
) -> Result<(), VnfError> {
    host::thread::name("vnf-reflect");
    host::thread::pin(core)?;
    while !over.load(Ordering::Acquire) {
        if reflector.turn() == 0 && polite {
            std::thread::yield_now();
        }
    }
    Ok(())
}

/// The offering function, and the other if it sits here too.
fn offer<E: Endpoint>(
    mut endpoint: E,
    mut reflector: Option<Reflector<E>>,
    job: Job,
    clock: Clock,
    stop: &AtomicBool,
    events: &Sender<Event>,
) -> Result<(), VnfError> {
    host::thread::name("vnf-offer");
    if let Some(core) = job.offering {
        host::thread::pin(core)?;
    }
    let warming = Loop { stream: job.frames.stream.wrapping_sub(1), ..job.frames };
    let mut pinger = Pinger::new(&mut endpoint, warming);
    let end = cycles() + clock.cycles(job.warm_up);
    while cycles() < end && !stop.load(Ordering::Relaxed) {
        turn(&mut pinger, &mut reflector, false, job.polite);
    }
    drain(&mut pinger, &mut reflector, job.polite, clock);
    pinger.finish();

    let mut pinger = Pinger::new(&mut endpoint, job.frames);
    // The receiver of events outlives this thread, unless it panicked: then nobody wants to know.
    let _ = events.send(Event::Started);
    let start = cycles();
    let (end, second) = (start + clock.cycles(job.seconds), clock.cycles(1.0));
    let (mut now, mut next) = (start, start + second);
    while now < end && !stop.load(Ordering::Relaxed) {
        turn(&mut pinger, &mut reflector, false, job.polite);
        now = cycles();
        if now >= next && next < end {
            next += second;
            let standing = standing(&mut pinger, clock.seconds(now - start));
            let _ = events.send(Event::Second(standing));
        }
    }
    let seconds = clock.seconds(now - start);
    drain(&mut pinger, &mut reflector, job.polite, clock);
    let last = standing(&mut pinger, seconds);
    let (_, sink, sent) = pinger.finish();
    let _ = events.send(Event::Ended(Standing { sent, arrivals: sink.arrivals(), ..last }));
    Ok(())
}

#[inline]
fn turn<E: Endpoint, R: Endpoint>(
    pinger: &mut Pinger<E>,
    reflector: &mut Option<Reflector<R>>,
    stop: bool,
    polite: bool,
) -> usize {
    let moved = pinger.turn(stop) + reflector.as_mut().map_or(0, Reflector::turn);
    if moved == 0 && polite {
        std::thread::yield_now();
    }
    moved
}

/// Until everything in flight has come back, or nothing has for a while.
fn drain<E: Endpoint, R: Endpoint>(
    pinger: &mut Pinger<E>,
    reflector: &mut Option<Reflector<R>>,
    polite: bool,
    clock: Clock,
) {
    let mut silence = Silence::new(clock.cycles(NOTHING_MAY_BE_LOST), cycles());
    while pinger.awaited() > 0 {
        if turn(pinger, reflector, true, polite) > 0 {
            silence.heard(cycles());
        } else if silence.listen(cycles()) {
            break;
        }
    }
}

fn standing<E: Endpoint>(pinger: &mut Pinger<E>, seconds: f64) -> Standing {
    let sent = pinger.sent();
    let sink = pinger.sink();
    let latencies = sink.latencies.clone();
    sink.latencies.clear();
    Standing { seconds, sent, arrivals: sink.arrivals(), latencies }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::tests::{Fault, perfect, wire};
    use crate::frame::{Addresses, Verify};

    fn work(fault: Fault, seconds: f64, apart: bool, stop: &AtomicBool) -> (Vec<Standing>, Standing, usize) {
        let clock = Clock::of_this_machine();
        let core = host::topology::permitted_cores().unwrap().iter().next().unwrap();
        let addresses = Addresses { from: 0, to: 1, count: 1 };
        let patience = clock.cycles(NOTHING_MAY_BE_LOST);
        let frames = Loop { size: 64, in_flight: 64, stream: 1, addresses, verify: Verify::Whole, patience };
        let reflecting = apart.then_some(core);
        let job = Job { frames, warm_up: 0.01, seconds, offering: None, reflecting, polite: true };
        let (a, b) = wire(256, fault);
        let (mut lines, mut last, mut started) = (Vec::new(), None, 0);
        run(a, b, job, clock, stop, |event| match event {
            Event::Started => started += 1,
            Event::Second(s) => lines.push(s),
            Event::Ended(s) => last = Some(s),
        })
        .unwrap();
        (lines, last.unwrap(), started)
    }

    #[test]
    fn they_tell_every_second_and_at_the_end_and_lose_nothing() {
        for apart in [false, true] {
            let (lines, last, started) = work(perfect(), 1.2, apart, &AtomicBool::new(false));
            assert_eq!((lines.len(), started), (1, 1));
            let all = lines[0].latencies.samples() + last.latencies.samples();
            assert_eq!((last.arrivals.counts.received, all), (last.sent, last.sent));
            assert_eq!(last.arrivals.counts.missing, 0);
            assert!(last.sent >= lines[0].sent && lines[0].sent > 0);
        }
    }

    #[test]
    fn what_is_lost_or_damaged_is_in_the_last_word() {
        let mut n = 0;
        let fault: Fault = Box::new(move |mut frame, queue| {
            n += 1;
            if n % 1_000 == 0 {
                frame.bytes[50] ^= 1;
            }
            if n % 1_000 != 1 {
                queue.push_back(frame);
            }
        });
        let (_, last, _) = work(fault, 0.5, false, &AtomicBool::new(false));
        assert!(last.arrivals.corrupt > 0);
        assert!(last.arrivals.counts.missing > last.arrivals.corrupt);
        assert_eq!(last.arrivals.counts.received + last.arrivals.counts.missing, last.sent);
    }

    #[test]
    fn they_stop_when_told() {
        let (lines, last, _) = work(perfect(), 60.0, false, &AtomicBool::new(true));
        assert!(lines.is_empty() && last.seconds < 1.0);
    }
}
