//! The driver against a device that lies: in its rings, and in the headers of what it hands over.

use std::sync::Arc;

use host::memory::Pages;
use port::{BurstBuffer, RxQueue, Scratch, TagEdit, TxQueue};
use proptest::prelude::*;
use virtio::features as f;

use super::standin::{SIZE, Standin};
use super::*;
use crate::dma::{ArenaOptions, BUFFER};
use crate::intel::standin::Identity;
use crate::nic::{ReceiveQueue, TransmitQueue};

const BUFFERS: u32 = 400;

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
        let space = Arc::new(Identity::default());
        let options = ArenaOptions { rings: 256 << 10, buffers: BUFFERS, pages: Pages::Ordinary, node: None };
        let arena = Arena::new(options, space.clone()).unwrap();
        let mut features = f::VERSION_1 | f::NET_MAC | f::NET_STATUS | f::RING_INDIRECT_DESC | f::NET_CSUM;
        features |= if packed { f::RING_PACKED } else { 0 } | if mergeable { f::NET_MRG_RXBUF } else { 0 };
        let card = Standin::new(&space, features);
        let options = Options { receive_ring: 64, transmit_ring: 64, spare: 8, ..Options::default() };
        let opened = VirtioNet::open(card.clone(), &arena, options).unwrap();
        Self { card, opened, arena, packed, used: [0; 2] }
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
}
