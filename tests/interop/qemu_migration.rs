//! Live migration: a guest moves from one QEMU to another, each on a port of its own, while its peer keeps talking to it.
//!
//! What the switch writes while the memory is copied must be in the dirty log, or the bytes that arrived are not in the
//! guest that arrives: random bytes over TCP during the move would show it.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::guest::{Guest, GuestOptions};
use crate::qemu::{checksum, guest, listen, ping, received, uptime};
use crate::switch::Switch;

/// How long the memory is copied before the guest moves; the source is slowed down so that it takes that long.
const COPYING: Duration = Duration::from_secs(3);

#[test]
#[ignore = "needs QEMU and a guest image: ./check qemu"]
fn a_guest_with_split_rings_migrates_while_its_peer_pings_and_sends() {
    migrates("packed=off");
}

#[test]
#[ignore = "needs QEMU and a guest image: ./check qemu"]
fn a_guest_with_packed_rings_migrates_while_its_peer_pings_and_sends() {
    migrates("packed=on");
}

fn migrates(rings: &str) {
    let switch = Switch::for_guests(3);
    let mut peer = guest(&switch, 0, rings);
    let mut source = guest(&switch, 1, rings);
    ping(&mut peer, 2);
    source.run("keepsake=$(cat /proc/sys/kernel/random/boot_id)");
    let booted = uptime(&mut source);
    let incoming = switch.dir().join("migration");
    let socket = switch.socket(2);
    let card =
        GuestOptions { name: "arriving", socket: &socket, mac: 2, card: rings, incoming: Some(&incoming) };
    let mut target = Guest::start(switch.dir(), &card);

    // A ping every 200 ms and a chunk of a TCP stream every 50 ms, from before the move until after it.
    peer.run("dd if=/dev/urandom of=sent bs=16k count=200 2>/dev/null");
    listen(&mut source);
    peer.run("ping -i 0.2 -W 1 -c 75 10.0.0.2 >pings 2>&1 & pinging=$!");
    peer.run(
        "(i=0; while [ $i -lt 200 ]; do dd if=sent bs=16k count=1 skip=$i 2>/dev/null; i=$((i + 1)); usleep 50000; done) \
         | nc 10.0.0.2 5000 & sender=$!",
    );
    source.eventually("[ $(stat -c %s received) -gt 100000 ]", Duration::from_secs(60));
    source.qmp("migrate-set-parameters", json!({ "max-bandwidth": 8 << 20, "downtime-limit": 500 }));
    source.qmp("migrate", json!({ "uri": format!("unix:{}", incoming.display()) }));
    std::thread::sleep(COPYING);
    source.qmp("migrate-set-parameters", json!({ "max-bandwidth": 1_u64 << 30 }));
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let state = source.qmp("query-migrate", json!({}));
        match state["status"].as_str() {
            Some("completed") => break,
            Some("failed" | "cancelled") | None => panic!("migration: {state}"),
            Some(_) => assert!(Instant::now() < end, "the guest has not arrived after 60 s: {state}"),
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    source.ends();

    peer.run("wait $sender");
    assert_eq!(received(&mut target), checksum(&mut peer, "sent"), "what arrived is not what was sent");
    target.run("[ $keepsake = $(cat /proc/sys/kernel/random/boot_id) ]");
    assert!(uptime(&mut target) > booted, "the guest was rebooted");
    peer.run("wait $pinging");
    let pings = peer.run("tail -n 2 pings");
    let answered: u32 = pings
        .split_once(" packets received")
        .and_then(|(head, _)| head.rsplit(' ').next()?.parse().ok())
        .unwrap();
    println!("migration {rings}: {answered} of 75 pings answered");
    assert!(answered >= 60, "too many pings lost:\n{pings}");
}
