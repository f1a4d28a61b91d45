//! Frames and virtio-net headers that lie.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use virtio::features;

use crate::guest::*;
use crate::world::World;

/// A virtio-net header: flags, segmentation type, its three lengths and offsets.
pub(crate) fn header(
    flags: u8,
    gso: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
) -> [u8; 12] {
    let mut header = [0; 12];
    (header[0], header[1]) = (flags, gso);
    for (at, value) in [(2, hdr_len), (4, gso_size), (6, csum_start), (8, csum_offset)] {
        header[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    header
}

pub(crate) const NEEDS_CSUM: u8 = 1;
pub(crate) const TCPV4: u8 = 1;

fn offer(guest: &mut Guest, header: [u8; 12], frame: &[u8]) {
    let bytes = [&header[..], frame].concat();
    let addr = guest.place(&bytes);
    let before = guest.used(1);
    guest.offer(1, &[Desc::read(addr, bytes.len() as u32)]);
    guest.wait_used(1, before + 1);
}

/// An IPv4 TCP frame with `payload` bytes of data.
pub(crate) fn tcp(payload: usize) -> Vec<u8> {
    let mut f = frame(14 + 20 + 20 + payload);
    f[12..14].copy_from_slice(&[8, 0]);
    let total = (40 + payload).min(0xffff) as u16;
    f[14..34].copy_from_slice(&[0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    f[16..18].copy_from_slice(&total.to_be_bytes());
    f[34..54].copy_from_slice(&[0, 1, 0, 2, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    f
}

#[test]
fn cve_2024_11614_checksum_fields_beyond_the_frame_are_refused() {
    let mut world = World::new();
    for layout in LAYOUTS {
        let mut guest = Guest::up(&world.socket("h0"), layout);
        let mut receiver = Guest::up(&world.socket("h1"), FEATURES);
        receiver.post(64, 2048);
        let before = world.drops("h0", "bad_offload");
        let cases = [
            (100, 0),
            (98, 2),
            (99, 0),
            (98, 1),
            (0xffff, 0),
            (0, 0xffff),
            (0xffff, 0xffff),
            (0x8000, 0x8000),
        ];
        for (start, offset) in cases {
            offer(&mut guest, header(NEEDS_CSUM, 0, 0, 0, start, offset), &frame(100));
        }
        world.wait_for_drops("h0", "bad_offload", before + cases.len() as u64);
        assert_eq!(receiver.used(0), 0, "none of these is a frame");
        // The last place that is inside.
        offer(&mut guest, header(NEEDS_CSUM, 0, 0, 0, 96, 2), &frame(100));
        receiver.wait_used(0, 1);
    }
    world.unharmed();
}

#[test]
fn dpdk_285e6b8b18_segmentation_requests_that_make_no_sense_are_refused() {
    let mut world = World::new();
    let mut guest = Guest::up(&world.socket("h0"), FEATURES);
    let mut receiver = Guest::up(&world.socket("h1"), FEATURES);
    receiver.post(128, 2048);
    let f = tcp(400);
    // No size; types that do not exist; without the checksum that every one of them needs.
    for (gso, size) in [(TCPV4, 0), (2, 100), (6, 100), (0x7f, 100), (0xff, 100)] {
        offer(&mut guest, header(NEEDS_CSUM, gso, 54, size, 34, 16), &f);
    }
    offer(&mut guest, header(0, TCPV4, 54, 100, 34, 16), &f);
    for header_len in [0, 1, 13, 0xffff] {
        offer(&mut guest, header(NEEDS_CSUM, TCPV4, header_len, 100, 34, 16), &f);
    }
    world.wait_for_drops("h0", "bad_offload", 4);
    drop((guest, receiver));
    world.unharmed();
}

#[test]
fn dpdk_7cc4f260bf_headers_rewritten_while_they_are_read() {
    let world = World::new();
    for layout in LAYOUTS {
        let mut guest = Guest::up(&world.socket("h0"), layout);
        let mut receiver = Guest::up(&world.socket("h1"), FEATURES);
        let posted = receiver.post(200, 2048);
        let bytes = [&header(NEEDS_CSUM, 0, 0, 0, 34, 16)[..], &tcp(100)].concat();
        let addr = guest.place(&bytes);
        let stop = Arc::new(AtomicBool::new(false));
        let (memory, ended) = (guest.memory.clone(), stop.clone());
        let scribbler = std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                for start in [34, 0xffff, 200, 0, 0x8000] {
                    memory.set16(addr + 6, start);
                    memory.set16(addr + 4, start);
                    // The destination, which was judged already.
                    memory.set16(addr + 12, start);
                }
            }
        });
        for sent in 1..150 {
            guest.offer(1, &[Desc::read(addr, bytes.len() as u32)]);
            guest.wait_used(1, sent);
        }
        stop.store(true, Ordering::Relaxed);
        scribbler.join().unwrap();
        for addr in posted {
            let behind = receiver.memory.read(addr + bytes.len() as u64, 64);
            assert_eq!(behind, [0xee; 64], "never a byte beyond the frame");
        }
    }
    world.unharmed();
}

#[test]
fn segments_of_one_byte_out_of_64_kib_stay_within_a_budget() {
    let world = World::new();
    for layout in LAYOUTS {
        let mut guest = Guest::up(&world.socket("h0"), layout);
        // A receiver that wants everything cut.
        let mut receiver = Guest::up(&world.socket("h1"), features::VERSION_1);
        receiver.post(250, 2048);
        let bytes = [&header(NEEDS_CSUM, TCPV4, 54, 1, 34, 16)[..], &tcp(65_000)].concat();
        let addr = guest.place(&bytes);
        for sent in 1..=100 {
            guest.offer(1, &[Desc::read(addr, bytes.len() as u32)]);
            guest.wait_used(1, sent);
        }
        assert!(
            world.drops("h0", "segment_budget") + world.drops("h1", "segment_budget") > 0,
            "{}",
            world.ask("stats")
        );
    }
    world.unharmed();
}

#[test]
fn floods_of_64_kib_frames_leave_the_others_their_share() {
    let world = World::new();
    for layout in LAYOUTS {
        let mut guest = Guest::up(&world.socket("h0"), layout);
        let mut receiver = Guest::up(&world.socket("h1"), features::VERSION_1 | features::NET_MRG_RXBUF);
        receiver.post(250, 2048);
        let bytes = [&header(NEEDS_CSUM, TCPV4, 54, 1_400, 34, 16)[..], &tcp(65_000)].concat();
        let addr = guest.place(&bytes);
        let end = Instant::now() + Duration::from_millis(500);
        let mut sent = 0;
        while Instant::now() < end && sent < 250 {
            guest.offer(1, &[Desc::read(addr, bytes.len() as u32)]);
            sent += 1;
        }
        guest.wait_used(1, sent);
    }
    world.unharmed();
}

#[test]
fn a_flood_of_source_addresses_uses_up_its_own_share_of_the_table() {
    let world = World::new();
    let mut guest = Guest::connect(&world.socket("h0"), FEATURES);
    guest.start(0, 256);
    guest.start(1, 1024);
    let mut f = frame(64);
    for i in 0..1_000_u16 {
        f[10..12].copy_from_slice(&i.to_be_bytes());
        let desc = guest.place_frame(&f);
        guest.offer(1, &[desc]);
    }
    guest.wait_used(1, 1_000);
    let fdb = world.ask("fdb");
    let of = |port: &str| fdb["entries"].as_array().unwrap().iter().filter(|e| e["port"] == port).count();
    assert_eq!((of("h0"), of("g0")), (64, 1), "its limit is 64, and the pair is still known");
    // One of the thousand is the address that every guest here has, which was known.
    let stats = world.ask("stats");
    let port = stats["ports"].as_array().unwrap().iter().find(|p| p["name"] == "h0").unwrap();
    let counted = serde_json::json!({"learnt": 64, "moved": 0, "limit_reached": 936, "table_full": 0});
    assert_eq!(port["rx"][0]["addresses"], counted);
    drop(guest);
    world.unharmed();
}

/// Frames whose headers are cut off, and whose lengths are nothing, one and everything.
fn malformed() -> Vec<Vec<u8>> {
    let addresses = frame(12);
    let ipv4 = tcp(20)[14..].to_vec();
    let mut ipv6 = vec![0x60, 0, 0, 0, 0, 40, 58, 64];
    ipv6.extend([0xfe; 32]);
    // Neighbour solicitation with a link-layer address option.
    ipv6.extend([135, 0, 0, 0, 0, 0, 0, 0]);
    ipv6.extend([0xfe; 16]);
    ipv6.extend([1, 1, 2, 0, 0, 0, 0, 9]);
    let mut templates = Vec::new();
    for (kind, packet) in
        [([8, 0], &ipv4), ([0x86, 0xdd], &ipv6), ([8, 6], &vec![0; 28]), ([0, 46], &vec![0xaa; 46])]
    {
        for tags in 0..4 {
            let tag = [[0x81, 0, 0, 66], [0x88, 0xa8, 0, 66], [0x81, 0, 0xff, 0xff]];
            let tags: Vec<u8> = tag.iter().take(tags).flatten().copied().collect();
            templates.push([&addresses[..12], &tags, &kind, packet].concat());
        }
    }
    let mut all = Vec::new();
    for template in templates {
        all.extend((14..template.len()).map(|cut| template[..cut].to_vec()));
        // Every byte that could be a length, a version, a protocol or a type.
        for at in 12..template.len().min(60) {
            for value in [0, 1, 0xff] {
                let mut frame = template.clone();
                frame[at] = value;
                all.push(frame);
            }
        }
    }
    all
}

/// Sends all of these, with this request on top, to a receiver that wants them whole and with checksums, and spreads flows over
/// two queues: every parser sees them. Says how many frames it got.
fn sent_and_accounted_for(header: [u8; 12]) -> u64 {
    let mut world = World::new();
    let mut arrived = 0;
    for part in malformed().chunks(60) {
        let mut receiver = Guest::connect(&world.socket("h1"), features::VERSION_1);
        for q in 0..4 {
            receiver.start(q, 256);
        }
        // Room for each of them in several segments, in either queue.
        for q in [0, 2] {
            for _ in 0..240 {
                let buffer = receiver.place(&[0; 256]);
                receiver.offer(q, &[Desc::write(buffer, 256)]);
            }
        }
        let mut guest = Guest::up(&world.socket("h0"), FEATURES | features::NET_HOST_TSO6);
        for frame in part {
            let frame = guest.place_bytes(&[&header[..], frame].concat());
            guest.offer(1, &[frame]);
        }
        guest.wait_used(1, part.len() as u16);
        arrived += u64::from(receiver.used(0)) + u64::from(receiver.used(2));
        drop((guest, receiver));
        world.wait_for_state("h1", "listening");
    }
    world.warmed_up();
    world.unharmed();
    arrived
}

#[test]
fn cve_2016_10377_2020_35498_2023_1668_2023_5366_malformed_packets_are_accounted_for() {
    assert!(sent_and_accounted_for([0; 12]) > 500, "a switch of frames forwards what it need not understand");
}

#[test]
fn malformed_packets_that_want_their_checksum_or_segments_done_are_accounted_for() {
    for (what, header) in [
        ("a checksum", header(NEEDS_CSUM, 0, 0, 0, 34, 16)),
        ("TCP segments", header(NEEDS_CSUM, TCPV4, 54, 8, 34, 16)),
        ("TCP segments over IPv6", header(NEEDS_CSUM, 4, 74, 8, 54, 16)),
    ] {
        println!("{what}: {} arrived", sent_and_accounted_for(header));
    }
}
