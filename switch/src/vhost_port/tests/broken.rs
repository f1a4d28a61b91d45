//! A guest can break its own port and nothing else.

use std::sync::atomic::Ordering;

use port::DropReason;
use virtio::device::{Layout, RingError};
use virtio::driver::Piece;
use virtio::net::NetHeader;

use super::guest::{GUEST, Guest, Kind, all_kinds, modern};
use super::packets::frame;
use super::world::World;
use crate::events::Event;

/// Guest 0 does `harm`, while guests 1 and 2 talk. Returns why the port of guest 0 stopped, and which ring.
fn broken_by(kind: Kind, harm: impl Fn(&mut Guest)) -> (u16, RingError) {
    let mut world = World::of(&[kind, kind, kind]);
    let talk = |world: &mut World, salt| {
        for (from, to) in [(1, 2), (2, 1)] {
            world.guests[to].offer_all(1600);
            let sent = frame(from as u8, to as u8, 200, salt);
            world.guests[from].send(&sent);
            world.settle();
            let got = world.guests[to].received();
            assert!(got.iter().any(|r| r.bytes == sent), "guests 1 and 2 noticed");
            world.guests[from].reclaim_sent();
            world.guests[from].received();
        }
    };
    talk(&mut world, 0);
    while world.events.try_recv().is_ok() {}
    harm(&mut world.guests[0]);
    // Somebody sends to it, so that its receive ring is looked at.
    world.guests[1].send(&frame(1, 0, 100, 0));
    world.settle();
    world.guests[1].reclaim_sent();
    talk(&mut world, 1);
    let seen = world.guests[0].port.rx[0].counters.received.get();
    talk(&mut world, 2);
    assert_eq!(world.guests[0].port.rx[0].counters.received.get(), seen, "polled after it broke");
    let port = &world.guests[0].port;
    assert!(port.shared.broken.load(Ordering::Relaxed));
    world.assert_conserved();
    let events: Vec<_> = world.events.try_iter().collect();
    match &events[..] {
        [Event::RingBroken { port: 0, queue, error }] => (*queue, error.clone()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_address_outside_memory_stops_the_port_that_named_it() {
    for kind in all_kinds() {
        let end = {
            let world = World::of(&[kind]);
            GUEST + world.guests[0].snapshot().len() as u64
        };
        for (address, len) in
            [(0, 100), (GUEST - 1, 100), (end - 99, 100), (u64::MAX - 10, 100), (GUEST, u32::MAX)]
        {
            let harm = |guest: &mut Guest, receive: bool, chain: bool| {
                let bad = Piece { address, len };
                let good = Piece { address: GUEST, len: 12 };
                let pieces = if chain { vec![good, bad] } else { vec![bad] };
                let queue = if receive { &mut guest.rx[0] } else { &mut guest.tx[0] };
                queue.driver.offer_chain(&pieces, 0).unwrap();
                queue.driver.publish();
            };
            for chain in [false, true] {
                let want = RingError::Address { index: 0, address, len };
                assert_eq!(broken_by(kind, |g| harm(g, false, chain)), (1, want.clone()), "{kind:?}");
                assert_eq!(broken_by(kind, |g| harm(g, true, chain)), (0, want), "{kind:?}");
            }
        }
    }
}

#[test]
fn an_available_index_that_jumps_stops_the_port() {
    for kind in all_kinds().into_iter().filter(|k| k.layout == Layout::Split) {
        for jump in [65, 1000, 0x8000, 0xffff] {
            let (queue, error) = broken_by(kind, |guest| guest.tx[0].poke16(1, 2, jump));
            assert_eq!((queue, error), (1, RingError::AvailIndex { avail: jump, next: 0, size: 64 }));
        }
    }
}

#[test]
fn a_chain_that_does_not_end_stops_the_port() {
    for kind in all_kinds() {
        let harm = |guest: &mut Guest| match kind.layout {
            Layout::Split => {
                guest.send_as(0, NetHeader::PLAIN, &frame(0, 1, 100, 0), &[12], false);
                // The second descriptor names the first as its next.
                guest.tx[0].poke16(0, 16 + 12, 1);
                guest.tx[0].poke16(0, 16 + 14, 0);
            }
            Layout::Packed => {
                guest.send_as(0, NetHeader::PLAIN, &frame(0, 1, 100, 0), &[1; 63], false);
                // The last descriptor of the ring goes on.
                guest.tx[0].poke16(0, 63 * 16 + 14, 0x81);
            }
        };
        assert_eq!(broken_by(kind, harm), (1, RingError::Loop { index: 0 }), "{kind:?}");
    }
}

#[test]
fn a_descriptor_index_outside_the_table_stops_the_port() {
    for kind in all_kinds().into_iter().filter(|k| k.layout == Layout::Split) {
        let harm = |guest: &mut Guest| {
            guest.send_as(0, NetHeader::PLAIN, &frame(0, 1, 100, 0), &[12], false);
            guest.tx[0].poke16(0, 14, 64);
        };
        assert_eq!(broken_by(kind, harm), (1, RingError::Index { index: 64, size: 64 }), "{kind:?}");
    }
}

#[test]
fn a_chain_of_more_than_256_descriptors_is_dropped_and_the_port_goes_on() {
    for layout in [Layout::Split, Layout::Packed] {
        let kind = Kind { size: 512, slot: 4_000, ..modern(layout) };
        for indirect in [false, true] {
            let mut world = World::of(&[kind, kind]);
            world.guests[1].offer_all(1600);
            let sent = frame(0, 1, 600, 0);
            // 255 cuts: 256 descriptors with the rest.
            world.guests[0].send_as(0, NetHeader::PLAIN, &sent, &[2; 256], indirect);
            world.settle();
            assert_eq!(world.guests[0].reclaim_sent(), 1);
            world.guests[0].send_as(0, NetHeader::PLAIN, &sent, &[2; 255], indirect);
            world.settle();
            assert_eq!(world.dropped_from(0), [(DropReason::BadChain, 1)]);
            let got = world.guests[1].received();
            assert!(got.len() == 1 && got[0].bytes == sent);
            world.assert_conserved();
        }
    }
}
