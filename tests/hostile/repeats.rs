//! Every attack again, ten thousand times: what was refused, dropped or broken leaves nothing behind.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost::vhost_user::message::FrontendReq as M;
use virtio::features;

use crate::frames::{NEEDS_CSUM, TCPV4, header, tcp};
use crate::guest::*;
use crate::raw::*;
use crate::world::World;

const TIMES: usize = 10_000;

/// Until everything is allocated that is kept.
const FIRST: usize = 500;

/// A chain that is dropped: what it is, the port and the reason under which that is counted, its descriptors.
type Dropped = (&'static str, [&'static str; 2], Vec<Desc>);

/// Chains and frames that cost their port a frame, and nothing else.
fn dropped(guest: &mut Guest) -> Vec<Dropped> {
    let zeros = guest.place(&[0; 4096]);
    let (chain, runt) = (["h0", "bad_chain"], ["h0", "runt"]);
    let mut all = vec![
        ("CVE-2022-2132: shorter than the header", chain, vec![Desc::read(zeros, 11)]),
        ("CVE-2022-2132: the header alone", runt, vec![Desc::read(zeros, 12)]),
        ("CVE-2022-2132: a header in twelve pieces, and no frame", runt, vec![Desc::read(zeros, 1); 12]),
        ("the wrong direction", chain, vec![Desc::write(zeros, 64)]),
        ("a chain of more than 256", chain, vec![Desc::read(zeros, 16); 257]),
    ];
    let long: Vec<u8> = (1..=300).flat_map(|i| Desc::read(zeros, 1).next().split(i)).collect();
    let table = guest.place(&[long, Desc::read(zeros, 1).split(0).to_vec()].concat());
    all.push(("a table of more than 256", chain, vec![Desc::indirect(table, 16 * 301)]));
    let reserved = [&[1, 0x80, 0xc2, 0, 0, 0][..], &frame(60)[6..]].concat();
    let truncated = tcp(400)[..40].to_vec();
    let (offload, unfinished, budget) =
        (["h0", "bad_offload"], ["h1", "cannot_finish"], ["h1", "segment_budget"]);
    for (what, counted, header, frame) in [
        ("CVE-2024-11614: csum_start at the end", offload, header(NEEDS_CSUM, 0, 0, 0, 100, 0), frame(100)),
        ("CVE-2024-11614: far beyond", offload, header(NEEDS_CSUM, 0, 0, 0, 0xffff, 0xffff), frame(100)),
        ("a checksum over the addresses", offload, header(NEEDS_CSUM, 0, 0, 0, 0, 0), frame(100)),
        ("DPDK 285e6b8b18: gso_size 0", offload, header(NEEDS_CSUM, TCPV4, 54, 0, 34, 16), tcp(400)),
        ("gso_type 0xff", offload, header(NEEDS_CSUM, 0xff, 54, 100, 34, 16), tcp(400)),
        ("one byte a segment", budget, header(NEEDS_CSUM, TCPV4, 54, 1, 34, 16), tcp(60_000)),
        ("CVE-2016-10377: a packet cut short", unfinished, header(NEEDS_CSUM, 0, 0, 0, 34, 4), truncated),
        ("a reserved address", ["h0", "reserved"], [0; 12], reserved),
    ] {
        let bytes = [&header[..], &frame].concat();
        all.push((what, counted, vec![Desc::read(guest.place(&bytes), bytes.len() as u32)]));
    }
    all
}

#[test]
#[ignore = "takes a minute with the others: ./check hostile"]
fn ten_thousand_of_each_frame_that_is_dropped_cost_nothing() {
    let mut world = World::new();
    for layout in LAYOUTS {
        let mut guest = Guest::connect(&world.socket("h0"), layout);
        guest.start(0, 256);
        guest.start(1, 1024);
        // It takes nothing unfinished: what can be finished is.
        let mut receiver = Guest::up(&world.socket("h1"), features::VERSION_1);
        receiver.post(8, 2048);
        let attacks = dropped(&mut guest);
        let mut send = |what: &str, chain: &[Desc], times: usize| {
            for _ in 0..times {
                guest.offer(1, chain);
                guest.wait_taken(1, what);
            }
        };
        attacks.iter().for_each(|(what, _, chain)| send(what, chain, 50));
        if layout == FEATURES {
            world.warmed_up();
        }
        for (what, [port, reason], chain) in &attacks {
            let before = world.drops(port, reason);
            send(what, chain, TIMES);
            assert_eq!(world.drops(port, reason) - before, TIMES as u64, "{what}");
        }
        assert_eq!(receiver.used(0), 0, "none of them arrives");
        drop((guest, receiver));
        world.wait_for_state("h0", "listening");
    }
    world.unharmed();
}

#[test]
#[ignore = "takes a minute with the others: ./check hostile"]
fn ten_thousand_frames_cut_and_checksummed_and_flooded_cost_nothing() {
    let mut world = World::new();
    let mut guest = Guest::up(&world.socket("h0"), FEATURES);
    let mut receiver = Guest::up(&world.socket("h1"), features::VERSION_1);
    let buffers: Vec<Desc> = (0..8).map(|_| Desc::write(receiver.place(&[0; 2048]), 2048)).collect();
    let broadcast = [&[0xff; 6][..], &frame(60)[6..]].concat();
    let frames = [
        (header(NEEDS_CSUM, TCPV4, 54, 100, 34, 16), tcp(700)),
        (header(NEEDS_CSUM, 0, 0, 0, 34, 16), tcp(700)),
        ([0; 12], broadcast),
    ]
    .map(|(header, frame)| guest.place_bytes(&[&header[..], &frame].concat()));
    let mut send = |times: usize| {
        for _ in 0..times {
            for (frame, takes) in frames.iter().zip([7, 1, 1]) {
                buffers.iter().take(takes).for_each(|buffer| receiver.offer(0, &[*buffer]));
                guest.offer(1, &[*frame]);
                receiver.wait_taken(0, "a receive buffer");
            }
        }
    };
    send(FIRST);
    world.warmed_up();
    send(TIMES);
    drop((guest, receiver));
    world.unharmed();
}

#[test]
#[ignore = "takes a minute with the others: ./check hostile"]
fn cve_2026_86566_ten_thousand_of_each_runt_receive_buffer_cost_nothing() {
    let mut world = World::new();
    for layout in LAYOUTS {
        let mut sender = Guest::up(&world.socket("h0"), FEATURES);
        let mut guest = Guest::up(&world.socket("h1"), layout);
        let sent = sender.place_frame(&frame(300));
        let runt = guest.place(&[0xee; 64]);
        let mut send = |len: u32, times: usize| {
            for _ in 0..times {
                guest.offer(0, &[Desc::write(runt, len)]);
                sender.offer(1, &[sent]);
                // The frame is dropped, and the buffer comes back: the ring moves on.
                guest.wait_taken(0, "a receive buffer");
            }
        };
        let lengths = [0, 1, 11, 12, 13, 40];
        lengths.into_iter().for_each(|len| send(len, 50));
        if layout == FEATURES {
            world.warmed_up();
        }
        for len in lengths {
            let before = world.drops("h1", "receiver_too_small");
            send(len, TIMES);
            assert_eq!(world.drops("h1", "receiver_too_small") - before, TIMES as u64, "{len}");
        }
        assert_eq!(guest.memory.read(runt, 64), [0xee; 64]);
        drop((guest, sender));
        world.wait_for_state("h0", "listening");
    }
    world.unharmed();
}

/// Ways to break a transmit ring.
type Break = (&'static str, u64, fn(&mut Guest));

fn breaks() -> Vec<Break> {
    let mut all: Vec<Break> = Vec::new();
    for layout in LAYOUTS {
        all.extend([
            (
                "CVE-2018-1059: past the end",
                layout,
                (|g| g.offer(1, &[Desc::read(SIZE - 100, 101)])) as fn(&mut Guest),
            ),
            ("CVE-2020-10725: nothing, at an address that is none", layout, |g| {
                g.offer(1, &[Desc::read(u64::MAX, 0)]);
            }),
            ("CVE-2018-1059: far outside", layout, |g| g.offer(1, &[Desc::read(1 << 63, 64)])),
            ("CVE-2018-1059: a length that wraps", layout, |g| g.offer(1, &[Desc::read(u64::MAX, 64)])),
            ("CVE-2018-1059: a table that leaves memory", layout, |g| {
                g.offer(1, &[Desc::indirect(SIZE - 16, 32)]);
            }),
            ("CVE-2026-93683: a table of no whole descriptors", layout, |g| {
                g.offer(1, &[Desc::indirect(BUFFERS, 17)]);
            }),
            ("a table in the middle of a chain", layout, |g| {
                let table = g.place(&Desc::read(BUFFERS, 64).split(0));
                g.offer(1, &[Desc::indirect(table, 16), Desc::read(BUFFERS, 64)]);
            }),
        ]);
    }
    all.extend([
        (
            "DPDK 6ec1778134: a loop",
            FEATURES,
            (|g| {
                g.memory.write(RING, &Desc::read(BUFFERS, 1).next().split(0));
                g.avail(1, 0);
            }) as fn(&mut Guest),
        ),
        ("DPDK 6ec1778134: a table that loops", FEATURES, |g| {
            let table = g.place(&Desc::read(BUFFERS, 1).next().split(0));
            g.offer(1, &[Desc::indirect(table, 16)]);
        }),
        ("DPDK 6ec1778134: a packed ring without an end", LAYOUTS[1], |g| {
            let all: Vec<Desc> = (0..256).map(|_| Desc::read(BUFFERS, 1).next()).collect();
            g.offer(1, &all);
        }),
        ("a head beyond the table", FEATURES, |g| g.avail(1, 0xffff)),
        ("a next beyond the table", FEATURES, |g| {
            g.memory.write(RING, &Desc::read(BUFFERS, 1).next().split(0xffff));
            g.avail(1, 0);
        }),
        ("an avail index far ahead", FEATURES, |g| g.set_avail_index(1, 0x8000)),
    ]);
    all
}

/// Waits until an eventfd is signalled.
fn is_signalled(event: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(event.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::try_from(Duration::from_secs(60)).unwrap()) == Ok(1)
}

#[test]
#[ignore = "takes a minute with the others: ./check hostile"]
fn ten_thousand_sessions_that_break_their_rings_cost_nothing() {
    let mut world = World::new();
    let socket = world.socket("h0");
    let breaks = breaks();
    let attack = |times: usize| {
        for (what, layout, how) in breaks.iter().cycle().take(times) {
            let mut guest = Guest::up(&socket, *layout);
            let err = OwnedFd::from(event());
            guest.raw.must(M::SET_VRING_ERR, &wide(&[1]), &[err.as_fd()]);
            how(&mut guest);
            assert!(is_signalled(&err), "{what}: the ring goes on");
        }
    };
    attack(FIRST);
    world.wait_for_state("h0", "listening");
    world.warmed_up();
    attack(TIMES);
    world.unharmed();
}

#[test]
#[ignore = "takes a minute with the others: ./check hostile"]
fn ten_thousand_memory_files_that_their_owners_cut_off_cost_nothing() {
    let mut world = World::new();
    let socket = world.socket("h0");
    let attack = |times: usize| {
        for layout in LAYOUTS.iter().cycle().take(times) {
            let mut guest = Guest::up(&socket, *layout);
            guest.post(1, 2048);
            let desc = guest.place_frame(&frame(500));
            guest.offer(1, &[desc]);
            nix::unistd::ftruncate(&guest.memory.file, 0).unwrap();
            // Ours is gone as well: only kicks from here on.
            guest.kick(0);
            guest.kick(1);
        }
    };
    attack(FIRST);
    world.wait_for_state("h0", "listening");
    world.warmed_up();
    attack(TIMES);
    world.unharmed();
}

#[test]
#[ignore = "takes a minute with the others: ./check hostile"]
fn ten_thousand_second_clients_cost_nothing() {
    let mut world = World::new();
    let mut guest = Guest::up(&world.socket("h0"), FEATURES);
    let socket = world.socket("h0");
    let attack = |times: usize| {
        for _ in 0..times {
            let mut second = Raw::new(std::os::unix::net::UnixStream::connect(&socket).unwrap());
            second.send(M::GET_FEATURES, 1, &[], &[]);
            assert!(second.answer(M::GET_FEATURES).is_none());
        }
    };
    attack(FIRST);
    world.warmed_up();
    attack(TIMES);
    guest.send(&frame(100));
    drop(guest);
    world.unharmed();
}

#[test]
#[ignore = "takes a minute with the others: ./check hostile"]
fn cve_2026_86567_ten_thousand_changes_of_memory_while_frames_fly_cost_nothing() {
    let mut world = World::new();
    let mut guest = Guest::up(&world.socket("h0"), FEATURES);
    let mut sender = Guest::up(&world.socket("h1"), FEATURES);
    let (sent, buffer) = (sender.place_frame(&frame(300)), guest.place(&[0; 2048]));
    let file = guest.memory.clone();
    let mut attack = |times: u64| {
        for i in 0..times {
            guest.offer(0, &[Desc::write(buffer, 2048)]);
            sender.offer(1, &[sent]);
            guest.lend(&[(0, SIZE, 0)]);
            let region = wide(&[0, SIZE + ((i % 64) << 24), 1 << 20, USER + (1 << 40), 0]);
            guest.raw.must(M::ADD_MEM_REG, &region, &[file.file.as_fd()]);
            guest.raw.must(M::REM_MEM_REG, &region, &[]);
            sender.wait_taken(1, "a frame");
        }
    };
    attack(FIRST as u64);
    world.warmed_up();
    attack(TIMES as u64 / 3 + 1);
    drop((guest, sender, file));
    world.unharmed();
}

#[test]
#[ignore = "takes a minute with the others: ./check hostile"]
fn ten_thousand_of_each_message_that_is_refused_cost_nothing() {
    let mut world = World::new();
    let mut guest = Guest::up(&world.socket("h0"), FEATURES);
    let (pipe, _reader) = nix::unistd::pipe().unwrap();
    let (pipe, event, memory) = (pipe.as_fd(), event(), guest.memory.clone());
    let (event, memory) = (event.as_fd(), memory.file.as_fd());
    let table = |size: u64, offset: u64| [words(&[1, 0]), wide(&[0, size, USER, offset])].concat();
    let inflight = |queues: u32, size: u32, bytes: u64, offset: u64| {
        [wide(&[bytes, offset]), words(&[queues | size << 16, 0])].concat()
    };
    let overlapping = [words(&[2, 0]), wide(&[USER, USER, USER, 0])].concat();
    let messages = [
        ("CVE-2020-10723: queue 65536", M::SET_VRING_NUM, words(&[0x1_0000, 256]), None),
        ("vhost #211: a position of queue 256", M::SET_VRING_BASE, words(&[256, 0]), None),
        ("an enabled queue 256", M::SET_VRING_ENABLE, words(&[256, 1]), None),
        ("a queue enabled twice", M::SET_VRING_ENABLE, words(&[1, 2]), None),
        ("CVE-2026-86565: 65535 descriptors", M::SET_VRING_NUM, words(&[1, 65_535]), None),
        ("CVE-2026-86565: another size of a ring that runs", M::SET_VRING_NUM, words(&[1, 128]), None),
        ("a kick that is a pipe", M::SET_VRING_KICK, wide(&[3]), Some(pipe)),
        ("a call that is memory", M::SET_VRING_CALL, wide(&[3]), Some(memory)),
        ("an error that is a pipe", M::SET_VRING_ERR, wide(&[3]), Some(pipe)),
        ("CVE-2026-86561: half of all addresses", M::SET_MEM_TABLE, table(1 << 63, 0), Some(memory)),
        ("CVE-2026-86561: more than the file has", M::SET_MEM_TABLE, table(SIZE, 4096), Some(memory)),
        ("memory that is a pipe", M::SET_MEM_TABLE, table(4096, 0), Some(pipe)),
        ("memory that is an eventfd", M::SET_MEM_TABLE, table(4096, 0), Some(event)),
        ("CVE-2021-3839: 65535 queues", M::SET_INFLIGHT_FD, inflight(0xffff, 256, 1 << 20, 0), Some(memory)),
        ("an inflight region that wraps", M::SET_INFLIGHT_FD, inflight(2, 256, u64::MAX, 1), Some(memory)),
        ("features that were not offered", M::SET_FEATURES, wide(&[features::ACCESS_PLATFORM]), None),
        ("an MTU of nothing", M::NET_SET_MTU, wide(&[0]), None),
        ("a region that is not there", M::REM_MEM_REG, wide(&[0, 1 << 40, 4096, 1 << 50, 0]), None),
    ];
    let mut send = |times: usize| {
        for (what, code, payload, fd) in &messages {
            for _ in 0..times {
                assert_eq!(guest.raw.ask(*code, payload, fd.as_slice()), Some(1), "{what}");
            }
        }
        // Addresses that overlap are refused when the ring would start: a ring of their own.
        guest.raw.must(M::SET_VRING_NUM, &words(&[2, 256]), &[]);
        guest.raw.must(M::SET_VRING_BASE, &words(&[2, 0]), &[]);
        guest.raw.must(M::SET_VRING_ADDR, &overlapping, &[]);
        for _ in 0..times {
            assert_eq!(guest.raw.ask(M::SET_VRING_KICK, &wide(&[2 | 0x100]), &[]), Some(1));
        }
        guest.raw.send(M::GET_VRING_BASE, 1, &words(&[2, 0]), &[]);
        guest.raw.answer(M::GET_VRING_BASE).unwrap();
    };
    send(50);
    world.warmed_up();
    send(TIMES);
    guest.send(&frame(100));
    world.wait_for_state("h0", "up");
    drop(guest);
    world.unharmed();
}

#[test]
#[ignore = "takes a minute with the others: ./check hostile"]
fn ten_thousand_sessions_that_end_over_a_message_cost_nothing() {
    let mut world = World::new();
    let socket = world.socket("h0");
    let (event, memory) = (event(), memfd(1 << 16));
    let (event, memory) = (event.as_fd(), memory.as_fd());
    let log = |size: u64, offset: u64| wide(&[size, offset]);
    let shape = |queues: u32| [wide(&[0, 0]), words(&[queues | 256 << 16, 0])].concat();
    let messages = [
        ("CVE-2019-14818: a descriptor too many", M::SET_VRING_NUM, words(&[0, 256]), vec![event; 8]),
        ("CVE-2022-0669: descriptors without need", M::GET_INFLIGHT_FD, shape(2), vec![event; 2]),
        ("CVE-2022-0669: two inflight regions", M::SET_INFLIGHT_FD, shape(2), vec![memory; 2]),
        ("two kicks", M::SET_VRING_KICK, wide(&[0]), vec![event; 2]),
        ("as many descriptors as go", M::SET_VRING_ENABLE, words(&[0, 1]), vec![event; 253]),
        ("CVE-2020-10722: a log that wraps", M::SET_LOG_BASE, log(u64::MAX, 1), vec![memory]),
        ("CVE-2020-10722: beyond its file", M::SET_LOG_BASE, log(1, 1 << 16), vec![memory]),
        ("CVE-2021-3839: an inflight region for 65535 queues", M::GET_INFLIGHT_FD, shape(0xffff), vec![]),
        ("vhost #211: a position of queue 256", M::GET_VRING_BASE, words(&[256, 0]), vec![]),
        ("CVE-2021-3839: an inflight region for no queue", M::GET_INFLIGHT_FD, shape(0), vec![]),
        ("a table of four billion regions", M::SET_MEM_TABLE, words(&[u32::MAX, 0]), vec![memory]),
        ("a feature that nobody has", M::SET_PROTOCOL_FEATURES, wide(&[1 << 63]), vec![]),
    ];
    let attack = |times: usize| {
        for (what, code, payload, fds) in messages.iter().cycle().take(times) {
            let mut raw = connected(&socket);
            raw.negotiate(FEATURES);
            raw.send(*code, 1, payload, fds);
            let _ = raw.stream.shutdown(std::net::Shutdown::Write);
            assert!(raw.is_closed(), "{what}");
        }
    };
    attack(FIRST);
    world.warmed_up();
    attack(TIMES);
    world.unharmed();
}
