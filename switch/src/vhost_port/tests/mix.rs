//! Many guests, many queues, any mix: nothing is lost without a name, and a flow stays in order.

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use std::collections::HashMap;
use virtio::net::NetHeader;

use super::guest::{Kind, all_kinds};
use super::packets::{Over, frame, unfinished};
use super::world::World;

#[derive(Clone, Debug)]
enum Step {
    /// A guest sends a frame of so many bytes to another (or to itself, or to nobody), cut into descriptors.
    Send { from: usize, to: u8, len: usize, cuts: Vec<usize>, indirect: bool, header: [u8; 10] },
    /// A guest offers a receive buffer.
    Offer { guest: usize, lens: Vec<usize>, indirect: bool },
    /// The worker takes a turn.
    Turn,
    /// A guest takes back what came.
    Look(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let cut = proptest::collection::vec(1usize..80, 0..6);
    let header = prop_oneof![3 => Just([0; 10]), 1 => any::<[u8; 10]>()];
    let len = prop_oneof![4 => 0usize..1600, 1 => 0usize..9_200];
    let buffer = proptest::collection::vec(prop_oneof![1usize..40, 500usize..1600], 1..5);
    prop_oneof![
        6 => (0usize..3, 0u8..5, len, cut, any::<bool>(), header)
            .prop_map(|(from, to, len, cuts, indirect, header)| Step::Send { from, to, len, cuts, indirect, header }),
        6 => (0usize..3, buffer, any::<bool>())
            .prop_map(|(guest, lens, indirect)| Step::Offer { guest, lens, indirect }),
        3 => Just(Step::Turn),
        2 => (0usize..3).prop_map(Step::Look),
    ]
}

fn run(kinds: &[Kind], steps: &[Step]) {
    let mut world = World::of(kinds);
    let mut looked = [0u64; 3];
    for step in steps {
        match step {
            Step::Send { from, to, len, cuts, indirect, header } => {
                let guest = &mut world.guests[*from];
                if usize::from(guest.tx[0].driver.free()) > cuts.len() {
                    let mut net = NetHeader::PLAIN;
                    net.0[..10].copy_from_slice(header);
                    let bytes = frame(*from as u8, *to, *len, *len as u32);
                    guest.send_as(0, net, &bytes[..*len.min(&bytes.len())], cuts, *indirect);
                }
            }
            Step::Offer { guest, lens, indirect } => {
                let guest = &mut world.guests[*guest];
                if usize::from(guest.rx[0].driver.free()) >= lens.len() {
                    guest.offer_buffer(0, lens, *indirect);
                }
            }
            Step::Turn => {
                world.turn();
            }
            Step::Look(i) => {
                world.guests[*i].reclaim_sent();
                looked[*i] += world.guests[*i].received().len() as u64;
            }
        }
    }
    world.settle();
    world.assert_conserved();
    for (i, mut looked) in looked.into_iter().enumerate() {
        looked += world.guests[i].received().len() as u64;
        let counters = &world.guests[i].port.tx[0].counters;
        assert!(looked >= counters.sent.get(), "guest {i} was sent {} and got {looked}", counters.sent.get());
        let cut = counters.segments.get();
        assert!(looked <= counters.sent.get() + cut);
        assert!(world.guests[i].is_untouched());
    }
}

#[test]
fn frames_received_and_copied_equal_frames_sent_and_dropped_for_any_mix() {
    const SEED: [u8; 32] = *b"cableway: any mix of three guest";
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &SEED);
    let config = Config { cases: 200, failure_persistence: None, ..Config::default() };
    let kinds = proptest::collection::vec(proptest::sample::select(all_kinds()), 3);
    let any = (kinds, proptest::collection::vec(step(), 1..200));
    let result = TestRunner::new_with_rng(config, rng).run(&any, |(kinds, steps)| {
        run(&kinds, &steps);
        Ok(())
    });
    if let Err(e) = result {
        panic!("seed {:?}: {e}", std::str::from_utf8(&SEED));
    }
}

#[test]
fn each_flow_keeps_to_one_receive_ring_and_its_order() {
    const FLOWS: u16 = 40;
    for kind in all_kinds() {
        let kind = Kind { pairs: 4, slot: 400, ..kind };
        let mut world = World::of(&[kind, kind]);
        let mut next = HashMap::new();
        let mut ring_of = HashMap::new();
        for sequence in 0..30u8 {
            world.guests[1].offer_all(300);
            for flow in 0..FLOWS {
                let sent = unfinished(Over::UDP4, flow, &[sequence; 50]);
                world.guests[0].send_as(usize::from(flow) % 4, NetHeader::PLAIN, &sent, &[], false);
            }
            world.settle();
            world.guests[0].reclaim_sent();
            for ring in 0..4 {
                for got in world.guests[1].received_on(ring) {
                    let flow = u16::from_be_bytes([got.bytes[34], got.bytes[35]]);
                    assert_eq!(*ring_of.entry(flow).or_insert(ring), ring, "{kind:?}: flow {flow} moved");
                    let expected = next.entry(flow).or_insert(0u8);
                    assert_eq!(got.bytes[42], *expected, "{kind:?}: flow {flow} out of order");
                    *expected += 1;
                }
            }
        }
        assert!(next.len() == usize::from(FLOWS) && next.values().all(|&n| n == 30), "{kind:?}");
        let rings: std::collections::HashSet<_> = ring_of.values().collect();
        assert_eq!(rings.len(), 4, "{kind:?}: flows use all rings");
        world.assert_conserved();
    }
}
