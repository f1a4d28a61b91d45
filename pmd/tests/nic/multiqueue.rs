//! virtio-net with several queue pairs, on an interface of this host, which has as many. Takes root and /dev/net/tun.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pmd::dma::{Arena, ArenaOptions};
use pmd::nic::{Nic, Options, ReceiveQueue, TransmitQueue};
use pmd::qtest::{Function, Machine, Tap};
use pmd::virtio_net::{Receive, Transmit, VirtioNet};
use port::{BurstBuffer, Offload, RxQueue, Scratch, TagEdit, TxQueue};

use crate::adapters::udp;
use crate::frames::{LEAST, MOST, PATIENCE, Pattern, Source, gather, until};

const FRAMES: u64 = 100_000;
const PAIRS: usize = 2;
/// Flows, by turns.
const FLOWS: u64 = 16;
const UDP: usize = 42;

const SPLIT: &str = "virtio-net-pci,disable-legacy=on,mq=on,vectors=6";
const PACKED: &str = "virtio-net-pci,disable-legacy=on,mq=on,vectors=6,packed=on";

struct Card {
    nic: VirtioNet<Function>,
    receive: Vec<Receive<Function>>,
    transmit: Vec<Transmit<Function>>,
    tap: Tap,
    machine: Machine,
}

/// A card with two pairs; none where a tap cannot be made, and why.
fn card(model: &str) -> Option<Card> {
    // SAFETY: it cannot fail.
    if unsafe { libc::geteuid() } != 0 || !std::path::Path::new("/dev/net/tun").exists() {
        println!("skipped: needs root and /dev/net/tun, for a tap with two queues: sudo ./check nic");
        return None;
    }
    let (machine, tap) = Machine::start_with_tap(model, PAIRS as u16).unwrap();
    let options = ArenaOptions { rings: 1 << 20, buffers: 8192, ..ArenaOptions::default() };
    let arena = Arena::new(options, machine.space()).unwrap();
    let options = Options { queues: PAIRS as u16, mtu: 9000, ..Options::default() };
    let mut opened = VirtioNet::<Function>::open(machine.function(), &arena, options).unwrap();
    opened.nic.wait_for_link(PATIENCE).unwrap();
    assert_eq!((opened.receive.len(), opened.transmit.len()), (PAIRS, PAIRS));
    let (nic, receive, transmit) = (opened.nic, opened.receive, opened.transmit);
    Some(Card { nic, receive, transmit, tap, machine })
}

/// Frame `number` of flow `number % FLOWS`: its size cycles, and its every byte follows from its number. The sum of the
/// IP header is left out, as nobody takes the packet.
fn numbered(pattern: &Pattern, number: u64, frame: &mut Vec<u8>) {
    let len = LEAST + number as usize % (MOST - LEAST + 1);
    pattern.write(number, len, frame);
    let mut head = udp(&[], 0);
    head[14 + 2..14 + 4].copy_from_slice(&((len - 14) as u16).to_be_bytes());
    head[34..36].copy_from_slice(&(1000 + 7 * (number % FLOWS) as u16).to_be_bytes());
    head[38..40].copy_from_slice(&((len - 34) as u16).to_be_bytes());
    head.extend_from_slice(&number.to_be_bytes());
    frame[..head.len()].copy_from_slice(&head);
}

/// The number of a frame of ours.
fn number(frame: &[u8]) -> Option<u64> {
    let ours =
        frame.get(..6) == Some(&[0x52, 0x54, 0, 0x12, 0x34, 0x56]) && frame.get(12..14) == Some(&[8, 0]);
    let number = frame.get(UDP..UDP + 8).filter(|_| ours)?;
    Some(u64::from_be_bytes(number.try_into().ok()?))
}

/// What has to come, flow by flow: by several queues, frames of different flows may overtake each other.
struct Expected {
    next: Vec<u64>,
    pattern: Pattern,
    wanted: Vec<u8>,
    came: u64,
}

impl Expected {
    fn new() -> Self {
        Self { next: (0..FLOWS).collect(), pattern: Pattern::new(), wanted: Vec::new(), came: 0 }
    }

    /// Whether that is one of ours; it is the next of its flow, bit for bit, or that is the end.
    fn takes(&mut self, frame: &[u8]) -> bool {
        let Some(number) = number(frame) else { return false };
        let next = &mut self.next[(number % FLOWS) as usize];
        assert_eq!(*next, number, "the next of its flow");
        *next += FLOWS;
        numbered(&self.pattern, number, &mut self.wanted);
        assert!(self.wanted == frame, "frame {number} of {} bytes differs", self.wanted.len());
        self.came += 1;
        true
    }
}

fn send(queue: &mut Transmit<Function>, frames: Vec<Vec<u8>>) {
    let mut source = Source { frames: frames.into_iter().map(|frame| (frame, Offload::NONE)).collect() };
    let mut buffer = BurstBuffer::default();
    let burst = source.poll(&mut buffer);
    queue.send(&burst, burst.all(), TagEdit::Keep, &mut Scratch::default());
    drop(burst);
    queue.notify();
}

fn frames_come_in_by_two_queues_bit_for_bit_and_each_flow_in_order(model: &str) {
    let Some(Card { nic: _nic, mut receive, transmit: _transmit, tap, machine: _machine }) = card(model)
    else {
        return;
    };
    let received = AtomicU64::new(0);
    let mut by_queue = [0u64; PAIRS];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (pattern, mut frame) = (Pattern::new(), Vec::new());
            for number in 0..FRAMES {
                // At most 64 frames of five descriptors are under way: nobody on the way has to drop any.
                until("frames are received", || number - received.load(Ordering::Relaxed) < 64);
                numbered(&pattern, number, &mut frame);
                tap.send(&frame).unwrap();
            }
        });
        let (mut buffer, mut bytes, mut expected) = (BurstBuffer::default(), Vec::new(), Expected::new());
        while expected.came < FRAMES {
            let before = expected.came;
            until("frames come in", || {
                for (queue, counted) in receive.iter_mut().zip(&mut by_queue) {
                    let burst = queue.poll(&mut buffer);
                    for frame in burst.frames() {
                        gather(&burst, frame, &mut bytes);
                        *counted += u64::from(expected.takes(&bytes));
                    }
                }
                expected.came > before
            });
            received.store(expected.came, Ordering::Relaxed);
        }
    });
    println!("received by queue: {by_queue:?}");
    assert!(by_queue.iter().all(|&frames| frames >= FRAMES / 16), "{by_queue:?}");
    assert!(receive.iter().all(|queue| queue.counters().drops.sum() == 0));
}

fn frames_leave_by_two_queues_bit_for_bit_and_each_flow_in_order(model: &str) {
    let Some(Card { nic: _nic, receive: _receive, mut transmit, tap, machine: _machine }) = card(model)
    else {
        return;
    };
    let arrived = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut expected, mut frame) = (Expected::new(), Vec::new());
            while expected.came < FRAMES {
                frame.resize(16 << 10, 0);
                let len = tap.receive(&mut frame, PATIENCE).unwrap().expect("a frame within a minute");
                frame.truncate(len);
                expected.takes(&frame);
                arrived.store(expected.came, Ordering::Relaxed);
            }
        });
        let pattern = Pattern::new();
        let mut number = 0;
        while number < FRAMES {
            until("frames leave", || number - arrived.load(Ordering::Relaxed) <= 32);
            // Of each pair of flows one by each queue.
            let mut bursts: [Vec<Vec<u8>>; PAIRS] = Default::default();
            for _ in 0..32.min(FRAMES - number) {
                let mut frame = Vec::new();
                numbered(&pattern, number, &mut frame);
                bursts[(number % FLOWS) as usize % PAIRS].push(frame);
                number += 1;
            }
            for (queue, frames) in transmit.iter_mut().zip(bursts) {
                send(queue, frames);
            }
        }
    });
    for queue in &transmit {
        let counters = queue.counters();
        assert_eq!((counters.sent.get(), counters.drops.sum()), (FRAMES / PAIRS as u64, 0));
    }
}

/// The device's own queues are told apart: a flow comes in by the pair that it was last sent by.
fn a_flow_comes_in_by_the_pair_that_it_leaves_by(model: &str) {
    let Some(Card { nic: mut card, mut receive, mut transmit, tap, machine: _machine }) = card(model) else {
        return;
    };
    let (mut buffer, mut bytes) = (BurstBuffer::default(), Vec::new());
    let pattern = Pattern::new();
    let mut came: VecDeque<usize> = VecDeque::new();
    for round in 0..8u64 {
        for flow in 0..FLOWS {
            let pair = (flow + round) as usize % PAIRS;
            let mut frame = Vec::new();
            numbered(&pattern, flow, &mut frame);
            // The kernel forgets which queue it was after three seconds, which may pass on a busy machine: another try then.
            until("a flow comes in by the pair that it left by", || {
                send(&mut transmit[pair], vec![frame.clone()]);
                let mut seen = vec![0; 16 << 10];
                while let Some(len) = tap.receive(&mut seen, Duration::from_secs(10)).unwrap() {
                    if number(&seen[..len]) == Some(flow) {
                        break;
                    }
                }
                tap.send(&frame).unwrap();
                until("it comes in", || {
                    for (queue, receive) in receive.iter_mut().enumerate() {
                        let burst = receive.poll(&mut buffer);
                        for frame in burst.frames() {
                            gather(&burst, frame, &mut bytes);
                            came.extend(number(&bytes).is_some().then_some(queue));
                        }
                    }
                    !came.is_empty()
                });
                came.pop_front() == Some(pair)
            });
        }
    }
    assert!(receive.iter().all(|queue| queue.counters().frames.get() >= 8 * FLOWS / PAIRS as u64));
    assert!(card.link().unwrap().up);
}

macro_rules! multiqueue {
    ($($name:ident: $promise:ident, $model:ident;)+) => {$(
        #[test]
        #[ignore = "needs QEMU and root: ./check nic"]
        fn $name() {
            $promise($model);
        }
    )+};
}

multiqueue! {
    split_frames_come_in: frames_come_in_by_two_queues_bit_for_bit_and_each_flow_in_order, SPLIT;
    packed_frames_come_in: frames_come_in_by_two_queues_bit_for_bit_and_each_flow_in_order, PACKED;
    split_frames_leave: frames_leave_by_two_queues_bit_for_bit_and_each_flow_in_order, SPLIT;
    packed_frames_leave: frames_leave_by_two_queues_bit_for_bit_and_each_flow_in_order, PACKED;
    split_pairs_are_told_apart: a_flow_comes_in_by_the_pair_that_it_leaves_by, SPLIT;
    packed_pairs_are_told_apart: a_flow_comes_in_by_the_pair_that_it_leaves_by, PACKED;
}

#[test]
#[ignore = "needs QEMU: ./check nic"]
fn a_device_with_one_pair_is_used_with_that() {
    // `mq=on` and a wire of one queue: the device has one pair, and a control queue behind it.
    for model in ["virtio-net-pci,disable-legacy=on,mq=on", "virtio-net-pci,disable-legacy=on,ctrl_vq=off"] {
        let mut machine = Machine::start(model).unwrap();
        let wire = machine.wire().unwrap();
        let arena = Arena::new(ArenaOptions::default(), machine.space()).unwrap();
        let options = Options { queues: 4, ..Options::default() };
        let mut card = VirtioNet::<Function>::open(machine.function(), &arena, options).unwrap();
        card.nic.wait_for_link(PATIENCE).unwrap();
        assert_eq!((card.receive.len(), card.transmit.len()), (1, 1));
        let mut buffer = BurstBuffer::default();
        wire.send(&udp(b"one", 0)).unwrap();
        until("a frame comes in", || card.receive[0].poll(&mut buffer).len() == 1);
    }
}
