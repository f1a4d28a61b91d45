//! What a sender left undone reaches those who take it so, and is done for those who do not.

use port::DropReason;
use virtio::features as f;
use virtio::net::{GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP, GSO_UDP_L4, NetHeader};

use super::guest::all_kinds;
use super::packets::{Over, header, payload, put_together, unfinished, verified};
use super::world::World;

const EVERYTHING: u64 =
    f::NET_GUEST_CSUM | f::NET_GUEST_TSO4 | f::NET_GUEST_TSO6 | f::NET_GUEST_USO4 | f::NET_GUEST_USO6;

const ALL: [(Over, u8); 4] =
    [(Over::TCP4, GSO_TCPV4), (Over::TCP6, GSO_TCPV6), (Over::UDP4, GSO_UDP_L4), (Over::UDP6, GSO_UDP_L4)];

/// Descriptors that cut the headers in unlucky places, or not at all.
const CUTS: [&[usize]; 3] = [&[], &[12, 14, 20], &[10, 30, 1, 33, 700]];

#[test]
fn a_guest_that_takes_frames_unfinished_gets_them_as_they_were_sent() {
    for kind in all_kinds() {
        let mut world = World::of(&[kind, kind.with(EVERYTHING)]);
        for (over, gso) in ALL {
            for (gso, len) in [(GSO_NONE, 1000), (gso, 8_000)] {
                for cuts in CUTS {
                    let (net, sent) = (header(over, gso, 1400), unfinished(over, 1, &payload(len)));
                    world.guests[1].offer_buffer(0, &[9_000], false);
                    world.guests[0].send_as(0, net, &sent, cuts, false);
                    world.settle();
                    let got = world.guests[1].received();
                    assert_eq!(got[0].header, net.with_num_buffers(1), "{kind:?} {over:?}");
                    assert!(got[0].bytes == sent, "{kind:?} {over:?}");
                    world.guests[0].reclaim_sent();
                }
            }
        }
        world.assert_conserved();
    }
}

#[test]
fn checksums_are_filled_in_for_a_guest_that_takes_none_unfinished() {
    for kind in all_kinds() {
        let mut world = World::of(&[kind, kind]);
        for (over, _) in ALL {
            for len in [0, 1, 2, 9, 63, 64, 1000, 1431] {
                for cuts in CUTS {
                    let sent = unfinished(over, 2, &payload(len));
                    world.guests[1].offer_buffer(0, &[1600], false);
                    world.guests[0].send_as(0, header(over, GSO_NONE, 0), &sent, cuts, false);
                    world.settle();
                    let got = world.guests[1].received();
                    assert_eq!(got[0].header, NetHeader::PLAIN.with_num_buffers(1));
                    assert!(verified(over, &got[0].bytes) == payload(len), "{kind:?} {over:?} {len}");
                    world.guests[0].reclaim_sent();
                }
            }
        }
        world.assert_conserved();
    }
}

#[test]
fn frames_are_cut_for_a_guest_that_takes_none_unsegmented() {
    for kind in all_kinds() {
        for receiver in [kind, kind.with(f::NET_GUEST_CSUM), kind.without(f::NET_MRG_RXBUF)] {
            let mut world = World::of(&[kind, receiver]);
            for (over, gso) in ALL {
                for (len, size) in [(8_000, 1400), (2_801, 1400), (1_000, 37)] {
                    world.guests[1].offer_all(1600);
                    let sent = unfinished(over, 3, &payload(len));
                    world.guests[0].send_as(0, header(over, gso, size), &sent, CUTS[len % 3], false);
                    world.settle();
                    let got = world.guests[1].received();
                    assert_eq!(got.len(), len.div_ceil(size.into()), "{kind:?} {over:?}");
                    let mut whole = Vec::new();
                    for part in got {
                        assert_eq!(part.header, NetHeader::PLAIN.with_num_buffers(1));
                        let data = verified(over, &part.bytes);
                        assert!(data.len() <= size.into());
                        whole.extend(data);
                    }
                    assert!(whole == payload(len), "{kind:?} {over:?} {len} by {size}");
                    world.guests[0].reclaim_sent();
                }
            }
            world.assert_conserved();
            let segments = world.guests[1].port.tx[0].counters.segments.get();
            assert_eq!(segments, 4 * (6 + 3 + 28));
        }
    }
}

#[test]
fn udp_left_whole_reaches_those_who_negotiated_just_that_as_it_was_sent_and_others_cut() {
    let takes = [(GSO_UDP, f::NET_GUEST_UFO), (GSO_UDP_L4, f::NET_GUEST_USO4 | f::NET_GUEST_USO6)];
    for kind in all_kinds() {
        for (gso, own) in takes {
            // Whoever takes one of the two does not take the other, and USO over one version of IP is not enough.
            let not_own = f::NET_GUEST_UFO | f::NET_GUEST_USO4 | f::NET_GUEST_TSO4;
            let others = f::NET_GUEST_CSUM | not_own & !if gso == GSO_UDP { own } else { f::NET_GUEST_USO6 };
            for (features, whole) in [(f::NET_GUEST_CSUM | own, true), (others, false), (0, false)] {
                let sender = kind.with(f::NET_CSUM | f::NET_HOST_UFO | f::NET_HOST_USO);
                let mut world = World::of(&[sender, kind.with(features)]);
                for over in [Over::UDP4, Over::UDP6] {
                    let (net, sent) = (header(over, gso, 1400), unfinished(over, 1, &payload(8_000)));
                    world.guests[1].offer_all(if whole { 9_000 } else { 1_600 });
                    world.guests[0].send_as(0, net, &sent, CUTS[1], false);
                    world.settle();
                    let got = world.guests[1].received();
                    world.guests[0].reclaim_sent();
                    if whole {
                        assert_eq!((got.len(), got[0].header), (1, net.with_num_buffers(1)), "{kind:?}");
                        assert!(got[0].bytes == sent, "{kind:?} {over:?}");
                        continue;
                    }
                    assert_eq!(got.len(), 6, "{kind:?} {over:?} {gso} to {features:#x}");
                    assert!(got.iter().all(|part| part.header == NetHeader::PLAIN.with_num_buffers(1)));
                    let parts = got.iter().map(|part| &part.bytes[..]);
                    let data: Vec<u8> = if gso == GSO_UDP {
                        verified(over, &put_together(over, parts))
                    } else {
                        parts.flat_map(|part| verified(over, part)).collect()
                    };
                    assert!(data == payload(8_000), "{kind:?} {over:?}");
                }
                world.assert_conserved();
            }
        }
    }
}

#[test]
fn a_burst_has_a_budget_of_segments_and_the_next_burst_another() {
    for kind in all_kinds() {
        let mut world = World::of(&[kind, kind]);
        let (greedy, modest) = (header(Over::UDP4, GSO_UDP_L4, 1), header(Over::UDP4, GSO_UDP_L4, 400));
        for round in 1..=3 {
            world.guests[1].offer_all(1600);
            world.guests[0].send_as(0, greedy, &unfinished(Over::UDP4, 4, &payload(2000)), &[], false);
            world.guests[0].send_as(0, modest, &unfinished(Over::UDP4, 4, &payload(2000)), &[], false);
            world.settle();
            assert_eq!(world.dropped_to(1), [(DropReason::SegmentBudget, round)], "{kind:?}");
            assert_eq!(world.guests[1].received().len(), 5);
            world.guests[0].reclaim_sent();
        }
        world.assert_conserved();
    }
}
