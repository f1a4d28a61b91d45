//! Descriptors and chains that lie.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use virtio::features;

use crate::guest::*;
use crate::world::World;

/// Attacks a port with a chain in its transmit ring; the port must stop for `reason`.
#[track_caller]
fn stops(world: &mut World, features: u64, reason: &str, attack: impl FnOnce(&mut Guest)) {
    let socket = world.socket("h0");
    let mut guest = Guest::up(&socket, features);
    attack(&mut guest);
    world.wait_for_stop("h0", reason);
}

#[test]
fn cve_2018_1059_buffers_that_leave_guest_memory_stop_the_port() {
    let mut world = World::new();
    for layout in LAYOUTS {
        for (addr, len) in [
            (SIZE - 100, 101),
            (SIZE - 1, 2),
            (SIZE, 64),
            (u64::MAX - 63, 64),
            (u64::MAX, 64),
            (BUFFERS, u32::MAX),
            (1 << 63, 64),
        ] {
            stops(&mut world, layout, "outside guest memory", |g| g.offer(1, &[Desc::read(addr, len)]));
        }
        // The header is inside, the frame is not.
        stops(&mut world, layout, "outside guest memory", |g| {
            g.offer(1, &[Desc::read(BUFFERS, 12), Desc::read(SIZE - 32, 64)]);
        });
        // The table is not, or what it says.
        stops(&mut world, layout, "outside guest memory", |g| g.offer(1, &[Desc::indirect(SIZE - 16, 32)]));
        stops(&mut world, layout, "outside guest memory", |g| {
            let table = g.place(&Desc::read(SIZE - 32, 64).split(0));
            g.offer(1, &[Desc::indirect(table, 16)]);
        });
        // A receive buffer, found out when a frame comes for it.
        let mut sender = Guest::up(&world.socket("h1"), FEATURES);
        stops(&mut world, layout, "outside guest memory", |g| {
            g.offer(0, &[Desc::write(SIZE - 100, 2048)]);
            sender.send(&frame(200));
        });
    }
    world.unharmed();
}

#[test]
fn cve_2018_1059_a_buffer_across_two_regions_is_not_one_piece() {
    let mut world = World::new();
    let mut guest = Guest::connect(&world.socket("h0"), FEATURES);
    // Neighbours in guest memory, strangers in the file.
    guest.lend(&[(0, SIZE / 2, 0), (SIZE / 2, SIZE / 2, SIZE / 2)]);
    guest.start(0, 256);
    guest.start(1, 256);
    guest.offer(1, &[Desc::read(SIZE / 2 - 50, 100)]);
    world.wait_for_stop("h0", "outside guest memory");
    drop(guest);
    world.unharmed();
}

#[test]
fn cve_2020_10725_an_empty_descriptor_at_a_bad_address_is_nothing_to_read() {
    let world = World::new();
    for layout in LAYOUTS {
        let mut guest = Guest::up(&world.socket("h0"), layout);
        for bad in [0, SIZE, 1 << 63, u64::MAX] {
            guest.offer(1, &[Desc::read(bad, 0)]);
        }
        // Taken as an empty chain or refused with a reason: both are fine, reading is not.
        let start = Instant::now();
        loop {
            if world.drops("h0", "bad_chain") >= 4 || world.ask("ports").to_string().contains("outside guest")
            {
                break;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "{}", world.ask("stats"));
        }
    }
    world.unharmed();
}

#[test]
fn cve_2020_14374_to_14378_descriptors_rewritten_while_they_are_read() {
    let world = World::new();
    for layout in LAYOUTS {
        let mut guest = Guest::up(&world.socket("h0"), layout);
        let addr = guest.place(&[0; 2048]);
        let stop = Arc::new(AtomicBool::new(false));
        let (memory, ended) = (guest.memory.clone(), stop.clone());
        let scribbler = std::thread::spawn(move || {
            let table = RING;
            let mut n = 1_u32;
            while !ended.load(Ordering::Relaxed) {
                for slot in 0..256 {
                    n = n.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    // The length, and the upper half of the address, now good, now bad.
                    memory.set32(table + slot * 16 + 8, [64, 0, u32::MAX, 1 << 20][n as usize >> 30]);
                    memory.set32(table + slot * 16 + 4, if n & 1 << 20 == 0 { 0 } else { 1 });
                }
            }
        });
        let end = Instant::now() + Duration::from_millis(400);
        while Instant::now() < end {
            for _ in 0..32 {
                guest.offer(1, &[Desc::read(addr, 64)]);
            }
            std::thread::sleep(Duration::from_micros(300));
        }
        stop.store(true, Ordering::Relaxed);
        scribbler.join().unwrap();
    }
    world.unharmed();
}

#[test]
fn cve_2022_2132_a_header_over_any_number_of_descriptors_is_read_whole() {
    let world = World::new();
    let mut receiver = Guest::up(&world.socket("h1"), FEATURES);
    for layout in LAYOUTS {
        let mut guest = Guest::up(&world.socket("h0"), layout);
        for cuts in [vec![12], vec![6, 6], vec![10, 1, 1], vec![1; 12], vec![1; 30], vec![12, 1, 1, 60]] {
            let mut sent = frame(200);
            sent[14] = cuts.len() as u8;
            let bytes = [&[0; HEADER][..], &sent].concat();
            let at = guest.place(&bytes);
            let mut chain: Vec<Desc> = Vec::new();
            let mut done = 0;
            for cut in cuts {
                chain.push(Desc::read(at + done, cut));
                done += u64::from(cut);
            }
            chain.push(Desc::read(at + done, bytes.len() as u32 - done as u32));
            let posted = receiver.post(1, 2048)[0];
            let before = receiver.used(0);
            guest.offer(1, &chain);
            receiver.wait_used(0, before + 1);
            assert_eq!(receiver.memory.read(posted + HEADER as u64, 200), sent);
            assert_eq!(receiver.memory.read(posted + 212, 16), [0xee; 16], "never a byte beyond the frame");
        }
    }
    drop(receiver);
    world.unharmed();
}

#[test]
fn cve_2022_2132_chains_no_longer_than_the_header_are_dropped() {
    let mut world = World::new();
    for layout in LAYOUTS {
        let mut guest = Guest::up(&world.socket("h0"), layout);
        let (runts, bad) = (world.drops("h0", "runt"), world.drops("h0", "bad_chain"));
        let at = guest.place(&[0; 64]);
        for len in [1, 11] {
            guest.offer(1, &[Desc::read(at, len)]);
            guest.offer(1, &[Desc::read(at, 1), Desc::read(at, len - 1)]);
        }
        for len in [12, 13, 12 + 13] {
            guest.offer(1, &[Desc::read(at, len)]);
        }
        world.wait_for_drops("h0", "bad_chain", bad + 4);
        world.wait_for_drops("h0", "runt", runts + 3);
    }
    world.unharmed();
}

#[test]
fn cve_2026_93683_an_indirect_table_whose_length_changes() {
    let world = World::new();
    for layout in LAYOUTS {
        let mut guest = Guest::up(&world.socket("h0"), layout);
        let buffer = guest.place(&[0; 256]);
        // 200 good descriptors in a row, then what must not be read: addresses outside guest memory.
        let entry = |i: u16| Desc::read(buffer, 1).next().split(i + 1);
        let table: Vec<u8> = (0..200).flat_map(entry).chain([0xff; 4096]).collect();
        let table = guest.place(&table);
        let stop = Arc::new(AtomicBool::new(false));
        let (memory, ended) = (guest.memory.clone(), stop.clone());
        let scribbler = std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                for slot in 0..256 {
                    for len in [16, 16 * 1000, 17, 0, 16 * 200] {
                        memory.set32(RING + slot * 16 + 8, len);
                    }
                }
            }
        });
        let end = Instant::now() + Duration::from_millis(300);
        while Instant::now() < end {
            guest.offer(1, &[Desc::indirect(table, 16 * 200)]);
            std::thread::sleep(Duration::from_micros(100));
        }
        stop.store(true, Ordering::Relaxed);
        scribbler.join().unwrap();
    }
    world.unharmed();
}

#[test]
fn dpdk_6ec1778134_chains_that_loop_stop_the_port() {
    let mut world = World::new();
    for at in [0_u64, 5] {
        stops(&mut world, FEATURES, "does not end", |guest| {
            // Descriptor `at` is its own next; or 0 and 1 are each other's.
            let to = if at == 0 { 1 } else { at as u16 };
            guest.memory.write(RING + at * 16, &Desc::read(BUFFERS, 1).next().split(to));
            guest.memory.write(RING + 16, &Desc::read(BUFFERS, 1).next().split(0));
            guest.avail(1, at as u16);
        });
    }
    // In a table of its own, too.
    stops(&mut world, FEATURES, "does not end", |guest| {
        let table = guest.place(&Desc::read(BUFFERS, 1).next().split(0));
        guest.offer(1, &[Desc::indirect(table, 16)]);
    });
    // A packed chain ends with the ring at the latest: all of its descriptors say that there is one more.
    stops(&mut world, FEATURES | features::RING_PACKED, "does not end", |guest| {
        let all: Vec<Desc> = (0..256).map(|_| Desc::read(BUFFERS, 1).next()).collect();
        guest.offer(1, &all);
    });
    world.unharmed();
}

#[test]
fn heads_and_nexts_beyond_the_table_stop_the_port() {
    let mut world = World::new();
    for head in [256, 257, 0x7fff, 0xffff] {
        stops(&mut world, FEATURES, "outside a table of 256", |guest| guest.avail(1, head));
        stops(&mut world, FEATURES, "outside a table of 256", |guest| {
            guest.memory.write(RING, &Desc::read(BUFFERS, 1).next().split(head));
            guest.avail(1, 0);
        });
        stops(&mut world, FEATURES, "outside a table of 1", |guest| {
            let table = guest.place(&Desc::read(BUFFERS, 1).next().split(head));
            guest.offer(1, &[Desc::indirect(table, 16)]);
        });
    }
    world.unharmed();
}

#[test]
fn malformed_indirect_tables_stop_the_port() {
    let mut world = World::new();
    for layout in LAYOUTS {
        for len in [0, 1, 15, 17, 16 * 100 + 8] {
            stops(&mut world, layout, "indirect table", |guest| {
                guest.offer(1, &[Desc::indirect(BUFFERS, len)])
            });
        }
        stops(&mut world, layout, "", |guest| guest.offer(1, &[Desc::indirect(BUFFERS, u32::MAX - 15)]));
        // A table with a next.
        stops(&mut world, layout, "indirect table", |guest| {
            let table = guest.place(&Desc::read(BUFFERS, 64).split(0));
            guest.offer(1, &[Desc::indirect(table, 16), Desc::read(BUFFERS, 64)]);
        });
    }
    // A table in a table; in packed ones that flag means nothing (virtio 1.3, 2.8.8).
    stops(&mut world, FEATURES, "indirect table", |guest| {
        let inner = guest.place(&Desc::read(BUFFERS, 64).split(0));
        let outer = guest.place(&Desc::indirect(inner, 16).split(0));
        guest.offer(1, &[Desc::indirect(outer, 16)]);
    });
    world.unharmed();
}

#[test]
fn chains_of_more_than_256_descriptors_are_dropped() {
    let mut world = World::new();
    for layout in LAYOUTS {
        let mut guest = Guest::connect(&world.socket("h0"), layout);
        guest.start(0, 256);
        guest.start(1, 1024);
        let before = world.drops("h0", "bad_chain");
        let buffer = guest.place(&[0; 64]);
        let chain = |n| vec![Desc::read(buffer, 16); n];
        guest.offer(1, &chain(257));
        guest.offer(1, &chain(700));
        world.wait_for_drops("h0", "bad_chain", before + 2);
        let table: Vec<u8> = (1..=1_000).flat_map(|i| Desc::read(buffer, 1).next().split(i)).collect();
        let last = Desc::read(buffer, 1).split(0);
        let table = guest.place(&[table, last.to_vec()].concat());
        guest.offer(1, &[Desc::indirect(table, 16 * 1_001)]);
        world.wait_for_drops("h0", "bad_chain", before + 3);
    }
    world.unharmed();
}

#[test]
fn descriptors_of_the_wrong_direction_are_dropped() {
    let mut world = World::new();
    for layout in LAYOUTS {
        let mut guest = Guest::up(&world.socket("h0"), layout);
        let before = world.drops("h0", "bad_chain");
        guest.offer(1, &[Desc::write(BUFFERS, 64)]);
        guest.offer(1, &[Desc::read(BUFFERS, 12), Desc::write(BUFFERS, 64)]);
        world.wait_for_drops("h0", "bad_chain", before + 2);
    }
    world.unharmed();
}
