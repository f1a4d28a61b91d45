//! What must not cost anything in the long run: ten thousand repeats of what once leaked in other implementations, and
//! random bytes. The process's descriptors and memory are counted before and after, so one test runs at a time.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)] // the other tests need the rest
#[path = "session/port.rs"]
mod port;
#[allow(dead_code)] // the other tests need the rest
#[path = "session/raw.rs"]
mod raw;
#[allow(dead_code)] // the other tests need the rest
#[path = "session/recorder.rs"]
mod recorder;

use std::os::fd::AsFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use port::Port;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use raw::*;
use vhost::vhost_user::message::FrontendReq as M;

const REPEATS: u32 = 10_000;

/// Resident memory may move by this much: allocators keep some.
const SLACK: usize = 512 << 10;

fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A port whose device keeps nothing.
fn port() -> Port {
    let port = Port::new();
    port.recorder.seen().forgetful = true;
    port
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Mappings of memory files: what a front end lent.
fn mappings() -> usize {
    std::fs::read_to_string("/proc/self/maps").unwrap().matches("/memfd:").count()
}

/// Anonymous resident bytes.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
}

/// Waits until a number is no more than this; a port's thread may still be at work.
#[track_caller]
fn settles_at(what: &str, most: usize, number: impl Fn() -> usize) {
    let start = Instant::now();
    while number() > most {
        assert!(start.elapsed() < Duration::from_secs(60), "{what}: {}, not {most}", number());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Runs `turn` a thousand times to warm up, and as often as wanted under observation.
#[track_caller]
fn costs_nothing(repeats: u32, mut turn: impl FnMut()) {
    (0..1_000.min(repeats)).for_each(|_| turn());
    let before = (descriptors(), mappings(), resident());
    (0..repeats).for_each(|_| turn());
    settles_at("descriptors", before.0, descriptors);
    settles_at("mappings", before.1, mappings);
    let after = resident();
    assert!(after < before.2 + SLACK, "resident: {after} after {}", before.2);
}

#[test]
fn cve_2019_14818_ten_thousand_set_vring_num_cost_nothing() {
    let _alone = alone();
    let port = port();
    let mut raw = port.ready(1 << 20);
    costs_nothing(REPEATS, || raw.must(M::SET_VRING_NUM, &words(&[0, 256]), &[]));
}

#[test]
fn cve_2019_14818_ten_thousand_new_calls_kicks_and_errs_cost_nothing() {
    let _alone = alone();
    let port = port();
    let mut raw = port.ready(1 << 20);
    raw.ring(0);
    let event = event();
    for code in [M::SET_VRING_CALL, M::SET_VRING_KICK, M::SET_VRING_ERR] {
        costs_nothing(REPEATS, || raw.must(code, &wide(&[0]), &[event.as_fd()]));
    }
}

#[test]
fn cve_2020_10726_ten_thousand_inflight_regions_cost_nothing() {
    let _alone = alone();
    let port = port();
    let mut raw = port.ready(1 << 20);
    let shape = [wide(&[0, 0]), words(&[8 | 256 << 16, 0])].concat();
    costs_nothing(REPEATS, || {
        raw.send(M::GET_INFLIGHT_FD, 1, &shape, &[]);
        let mut answer = raw.answer(M::GET_INFLIGHT_FD).unwrap();
        let file = answer.fds.pop().unwrap();
        raw.must(M::SET_INFLIGHT_FD, &answer.payload, &[file.as_fd()]);
    });
}

#[test]
fn cve_2026_86567_ten_thousand_memory_tables_under_running_rings_cost_nothing() {
    let _alone = alone();
    let port = port();
    let mut raw = port.ready(1 << 20);
    raw.ring(0);
    raw.ring(1);
    let file = memfd(1 << 20);
    let table = [words(&[1, 0]), wide(&[0, 1 << 20, USER, 0])].concat();
    let more = wide(&[0, 1 << 30, 1 << 20, 1 << 50, 0]);
    costs_nothing(REPEATS / 4, || {
        raw.must(M::SET_MEM_TABLE, &table, &[file.as_fd()]);
        raw.must(M::ADD_MEM_REG, &more, &[file.as_fd()]);
        raw.must(M::REM_MEM_REG, &more, &[]);
        // Refused halfway: the second of its regions is beyond the file.
        let bad = [words(&[2, 0]), wide(&[0, 4096, USER, 0, 8192, 4096, USER + 8192, 1 << 20])].concat();
        assert_eq!(raw.ask(M::SET_MEM_TABLE, &bad, &[file.as_fd(), file.as_fd()]), Some(1));
    });
}

#[test]
fn cve_2026_86563_ten_thousand_dirty_logs_cost_nothing() {
    let _alone = alone();
    let port = port();
    let mut raw = port.ready(1 << 20);
    raw.ring(0);
    let file = memfd(1 << 20);
    costs_nothing(REPEATS, || {
        raw.send(M::SET_LOG_BASE, 1, &wide(&[4096, 4097]), &[file.as_fd()]);
        raw.answer(M::SET_LOG_BASE).unwrap();
    });
}

#[test]
fn ten_thousand_refused_messages_cost_nothing() {
    let _alone = alone();
    let port = port();
    let mut raw = port.ready(1 << 20);
    costs_nothing(REPEATS, || assert_eq!(raw.ask(M::SET_VRING_NUM, &words(&[9, 256]), &[]), Some(1)));
}

#[test]
fn cve_2022_0669_sessions_that_end_over_extra_descriptors_cost_nothing() {
    let _alone = alone();
    let port = port();
    let event = event();
    let fds = [event.as_fd(); 8];
    costs_nothing(1_000, || {
        let mut raw = served(&port);
        raw.send(M::SET_VRING_NUM, 1, &words(&[0, 256]), &fds);
        assert!(raw.is_closed());
    });
}

/// Connects; turned away while the session before is still being closed, tries again.
fn served(port: &Port) -> Raw {
    loop {
        let mut raw = port.connect();
        if raw.send(M::GET_FEATURES, 1, &[], &[]) && raw.answer(M::GET_FEATURES).is_some() {
            return raw;
        }
    }
}

#[test]
fn storms_of_connections_and_half_messages_cost_nothing() {
    let _alone = alone();
    let port = port();
    let message = Raw::bytes(M::SET_VRING_CALL.into(), 1, &wide(&[0]));
    let event = event();
    let mut length = 0;
    costs_nothing(REPEATS / 4, || {
        drop(port.connect());
        let mut raw = port.connect();
        length = (length + 1) % message.len();
        raw.send_bytes(&message[..length], &[event.as_fd()]);
    });
    served(&port);
}

/// A message that may be anything, or nearly right.
fn message() -> impl Strategy<Value = (Vec<u8>, usize)> {
    let code = prop_oneof![4 => 0..46_u32, 1 => any::<u32>()];
    let flags = prop_oneof![4 => Just(9_u32), 4 => Just(1), 1 => any::<u32>()];
    let small = prop_oneof![
        Just(0_u64),
        Just(1),
        Just(256),
        Just(USER),
        Just(1 << 20),
        Just(1 << 32),
        Just(u64::MAX)
    ];
    let number = prop_oneof![3 => small, 1 => any::<u64>()];
    let payload = prop::collection::vec(number, 0..7);
    let lie = prop_oneof![6 => Just(None), 1 => any::<u32>().prop_map(Some), 1 => (0..64_u32).prop_map(Some)];
    let files = prop_oneof![3 => Just(0_usize), 3 => Just(1), 1 => 0..10_usize];
    (code, flags, payload, lie, files).prop_map(|(code, flags, payload, lie, files)| {
        let mut bytes = Raw::bytes(code, flags, &wide(&payload));
        if let Some(size) = lie {
            bytes[8..12].copy_from_slice(&size.to_ne_bytes());
        }
        (bytes, files)
    })
}

#[test]
fn random_messages_neither_panic_nor_leak() {
    let _alone = alone();
    let port = port();
    let (event, memory) = (event(), memfd(1 << 20));
    let before = (descriptors(), mappings());
    let mut runner = TestRunner::new(Config { cases: 1_500, failure_persistence: None, ..Config::default() });
    let stories = (any::<bool>(), prop::collection::vec((message(), any::<bool>()), 1..20));
    let result = runner.run(&stories, |(ready, story)| {
        let mut raw = served(&port);
        if ready {
            let table = [words(&[1, 0]), wide(&[0, 1 << 20, USER, 0])].concat();
            raw.send(M::SET_PROTOCOL_FEATURES, 1, &wide(&[vhost_user::backend::SUPPORTED.bits()]), &[]);
            raw.send(M::SET_MEM_TABLE, 1, &table, &[memory.as_fd()]);
        }
        for ((bytes, files), signal) in story {
            let fd = if signal { event.as_fd() } else { memory.as_fd() };
            if !raw.send_bytes(&bytes, &vec![fd; files]) {
                break;
            }
        }
        Ok(())
    });
    result.unwrap();
    // The port is alive, and nothing is left of all that.
    drop(served(&port));
    settles_at("descriptors", before.0, descriptors);
    settles_at("mappings", before.1, mappings);
}

#[test]
fn random_bytes_neither_panic_nor_leak() {
    let _alone = alone();
    let port = port();
    let event = event();
    let before = (descriptors(), mappings());
    let mut runner = TestRunner::new(Config { cases: 1_500, failure_persistence: None, ..Config::default() });
    let pieces = prop::collection::vec((prop::collection::vec(any::<u8>(), 1..64), 0..3_usize), 1..8);
    let result = runner.run(&pieces, |pieces| {
        let mut raw = served(&port);
        for (bytes, files) in pieces {
            raw.send_bytes(&bytes, &vec![event.as_fd(); files]);
        }
        Ok(())
    });
    result.unwrap();
    drop(served(&port));
    settles_at("descriptors", before.0, descriptors);
    settles_at("mappings", before.1, mappings);
}
