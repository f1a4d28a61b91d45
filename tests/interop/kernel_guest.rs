//! A guest and a tap on one switch: our own front end talks to the kernel's network stack in a namespace.

use std::time::{Duration, Instant};

use pmd::virtio_user::{Options, QueuePair, VirtioUser};
use virtio::features;
use virtio::net::NetHeader;

use super::namespaces::Namespace;
use super::switch::{Switch, conserved, sum};

const GUEST: [u8; 6] = [0x02, 0, 0, 0, 0, 0x07];
const GUEST_IP: [u8; 4] = [198, 51, 100, 7];
const KERNEL_IP: [u8; 4] = [198, 51, 100, 1];

/// How many echo requests are sent, and with how many bytes of payload: more than a receive buffer holds.
const ECHOES: u16 = 500;
const PAYLOAD: usize = 1_400;

fn ethernet(to: [u8; 6], kind: u16, payload: &[u8]) -> Vec<u8> {
    [&to[..], &GUEST, &kind.to_be_bytes(), payload].concat()
}

/// RFC 826: who has the kernel's address?
fn who_has() -> Vec<u8> {
    let body = [&[0, 1, 8, 0, 6, 4, 0, 1][..], &GUEST, &GUEST_IP, &[0; 6], &KERNEL_IP].concat();
    ethernet([0xff; 6], 0x0806, &body)
}

fn checksum(bytes: &[u8]) -> [u8; 2] {
    let sum: u32 = bytes.chunks(2).map(|c| u32::from(c[0]) << 8 | u32::from(*c.get(1).unwrap_or(&0))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    (!((folded & 0xffff) + (folded >> 16)) as u16).to_be_bytes()
}

/// RFC 791 and 792: an echo request number `n`; without its ICMP checksum if the receiver is to fill it in.
fn echo(to: [u8; 6], n: u16, finished: bool) -> Vec<u8> {
    let payload: Vec<u8> = (0..PAYLOAD).map(|i| (i as u16 ^ n) as u8).collect();
    let mut icmp = [&[8, 0, 0, 0, 0, 7][..], &n.to_be_bytes(), &payload].concat();
    if finished {
        let sum = checksum(&icmp);
        icmp[2..4].copy_from_slice(&sum);
    }
    let len = (20 + icmp.len() as u16).to_be_bytes();
    let mut ip = [&[0x45, 0][..], &len, &[0, 0, 0x40, 0, 64, 1, 0, 0], &GUEST_IP, &KERNEL_IP].concat();
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum);
    ethernet(to, 0x0800, &[ip, icmp].concat())
}

fn send(pair: &mut QueuePair, frame: &[u8], header: NetHeader) {
    let end = Instant::now() + Duration::from_secs(60);
    let mut buffer = loop {
        if let Some(buffer) = pair.allocate() {
            break buffer;
        }
        assert!(Instant::now() < end, "no buffer comes back");
        pair.receive(&mut Vec::new(), 0);
    };
    pair.set_len(&mut buffer, frame.len());
    pair.write(&mut buffer, 0, frame);
    pair.set_header(&mut buffer, header);
    let mut frames = vec![buffer];
    while !frames.is_empty() {
        assert!(Instant::now() < end, "the switch takes nothing");
        pair.transmit(&mut frames);
    }
}

/// The next frame of this type that comes in.
fn receive(pair: &mut QueuePair, kind: u16) -> Vec<u8> {
    let end = Instant::now() + Duration::from_secs(60);
    let mut frames = Vec::new();
    loop {
        assert!(Instant::now() < end, "no answer of type {kind:#06x}");
        pair.receive(&mut frames, 1);
        let Some(buffer) = frames.pop() else {
            std::thread::yield_now();
            continue;
        };
        let mut bytes = vec![0; buffer.len()];
        pair.read(&buffer, 0, &mut bytes);
        pair.free(buffer);
        if bytes.get(12..14) == Some(&kind.to_be_bytes()) {
            return bytes;
        }
    }
}

#[test]
#[ignore = "needs root, namespaces: ./check kernel"]
fn the_kernel_answers_a_guest_byte_for_byte_through_a_tap() {
    let tap = format!("cwtg{}", std::process::id() % 1_000_000);
    let switch = Switch::of_text(&format!(
        "[switch]\nworkers = [1]\nidle = \"sleep\"\n[[port]]\nname = \"guest\"\nkind = \"vhost-user\"\nsocket = \"v0.sock\"\n\
         [[port]]\nname = \"host\"\nkind = \"tap\"\ndevice = \"{tap}\"\n"
    ));
    let host = Namespace::new("h");
    host.takes(&tap, "198.51.100.1");
    for offload in [false, true] {
        let wanted = if offload { features::NET_CSUM | features::NET_GUEST_CSUM } else { 0 };
        let plain = Options::default();
        let options = Options { mac: GUEST, features: plain.features | wanted, ..plain };
        let mut device = VirtioUser::open(&switch.socket(0), options).unwrap();
        switch.waits_for_state("guest", "up", "");
        let pair = &mut device.queue_pairs()[0];
        send(pair, &who_has(), NetHeader::PLAIN);
        let answer = receive(pair, 0x0806);
        let kernel: [u8; 6] = answer[6..12].try_into().unwrap();
        assert_eq!((&answer[..6], &answer[28..32]), (&GUEST[..], &KERNEL_IP[..]));
        for n in 0..ECHOES {
            // ICMP has no pseudo-header: the field that is left holds zero.
            let header =
                if offload { NetHeader([1, 0, 0, 0, 0, 0, 34, 0, 2, 0, 0, 0]) } else { NetHeader::PLAIN };
            send(pair, &echo(kernel, n, !offload), header);
            let answer = receive(pair, 0x0800);
            let request = echo(kernel, n, true);
            assert_eq!((answer[34], &answer[38..]), (0, &request[38..]), "echo {n}");
            assert_eq!(checksum(&answer[34..]), [0, 0], "echo {n}");
        }
    }
    let stats = switch.settled();
    let (_, dropped) = conserved(&stats);
    assert!(dropped < 20, "{stats}");
    assert!(sum(&stats, "host", "tx", "sent") >= 2 * u64::from(ECHOES), "{stats}");
}
