//! Connecting, features, and the messages that the `vhost` crate lacks.

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use vhost::vhost_user::message::FrontendReq as M;
use virtio::features;

use crate::port::Port;
use crate::raw::*;
use crate::recorder::{FEATURES, Recorder};
use vhost_user::backend::{Endpoint, Options, SUPPORTED, serve};
use vhost_user::{Mode, ProtocolFeatures};

#[test]
fn features_on_offer_are_the_devices_and_the_sessions() {
    let port = Port::new();
    let mut raw = port.connect();
    let own = features::VHOST_USER_PROTOCOL_FEATURES | features::VHOST_LOG_ALL;
    assert_eq!(raw.get(M::GET_FEATURES), FEATURES | own);
    assert_eq!(raw.get(M::GET_PROTOCOL_FEATURES), SUPPORTED.bits());
    raw.negotiate(features::VERSION_1 | features::NET_MRG_RXBUF);
    let v1_mrg = features::VERSION_1 | features::NET_MRG_RXBUF;
    assert!(port.recorder.was_called(&format!("negotiated {v1_mrg:#x}")));
    assert_eq!(raw.get(M::GET_QUEUE_NUM), u64::from(crate::recorder::PAIRS));
    assert_eq!(raw.get(M::GET_MAX_MEM_SLOTS), 32);
}

#[test]
fn protocol_features_that_the_operator_switched_off_are_not_offered_nor_taken() {
    let off = ProtocolFeatures::REPLY_ACK | ProtocolFeatures::LOG_SHMFD;
    let port = Port::with(|o| o.protocol_features = SUPPORTED - off);
    let mut raw = port.connect();
    assert_eq!(raw.get(M::GET_FEATURES) & features::VHOST_LOG_ALL, 0);
    assert_eq!(raw.get(M::GET_PROTOCOL_FEATURES), (SUPPORTED - off).bits());
    raw.send(M::SET_PROTOCOL_FEATURES, 1, &wide(&[off.bits()]), &[]);
    assert!(raw.is_closed());
}

#[test]
fn features_that_were_not_offered_are_refused_by_name() {
    let port = Port::new();
    let mut raw = port.ready(1 << 20);
    let access_platform = 1 << 33;
    assert_eq!(raw.ask(M::SET_FEATURES, &wide(&[access_platform]), &[]), Some(1));
    port.expect("refused SET_FEATURES: virtio features 0x200000000 are not on offer");
    // The session goes on.
    assert_eq!(raw.get(M::GET_MAX_MEM_SLOTS), 32);
}

#[test]
fn what_the_vhost_crate_lacks_is_answered() {
    let port = Port::new();
    let mut raw = port.ready(1 << 20);
    raw.must(M::NET_SET_MTU, &wide(&[1_500]), &[]);
    raw.must(M::SEND_RARP, &[2, 0, 0, 0, 0, 7, 0, 0], &[]);
    raw.must(M::SET_STATUS, &wide(&[15]), &[]);
    assert_eq!(raw.get(M::GET_STATUS), 15);
    raw.must(M::SET_LOG_FD, &wide(&[0]), &[event().as_fd()]);
    for call in ["mtu 1500", "announce [02, 00, 00, 00, 00, 07]", "status 15"] {
        assert!(port.recorder.was_called(call), "{call}");
    }
    for mtu in [0, 67, 9_001, 65_536, u64::MAX] {
        assert_eq!(raw.ask(M::NET_SET_MTU, &wide(&[mtu]), &[]), Some(1), "{mtu}");
    }
    port.expect("refused NET_SET_MTU: MTU 9001: this port carries 9000");
}

#[test]
fn a_message_whose_feature_was_not_negotiated_is_refused() {
    let port = Port::new();
    let mut raw = port.connect();
    raw.negotiate_protocol(features::VERSION_1, ProtocolFeatures::REPLY_ACK);
    assert_eq!(raw.ask(M::NET_SET_MTU, &wide(&[1_500]), &[]), Some(1));
    assert_eq!(raw.ask(M::SEND_RARP, &wide(&[1_500]), &[]), Some(1));
    assert_eq!(raw.ask(M::SET_STATUS, &wide(&[1_500]), &[]), Some(1));
    port.expect("refused NET_SET_MTU: protocol feature NET_MTU was not negotiated");
    // There is no way to say no to these.
    raw.send(M::GET_STATUS, 1, &[], &[]);
    assert!(raw.is_closed());
}

#[test]
fn qemu_enables_rings_before_it_sets_features() {
    let port = Port::new();
    let mut raw = port.connect();
    raw.get(M::GET_FEATURES);
    let protocol = wide(&[SUPPORTED.bits()]);
    assert!(raw.send(M::SET_PROTOCOL_FEATURES, 1, &protocol, &[]));
    raw.must(M::SET_VRING_ENABLE, &words(&[0, 1]), &[]);
    let bits = features::VERSION_1 | features::VHOST_USER_PROTOCOL_FEATURES;
    raw.must(M::SET_FEATURES, &wide(&[bits]), &[]);
    raw.memory(1 << 20);
    raw.ring(0);
    assert!(port.recorder.was_called("start 0 base Some(0) enabled true"));
}

#[test]
fn a_second_front_end_is_turned_away_and_the_first_undisturbed() {
    let port = Port::new();
    let mut first = port.ready(1 << 20);
    for _ in 0..10 {
        assert!(port.connect().is_closed());
    }
    assert_eq!(first.get(M::GET_MAX_MEM_SLOTS), 32);
    // Also while the first is silent in the middle of a message.
    assert!(first.send_bytes(&[1], &[]));
    std::thread::sleep(Duration::from_millis(20));
    assert!(port.connect().is_closed());
}

#[test]
fn a_message_that_arrives_byte_by_byte_is_understood() {
    let port = Port::new();
    let mut raw = port.ready(1 << 20);
    raw.dribble(&Raw::bytes(M::SET_VRING_NUM.into(), 9, &words(&[0, 256])));
    assert_eq!(raw.answer(M::SET_VRING_NUM).unwrap().value(), 0);
    // With a descriptor at its first byte, too.
    let (fd, bytes) = (event(), Raw::bytes(M::SET_VRING_CALL.into(), 9, &wide(&[0])));
    assert!(raw.send_bytes(&bytes[..1], &[fd.as_fd()]));
    raw.dribble(&bytes[1..]);
    assert_eq!(raw.answer(M::SET_VRING_CALL).unwrap().value(), 0);
}

#[test]
fn a_front_end_that_goes_in_any_state_leaves_the_port_ready_for_the_next() {
    let port = Port::new();
    for state in 0..6 {
        let mut raw = port.connect();
        if state > 0 {
            raw.negotiate(features::VERSION_1);
        }
        if state > 1 {
            raw.memory(1 << 20);
        }
        if state > 2 {
            raw.ring(0);
        }
        if state > 3 {
            raw.send_bytes(&Raw::bytes(M::SET_VRING_NUM.into(), 1, &words(&[0, 256]))[..15], &[]);
        }
        if state > 4 {
            raw.stream.shutdown(std::net::Shutdown::Write).unwrap();
            assert!(raw.is_closed());
        }
        drop(raw);
        port.expect("disconnected");
        let mut seen = port.recorder.seen();
        assert!(seen.starts.is_empty() && seen.memory.is_none());
        seen.calls.clear();
    }
}

#[test]
fn stopping_a_port_ends_its_session_wherever_it_is_and_removes_the_socket() {
    for half in [false, true] {
        let mut port = Port::new();
        let mut raw = port.ready(1 << 20);
        raw.ring(0);
        if half {
            raw.send_bytes(&[1, 0, 0], &[]);
        }
        port.stop();
        assert!(raw.is_closed());
        assert!(!port.path.exists());
        assert!(port.recorder.was_called("disconnected the switch closed the port") || half);
        assert!(port.recorder.seen().starts.is_empty());
    }
}

#[test]
fn a_client_connects_again_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("front.sock");
    let recorder = Recorder::default();
    let mode = Mode::Client { retry: Duration::from_millis(5) };
    let endpoint = Endpoint { path: path.clone(), mode };
    let handle = serve(endpoint, Options::new("c0"), Box::new(recorder.clone())).unwrap();
    for _ in 0..3 {
        let listener = UnixListener::bind(&path).unwrap();
        let mut raw = Raw::new(listener.accept().unwrap().0);
        // Nobody listens when this front end goes: a socket still open would be connected to once more.
        drop(listener);
        std::fs::remove_file(&path).unwrap();
        raw.negotiate(features::VERSION_1);
        raw.memory(1 << 20);
        raw.ring(1);
        drop(raw);
    }
    handle.stop();
    let seen = recorder.seen();
    assert_eq!(seen.calls.iter().filter(|c| *c == "connected").count(), 3);
    assert_eq!(seen.calls.iter().filter(|c| c.starts_with("start 1 ")).count(), 3);
}
