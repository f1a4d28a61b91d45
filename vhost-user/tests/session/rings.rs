//! Starting, stopping and moving rings; inflight regions and the dirty log.

use std::os::fd::{AsFd, OwnedFd};

use vhost::vhost_user::message::FrontendReq as M;
use virtio::device::{Direction, Layout};
use virtio::features;

use crate::port::Port;
use crate::raw::*;
use crate::recorder::FEATURES;

#[test]
fn a_ring_starts_when_everything_is_known_in_whatever_order() {
    let messages: [fn(&mut Raw); 5] = [
        |raw| raw.must(M::SET_VRING_NUM, &words(&[2, 256]), &[]),
        |raw| raw.must(M::SET_VRING_BASE, &words(&[2, 7]), &[]),
        |raw| raw.must(M::SET_VRING_ADDR, &addresses(2, 0, 0), &[]),
        |raw| raw.must(M::SET_VRING_KICK, &wide(&[2]), &[event().as_fd()]),
        |raw| drop(raw.memory(1 << 20)),
    ];
    for first in 0..messages.len() {
        let port = Port::new();
        let mut raw = port.connect();
        raw.negotiate(features::VERSION_1);
        for i in 0..messages.len() {
            assert!(!port.recorder.was_called("start"), "after {i} messages from {first}");
            messages[(first + i) % messages.len()](&mut raw);
        }
        assert!(port.recorder.was_called("start 2 base Some(7) enabled false"));
        let seen = port.recorder.seen();
        let start = &seen.starts[0].1;
        assert_eq!((start.ring.layout, start.ring.direction), (Layout::Split, Direction::Write));
        assert_eq!((start.ring.size, start.ring.features), (256, 1 << 30 | features::VERSION_1));
        assert!(start.kick.is_some() && start.call.is_none());
    }
}

#[test]
fn enabling_is_up_to_the_front_end_if_it_knows_protocol_features_and_else_given() {
    let port = Port::new();
    let mut raw = port.connect();
    // No REPLY_ACK: a GET says when everything before it was handled.
    raw.get(M::GET_FEATURES);
    raw.send(M::SET_FEATURES, 1, &wide(&[features::VERSION_1]), &[]);
    let fd = memfd(1 << 20);
    let payload = [words(&[1, 0]), wide(&[0, 1 << 20, USER, 0])].concat();
    raw.send(M::SET_MEM_TABLE, 1, &payload, &[fd.as_fd()]);
    raw.send(M::SET_VRING_NUM, 1, &words(&[1, 256]), &[]);
    raw.send(M::SET_VRING_BASE, 1, &words(&[1, 0]), &[]);
    raw.send(M::SET_VRING_ADDR, 1, &addresses(1, 0, 0), &[]);
    raw.send(M::SET_VRING_KICK, 1, &wide(&[1 | 0x100]), &[]);
    raw.get(M::GET_FEATURES);
    assert!(port.recorder.was_called("start 1 base Some(0) enabled true"));
    drop(raw);
    port.expect("disconnected");

    let mut raw = port.ready(1 << 20);
    raw.ring(1);
    assert!(port.recorder.was_called("start 1 base Some(0) enabled false"));
    raw.must(M::SET_VRING_ENABLE, &words(&[1, 1]), &[]);
    assert!(port.recorder.was_called("enable 1 true"));
    assert_eq!(raw.ask(M::SET_VRING_ENABLE, &words(&[1, 2]), &[]), Some(1));
}

#[test]
fn rust_vmm_vhost_161_get_vring_base_stops_a_ring_and_forgets_nothing_else() {
    let port = Port::new();
    let mut raw = port.ready(1 << 20);
    port.recorder.seen().base = 0x42;
    raw.ring(0);
    raw.must(M::SET_VRING_ENABLE, &words(&[0, 1]), &[]);
    raw.send(M::GET_VRING_BASE, 1, &words(&[0, 0]), &[]);
    assert_eq!(raw.answer(M::GET_VRING_BASE).unwrap().payload, words(&[0, 0x42]));
    assert!(port.recorder.was_called("stop 0"));
    // Only a new kick starts it again, where it was, still enabled.
    raw.must(M::SET_VRING_KICK, &wide(&[0]), &[event().as_fd()]);
    assert!(port.recorder.was_called("start 0 base Some(42) enabled true"));
}

#[test]
fn rust_vmm_vhost_227_a_new_kick_neither_disables_a_ring_nor_loses_its_place() {
    let port = Port::new();
    let mut raw = port.ready(1 << 20);
    port.recorder.seen().base = 5;
    raw.ring(0);
    raw.must(M::SET_VRING_ENABLE, &words(&[0, 1]), &[]);
    raw.must(M::SET_VRING_KICK, &wide(&[0x100]), &[]);
    assert!(port.recorder.was_called("start 0 base Some(5) enabled true"));
    assert!(port.recorder.seen().starts[0].1.kick.is_none());
}

#[test]
fn rust_vmm_vhost_343_a_kick_before_the_ring_starts_is_not_lost() {
    let port = Port::new();
    let mut raw = port.ready(1 << 20);
    raw.set_up_ring(0, 256, 0);
    let kick = event();
    kick.write(1).unwrap();
    raw.must(M::SET_VRING_KICK, &wide(&[0]), &[kick.as_fd()]);
    // Nobody but the device reads it.
    let seen = port.recorder.seen();
    let mut counter = [0; 8];
    nix::unistd::read(seen.starts[0].1.kick.as_ref().unwrap(), &mut counter).unwrap();
    assert_eq!(u64::from_ne_bytes(counter), 1);
}

#[test]
fn a_call_that_comes_later_reaches_the_running_ring() {
    let port = Port::new();
    let mut raw = port.ready(1 << 20);
    raw.set_up_ring(3, 256, 0);
    raw.must(M::SET_VRING_KICK, &wide(&[3 | 0x100]), &[]);
    assert!(port.recorder.seen().starts[0].1.call.is_none());
    raw.must(M::SET_VRING_CALL, &wide(&[3]), &[event().as_fd()]);
    raw.must(M::SET_VRING_CALL, &wide(&[3 | 0x100]), &[]);
    assert!(port.recorder.was_called("call 3 true") && port.recorder.was_called("call 3 false"));
}

#[test]
fn rings_go_on_in_new_memory_where_they_were_in_the_old() {
    let port = Port::new();
    let mut raw = port.ready(1 << 20);
    raw.ring(0);
    raw.ring(1);
    port.recorder.seen().base = 9;
    let old = port.recorder.seen().memory.as_ref().map(std::sync::Arc::downgrade).unwrap();
    raw.memory(1 << 20);
    assert!(
        port.recorder.was_called("start 0 base Some(9)") && port.recorder.was_called("start 1 base Some(9)")
    );
    assert!(old.upgrade().is_none(), "the old memory is unmapped when the answer comes");

    // A region more, and the one that the rings are in taken away.
    let fd = memfd(1 << 20);
    raw.must(M::ADD_MEM_REG, &wide(&[0, 1 << 30, 1 << 20, USER + (1 << 30), 0]), &[fd.as_fd()]);
    assert_eq!(port.recorder.seen().starts.len(), 2);
    raw.must(M::REM_MEM_REG, &wide(&[0, 0, 1 << 20, USER, 0]), &[]);
    assert!(port.recorder.seen().starts.is_empty());
    port.expect("refused REM_MEM_REG: queue 0 cannot start: its descriptor area");
    assert_eq!(raw.ask(M::REM_MEM_REG, &wide(&[0, 0, 1 << 20, USER, 0]), &[]), Some(1));
}

#[test]
fn stale_ring_addresses_after_a_reboot_are_not_used() {
    let port = Port::new();
    let mut raw = port.ready(1 << 20);
    raw.ring(0);
    raw.send(M::GET_VRING_BASE, 1, &words(&[0, 0]), &[]);
    raw.answer(M::GET_VRING_BASE).unwrap();
    raw.memory(1 << 20);
    raw.must(M::SET_VRING_ADDR, &[words(&[0, 0]), addresses(1, 0, 0)[8..].to_vec()].concat(), &[]);
    raw.must(M::SET_VRING_KICK, &wide(&[0x100]), &[]);
    assert_eq!(port.recorder.seen().starts[0].1.ring.descriptors.guest, 0x8000);
}

#[test]
fn a_ring_that_cannot_start_is_reported_and_may_be_set_up_again() {
    let port = Port::new();
    let mut raw = port.ready(1 << 20);
    port.recorder.seen().refuse = true;
    raw.set_up_ring(0, 256, 0);
    // Without asking for an answer, as QEMU does.
    raw.send(M::SET_VRING_KICK, 1, &wide(&[0x100]), &[]);
    raw.get(M::GET_MAX_MEM_SLOTS);
    assert!(
        port.recorder
            .was_called("refused SET_VRING_KICK: queue 0 cannot start: packed ring cannot be resumed")
    );
    port.recorder.seen().refuse = false;
    raw.must(M::SET_VRING_BASE, &words(&[0, 0]), &[]);
    assert!(port.recorder.was_called("start 0"));
}

#[test]
fn features_cannot_change_under_a_running_ring_but_logging_can() {
    let port = Port::new();
    let mut raw = port.ready(1 << 20);
    raw.ring(0);
    let own = features::VHOST_USER_PROTOCOL_FEATURES;
    assert_eq!(raw.ask(M::SET_FEATURES, &wide(&[features::VERSION_1 | own]), &[]), Some(1));
    let same = FEATURES & !features::RING_PACKED | own;
    raw.must(M::SET_FEATURES, &wide(&[same | features::VHOST_LOG_ALL]), &[]);
}

#[test]
fn a_packed_ring_may_have_any_size_and_32_bits_of_position() {
    let port = Port::new();
    let mut raw = port.connect();
    raw.negotiate(features::VERSION_1 | features::RING_PACKED);
    raw.memory(1 << 20);
    raw.set_up_ring(1, 3, 0x8002_0001);
    raw.must(M::SET_VRING_KICK, &wide(&[0x101]), &[]);
    let seen = port.recorder.seen();
    let ring = &seen.starts[0].1.ring;
    assert_eq!((ring.layout, ring.size, ring.base), (Layout::Packed, 3, Some(0x8002_0001)));
    assert_eq!((ring.descriptors.len, ring.driver.len, ring.device.len), (48, 4, 4));
}

fn inflight(raw: &mut Raw, queues: u16, size: u16) -> Option<(Vec<u8>, OwnedFd)> {
    let payload = [wide(&[0, 0]), words(&[u32::from(queues) | u32::from(size) << 16])].concat();
    let payload = [payload, words(&[0])].concat();
    raw.send(M::GET_INFLIGHT_FD, 1, &payload, &[]);
    let mut answer = raw.answer(M::GET_INFLIGHT_FD)?;
    Some((answer.payload, answer.fds.pop()?))
}

#[test]
fn a_packed_ring_without_a_position_starts_from_the_inflight_region() {
    let port = Port::new();
    let mut raw = port.connect();
    raw.negotiate(features::VERSION_1 | features::RING_PACKED);
    raw.memory(1 << 20);
    raw.must(M::SET_VRING_NUM, &words(&[1, 256]), &[]);
    raw.must(M::SET_VRING_ADDR, &addresses(1, 0, 0), &[]);
    raw.must(M::SET_VRING_KICK, &wide(&[0x101]), &[]);
    assert!(!port.recorder.was_called("start"));
    let (payload, fd) = inflight(&mut raw, 2, 256).unwrap();
    nix::sys::uio::pwrite(&fd, &[0x5a], 8256 + 16).unwrap();
    raw.must(M::SET_INFLIGHT_FD, &payload, &[fd.as_fd()]);
    let seen = port.recorder.seen();
    let area = seen.starts[0].1.ring.inflight.clone().unwrap();
    assert_eq!(seen.starts[0].1.ring.base, None);
    // SAFETY: mapped, and kept mapped by `area`.
    assert_eq!(unsafe { area.range.ptr.add(16).read_volatile() }, 0x5a);
}

#[test]
fn split_rings_start_beside_an_inflight_region_and_do_not_use_it() {
    let port = Port::new();
    let mut raw = port.ready(1 << 20);
    let (payload, fd) = inflight(&mut raw, 2, 256).unwrap();
    raw.must(M::SET_INFLIGHT_FD, &payload, &[fd.as_fd()]);
    raw.ring(0);
    assert!(port.recorder.seen().starts[0].1.ring.inflight.is_none());
}

#[test]
fn a_migration_logs_guest_writes_and_used_rings_from_when_it_is_told_to() {
    let port = Port::new();
    let mut raw = port.ready(1 << 20);
    raw.ring(0);
    let file = memfd(0x3000);
    // The log begins in the middle of a page.
    raw.send(M::SET_LOG_BASE, 9, &wide(&[0x1000, 0x1234]), &[file.as_fd()]);
    raw.answer(M::SET_LOG_BASE).unwrap();
    assert!(!port.recorder.was_called("log 0 true"), "not before LOG_ALL");
    let bits = FEATURES & !features::RING_PACKED | features::VHOST_USER_PROTOCOL_FEATURES;
    raw.must(M::SET_FEATURES, &wide(&[bits | features::VHOST_LOG_ALL]), &[]);
    assert!(port.recorder.was_called("log 0 true None"));
    raw.must(M::SET_VRING_ADDR, &addresses(0, 1, 0x2_0000), &[]);
    assert!(port.recorder.was_called("log 0 true Some(20000)"));
    assert!(!port.recorder.was_called("stop"), "the ring never stopped");
    assert!(
        !port.recorder.was_called("negotiated")
            || port.recorder.seen().calls.iter().filter(|c| c.starts_with("negotiated")).count() == 1
    );

    let log = port.recorder.seen().log.clone().unwrap();
    log.mark(0x9000, 1);
    let mut byte = [0];
    nix::sys::uio::pread(&file, &mut byte, 0x1234 + 1).unwrap();
    assert_eq!(byte, [2], "page 9 is bit 1 of byte 1, counted from the offset");

    raw.must(M::SET_FEATURES, &wide(&[bits]), &[]);
    assert!(port.recorder.was_called("log 0 false"));
}

#[test]
fn reset_device_forgets_the_rings_and_keeps_the_memory() {
    let port = Port::new();
    let mut raw = port.ready(1 << 20);
    raw.ring(0);
    raw.must(M::RESET_DEVICE, &[], &[]);
    assert!(port.recorder.was_called("stop 0"));
    assert!(port.recorder.seen().memory.is_some());
    raw.must(M::SET_VRING_KICK, &wide(&[0x100]), &[]);
    assert!(port.recorder.seen().starts.is_empty(), "nothing of the ring is left");
}
