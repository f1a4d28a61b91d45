//! Several queues of one card: frames are spread over them by flow, and each can be sent on.

use std::collections::BTreeMap;

use pmd::dma::{Arena, ArenaOptions};
use pmd::igb::Igb;
use pmd::nic::{DeviceError, Nic, Options, ReceiveQueue, TransmitQueue};
use pmd::qtest::{Function, Machine};
use port::{BurstBuffer, Offload, RxQueue, Scratch, TagEdit, TxQueue};

use crate::adapters::udp;
use crate::frames::{PATIENCE, Source, gather, next, until};

const QUEUES: u16 = 4;
const FLOWS: u16 = 64;
const EACH: u8 = 20;

#[test]
#[ignore = "needs QEMU: ./check nic"]
fn frames_of_a_flow_come_in_by_one_queue_in_order_and_flows_by_all_queues() {
    let mut machine = Machine::start("igb").unwrap();
    let wire = machine.wire().unwrap();
    let arena = Arena::new(ArenaOptions::default(), machine.space()).unwrap();
    let options = Options { queues: QUEUES, ..Options::default() };
    let mut card = Igb::<Function>::open(machine.function(), &arena, options).unwrap();
    card.nic.wait_for_link(PATIENCE).unwrap();

    // Which queue a flow came by, and how many of its frames.
    let mut flows: BTreeMap<u16, (usize, u8)> = BTreeMap::new();
    let (mut buffer, mut bytes) = (BurstBuffer::default(), Vec::new());
    for round in 0..EACH {
        for flow in 0..FLOWS {
            let mut frame = udp(&[round; 40], 0);
            frame[34..36].copy_from_slice(&(1000 + 7 * flow).to_be_bytes());
            wire.send(&frame).unwrap();
        }
        let mut came = 0;
        until("the frames of a round come in", || {
            for (number, queue) in card.receive.iter_mut().enumerate() {
                let burst = queue.poll(&mut buffer);
                for frame in burst.frames() {
                    gather(&burst, frame, &mut bytes);
                    let flow = u16::from_be_bytes([bytes[34], bytes[35]]);
                    let seen = flows.entry(flow).or_insert((number, 0));
                    assert_eq!(*seen, (number, bytes[42]), "flow {flow}: queue, and frames before");
                    seen.1 += 1;
                    came += 1;
                }
            }
            came == FLOWS
        });
    }
    let by_queue = |n| flows.values().filter(|(queue, _)| *queue == n).count();
    let spread: Vec<_> = (0..usize::from(QUEUES)).map(by_queue).collect();
    assert_eq!((flows.len(), spread.iter().sum::<usize>()), (64, 64));
    assert!(spread.iter().all(|&flows| flows >= 4), "{spread:?}");
    let counted = card.receive.iter().map(|queue| queue.counters().frames.get()).sum::<u64>();
    assert_eq!(counted, u64::from(FLOWS) * u64::from(EACH));

    // Each transmit queue is one of its own.
    for (number, queue) in (0u8..).zip(&mut card.transmit) {
        let mut source = Source { frames: vec![(udp(&[number; 100], 0), Offload::NONE)] };
        let burst = source.poll(&mut buffer);
        queue.send(&burst, burst.all(), TagEdit::Keep, &mut Scratch::default());
        drop(burst);
        queue.notify();
        next(&wire, &mut bytes);
        assert_eq!(bytes, udp(&[number; 100], 0));
        assert_eq!(queue.counters().sent.get(), 1);
    }
}

#[test]
#[ignore = "needs QEMU: ./check nic"]
fn more_queues_than_a_card_has_are_refused() {
    let machine = Machine::start("igb").unwrap();
    let arena = Arena::new(ArenaOptions::default(), machine.space()).unwrap();
    for queues in [0, 17] {
        let options = Options { queues, ..Options::default() };
        let error = Igb::<Function>::open(machine.function(), &arena, options).err().unwrap();
        assert!(matches!(error, DeviceError::Queues { .. }), "{error}");
    }
}
