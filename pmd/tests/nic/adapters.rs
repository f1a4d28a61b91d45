//! What every driver promises, against QEMU's model of each card.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use host::memory::Pages;
use pmd::dma::{Arena, ArenaOptions};
use pmd::e1000e::E1000e;
use pmd::igb::Igb;
use pmd::nic::{DeviceError, Filter, Nic, Options, ReceiveQueue, TransmitQueue};
use pmd::qtest::{Function, Machine, Wire};
use pmd::virtio_net::VirtioNet;
use port::{BurstBuffer, DropReason, Offload, RxQueue, Scratch, TagEdit, TxQueue};

use crate::frames::{LEAST, MOST, PATIENCE, Pattern, Source, gather, next, until};

const MAC: &str = "52:54:00:12:34:56";
const FRAMES: u64 = 100_000;

/// A driver, and what QEMU calls the model of its card.
trait Model {
    type Driver: Nic<Device = Function>;
    const QEMU: &str;
}

macro_rules! models {
    ($($model:ident: $driver:ident, $qemu:literal;)+) => {$(
        struct $model;
        impl Model for $model {
            type Driver = $driver<Function>;
            const QEMU: &str = $qemu;
        }
    )+};
}

models! {
    I82574: E1000e, "e1000e";
    I82576: Igb, "igb";
    VirtioSplit: VirtioNet, "virtio-net-pci,disable-legacy=on";
    VirtioPacked: VirtioNet, "virtio-net-pci,disable-legacy=on,packed=on";
    // Without mergeable buffers and indirect tables; `guest_csum` and its kind are not there, as the wire has no headers for them.
    VirtioPlain: VirtioNet, "virtio-net-pci,disable-legacy=on,mrg_rxbuf=off,indirect_desc=off";
}

macro_rules! promises {
    ($name:ident: $model:ident, $($promise:ident)+) => {
        mod $name {
            $(
                #[test]
                #[ignore = "needs QEMU: ./check nic"]
                fn $promise() {
                    super::$promise::<super::$model>();
                }
            )+
        }
    };
}

macro_rules! all_promises {
    ($name:ident: $model:ident) => {
        promises! { $name: $model,
            every_frame_that_comes_in_is_received_bit_for_bit_and_in_order
            every_frame_that_is_sent_leaves_bit_for_bit_and_in_order
            frames_go_through_in_both_directions_at_once_without_being_copied
            checksums_are_calculated_on_the_way_out_and_judged_on_the_way_in
            tags_are_inserted_replaced_and_taken_off
            only_frames_that_the_filter_lets_through_come_in
            a_link_that_goes_under_traffic_drops_what_is_sent_and_comes_back
            a_device_that_is_removed_under_traffic_takes_its_port_down_with_a_reason
            a_ring_that_is_full_drops_and_counts_and_goes_on
            frames_longer_than_the_mtu_are_dropped_on_both_sides
            an_arena_that_is_too_short_says_so_and_one_that_is_released_can_be_used_again
        }
    };
}

macro_rules! virtio_promises {
    ($name:ident: $model:ident) => {
        promises! { $name: $model,
            every_frame_that_comes_in_is_received_bit_for_bit_and_in_order
            every_frame_that_is_sent_leaves_bit_for_bit_and_in_order
            frames_go_through_in_both_directions_at_once_without_being_copied
            only_frames_that_the_filter_lets_through_come_in
            a_link_that_goes_under_traffic_drops_what_is_sent_and_comes_back
            a_device_that_is_removed_under_traffic_takes_its_port_down_with_a_reason
            frames_longer_than_the_mtu_are_dropped_on_both_sides
        }
    };
}

all_promises!(e1000e: I82574);
all_promises!(igb: I82576);
virtio_promises!(virtio_split: VirtioSplit);
virtio_promises!(virtio_packed: VirtioPacked);
promises! { virtio_plain: VirtioPlain,
    a_link_that_goes_under_traffic_drops_what_is_sent_and_comes_back
    frames_longer_than_the_mtu_are_dropped_on_both_sides
}

/// A card with its cable, ready.
struct Card<N: Model> {
    receive: <N::Driver as Nic>::Receive,
    transmit: <N::Driver as Nic>::Transmit,
    device: N::Driver,
    arena: Arc<Arena>,
    wire: Wire,
    machine: Machine,
}

impl<N: Model> Card<N> {
    fn with(options: Options) -> Self {
        let mut machine = Machine::start(&format!("{},mac={MAC}", N::QEMU)).expect("QEMU starts");
        let wire = machine.wire().unwrap();
        let arena = Arena::new(ArenaOptions::default(), machine.space()).unwrap();
        let mut opened = N::Driver::open(machine.function(), &arena, options).unwrap();
        let (receive, transmit) = (opened.receive.pop().unwrap(), opened.transmit.pop().unwrap());
        let mut device = opened.nic;
        device.wait_for_link(PATIENCE).unwrap();
        Self { receive, transmit, device, arena, wire, machine }
    }

    fn jumbo() -> Self {
        Self::with(Options { mtu: 9000, ..Options::default() })
    }

    /// Sends `frame` out.
    fn send(&mut self, frame: &[u8], offload: Offload, edit: TagEdit) {
        let mut source = Source { frames: vec![(frame.to_vec(), offload)] };
        let mut buffer = BurstBuffer::default();
        let burst = source.poll(&mut buffer);
        self.transmit.send(&burst, burst.all(), edit, &mut Scratch::default());
        self.transmit.notify();
    }

    /// Waits for a frame to come in; its bytes, offload and tag.
    fn receive(&mut self) -> (Vec<u8>, Offload, Option<u16>) {
        let mut buffer = BurstBuffer::default();
        let mut bytes = Vec::new();
        let mut found = None;
        until("a frame comes in", || {
            let burst = self.receive.poll(&mut buffer);
            if let Some(frame) = burst.frames().first() {
                assert_eq!(burst.len(), 1);
                gather(&burst, frame, &mut bytes);
                found = Some(frame.offload);
            }
            drop(burst);
            found.is_some()
        });
        (bytes, found.unwrap(), self.receive.tag(0))
    }
}

/// An IPv4 and UDP frame with `checksum` in its UDP header.
pub(crate) fn udp(payload: &[u8], checksum: u16) -> Vec<u8> {
    let mut frame = vec![0x52, 0x54, 0, 0x12, 0x34, 0x56, 2, 0, 0, 0, 0, 2, 0x08, 0x00];
    let total = 28 + payload.len() as u16;
    frame.extend_from_slice(&[
        0x45,
        0,
        (total >> 8) as u8,
        total as u8,
        0,
        0,
        0,
        0,
        64,
        17,
        0,
        0,
        10,
        0,
        0,
        1,
        10,
        0,
        0,
        2,
    ]);
    let sum = !sum(&frame[14..34], 0);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    let udp = 8 + payload.len() as u16;
    frame.extend_from_slice(&[0x12, 0x34, 0x56, 0x78, (udp >> 8) as u8, udp as u8]);
    frame.extend_from_slice(&checksum.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

/// Ones' complement sum (RFC 1071).
fn sum(bytes: &[u8], start: u32) -> u16 {
    let words = bytes.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(*w.get(1).unwrap_or(&0)));
    let mut sum = words.sum::<u32>() + start;
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Sum of the pseudo header of [`udp`] with `len` bytes of UDP.
fn pseudo(len: usize) -> u16 {
    sum(&[10, 0, 0, 1, 10, 0, 0, 2, 0, 17], len as u32)
}

fn every_frame_that_comes_in_is_received_bit_for_bit_and_in_order<N: Model>() {
    let Card { mut receive, transmit: _transmit, device: _device, wire, machine: _machine, .. } =
        Card::<N>::jumbo();
    let (pattern, received) = (Pattern::new(), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut frame = Vec::new();
            for number in 0..FRAMES {
                // At most 64 frames of five descriptors are under way: a card may drop what finds its ring of 512 full.
                until("frames are received", || number - received.load(Ordering::Relaxed) < 64);
                pattern.cycling(number, &mut frame);
                wire.send(&frame).unwrap();
            }
        });
        let (mut buffer, mut number) = (BurstBuffer::default(), 0);
        let (mut wanted, mut got) = (Vec::new(), Vec::new());
        let mut last = Instant::now();
        while number < FRAMES {
            let burst = receive.poll(&mut buffer);
            for (frame, head) in burst.frames().iter().zip(burst.heads()) {
                pattern.cycling(number, &mut wanted);
                gather(&burst, frame, &mut got);
                assert!(wanted == got, "frame {number} of {} bytes differs", wanted.len());
                let n = wanted.len().min(64);
                assert!(head.0[..n] == wanted[..n] && head.0[n..].iter().all(|&b| b == 0), "head {number}");
                number += 1;
                last = Instant::now();
            }
            drop(burst);
            received.store(number, Ordering::Relaxed);
            assert!(last.elapsed() < PATIENCE, "no frame after {number}: {:?}", receive.counters());
        }
    });
    let counters = receive.counters();
    assert_eq!((counters.frames.get(), counters.drops.sum()), (FRAMES, 0));
}

fn every_frame_that_is_sent_leaves_bit_for_bit_and_in_order<N: Model>() {
    let Card { receive: _receive, mut transmit, mut device, wire, machine: _machine, .. } =
        Card::<N>::jumbo();
    let (pattern, arrived) = (Pattern::new(), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut wanted, mut got) = (Vec::new(), Vec::new());
            for number in 0..FRAMES {
                pattern.cycling(number, &mut wanted);
                next(&wire, &mut got);
                assert!(wanted == got, "frame {number} of {} bytes differs", wanted.len());
                arrived.store(number + 1, Ordering::Relaxed);
            }
        });
        let (mut source, mut buffer, mut scratch) =
            (Source::default(), BurstBuffer::default(), Scratch::default());
        let mut number = 0;
        while number < FRAMES {
            // At most 64 frames of five descriptors are under way: the ring of 512 is never full.
            until("frames leave", || number - arrived.load(Ordering::Relaxed) <= 32);
            for _ in 0..32.min(FRAMES - number) {
                let mut frame = Vec::new();
                pattern.cycling(number, &mut frame);
                source.frames.push((frame, Offload::NONE));
                number += 1;
            }
            let burst = source.poll(&mut buffer);
            transmit.send(&burst, burst.all(), TagEdit::Keep, &mut scratch);
            drop(burst);
            transmit.notify();
        }
    });
    let counters = transmit.counters();
    assert_eq!((counters.sent.get(), counters.drops.sum(), counters.uncopied.get()), (FRAMES, 0, 0));
    let hardware = device.statistics();
    if hardware.is_empty() {
        return; // virtio has no such counters
    }
    let counted = |name| hardware.iter().find(|(n, _)| *n == name).unwrap().1;
    assert_eq!(counted("sent"), FRAMES);
    let bytes: u64 = (0..FRAMES).map(|n| LEAST as u64 + n % (MOST - LEAST + 1) as u64 + 4).sum();
    assert_eq!(counted("sent_bytes"), bytes);
}

fn frames_go_through_in_both_directions_at_once_without_being_copied<N: Model>() {
    let Card { mut receive, mut transmit, device: _device, wire, machine: _machine, .. } = Card::<N>::jumbo();
    let (pattern, arrived) = (Pattern::new(), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut frame = Vec::new();
            for number in 0..FRAMES {
                until("frames return", || number - arrived.load(Ordering::Relaxed) <= 64);
                pattern.cycling(number, &mut frame);
                wire.send(&frame).unwrap();
            }
        });
        scope.spawn(|| {
            let (mut wanted, mut got) = (Vec::new(), Vec::new());
            for number in 0..FRAMES {
                pattern.cycling(number, &mut wanted);
                next(&wire, &mut got);
                assert!(wanted == got, "frame {number} of {} bytes differs", wanted.len());
                arrived.store(number + 1, Ordering::Relaxed);
            }
        });
        let (mut buffer, mut scratch) = (BurstBuffer::default(), Scratch::default());
        let mut last = (0, Instant::now());
        while last.0 < FRAMES {
            let waiting = receive.peek();
            transmit.prepare(waiting);
            let burst = receive.poll(&mut buffer);
            transmit.send(&burst, burst.all(), TagEdit::Keep, &mut scratch);
            burst.release();
            transmit.notify();
            let done = arrived.load(Ordering::Relaxed);
            if done != last.0 {
                last = (done, Instant::now());
            }
            let counters = || (receive.counters(), transmit.counters());
            // Less than the other threads': what it tells is not lost behind their panics.
            assert!(last.1.elapsed() < PATIENCE / 2, "no frame after {done}: {:?}", counters());
        }
    });
    let (in_, out) = (receive.counters(), transmit.counters());
    assert_eq!((in_.frames.get(), in_.drops.sum(), in_.starved.get()), (FRAMES, 0, 0));
    assert_eq!((out.sent.get(), out.drops.sum(), out.uncopied.get()), (FRAMES, 0, FRAMES));
}

fn checksums_are_calculated_on_the_way_out_and_judged_on_the_way_in<N: Model>() {
    for strip_tags in [false, true] {
        checksums(Card::<N>::with(Options { strip_tags, ..Options::default() }));
    }
}

fn checksums<N: Model>(mut card: Card<N>) {
    let payload: Vec<u8> = (0..=200).collect();
    let udp_len = 8 + payload.len();
    let mut good = udp(&payload, 0);
    let sum = !sum(&good[34..], pseudo(udp_len).into());
    good[40..42].copy_from_slice(&sum.to_be_bytes());

    // Left to the device, with the pseudo header's sum in its place, as virtio has it; a tag inserted on top changes nothing.
    let open = udp(&payload, pseudo(udp_len));
    let mut out = Vec::new();
    card.send(&open, Offload::new(Offload::NEEDS_CSUM, 0, 0, 0, 34, 6), TagEdit::Keep);
    next(&card.wire, &mut out);
    assert_eq!(out, good);
    card.send(&open, Offload::new(Offload::NEEDS_CSUM, 0, 0, 0, 34, 6), TagEdit::Push(0x2064));
    next(&card.wire, &mut out);
    assert_eq!(
        (&out[..12], &out[12..16], &out[16..]),
        (&good[..12], &[0x81, 0, 0x20, 0x64][..], &good[12..])
    );

    card.wire.send(&good).unwrap();
    let (bytes, offload, _) = card.receive();
    assert_eq!((bytes, offload.flags()), (good.clone(), Offload::DATA_VALID));
    // A wrong one is somebody else's to judge: the frame is passed on without a word.
    good[41] ^= 1;
    card.wire.send(&good).unwrap();
    let (bytes, offload, _) = card.receive();
    assert_eq!((bytes, offload), (good, Offload::NONE));
    assert_eq!(card.receive.counters().errors[5].get(), 1, "tcp_udp_checksum");
}

fn tags_are_inserted_replaced_and_taken_off<N: Model>() {
    for strip_tags in [false, true] {
        tags(Card::<N>::with(Options { strip_tags, ..Options::default() }), strip_tags);
    }
}

fn tags<N: Model>(mut card: Card<N>, strips: bool) {
    let mut plain = Vec::new();
    Pattern::new().write(7, 100, &mut plain);
    let tagged = [&plain[..12], &[0x81, 0, 0xa0, 0x64], &plain[12..]].concat();
    let mut out = Vec::new();
    for (frame, edit, wanted) in [
        (&plain, TagEdit::Push(0xa064), &tagged),
        (&tagged, TagEdit::Pop, &plain),
        (&tagged, TagEdit::SetVid(0x123), &[&plain[..12], &[0x81, 0, 0xa1, 0x23], &plain[12..]].concat()),
    ] {
        card.send(frame, Offload::NONE, edit);
        next(&card.wire, &mut out);
        assert_eq!(&out, wanted, "{edit:?}");
    }
    card.wire.send(&tagged).unwrap();
    let (bytes, tag) = if strips { (&plain, Some(0xa064)) } else { (&tagged, None) };
    assert_eq!(card.receive(), (bytes.clone(), Offload::NONE, tag));
    card.wire.send(&plain).unwrap();
    assert_eq!(card.receive(), (plain, Offload::NONE, None));
}

fn only_frames_that_the_filter_lets_through_come_in<N: Model>() {
    let mut card = Card::<N>::with(Options { promiscuous: false, ..Options::default() });
    assert_eq!(card.device.mac(), [0x52, 0x54, 0, 0x12, 0x34, 0x56]);
    let own = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
    let (second, new) = ([2, 0, 0, 0, 0, 9], [2, 0, 0, 0, 0, 10]);
    let (group, other_group) = ([1, 0, 0x5e, 0, 0, 5], [1, 0, 0x5e, 0, 0x20, 6]);
    let (everyone, stranger) = ([0xff; 6], [2, 0, 0, 0, 0, 11]);
    // What comes in of one frame to each; a broadcast with another type marks the end.
    let through = |card: &mut Card<N>| {
        let mut frame = vec![0; 60];
        for to in [own, second, new, group, other_group, stranger, everyone] {
            frame[..6].copy_from_slice(&to);
            card.wire.send(&frame).unwrap();
        }
        let mut came = Vec::new();
        while came.last() != Some(&everyone) {
            let mut buffer = BurstBuffer::default();
            until("a frame comes in", || {
                let burst = card.receive.poll(&mut buffer);
                came.extend(burst.heads().iter().map(|h| <[u8; 6]>::try_from(&h.0[..6]).unwrap()));
                !burst.is_empty()
            });
        }
        came
    };
    assert_eq!(through(&mut card), [own, everyone]);
    card.device
        .set_filter(&Filter { unicast: vec![second], multicast: vec![group], ..Filter::default() })
        .unwrap();
    assert_eq!(through(&mut card), [own, second, group, everyone]);
    card.device.set_mac(new).unwrap();
    card.device.set_filter(&Filter { all_multicast: true, ..Filter::default() }).unwrap();
    assert_eq!(through(&mut card), [new, group, other_group, everyone]);
    card.device.set_filter(&Filter { promiscuous: true, ..Filter::default() }).unwrap();
    assert_eq!(through(&mut card).len(), 7);
    // More addresses than any device here compares with: it takes all.
    let many = (0..100).map(|i| [2, 0, 0, 0, 1, i]).collect();
    card.device.set_filter(&Filter { unicast: many, ..Filter::default() }).unwrap();
    assert_eq!(through(&mut card), [own, second, new, stranger, everyone]);
}

fn a_link_that_goes_under_traffic_drops_what_is_sent_and_comes_back<N: Model>() {
    let mut card = Card::<N>::with(Options::default());
    let mut frame = Vec::new();
    Pattern::new().write(1, 1000, &mut frame);
    card.send(&frame, Offload::NONE, TagEdit::Keep);
    let mut out = Vec::new();
    next(&card.wire, &mut out);
    card.machine.set_link(false).unwrap();
    until("the link goes", || !card.device.link().unwrap().up);
    card.send(&frame, Offload::NONE, TagEdit::Keep);
    let counters = card.transmit.counters();
    assert_eq!((counters.offered.get(), counters.sent.get()), (2, 1));
    assert_eq!(counters.drops.get(DropReason::PortDown), 1);
    card.machine.set_link(true).unwrap();
    until("the link comes back", || card.device.link().unwrap().up);
    card.send(&frame, Offload::NONE, TagEdit::Keep);
    next(&card.wire, &mut out);
    assert_eq!(out, frame);
    card.wire.send(&frame).unwrap();
    assert_eq!(card.receive().0, frame);
}

fn a_device_that_is_removed_under_traffic_takes_its_port_down_with_a_reason<N: Model>() {
    let mut card = Card::<N>::with(Options::default());
    let mut frame = Vec::new();
    Pattern::new().write(1, 1000, &mut frame);
    for _ in 0..50 {
        card.wire.send(&frame).unwrap();
        card.send(&frame, Offload::NONE, TagEdit::Keep);
    }
    card.machine.remove().unwrap();
    for _ in 0..50 {
        card.send(&frame, Offload::NONE, TagEdit::Keep);
    }
    let error = card.device.link().unwrap_err();
    assert!(matches!(&error, DeviceError::Down(why) if why.contains("registers read all ones")), "{error}");
    let before = card.transmit.counters().drops.get(DropReason::PortDown);
    card.send(&frame, Offload::NONE, TagEdit::Keep);
    assert_eq!(card.transmit.counters().drops.get(DropReason::PortDown), before + 1);
    assert_eq!(card.receive.peek(), 0);
    // Nothing waits for a device that is gone.
    let begin = Instant::now();
    let Card { receive, transmit, device, arena, machine: _machine, .. } = card;
    drop((device, receive, transmit));
    assert!(begin.elapsed() < Duration::from_secs(1));
    // All buffers are home again.
    let all = pmd::dma::Pool::new(&arena, ArenaOptions::default().buffers);
    assert!(all.is_ok(), "{:?}", all.err());
}

fn a_ring_that_is_full_drops_and_counts_and_goes_on<N: Model>() {
    let mut card = Card::<N>::with(Options { receive_ring: 64, transmit_ring: 64, ..Options::default() });
    let pattern = Pattern::new();
    let (mut frame, mut scratch) = (Vec::new(), Scratch::default());
    // Out: the device is not told of anything until 192 frames were given to a ring of 64.
    let (mut source, mut buffer) = (Source::default(), BurstBuffer::default());
    for burst in 0..4u64 {
        for number in 48 * burst..48 * (burst + 1) {
            let mut frame = Vec::new();
            pattern.write(number, 200, &mut frame);
            source.frames.push((frame, Offload::NONE));
        }
        let burst = source.poll(&mut buffer);
        card.transmit.send(&burst, burst.all(), TagEdit::Keep, &mut scratch);
    }
    card.transmit.notify();
    let counters = card.transmit.counters();
    assert_eq!((counters.offered.get(), counters.sent.get()), (192, 63));
    assert_eq!(counters.drops.get(DropReason::ReceiverFull), 129);
    for number in 0..63 {
        let mut wanted = Vec::new();
        pattern.write(number, 200, &mut wanted);
        next(&card.wire, &mut frame);
        assert!(frame == wanted, "frame {number}");
    }
    pattern.write(1000, 200, &mut frame);
    card.send(&frame, Offload::NONE, TagEdit::Keep);
    let mut out = Vec::new();
    next(&card.wire, &mut out);
    assert_eq!(out, frame);

    // In: nobody polls while 300 frames come; the rest waits on the wire, and nothing is lost.
    std::thread::scope(|scope| {
        let wire = &card.wire;
        scope.spawn(|| {
            let mut frame = Vec::new();
            for number in 0..300 {
                pattern.write(number, 3000 % 1518, &mut frame);
                wire.send(&frame).unwrap();
            }
        });
        std::thread::sleep(Duration::from_millis(100));
        let (mut got, mut wanted, mut number) = (Vec::new(), Vec::new(), 0);
        until("300 frames come in", || {
            let burst = card.receive.poll(&mut buffer);
            for lent in burst.frames() {
                pattern.write(number, 3000 % 1518, &mut wanted);
                gather(&burst, lent, &mut got);
                assert!(got == wanted, "frame {number}");
                number += 1;
            }
            number == 300
        });
    });
}

fn frames_longer_than_the_mtu_are_dropped_on_both_sides<N: Model>() {
    let mut card = Card::<N>::with(Options::default());
    let pattern = Pattern::new();
    let (mut fits, mut long) = (Vec::new(), Vec::new());
    pattern.write(1, 1518, &mut fits);
    pattern.write(2, 1519, &mut long);
    card.send(&long, Offload::NONE, TagEdit::Keep);
    card.send(&fits, Offload::NONE, TagEdit::Keep);
    let mut out = Vec::new();
    next(&card.wire, &mut out);
    assert_eq!(out, fits);
    assert_eq!(card.transmit.counters().drops.get(DropReason::MtuExceeded), 1);
    card.wire.send(&long).unwrap();
    card.wire.send(&fits[..1514]).unwrap();
    assert_eq!(card.receive().0, &fits[..1514]);
}

fn an_arena_that_is_too_short_says_so_and_one_that_is_released_can_be_used_again<N: Model>() {
    let machine = Machine::start(&format!("{},mac={MAC}", N::QEMU)).unwrap();
    let options =
        ArenaOptions { rings: 16 << 10, buffers: 1536, pages: Pages::Ordinary, ..ArenaOptions::default() };
    let arena = Arena::new(options, machine.space()).unwrap();
    let open = |options| N::Driver::open(machine.function(), &arena, options);
    let short = open(Options { receive_ring: 1024, ..Options::default() }).err().unwrap();
    assert!(
        short.to_string().starts_with("the arena has 1536 buffers left")
            || short.to_string().contains("0 buffers left"),
        "{short}"
    );
    let short = open(Options { transmit_ring: 1024, spare: 0, ..Options::default() }).err().unwrap();
    assert!(short.to_string().starts_with("the arena has no 16384 bytes left for a ring"), "{short}");
    for _ in 0..3 {
        let opened = open(Options::default());
        assert!(opened.is_ok(), "{:?}", opened.err());
    }
}
