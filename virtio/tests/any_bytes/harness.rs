//! Rings made of any bytes: the other side mostly makes entries in the right places, with any fields, and now and then writes
//! anything anywhere. Shared by the property test beside this file
//! and the fuzz target in `fuzz/`.
//!
//! Asserts that no access leaves the memory (buffers handed out lie in it), that work is bounded, and that a driver gets
//! back only buffers that it gave away, each once. A ring may break at any time; then it is not used any more.

use std::collections::HashSet;
use std::sync::Arc;

use virtio::device::{DeviceRing, Direction, Layout, MAX_CHAIN, Ring, RingSetup};
use virtio::driver::{AreaSizes, DriverRing, DriverSetup, IndirectTables, Piece, Single};
use virtio::features as f;
use virtio::memory::{GuestMemory, HostRange, Region};
use virtio::with_ring;

/// Where the memory is for the device: near 0, so that short random numbers are addresses.
const GUEST: u64 = 0x1000;
/// Bytes of the memory.
const MEMORY: usize = 0x4000;

/// Bytes taken from the input, zeros when it is used up.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let first = self.0.split_first();
        let (byte, rest) = first.map_or((0, self.0), |(b, rest)| (*b, rest));
        self.0 = rest;
        byte
    }

    fn word(&mut self) -> u16 {
        u16::from(self.byte()) | u16::from(self.byte()) << 8
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Memory that is reached by raw pointers only.
struct Memory(*mut u8);

// SAFETY: only an address; one thread works on it.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    const LAYOUT: std::alloc::Layout = match std::alloc::Layout::from_size_align(MEMORY, 4096) {
        Ok(layout) => layout,
        Err(_) => unreachable!(),
    };

    fn new() -> Arc<Self> {
        // SAFETY: the size is not zero.
        Arc::new(Self(unsafe { std::alloc::alloc_zeroed(Self::LAYOUT) }))
    }

    fn range(&self, at: usize, len: usize) -> HostRange {
        assert!(at + len <= MEMORY);
        HostRange { ptr: self.0.wrapping_add(at), len, guest: GUEST + at as u64 }
    }

    fn put<const N: usize>(&self, at: usize, bytes: [u8; N]) {
        assert!(at + N <= MEMORY);
        for (i, byte) in bytes.into_iter().enumerate() {
            // SAFETY: inside the memory, by the check above.
            unsafe { self.0.add(at + i).write_volatile(byte) };
        }
    }

    /// Overwrites up to 16 bytes somewhere, one time in eight.
    fn scribble(&self, input: &mut Input<'_>, within: usize) {
        if input.byte() < 224 {
            return;
        }
        let at = usize::from(input.word()) % within;
        for i in at..(at + usize::from(input.byte() % 16) + 1).min(within) {
            self.put(i, [input.byte()]);
        }
    }
}

/// What the other side writes next, in the order in which entries are looked for.
#[derive(Default)]
struct Cursor {
    /// Ring entries so far.
    count: u16,
    /// Packed: place and wrap counter.
    at: u16,
    wrapped: bool,
}

impl Cursor {
    fn advance(&mut self, by: u16, size: u16) {
        self.count = self.count.wrapping_add(1);
        self.at += by;
        if self.at >= size {
            self.at %= size;
            self.wrapped = !self.wrapped;
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { std::alloc::dealloc(self.0, Self::LAYOUT) }
    }
}

struct Kind {
    layout: Layout,
    direction: Direction,
    size: u16,
    features: u64,
}

impl Kind {
    fn from(input: &mut Input<'_>) -> Self {
        let bits = input.byte();
        let layout = if bits & 1 == 0 { Layout::Split } else { Layout::Packed };
        let direction = match bits & (2 | 16) {
            0 => Direction::Read,
            2 => Direction::Write,
            _ => Direction::Both,
        };
        let size = match layout {
            Layout::Split => 1 << (input.byte() % 7),
            Layout::Packed => u16::from(input.byte() % 64) + 1,
        };
        let mut features = f::VERSION_1 | f::RING_INDIRECT_DESC;
        for (bit, feature) in [(4, f::IN_ORDER), (8, f::RING_EVENT_IDX)] {
            features |= if bits & bit != 0 { feature } else { 0 };
        }
        features |= if layout == Layout::Packed { f::RING_PACKED } else { 0 };
        Self { layout, direction, size, features }
    }

    /// The three areas, one behind the other, and where they end.
    fn areas(&self, memory: &Memory) -> ([HostRange; 3], usize) {
        let sizes = AreaSizes::of(self.layout, self.size);
        let mut at = 0;
        let areas = [sizes.descriptors, sizes.driver, sizes.device].map(|len| {
            let range = memory.range(at, len);
            at = (at + len).next_multiple_of(16);
            range
        });
        (areas, at)
    }
}

impl Kind {
    /// Writes a descriptor with any address, length and links, and makes it available.
    fn make_available(&self, memory: &Memory, input: &mut Input<'_>, cursor: &mut Cursor) {
        let sizes = AreaSizes::of(self.layout, self.size);
        let right = match self.direction {
            Direction::Read => 0,
            Direction::Write => 2,
            Direction::Both => u16::from(input.byte()) & 2,
        };
        // Usually of the right direction; sometimes chained, indirect, or anything.
        let kind = input.byte();
        let flags = match kind % 8 {
            0..4 => right,
            4 => right | 1,
            5 => 4,
            6 => u16::from(kind >> 3) & 7,
            _ => 0,
        };
        let address = GUEST + u64::from(input.word() % MEMORY as u16);
        let len =
            if flags & 4 != 0 { 16 * u32::from(input.byte() % 20) } else { u32::from(input.word() % 4096) };
        let (a, b) = (u16::from(input.byte()), u16::from(input.byte()) % (self.size + 1));
        match self.layout {
            Layout::Split => {
                let head = a % (self.size + u16::from(a == 255));
                let table = 16 * usize::from(head % self.size);
                memory.put(table, address.to_le_bytes());
                memory.put(table + 8, len.to_le_bytes());
                memory.put(table + 12, flags.to_le_bytes());
                memory.put(table + 14, b.to_le_bytes());
                let avail = sizes.descriptors.next_multiple_of(16);
                memory.put(avail + 4 + 2 * usize::from(cursor.count % self.size), head.to_le_bytes());
                cursor.advance(1, self.size);
                memory.put(avail + 2, cursor.count.to_le_bytes());
            }
            Layout::Packed => {
                let at = 16 * usize::from(cursor.at);
                let flags = flags | if cursor.wrapped { 1 << 15 } else { 1 << 7 };
                memory.put(at, address.to_le_bytes());
                memory.put(at + 8, len.to_le_bytes());
                memory.put(at + 12, a.to_le_bytes());
                memory.put(at + 14, flags.to_le_bytes());
                cursor.advance(1, self.size);
            }
        }
    }

    /// Writes a used element with any id and length, and publishes it.
    fn make_used(&self, memory: &Memory, input: &mut Input<'_>, cursor: &mut Cursor) {
        let sizes = AreaSizes::of(self.layout, self.size);
        let choice = input.byte();
        // Usually what an honest device would say.
        let id = if choice < 192 { cursor.at } else { u16::from(choice) % (self.size + 1) };
        let len = u32::from(input.byte() % 101) + u32::from(choice == 255);
        let step = u16::from(input.byte().is_multiple_of(8)) + 1;
        match self.layout {
            Layout::Split => {
                let used = (sizes.descriptors.next_multiple_of(16) + sizes.driver).next_multiple_of(16);
                let at = used + 4 + 8 * usize::from(cursor.count % self.size);
                memory.put(at, u32::from(id).to_le_bytes());
                memory.put(at + 4, len.to_le_bytes());
                cursor.advance(step, self.size);
                memory.put(used + 2, cursor.count.to_le_bytes());
            }
            Layout::Packed => {
                let at = 16 * usize::from(cursor.at);
                let flags = if cursor.wrapped { 0u16 } else { 1 << 7 | 1 << 15 };
                memory.put(at + 8, len.to_le_bytes());
                memory.put(at + 12, id.to_le_bytes());
                memory.put(at + 14, flags.to_le_bytes());
                cursor.advance(step, self.size);
            }
        }
    }
}

/// A device whose driver writes any bytes.
pub(crate) fn device(bytes: &[u8]) {
    let mut input = Input(bytes);
    let kind = Kind::from(&mut input);
    let memory = Memory::new();
    let ([descriptors, driver, device], _) = kind.areas(&memory);
    let base = match (input.byte(), kind.layout) {
        (255, _) => u32::from(input.word()) << 16 | u32::from(input.word()),
        (_, Layout::Split) => 0,
        (_, Layout::Packed) => 0x8000_8000,
    };
    let region = Region { guest: GUEST, user: 0, size: MEMORY as u64, host: memory.0 };
    // SAFETY: the region is `memory`, which the box keeps.
    let guest = unsafe { GuestMemory::new(vec![region], Box::new(memory.clone())) };
    let Ok(guest) = guest else { return };
    let &Kind { layout, direction, size, features } = &kind;
    let started = DeviceRing::start(RingSetup {
        layout,
        direction,
        size,
        descriptors,
        driver,
        device,
        base: Some(base),
        features,
        memory: Arc::new(guest),
        log: None,
        log_used: None,
        inflight: None,
    });
    let Ok(mut ring) = started else { return };
    let inside = |ptr: *mut u8, len: u32| {
        let at = ptr.addr().wrapping_sub(memory.0.addr());
        assert!(at <= MEMORY && MEMORY - at >= len as usize, "a buffer outside the memory");
    };
    let mut cursor = Cursor::default();
    let mut taken = Vec::new();
    while !input.is_empty() {
        for _ in 0..input.byte() % 8 {
            kind.make_available(&memory, &mut input, &mut cursor);
        }
        memory.scribble(&mut input, MEMORY);
        let want = usize::from(input.byte() % 80);
        let broke = with_ring!(&mut ring, r => {
            let fetched = r.peek(want).and_then(|_| r.fetch(want));
            let n = r.stock().len();
            assert!(n <= usize::from(size).next_power_of_two(), "{n} chains in a ring of {size}");
            for i in 0..n {
                let chain = *r.stock().get(i);
                let more = r.stock().more(&chain);
                assert!(more.len() < MAX_CHAIN);
                if chain.total > 0 {
                    inside(chain.ptr, chain.len);
                    more.iter().for_each(|b| inside(b.ptr, b.len));
                    let sum = more.iter().fold(u64::from(chain.len), |sum, b| sum + u64::from(b.len));
                    assert_eq!(sum, u64::from(chain.total));
                }
                if direction == Direction::Both {
                    let (read, written) = r.stock().request(i);
                    let both = read.chain(written).fold(0, |sum, b| sum + u64::from(b.len));
                    assert_eq!(both, u64::from(chain.total));
                }
            }
            if direction == Direction::Both && features & f::IN_ORDER == 0 {
                // Some are under way for a while, and done in another order.
                taken.extend((0..usize::from(input.byte() % 4)).map_while(|_| r.take()));
                for _ in 0..(usize::from(input.byte()) % 4).min(taken.len()) {
                    r.use_taken(taken.swap_remove(0), 1);
                }
            }
            assert!(taken.len() + r.stock().len() <= usize::from(size), "more than the ring holds");
            let some = usize::from(input.byte()) % (r.stock().len() + 1);
            match direction {
                Direction::Read => r.use_read(some),
                Direction::Write | Direction::Both => (0..some).for_each(|_| r.use_written(1)),
            }
            r.publish();
            r.prefetch_ahead(u16::from(input.byte() % 64).min(size));
            r.base();
            fetched.is_err()
        });
        if broke {
            return;
        }
    }
}

/// A driver whose device writes any bytes.
pub(crate) fn driver(bytes: &[u8]) {
    let mut input = Input(bytes);
    let kind = Kind::from(&mut input);
    let memory = Memory::new();
    let ([descriptors, driver, device], end) = kind.areas(&memory);
    let entries = 4;
    let tables = memory.range(end, 16 * usize::from(entries) * usize::from(kind.size));
    // SAFETY: the areas are apart and live as long as `memory`.
    let ring = unsafe {
        DriverRing::new(DriverSetup {
            layout: kind.layout,
            direction: kind.direction,
            size: kind.size,
            features: kind.features,
            descriptors,
            driver,
            device,
            indirect: Some(IndirectTables { range: tables, entries }),
            mapping: memory.clone(),
        })
    };
    let Ok(mut ring) = ring else { return };
    let mut cursor = Cursor::default();
    let mut next = 0;
    let mut outstanding = HashSet::new();
    while !input.is_empty() {
        let n = u32::from(input.byte() % 8);
        let offered = ring.offer((next..next + n).map(|token| Single { address: 0, len: 100, token }));
        outstanding.extend(next..next + offered as u32);
        next += n;
        let pieces = [Piece { address: 0, len: 25 }; 4];
        let pieces = pieces.get(..usize::from(input.byte() % 5)).unwrap_or_default();
        let chained = match input.byte() % 2 {
            0 if kind.direction == Direction::Both => {
                ring.offer_request(pieces, usize::from(input.byte() % 5), next)
            }
            0 => ring.offer_chain(pieces, next),
            _ => ring.offer_indirect(pieces, next),
        };
        if chained.is_ok() {
            outstanding.insert(next);
        }
        next += 1;
        ring.publish();
        for _ in 0..input.byte() % 8 {
            kind.make_used(&memory, &mut input, &mut cursor);
        }
        memory.scribble(&mut input, end);
        ring.is_ready();
        let _ = ring.resume_position();
        let result = ring.reclaim(usize::from(input.byte() % 16), |token, len| {
            assert!(outstanding.remove(&token), "buffer {token} came back, and the device did not have it");
            assert!(len <= 100, "{len} bytes written to a buffer of 100");
        });
        assert!(ring.free() <= kind.size);
        if result.is_err() {
            break;
        }
    }
    ring.abandon(|token| assert!(outstanding.remove(&token), "buffer {token} is not the device's"));
    assert!(outstanding.is_empty(), "buffers were lost");
}
