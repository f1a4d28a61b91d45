//! Frames between two guests that suffer on purpose, coming in or going out: what is lost has a name, the rest arrives.

use std::time::{Duration, Instant};

use port::DropReason;
use virtio::device::Layout;

use super::super::VhostPort;
use super::guest::{Guest, modern};
use super::packets::frame;
use super::world::World;
use crate::bridge::PortPlan;
use crate::capture::{Capture, Filter};
use crate::config::{Direction, Inject, Share};
use crate::events::Events;
use crate::inject::{Injection, Injections, Lanes};
use crate::plan::Extras;

fn percent(percent: u32) -> Share {
    Share::of_millionths(percent * 10_000)
}

/// Two guests; the frames of the one with this number suffer.
fn world(port: u16, inject: &Inject) -> (World, std::sync::Arc<Lanes>) {
    let (sender, events) = Events::channel(64);
    let guests: Vec<_> = [0, 1]
        .map(|n| Guest::new(VhostPort::new(n, "vnf", 1, sender.clone()), modern(Layout::Packed)))
        .into_iter()
        .collect();
    let lanes = Lanes::new(inject, 1);
    let injections = Injections::new(vec![Injection { port, lanes: lanes.clone() }]);
    let extras = Extras { injections, ..Extras::default() };
    (World::with_extras(guests, vec![PortPlan::default(); 2], events, extras), lanes)
}

/// `count` frames from guest 0 to guest 1, which both know of each other.
fn frames(count: usize) -> Vec<Vec<u8>> {
    (0..count).map(|i| frame(0, 1, 60 + 13 * (i % 100), i as u32)).collect()
}

/// Both guests have been heard of, and frames to them are not flooded.
fn acquaint(world: &mut World) {
    world.guests[0].offer_all(2_048);
    world.guests[1].send(&frame(1, 0, 60, 0));
    world.settle();
    let end = Instant::now() + Duration::from_secs(60);
    while world.guests[0].received().is_empty() {
        assert!(Instant::now() < end);
        world.turn();
    }
    world.guests[1].reclaim_sent();
}

/// Frames to guest 1, and what arrives until nothing waits any more.
fn carry(world: &mut World, lanes: &Lanes, sent: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut arrived = Vec::new();
    let end = Instant::now() + Duration::from_secs(60);
    for some in sent.chunks(16) {
        world.guests[1].offer_all(2_048);
        some.iter().for_each(|frame| world.guests[0].send(frame));
        loop {
            world.settle();
            arrived.extend(world.guests[1].received().into_iter().map(|r| r.bytes));
            world.guests[1].offer_all(2_048);
            let (inward, outward) = lanes.done();
            if inward.held + outward.held == 0 {
                break;
            }
            assert!(Instant::now() < end, "{inward:?} {outward:?}");
        }
        world.guests[0].reclaim_sent();
    }
    arrived
}

/// Both ways that frames from guest 0 to guest 1 can suffer: as they come in, and as they go out.
const WAYS: [(u16, Direction); 2] = [(0, Direction::In), (1, Direction::Out)];

#[test]
fn without_any_rate_frames_arrive_as_they_were_sent() {
    for (port, direction) in WAYS {
        let (mut world, lanes) = world(port, &Inject { direction, ..Inject::default() });
        let sent = frames(500);
        assert_eq!(carry(&mut world, &lanes, &sent), sent);
        world.assert_conserved();
    }
}

#[test]
fn what_is_lost_has_a_name_and_the_same_frames_are_lost_each_time() {
    for (port, direction) in WAYS {
        let inject = Inject { drop: percent(30), direction, ..Inject::default() };
        let sent = frames(500);
        let runs = [(); 2].map(|()| {
            let (mut world, lanes) = world(port, &inject);
            acquaint(&mut world);
            let arrived = carry(&mut world, &lanes, &sent);
            world.assert_conserved();
            let dropped = if port == 0 { world.dropped_from(0) } else { world.dropped_to(1) };
            assert_eq!(dropped, [(DropReason::Injected, 500 - arrived.len() as u64)]);
            assert!((50..300).contains(&dropped[0].1), "{dropped:?}");
            arrived
        });
        assert_eq!(runs[0], runs[1]);
        let mut rest = sent.iter();
        assert!(runs[0].iter().all(|frame| rest.any(|sent| sent == frame)), "in order, and undamaged");
    }
}

#[test]
fn all_faults_together_conserve_frames_and_never_write_to_a_guest() {
    for (port, direction) in WAYS {
        let rate = percent(20);
        let inject = Inject {
            seed: 3,
            drop: rate,
            corrupt: rate,
            duplicate: rate,
            reorder: rate,
            delay: Duration::from_micros(200),
            direction,
        };
        let (mut world, lanes) = world(port, &inject);
        acquaint(&mut world);
        let sent = frames(1_000);
        let arrived = carry(&mut world, &lanes, &sent);
        world.assert_conserved();
        let (inward, outward) = lanes.done();
        let done = if port == 0 { inward } else { outward };
        let idle = if port == 0 { outward } else { inward };
        assert_eq!(idle, crate::inject::Done::default(), "the other way nothing happens");
        assert!(
            done.corrupted > 0 && done.duplicated > 0 && done.reordered > 0 && done.delayed > 0,
            "{done:?}"
        );
        // Damaged addresses may lead a frame astray, so that not all arrive.
        assert!(
            arrived.len() > 600 && arrived.len() <= 1_000 + done.duplicated as usize,
            "{}",
            arrived.len()
        );
        let whole = arrived.iter().filter(|frame| sent.contains(frame)).count();
        assert!(whole < arrived.len(), "some are damaged");
        assert!(world.guests.iter().all(Guest::is_untouched));
    }
}

#[test]
fn a_delayed_frame_arrives_later_without_any_other() {
    for (port, direction) in WAYS {
        let delay = Duration::from_millis(20);
        let (mut world, lanes) = world(port, &Inject { delay, direction, ..Inject::default() });
        let start = Instant::now();
        assert_eq!(carry(&mut world, &lanes, &frames(1)), frames(1));
        assert!(start.elapsed() >= Duration::from_millis(19), "{:?}", start.elapsed());
    }
}

#[test]
fn frames_that_wait_when_faults_end_are_counted_and_no_more_are_held() {
    for (port, direction) in WAYS {
        let (mut world, lanes) =
            world(port, &Inject { delay: Duration::from_secs(600), direction, ..Inject::default() });
        world.guests[1].offer_all(2_048);
        frames(10).iter().for_each(|frame| world.guests[0].send(frame));
        world.settle();
        let (inward, outward) = lanes.end();
        assert_eq!(inward.iter().sum::<u64>() + outward, 10);
        // A worker that does not know yet finds a line on which nothing happens.
        frames(10).iter().for_each(|frame| world.guests[0].send(frame));
        world.settle();
        assert_eq!(world.guests[1].received().len(), 10);
    }
}

#[test]
fn who_looks_sees_frames_beyond_the_faults() {
    let (sender, events) = Events::channel(64);
    let guests: Vec<_> = [0, 1]
        .map(|n| Guest::new(VhostPort::new(n, "vnf", 1, sender.clone()), modern(Layout::Split)))
        .into_iter()
        .collect();
    let inject = Inject { drop: percent(100), direction: Direction::In, ..Inject::default() };
    let lanes = Lanes::new(&inject, 1);
    let captures: Vec<_> = [0, 1].map(|n| Capture::new(n, "vnf", 65_557, Filter::default()).unwrap()).into();
    let injections = Injections::new(vec![Injection { port: 0, lanes: lanes.clone() }]);
    let extras = Extras { captures: captures.clone(), injections };
    let mut world = World::with_extras(guests, vec![PortPlan::default(); 2], events, extras);
    assert!(carry(&mut world, &lanes, &frames(20)).is_empty());
    assert_eq!(captures[0].report().captured, 20, "they came in");
    assert_eq!(captures[1].report().captured, 0, "and went nowhere");
}
