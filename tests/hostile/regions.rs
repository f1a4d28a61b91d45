//! Memory that is not what it seems, or goes away.

use std::os::fd::AsFd;
use std::time::Duration;

use vhost::vhost_user::message::FrontendReq as M;
use virtio::features;

use crate::guest::*;
use crate::raw::*;
use crate::world::World;

#[test]
fn memory_truncated_by_its_owner_while_frames_fly_stops_that_port() {
    let mut world = World::new();
    for layout in LAYOUTS {
        let mut guest = Guest::up(&world.socket("h0"), layout);
        let mut sender = Guest::up(&world.socket("h1"), FEATURES);
        guest.post(50, 2048);
        for _ in 0..10 {
            sender.send(&frame(500));
            guest.send(&frame(500));
        }
        nix::unistd::ftruncate(&guest.memory.file, 0).unwrap();
        // Ours is gone as well: only messages and kicks from here on.
        guest.kick(1);
        sender.send(&frame(500));
        world.wait_for_stop("h0", "truncated");
        // Another session with memory that stays is another chance.
        drop(guest);
        let mut guest = Guest::up(&world.socket("h0"), layout);
        guest.send(&frame(100));
        drop((guest, sender));
    }
    world.unharmed();
}

#[test]
fn holes_punched_into_memory_are_zeros() {
    let world = World::new();
    for layout in LAYOUTS {
        let mut guest = Guest::up(&world.socket("h0"), layout);
        guest.send(&frame(500));
        let flags = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE
            | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
        nix::fcntl::fallocate(&guest.memory.file, flags, 0, SIZE as i64).unwrap();
        guest.kick(1);
        std::thread::sleep(Duration::from_millis(30));
        guest.raw.must(M::SET_VRING_ENABLE, &words(&[1, 0]), &[]);
    }
    world.unharmed();
}

#[test]
fn a_tebibyte_that_is_not_there_is_refused_by_the_limit() {
    let mut world = World::new();
    let mut raw = connected(&world.socket("h0"));
    raw.negotiate(FEATURES);
    let sparse = memfd(1 << 40);
    let table = [words(&[1, 0]), wide(&[0, 1 << 40, USER, 0])].concat();
    assert_eq!(raw.ask(M::SET_MEM_TABLE, &table, &[sparse.as_fd()]), Some(1));
    world.wait_for_reason("h0", "limit");
    // In pieces, too: each is small enough.
    let mut refused = 0;
    for i in 0..40 {
        let region = wide(&[0, i << 34, 1 << 34, USER + (i << 34), 0]);
        refused += raw.ask(M::ADD_MEM_REG, &region, &[sparse.as_fd()]).unwrap();
    }
    assert_eq!(refused, 36, "four of 16 GiB are within the limit");
    drop(raw);
    world.unharmed();
}

#[test]
fn cve_2026_86561_and_overlaps_impossible_regions_are_refused_ten_thousand_times() {
    let mut world = World::new();
    let mut guest = Guest::up(&world.socket("h0"), FEATURES);
    let file = guest.memory.clone();
    let bad = [
        [1 << 32, 1 << 63, USER + (1 << 32), 0],
        [1 << 32, SIZE + 1, USER + (1 << 32), 0],
        [1 << 32, SIZE, USER + (1 << 32), 4096],
        [SIZE - 4096, SIZE, USER + (1 << 32), 0],
        [1 << 32, SIZE, USER + SIZE - 4096, 0],
    ];
    let mut round = |times: usize| {
        for region in bad.iter().cycle().take(times) {
            let payload = [wide(&[0]), wide(region)].concat();
            let answer = guest.raw.ask(M::ADD_MEM_REG, &payload, &[file.file.as_fd()]);
            assert_eq!(answer, Some(1), "{region:x?}");
        }
    };
    round(500);
    world.warmed_up();
    round(10_000);
    world.wait_for_reason("h0", "ADD_MEM_REG");
    guest.send(&frame(100));
    drop((guest, file));
    world.unharmed();
}

#[test]
fn memory_descriptors_that_are_no_memory_are_refused() {
    let mut world = World::new();
    let mut raw = connected(&world.socket("h0"));
    raw.negotiate(FEATURES);
    let (pipe, _writer) = nix::unistd::pipe().unwrap();
    let zero = std::fs::File::open("/dev/zero").unwrap();
    let disk = std::fs::File::open("/proc/self/exe").unwrap();
    for fd in [pipe.as_fd(), zero.as_fd(), disk.as_fd(), event().as_fd()] {
        let table = [words(&[1, 0]), wide(&[0, 4096, USER, 0])].concat();
        assert_eq!(raw.ask(M::SET_MEM_TABLE, &table, &[fd]), Some(1));
        world.wait_for_reason("h0", "only memory will do");
    }
    drop(raw);
    world.unharmed();
}

#[test]
fn inflight_and_log_files_truncated_under_running_rings_harm_nobody() {
    let world = World::new();
    let packed = FEATURES | features::RING_PACKED;
    let mut guest = Guest::connect(&world.socket("h0"), packed);
    let shape = [wide(&[0, 0]), words(&[2 | 256 << 16, 0])].concat();
    guest.raw.send(M::GET_INFLIGHT_FD, 1, &shape, &[]);
    let mut answer = guest.raw.answer(M::GET_INFLIGHT_FD).unwrap();
    let region = answer.fds.pop().unwrap();
    guest.raw.must(M::SET_INFLIGHT_FD, &answer.payload, &[region.as_fd()]);
    let log = memfd(4096);
    guest.raw.send(M::SET_LOG_BASE, 1, &wide(&[4096, 0]), &[log.as_fd()]);
    guest.raw.answer(M::SET_LOG_BASE).unwrap();
    let own = features::VHOST_USER_PROTOCOL_FEATURES | features::VHOST_LOG_ALL;
    guest.raw.must(M::SET_FEATURES, &wide(&[packed | own]), &[]);
    guest.start(0, 256);
    guest.start(1, 256);
    let mut sender = Guest::up(&world.socket("h1"), FEATURES);
    nix::unistd::ftruncate(&region, 0).unwrap();
    nix::unistd::ftruncate(&log, 0).unwrap();
    for _ in 0..20 {
        guest.post(1, 2048);
        sender.send(&frame(300));
        guest.send(&frame(300));
    }
    guest.wait_used(0, 20);
    drop((guest, sender));
    world.unharmed();
}
