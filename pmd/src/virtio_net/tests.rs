//! The driver against a device that lies: in its rings, and in the headers of what it hands over.

use std::sync::Arc;

use host::memory::Pages;
use port::{BurstBuffer, RxQueue, Scratch, TagEdit, TxQueue};
use proptest::prelude::*;
use virtio::features as f;

use super::standin::{Answer, SIZE, Standin};
use super::*;
use crate::dma::{ArenaOptions, BUFFER};
use crate::intel::standin::Identity;
use crate::nic::{ReceiveQueue, TransmitQueue};

const BUFFERS: u32 = 400;

/// What needs the control queue.
const CONTROL: u64 =
    f::NET_CTRL_VQ | f::NET_CTRL_RX | f::NET_CTRL_RX_EXTRA | f::NET_CTRL_MAC_ADDR | f::NET_MQ;

/// A device that nobody has opened, and memory for it.
fn closed(packed: bool, more: u64) -> (Arc<Standin>, Arc<Arena>) {
    let space = Arc::new(Identity::default());
    let options = ArenaOptions { rings: 256 << 10, buffers: BUFFERS, pages: Pages::Ordinary, node: None };
    let arena = Arena::new(options, space.clone()).unwrap();
    let features = f::VERSION_1 | f::NET_MAC | f::NET_STATUS | f::RING_INDIRECT_DESC | f::NET_CSUM;
    let packed = if packed { f::RING_PACKED } else { 0 };
    (Standin::new(&space, features | packed | more), arena)
}

fn options(queues: u16) -> Options {
    Options { queues, receive_ring: 64, transmit_ring: 64, spare: 8, ..Options::default() }
}

struct World {
    card: Arc<Standin>,
    opened: Opened<VirtioNet<Standin>>,
    arena: Arc<Arena>,
    packed: bool,
    /// How far the device is in each ring.
    used: [u16; 2],
}

impl World {
    fn new(packed: bool, mergeable: bool) -> Self {
        let (card, arena) = closed(packed, if mergeable { f::NET_MRG_RXBUF } else { 0 });
        let opened = VirtioNet::open(card.clone(), &arena, options(1)).unwrap();
        Self { card, opened, arena, packed, used: [0; 2] }
    }

    /// With a control queue and two pairs.
    fn with_control(packed: bool) -> Self {
        let (card, arena) = closed(packed, CONTROL);
        let opened = VirtioNet::open(card.clone(), &arena, options(2)).unwrap();
        Self { card, opened, arena, packed, used: [0; 2] }
    }

    /// The orders that the device was given since this was last asked.
    fn orders(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.card.state.lock().unwrap().orders)
    }

    fn at<T>(&self, queue: usize, area: usize, offset: usize) -> *mut T {
        let base = self.card.state.lock().unwrap().areas[queue][area];
        std::ptr::with_exposed_provenance_mut::<u8>(base as usize).wrapping_add(offset).cast()
    }

    fn read<T: Copy>(&self, queue: usize, area: usize, offset: usize) -> T {
        // SAFETY: inside of an area of the ring, which the driver keeps while it has the device.
        unsafe { self.at::<T>(queue, area, offset).read_volatile() }
    }

    fn write<T>(&self, queue: usize, area: usize, offset: usize, value: T) {
        // SAFETY: as above.
        unsafe { self.at::<T>(queue, area, offset).write_volatile(value) }
    }

    /// The device uses the next buffer of `queue`, or another one that it names, with `len` bytes.
    fn use_one(&mut self, queue: usize, other: Option<u16>, len: u32) {
        let used = self.used[queue];
        let slot = usize::from(used % SIZE);
        self.used[queue] = used.wrapping_add(1);
        if self.packed {
            let word: u64 = self.read(queue, 0, 16 * slot + 8);
            let id = other.unwrap_or((word >> 32) as u16);
            let flags = if (used / SIZE).is_multiple_of(2) { 0x8080u64 } else { 0 };
            let word = u64::from(len) | u64::from(id) << 32 | flags << 48;
            self.write(queue, 0, 16 * slot + 8, word);
        } else {
            let head: u16 = self.read(queue, 1, 4 + 2 * slot);
            self.write(queue, 2, 4 + 8 * slot, u32::from(other.unwrap_or(head)));
            self.write(queue, 2, 8 + 8 * slot, len);
            self.write(queue, 2, 2, self.used[queue]);
        }
    }

    /// The header of the next buffer that is received: flags and kinds, lengths, and how many buffers.
    fn header(&self, words: [u32; 3]) {
        let slot = usize::from(self.used[0] % SIZE);
        let index = if self.packed { slot } else { usize::from(self.read::<u16>(0, 1, 4 + 2 * slot) % SIZE) };
        let address: u64 = self.read(0, 0, 16 * index);
        if self.arena.view().buffer_of(std::ptr::with_exposed_provenance(address as usize)).is_some() {
            let at = std::ptr::with_exposed_provenance_mut::<[u32; 3]>(address as usize);
            // SAFETY: the device was given this buffer, of which the header is the beginning.
            unsafe { at.write_unaligned(words) };
        }
    }

    fn all_home(self) -> bool {
        let Self { opened, arena, .. } = self;
        drop(opened);
        Pool::new(&arena, BUFFERS).is_ok()
    }
}

#[test]
fn a_device_that_uses_what_it_has_not_stops_its_port_with_a_reason() {
    for packed in [false, true] {
        for (id, len, said) in [
            (Some(0x4242), 72, "names buffer 16962, which the device does not have"),
            (None, 5000, "claims 5000 bytes written"),
            (None, 11, "a frame of 1 buffers and 11 bytes in the first"),
        ] {
            let mut world = World::new(packed, true);
            world.header([0, 0, 1 << 16]);
            world.use_one(0, id, len);
            let mut buffer = BurstBuffer::default();
            assert_eq!(world.opened.receive[0].poll(&mut buffer).len(), 0);
            let reason = world.opened.nic.link().unwrap_err().to_string();
            assert!(reason.contains(said), "packed {packed}: {reason}");
            assert!(world.all_home());
        }
    }
}

#[test]
fn a_link_that_never_comes_is_waited_for_no_longer_than_was_said() {
    let mut world = World::new(false, true);
    world.card.state.lock().unwrap().no_link = true;
    let error = world.opened.nic.wait_for_link(Duration::from_secs(2)).unwrap_err();
    assert_eq!(error.to_string(), "status.LINK_UP: wanted 0x1, read 0x0 for 2s");
    assert!(!world.opened.nic.link().unwrap().up);
}

#[test]
fn a_reset_that_never_ends_keeps_a_device_from_starting_and_from_memory() {
    let world = World::new(true, true);
    let (card, arena) = (world.card.clone(), world.arena.clone());
    card.state.lock().unwrap().no_reset = true;
    drop(world);
    let command = card.config[1].load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(command & 4, 0, "it was stopped all the same");
    let error = VirtioNet::open(card.clone(), &arena, Options::default()).err().unwrap();
    assert_eq!(error.to_string(), "device_status: wanted 0x0, read 0xf for 500ms");
    assert_eq!(card.config[1].load(std::sync::atomic::Ordering::Relaxed) & 4, 0);
}

#[test]
fn several_pairs_are_set_up_and_asked_for_and_a_device_that_has_one_is_used_with_that() {
    for packed in [false, true] {
        let world = World::with_control(packed);
        assert_eq!((world.opened.receive.len(), world.opened.transmit.len()), (2, 2));
        let areas = world.card.state.lock().unwrap().areas;
        assert!(areas.iter().flatten().all(|&area| area != 0), "two pairs and the control queue");
        let vectors: Vec<_> = world.opened.receive.iter().map(ReceiveQueue::vector).collect();
        assert_eq!(vectors, [Some(0), Some(1)]);
        let first = &world.orders()[0];
        assert_eq!(first[..], [4, 0, 2, 0], "MQ, VQ_PAIRS_SET");
        assert!(world.all_home());
    }
    for more in [0, CONTROL & !f::NET_MQ, CONTROL & !f::NET_CTRL_VQ] {
        let (card, arena) = closed(false, more);
        let opened = VirtioNet::open(card.clone(), &arena, options(2)).unwrap();
        assert_eq!((opened.receive.len(), opened.transmit.len()), (1, 1), "{more:#x}");
        assert!(card.state.lock().unwrap().orders.iter().all(|order| order[0] != 4));
    }
}

#[test]
fn filters_and_addresses_are_orders_of_class_command_and_data() {
    for packed in [false, true] {
        let mut world = World::with_control(packed);
        let (mac, group) = ([2, 0, 0, 0, 0, 7], [1, 0, 0x5e, 0, 0, 5]);
        let taken: [&[u8]; 4] = [&[0, 0, 1], &[0, 2, 0], &[0, 1, 0], &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0]];
        assert_eq!(world.orders()[1..], taken, "promiscuous, from the start");
        world.opened.nic.set_mac(mac).unwrap();
        assert_eq!(world.opened.nic.mac(), mac);
        let filter = Filter { unicast: vec![mac], multicast: vec![group, group], ..Filter::default() };
        world.opened.nic.set_filter(&filter).unwrap();
        let table = [&[1, 0, 1, 0, 0, 0][..], &mac, &[2, 0, 0, 0], &group, &group].concat();
        let taken: [&[u8]; 5] = [&[1, 1, 2, 0, 0, 0, 0, 7], &[0, 0, 0], &[0, 2, 0], &[0, 1, 0], &table];
        assert_eq!(world.orders(), taken);
        // More than a table holds: all of that kind.
        let many = Filter { unicast: vec![mac; 65], multicast: vec![group; 65], ..Filter::default() };
        world.opened.nic.set_filter(&many).unwrap();
        let orders = world.orders();
        assert_eq!(orders[..3], [&[0, 0, 0][..], &[0, 2, 1], &[0, 1, 1]]);
        assert_eq!(orders[3].len(), 2 + 2 * (4 + 6 * 64));
        assert!(world.all_home());
    }
}

#[test]
fn an_order_that_is_answered_wrongly_or_never_ends_with_what_was_wanted_and_got() {
    for packed in [false, true] {
        for (answer, said) in [
            (Answer::None, "answer to MQ_VQ_PAIRS_SET: wanted 0x0, read 0xff for 5s"),
            (Answer::just(1), "does not carry out MQ_VQ_PAIRS_SET: its control queue answers 0x1, not 0x0"),
            (Answer::just(0xff), "its control queue answers 0xff, not 0x0"),
            (
                Answer::With { answer: 0, id: Some(7), len: 1 },
                "names buffer 7, which the device does not have",
            ),
            (Answer::With { answer: 0, id: None, len: 2 }, "claims 2 bytes written; it has 1"),
        ] {
            let (card, arena) = closed(packed, CONTROL);
            card.state.lock().unwrap().answer = answer;
            let error = VirtioNet::open(card.clone(), &arena, options(2)).err().unwrap().to_string();
            assert!(error.contains(said), "packed {packed}: {error}");
            assert_eq!(card.config[1].load(std::sync::atomic::Ordering::Relaxed) & 4, 0, "it is stopped");
            assert!(Pool::new(&arena, BUFFERS).is_ok(), "all buffers are home");
        }
    }
}

#[test]
fn an_answer_that_comes_too_late_is_taken_for_no_other() {
    for packed in [false, true] {
        let mut world = World::with_control(packed);
        world.card.state.lock().unwrap().answer = Answer::None;
        for _ in 0..2 {
            let error = world.opened.nic.set_mac([2, 0, 0, 0, 0, 7]).unwrap_err().to_string();
            assert_eq!(error, "answer to MAC_ADDR_SET: wanted 0x0, read 0xff for 5s");
        }
        {
            let mut state = world.card.state.lock().unwrap();
            let order = state.orders.pop().unwrap();
            assert_eq!(order, [1, 1, 2, 0, 0, 0, 0, 7], "the second was never given");
            state.answer = Answer::just(1);
            state.obey();
            state.answer = Answer::just(0);
        }
        world.opened.nic.set_mac([2, 0, 0, 0, 0, 8]).unwrap();
        assert_eq!(world.opened.nic.mac()[5], 8);
        assert!(world.opened.nic.link().is_ok());
    }
}

#[test]
fn a_device_that_will_not_be_promiscuous_is_used_all_the_same() {
    let (card, arena) = closed(true, CONTROL);
    card.state.lock().unwrap().answer = Answer::just(1);
    let mut opened = VirtioNet::open(card.clone(), &arena, options(1)).unwrap();
    let error = opened.nic.set_mac([2, 0, 0, 0, 0, 7]).unwrap_err();
    assert!(matches!(error, DeviceError::NotDone { order: "MAC_ADDR_SET", answer: 1 }), "{error}");
    assert_ne!(opened.nic.mac()[5], 7);
    assert!(opened.nic.link().is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 300 }))]

    #[test]
    fn whatever_a_device_writes_frames_lie_in_its_buffers_and_no_buffer_is_lost(
        packed in any::<bool>(),
        mergeable in any::<bool>(),
        steps in proptest::collection::vec((0..16u8, any::<[u32; 3]>(), 0..4096u32), 1..100)
    ) {
        let mut world = World::new(packed, mergeable);
        let mut buffer = BurstBuffer::default();
        for (act, words, number) in steps {
            // Mostly plausible, or the port stops at the first.
            let buffers = if act < 12 { 1 } else { words[2] >> 16 & 0x1f };
            world.header([words[0] & if act < 10 { 0 } else { u32::MAX }, 0, words[2] & 0xffff | buffers << 16]);
            match act {
                0..=8 => world.use_one(0, None, 12 + number % 1600),
                9 => world.use_one(0, None, number),
                10 => world.use_one(0, Some(number as u16 % 128), 72),
                11 => world.use_one(1, Some(number as u16 % 128), 0),
                12 => (0..number % 8).for_each(|_| world.use_one(0, None, 100)),
                13 if packed => world.write(0, 0, 8 + 16 * (number as usize % 64), words[0]),
                14 if !packed => world.write(0, 2, 2, words[0] as u16),
                _ => world.use_one(1, None, 0),
            }
            let burst = world.opened.receive[0].poll(&mut buffer);
            for frame in burst.frames() {
                let more = burst.more(frame);
                prop_assert_eq!(more.len(), usize::from(frame.more));
                prop_assert_eq!(frame.first_len + more.iter().map(|s| s.len).sum::<u32>(), frame.len);
                prop_assert!(frame.len <= 1518);
                for (ptr, len) in std::iter::once((frame.ptr, frame.first_len)).chain(more.iter().map(|s| (s.ptr, s.len))) {
                    let view = world.arena.view();
                    let start = view.buffer_of(ptr).map(|i| view.ptr(i).addr());
                    prop_assert!(start.is_some_and(|start| ptr.addr() + len as usize <= start + BUFFER as usize));
                }
            }
            world.opened.transmit[0].send(&burst, burst.all(), TagEdit::Keep, &mut Scratch::default());
            burst.release();
            world.opened.transmit[0].notify();
        }
        let (r, t) = (world.opened.receive[0].counters(), world.opened.transmit[0].counters());
        prop_assert_eq!(t.offered.get(), t.sent.get() + t.drops.sum());
        prop_assert!(r.frames.get() >= r.drops.sum());
        prop_assert!(world.all_home());
    }

    #[test]
    fn whatever_a_device_answers_an_order_ends_well_or_with_a_reason(
        packed in any::<bool>(),
        answers in proptest::collection::vec((0..3u8, any::<Option<u16>>(), 0..4u32), 1..20)
    ) {
        let mut world = World::with_control(packed);
        for (answer, id, len) in answers {
            world.card.state.lock().unwrap().answer = Answer::With { answer, id, len };
            let done = world.opened.nic.set_mac([2, 0, 0, 0, 0, 7]);
            prop_assert!(answer == 0 || done.is_err());
            if world.opened.nic.link().is_err() {
                break;
            }
        }
        prop_assert!(world.all_home());
    }
}
