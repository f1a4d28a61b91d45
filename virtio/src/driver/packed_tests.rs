//! What the driver side of a packed ring makes of a device's wish to be notified (virtio 1.3, section 2.8.10).

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::{DriverRing, DriverSetup, Single};
use crate::device::{Direction, Layout};
use crate::features;
use crate::memory::HostRange;

const SIZE: u16 = 8;

/// The areas of a ring, and what the device writes into them.
#[repr(C, align(64))]
struct Memory {
    ring: [[AtomicU64; 2]; SIZE as usize],
    driver: [AtomicU64; 2],
    device: [AtomicU32; 4],
}

struct World {
    driver: DriverRing,
    memory: Arc<Memory>,
    /// Descriptors that the device has used.
    used: u16,
}

impl World {
    fn new() -> Self {
        let zeros = || [const { AtomicU64::new(0) }; 2];
        let memory = Arc::new(Memory {
            ring: std::array::from_fn(|_| zeros()),
            driver: zeros(),
            device: [const { AtomicU32::new(0) }; 4],
        });
        let range = |ptr: *const u8, len| HostRange { ptr: ptr.cast_mut(), len, guest: ptr.addr() as u64 };
        let setup = DriverSetup {
            layout: Layout::Packed,
            direction: Direction::Read,
            size: SIZE,
            features: features::VERSION_1 | features::RING_PACKED | features::RING_EVENT_IDX,
            descriptors: range((&raw const memory.ring).cast(), 16 * usize::from(SIZE)),
            driver: range((&raw const memory.driver).cast(), 16),
            device: range((&raw const memory.device).cast(), 16),
            indirect: None,
            mapping: memory.clone(),
        };
        // SAFETY: the areas are the array's, apart from each other, of atomics, and `mapping` keeps them.
        let driver = unsafe { DriverRing::new(setup) }.unwrap();
        Self { driver, memory, used: 0 }
    }

    /// Publishes `n` buffers; whether the device is to be notified.
    fn publish(&mut self, n: usize) -> bool {
        assert_eq!(self.driver.offer((0..n).map(|_| Single { address: 0, len: 1, token: 0 })), n);
        self.driver.publish()
    }

    /// The device uses `n` buffers, which the driver takes back.
    fn use_up(&mut self, n: u16) {
        for _ in 0..n {
            let place = &self.memory.ring[usize::from(self.used % SIZE)][1];
            let id = place.load(Ordering::Relaxed) & 0xffff_0000_0000;
            let flags = if (self.used / SIZE).is_multiple_of(2) { 0x8080 } else { 0 };
            place.store(id | flags << 48, Ordering::Release);
            self.used += 1;
        }
        assert_eq!(self.driver.reclaim(usize::MAX, |_, _| ()), Ok(usize::from(n)));
    }

    /// The device wants to be notified of the descriptor that is the `count`th since the ring began, or not at all.
    fn wish(&self, count: Option<u16>) {
        let word = count.map_or(1 << 16, |count| {
            2 << 16 | u32::from(count % SIZE) | u32::from((count / SIZE).is_multiple_of(2)) << 15
        });
        self.memory.device[0].store(word, Ordering::Relaxed);
    }
}

#[test]
fn a_device_is_notified_of_the_place_that_it_named_and_of_no_other() {
    let mut world = World::new();
    world.wish(Some(3));
    assert_eq!([2, 1, 1, 1].map(|n| world.publish(n)), [false, false, true, false]);
    world.use_up(5);
    // In the next lap, with the other wrap counter: 4 of it are behind place 8, 1 is still before it.
    world.wish(Some(9));
    assert_eq!([3, 1, 1].map(|n| world.publish(n)), [false, false, true]);
    // A lap ahead: not passed, though its number is smaller.
    world.use_up(5);
    world.wish(Some(17));
    assert_eq!([5, 2, 1].map(|n| world.publish(n)), [false, false, true]);
}

/// What QEMU 10's virtio-net does: names its place, then takes buffers beyond it, and sleeps.
#[test]
fn a_device_that_fell_asleep_behind_its_own_place_is_notified_once() {
    let mut world = World::new();
    world.wish(None);
    let mut place = 0;
    // Many laps, so that the same place comes again and again.
    for round in 0..100 {
        world.wish(None);
        assert!(!world.publish(2), "round {round}");
        world.wish(Some(place));
        world.use_up(2);
        assert_eq!([1, 1].map(|n| world.publish(n)), [true, false], "round {round}");
        world.use_up(2);
        place += 4;
    }
}
