//! A checksum is filled in where the headers have one, and nowhere else.

use super::*;

proptest! {
    #[test]
    fn any_frame_without_its_checksum_gets_it_and_changes_nowhere_else(build in any_build()) {
        let mut frame = build.frame();
        let before = frame.clone();
        finish_checksum(&mut frame, &build.offload(0, 0)).unwrap();
        let packet = Packet::verified(&frame, build.tags.len());
        let skip = build.transport_at() - build.ip_at() - packet.ip.len();
        packet.transport(skip, build.protocol());
        let field = build.transport_at() + usize::from(build.csum_offset());
        prop_assert_eq!(&frame[..field], &before[..field]);
        prop_assert_eq!(&frame[field + 2..], &before[field + 2..]);
    }

    #[test]
    fn whatever_the_header_asks_for_addresses_tags_ip_headers_and_ports_stay_as_they_were_judged(
        build in any_build(), start in 0u16..200, offset in 0u16..100,
    ) {
        let mut frame = build.frame();
        let before = frame.clone();
        let refused = finish_checksum(&mut frame, &Offload::new(1, 0, 0, 0, start, offset)).is_err();
        let judged = build.transport_at() + if build.tcp { 16 } else { 6 };
        prop_assert_eq!(&frame[..judged], &before[..judged]);
        prop_assert!(!refused || frame == before);
    }
}

#[test]
fn a_udp_checksum_that_comes_out_as_zero_is_sent_as_all_ones() {
    let build = Build { tcp: false, payload: vec![0, 0], ..Build::default() };
    let mut frame = build.frame();
    // A payload that makes the sum all ones.
    let rest = !slow_sum(&frame[34..]);
    frame[42..44].copy_from_slice(&rest.to_be_bytes());
    finish_checksum(&mut frame, &build.offload(0, 0)).unwrap();
    assert_eq!(frame[40..42], [0xff, 0xff]);
}

#[test]
fn a_tcp_checksum_that_comes_out_as_zero_stays_zero() {
    let build = Build { payload: vec![0, 0], ..Build::default() };
    let mut frame = build.frame();
    let rest = !slow_sum(&frame[34..]);
    frame[54..56].copy_from_slice(&rest.to_be_bytes());
    finish_checksum(&mut frame, &build.offload(0, 0)).unwrap();
    assert_eq!(frame[50..52], [0, 0]);
}

#[test]
fn a_frame_that_asks_for_nothing_is_left_alone() {
    let build = Build::default();
    let mut frame = build.frame();
    finish_checksum(&mut frame, &Offload::new(Offload::DATA_VALID, 0, 0, 0, 34, 16)).unwrap();
    assert_eq!(frame, build.frame());
}

#[test]
fn the_inner_checksum_of_a_tunnel_is_filled_in() {
    // UDP to port 4789 that carries a VXLAN header and another frame.
    let inner = Build { payload: vec![5; 333], ..Build::default() };
    let mut payload = vec![8, 0, 0, 0, 0, 0, 77, 0];
    payload.extend(inner.frame());
    let outer = Build { tcp: false, payload, ..Build::default() };
    let mut frame = outer.frame();
    let inner_at = 42 + 8;
    finish_checksum(&mut frame, &Offload::new(1, 0, 0, 0, (inner_at + 34) as u16, 16)).unwrap();
    Packet::verified(&frame[inner_at..], 0).transport(0, 6);
}

#[test]
fn cve_2024_11614_a_checksum_field_over_the_end_changes_nothing() {
    let mut frame = Build { payload: vec![], ..Build::default() }.frame();
    let before = frame.clone();
    for (start, offset) in [(34, 19), (53, 0), (54, 0), (0xffff, 0), (0, 0xffff), (0xffff, 0xffff)] {
        let refused = finish_checksum(&mut frame, &Offload::new(1, 0, 0, 0, start, offset));
        assert!(matches!(refused, Err(OffloadRefused::Header(_))), "{start}+{offset}");
    }
    assert_eq!(frame, before);
}

#[test]
fn a_checksum_over_the_source_address_or_the_tag_is_refused() {
    let mut frame = Build { tags: vec![0x8100], ..Build::default() }.frame();
    let before = frame.clone();
    for (start, offset) in [(0, 6), (6, 0), (14, 0), (0, 14), (18, 8), (38, 0), (38, 2)] {
        let refused = finish_checksum(&mut frame, &Offload::new(1, 0, 0, 0, start, offset)).unwrap_err();
        // The first ones are those that no receiver gets, whether it takes checksums unfinished or not.
        if start < 34 {
            assert_eq!(refused, OffloadRefused::Header(port::OffloadError::ChecksumInHeaders(start)));
            assert_eq!(refused.reason(), DropReason::BadOffload);
        } else {
            assert_eq!(refused, OffloadRefused::ChecksumPlace { start, offset });
            assert_eq!(refused.reason(), DropReason::CannotFinish);
        }
    }
    assert_eq!(frame, before);
}

#[test]
fn work_is_what_the_receiver_did_not_negotiate() {
    let all = Accepts::all();
    let checksum_only = Accepts::of_features(features::NET_GUEST_CSUM);
    let checksum = Offload::new(1, 0, 0, 0, 34, 16);
    assert_eq!(all.work(&Offload::NONE), Work::Nothing);
    assert_eq!(Accepts::empty().work(&Offload::new(Offload::DATA_VALID, 0, 9, 9, 9, 9)), Work::Nothing);
    assert_eq!(
        (checksum_only.work(&checksum), Accepts::empty().work(&checksum)),
        (Work::Nothing, Work::Checksum)
    );
    for gso in [TCP4, UFO, TCP6, USO, TCP4 | Offload::GSO_ECN] {
        let offload = Offload::new(1, gso, 0, 1000, 34, 16);
        assert_eq!((all.work(&offload), checksum_only.work(&offload)), (Work::Nothing, Work::Cut));
    }
    let tso4 = Accepts::of_features(features::NET_GUEST_CSUM | features::NET_GUEST_TSO4);
    assert_eq!(tso4.work(&Offload::new(1, TCP4, 0, 1000, 34, 16)), Work::Nothing);
    assert_eq!(tso4.work(&Offload::new(1, TCP4 | Offload::GSO_ECN, 0, 1000, 34, 16)), Work::Cut);
    assert_eq!(tso4.work(&Offload::new(1, TCP6, 0, 1000, 34, 16)), Work::Cut);
}

#[test]
fn a_receiver_without_checksums_takes_nothing_else_either() {
    assert_eq!(Accepts::of_features(!features::NET_GUEST_CSUM), Accepts::empty());
    assert_eq!(Accepts::of_features(u64::MAX), Accepts::all());
}
