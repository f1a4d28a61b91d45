//! The driver side and the device side of a ring against each other: random chains, offered, used and reclaimed in random
//! portions, over many laps, in both layouts and with all combinations of features. Every buffer comes back once, with the
//! right bytes; whoever asked for a notification gets one.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use proptest::prelude::*;
use proptest::test_runner::TestCaseError;
use virtio::device::{DeviceRing, Direction, Layout, Ring, RingError, RingSetup};
use virtio::driver::{AreaSizes, DriverRing, DriverSetup, IndirectTables, OfferError, Piece, Single};
use virtio::features as f;
use virtio::memory::{GuestMemory, HostRange, Region};
use virtio::with_ring;

/// Where the device believes the memory to be.
const GUEST: u64 = 0x4000_0000;
/// Bytes of each buffer.
const BUFFER: usize = 512;
/// Longest chain.
const PIECES: u16 = 8;

/// Memory that both sides reach by raw pointers only.
struct Memory {
    start: *mut u8,
    layout: std::alloc::Layout,
}

// SAFETY: only addresses; the test is one thread.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    fn new(bytes: usize) -> Arc<Self> {
        let layout = std::alloc::Layout::from_size_align(bytes, 4096).unwrap();
        // SAFETY: the size is not zero.
        Arc::new(Self { start: unsafe { std::alloc::alloc_zeroed(layout) }, layout })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { std::alloc::dealloc(self.start, self.layout) }
    }
}

#[derive(Clone, Copy, Debug)]
struct Kind {
    layout: Layout,
    direction: Direction,
    size: u16,
    features: u64,
}

#[derive(Clone, Debug)]
enum Step {
    /// Offer single buffers of these lengths.
    Singles(Vec<u32>),
    /// Offer one chain of pieces of these lengths.
    Chain {
        lens: Vec<u32>,
        indirect: bool,
    },
    Publish,
    /// The device fetches up to so many chains and uses them, in batches of `batch` (a transmit ring with IN_ORDER reports one
    /// element for each).
    Use {
        want: usize,
        batch: usize,
        share: u32,
    },
    DevicePublish,
    Reclaim(usize),
    DriverSleeps,
    DeviceSleeps,
}

fn kind() -> impl Strategy<Value = Kind> {
    let features = proptest::sample::subsequence(vec![f::IN_ORDER, f::RING_EVENT_IDX], 0..=2);
    let layout = prop_oneof![
        (0u32..8).prop_map(|bits| (Layout::Split, 1u16 << bits)),
        (1u16..130).prop_map(|size| (Layout::Packed, size)),
    ];
    let direction = prop_oneof![Just(Direction::Read), Just(Direction::Write), Just(Direction::Both)];
    (layout, direction, features).prop_map(|((layout, size), direction, bits)| {
        let packed = if layout == Layout::Packed { f::RING_PACKED } else { 0 };
        let features = bits.into_iter().fold(f::VERSION_1 | f::RING_INDIRECT_DESC | packed, |a, b| a | b);
        Kind { layout, direction, size, features }
    })
}

fn step() -> impl Strategy<Value = Step> {
    let len = 1..=BUFFER as u32 / u32::from(PIECES);
    prop_oneof![
        4 => proptest::collection::vec(1..=BUFFER as u32, 1..20).prop_map(Step::Singles),
        3 => (proptest::collection::vec(len, 1..=usize::from(PIECES)), any::<bool>())
            .prop_map(|(lens, indirect)| Step::Chain { lens, indirect }),
        4 => Just(Step::Publish),
        5 => (1usize..40, 1usize..10, 0u32..=100)
            .prop_map(|(want, batch, share)| Step::Use { want, batch, share }),
        4 => Just(Step::DevicePublish),
        5 => (1usize..40).prop_map(Step::Reclaim),
        1 => Just(Step::DriverSleeps),
        1 => Just(Step::DeviceSleeps),
    ]
}

/// A buffer that the device may have.
struct Offered {
    token: u32,
    lens: Vec<u32>,
    /// So many of them are for the device to read; the others it writes.
    readable: usize,
}

impl Offered {
    /// Bytes that the device reads, and bytes that it writes.
    fn totals(&self) -> (u32, u32) {
        let (read, written) = self.lens.split_at(self.readable);
        (read.iter().sum(), written.iter().sum())
    }
}

struct World {
    kind: Kind,
    driver: DriverRing,
    device: DeviceRing,
    memory: Arc<Memory>,
    buffers_at: usize,
    free: Vec<u32>,
    /// Offered and not yet used, oldest first.
    offered: VecDeque<Offered>,
    /// Used and not yet reclaimed, oldest first, with the bytes written.
    used: VecDeque<(Offered, u32)>,
    /// How many of `offered` the device was shown.
    shown: usize,
    /// How many of `used` the driver was shown.
    shown_used: usize,
    /// Chosen for each offer, so that contents differ.
    salt: u32,
    content: Vec<u32>,
    driver_sleeps: bool,
    device_sleeps: bool,
}

fn byte(salt: u32, i: u32) -> u8 {
    (salt.wrapping_mul(31).wrapping_add(i).wrapping_mul(2_654_435_761) >> 24) as u8
}

impl World {
    fn new(kind: Kind) -> Self {
        let sizes = AreaSizes::of(kind.layout, kind.size);
        let buffers = usize::from(kind.size) + 4;
        let tables = 16 * usize::from(PIECES) * usize::from(kind.size);
        let mut at = 0;
        let mut place = |bytes: usize| {
            let here = at;
            at += (bytes + 31) & !15;
            here
        };
        let areas = [sizes.descriptors, sizes.driver, sizes.device, tables].map(|n| (place(n), n));
        let buffers_at = place(buffers * BUFFER);
        let bytes = at.next_multiple_of(4096);
        let memory = Memory::new(bytes);
        let [descriptors, driver, device, tables] = areas.map(|(at, len)| HostRange {
            ptr: memory.start.wrapping_add(at),
            len,
            guest: GUEST + at as u64,
        });
        let Kind { layout, direction, size, features } = kind;
        // SAFETY: the areas are apart and stay allocated as long as `memory`.
        let driver_ring = unsafe {
            DriverRing::new(DriverSetup {
                layout,
                direction,
                size,
                features,
                descriptors,
                driver,
                device,
                indirect: Some(IndirectTables { range: tables, entries: PIECES }),
                mapping: memory.clone(),
            })
        };
        let region = Region { guest: GUEST, user: 0, size: bytes as u64, host: memory.start };
        // SAFETY: the region is `memory`.
        let guest = unsafe { GuestMemory::new(vec![region], Box::new(memory.clone())) }.unwrap();
        let device_ring = DeviceRing::start(RingSetup {
            layout,
            direction,
            size,
            descriptors,
            driver,
            device,
            base: Some(if layout == Layout::Packed { 0x8000_8000 } else { 0 }),
            features,
            memory: Arc::new(guest),
            log: None,
            log_used: None,
            inflight: None,
        });
        Self {
            kind,
            driver: driver_ring.unwrap(),
            device: device_ring.unwrap(),
            memory,
            buffers_at,
            free: (0..buffers as u32).collect(),
            offered: VecDeque::new(),
            used: VecDeque::new(),
            shown: 0,
            shown_used: 0,
            salt: 0,
            content: vec![0; buffers],
            driver_sleeps: false,
            device_sleeps: false,
        }
    }

    fn at(&self, token: u32) -> (*mut u8, u64) {
        let offset = self.buffers_at + token as usize * BUFFER;
        (self.memory.start.wrapping_add(offset), GUEST + offset as u64)
    }

    /// Fills what the device reads of a free buffer, and clears what it writes.
    fn prepare(&mut self, token: u32, lens: &[u32]) -> Offered {
        self.salt += 1;
        self.content[token as usize] = self.salt;
        let readable = match self.kind.direction {
            Direction::Read => lens.len(),
            Direction::Write => 0,
            Direction::Both => self.salt as usize % (lens.len() + 1),
        };
        let offered = Offered { token, lens: lens.to_vec(), readable };
        let (read, written) = offered.totals();
        for i in 0..read + written {
            let value = if i < read { byte(self.salt, i) } else { 0 };
            // SAFETY: within the buffer: lengths add up to at most `BUFFER`.
            unsafe { self.at(token).0.add(i as usize).write(value) };
        }
        offered
    }

    fn step(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match step {
            Step::Singles(lens) if self.kind.direction == Direction::Both => {
                for len in lens {
                    self.chain(&[*len], false)?;
                }
            }
            Step::Singles(lens) => self.singles(lens)?,
            Step::Chain { lens, indirect } => self.chain(lens, *indirect)?,
            Step::Publish => {
                let news = self.shown < self.offered.len();
                let kick = self.driver.publish();
                prop_assert!(news || !kick, "a notification of nothing");
                if news && self.device_sleeps {
                    prop_assert!(kick, "the device sleeps on");
                    self.device_sleeps = false;
                    with_ring!(&mut self.device, r => r.set_notify(false));
                }
                self.shown = self.offered.len();
            }
            Step::Use { want, batch, share } => self.use_some(*want, *batch, *share)?,
            Step::DevicePublish => {
                let news = self.shown_used < self.used.len();
                let call = with_ring!(&mut self.device, r => r.publish());
                if news && self.driver_sleeps {
                    prop_assert!(call, "the driver sleeps on");
                    self.driver_sleeps = false;
                    self.driver.suppress_notifications();
                }
                self.shown_used = self.used.len();
            }
            Step::Reclaim(max) => self.reclaim(*max)?,
            Step::DriverSleeps => {
                let ready = self.driver.request_notification();
                prop_assert_eq!(ready, self.shown_used > 0);
                self.driver_sleeps = !ready;
                if ready {
                    self.driver.suppress_notifications();
                }
            }
            Step::DeviceSleeps => {
                with_ring!(&mut self.device, r => r.set_notify(true));
                self.device_sleeps = !self.device.has_work();
                prop_assert_eq!(self.device_sleeps, self.shown == 0);
                if !self.device_sleeps {
                    with_ring!(&mut self.device, r => r.set_notify(false));
                }
            }
        }
        Ok(())
    }

    fn singles(&mut self, lens: &[u32]) -> Result<(), TestCaseError> {
        let mut buffers = Vec::new();
        for len in lens {
            let Some(token) = self.free.pop() else { break };
            buffers.push(self.prepare(token, &[*len]));
        }
        let free = usize::from(self.driver.free());
        let single = |o: &Offered| Single { address: self.at(o.token).1, len: o.lens[0], token: o.token };
        let singles: Vec<Single> = buffers.iter().map(single).collect();
        let n = self.driver.offer(singles.into_iter());
        prop_assert_eq!(n, free.min(buffers.len()));
        for (i, offered) in buffers.into_iter().enumerate() {
            if i < n {
                self.offered.push_back(offered);
            } else {
                self.free.push(offered.token);
            }
        }
        Ok(())
    }

    fn chain(&mut self, lens: &[u32], indirect: bool) -> Result<(), TestCaseError> {
        let Some(token) = self.free.pop() else { return Ok(()) };
        let offered = self.prepare(token, lens);
        let request = self.kind.direction == Direction::Both;
        let indirect = indirect && !request;
        let mut address = self.at(token).1;
        let mut pieces = Vec::new();
        for len in lens {
            pieces.push(Piece { address, len: *len });
            address += u64::from(*len);
        }
        let free = usize::from(self.driver.free());
        let result = if indirect {
            self.driver.offer_indirect(&pieces, token)
        } else if request {
            self.driver.offer_request(&pieces, offered.readable, token)
        } else {
            prop_assert_eq!(self.driver.offer_request(&pieces, 0, token), Err(OfferError::OneWay));
            self.driver.offer_chain(&pieces, token)
        };
        let needs = if indirect { 1 } else { lens.len() };
        let want = if needs > usize::from(self.kind.size) {
            Err(OfferError::Pieces(needs))
        } else if needs > free {
            Err(OfferError::Full)
        } else {
            Ok(())
        };
        prop_assert_eq!(result, want);
        match result {
            Ok(()) => self.offered.push_back(offered),
            Err(_) => self.free.push(token),
        }
        Ok(())
    }

    /// The device takes chains, compares or writes their bytes, and uses them.
    fn use_some(&mut self, want: usize, batch: usize, share: u32) -> Result<(), TestCaseError> {
        let n = with_ring!(&mut self.device, r => r.fetch(want)).unwrap();
        prop_assert_eq!(n, n.min(self.shown));
        prop_assert!(n >= want.min(self.shown), "{} of {} chains fetched", n, self.shown);
        let mut pending = 0;
        for i in 0..n.min(want) {
            let offered = self.offered.pop_front().unwrap();
            self.shown -= 1;
            let at = if self.kind.direction == Direction::Read { pending } else { 0 };
            let (chain, more) = with_ring!(&mut self.device, r => {
                let chain = *r.stock().get(at);
                (chain, r.stock().more(&chain).to_vec())
            });
            let mut pieces = vec![(chain.ptr, chain.len)];
            pieces.extend(more.iter().map(|b| (b.ptr, b.len)));
            let lens: Vec<u32> = pieces.iter().map(|(_, len)| *len).collect();
            prop_assert_eq!(&lens, &offered.lens);
            let salt = self.content[offered.token as usize];
            let (_, total) = offered.totals();
            match self.kind.direction {
                Direction::Read => {
                    let mut j = 0;
                    for (ptr, len) in pieces {
                        for k in 0..len {
                            // SAFETY: the device side checked the piece against the memory.
                            prop_assert_eq!(unsafe { ptr.add(k as usize).read() }, byte(salt, j));
                            j += 1;
                        }
                    }
                    self.used.push_back((offered, 0));
                    pending += 1;
                    if pending == batch || i + 1 == n.min(want) {
                        with_ring!(&mut self.device, r => r.use_read(pending));
                        pending = 0;
                    }
                }
                Direction::Write | Direction::Both => {
                    // On a ring of both, what is to be read and what is to be written come apart.
                    if self.kind.direction == Direction::Both {
                        let (read, write) = with_ring!(&mut self.device, r => {
                            let (read, write) = r.stock().request(0);
                            (read.collect::<Vec<_>>(), write.collect::<Vec<_>>())
                        });
                        prop_assert_eq!(
                            (read.len(), write.len()),
                            (offered.readable, lens.len() - offered.readable)
                        );
                        let bytes =
                            read.iter().flat_map(|b| (0..b.len as usize).map(|k| b.ptr.wrapping_add(k)));
                        for (j, ptr) in (0..).zip(bytes) {
                            // SAFETY: the device side checked the piece against the memory.
                            prop_assert_eq!(unsafe { ptr.read() }, byte(salt, j));
                        }
                    }
                    let written = total * share / 100;
                    let mut j = 0;
                    for (ptr, len) in pieces.into_iter().skip(offered.readable) {
                        for k in 0..len.min(written - j.min(written)) {
                            // SAFETY: as above.
                            unsafe { ptr.add(k as usize).write(byte(salt, j)) };
                            j += 1;
                        }
                    }
                    with_ring!(&mut self.device, r => r.use_written(written));
                    self.used.push_back((offered, written));
                }
            }
        }
        Ok(())
    }

    fn reclaim(&mut self, max: usize) -> Result<(), TestCaseError> {
        let mut got = Vec::new();
        let n = self.driver.reclaim(max, |token, len| got.push((token, len))).unwrap();
        prop_assert_eq!(n, got.len());
        prop_assert_eq!(n, max.min(self.shown_used));
        for (token, len) in got {
            let (used, written) = self.used.pop_front().unwrap();
            prop_assert_eq!((token, len), (used.token, written));
            self.shown_used -= 1;
            let salt = self.content[token as usize];
            let (read, _) = used.totals();
            for i in 0..len {
                // SAFETY: the device wrote at most the buffer's length.
                prop_assert_eq!(unsafe { self.at(token).0.add((read + i) as usize).read() }, byte(salt, i));
            }
            self.free.push(token);
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn every_buffer_comes_back_once_with_the_right_bytes(kind in kind(), steps in proptest::collection::vec(step(), 1..400)) {
        let mut world = World::new(kind);
        for step in &steps {
            world.step(step)?;
        }
        // Everything ends up free again.
        for step in [Step::Publish, Step::Use { want: 1000, batch: 3, share: 100 }, Step::DevicePublish, Step::Reclaim(1000)] {
            world.step(&step)?;
        }
        let all: HashSet<u32> = world.free.iter().copied().collect();
        prop_assert_eq!(all.len(), usize::from(kind.size) + 4);
        prop_assert_eq!(world.free.len(), all.len());
        prop_assert_eq!(world.driver.free(), kind.size);
    }

    /// A device dies; its successor knows nothing but what the driver tells it. What the old one had published is not done
    /// again, what it had taken and not published is.
    #[test]
    fn a_new_device_goes_on_behind_what_the_old_one_published(kind in kind(), before in proptest::collection::vec(step(), 1..200),
            after in proptest::collection::vec(step(), 1..100)) {
        let mut world = World::new(kind);
        for step in &before {
            world.step(step)?;
        }
        for (offered, _) in world.used.split_off(world.shown_used).into_iter().rev() {
            world.offered.push_front(offered);
            world.shown += 1;
        }
        let base = world.driver.resume_position().unwrap();
        let setup = RingSetup { base: Some(base), ..world.device.setup_mut().clone() };
        world.device = match DeviceRing::start(setup) {
            // A front end that forgot where a packed ring was says this too; some rings do not tell which it is.
            Err(RingError::NoPosition) if kind.layout == Layout::Packed && base == 0x8000_8000 => {
                return Err(TestCaseError::reject("no position"));
            }
            started => started.unwrap(),
        };
        (world.driver_sleeps, world.device_sleeps) = (false, false);
        world.driver.suppress_notifications();
        with_ring!(&mut world.device, r => r.set_notify(false));
        for step in &after {
            world.step(step)?;
        }
    }
}

/// Whether a new device takes "at the start" for the position of this world's ring.
fn starts_at_the_start(world: &mut World) -> bool {
    let setup = RingSetup { base: Some(0x8000_8000), ..world.device.setup_mut().clone() };
    DeviceRing::start(setup).is_ok()
}

#[test]
fn a_packed_ring_that_was_used_is_at_its_start_only_after_two_whole_laps() {
    let kind = Kind { layout: Layout::Packed, direction: Direction::Read, size: 8, features: f::VERSION_1 };
    for pieces in [1, 2, 4] {
        let mut world = World::new(kind);
        let chain = Step::Chain { lens: vec![64; pieces], indirect: false };
        let done = Step::Use { want: 1, batch: 1, share: 100 };
        for used in 1..=8 * 4 / pieces {
            for step in [&chain, &Step::Publish, &done, &Step::DevicePublish, &Step::Reclaim(8)] {
                world.step(step).unwrap();
            }
            let whole = (used * pieces).is_multiple_of(16);
            assert_eq!(starts_at_the_start(&mut world), whole, "{used} chains of {pieces} descriptors");
        }
    }
}

#[test]
fn a_full_packed_ring_whose_device_died_anywhere_is_not_taken_for_one_at_its_start() {
    let kind = Kind { layout: Layout::Packed, direction: Direction::Write, size: 8, features: f::VERSION_1 };
    let mut world = World::new(kind);
    world.step(&Step::Singles(vec![64; 8])).unwrap();
    for used in 1..64 {
        let refill = Step::Singles(vec![64]);
        let done = Step::Use { want: 1, batch: 1, share: 100 };
        for step in [&Step::Publish, &done, &Step::DevicePublish, &Step::Reclaim(8), &refill, &Step::Publish]
        {
            world.step(step).unwrap();
        }
        assert_eq!(starts_at_the_start(&mut world), used % 16 == 0, "{used} buffers");
    }
}
