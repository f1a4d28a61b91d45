//! Frames as Scapy 2.5 writes them, an implementation that shares nothing with ours: `IP`/`IPv6`, `TCP`/`UDP`, `fragment`.

use super::*;

fn small(tags: Vec<u16>, v6: bool, tcp: bool) -> Build {
    Build { tags, v6, tcp, payload: b"abcdefghijk".to_vec(), ..Build::default() }
}

fn as_hex(frames: &[Vec<u8>]) -> Vec<String> {
    frames.iter().map(|f| f.iter().map(|b| format!("{b:02x}")).collect()).collect()
}

#[test]
fn a_tagged_tcp_frame_over_ipv4_is_cut_as_scapy_writes_it() {
    let build = small(vec![0x8100], false, true);
    let expected = [
        "5254000000015254000000028100206408004503002cfffe4000400626ff0a0000010ac8ff0230390050ffffff000102030450107fff23af000061626364",
        "5254000000015254000000028100206408004503002cffff4000400626fe0a0000010ac8ff0230390050ffffff040102030450107fff1ba3000065666768",
        "5254000000015254000000028100206408004503002b00004000400626ff0a0000010ac8ff0230390050ffffff080102030450187fff13fc0000696a6b",
    ];
    assert_eq!(as_hex(&cut(&build.frame(), &build.offload(TCP4, 4)).unwrap()), expected);
}

#[test]
fn a_tagged_tcp_frame_over_ipv6_is_cut_as_scapy_writes_it() {
    let build = small(vec![0x8100], true, true);
    let expected = [
        "5254000000015254000000028100206486dd6abcdef000180640fd000000000000000000000000000001fd00000000000000000000000000beef30390050ffffff000102030450107fff7e88000061626364",
        "5254000000015254000000028100206486dd6abcdef000180640fd000000000000000000000000000001fd00000000000000000000000000beef30390050ffffff040102030450107fff767c000065666768",
        "5254000000015254000000028100206486dd6abcdef000170640fd000000000000000000000000000001fd00000000000000000000000000beef30390050ffffff080102030450187fff6ed50000696a6b",
    ];
    assert_eq!(as_hex(&cut(&build.frame(), &build.offload(TCP6, 4)).unwrap()), expected);
}

#[test]
fn a_run_of_udp_datagrams_is_cut_as_scapy_writes_it() {
    let build = small(vec![], true, false);
    let expected = [
        "52540000000152540000000286dd6abcdef0000c1140fd000000000000000000000000000001fd00000000000000000000000000beef30390050000c519461626364",
        "52540000000152540000000286dd6abcdef0000c1140fd000000000000000000000000000001fd00000000000000000000000000beef30390050000c498c65666768",
        "52540000000152540000000286dd6abcdef0000b1140fd000000000000000000000000000001fd00000000000000000000000000beef30390050000b41f2696a6b",
    ];
    assert_eq!(as_hex(&cut(&build.frame(), &build.offload(USO, 4)).unwrap()), expected);
}

#[test]
fn a_udp_datagram_is_fragmented_as_scapy_does_it() {
    let build = small(vec![], false, false);
    let expected = [
        "52540000000152540000000208004503001cfffe2000401147040a0000010ac8ff023039005000135573",
        "52540000000152540000000208004503001cfffe2001401147030a0000010ac8ff026162636465666768",
        "525400000001525400000002080045030017fffe0002401167070a0000010ac8ff02696a6b",
    ];
    assert_eq!(as_hex(&cut(&build.frame(), &build.offload(UFO, 8)).unwrap()), expected);
}

#[test]
fn checksums_are_filled_in_as_scapy_writes_them() {
    for (v6, expected) in [
        (
            false,
            "52540000000152540000000281002064080045030033fffe4000400626f80a0000010ac8ff0230390050ffffff000102030450187fff826600006162636465666768696a6b",
        ),
        (
            true,
            "5254000000015254000000028100206486dd6abcdef0001f0640fd000000000000000000000000000001fd00000000000000000000000000beef30390050ffffff000102030450187fffdd3f00006162636465666768696a6b",
        ),
    ] {
        let build = small(vec![0x8100], v6, true);
        let mut frame = build.frame();
        finish_checksum(&mut frame, &build.offload(0, 0)).unwrap();
        assert_eq!(as_hex(&[frame]), [expected]);
    }
}
