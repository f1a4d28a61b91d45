//! Several workers send to one receive ring while housekeeping takes rings and moves queues: every frame is accounted for.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use port::DropReason;
use vhost_user::Device;
use virtio::device::Layout;

use super::super::VhostPort;
use super::guest::{Guest, Kind, all_kinds, modern};
use super::packets::frame;
use super::world::World;
use crate::bridge::{BridgePlan, Fdb, PortPlan};
use crate::config::Idle;
use crate::events::Events;
use crate::plan::{Devices, Plan, Plans};
use crate::worker::{Worker, WorkerShared};

#[test]
fn frames_for_a_ring_that_another_worker_holds_are_dropped_as_ring_busy_and_the_next_arrive() {
    for kind in all_kinds() {
        let mut world = World::of(&[kind, kind]);
        world.guests[1].offer_all(1600);
        let port = world.guests[1].port.clone();
        let held = port.tx[0].try_claim();
        (0..5).for_each(|i| world.guests[0].send(&frame(0, 1, 100, i)));
        world.settle();
        assert_eq!(world.guests[0].reclaim_sent(), 5, "the sender waits for nobody");
        assert_eq!(world.dropped_to(1), [(DropReason::RingBusy, 5)], "{kind:?}");
        drop(held);
        world.guests[0].send(&frame(0, 1, 100, 9));
        world.settle();
        let got = world.guests[1].received();
        assert!(got.len() == 1 && got[0].bytes == frame(0, 1, 100, 9), "{kind:?}");
        world.assert_conserved();
    }
}

/// The guest that the others send to.
const RECEIVER: usize = 4;

/// A plan of two workers that poll these guests each. All plans share a learning table.
fn plan(guests: &[Guest], polled: [&[usize]; 2], fdb: &Arc<Fdb>) -> Plan {
    let plans = guests.iter().map(|_| Some(PortPlan::default())).collect();
    Plan {
        bridge: BridgePlan::new(plans, fdb.clone(), false).unwrap(),
        ports: guests.iter().map(|g| Some(g.port.clone())).collect(),
        queues: polled.map(|of| of.iter().map(|&i| guests[i].port.rx[0].clone()).collect()).to_vec(),
        devices: Devices::default(),
        extras: None,
        burst: 64,
        idle: Idle::Poll,
    }
}

/// Ends the workers, also where the test fails.
struct Ends<'w>(&'w [Arc<WorkerShared>]);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.iter().for_each(|worker| worker.stop.store(true, Ordering::Relaxed));
    }
}

/// Four guests send to a fifth through two workers, until they met at its ring.
fn contend(kind: Kind) {
    let (sender, events) = Events::channel(4096);
    let guests = (0..).zip([kind; 5]);
    let mut guests: Vec<Guest> =
        guests.map(|(n, kind)| Guest::new(VhostPort::new(n, "vnf", 1, sender.clone()), kind)).collect();
    let fdb = Arc::new(Fdb::new(1024).unwrap());
    let placements = [[&[0, 1, RECEIVER][..], &[2, 3]], [&[2, 1], &[RECEIVER, 0, 3]]];
    let plans = Arc::new(Plans::new(plan(&guests, placements[0], &fdb)));
    let epoch = host::cpu::rdtsc();
    let shared = [0, 1].map(|index| Arc::new(WorkerShared::new(index, 0, epoch).unwrap()));
    let (mut offered, mut got, mut last) = (1_u64, 0_u64, [0_u32; 4]);
    // So that the bridge knows where it is.
    guests[RECEIVER].send(&frame(RECEIVER as u8, 0, 100, 0));
    let mut take = |guest: &mut Guest| {
        for received in guest.received() {
            let (from, at) = (usize::from(received.bytes[11]), received.bytes.len() - 4);
            let number = u32::from_be_bytes(received.bytes[at..].try_into().unwrap());
            assert!(number > last[from], "guest {from}: frame {number} after {}", last[from]);
            last[from] = number;
            got += 1;
        }
    };
    std::thread::scope(|scope| {
        for shared in &shared {
            let mut worker = Worker::new(shared.clone(), plans.clone()).unwrap();
            scope.spawn(move || worker.run());
        }
        let _ends = Ends(&shared);
        let begin = Instant::now();
        let receiver = guests[RECEIVER].port.clone();
        let met = || receiver.tx[0].counters.all_drops().iter().any(|(r, _)| *r == DropReason::RingBusy);
        let mut round = 0;
        while round < 300 || !met() && begin.elapsed() < Duration::from_secs(60) {
            guests[RECEIVER].offer_all(1600);
            for (from, guest) in guests.iter_mut().enumerate().take(RECEIVER) {
                guest.reclaim_sent();
                while guest.tx[0].driver.free() > 0 {
                    offered += 1;
                    let mut bytes = frame(from as u8, RECEIVER as u8, 1_000, round);
                    bytes.extend((offered as u32).to_be_bytes());
                    guest.send(&bytes);
                }
            }
            take(&mut guests[RECEIVER]);
            match round % 8 {
                // Housekeeping takes the ring that both want, and the one that a worker keeps.
                0 => guests[RECEIVER].device.enable_queue(0, false),
                1 => guests[RECEIVER].device.enable_queue(0, true),
                // A worker that lost its core in the middle of a burst has it this long: the only way to meet on one core.
                2 => {
                    let _held = receiver.tx[0].try_claim();
                    std::thread::sleep(Duration::from_micros(200));
                }
                3 => guests[0].device.enable_queue(1, false),
                4 => guests[0].device.enable_queue(1, true),
                6 => plans.swap(plan(&guests, placements[round as usize / 8 % 2], &fdb)),
                7 => {
                    plans.collect();
                }
                _ => {}
            }
            round += 1;
        }
        assert!(met(), "the workers never met in {round} rounds");
        guests[0].device.enable_queue(1, true);
        guests[RECEIVER].device.enable_queue(0, true);
    });
    // What the workers left behind is carried on this thread.
    let mut world = World::of_guests(guests, vec![PortPlan::default(); 5], events);
    world.guests[RECEIVER].offer_all(1600);
    world.settle();
    take(&mut world.guests[RECEIVER]);
    world.assert_conserved();
    let received: u64 = world.guests.iter().map(|g| g.port.rx[0].counters.received.get()).sum();
    assert_eq!(received, offered, "frames that came in");
    assert_eq!(world.guests[RECEIVER].port.tx[0].counters.sent.get(), got, "frames that went out");
}

#[test]
fn two_workers_and_housekeeping_at_one_receive_ring_lose_nothing_without_a_name() {
    for layout in [Layout::Split, Layout::Packed] {
        contend(Kind { slot: 1_700, ..modern(layout) });
    }
}
