//! Two Linux guests of QEMU on two ports: pings, TCP with and without offloads, a switch that dies under them.

use std::time::{Duration, Instant};

use crate::guest::{Guest, GuestOptions};
use crate::switch::Switch;

/// Bytes that each TCP transfer carries; random, so that no wrong byte goes unseen.
const TRANSFER: &str = "8M";

/// A card that neither sends nor accepts what is unsegmented or without a checksum.
const NO_OFFLOADS: &str = "csum=off,guest_csum=off,host_tso4=off,host_tso6=off,host_ecn=off,host_ufo=off,guest_tso4=off,\
                           guest_tso6=off,guest_ecn=off,guest_ufo=off,gso=off";

// Feature bits (virtio 1.3, sections 5.1.3 and 6).
const CSUM: usize = 0;
const GUEST_CSUM: usize = 1;
const GUEST_TSO4: usize = 7;
const HOST_TSO4: usize = 11;
const RING_PACKED: usize = 34;

#[test]
#[ignore = "needs QEMU and a guest image: ./check qemu"]
fn guests_with_split_rings_exchange_tcp_with_equal_and_unequal_offloads() {
    exchange("packed=off");
}

#[test]
#[ignore = "needs QEMU and a guest image: ./check qemu"]
fn guests_with_packed_rings_exchange_tcp_with_equal_and_unequal_offloads() {
    exchange("packed=on");
}

#[test]
#[ignore = "needs QEMU and a guest image: ./check qemu"]
fn a_tcp_connection_survives_a_switch_that_is_killed_and_restarted() {
    let mut switch = Switch::for_guests(2);
    let [mut one, mut two] = guests(&switch, ["", ""]);
    ping(&mut one, 2);
    // A connection that lasts: a chunk every 50 ms, 10 s in all.
    one.run("dd if=/dev/urandom of=slow bs=16k count=200 2>/dev/null");
    listen(&mut two);
    one.run("(dd if=slow bs=16k count=1 skip=0 2>/dev/null; i=1; while [ $i -lt 200 ]; do usleep 50000; dd if=slow bs=16k count=1 skip=$i 2>/dev/null; i=$((i + 1)); done) | nc 10.0.0.2 5000 & sender=$!");
    two.eventually("[ $(stat -c %s received) -gt 300000 ]", Duration::from_secs(60));
    let boots = [uptime(&mut one), uptime(&mut two)];

    switch.crash_and_restart();

    ping(&mut one, 2);
    one.run("wait $sender");
    assert_eq!(received(&mut two), checksum(&mut one, "slow"), "what arrived is not what was sent");
    assert!(uptime(&mut one) > boots[0] && uptime(&mut two) > boots[1], "a guest was rebooted");
}

#[test]
#[ignore = "needs QEMU and a guest image: ./check qemu"]
fn packed_rings_of_a_killed_switch_stop_with_a_reason_until_the_guests_reset_their_cards() {
    let mut switch = Switch::for_guests(2);
    let [mut one, mut two] = guests(&switch, ["packed=on", "packed=on"]);
    ping(&mut one, 2);

    switch.crash_and_restart();

    let end = Instant::now() + Duration::from_secs(60);
    while !switch.log().contains("packed ring cannot be resumed") {
        assert!(Instant::now() < end, "no reason given");
        std::thread::sleep(Duration::from_millis(100));
    }
    let (_, status) = one.attempt("ping -c 2 -i 0.2 -W 1 10.0.0.2", Duration::from_secs(60));
    assert_ne!(status, 0, "positions were guessed");
    for (number, guest) in [(1, &mut one), (2, &mut two)] {
        let driver = "/sys/bus/virtio/drivers/virtio_net";
        guest.run(&format!("echo virtio0 >{driver}/unbind; echo virtio0 >{driver}/bind"));
        guest.run(&format!("ip link set eth0 up; ip addr add 10.0.0.{number}/24 dev eth0"));
    }
    ping(&mut one, 2);
}

/// Pings and TCP both ways between guests with offloads, then between one with and one without.
fn exchange(rings: &str) {
    let switch = Switch::for_guests(3);
    let [mut one, mut two] = guests(&switch, [rings, rings]);
    for guest in [&mut one, &mut two] {
        assert!(negotiated(guest, GUEST_TSO4) && negotiated(guest, HOST_TSO4), "no segmentation offload");
        assert_eq!(negotiated(guest, RING_PACKED), rings == "packed=on");
    }
    one.run("ping -c 3 -i 0.2 -W 2 10.0.0.2");
    one.run("ping -c 2 -i 0.2 -W 2 -s 1472 10.0.0.2");
    transfer(&mut one, &mut two, "10.0.0.2");
    transfer(&mut two, &mut one, "10.0.0.1");
    one.run("ping6 -c 1 -W 2 fd00::2");
    transfer(&mut one, &mut two, "fd00::2");

    let card = format!("{rings},{NO_OFFLOADS}");
    let mut plain = guest(&switch, 2, &card);
    assert!(![CSUM, GUEST_CSUM, GUEST_TSO4, HOST_TSO4].into_iter().any(|bit| negotiated(&mut plain, bit)));
    ping(&mut plain, 2);
    transfer(&mut plain, &mut two, "10.0.0.2");
    transfer(&mut two, &mut plain, "10.0.0.3");
    transfer(&mut two, &mut plain, "fd00::3");
}

/// Two guests, 10.0.0.1 and 10.0.0.2, with these card properties. They boot side by side.
fn guests(switch: &Switch, cards: [&str; 2]) -> [Guest; 2] {
    let [first, second] = cards;
    std::thread::scope(|scope| {
        let second = scope.spawn(|| guest(switch, 1, second));
        [guest(switch, 0, first), second.join().unwrap()]
    })
}

/// A guest on port `port` with the addresses 10.0.0.{port + 1} and fd00::{port + 1}.
pub(crate) fn guest(switch: &Switch, port: u8, card: &str) -> Guest {
    let number = port + 1;
    let name = format!("guest{number}");
    let socket = switch.socket(port.into());
    let options = GuestOptions { name: &name, socket: &socket, mac: number, card, incoming: None };
    let mut guest = Guest::boot(switch.dir(), &options);
    guest.run("echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_dad");
    guest.run(&format!(
        "ip link set eth0 up; ip addr add 10.0.0.{number}/24 dev eth0; ip addr add fd00::{number}/64 dev eth0"
    ));
    guest
}

/// Whether the guest's driver and the switch agreed on a feature.
fn negotiated(guest: &mut Guest, bit: usize) -> bool {
    let bits = guest.run("cat /sys/bus/virtio/devices/virtio0/features");
    bits.as_bytes().get(bit) == Some(&b'1')
}

/// Waits until a guest reaches 10.0.0.{number}.
pub(crate) fn ping(guest: &mut Guest, number: u8) {
    guest.eventually(&format!("ping -c 1 -W 1 10.0.0.{number}"), Duration::from_secs(60));
}

/// Sends random bytes over TCP and compares checksums.
fn transfer(from: &mut Guest, to: &mut Guest, address: &str) {
    from.run(&format!("[ -e sent ] || dd if=/dev/urandom of=sent bs={TRANSFER} count=1 2>/dev/null"));
    listen(to);
    from.run(&format!("nc {address} 5000 <sent"));
    assert_eq!(received(to), checksum(from, "sent"), "what arrived at {address} is not what was sent");
}

/// Makes a guest receive one TCP connection into the file `received`. The receiver's input never ends, or it would close its
/// half of the connection, at which the sender's nc stops.
pub(crate) fn listen(guest: &mut Guest) {
    guest.run("rm -f received; [ -p hold ] || mkfifo hold; nc -l -p 5000 <>hold >received & receiver=$!");
    guest.eventually("netstat -ltn | grep -q :5000", Duration::from_secs(60));
}

/// The checksum of what that connection carried, when it has ended.
pub(crate) fn received(guest: &mut Guest) -> String {
    guest.run("wait $receiver");
    checksum(guest, "received")
}

pub(crate) fn checksum(guest: &mut Guest, file: &str) -> String {
    let line = guest.run(&format!("sha256sum {file}"));
    line.split_whitespace().next().expect("a checksum").to_owned()
}

/// Hundredths of seconds since the guest booted.
pub(crate) fn uptime(guest: &mut Guest) -> u64 {
    let line = guest.run("cat /proc/uptime");
    line.split_whitespace().next().unwrap().replace('.', "").parse().unwrap()
}
