//! Frames of all sizes and shapes arrive as they were sent.

use virtio::device::Layout;
use virtio::features as f;
use virtio::net::NetHeader;

use super::guest::{Guest, all_kinds, modern};
use super::packets::frame;
use super::world::World;

/// Every frame arrived, in order, bit for bit, behind a header that asks for nothing.
fn assert_arrived(world: &mut World, frames: &[Vec<u8>], buffer: usize, what: &str) {
    let arrived = world.carry(frames, buffer);
    assert_eq!(arrived.len(), frames.len(), "{what}");
    for (got, sent) in arrived.iter().zip(frames) {
        let buffers = if world.guests[1].header() == 12 { 1 } else { 0 };
        assert!(got.bytes == *sent, "{what}: {} bytes became {}", sent.len(), got.bytes.len());
        assert_eq!(got.header, NetHeader::PLAIN.with_num_buffers(buffers), "{what}: {} bytes", sent.len());
        assert_eq!(got.used, [(sent.len() + world.guests[1].header()) as u32], "{what}");
    }
    world.assert_conserved();
}

#[test]
fn every_frame_size_from_14_to_1600_and_jumbos_to_9216_arrive_bit_exact_and_in_order() {
    let sizes = (14..=1600).chain((1601..9216).step_by(211)).chain([9000, 9215, 9216]);
    let frames: Vec<_> = sizes.map(|len| frame(0, 1, len, len as u32)).collect();
    for kind in all_kinds() {
        let mut world = World::of(&[kind, kind]);
        assert_arrived(&mut world, &frames, 9216 + 12, &format!("{kind:?}"));
    }
}

#[test]
fn a_legacy_guest_with_a_header_of_10_bytes_sends_and_receives() {
    let legacy = modern(Layout::Split).without(f::VERSION_1 | f::NET_MRG_RXBUF);
    let frames: Vec<_> = (14..=1514).step_by(3).map(|len| frame(0, 1, len, len as u32)).collect();
    for layout in [Layout::Split, Layout::Packed] {
        for (from, to) in [(legacy, modern(layout)), (modern(layout), legacy), (legacy, legacy)] {
            let mut world = World::of(&[from, to]);
            assert_arrived(&mut world, &frames, 1530, &format!("{from:?} to {to:?}"));
        }
    }
}

#[test]
fn buffers_that_end_with_the_last_byte_of_the_frame_are_large_enough() {
    for kind in all_kinds() {
        let mut world = World::of(&[kind, kind]);
        for len in [14, 63, 64, 65, 1514] {
            let sent = frame(0, 1, len, 7);
            world.guests[1].offer_buffer(0, &[len + 12], false);
            world.guests[0].send(&sent);
            world.settle();
            assert_eq!(world.guests[1].received()[0].bytes, sent, "{kind:?}");
        }
    }
}

/// How the header and the first bytes of a frame lie in descriptors, then how many descriptors there are in all.
fn cuts(of_header: &[usize], descriptors: usize) -> Vec<usize> {
    let mut cuts = of_header.to_vec();
    let mut size = 1;
    while cuts.len() + 1 < descriptors {
        cuts.push(size);
        size = size * 3 % 101 + 1;
    }
    cuts
}

#[test]
fn frames_in_chains_of_2_to_12_descriptors_and_tables_arrive_however_their_header_is_split() {
    let headers: [&[usize]; 5] = [&[12], &[5, 7], &[4, 4, 4], &[1; 12], &[12 + 14]];
    for kind in all_kinds() {
        let mut world = World::of(&[kind, kind]);
        for header in headers {
            for descriptors in 2..=12 {
                let mut sent = Vec::new();
                for (i, len) in [14, 15, 63, 64, 65, 200, 1514].into_iter().enumerate() {
                    let (bytes, cuts) = (frame(0, 1, len, i as u32), cuts(header, descriptors));
                    for indirect in [false, true] {
                        world.guests[1].offer_buffer(0, &[1600], false);
                        world.guests[0].send_as(0, NetHeader::PLAIN, &bytes, &cuts, indirect);
                        sent.push(bytes.clone());
                        world.turn();
                        assert_eq!(world.guests[0].reclaim_sent(), 1);
                    }
                }
                let arrived: Vec<_> = world.guests[1].received().into_iter().map(|r| r.bytes).collect();
                assert!(arrived == sent, "{kind:?}: header {header:?}, {descriptors} descriptors");
            }
        }
        world.assert_conserved();
    }
}

#[test]
fn receive_buffers_of_2_to_12_descriptors_and_tables_are_filled_piece_by_piece() {
    for kind in all_kinds() {
        let mut world = World::of(&[kind, kind]);
        for header in [&[12][..], &[5, 7], &[1; 12], &[14]] {
            for descriptors in 2..=12 {
                for len in [14, 63, 64, 65, 300, 1514] {
                    let mut pieces = cuts(header, descriptors);
                    pieces.push(1600);
                    let sent = frame(0, 1, len, len as u32);
                    for indirect in [false, true] {
                        world.guests[1].offer_buffer(0, &pieces, indirect);
                        world.guests[0].send(&sent);
                        world.turn();
                        let got = world.guests[1].received();
                        assert_eq!(got.len(), 1, "{kind:?} {pieces:?}");
                        assert!(got[0].bytes == sent, "{kind:?} {pieces:?}");
                        assert_eq!(got[0].header, NetHeader::PLAIN.with_num_buffers(1));
                        world.guests[0].reclaim_sent();
                    }
                }
            }
        }
    }
}

#[test]
fn a_guest_that_asks_for_a_notification_gets_one_a_burst_and_a_guest_that_polls_gets_none() {
    for kind in all_kinds() {
        let mut world = World::of(&[kind, kind]);
        let burst = |world: &mut World| {
            world.guests[1].offer_all(256);
            (0..10).for_each(|i| world.guests[0].send(&frame(0, 1, 100, i)));
            world.turn();
            let n = world.guests[0].reclaim_sent() + world.guests[1].received().len();
            assert_eq!(n, 20, "{kind:?}");
        };
        burst(&mut world);
        let calls = |guest: &Guest| (guest.tx[0].calls(), guest.rx[0].calls());
        assert_eq!((calls(&world.guests[0]), calls(&world.guests[1])), ((0, 0), (0, 0)), "{kind:?}");
        assert!(!world.guests[0].tx[0].driver.request_notification());
        assert!(!world.guests[1].rx[0].driver.request_notification());
        burst(&mut world);
        assert_eq!((calls(&world.guests[0]), calls(&world.guests[1])), ((1, 0), (0, 1)), "{kind:?}");
    }
}
