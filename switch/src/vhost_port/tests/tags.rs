//! VLAN tags come and go on the way, and what the virtio-net header says about places in the frame moves with them.

use port::DropReason;
use virtio::device::Layout;
use virtio::features as f;
use virtio::net::{GSO_TCPV4, NetHeader};

use super::guest::{all_kinds, modern};
use super::packets::{Over, frame, tagged, unfinished, verified};
use super::world::World;
use crate::bridge::{PortPlan, VlanMode};

fn access(vid: u16) -> VlanMode {
    VlanMode::Access(vid)
}

fn trunk(vids: &[u16], native: Option<u16>) -> VlanMode {
    VlanMode::Trunk { vlans: vids.iter().copied().collect(), native }
}

fn plans(modes: [VlanMode; 2]) -> Vec<PortPlan> {
    modes.map(|vlan| PortPlan { vlan, ..PortPlan::default() }).to_vec()
}

const LENGTHS: [usize; 9] = [14, 15, 59, 60, 61, 64, 65, 68, 1514];

#[test]
fn tags_are_pushed_popped_and_renamed_in_frames_of_any_length_and_shape() {
    type Change = fn(&[u8]) -> Vec<u8>;
    let untouched: Change = <[u8]>::to_vec;
    let cases: [([VlanMode; 2], Change, Change); 5] = [
        ([access(5), trunk(&[5], None)], untouched, |f| tagged(f, 5)),
        ([trunk(&[5], None), access(5)], |f| tagged(f, 0x6005), untouched),
        ([access(5), access(5)], |f| tagged(f, 0xe000), untouched),
        ([trunk(&[], Some(7)), trunk(&[7], None)], |f| tagged(f, 0xb000), |f| tagged(f, 0xb007)),
        ([trunk(&[5], None), trunk(&[5], None)], |f| tagged(f, 0xf005), |f| tagged(f, 0xf005)),
    ];
    for kind in all_kinds() {
        for (modes, before, after) in cases.clone() {
            let mut world = World::with_plans(&[kind, kind], plans(modes.clone()));
            for len in LENGTHS {
                for cuts in [&[][..], &[12, 14, 3], &[3, 9, 1, 60]] {
                    let bytes = frame(0, 1, len, 1);
                    world.guests[1].offer_buffer(0, &[1600], false);
                    world.guests[0].send_as(0, NetHeader::PLAIN, &before(&bytes), cuts, false);
                    world.settle();
                    let got = world.guests[1].received();
                    assert_eq!(got.len(), 1, "{kind:?} {modes:?} {len}");
                    assert!(got[0].bytes == after(&bytes), "{kind:?} {modes:?} {len}");
                    assert_eq!(got[0].header, NetHeader::PLAIN.with_num_buffers(1));
                    world.guests[0].reclaim_sent();
                }
            }
            world.assert_conserved();
        }
    }
}

#[test]
fn what_the_sender_left_undone_moves_with_the_tag() {
    let packet = unfinished(Over::TCP4, 1000, &[7; 3000]);
    let plain = NetHeader::PLAIN.with_checksum(34, 16).with_gso(GSO_TCPV4, 54, 1000);
    let moved = NetHeader::PLAIN.with_checksum(38, 16).with_gso(GSO_TCPV4, 58, 1000);
    for kind in all_kinds() {
        let takes = kind.with(f::NET_GUEST_CSUM | f::NET_GUEST_TSO4);
        let push = plans([access(5), trunk(&[5], None)]);
        let pop = plans([trunk(&[5], None), access(5)]);
        for (plans, sent, got) in [
            (push, (plain, packet.clone()), (moved, tagged(&packet, 5))),
            (pop, (moved, tagged(&packet, 5)), (plain, packet.clone())),
        ] {
            let mut world = World::with_plans(&[kind, takes], plans.clone());
            world.guests[1].offer_all(4000);
            world.guests[0].send_as(0, sent.0, &sent.1, &[], false);
            world.settle();
            let arrived = world.guests[1].received();
            assert_eq!(arrived[0].header, got.0.with_num_buffers(1), "{kind:?}");
            assert!(arrived[0].bytes == got.1, "{kind:?}");
            // A receiver that takes nothing unfinished gets it finished, tag and all.
            let mut world = World::with_plans(&[kind, kind], plans);
            world.guests[1].offer_all(4000);
            world.guests[0].send_as(0, sent.0, &sent.1, &[], false);
            world.settle();
            let arrived = world.guests[1].received();
            assert_eq!(arrived.len(), 3, "{kind:?}");
            for part in arrived {
                let has_tag = part.bytes[12..14] == [0x81, 0];
                assert_eq!(has_tag, got.1[12..14] == [0x81, 0]);
                let without = [&part.bytes[..12], &part.bytes[if has_tag { 16 } else { 12 }..]].concat();
                assert_eq!(verified(Over::TCP4, &without), [7; 1000], "{kind:?}");
            }
        }
    }
}

#[test]
fn a_checksum_over_addresses_or_tag_is_refused_also_for_a_guest_that_would_fill_it_in_itself() {
    for layout in [Layout::Split, Layout::Packed] {
        let kind = modern(layout).with(f::NET_GUEST_CSUM);
        let mut world = World::with_plans(&[kind, kind], plans([trunk(&[5], None), access(5)]));
        world.guests[1].offer_all(1600);
        let sent = tagged(&frame(0, 1, 100, 1), 5);
        for start in [0, 4, 14, 33, 34] {
            world.guests[0].send_as(0, NetHeader::PLAIN.with_checksum(start, 0), &sent, &[], false);
        }
        world.settle();
        assert_eq!(world.dropped_from(0), [(DropReason::BadOffload, 4)]);
        let got = world.guests[1].received();
        assert_eq!(got.iter().map(|r| r.header.csum_start()).collect::<Vec<_>>(), [30]);
        world.assert_conserved();
    }
}
