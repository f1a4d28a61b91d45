//! The record of other vhost implementations, as far as it concerns messages. What must not leak over many repeats is in
//! `endurance.rs`, what concerns rings and frames in the hostile front end of the switch.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use vhost::vhost_user::message::FrontendReq as M;
use virtio::features;

use crate::port::Port;
use crate::raw::*;
use crate::recorder::PAIRS;

/// The session still answers.
#[track_caller]
fn alive(raw: &mut Raw) {
    assert_eq!(raw.get(M::GET_MAX_MEM_SLOTS), 32);
}

#[test]
fn cve_2018_1059_ring_areas_that_leave_their_region_are_refused() {
    let port = Port::new();
    let mut raw = port.ready(1 << 20);
    // A second region right behind the first, in both address spaces: still not one piece here.
    let fd = memfd(1 << 20);
    raw.must(M::ADD_MEM_REG, &wide(&[0, 1 << 20, 1 << 20, USER + (1 << 20), 0]), &[fd.as_fd()]);
    raw.must(M::SET_VRING_NUM, &words(&[0, 256]), &[]);
    raw.must(M::SET_VRING_BASE, &words(&[0, 0]), &[]);
    raw.must(M::SET_VRING_KICK, &wide(&[0x100]), &[]);
    let (good, edge) = (USER, USER + (1 << 20));
    for area in 0..3 {
        for bad in [edge - 16, edge - 4, USER - 16, USER + (2 << 20) - 8, 0, 16, u64::MAX - 15] {
            let mut at = [good, good + 0x2000, good + 0x1000];
            at[area] = bad & !0xf;
            let payload = [words(&[0, 0]), wide(&[at[0], at[1], at[2], 0])].concat();
            assert_eq!(raw.ask(M::SET_VRING_ADDR, &payload, &[]), Some(1), "area {area} at {bad:#x}");
            port.expect("refused SET_VRING_ADDR: queue 0 cannot start: its ");
            port.recorder.seen().calls.clear();
        }
    }
    assert!(port.recorder.seen().starts.is_empty());
    raw.must(M::SET_VRING_ADDR, &addresses(0, 0, 0), &[]);
    assert_eq!(port.recorder.seen().starts.len(), 1);
}

/// Every message that takes no descriptor, with a payload that it would accept.
fn without_descriptors() -> Vec<(M, Vec<u8>)> {
    vec![
        (M::GET_FEATURES, vec![]),
        (M::SET_FEATURES, wide(&[features::VERSION_1])),
        (M::SET_OWNER, vec![]),
        (M::RESET_OWNER, vec![]),
        (M::SET_VRING_NUM, words(&[0, 256])),
        (M::SET_VRING_ADDR, addresses(0, 0, 0)),
        (M::SET_VRING_BASE, words(&[0, 0])),
        (M::GET_VRING_BASE, words(&[0, 0])),
        (M::GET_PROTOCOL_FEATURES, vec![]),
        (M::SET_PROTOCOL_FEATURES, wide(&[0])),
        (M::GET_QUEUE_NUM, vec![]),
        (M::SET_VRING_ENABLE, words(&[0, 1])),
        (M::SEND_RARP, wide(&[0])),
        (M::NET_SET_MTU, wide(&[1_500])),
        (M::GET_INFLIGHT_FD, [wide(&[0, 0]), words(&[2 | 256 << 16, 0])].concat()),
        (M::RESET_DEVICE, vec![]),
        (M::GET_MAX_MEM_SLOTS, vec![]),
        (M::SET_STATUS, wide(&[1])),
        (M::GET_STATUS, vec![]),
    ]
}

#[test]
fn cve_2019_14818_and_2022_0669_descriptors_where_none_belong_end_the_session() {
    let port = Port::new();
    let event = event();
    for (code, payload) in without_descriptors() {
        for count in [1, 8, 32, 33, 253] {
            let mut raw = port.ready(1 << 20);
            let fds: Vec<BorrowedFd<'_>> = (0..count).map(|_| event.as_fd()).collect();
            assert!(raw.send(code, 1, &payload, &fds));
            // Descriptors beyond what the `vhost` crate takes cost it the header too: it waits for another.
            raw.stream.shutdown(std::net::Shutdown::Write).unwrap();
            assert!(raw.is_closed(), "{code:?} with {count} descriptors");
            port.expect("disconnected");
            port.recorder.seen().calls.clear();
        }
    }
}

#[test]
fn cve_2019_14818_more_or_fewer_descriptors_than_a_message_takes_end_the_session() {
    let port = Port::new();
    let (event, memory) = (event(), memfd(1 << 20));
    let region = wide(&[0, 1 << 20, USER, 0]);
    let inflight = [wide(&[1 << 16, 0]), words(&[2 | 256 << 16, 0])].concat();
    let cases: Vec<(M, Vec<u8>, BorrowedFd<'_>)> = vec![
        (M::SET_MEM_TABLE, [words(&[1, 0]), region.clone()].concat(), memory.as_fd()),
        (M::ADD_MEM_REG, [wide(&[0]), region].concat(), memory.as_fd()),
        (M::SET_VRING_KICK, wide(&[0]), event.as_fd()),
        (M::SET_VRING_CALL, wide(&[0]), event.as_fd()),
        (M::SET_VRING_ERR, wide(&[0]), event.as_fd()),
        (M::SET_LOG_BASE, wide(&[4096, 0]), memory.as_fd()),
        (M::SET_LOG_FD, wide(&[0]), event.as_fd()),
        (M::SET_INFLIGHT_FD, inflight, memory.as_fd()),
    ];
    for (code, payload, fd) in cases {
        for count in [0, 2, 9] {
            let mut raw = port.ready(1 << 20);
            assert!(raw.send(code, 1, &payload, &vec![fd; count]));
            assert!(raw.is_closed(), "{code:?} with {count} descriptors");
            port.expect("disconnected");
            port.recorder.seen().calls.clear();
        }
    }
}

#[test]
fn cve_2020_10722_dirty_logs_that_wrap_or_exceed_their_file_are_refused() {
    let port = Port::new();
    let fd = memfd(1 << 20);
    let sizes = [
        (0, 0),
        (u64::MAX, 1),
        (1, u64::MAX),
        (1 << 63, 1 << 63),
        (4096, u64::MAX - 4095),
        ((1 << 20) + 1, 0),
        (1, 1 << 20),
        (1 << 40, 0),
    ];
    for (size, offset) in sizes {
        let mut raw = port.ready(1 << 20);
        raw.send(M::SET_LOG_BASE, 1, &wide(&[size, offset]), &[fd.as_fd()]);
        assert!(raw.is_closed(), "size {size:#x} offset {offset:#x}");
        port.expect("disconnected SET_LOG_BASE: ");
        port.recorder.seen().calls.clear();
    }
}

#[test]
fn cve_2020_10723_and_rust_vmm_vhost_211_queue_indices_are_compared_whole() {
    let port = Port::new();
    let mut raw = port.ready(1 << 20);
    let queues = u32::from(PAIRS) * 2;
    for index in [queues, 255, 256, 0x1_0000, 0x1_0001, 0x8000_0000, u32::MAX] {
        let states = [
            (M::SET_VRING_NUM, words(&[index, 256])),
            (M::SET_VRING_BASE, words(&[index, 0])),
            (M::SET_VRING_ENABLE, words(&[index, 1])),
            (M::SET_VRING_ADDR, [words(&[index]), addresses(0, 0, 0)[4..].to_vec()].concat()),
        ];
        for (code, payload) in states {
            assert_eq!(raw.ask(code, &payload, &[]), Some(1), "{code:?} {index:#x}");
        }
        for code in [M::SET_VRING_KICK, M::SET_VRING_CALL, M::SET_VRING_ERR] {
            if index == 256 {
                continue; // Bit 8 of these says that there is no descriptor: this is index 0.
            }
            let value = u64::from(index);
            let event = event();
            let fds = if value & 0x100 == 0 { vec![event.as_fd()] } else { vec![] };
            assert_eq!(raw.ask(code, &wide(&[value]), &fds), Some(1), "{code:?} {index:#x}");
            assert_eq!(raw.ask(code, &wide(&[value << 32 | 0x100]), &[]), Some(1), "{code:?} {index:#x}");
        }
    }
    alive(&mut raw);
    assert!(!port.recorder.was_called("start") && !port.recorder.was_called("call"));
    for index in [queues, 0x1_0000, u32::MAX] {
        raw = port_after(&port, raw);
        raw.send(M::GET_VRING_BASE, 1, &words(&[index, 0]), &[]);
        assert!(raw.is_closed(), "{index:#x}");
        port.expect(&format!("disconnected GET_VRING_BASE: queue {index} does not exist, this port has 8"));
    }
}

/// Ends a session and begins another.
fn port_after(port: &Port, raw: Raw) -> Raw {
    drop(raw);
    port.expect("disconnected");
    port.recorder.seen().calls.clear();
    port.ready(1 << 20)
}

/// Asks for an inflight region; `None` if the session was closed over it.
fn inflight(raw: &mut Raw, queues: u16, size: u16) -> Option<(Vec<u8>, OwnedFd)> {
    let shape = words(&[u32::from(queues) | u32::from(size) << 16, 0]);
    raw.send(M::GET_INFLIGHT_FD, 1, &[wide(&[0, 0]), shape].concat(), &[]);
    let mut answer = raw.answer(M::GET_INFLIGHT_FD)?;
    Some((answer.payload, answer.fds.pop()?))
}

#[test]
fn cve_2021_3839_inflight_regions_for_queues_that_do_not_exist_are_refused() {
    let port = Port::new();
    let fd = memfd(1 << 30);
    let mut raw = port.ready(1 << 20);
    for (queues, size) in [(9, 256), (u16::MAX, 256), (8, 32_769), (8, u16::MAX), (9, u16::MAX)] {
        let shape = words(&[u32::from(queues) | u32::from(size) << 16, 0]);
        let payload = [wide(&[1 << 30, 0]), shape].concat();
        let answer = raw.ask(M::SET_INFLIGHT_FD, &payload, &[fd.as_fd()]);
        assert_eq!(answer, Some(1), "{queues} queues of {size}");
    }
    for (bytes, offset) in [(0, 0), (64, 0), (u64::MAX, 1), (1 << 20, u64::MAX - 7), (1 << 30, 8)] {
        let payload = [wide(&[bytes, offset]), words(&[8 | 256 << 16, 0])].concat();
        let answer = raw.ask(M::SET_INFLIGHT_FD, &payload, &[fd.as_fd()]);
        assert_eq!(answer, Some(1), "{bytes:#x} bytes at {offset:#x}");
    }
    alive(&mut raw);
    for (queues, size) in [(0, 256), (8, 0), (9, 256), (u16::MAX, 256), (8, u16::MAX)] {
        raw = port_after(&port, raw);
        assert!(inflight(&mut raw, queues, size).is_none(), "{queues} queues of {size}");
    }
}

#[test]
fn cve_2026_86561_memory_regions_of_impossible_size_are_refused() {
    let port = Port::new();
    let fd = memfd(1 << 20);
    let mut raw = port.ready(1 << 20);
    let cases = [(1 << 63, 0), ((1 << 20) + 1, 0), (1 << 20, 4096), (4096, 1 << 20), (1 << 40, 0)];
    for (size, offset) in cases {
        let table = [words(&[1, 0]), wide(&[0, size, USER, offset])].concat();
        assert_eq!(raw.ask(M::SET_MEM_TABLE, &table, &[fd.as_fd()]), Some(1), "{size:#x} {offset:#x}");
        let one = wide(&[0, 1 << 50, size, 1 << 50, offset]);
        assert_eq!(raw.ask(M::ADD_MEM_REG, &one, &[fd.as_fd()]), Some(1), "{size:#x} {offset:#x}");
    }
    assert_eq!(raw.ask(M::ADD_MEM_REG, &wide(&[0, 0, 0, 0, 0]), &[fd.as_fd()]), Some(1));
    assert_eq!(raw.ask(M::ADD_MEM_REG, &wide(&[0, u64::MAX, 4096, 1 << 50, 0]), &[fd.as_fd()]), Some(1));
    assert_eq!(raw.ask(M::ADD_MEM_REG, &wide(&[0, 1 << 50, 4096, u64::MAX, 0]), &[fd.as_fd()]), Some(1));
    alive(&mut raw);
    assert_eq!(port.recorder.seen().memory.as_ref().unwrap().regions().len(), 1, "the old table stays");
    // What is empty or wraps is malformed, and ends the session.
    for region in [[0, 0, USER, 0], [0, u64::MAX, USER, 1], [u64::MAX, 4096, USER, 0]] {
        raw = port_after(&port, raw);
        let table = [words(&[1, 0]), wide(&region)].concat();
        assert_eq!(raw.ask(M::SET_MEM_TABLE, &table, &[fd.as_fd()]), Some(1), "{region:x?}");
        assert!(raw.is_closed(), "{region:x?}");
    }
}

#[test]
fn memory_tables_whose_counts_lie_end_the_session() {
    let port = Port::new();
    let fd = memfd(1 << 20);
    for (count, regions, files) in
        [(0, 0, 0), (2, 1, 1), (1, 2, 1), (1, 1, 2), (33, 33, 32), (u32::MAX, 1, 1)]
    {
        let mut raw = port.ready(1 << 20);
        let region = |i: u64| wide(&[i << 21, 1 << 20, USER + (i << 21), 0]);
        let regions: Vec<u8> = (0..regions).flat_map(region).collect();
        let payload = [words(&[count, 0]), regions].concat();
        assert!(raw.send(M::SET_MEM_TABLE, 1, &payload, &vec![fd.as_fd(); files]));
        assert!(raw.is_closed(), "count {count}");
        port.expect("disconnected");
        port.recorder.seen().calls.clear();
    }
}

#[test]
fn cve_2026_86563_the_offset_of_a_dirty_log_counts_once() {
    let port = Port::new();
    for offset in [0, 8, 4095, 4096, 4097, 0x1234] {
        let mut raw = port.ready(1 << 20);
        raw.ring(0);
        let file = memfd(0x4000);
        raw.send(M::SET_LOG_BASE, 1, &wide(&[0x1000, offset]), &[file.as_fd()]);
        raw.answer(M::SET_LOG_BASE).unwrap();
        let own = features::VHOST_USER_PROTOCOL_FEATURES | features::VHOST_LOG_ALL;
        let bits = crate::recorder::FEATURES & !features::RING_PACKED | own;
        raw.must(M::SET_FEATURES, &wide(&[bits]), &[]);
        let log = port.recorder.seen().log.clone().unwrap();
        log.mark(21 * 4096, 1);
        let mut all = [0; 0x4000];
        nix::sys::uio::pread(&file, &mut all, 0).unwrap();
        let set: Vec<_> =
            all.iter().enumerate().filter(|(_, b)| **b != 0).map(|(i, b)| (i as u64, *b)).collect();
        assert_eq!(set, [(offset + 2, 1 << 5)], "offset {offset:#x}");
        port.recorder.seen().log = None;
        port_after(&port, raw);
        port.expect("disconnected");
        port.recorder.seen().calls.clear();
    }
}

#[test]
fn cve_2026_86565_a_queue_larger_than_its_inflight_region_does_not_start() {
    let port = Port::new();
    let mut raw = port.ready(1 << 20);
    let (payload, fd) = inflight(&mut raw, 8, 128).unwrap();
    raw.must(M::SET_INFLIGHT_FD, &payload, &[fd.as_fd()]);
    raw.set_up_ring(0, 256, 0);
    assert_eq!(raw.ask(M::SET_VRING_KICK, &wide(&[0x100]), &[]), Some(1));
    port.expect("refused SET_VRING_KICK: queue 0 cannot start: 256 descriptors, but the inflight region");
    raw.must(M::SET_VRING_NUM, &words(&[0, 128]), &[]);
    port.expect("start 0");
    // Nor may it grow once it runs.
    for size in [0, 1, 64, 256, 32_768] {
        assert_eq!(raw.ask(M::SET_VRING_NUM, &words(&[0, size]), &[]), Some(1), "{size}");
    }
}

#[test]
fn cve_2026_86565_sizes_that_no_ring_has_are_refused_or_never_start() {
    let port = Port::new();
    let mut raw = port.ready(1 << 23);
    for size in [32_769, 65_535, 65_536, 65_792, u32::MAX] {
        assert_eq!(raw.ask(M::SET_VRING_NUM, &words(&[0, size]), &[]), Some(1), "{size}");
    }
    raw.set_up_ring(0, 0, 0);
    raw.must(M::SET_VRING_KICK, &wide(&[0x100]), &[]);
    for size in [3, 255, 32_767] {
        assert_eq!(raw.ask(M::SET_VRING_NUM, &words(&[0, size]), &[]), Some(1), "{size}");
    }
    assert!(!port.recorder.was_called("start"));
    raw.must(M::SET_VRING_NUM, &words(&[0, 1]), &[]);
    port.expect("start 0");
}

#[test]
fn only_eventfds_are_taken_for_signals_and_made_non_blocking() {
    let port = Port::new();
    let mut raw = port.ready(1 << 20);
    let (pipe, _reader) = nix::unistd::pipe().unwrap();
    let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    let file = memfd(8);
    for fd in [pipe.as_fd(), socket.as_fd(), null.as_fd(), file.as_fd()] {
        for code in [M::SET_VRING_CALL, M::SET_VRING_KICK, M::SET_VRING_ERR] {
            assert_eq!(raw.ask(code, &wide(&[0]), &[fd]), Some(1), "{code:?} {fd:?}");
        }
    }
    port.expect("refused SET_VRING_CALL: the descriptor is pipe:");
    let (call, _kick) = raw.ring(0);
    let flags = nix::fcntl::fcntl(&call, nix::fcntl::FcntlArg::F_GETFL).unwrap();
    assert_ne!(flags & libc::O_NONBLOCK, 0);
}

#[test]
fn only_memory_files_are_mapped() {
    let port = Port::new();
    let mut raw = port.ready(1 << 20);
    let (pipe, _writer) = nix::unistd::pipe().unwrap();
    let null = std::fs::File::open("/dev/zero").unwrap();
    let exe = std::fs::File::open("/proc/self/exe").unwrap();
    for fd in [pipe.as_fd(), null.as_fd(), exe.as_fd()] {
        let table = [words(&[1, 0]), wide(&[0, 4096, USER, 0])].concat();
        assert_eq!(raw.ask(M::SET_MEM_TABLE, &table, &[fd]), Some(1), "{fd:?}");
        let region = [wide(&[4096, 0]), words(&[1 | 1 << 16, 0])].concat();
        assert_eq!(raw.ask(M::SET_INFLIGHT_FD, &region, &[fd]), Some(1), "{fd:?}");
    }
    alive(&mut raw);
}

#[test]
fn more_memory_than_the_limit_and_regions_that_overlap_are_refused() {
    let port = Port::with(|o| o.memory_limit = 1 << 30);
    let mut raw = port.ready(1 << 20);
    let sparse = memfd(1 << 40);
    let table = [words(&[1, 0]), wide(&[0, 1 << 40, USER, 0])].concat();
    assert_eq!(raw.ask(M::SET_MEM_TABLE, &table, &[sparse.as_fd()]), Some(1));
    port.expect("refused SET_MEM_TABLE: 0x10000000000 bytes of guest memory are more than this port's limit");
    for (guest, user) in [(0, USER + (1 << 30)), (4096, USER + (1 << 30)), (1 << 30, USER + 4096)] {
        let region = wide(&[0, guest, 1 << 20, user, 0]);
        assert_eq!(raw.ask(M::ADD_MEM_REG, &region, &[sparse.as_fd()]), Some(1), "{guest:#x} {user:#x}");
    }
    alive(&mut raw);
}

#[test]
fn memory_that_its_owner_truncates_raises_the_flag_that_the_port_looks_at() {
    let port = Port::new();
    let mut raw = port.connect();
    raw.negotiate(features::VERSION_1);
    let fd = raw.memory(1 << 20);
    raw.ring(0);
    let memory = port.recorder.seen().memory.clone().unwrap();
    assert!(!memory.is_gone());
    nix::unistd::ftruncate(&fd, 0).unwrap();
    let at = memory.regions()[0].host;
    // SAFETY: mapped; the fault handler puts zeros where the file ended.
    assert_eq!(unsafe { at.read_volatile() }, 0);
    assert!(memory.is_gone());
    // Another table is another chance.
    raw.memory(1 << 20);
    assert!(!port.recorder.seen().memory.as_ref().unwrap().is_gone());
}

#[test]
fn dirty_logs_and_inflight_regions_that_are_truncated_harm_nobody() {
    let port = Port::new();
    let mut raw = port.connect();
    raw.negotiate(features::VERSION_1 | features::RING_PACKED);
    raw.memory(1 << 20);
    let (payload, region) = inflight(&mut raw, 2, 256).unwrap();
    raw.must(M::SET_INFLIGHT_FD, &payload, &[region.as_fd()]);
    let log = memfd(4096);
    raw.send(M::SET_LOG_BASE, 1, &wide(&[4096, 0]), &[log.as_fd()]);
    raw.answer(M::SET_LOG_BASE).unwrap();
    let own = features::VHOST_USER_PROTOCOL_FEATURES | features::VHOST_LOG_ALL;
    let bits = features::VERSION_1 | features::RING_PACKED | own;
    raw.must(M::SET_FEATURES, &wide(&[bits]), &[]);
    raw.ring(0);
    nix::unistd::ftruncate(&log, 0).unwrap();
    nix::unistd::ftruncate(&region, 0).unwrap();
    let seen = port.recorder.seen();
    let ring = &seen.starts[0].1.ring;
    ring.log.as_ref().unwrap().mark(0, 1 << 20);
    // SAFETY: mapped; the fault handler puts zeros where the file ended.
    assert_eq!(unsafe { ring.inflight.as_ref().unwrap().range.ptr.read_volatile() }, 0);
}

#[test]
fn messages_that_are_none_end_the_session() {
    let port = Port::new();
    let cases: Vec<Vec<u8>> = vec![
        Raw::bytes(0, 1, &[]),
        Raw::bytes(45, 1, &[]),
        Raw::bytes(u32::MAX, 1, &[]),
        Raw::bytes(M::GET_FEATURES.into(), 0, &[]),
        Raw::bytes(M::GET_FEATURES.into(), 2, &[]),
        Raw::bytes(M::GET_FEATURES.into(), 5, &[]),
        Raw::bytes(M::GET_FEATURES.into(), 0x11, &[]),
        Raw::bytes(M::GET_FEATURES.into(), u32::MAX, &[]),
        Raw::bytes(M::GET_FEATURES.into(), 1, &[0; 8]),
        Raw::bytes(M::SET_VRING_NUM.into(), 1, &[0; 4]),
        Raw::bytes(M::SET_VRING_NUM.into(), 1, &[0; 12]),
        Raw::bytes(M::SET_MEM_TABLE.into(), 1, &[0; 4]),
        Raw::bytes(M::SET_VRING_ENABLE.into(), 1, &[0; 4]),
        Raw::bytes(M::GET_STATUS.into(), 1, &[0; 4]),
        Raw::bytes(M::GET_CONFIG.into(), 1, &[0; 12]),
        Raw::bytes(M::SET_BACKEND_REQ_FD.into(), 1, &[]),
        Raw::bytes(M::IOTLB_MSG.into(), 1, &[0; 32]),
        Raw::bytes(M::POSTCOPY_ADVISE.into(), 1, &[]),
        Raw::bytes(M::GPU_SET_SOCKET.into(), 1, &[]),
        words(&[M::SET_MEM_TABLE.into(), 1, 4097]),
        words(&[M::SET_MEM_TABLE.into(), 1, u32::MAX]),
    ];
    for bytes in cases {
        let mut raw = port.ready(1 << 20);
        assert!(raw.send_bytes(&bytes, &[]));
        assert!(raw.is_closed(), "{bytes:x?}");
        port.expect("disconnected");
        port.recorder.seen().calls.clear();
    }
}
