//! Receive buffers of all sizes: those that merge, those that are too small, those that are none.

use port::DropReason;
use virtio::device::Layout;
use virtio::features as f;
use virtio::net::NetHeader;

use super::guest::{all_kinds, modern};
use super::packets::frame;
use super::world::World;

#[test]
fn a_frame_of_9000_bytes_spans_mergeable_buffers_of_1526() {
    for kind in all_kinds() {
        let mut world = World::of(&[kind, kind]);
        for salt in 0..40 {
            let sent = frame(0, 1, 9000, salt);
            world.guests[1].offer_all(1526);
            world.guests[0].send(&sent);
            world.settle();
            let got = world.guests[1].received();
            assert_eq!(got.len(), 1, "{kind:?}");
            assert!(got[0].bytes == sent, "{kind:?}");
            assert_eq!(got[0].used, [1526, 1526, 1526, 1526, 1526, 9012 - 5 * 1526]);
            assert_eq!(got[0].header, NetHeader::PLAIN.with_num_buffers(6));
            assert_eq!(world.guests[0].reclaim_sent(), 1);
        }
    }
}

#[test]
fn mergeable_buffers_of_any_shape_are_filled_to_the_last_byte_before_the_next_is_begun() {
    for kind in all_kinds() {
        for len in [14, 64, 100, 1000, 3000] {
            let mut world = World::of(&[kind, kind]);
            let sent = frame(0, 1, len, 3);
            let shapes: [&[usize]; 6] = [&[7], &[3, 2], &[40], &[1, 1, 1], &[900, 100], &[2500]];
            for (i, shape) in shapes.into_iter().enumerate() {
                world.guests[1].offer_buffer(0, shape, i % 2 == 1);
            }
            world.guests[0].send(&sent);
            world.settle();
            let got = world.guests[1].received();
            assert_eq!(got.len(), 1, "{kind:?} {len}");
            assert!(got[0].bytes == sent, "{kind:?} {len}");
            let whole = [7, 5, 40, 3, 1000, 2500];
            let n = got[0].used.len();
            assert_eq!(got[0].used[..n - 1], whole[..n - 1]);
            assert_eq!(usize::from(got[0].header.num_buffers()), n);
        }
    }
}

#[test]
fn a_frame_for_which_too_few_mergeable_buffers_are_free_is_dropped_and_writes_nothing() {
    for kind in all_kinds() {
        let mut world = World::of(&[kind, kind]);
        (0..3).for_each(|_| world.guests[1].offer_buffer(0, &[1000], false));
        world.guests[0].send(&frame(0, 1, 3000, 1));
        world.settle();
        assert!(world.guests[1].is_untouched() && world.guests[1].received().is_empty(), "{kind:?}");
        assert_eq!(world.dropped_to(1), [(DropReason::ReceiverFull, 1)]);
        // The buffers are still good for what fits.
        let sent = frame(0, 1, 2988, 2);
        world.guests[0].send(&sent);
        world.settle();
        assert!(world.guests[1].received()[0].bytes == sent, "{kind:?}");
        world.assert_conserved();
    }
}

#[test]
fn a_buffer_too_small_for_a_jumbo_frame_that_does_not_merge_is_not_written_and_serves_a_smaller_frame() {
    for kind in all_kinds() {
        let mut world = World::of(&[kind, kind.without(f::NET_MRG_RXBUF)]);
        for (size, indirect) in [(1600, false), (1600, true)] {
            let before = world.dropped_to(1).first().map_or(0, |d| d.1);
            world.guests[1].offer_buffer(0, &[12, size - 12], indirect);
            (0..3).for_each(|_| world.guests[1].offer_buffer(0, &[size], indirect));
            world.guests[0].send(&frame(0, 1, size - 11, 1));
            world.guests[0].send(&frame(0, 1, 9_000, 2));
            world.settle();
            assert!(world.guests[1].is_untouched() && world.guests[1].received().is_empty(), "{kind:?}");
            assert_eq!(world.dropped_to(1), [(DropReason::ReceiverTooSmall, before + 2)]);
            let sent: Vec<_> = (0..4).map(|i| frame(0, 1, size - 12 - i as usize, i)).collect();
            sent.iter().for_each(|s| world.guests[0].send(s));
            world.settle();
            let got: Vec<_> = world.guests[1].received().into_iter().map(|r| r.bytes).collect();
            assert!(got == sent, "{kind:?}");
            assert_eq!(world.guests[0].reclaim_sent(), 6);
        }
        world.assert_conserved();
    }
}

#[test]
fn cve_2026_86566_runt_receive_buffers_that_do_not_merge_are_never_written() {
    for kind in all_kinds() {
        for runt in [0, 1, 11, 12, 13, 25] {
            let receiver = kind.without(f::NET_MRG_RXBUF);
            let mut world = World::of(&[kind, receiver, kind]);
            world.guests[2].offer_all(1600);
            // Each guest's address becomes known, so that nothing is flooded.
            world.guests[1].send(&frame(1, 7, 60, 0));
            world.guests[2].send(&frame(2, 7, 60, 0));
            world.settle();
            world.guests[2].received();
            world.guests[1].offer_buffer(0, &[runt], false);
            world.guests[1].offer_buffer(0, &[1600], false);
            world.guests[0].send(&frame(0, 1, 60, 1));
            world.guests[0].send(&frame(0, 2, 60, 2));
            world.settle();
            let (small, got) = (world.dropped_to(1), world.guests[2].received());
            assert_eq!(small.iter().find(|d| d.0 == DropReason::ReceiverTooSmall).map(|d| d.1), Some(1));
            assert_eq!(got.last().map(|r| r.bytes.clone()), Some(frame(0, 2, 60, 2)), "{kind:?} {runt}");
            // It goes back empty, and the ring moves on: what comes next finds the buffer behind it.
            assert_eq!(world.guests[1].returned(0), [Vec::<u8>::new()], "{kind:?} {runt}");
            assert!(world.guests[1].is_untouched());
            world.guests[0].send(&frame(0, 1, 1500, 3));
            world.settle();
            let got: Vec<_> = world.guests[1].received().into_iter().map(|r| r.bytes).collect();
            assert!(got == [frame(0, 1, 1500, 3)], "{kind:?} {runt}");
            world.assert_conserved();
        }
    }
}

#[test]
fn cve_2026_86566_runt_receive_buffers_that_merge_hold_as_much_as_they_hold() {
    for kind in all_kinds() {
        for runt in [1, 11, 12, 13] {
            let mut world = World::of(&[kind, kind]);
            (0..30).for_each(|_| world.guests[1].offer_buffer(0, &[runt], false));
            world.guests[1].offer_buffer(0, &[1600], false);
            let sent = frame(0, 1, 700, 1);
            world.guests[0].send(&sent);
            world.settle();
            let got = world.guests[1].received();
            assert!(got[0].bytes == sent, "{kind:?} {runt}");
            assert_eq!(got[0].used.len(), 31);
        }
        let mut world = World::of(&[kind, kind]);
        for len in [5, 0, 1600] {
            world.guests[1].offer_buffer(0, &[len], false);
        }
        world.guests[0].send(&frame(0, 1, 60, 1));
        world.guests[0].send(&frame(0, 1, 60, 2));
        world.settle();
        assert_eq!(world.dropped_to(1), [(DropReason::ReceiverTooSmall, 1)]);
        let got = world.guests[1].returned(0);
        assert!(got[0].is_empty() && got[1].is_empty() && got[2][12..] == frame(0, 1, 60, 2), "{kind:?}");
    }
}

#[test]
fn frames_too_short_or_too_long_or_without_a_header_are_dropped_under_their_names() {
    for layout in [Layout::Split, Layout::Packed] {
        let kind = modern(layout);
        let mut world = World::of(&[kind, kind]);
        world.guests[1].offer_all(9_300);
        let whole = frame(0, 1, 9_225, 0);
        for len in [0, 1, 13, 9_225] {
            world.guests[0].send(&whole[..len]);
        }
        world.settle();
        assert_eq!(world.dropped_from(0), [(DropReason::Runt, 3), (DropReason::Oversize, 1)]);
        let legacy = modern(Layout::Split).without(f::VERSION_1 | f::NET_MRG_RXBUF);
        let mut world = World::of(&[kind, legacy]);
        // Shorter than its header: a guest with one of 10 bytes, on a ring whose header has 12.
        world.guests[0].kind = legacy;
        world.guests[0].send(&[0]);
        world.settle();
        assert_eq!(world.dropped_from(0), [(DropReason::BadChain, 1)]);
    }
}

#[test]
fn a_frame_that_finds_no_buffer_is_dropped_and_the_next_arrives() {
    for kind in all_kinds() {
        let mut world = World::of(&[kind, kind]);
        world.guests[1].offer_buffer(0, &[1600], false);
        (0..5).for_each(|i| world.guests[0].send(&frame(0, 1, 80, i)));
        world.settle();
        assert_eq!(world.dropped_to(1), [(DropReason::ReceiverFull, 4)], "{kind:?}");
        assert_eq!(world.guests[1].received()[0].bytes, frame(0, 1, 80, 0));
        assert_eq!(world.guests[0].reclaim_sent(), 5);
        world.guests[1].offer_buffer(0, &[1600], false);
        world.guests[0].send(&frame(0, 1, 80, 9));
        world.settle();
        assert_eq!(world.guests[1].received()[0].bytes, frame(0, 1, 80, 9));
        world.assert_conserved();
    }
}
