//! Messages that lie, in their thousands.

use std::os::fd::{AsFd, BorrowedFd};

use vhost::vhost_user::message::FrontendReq as M;

use crate::guest::*;
use crate::raw::*;
use crate::world::World;

/// Sends `attack` often enough to show a leak.
fn ten_thousand_times(world: &mut World, mut attack: impl FnMut()) {
    (0..500).for_each(|_| attack());
    world.warmed_up();
    (0..10_000).for_each(|_| attack());
}

#[test]
fn cve_2019_14818_repeated_ring_messages_cost_nothing() {
    let mut world = World::new();
    let mut guest = Guest::up(&world.socket("h0"), FEATURES);
    let (call, kick) = (event(), event());
    ten_thousand_times(&mut world, || {
        guest.raw.must(M::SET_VRING_NUM, &words(&[1, 256]), &[]);
        guest.raw.must(M::SET_VRING_NUM, &words(&[2, 512]), &[]);
        guest.raw.must(M::SET_VRING_CALL, &wide(&[1]), &[call.as_fd()]);
        guest.raw.must(M::SET_VRING_KICK, &wide(&[3]), &[kick.as_fd()]);
    });
    guest.send(&frame(100));
    world.unharmed();
    drop(guest);
}

#[test]
fn cve_2019_14818_and_2022_0669_unexpected_descriptors_are_closed() {
    let mut world = World::new();
    let event = event();
    let socket = world.socket("h0");
    let messages = [
        (M::SET_VRING_NUM, words(&[0, 256])),
        (M::GET_INFLIGHT_FD, [wide(&[0, 0]), words(&[2 | 256 << 16, 0])].concat()),
        (M::SET_VRING_ENABLE, words(&[0, 1])),
        (M::NET_SET_MTU, wide(&[1_500])),
        (M::SET_VRING_KICK, wide(&[0])),
        (M::SET_INFLIGHT_FD, [wide(&[1 << 16, 0]), words(&[2 | 256 << 16, 0])].concat()),
    ];
    let attack = |count: usize| {
        for (code, payload) in &messages {
            let mut raw = connected(&socket);
            raw.negotiate(FEATURES);
            let fds: Vec<BorrowedFd<'_>> = (0..count).map(|_| event.as_fd()).collect();
            raw.send(*code, 1, payload, &fds);
            let _ = raw.stream.shutdown(std::net::Shutdown::Write);
            assert!(raw.is_closed(), "{code:?} with {count} descriptors");
        }
    };
    attack(8);
    world.warmed_up();
    for count in [2, 8, 32, 33, 253].into_iter().cycle().take(100) {
        attack(count);
    }
    world.unharmed();
}

#[test]
fn cve_2020_10722_dirty_logs_that_wrap_are_refused() {
    let mut world = World::new();
    let log = memfd(1 << 16);
    for (size, offset) in
        [(u64::MAX, 1), (1 << 63, 1 << 63), (4096, u64::MAX - 4095), (1 << 17, 0), (1, 1 << 16)]
    {
        let mut raw = connected(&world.socket("h0"));
        raw.negotiate(FEATURES);
        raw.send(M::SET_LOG_BASE, 1, &wide(&[size, offset]), &[log.as_fd()]);
        assert!(raw.is_closed());
        world.wait_for_reason("h0", "SET_LOG_BASE");
    }
    world.unharmed();
}

#[test]
fn cve_2020_10723_and_rust_vmm_vhost_211_queue_indices_beyond_the_last_are_refused() {
    let mut world = World::new();
    let mut guest = Guest::up(&world.socket("h1"), FEATURES);
    for index in [4, 5, 255, 0x1_0000, 0x1_0001, u32::MAX] {
        let states = [(M::SET_VRING_NUM, 256), (M::SET_VRING_BASE, 0), (M::SET_VRING_ENABLE, 1)];
        for (code, value) in states {
            assert_eq!(guest.raw.ask(code, &words(&[index, value]), &[]), Some(1), "{code:?} {index:#x}");
        }
        let addresses = [words(&[index]), Guest::addresses(1)[4..].to_vec()].concat();
        assert_eq!(guest.raw.ask(M::SET_VRING_ADDR, &addresses, &[]), Some(1), "{index:#x}");
        for code in [M::SET_VRING_KICK, M::SET_VRING_CALL, M::SET_VRING_ERR] {
            let event = event();
            let fds = if index & 0x100 == 0 { vec![event.as_fd()] } else { vec![] };
            assert_eq!(guest.raw.ask(code, &wide(&[index.into()]), &fds), Some(1), "{code:?} {index:#x}");
        }
        world.wait_for_reason("h1", "does not exist, this port has 4");
    }
    guest.send(&frame(100));
    drop(guest);
    world.unharmed();
}

#[test]
fn cve_2020_10726_and_2021_3839_inflight_regions_cost_nothing_and_impossible_ones_are_refused() {
    let mut world = World::new();
    let mut guest = Guest::up(&world.socket("h1"), FEATURES);
    let shape = [wide(&[0, 0]), words(&[4 | 256 << 16, 0])].concat();
    ten_thousand_times(&mut world, || {
        guest.raw.send(M::GET_INFLIGHT_FD, 1, &shape, &[]);
        let mut answer = guest.raw.answer(M::GET_INFLIGHT_FD).unwrap();
        let file = answer.fds.pop().unwrap();
        guest.raw.must(M::SET_INFLIGHT_FD, &answer.payload, &[file.as_fd()]);
    });
    let file = memfd(1 << 30);
    for (queues, size) in [(5, 256), (u16::MAX, 256), (4, u16::MAX)] {
        let shape = words(&[u32::from(queues) | u32::from(size) << 16, 0]);
        let payload = [wide(&[1 << 30, 0]), shape].concat();
        assert_eq!(guest.raw.ask(M::SET_INFLIGHT_FD, &payload, &[file.as_fd()]), Some(1), "{queues} {size}");
        world.wait_for_reason("h1", "are impossible");
    }
    guest.send(&frame(100));
    drop(guest);
    world.unharmed();
}

#[test]
fn cve_2026_86565_queue_sizes_that_change_against_the_inflight_region_are_refused() {
    let mut world = World::new();
    let mut guest = Guest::connect(&world.socket("h1"), FEATURES);
    let shape = [wide(&[0, 0]), words(&[2 | 128 << 16, 0])].concat();
    guest.raw.send(M::GET_INFLIGHT_FD, 1, &shape, &[]);
    let mut answer = guest.raw.answer(M::GET_INFLIGHT_FD).unwrap();
    let file = answer.fds.pop().unwrap();
    guest.raw.must(M::SET_INFLIGHT_FD, &answer.payload, &[file.as_fd()]);
    guest.set_up(1, 256);
    assert_eq!(guest.raw.ask(M::SET_VRING_KICK, &wide(&[1 | 0x100]), &[]), Some(1));
    world.wait_for_reason("h1", "the inflight region was made for 128");
    for size in [0, 1, 3, 128, 256, 32_768, 65_535, u32::MAX] {
        guest.raw.ask(M::SET_VRING_NUM, &words(&[1, size]), &[]).unwrap();
        guest.raw.ask(M::SET_VRING_KICK, &wide(&[1 | 0x100]), &[]).unwrap();
    }
    drop(guest);
    world.unharmed();
}

#[test]
fn signals_that_are_no_eventfds_are_refused() {
    let mut world = World::new();
    let mut guest = Guest::up(&world.socket("h1"), FEATURES);
    let (pipe, _reader) = nix::unistd::pipe().unwrap();
    let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    for fd in [pipe.as_fd(), socket.as_fd(), null.as_fd()] {
        for code in [M::SET_VRING_CALL, M::SET_VRING_KICK, M::SET_VRING_ERR] {
            assert_eq!(guest.raw.ask(code, &wide(&[1]), &[fd]), Some(1), "{code:?} {fd:?}");
            world.wait_for_reason("h1", "only an eventfd will do");
        }
    }
    guest.send(&frame(100));
    drop(guest);
    world.unharmed();
}
