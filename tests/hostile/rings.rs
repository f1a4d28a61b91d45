//! Rings whose indices, areas and buffers lie.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vhost::vhost_user::message::FrontendReq as M;
use virtio::features;

use crate::guest::*;
use crate::raw::*;
use crate::world::World;

#[test]
fn an_avail_index_more_than_the_ring_size_ahead_stops_the_port() {
    let mut world = World::new();
    for index in [257, 0x8000, 0xffff] {
        let mut guest = Guest::up(&world.socket("h0"), FEATURES);
        guest.set_avail_index(1, index);
        world.wait_for_stop("h0", "avail index");
    }
    world.unharmed();
}

#[test]
fn rings_whose_areas_overlap_do_not_start() {
    let mut world = World::new();
    for layout in LAYOUTS {
        let mut guest = Guest::connect(&world.socket("h0"), layout);
        guest.set_up(1, 256);
        let at = USER + RING;
        // Each area at, or just before the end of, another.
        for (descriptors, device, driver) in [
            (at, at, at + AVAIL),
            (at, at + USED, at),
            (at, at + AVAIL, at + AVAIL),
            (at, at + 4092, at + AVAIL),
        ] {
            let payload = [words(&[1, 0]), wide(&[descriptors, device, driver, 0])].concat();
            guest.raw.must(M::SET_VRING_ADDR, &payload, &[]);
            assert_eq!(guest.raw.ask(M::SET_VRING_KICK, &wide(&[1 | 0x100]), &[]), Some(1));
            world.wait_for_reason("h0", "overlap");
            guest.raw.send(M::GET_VRING_BASE, 1, &words(&[1, 0]), &[]);
            guest.raw.answer(M::GET_VRING_BASE).unwrap();
        }
    }
    world.unharmed();
}

#[test]
fn a_refusal_is_told_until_the_rings_run_and_a_later_one_again() {
    let mut world = World::new();
    let mut guest = Guest::connect(&world.socket("h0"), FEATURES);
    guest.start(0, 256);
    guest.set_up(1, 256);
    let kick = |guest: &mut Guest| guest.raw.ask(M::SET_VRING_KICK, &wide(&[1 | 0x100]), &[]);
    let overlapping = [words(&[1, 0]), wide(&[USER, USER, USER, 0])].concat();
    guest.raw.must(M::SET_VRING_ADDR, &overlapping, &[]);
    assert_eq!(kick(&mut guest), Some(1));
    world.wait_for_stop("h0", "overlap");

    guest.raw.send(M::GET_VRING_BASE, 1, &words(&[1, 0]), &[]);
    guest.raw.answer(M::GET_VRING_BASE).unwrap();
    guest.raw.must(M::SET_VRING_ADDR, &Guest::addresses(1), &[]);
    assert_eq!(kick(&mut guest), Some(0));
    guest.raw.must(M::SET_VRING_ENABLE, &words(&[1, 1]), &[]);
    world.wait_for_state("h0", "up");
    assert!(world.port("h0")["reason"].is_null(), "{}", world.port("h0"));

    assert_eq!(guest.raw.ask(M::SET_VRING_NUM, &words(&[256, 256]), &[]), Some(1));
    world.wait_for_reason("h0", "does not exist");
    assert_eq!(world.port("h0")["state"], "up");
    drop(guest);
    world.unharmed();
}

#[test]
fn rings_that_overlap_buffers_and_each_other_harm_only_themselves() {
    let world = World::new();
    for layout in LAYOUTS {
        let mut guest = Guest::up(&world.socket("h0"), layout);
        let mut sender = Guest::up(&world.socket("h1"), FEATURES);
        // Receive buffers on top of the rings' own descriptors, avail and used rings.
        for addr in [0, AVAIL, USED, RING, RING + AVAIL, RING + USED] {
            guest.offer(0, &[Desc::write(addr, 2048)]);
        }
        for _ in 0..64 {
            sender.place_frame(&frame(1_000));
            let frame = sender.place_frame(&frame(1_000));
            sender.offer(1, &[frame]);
        }
        sender.wait_used(1, 64);
        // And frames to send out of them.
        for addr in [0, AVAIL, USED, RING, RING + AVAIL, RING + USED] {
            guest.offer(1, &[Desc::read(addr, 2048)]);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    world.unharmed();
}

#[test]
fn cve_2026_86566_runt_receive_buffers_are_never_written_beyond() {
    let world = World::new();
    for layout in LAYOUTS {
        for mergeable in [0, features::NET_MRG_RXBUF] {
            for len in [0, 1, 11, 12, 13, 40] {
                let mut guest = Guest::up(&world.socket("h0"), layout | mergeable);
                let mut sender = Guest::up(&world.socket("h1"), FEATURES);
                let posted = guest.post(100, len);
                for _ in 0..20 {
                    sender.send(&frame(300));
                }
                for addr in posted {
                    let behind = guest.memory.read(addr + u64::from(len), 16);
                    assert!(behind.iter().all(|b| *b == 0 || *b == 0xee), "{len}: {behind:x?}");
                    assert!(!behind.contains(&0x5a), "a frame's bytes lie behind a buffer of {len}");
                }
            }
        }
    }
    world.unharmed();
}

#[test]
fn cve_2026_86563_a_dirty_log_at_an_offset_has_its_bits_where_they_belong() {
    let world = World::new();
    for layout in LAYOUTS {
        let mut guest = Guest::up(&world.socket("h0"), layout);
        let mut sender = Guest::up(&world.socket("h1"), FEATURES);
        let log = memfd(0x4000);
        let bytes = SIZE / 4096 / 8;
        guest.raw.send(M::SET_LOG_BASE, 1, &wide(&[bytes, 0x1004]), &[log.as_fd()]);
        guest.raw.answer(M::SET_LOG_BASE).unwrap();
        let own = features::VHOST_USER_PROTOCOL_FEATURES | features::VHOST_LOG_ALL;
        guest.raw.must(M::SET_FEATURES, &wide(&[layout | own]), &[]);
        let mut addresses = Guest::addresses(0);
        addresses[4] = 1; // VHOST_VRING_F_LOG
        addresses[32..40].copy_from_slice(&(0x30_0000_u64).to_ne_bytes());
        guest.raw.must(M::SET_VRING_ADDR, &addresses, &[]);

        let posted = guest.post(1, 2048)[0];
        sender.send(&frame(300));
        guest.wait_used(0, 1);
        let mut bits = vec![0; 0x4000];
        nix::sys::uio::pread(&log, &mut bits, 0).unwrap();
        let dirty: Vec<u64> = (0..0x4000_u64 * 8)
            .filter(|bit| bits[(bit / 8) as usize] & 1 << (bit % 8) != 0)
            .map(|bit| bit.wrapping_sub(0x1004 * 8))
            .collect();
        assert!(dirty.contains(&(posted / 4096)), "the buffer's page is not in {dirty:x?}");
        // A split ring's used entries are logged where the front end says; a packed one's are in its descriptors, at address 0.
        let used = if layout & features::RING_PACKED != 0 { 0..1 } else { 0x300..0x304 };
        assert!(dirty.iter().any(|page| used.contains(page)), "no page of the used ring in {dirty:x?}");
        assert!(dirty.len() <= 4, "{dirty:x?}");
    }
    world.unharmed();
}

#[test]
fn cve_2026_86567_memory_replaced_and_regions_removed_while_frames_fly() {
    let mut world = World::new();
    for layout in LAYOUTS {
        let mut guest = Guest::up(&world.socket("h0"), layout);
        let mut sender = Guest::up(&world.socket("h1"), FEATURES);
        let round = |guest: &mut Guest, sender: &mut Guest, i: u64| {
            // The same file elsewhere in the switch, and a region more or less.
            guest.lend(&[(0, SIZE, 0)]);
            let region = wide(&[0, SIZE + (i << 24), 1 << 20, USER + (1 << 40), 0]);
            let file = guest.memory.clone();
            guest.raw.must(M::ADD_MEM_REG, &region, &[file.file.as_fd()]);
            guest.raw.must(M::REM_MEM_REG, &region, &[]);
            if i < 100 {
                guest.post(1, 2048);
                sender.send(&frame(100));
            }
        };
        for i in 0..20 {
            round(&mut guest, &mut sender, i);
        }
        if layout == FEATURES {
            world.warmed_up();
        }
        for i in 20..500 {
            round(&mut guest, &mut sender, i);
        }
        assert!(guest.used(0) > 50, "frames arrived meanwhile: {}", guest.used(0));
        drop((guest, sender));
    }
    world.unharmed();
}

#[test]
fn dpdk_1846fe767f_the_257th_queue_does_not_exist_and_the_256th_does() {
    let mut world = World::new();
    let mut raw = connected(&world.socket("h0"));
    raw.negotiate(FEATURES);
    assert_eq!(raw.get(M::GET_QUEUE_NUM), 128);
    raw.must(M::SET_VRING_NUM, &words(&[255, 256]), &[]);
    raw.must(M::SET_VRING_CALL, &wide(&[255]), &[event().as_fd()]);
    for index in [256, 257, 0xffff, 0x1_00ff, u32::MAX] {
        assert_eq!(raw.ask(M::SET_VRING_NUM, &words(&[index, 256]), &[]), Some(1));
        assert_eq!(raw.ask(M::SET_VRING_ENABLE, &words(&[index, 1]), &[]), Some(1));
    }
    world.wait_for_reason("h0", "does not exist, this port has 256");
    drop(raw);
    world.unharmed();
}

#[test]
fn dpdk_7023f3e532_rings_after_a_reboot_are_where_the_new_driver_says() {
    let mut world = World::new();
    for layout in LAYOUTS {
        let mut guest = Guest::up(&world.socket("h0"), layout);
        guest.send(&frame(100));
        for q in [0, 1] {
            guest.raw.send(M::GET_VRING_BASE, 1, &words(&[q, 0]), &[]);
            guest.raw.answer(M::GET_VRING_BASE).unwrap();
        }
        // The old rings hold garbage now; the new ones are rings 2 and 3's places.
        guest.memory.write(0, &vec![0xff; 2 * RING as usize]);
        guest.raw.must(M::SET_FEATURES, &wide(&[layout | features::VHOST_USER_PROTOCOL_FEATURES]), &[]);
        guest.lend(&[(0, SIZE / 2, 0), (1 << 32, SIZE / 2, SIZE / 2)]);
        let place = |q: u32| [words(&[q]), Guest::addresses(q + 2)[4..].to_vec()].concat();
        for q in [0, 1] {
            guest.raw.must(M::SET_VRING_NUM, &words(&[q, 256]), &[]);
            let base = if layout & features::RING_PACKED != 0 { 0x8000_8000 } else { 0 };
            guest.raw.must(M::SET_VRING_BASE, &words(&[q, base]), &[]);
            guest.raw.must(M::SET_VRING_ADDR, &place(q), &[]);
            guest.raw.must(M::SET_VRING_KICK, &wide(&[u64::from(q) | 0x100]), &[]);
        }
        world.wait_for_state("h0", "up");
    }
    world.unharmed();
}

#[test]
fn rust_vmm_vhost_343_a_kick_that_came_before_the_ring_was_enabled_is_not_lost() {
    let world = World::new();
    for layout in LAYOUTS {
        let mut guest = Guest::up(&world.socket("h0"), layout);
        guest.raw.must(M::SET_VRING_ENABLE, &words(&[1, 0]), &[]);
        let desc = guest.place_frame(&frame(64));
        guest.offer(1, &[desc]); // and kicks
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(guest.used(1), 0, "a disabled ring is left alone");
        guest.raw.must(M::SET_VRING_ENABLE, &words(&[1, 1]), &[]);
        guest.wait_used(1, 1);
        // A worker that fell asleep wakes.
        for sent in 2..5 {
            std::thread::sleep(Duration::from_millis(50));
            let desc = guest.place_frame(&frame(64));
            guest.offer(1, &[desc]);
            guest.wait_used(1, sent);
        }
    }
    world.unharmed();
}

#[test]
fn rust_vmm_vhost_161_and_227_get_vring_base_and_a_new_kick_leave_the_ring_enabled() {
    let world = World::new();
    let mut guest = Guest::up(&world.socket("h0"), FEATURES);
    guest.send(&frame(64));
    guest.raw.send(M::GET_VRING_BASE, 1, &words(&[1, 0]), &[]);
    assert_eq!(guest.raw.answer(M::GET_VRING_BASE).unwrap().payload, words(&[1, 1]));
    guest.raw.must(M::SET_VRING_KICK, &wide(&[1 | 0x100]), &[]);
    guest.send(&frame(64));
    drop(guest);
    world.unharmed();
}

#[test]
fn a_call_descriptor_that_blocks_holds_no_worker() {
    let mut world = World::new();
    for layout in LAYOUTS {
        let mut guest = Guest::up(&world.socket("h0"), layout);
        let call = event();
        guest.raw.must(M::SET_VRING_CALL, &wide(&[1]), &[call.as_fd()]);
        // Full, and blocking again: the flag is shared with whoever holds the eventfd.
        let fill = || {
            let _ = nix::fcntl::fcntl(&call, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK));
            while call.write(u64::MAX - 1).is_err() {
                let _ = call.read();
            }
            nix::fcntl::fcntl(&call, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty())).unwrap();
        };
        fill();
        for _ in 0..50 {
            let desc = guest.place_frame(&frame(64));
            guest.offer(1, &[desc]);
        }
        std::thread::sleep(Duration::from_millis(200));
        // Many more than can be under way.
        let pair = world.forwarded();
        world.wait("no worker waits for the guest to read its eventfd", |w| w.forwarded() > pair + 1_000);
        let _ = call.read();
    }
    world.unharmed();
}

#[test]
fn random_memory_under_running_rings_stops_the_port_at_worst() {
    let world = World::new();
    for layout in LAYOUTS {
        for seed in 1..9_u32 {
            let mut guest = Guest::up(&world.socket("h0"), layout | features::NET_MRG_RXBUF);
            let mut sender = Guest::up(&world.socket("h1"), FEATURES);
            let stop = Arc::new(AtomicBool::new(false));
            let (memory, ended) = (guest.memory.clone(), stop.clone());
            let scribbler = std::thread::spawn(move || {
                let mut n = seed;
                while !ended.load(Ordering::Relaxed) {
                    n = n.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    let at = (u64::from(n >> 8) % (2 * RING)) & !3;
                    memory.set32(at, if n & 4 == 0 { n } else { n >> 16 });
                }
            });
            let end = Instant::now() + Duration::from_millis(60);
            let mut i = 0;
            while Instant::now() < end {
                guest.offer(0, &[Desc::write(BUFFERS + 4096 * (i % 8), 2048)]);
                guest.offer(1, &[Desc::read(BUFFERS + 4096 * (i % 8), 128)]);
                sender.offer(1, &[Desc::read(BUFFERS, 128)]);
                i += 1;
                std::thread::sleep(Duration::from_micros(200));
            }
            stop.store(true, Ordering::Relaxed);
            scribbler.join().unwrap();
        }
    }
    world.unharmed();
}
