//! Frame parsing under attack (CVES.md, "Frame parsing"): truncated at every byte, every length field at 0, 1 and its
//! maximum, nested tags. What is accepted must still come out verified; nothing may panic or run on.

use super::*;

fn builds() -> Vec<Build> {
    let small = || Build { payload: vec![9; 100], ..Build::default() };
    let extensions = vec![
        (0, vec![0, 0, 1, 4, 0, 0, 0, 0]),
        (43, vec![0, 0, 0, 0, 0, 0, 0, 0]),
        (60, vec![0, 0, 1, 4, 0, 0, 0, 0]),
    ];
    let v4 = [
        small(),
        Build { tags: vec![0x8100], ..small() },
        Build {
            tags: vec![0x88a8, 0x8100],
            options: vec![0x94, 4, 0, 0],
            tcp_options: vec![1; 12],
            ..small()
        },
    ];
    let v6 = [Build { v6: true, ..small() }, Build { v6: true, extensions, ..small() }];
    let tcp = v4.into_iter().chain(v6);
    tcp.flat_map(|b| [b.clone(), Build { tcp: false, tcp_options: vec![], ..b }]).collect()
}

/// All kinds of segmentation that fit the frame.
fn offloads(build: &Build) -> Vec<Offload> {
    let kinds = if build.tcp { vec![build.gso()] } else { vec![USO, UFO] };
    kinds.into_iter().map(|gso| build.offload(gso, 48)).collect()
}

/// With its IP length left 0, as a sender may: then nothing but the headers themselves shows that bytes are missing.
fn without_ip_length(build: &Build) -> Vec<u8> {
    let mut frame = build.frame();
    let at = build.ip_at() + if build.v6 { 4 } else { 2 };
    frame[at..at + 2].fill(0);
    frame
}

/// Tries the frame with `len` bytes at `at` set to 0, 1, and their maximum; returns the outcomes.
fn with_field(build: &Build, at: usize, len: usize, offload: &Offload) -> [Result<usize, OffloadRefused>; 3] {
    let mut values = [vec![0; len], vec![0; len], vec![0xff; len]];
    values[1][len - 1] = 1;
    values.map(|value| {
        let mut frame = build.frame();
        frame[at..at + len].copy_from_slice(&value);
        let _ = finish_checksum(&mut frame.clone(), offload);
        cut(&frame, offload).map(|segments| segments.len())
    })
}

#[test]
fn a_frame_truncated_at_any_byte_is_refused() {
    for build in builds() {
        let frame = build.frame();
        for offload in offloads(&build) {
            assert!(cut(&frame, &offload).unwrap().len() > 1);
            for len in 0..frame.len() {
                assert!(cut(&frame[..len], &offload).is_err(), "{len} bytes of {build:?}");
            }
        }
    }
}

#[test]
fn a_frame_truncated_inside_its_headers_is_refused_even_if_ip_gives_no_length() {
    for build in builds().into_iter().filter(|b| b.extensions.is_empty()) {
        let frame = without_ip_length(&build);
        let headers = build.transport_at() + if build.tcp { 20 + build.tcp_options.len() } else { 8 };
        for offload in offloads(&build) {
            for len in 0..headers {
                assert!(cut(&frame[..len], &offload).is_err(), "{len} bytes of {build:?}");
            }
            // Behind them a TCP frame is only shorter; a UDP header has a length of its own.
            for len in headers..frame.len() {
                assert_eq!(cut(&frame[..len], &offload).is_ok(), build.tcp, "{len} bytes of {build:?}");
            }
        }
    }
}

#[test]
fn a_frame_truncated_at_any_byte_gets_no_checksum_outside_itself() {
    for build in builds() {
        let frame = build.frame();
        let field = build.transport_at() + usize::from(build.csum_offset());
        for len in 0..frame.len() {
            let mut short = frame[..len].to_vec();
            let result = finish_checksum(&mut short, &build.offload(0, 0));
            assert_eq!(result.is_ok(), len >= field + 2, "{len} bytes");
        }
    }
}

#[test]
fn cve_2016_10377_ip_header_lengths_of_every_size() {
    for build in builds().into_iter().filter(|b| !b.v6) {
        for offload in offloads(&build) {
            for words in (0..16u8).filter(|&w| usize::from(w) * 4 != 20 + build.options.len()) {
                let mut frame = build.frame();
                frame[build.ip_at()] = 0x40 | words;
                // The transport header is then not where the sender said that it summed up.
                assert!(cut(&frame, &offload).is_err(), "{words} words");
                assert!(finish_checksum(&mut frame, &offload).is_err() || words >= 5, "{words} words");
            }
        }
    }
}

#[test]
fn cve_2020_35498_bytes_behind_the_ip_packet_never_become_payload() {
    for build in builds() {
        for offload in offloads(&build) {
            let mut frame = build.frame();
            frame.extend([0xee; 6]);
            assert!(matches!(cut(&frame, &offload), Err(OffloadRefused::Malformed(_))));
        }
    }
}

#[test]
fn cve_2023_1668_ip_protocol_0_and_every_other_that_is_not_the_asked_for() {
    for build in builds() {
        let at = build.ip_at() + if build.v6 { 6 } else { 9 };
        let frame = build.frame();
        for protocol in (0..=255u8).filter(|&p| p != frame[at]) {
            let mut frame = frame.clone();
            frame[at] = protocol;
            for offload in offloads(&build) {
                let extension = build.v6 && [0, 43, 60].contains(&protocol);
                assert!(cut(&frame, &offload).is_err() || extension, "protocol {protocol}");
                let _ = finish_checksum(&mut frame.clone(), &offload);
            }
        }
    }
}

#[test]
fn cve_2023_5366_a_checksum_in_neighbour_discovery_touches_only_what_follows_ip() {
    let mut frame = Build { v6: true, payload: vec![7; 64], ..Build::default() }.frame();
    frame[20] = 58;
    frame[54..58].copy_from_slice(&[135, 0, 0, 0]);
    let before = frame.clone();
    finish_checksum(&mut frame, &Offload::new(1, 0, 0, 0, 54, 2)).unwrap();
    assert_eq!((&frame[..56], &frame[58..]), (&before[..56], &before[58..]));
    assert!(finish_checksum(&mut frame, &Offload::new(1, 0, 0, 0, 30, 2)).is_err());
}

#[test]
fn ip_lengths_of_0_1_and_the_maximum() {
    for build in builds() {
        for offload in offloads(&build) {
            let at = build.ip_at() + if build.v6 { 4 } else { 2 };
            let [zero, one, max] = with_field(&build, at, 2, &offload);
            // 0 is what some senders leave there before segmentation; hop-by-hop headers make it a jumbogram.
            assert_eq!(zero.is_ok(), build.extensions.is_empty());
            assert!(one.is_err() && max.is_err());
        }
    }
}

#[test]
fn fragments_that_ask_for_segmentation_are_refused() {
    for build in builds().into_iter().filter(|b| !b.v6) {
        for (place, fragment) in
            [(0x2000u16, true), (0x0001, true), (0x1fff, true), (0x4000, false), (0x8000, false)]
        {
            let mut frame = build.frame();
            let at = build.ip_at() + 6;
            frame[at..at + 2].copy_from_slice(&place.to_be_bytes());
            for offload in offloads(&build) {
                assert_eq!(cut(&frame, &offload).is_err(), fragment, "{place:#x}");
                assert_eq!(finish_checksum(&mut frame.clone(), &offload).is_err(), fragment, "{place:#x}");
            }
        }
    }
}

#[test]
fn ipv6_extension_lengths_of_0_1_and_the_maximum() {
    let build = builds().pop().unwrap();
    for offload in offloads(&build) {
        for header in 0..3 {
            let [zero, one, max] = with_field(&build, build.ip_at() + 40 + 8 * header + 1, 1, &offload);
            // At 16 bytes the first takes in the second, and the third passes for the second; the others then end inside
            // the UDP header.
            assert!(zero.is_ok() && one.is_ok() == (header == 0) && max.is_err());
        }
    }
}

#[test]
fn chains_of_ipv6_extension_headers_end() {
    for count in [8, 9, 100, 1000] {
        let extensions = vec![(60, vec![0, 0, 1, 4, 0, 0, 0, 0]); count];
        let build = Build { v6: true, extensions, payload: vec![1; 100], ..Build::default() };
        assert!(cut(&build.frame(), &build.offload(TCP6, 50)).is_err(), "{count}");
    }
}

#[test]
fn tcp_data_offsets_of_every_size() {
    for build in builds().into_iter().filter(|b| b.tcp) {
        for words in 0..16u8 {
            let mut frame = build.frame();
            frame[build.transport_at() + 12] = words << 4;
            let result = cut(&frame, &build.offload(build.gso(), 50));
            assert_eq!(result.is_ok(), words >= 5, "{words} words");
        }
    }
}

#[test]
fn tcp_data_offsets_beyond_the_end_are_refused() {
    let build = Build { payload: vec![], ..Build::default() };
    for words in 6..16u8 {
        let mut frame = build.frame();
        frame[34 + 12] = words << 4;
        assert!(matches!(cut(&frame, &build.offload(TCP4, 50)), Err(OffloadRefused::Truncated("TCP"))));
    }
}

#[test]
fn udp_lengths_of_0_1_and_the_maximum_are_refused() {
    for build in builds().into_iter().filter(|b| !b.tcp) {
        for offload in offloads(&build) {
            let results = with_field(&build, build.transport_at() + 4, 2, &offload);
            assert!(results.iter().all(Result::is_err));
        }
    }
}

#[test]
fn segment_sizes_of_0_1_and_the_maximum() {
    for build in builds() {
        for offload in offloads(&build) {
            let sized = |size| {
                cut(
                    &build.frame(),
                    &Offload::new(1, offload.gso_type(), 0, size, offload.csum_start(), offload.csum_offset),
                )
            };
            assert!(matches!(sized(0), Err(OffloadRefused::Header(OffloadError::ZeroGsoSize))));
            let ufo = offload.gso_type() == UFO;
            assert_eq!(sized(1).map(|s| s.len()).ok(), if ufo { None } else { Some(100) });
            assert_eq!(sized(7).is_err(), ufo, "no fragment of less than 8 bytes");
            assert_eq!(sized(u16::MAX).unwrap().len(), 1);
        }
    }
}

#[test]
fn more_segments_than_allowed_are_refused_before_any_is_written() {
    let build = Build { payload: vec![0; 1000], ..Build::default() };
    let frame = build.frame();
    let refused = Segments::new(&frame, &build.offload(TCP4, 1), 999).map(|s| s.count()).unwrap_err();
    assert_eq!(refused, OffloadRefused::TooManySegments { count: 1000, limit: 999 });
    assert_eq!(refused.reason(), DropReason::SegmentBudget);
    assert_eq!(Segments::new(&frame, &build.offload(TCP4, 1), 1000).unwrap().count(), 1000);
}

#[test]
fn space_that_is_too_short_is_an_error_and_costs_no_segment() {
    let build = Build { payload: vec![3; 1000], ..Build::default() };
    let frame = build.frame();
    let mut segments = Segments::new(&frame, &build.offload(TCP4, 500), 2).unwrap();
    for len in [0, 53, 54, 553] {
        let result = segments.write_next(&mut vec![0; len]);
        assert_eq!(result, Err(OffloadRefused::NoRoom { needed: 554, given: len }));
    }
    assert_eq!(segments.write_next(&mut [0; 600]), Ok(Some(554)));
}

#[test]
fn nested_vlan_tags_beyond_two_are_refused() {
    for count in 0..6 {
        let build = Build { tags: vec![0x8100; count], ..Build::default() };
        assert_eq!(cut(&build.frame(), &build.offload(TCP4, 1000)).is_ok(), count <= 2, "{count} tags");
        assert_eq!(
            finish_checksum(&mut build.frame(), &build.offload(0, 0)).is_ok(),
            count <= 2,
            "{count} tags"
        );
    }
}

#[test]
fn malformed_ipv4_options_are_not_walked_beyond_their_end() {
    for options in
        [vec![7, 0, 0, 0], vec![7, 1, 0, 0], vec![7, 5, 0, 0], vec![1, 1, 1, 7], vec![0x94, 255, 0, 0]]
    {
        let build = Build { tcp: false, options, ..Build::default() };
        assert!(cut(&build.frame(), &build.offload(UFO, 1480)).is_err());
    }
}

#[test]
fn a_packet_just_too_long_for_ip_is_refused() {
    let build = Build { payload: vec![0; 65_496], v6: true, ..Build::default() };
    let mut frame = without_ip_length(&build);
    assert!(cut(&frame, &build.offload(TCP6, 1448)).is_ok());
    frame.extend([0; 100]);
    assert!(matches!(cut(&frame, &build.offload(TCP6, 1448)), Err(OffloadRefused::Malformed(_))));
    // Here only the first fragment is: 8 bytes of fragment header too many.
    let build = Build { payload: vec![0; 65_527], v6: true, tcp: false, ..Build::default() };
    assert!(matches!(cut(&build.frame(), &build.offload(UFO, 65_528)), Err(OffloadRefused::Malformed(_))));
    assert_eq!(cut(&build.frame(), &build.offload(UFO, 65_520)).unwrap().len(), 2);
}

proptest! {
    #[test]
    fn frames_with_any_bytes_overwritten_never_panic_nor_write_more_than_announced(
        build in any_build(),
        edits in prop::collection::vec((0usize..120, any::<u8>()), 0..12),
        header in (0u8..4, prop::sample::select(vec![0u8, 1, 3, 4, 5, 0x81, 0x84, 2]), any::<u16>(), 0u16..3000),
        honest in any::<bool>(), start in 0u16..150, offset in 0u16..30,
    ) {
        let mut frame = build.frame();
        for (at, byte) in edits {
            if let Some(b) = frame.get_mut(at) { *b = byte; }
        }
        let (flags, gso, hdr_len, size) = header;
        let (start, offset) =
            if honest { (build.transport_at() as u16, build.csum_offset()) } else { (start, offset) };
        let offload = Offload::new(flags, gso, hdr_len, size, start, offset);
        if let Ok(segments) = cut(&frame, &offload) {
            let bytes: usize = segments.iter().map(Vec::len).sum();
            prop_assert!(bytes <= frame.len() + segments.len() * (build.transport_at() + 80));
        }
        let mut finished = frame.clone();
        let _ = finish_checksum(&mut finished, &offload);
        prop_assert_eq!(finished.len(), frame.len());
    }

    #[test]
    fn bytes_that_are_no_frame_at_all_never_panic(
        mut bytes in prop::collection::vec(any::<u8>(), 0..200), gso in 0u8..6, size in any::<u16>(), start in 0u16..220,
    ) {
        let offload = Offload::new(1, gso, 0, size, start, 6);
        let _ = cut(&bytes, &offload);
        let _ = finish_checksum(&mut bytes, &offload);
    }
}
