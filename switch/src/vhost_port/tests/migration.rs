//! A guest moves away while frames flow, and a switch dies in the middle and another goes on.

use std::collections::BTreeSet;
use std::sync::Arc;

use vhost_user::Device;
use virtio::device::Layout;
use virtio::memory::DirtyLog;
use virtio::net::{GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP, GSO_UDP_L4, NetHeader};

use super::super::VhostPort;
use super::guest::{GUEST, Guest, Kind, all_kinds};
use super::packets::{Over, frame, header, payload, unfinished};
use super::world::World;
use crate::bridge::PortPlan;
use crate::events::Events;

/// A log of the whole guest, and a look at it.
fn log(bytes: usize) -> (Arc<DirtyLog>, impl Fn() -> BTreeSet<u64>) {
    let len = (GUEST as usize + bytes) / 4096 / 8 + 1;
    let base = Box::leak(vec![0u8; len].into_boxed_slice()).as_mut_ptr();
    // SAFETY: leaked, so that it lives for ever.
    let log = Arc::new(unsafe { DirtyLog::new(base, len, Box::new(())) });
    let marked = move || {
        // SAFETY: as above; nobody writes while the test looks.
        let byte = |i: u64| unsafe { base.add(i as usize).read_volatile() };
        (0..8 * len as u64).filter(|page| byte(page / 8) >> (page % 8) & 1 == 1).collect()
    };
    (log, marked)
}

/// Pages that differ between two looks at a guest's memory.
fn changed(before: &[u8], after: &[u8]) -> BTreeSet<u64> {
    let pages = before.chunks(4096).zip(after.chunks(4096)).enumerate();
    pages.filter(|(_, (a, b))| a != b).map(|(i, _)| GUEST / 4096 + i as u64).collect()
}

/// Settles while the writes to both guests are logged: asserts that every page that changes is marked, and no other.
fn settle_logged(world: &mut World, what: &str) {
    let mut looks = Vec::new();
    for guest in &mut world.guests {
        let before = guest.snapshot();
        let (log, marked) = log(before.len());
        let rings: Vec<_> = guest.rx.iter().chain(&guest.tx).map(|q| (q.index, q.areas)).collect();
        for (index, areas) in &rings {
            guest.device.set_log(*index, Some(log.clone()), Some(areas[2].guest));
        }
        looks.push((before, marked, rings));
    }
    world.settle();
    for (i, (before, marked, rings)) in looks.into_iter().enumerate() {
        let (changed, marked) = (changed(&before, &world.guests[i].snapshot()), marked());
        // Where the position is kept across a crash is no guest memory; here it only lies there.
        let kept = world.guests[i].inflight_pages();
        let changed: BTreeSet<u64> = changed.difference(&kept).copied().collect();
        assert!(!changed.is_empty() && changed.is_subset(&marked), "{what}: {changed:x?} {marked:x?}");
        // A split ring's used index is marked even where the bytes stay as they were. Nothing else is: no sender's buffer, no
        // indirect table, no part of a receive buffer that stayed empty, no event area of a packed ring.
        let ring = if i == 0 { 1 } else { 0 };
        let mut allowed = changed;
        if world.guests[i].kind.layout == Layout::Split {
            allowed.extend(rings.iter().find(|r| r.0 == ring).map(|r| r.1[2].guest / 4096));
        }
        assert!(marked.is_subset(&allowed), "{what}: {marked:x?} but not {allowed:x?}");
    }
}

#[test]
fn every_page_that_is_written_while_a_guest_migrates_is_marked_and_no_other() {
    for kind in all_kinds() {
        for (buffer, len) in [(1600, 1514), (1600, 100), (1526, 9000)] {
            let mut world = World::of(&[kind, kind]);
            world.guests[1].offer_all(buffer);
            (0..5).for_each(|i| world.guests[0].send(&frame(0, 1, len, i)));
            settle_logged(&mut world, &format!("{kind:?} {len}"));
            let got = world.guests[1].received();
            assert!((0..5).zip(&got).all(|(i, r)| r.bytes == frame(0, 1, len, i)) && got.len() == 5);
        }
    }
}

#[test]
fn pages_of_receive_chains_in_indirect_tables_are_marked_as_far_as_they_are_written() {
    for kind in all_kinds() {
        for (pieces, len) in [
            (&[12, 1600][..], 100),
            (&[5, 300, 3000, 5000], 1514),
            (&[100, 700, 12, 900], 9000),
            (&[1; 200], 150),
        ] {
            let mut world = World::of(&[kind, kind]);
            for _ in 0..60 {
                world.guests[1].offer_buffer(0, pieces, true);
            }
            (0..5).for_each(|i| world.guests[0].send(&frame(0, 1, len, i)));
            settle_logged(&mut world, &format!("{kind:?} {pieces:?} {len}"));
            let got = world.guests[1].received();
            assert!((0..5).zip(&got).all(|(i, r)| r.bytes == frame(0, 1, len, i)) && got.len() == 5);
        }
    }
}

#[test]
fn pages_of_frames_that_are_finished_in_software_are_marked() {
    let over =
        [(Over::TCP4, GSO_TCPV4), (Over::TCP6, GSO_TCPV6), (Over::UDP4, GSO_UDP), (Over::UDP6, GSO_UDP_L4)];
    for kind in all_kinds() {
        for (over, gso) in over {
            for (pieces, indirect) in [(&[1600][..], false), (&[9, 50, 2000], true), (&[600], false)] {
                for (gso, len, parts) in [(gso, 8_000, 6), (GSO_NONE, 1_000, 1)] {
                    let mut world = World::of(&[kind, kind]);
                    for _ in 0..60 {
                        world.guests[1].offer_buffer(0, pieces, indirect);
                    }
                    let sent = unfinished(over, 3, &payload(len));
                    world.guests[0].send_as(0, header(over, gso, 1400), &sent, &[12, 14, 20], false);
                    settle_logged(&mut world, &format!("{kind:?} {over:?} {gso} {pieces:?}"));
                    assert_eq!(world.guests[1].received().len(), parts, "{kind:?} {over:?} {gso} {pieces:?}");
                }
            }
        }
    }
}

#[test]
fn what_tells_a_driver_whether_to_notify_is_marked_too() {
    for kind in all_kinds() {
        let mut world = World::of(&[kind]);
        let guest = &mut world.guests[0];
        let before = guest.snapshot();
        let (log, marked) = log(before.len());
        let areas: Vec<_> = guest.tx.iter().map(|q| (q.index, q.areas[2].guest)).collect();
        for (index, used) in areas {
            guest.device.set_log(index, Some(log.clone()), Some(used));
        }
        // As a worker does before it sleeps.
        for slot in &guest.port.rx {
            slot.state.take().ring.as_mut().unwrap().ring.set_notify(true);
        }
        let changed = changed(&before, &guest.snapshot());
        assert!(!changed.is_empty() && changed == marked(), "{kind:?}: {changed:x?} {:x?}", marked());
    }
}

/// Guests on a switch that was just started.
fn start(guests: Vec<Guest>) -> World {
    let (sender, events) = Events::channel(64);
    let mut moved: Vec<_> = (0..)
        .zip(guests)
        .map(|(number, guest)| guest.moved_to(VhostPort::new(number, "vnf", 1, sender.clone())))
        .collect();
    // What a front end remembers of a split ring may be wrong; of a packed one it knows nothing.
    let base = |kind: Kind| (kind.layout == Layout::Split).then_some(0);
    moved.iter_mut().for_each(|guest| guest.start(base(guest.kind)));
    let plans = vec![PortPlan::default(); moved.len()];
    World::of_guests(moved, plans, events)
}

#[test]
fn a_switch_that_takes_over_from_one_that_was_killed_loses_and_repeats_nothing() {
    for kind in all_kinds() {
        let kind = Kind { size: 128, slot: 1_700, ..kind };
        let mut world = World::of(&[kind, kind]);
        let (mut sent, mut got) = (0, 0);
        for round in 0..40 {
            world.guests[1].offer_all(1600);
            for _ in 0..5 + round % 7 {
                world.guests[0].send_as(0, NetHeader::PLAIN, &frame(0, 1, 300, sent), &[12], round % 3 == 0);
                sent += 1;
            }
            if round % 4 != 1 {
                world.turn();
            }
            if round % 4 != 2 {
                world.guests[0].reclaim_sent();
            }
            for r in world.guests[1].received() {
                assert!(r.bytes == frame(0, 1, 300, got), "{kind:?}: frame {got} in round {round}");
                got += 1;
            }
            if round % 2 == 1 {
                // No ring is stopped: what the old switch held is gone with it.
                world = start(world.guests);
            }
            world.turn();
        }
        world.settle();
        got += world.guests[1].received().len() as u32;
        assert_eq!(got, sent, "{kind:?}");
    }
}
