//! What a VMM finds at a port: the features that its operator left on, all the queue pairs that it may have, and a switch
//! that speaks for a guest which moved.

use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use host::memory::Pages;
use pmd::virtio_user::{Options, VirtioUser};
use switch::config::Feature;
use vhost::vhost_user::message::FrontendReq as M;
use vhost_user::ProtocolFeatures as P;
use virtio::device::Layout;
use virtio::features as f;

use crate::raw::{Raw, wide};
use crate::world::{CABLEWAY, Place, Running, eventually, port};

fn front_end(place: &Place, port: &str) -> Raw {
    Raw::new(UnixStream::connect(place.socket(port)).unwrap())
}

/// What a port offers: virtio and protocol features.
fn offered(raw: &mut Raw) -> (u64, P) {
    let virtio = raw.get(M::GET_FEATURES);
    (virtio, P::from_bits(raw.get(M::GET_PROTOCOL_FEATURES)).unwrap())
}

/// The protocol features that go with a name of `disable`.
fn protocol_of(feature: Feature) -> P {
    match feature.name() {
        "mq" => P::MQ,
        "reply_ack" => P::REPLY_ACK,
        "mem_slots" => P::CONFIGURE_MEM_SLOTS,
        "inflight" => P::INFLIGHT_SHMFD,
        "log" => P::LOG_SHMFD,
        "mtu" => P::MTU,
        "rarp" => P::RARP,
        "status" => P::STATUS,
        _ => P::empty(),
    }
}

#[test]
fn every_feature_is_offered_unless_a_port_withholds_it_and_then_that_one_is_not_taken_either() {
    let place = Place::new();
    let ports = Feature::ALL.iter().map(|feature| {
        let name = feature.name();
        port(&format!("p-{name}")) + &format!("disable = [\"{name}\"]\n")
    });
    place.write(&(port("all") + &ports.collect::<String>()));
    let _switch = Running::start(&place);

    let (all, protocol) = offered(&mut front_end(&place, "all"));
    let wanted = f::VERSION_1
        | f::NET_MRG_RXBUF
        | f::RING_INDIRECT_DESC
        | f::RING_EVENT_IDX
        | f::RING_PACKED
        | f::IN_ORDER
        | f::NET_CSUM
        | f::NET_GUEST_CSUM
        | f::NET_HOST_TSO4
        | f::NET_HOST_TSO6
        | f::NET_HOST_ECN
        | f::NET_HOST_UFO
        | f::NET_HOST_USO
        | f::NET_GUEST_TSO4
        | f::NET_GUEST_TSO6
        | f::NET_GUEST_ECN
        | f::NET_GUEST_UFO
        | f::NET_GUEST_USO4
        | f::NET_GUEST_USO6
        | f::NET_MTU
        | f::NET_STATUS
        | f::NET_MQ
        | f::NET_GUEST_ANNOUNCE
        | f::VHOST_LOG_ALL
        | f::VHOST_USER_PROTOCOL_FEATURES;
    assert_eq!(all & wanted, wanted, "{:#x} are missing", wanted & !all);
    assert_eq!(all & f::ACCESS_PLATFORM, 0, "there is no IOTLB");
    let listed = P::MQ
        | P::REPLY_ACK
        | P::CONFIGURE_MEM_SLOTS
        | P::INFLIGHT_SHMFD
        | P::LOG_SHMFD
        | P::MTU
        | P::RARP
        | P::STATUS;
    assert!(protocol.contains(listed), "{protocol:?}");

    let mut withheld = (0, P::empty());
    for feature in Feature::ALL {
        let (name, bits, protocol_bits) = (feature.name(), feature.virtio_bits(), protocol_of(*feature));
        let mut raw = front_end(&place, &format!("p-{name}"));
        let found = offered(&mut raw);
        assert_eq!(found, (all & !bits, protocol - protocol_bits), "{name}");
        withheld = (withheld.0 | bits, withheld.1 | protocol_bits);
        // Who acknowledges it all the same is refused: the port says why.
        let taken = if bits != 0 {
            raw.send(M::SET_FEATURES, 1, &wide(&[all]), &[])
        } else {
            raw.send(M::SET_PROTOCOL_FEATURES, 1, &wide(&[protocol.bits()]), &[])
        };
        assert!(taken && raw.is_closed(), "{name}");
    }
    // There is a name for each of them, except for what makes a session a session.
    assert_eq!(wanted & !withheld.0, f::VHOST_USER_PROTOCOL_FEATURES);
    assert_eq!(listed - withheld.1, P::empty());
}

/// A frame of flow `flow` from one device to another.
fn frame(flow: u8) -> [u8; 64] {
    let mut frame = [0x5a; 64];
    frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, 0xb, 2, 0, 0, 0, 0, 0xa, 8, 0]);
    frame[14..34].copy_from_slice(&[0x45, 0, 0, 50, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame[34..42].copy_from_slice(&[0x80, flow, 0x80, 0, 0, 30, 0, 0]);
    frame
}

#[test]
fn all_of_128_queue_pairs_carry_frames_although_a_process_is_given_few_descriptors_at_first() {
    for layout in [Layout::Split, Layout::Packed] {
        let place = Place::new();
        place.write(&(port("a") + "queue_pairs = 128\n" + &port("b") + "queue_pairs = 128\n"));
        // 1024, as a login session or a service has it: two such guests bring more than that.
        let mut shell = Command::new("sh");
        shell.args(["-c", "ulimit -Sn 1024; exec \"$@\"", "sh", CABLEWAY]).arg("switch").arg(place.file());
        shell.arg("--run-dir").arg(place.run_dir());
        let _switch = Running::start_command(&place, shell.process_group(0));
        let open = |name: &str, last: u8| {
            let mac = [2, 0, 0, 0, 0, last];
            let (buffers, pages) = (128 * 2 * 16, Pages::Ordinary);
            let options = Options {
                mac,
                layout,
                queue_pairs: 128,
                queue_size: 16,
                buffers,
                pages,
                timeout: Duration::from_secs(60),
                ..Options::default()
            };
            VirtioUser::open(&place.socket(name), options).unwrap()
        };
        let (mut to, mut from) = (open("b", 0xb), open("a", 0xa));
        let rings = |name: &str| {
            let ports = place.json(&["ports"]);
            let port = ports["ports"].as_array().unwrap().iter().find(|p| p["name"] == name).unwrap();
            port["rings"].as_array().unwrap().iter().filter(|r| r["enabled"] == true).count()
        };
        eventually("all rings run", || rings("a") == 256 && rings("b") == 256);

        for (flow, queue) in (0..).zip(from.queue_pairs()) {
            let mut buffer = queue.allocate().unwrap();
            queue.set_len(&mut buffer, 64);
            queue.write(&mut buffer, 0, &frame(flow));
            queue.transmit(&mut vec![buffer]);
        }
        // One frame from each transmit ring; each flow is in the receive ring that it always has.
        let (mut seen, mut used) = ([0; 128], 0);
        let end = Instant::now() + Duration::from_secs(60);
        let mut got = Vec::new();
        let mut by_queue = [false; 128];
        while seen.contains(&0) {
            assert!(Instant::now() < end, "{layout:?}: {seen:?}");
            for (queue, used) in to.queue_pairs().iter_mut().zip(&mut by_queue) {
                queue.receive(&mut got, 16);
                for buffer in got.drain(..) {
                    let mut bytes = [0; 64];
                    queue.read(&buffer, 0, &mut bytes);
                    queue.free(buffer);
                    assert_eq!(bytes, frame(bytes[35]));
                    seen[usize::from(bytes[35])] += 1;
                    *used = true;
                }
            }
        }
        used += by_queue.iter().filter(|used| **used).count();
        assert_eq!(seen, [1; 128]);
        assert!(used > 50, "{layout:?}: 128 flows are in {used} of 128 rings");
        let stats = place.json(&["stats"]);
        let counted = stats["ports"][0]["rx"].as_array().unwrap().iter().filter(|q| q["received"] == 1);
        assert_eq!(counted.count(), 128);
    }
}

#[test]
fn a_guest_that_moved_is_announced_by_a_rarp_that_is_accounted_for() {
    let place = Place::new();
    place.write(&(port("a") + &port("b") + &port("c")));
    let _switch = Running::start(&place);
    let mut to =
        VirtioUser::open(&place.socket("b"), Options { pages: Pages::Ordinary, ..Options::default() })
            .unwrap();
    let mut raw = front_end(&place, "a");
    raw.negotiate(f::VERSION_1);
    raw.must(M::SEND_RARP, &[2, 0, 0, 0, 0, 7, 0, 0], &[]);

    let queue = &mut to.queue_pairs()[0];
    let mut got = Vec::new();
    eventually("it arrives", || queue.receive(&mut got, 8) > 0);
    let mut bytes = [0; 60];
    assert_eq!((got.len(), got[0].len()), (1, 60));
    queue.read(&got[0], 0, &mut bytes);
    got.drain(..).for_each(|buffer| queue.free(buffer));
    assert_eq!(bytes[..14], [255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 7, 0x80, 0x35]);
    let fdb = place.json(&["fdb", "--port", "a"]);
    assert_eq!(fdb["entries"][0]["address"], "02:00:00:00:00:07");
    // Two copies: one was sent, for the other nobody is there.
    let totals = place.json(&["stats"])["totals"].clone();
    let total = |key: &str| totals[key].as_u64().unwrap();
    assert_eq!(
        (total("received"), total("replicas"), total("sent"), total("dropped")),
        (0, 2, 1, 1),
        "{totals}"
    );
}
