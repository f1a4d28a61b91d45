//! A lap around a ring, device side: fetch a burst, use it, publish, until everything the driver offered is used.
//!
//! Driver and device share one core, so that this is what the code costs when the lines are in its own cache: a floor, not
//! what a switch sees (there each line comes from the guest's core).

#![allow(clippy::expect_used, missing_docs)]

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use host::memory::{Pages, SharedMemory};
use virtio::device::{DeviceRing, Direction, Layout, Ring, RingSetup};
use virtio::driver::{AreaSizes, DriverRing, DriverSetup, Single};
use virtio::features;
use virtio::memory::{GuestMemory, HostRange, Region};
use virtio::with_ring;

const SIZE: u16 = 256;
const BURST: usize = 32;
const BUFFER: usize = 2048;
/// Where the device believes the memory to be.
const GUEST: u64 = 1 << 32;

/// Both sides of one ring, and buffers for all its descriptors.
struct Pair {
    driver: DriverRing,
    device: DeviceRing,
    buffers_at: usize,
}

impl Pair {
    fn new(layout: Layout) -> Self {
        let sizes = AreaSizes::of(layout, SIZE);
        let mut at = 0;
        let mut place = |bytes: usize| {
            let here = at;
            at += bytes.next_multiple_of(128);
            here
        };
        let areas = [sizes.descriptors, sizes.driver, sizes.device].map(|len| (place(len), len));
        let buffers_at = place(usize::from(SIZE) * BUFFER);
        let memory = Arc::new(SharedMemory::new(at, Pages::Auto, None).expect("a megabyte of memory"));
        let start = memory.as_ptr();
        let range = |(at, len): (usize, usize)| HostRange {
            ptr: start.wrapping_add(at),
            len,
            guest: GUEST + at as u64,
        };
        let [descriptors, driver, device] = areas.map(range);
        let packed = if layout == Layout::Packed { features::RING_PACKED } else { 0 };
        let features = features::VERSION_1 | features::IN_ORDER | packed;
        let (size, direction) = (SIZE, Direction::Read);
        let setup = DriverSetup {
            layout,
            direction,
            size,
            features,
            descriptors,
            driver,
            device,
            indirect: None,
            mapping: memory.clone(),
        };
        // SAFETY: the areas are apart, zeroed, and mapped as long as `memory`, which the setup holds.
        let driver_ring = unsafe { DriverRing::new(setup) }.expect("a ring of 256");
        let region = Region { guest: GUEST, user: GUEST, size: memory.len() as u64, host: start };
        // SAFETY: the region is `memory`, which is handed over to keep it mapped; nobody makes references to it.
        let guest = unsafe { GuestMemory::new(vec![region], Box::new(memory)) }.expect("one region");
        let device_ring = DeviceRing::start(RingSetup {
            layout,
            direction,
            size,
            descriptors,
            driver,
            device,
            // Packed: both positions 0, both wrap counters 1.
            base: Some(if layout == Layout::Packed { 0x8000_8000 } else { 0 }),
            features,
            memory: Arc::new(guest),
            log: None,
            log_used: None,
            inflight: None,
        });
        Self { driver: driver_ring, device: device_ring.expect("a ring of 256"), buffers_at }
    }

    /// The driver offers every descriptor.
    fn offer(&mut self) {
        let at = GUEST + self.buffers_at as u64;
        let offered = self.driver.offer((0..u32::from(SIZE)).map(|i| Single {
            address: at + u64::from(i) * BUFFER as u64,
            len: 76,
            token: i,
        }));
        assert_eq!(offered, usize::from(SIZE));
        self.driver.publish();
    }

    /// The device takes all of it, a burst at a time; returns the bytes, so that nothing is optimized away.
    #[inline(never)]
    fn lap(&mut self) -> u64 {
        let mut bytes = 0;
        with_ring!(&mut self.device, ring => {
            while let Ok(n @ 1..) = ring.fetch(BURST) {
                bytes += (0..n).map(|i| u64::from(ring.stock().get(i).total)).sum::<u64>();
                ring.use_read(n);
                ring.publish();
            }
        });
        bytes
    }

    fn reclaim(&mut self) {
        let back = self.driver.reclaim(usize::MAX, |_, _| ()).expect("an honest device");
        assert_eq!(back, usize::from(SIZE));
    }
}

fn rings(c: &mut Criterion) {
    let mut group = c.benchmark_group("ring walk, device side");
    group.throughput(Throughput::Elements(SIZE.into()));
    for (name, layout) in [("split", Layout::Split), ("packed", Layout::Packed)] {
        let mut pair = Pair::new(layout);
        group.bench_function(name, |b| {
            b.iter_custom(|laps| {
                let mut time = Duration::ZERO;
                for _ in 0..laps {
                    pair.offer();
                    let start = Instant::now();
                    black_box(pair.lap());
                    time += start.elapsed();
                    pair.reclaim();
                }
                time
            });
        });
    }
}

criterion_group!(benches, rings);
criterion_main!(benches);
