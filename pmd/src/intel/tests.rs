//! The driver against a device that hangs, lies and disappears.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use host::memory::Pages;
use port::{Burst, BurstBuffer, DropReason, Frame, FrameSet, Release, RxQueue, Scratch, TagEdit, TxQueue};

use super::standin::{
    COMMAND, CTRL, EEC, IGB_RX_RING, IGB_TX_RING, Identity, MASTER, MDIC, RCTL, RDT, RX_RING, STATUS,
    Standin, TCTL, TDT, TX_RING,
};
use super::*;
use crate::access::PciDevice;
use crate::dma::{Arena, ArenaOptions, Pool};
use crate::e1000e::{E1000e, I82574};
use crate::igb::{I82576, Igb};
use crate::nic::{Nic, ReceiveQueue, TransmitQueue};

pub(crate) const BUFFERS: u32 = 400;

struct World {
    card: Arc<Standin>,
    receive: Receive<Standin, I82574>,
    transmit: Transmit<Standin, I82574>,
    device: E1000e<Standin>,
    arena: Arc<Arena>,
}

pub(crate) fn space_and_arena() -> (Arc<Identity>, Arc<Arena>) {
    let space = Arc::new(Identity::default());
    let options = ArenaOptions { rings: 64 << 10, buffers: BUFFERS, pages: Pages::Ordinary, node: None };
    let arena = Arena::new(options, space.clone()).unwrap();
    (space, arena)
}

pub(crate) fn options() -> Options {
    Options { receive_ring: 64, transmit_ring: 64, spare: 8, mtu: 9000, ..Options::default() }
}

impl World {
    fn new() -> Self {
        let (space, arena) = space_and_arena();
        Self::at(&space, arena)
    }

    fn at(space: &Arc<Identity>, arena: Arc<Arena>) -> Self {
        let card = Standin::new(space, I82574::IDS[0]);
        let mut opened = E1000e::open(card.clone(), &arena, options()).unwrap();
        let (receive, transmit) = (opened.receive.pop().unwrap(), opened.transmit.pop().unwrap());
        Self { card, receive, transmit, device: opened.nic, arena }
    }

    /// The device writes back receive descriptor `at`: status and errors, and a length.
    fn received(&self, at: u32, status: u32, len: u16) {
        self.card.write_back(RX_RING, at, u64::from(status) | u64::from(len) << 32);
    }

    /// What a poll yields: lengths.
    fn poll(&mut self) -> Vec<u32> {
        let mut buffer = BurstBuffer::default();
        self.receive.poll(&mut buffer).frames().iter().map(|f| f.len).collect()
    }

    fn why_down(&mut self) -> String {
        self.device.link().unwrap_err().to_string()
    }

    /// Whether every buffer is home once both queues are gone.
    fn all_home(self) -> bool {
        let Self { receive, transmit, device, arena, .. } = self;
        drop((receive, transmit, device));
        Pool::new(&arena, BUFFERS).is_ok()
    }
}

const DONE: u32 = 1;
const WHOLE: u32 = 3;

/// Frames that lie in ordinary memory, as a guest's do.
struct Lent(Vec<Vec<u8>>);
impl Release for Lent {
    fn release(&mut self) {}
    fn dropped(&mut self, _: FrameSet, _: DropReason) {}
}
impl Lent {
    fn send<D: PciDevice, C: Card>(&mut self, to: &mut Transmit<D, C>) {
        let mut buffer = BurstBuffer::default();
        for (i, bytes) in self.0.iter().enumerate() {
            let len = bytes.len() as u32;
            let n = bytes.len().min(64);
            buffer.heads[i].0[..n].copy_from_slice(&bytes[..n]);
            buffer.frames[i] = Frame { ptr: bytes.as_ptr(), first_len: len, len, ..Frame::EMPTY };
        }
        let n = self.0.len();
        let burst = Burst::new(self, &buffer, n);
        to.send(&burst, burst.all(), TagEdit::Keep, &mut Scratch::default());
        to.notify();
    }
}

#[test]
fn each_wait_of_the_start_ends_with_register_wanted_and_got() {
    for (register, bits, value, text) in [
        (STATUS, 1 << 19, 1 << 19, "STATUS.GIO_MASTER_ENABLE: wanted 0x0, read 0x80000 for 100ms"),
        (CTRL, 1 << 26, 1 << 26, "CTRL.RST: wanted 0x0, read 0x4000000 for 100ms"),
        (EEC, 1 << 9, 0, "EEC.AUTO_RD: wanted 0x200, read 0x0 for 100ms"),
    ] {
        let (space, arena) = space_and_arena();
        let card = Standin::new(&space, I82574::IDS[0]);
        card.stuck.lock().unwrap().push((register, bits, value));
        let error = E1000e::open(card.clone(), &arena, options()).err().unwrap();
        assert_eq!(error.to_string(), text);
        assert_eq!(card.config[COMMAND].load(Ordering::Relaxed) & MASTER, 0, "bus mastering stays off");
        assert!(Pool::new(&arena, BUFFERS).is_ok(), "all buffers are home");
    }
}

#[test]
fn each_wait_for_the_82576_ends_with_register_wanted_and_got() {
    for (register, bit, text) in [
        (MDIC, 28, "MDIC.READY: wanted 0x10000000, read 0x0 for 10ms"),
        (IGB_TX_RING + 0x28 + 0x40, 25, "TXDCTL[1].ENABLE: wanted 0x2000000, read 0x0 for 100ms"),
        (IGB_RX_RING + 0x28 + 0x80, 25, "RXDCTL[2].ENABLE: wanted 0x2000000, read 0x0 for 100ms"),
    ] {
        let (space, arena) = space_and_arena();
        let card = Standin::new(&space, I82576::IDS[0]);
        card.stuck.lock().unwrap().push((register, 1 << bit, 0));
        let error =
            Igb::open(card.clone(), &arena, Options { queues: 3, spare: 0, ..options() }).err().unwrap();
        assert_eq!(error.to_string(), text);
        assert_eq!(card.config[COMMAND].load(Ordering::Relaxed) & MASTER, 0, "bus mastering is off again");
        assert!(Pool::new(&arena, BUFFERS).is_ok(), "all buffers are home");
    }
}

#[test]
fn an_82576_whose_eeprom_is_never_read_works_by_its_defaults() {
    let (space, arena) = space_and_arena();
    let card = Standin::new(&space, I82576::IDS[0]);
    card.stuck.lock().unwrap().push((EEC, 1 << 9, 0));
    let error = I82574::wait_for_settings(&Regs::new(card.bar(0, 128 << 10).unwrap())).unwrap_err();
    assert_eq!(error.to_string(), "EEC.AUTO_RD: wanted 0x200, read 0x0 for 100ms", "it is looked at");
    assert!(Igb::open(card, &arena, options()).is_ok());
}

#[test]
fn registers_that_may_hold_anything_are_those_of_all_rings() {
    let counts =
        [I82574::scratch(), I82576::scratch(), crate::igbvf::I82576Vf::scratch()].map(|all| all.len());
    assert_eq!(counts, [6 * 2, 6 * 16, 6 * 2]);
}

#[test]
fn what_keeps_a_device_from_falling_quiet_is_told() {
    let (space, _) = space_and_arena();
    let card = Standin::new(&space, I82576::IDS[0]);
    card.stuck.lock().unwrap().push((STATUS, 1 << 19, 1 << 19));
    let regs = Regs::new(card.bar(0, 128 << 10).unwrap());
    let wanted = "STATUS.GIO_MASTER_ENABLE: wanted 0x0, read 0x80000 for 100ms";
    assert_eq!(I82576::quiet(&regs).unwrap_err().to_string(), wanted);
    assert_eq!(I82574::quiet(&regs).unwrap_err().to_string(), wanted);
}

#[test]
fn the_82576_hears_the_length_of_the_whole_frame_with_each_of_its_pieces() {
    let (space, arena) = space_and_arena();
    let card = Standin::new(&space, I82576::IDS[0]);
    let mut opened = Igb::open(card.clone(), &arena, options()).unwrap();
    Lent(vec![vec![0; 5000]]).send(&mut opened.transmit[0]);
    let words = [0, 1, 2].map(|at| card.read(IGB_TX_RING, at)[1]);
    assert_eq!(words.map(|w| (w & 0xffff, w >> 46)), [(2048, 5000), (2048, 5000), (904, 5000)]);
    assert_eq!(words.map(|w| w >> 20 & 0xf), [3; 3], "advanced data descriptors");
    assert_eq!(card.register(IGB_TX_RING + 0x18), 3);
}

#[test]
fn waiting_for_a_link_that_never_comes_ends() {
    let mut world = World::new();
    world.card.stuck.lock().unwrap().push((STATUS, 2, 0));
    let error = world.device.wait_for_link(Duration::from_secs(9)).unwrap_err();
    assert_eq!(error.to_string(), "STATUS.LU: wanted 0x2, read 0x0 for 9s");
    assert!(!world.device.link().unwrap().up);
}

#[test]
fn a_device_whose_requests_never_end_is_stopped_all_the_same() {
    let world = World::new();
    world.card.stuck.lock().unwrap().push((STATUS, 1 << 19, 1 << 19));
    let card = world.card.clone();
    drop(world);
    assert_eq!(card.config[COMMAND].load(Ordering::Relaxed) & MASTER, 0);
}

#[test]
fn a_device_is_stopped_before_its_memory_is_unmapped_whatever_is_dropped_first() {
    for order in 0..4 {
        let (space, arena) = space_and_arena();
        let World { card, receive, transmit, device, arena } = World::at(&space, arena);
        assert_eq!(card.config[COMMAND].load(Ordering::Relaxed) & MASTER, MASTER);
        let quiet = move || {
            card.register(RCTL) & 2 == 0
                && card.register(TCTL) & 2 == 0
                && card.config[COMMAND].load(Ordering::Relaxed) & MASTER == 0
        };
        assert!(!quiet());
        *space.quiet.lock().unwrap() = Some(Box::new(quiet));
        match order {
            0 => drop((arena, receive, transmit, device)),
            1 => drop((device, transmit, receive, arena)),
            2 => drop((transmit, arena, device, receive)),
            _ => drop((receive, device, arena, transmit)),
        }
        assert_eq!(*space.answers.lock().unwrap(), [true], "order {order}");
    }
}

#[test]
fn what_cannot_be_driven_is_refused_with_the_reason() {
    let (space, arena) = space_and_arena();
    let card = Standin::new(&space, I82574::IDS[0]);
    let open = |card: &Arc<Standin>, arena, options| {
        E1000e::open(card.clone(), arena, options).err().unwrap().to_string()
    };
    assert!(
        open(&card, &arena, Options { receive_ring: 100, ..options() })
            .starts_with("a ring of 100 descriptors")
    );
    assert!(open(&card, &arena, Options { mtu: 9001, ..options() }).starts_with("an MTU of 9001"));
    let (_, others) = space_and_arena();
    assert!(open(&card, &others, options()).starts_with("the arena is mapped for other devices"));
    card.config[0].store(0x100e_8086, Ordering::Relaxed);
    assert!(open(&card, &arena, options()).starts_with("PCI device 8086:100e is not an 82574L; use"));
    card.gone.store(true, Ordering::Relaxed);
    assert!(open(&card, &arena, options()).starts_with("the device is gone"));
}

#[test]
fn a_device_that_reads_all_ones_is_gone_and_the_port_down() {
    let mut world = World::new();
    world.received(0, WHOLE, 100);
    world.card.gone.store(true, Ordering::Relaxed);
    assert!(world.why_down().contains("registers read all ones"));
    assert!(world.poll().is_empty());
    Lent(vec![vec![0; 100]]).send(&mut world.transmit);
    assert_eq!(world.transmit.counters().drops.get(DropReason::PortDown), 1);
    assert!(world.all_home());
}

#[test]
fn impossible_lengths_and_endless_frames_stop_the_port_and_say_why() {
    for (len, text) in [
        (0, "receive descriptor 1: 0 bytes in a buffer of 2048"),
        (2049, "2049 bytes"),
        (0xffff, "65535 bytes"),
    ] {
        let mut world = World::new();
        world.received(0, WHOLE, 60);
        world.received(1, WHOLE, len);
        world.received(2, WHOLE, 60);
        assert_eq!(world.poll(), [60], "what came before is good");
        let why = world.why_down();
        assert!(why.contains(text), "{why}");
        assert!(world.poll().is_empty());
        assert_eq!(
            world.card.config[COMMAND].load(Ordering::Relaxed) & MASTER,
            0,
            "and the device is stopped"
        );
        assert!(world.all_home());
    }
    let mut world = World::new();
    (0..63).for_each(|at| world.received(at, DONE, 2048));
    assert!(world.poll().is_empty());
    assert!(world.why_down().contains("does not end after 8 descriptors"));
}

#[test]
fn a_frame_whose_end_has_not_come_waits_for_it() {
    let mut world = World::new();
    world.received(0, DONE, 2048);
    world.received(1, DONE, 2048);
    assert!(world.poll().is_empty() && world.receive.peek() > 0);
    world.received(2, WHOLE, 100);
    assert_eq!(world.poll(), [4196]);
    assert_eq!(world.receive.counters().frames.get(), 1);
}

#[test]
fn damaged_short_and_long_frames_are_dropped_under_their_names() {
    let mut world = World::new();
    for (at, status, len) in
        [(0, WHOLE | 1 << 24, 60), (1, WHOLE | 1 << 31, 60), (2, WHOLE, 13), (3, WHOLE, 60)]
    {
        world.received(at, status, len);
    }
    (4..8).for_each(|at| world.received(at, DONE, 2048));
    world.received(8, WHOLE, 9019 - 4 * 2048);
    world.received(9, WHOLE | 1 << 29, 70);
    assert_eq!(world.poll(), [60, 70]);
    let counters = world.receive.counters();
    assert_eq!((counters.frames.get(), counters.drops.sum()), (6, 4), "received = passed on + dropped");
    let reasons = [DropReason::Damaged, DropReason::Runt, DropReason::Oversize];
    assert_eq!(reasons.map(|r| counters.drops.get(r)), [2, 1, 1]);
    let errors: Vec<_> =
        I82574::RECEIVE_ERRORS.iter().zip(&counters.errors).filter(|(_, n)| n.get() > 0).collect();
    assert_eq!(
        errors.iter().map(|(name, n)| (**name, n.get())).collect::<Vec<_>>(),
        [("crc_or_alignment", 1), ("tcp_udp_checksum", 1), ("data", 1)]
    );
}

#[test]
fn a_descriptor_that_the_device_does_not_have_is_never_read() {
    let mut world = World::new();
    (0..64).for_each(|at| world.received(at, WHOLE, 60));
    let polled: usize = std::iter::from_fn(|| Some(world.poll().len())).take(1).sum();
    assert_eq!((polled, world.card.register(RDT)), (63, 62), "64 descriptors, of which the device had 63");
}

#[test]
fn a_buffer_that_another_card_sends_comes_home_when_it_is_sent() {
    let (space, arena) = space_and_arena();
    let mut a = World::at(&space, arena.clone());
    let mut b = World::at(&space, arena);
    let mut buffer = BurstBuffer::default();
    let mut sent = 0;
    // 8 spare buffers: after 40 frames under way the ring runs short, and recovers.
    for round in 0..100u32 {
        let tail = a.card.register(RDT);
        let from = round * 20 % 64;
        let room = (tail.wrapping_sub(from) & 63).min(20);
        (0..room).for_each(|i| a.received((from + i) & 63, WHOLE, 60));
        let burst = a.receive.poll(&mut buffer);
        let expected: BTreeSet<_> = burst.frames().iter().map(|f| f.ptr.addr() as u64).collect();
        b.transmit.send(&burst, burst.all(), TagEdit::Keep, &mut Scratch::default());
        b.transmit.notify();
        let n = burst.len() as u32;
        burst.release();
        assert_eq!(n, room);
        let end = b.card.register(TDT);
        let sending = (0..n).map(|i| b.card.read(TX_RING, (end + 64 - n + i) & 63));
        assert_eq!(sending.map(|d| d[0]).collect::<BTreeSet<_>>(), expected, "not copied");
        if n > 0 {
            b.card.write_back(TX_RING, (end + 63) & 63, 1 << 32);
        }
        sent += u64::from(n);
        if room < 20 {
            break;
        }
    }
    let counters = b.transmit.counters();
    assert_eq!((counters.sent.get(), counters.uncopied.get(), counters.drops.sum()), (sent, sent, 0));
    assert!(sent > 500, "{sent} frames, many times the spare buffers");
    let World { receive, transmit, arena, .. } = a;
    drop((receive, transmit, b));
    assert!(Pool::new(&arena, BUFFERS).is_ok(), "all buffers are home");
}

#[test]
fn a_buffer_that_comes_home_before_its_burst_ends_is_in_one_place_of_the_ring_only() {
    let mut world = World::new();
    let mut buffer = BurstBuffer::default();
    for round in 0..20 {
        (0..16).for_each(|i| world.received((round * 16 + i) & 63, WHOLE, 60));
        let burst = world.receive.poll(&mut buffer);
        assert_eq!(burst.len(), 16);
        // All but the first are sent, and at once, so that the first places of the ring get the buffers of the last.
        world.transmit.send(&burst, FrameSet(0xfffe), TagEdit::Keep, &mut Scratch::default());
        world.transmit.notify();
        world.card.write_back(TX_RING, (world.card.register(TDT) + 63) & 63, 1 << 32);
        world.transmit.prepare(usize::MAX);
        burst.release();
        let ring: BTreeSet<_> = (0..64).map(|at| world.card.read(RX_RING, at)[0]).collect();
        assert_eq!(ring.len(), 64, "round {round}");
    }
    assert!(world.all_home());
}

#[test]
fn a_frame_that_is_refused_first_in_a_set_keeps_its_buffer() {
    let mut world = World::new();
    (0..2).for_each(|i| world.received(i, WHOLE, 60));
    let mut buffer = BurstBuffer::default();
    let burst = world.receive.poll(&mut buffer);
    let mut set = BurstBuffer::default();
    set.frames[0] = Frame { first_len: 60_000, len: 60_000, ..burst.frames()[0] };
    set.frames[1] = burst.frames()[1];
    let mut lent = Lent(Vec::new());
    let lent = Burst::new(&mut lent, &set, 2);
    world.transmit.send(&lent, lent.all(), TagEdit::Keep, &mut Scratch::default());
    drop((lent, burst));
    world.transmit.notify();
    world.card.write_back(TX_RING, (world.card.register(TDT) + 63) & 63, 1 << 32);
    world.transmit.prepare(usize::MAX);
    let counters = world.transmit.counters();
    assert_eq!((counters.sent.get(), counters.drops.sum()), (1, 1));
    // Once around the ring, and whatever left it left it for good.
    for i in 2..66 {
        world.received(i & 63, WHOLE, 60);
        assert_eq!(world.receive.poll(&mut buffer).len(), 1);
    }
    assert!(world.all_home());
}

#[test]
fn a_frame_for_two_ports_is_copied_for_the_second() {
    let mut world = World::new();
    world.received(0, WHOLE, 60);
    let mut buffer = BurstBuffer::default();
    let burst = world.receive.poll(&mut buffer);
    for _ in 0..2 {
        world.transmit.send(&burst, burst.all(), TagEdit::Keep, &mut Scratch::default());
    }
    drop(burst);
    let [first, second] = [0, 1].map(|at| world.card.read(TX_RING, at)[0]);
    assert_ne!(first, second);
    let counters = world.transmit.counters();
    assert_eq!((counters.sent.get(), counters.uncopied.get()), (2, 1));
    assert!(world.all_home());
}
