//! Every segment of any frame is what its sender would have sent.

use super::*;

/// The bytes of an IPv4 header that may differ between segments are blanked, the rest must be equal.
fn same_ipv4_but_len_id_and_checksum(a: &[u8], b: &[u8]) -> bool {
    let blank = |h: &[u8]| {
        let mut h = h.to_vec();
        [2, 3, 4, 5, 10, 11].iter().for_each(|&i| h[i] = 0);
        h
    };
    blank(a) == blank(b)
}

fn check_network(build: &Build, original: &Packet, segment: &Packet, index: usize) {
    assert_eq!(segment.ethernet, original.ethernet);
    if build.v6 {
        assert_eq!((&segment.ip[..4], &segment.ip[6..]), (&original.ip[..4], &original.ip[6..]));
    } else {
        assert!(same_ipv4_but_len_id_and_checksum(segment.ip, original.ip));
        let id = u16::from_be_bytes([segment.ip[4], segment.ip[5]]);
        assert_eq!(id, build.id.wrapping_add(index as u16));
    }
}

fn check_tcp(build: &Build, size: usize) {
    let frame = build.frame();
    let segments = cut(&frame, &build.offload(build.gso(), size as u16)).unwrap();
    assert_eq!(segments.len(), build.payload.len().div_ceil(size).max(1));
    let original = Packet::verified(&frame, build.tags.len());
    let skip = build.transport_at() - build.ip_at() - original.ip.len();
    let header = 20 + build.tcp_options.len();
    let mut payload: Vec<u8> = Vec::new();
    for (i, segment) in segments.iter().enumerate() {
        let (first, last) = (i == 0, i + 1 == segments.len());
        let packet = Packet::verified(segment, build.tags.len());
        check_network(build, &original, &packet, i);
        assert_eq!(packet.rest[..skip], original.rest[..skip], "extension headers");
        let tcp = packet.transport(skip, 6);
        assert_eq!(tcp[..4], original.rest[skip..skip + 4], "ports");
        let sequence = u32::from_be_bytes(tcp[4..8].try_into().unwrap());
        assert_eq!(sequence, build.sequence.wrapping_add(payload.len() as u32));
        assert_eq!(tcp[8..13], original.rest[skip + 8..skip + 13]);
        let mut flags = build.flags;
        flags &= if last { 0xff } else { !0x09 };
        flags &= if first { 0xff } else { !0x80 };
        assert_eq!(tcp[13], flags, "flags of segment {i}");
        assert_eq!(tcp[14..16], original.rest[skip + 14..skip + 16], "window");
        assert_eq!(tcp[18..header], original.rest[skip + 18..skip + header], "options");
        let part = &tcp[header..];
        assert!(part.len() == size || last);
        payload.extend(part);
    }
    assert_eq!(payload, build.payload);
}

fn check_datagrams(build: &Build, size: usize) {
    let frame = build.frame();
    let segments = cut(&frame, &build.offload(USO, size as u16)).unwrap();
    assert_eq!(segments.len(), build.payload.len().div_ceil(size).max(1));
    let original = Packet::verified(&frame, build.tags.len());
    let skip = build.transport_at() - build.ip_at() - original.ip.len();
    let mut payload: Vec<u8> = Vec::new();
    for (i, segment) in segments.iter().enumerate() {
        let packet = Packet::verified(segment, build.tags.len());
        check_network(build, &original, &packet, i);
        assert_eq!(packet.rest[..skip], original.rest[..skip], "extension headers");
        let udp = packet.transport(skip, 17);
        assert_eq!(udp[..4], original.rest[skip..skip + 4], "ports");
        assert!(udp.len() - 8 == size || i + 1 == segments.len());
        payload.extend(&udp[8..]);
    }
    assert_eq!(payload, build.payload);
}

/// The bytes of extension headers that stay in front of a fragment header (RFC 8200, 4.5), and the number of the last.
fn unfragmentable(build: &Build) -> (usize, Option<usize>) {
    let last = build.extensions.iter().rposition(|e| e.0 == 0 || e.0 == 43);
    (build.extensions.iter().take(last.map_or(0, |l| l + 1)).map(|e| e.1.len()).sum(), last)
}

fn check_fragments(build: &Build, size: usize) {
    let frame = build.frame();
    let fragments = cut(&frame, &build.offload(UFO, size as u16)).unwrap();
    let original = Packet::verified(&frame, build.tags.len());
    let (front, last_front) = unfragmentable(build);
    let skip = build.transport_at() - build.ip_at() - original.ip.len();
    let whole = &original.rest[front..];
    assert_eq!(fragments.len(), whole.len().div_ceil(size & !7));
    let mut together: Vec<u8> = Vec::new();
    let mut ids = Vec::new();
    for (i, fragment) in fragments.iter().enumerate() {
        let last = i + 1 == fragments.len();
        let packet = Packet::verified(fragment, build.tags.len());
        assert_eq!(packet.ethernet, original.ethernet);
        if fragments.len() == 1 {
            assert_eq!(packet.rest.len(), original.rest.len(), "nothing is inserted");
            together = packet.rest[front..].to_vec();
        } else if build.v6 {
            // The headers in front are those of the original, but for the number that announces the fragment header.
            let mut expected = original.ip[6..7].to_vec();
            expected.extend(&original.ip[7..]);
            expected.extend(&original.rest[..front]);
            let mut seen = packet.ip[6..].to_vec();
            seen.extend(&packet.rest[..front]);
            let announced_at = last_front
                .map_or(0, |l| 34 + build.extensions.iter().take(l).map(|e| e.1.len()).sum::<usize>());
            let announced = std::mem::replace(&mut expected[announced_at], 44);
            assert_eq!(seen, expected);
            let header = &packet.rest[front..front + 8];
            assert_eq!((header[0], header[1]), (announced, 0));
            let place = u16::from_be_bytes([header[2], header[3]]);
            assert_eq!((usize::from(place & !7), place & 7), (together.len(), u16::from(!last)));
            ids.push(header[4..8].to_vec());
            together.extend(&packet.rest[front + 8..]);
        } else {
            let place = u16::from_be_bytes([packet.ip[6], packet.ip[7]]);
            assert_eq!(usize::from(place & 0x1fff) * 8, together.len());
            assert_eq!(place & 0xe000, if last { 0 } else { 0x2000 });
            ids.push(packet.ip[4..6].to_vec());
            assert_eq!(packet.ip[8..10], original.ip[8..10]);
            assert_eq!(packet.ip[12..20], original.ip[12..20]);
            if i == 0 {
                assert_eq!(packet.ip[20..], original.ip[20..], "the first fragment has all options");
            }
            together.extend(packet.rest);
        }
    }
    ids.dedup();
    assert!(ids.len() <= 1, "one identification for all fragments");
    // Put together again, it is the datagram with its checksum filled in.
    let mut whole_again = original.rest[..front].to_vec();
    whole_again.extend(&together);
    let datagram =
        Packet { ethernet: original.ethernet, ip: original.ip, rest: &whole_again }.transport(skip, 17);
    assert_eq!(datagram[8..], build.payload);
    assert_eq!(datagram[..6], original.rest[skip..skip + 6]);
}

proptest! {
    #[test]
    fn any_tcp_frame_becomes_the_segments_that_its_sender_would_have_sent(build in any_build(), size in 1usize..2500) {
        check_tcp(&Build { tcp: true, ..build }, size);
    }

    #[test]
    fn any_run_of_udp_datagrams_becomes_those_datagrams(build in any_build(), size in 1usize..2500) {
        check_datagrams(&Build { tcp: false, ..build }, size);
    }

    #[test]
    fn any_udp_datagram_becomes_fragments_that_make_it_up_again(build in any_build(), size in 0usize..2500) {
        let build = Build { tcp: false, ..build };
        // The first fragment has room for all headers.
        let headers = build.transport_at() + 8 - build.ip_at() - 20;
        check_fragments(&build, (headers + 8) + size);
    }
}

#[test]
fn a_frame_of_64_kib_is_cut_to_the_last_byte() {
    let payload: Vec<u8> = (0..65_495u32).map(|i| (i ^ i >> 8) as u8).collect();
    let tagged = vec![0x88a8, 0x8100];
    check_tcp(&Build { payload: payload.clone(), tags: tagged.clone(), ..Build::default() }, 1448);
    check_tcp(&Build { payload: payload.clone(), tags: tagged, v6: true, ..Build::default() }, 1);
    check_datagrams(&Build { payload: payload.clone(), tcp: false, ..Build::default() }, 1472);
    check_fragments(&Build { payload: payload.clone(), tcp: false, ..Build::default() }, 1480);
    check_fragments(&Build { payload, v6: true, tcp: false, ..Build::default() }, 1448);
}

#[test]
fn cwr_is_said_once_and_fin_and_push_at_the_end() {
    let build = Build { flags: 0xd9, payload: vec![1; 3000], ..Build::default() };
    let offload = Offload::new(1, TCP4 | Offload::GSO_ECN, 0, 1000, 34, 16);
    let flags: Vec<u8> = cut(&build.frame(), &offload).unwrap().iter().map(|s| s[34 + 13]).collect();
    assert_eq!(flags, [0xd0, 0x50, 0x59]);
}

#[test]
fn the_urgent_pointer_keeps_pointing_at_the_same_byte() {
    let build = Build { flags: 0x30, payload: vec![1; 3000], ..Build::default() };
    let mut frame = build.frame();
    frame[34 + 18..34 + 20].copy_from_slice(&1500u16.to_be_bytes());
    let segments = cut(&frame, &build.offload(TCP4, 1000)).unwrap();
    let seen: Vec<_> = segments.iter().map(|s| (s[47], u16::from_be_bytes([s[52], s[53]]))).collect();
    assert_eq!(seen, [(0x30, 1500), (0x30, 500), (0x10, 0)]);
    for segment in &segments {
        Packet::verified(segment, 0).transport(0, 6);
    }
}

#[test]
fn options_that_are_not_copied_are_blank_in_later_fragments() {
    let options = vec![7, 7, 4, 1, 2, 3, 4, 1, 0x94, 4, 0, 0];
    let build = Build { tcp: false, options: options.clone(), ..Build::default() };
    let fragments = cut(&build.frame(), &build.offload(UFO, 1480)).unwrap();
    let seen: Vec<_> = fragments.iter().map(|f| Packet::verified(f, 0).ip[20..].to_vec()).collect();
    let blank = vec![1, 1, 1, 1, 1, 1, 1, 1, 0x94, 4, 0, 0];
    assert_eq!(seen, [options, blank.clone(), blank]);
}

#[test]
fn behind_a_routing_header_the_checksum_is_that_of_the_last_address() {
    // Type 2, one address, one segment left: the pseudo-header has that address (RFC 8200, 8.1), as its sender knew.
    let mut routing = vec![0, 2, 2, 1, 0, 0, 0, 0];
    let last = [0xfd, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 1, 2, 3, 4, 5];
    routing.extend(last);
    let build = Build { v6: true, extensions: vec![(43, routing)], ..Build::default() };
    let mut frame = build.frame();
    let at = build.transport_at();
    let mut as_received = frame.clone();
    as_received[38..54].copy_from_slice(&last);
    let pseudo = slow_sum(&pseudo_header(&as_received, 14, 6, frame.len() - at));
    frame[at + 16..at + 18].copy_from_slice(&pseudo.to_be_bytes());
    for mut segment in cut(&frame, &build.offload(TCP6, 1000)).unwrap() {
        segment[38..54].copy_from_slice(&last);
        Packet::verified(&segment, 0).transport(24, 6);
    }
}

#[test]
fn fragments_of_different_ipv6_datagrams_have_different_identifications() {
    let build = Build { v6: true, tcp: false, ..Build::default() };
    let id = || cut(&build.frame(), &build.offload(UFO, 1448)).unwrap()[0][14 + 40 + 4..14 + 40 + 8].to_vec();
    assert_ne!(id(), id());
}

#[test]
fn a_datagram_without_needs_csum_keeps_the_checksum_that_it_has() {
    let build = Build { tcp: false, ..Build::default() };
    let mut frame = build.frame();
    for checksum in [[0, 0], [0xab, 0xcd]] {
        frame[40..42].copy_from_slice(&checksum);
        let fragments = cut(&frame, &Offload::new(0, UFO, 0, 1480, 0, 0)).unwrap();
        assert_eq!(fragments[0][40..42], checksum);
        assert_eq!(fragments[1][40..42], frame[34 + 1480 + 6..34 + 1480 + 8]);
    }
}
