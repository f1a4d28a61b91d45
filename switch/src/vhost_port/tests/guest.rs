//! A guest made of memory and two kinds of driver-side rings, for tests of the switch's data path.
//!
//! Owns the memory that the port maps; fills what it offers with canaries and finds every byte that was written where it
//! should not have been. Knows nothing of how the switch works.

use std::collections::{BTreeSet, HashMap};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::sys::eventfd::{EfdFlags, EventFd};
use vhost_user::{Device, QueueStart};
use virtio::device::{Direction, InflightArea, Layout, RingSetup};
use virtio::driver::{AreaSizes, DriverRing, DriverSetup, IndirectTables, Piece};
use virtio::features as f;
use virtio::memory::{GuestMemory, HostRange, Region};
use virtio::net::{NetHeader, header_len};

use super::super::{VhostDevice, VhostPort};

/// Where the guest sees its memory.
pub(super) const GUEST: u64 = 0x4000_0000;

/// What lies around and behind everything that a guest offers.
const CANARY: u8 = 0xa5;

/// Bytes left between the pieces of a chain.
const GAP: usize = 5;

/// Longest indirect table.
const TABLE: u16 = 300;

/// How a guest's driver works.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kind {
    pub(super) layout: Layout,
    pub(super) features: u64,
    /// Descriptors of each ring.
    pub(super) size: u16,
    /// Bytes set aside for each buffer.
    pub(super) slot: usize,
    /// Queue pairs.
    pub(super) pairs: u16,
}

impl Kind {
    pub(super) fn with(self, features: u64) -> Self {
        Self { features: self.features | features, ..self }
    }

    pub(super) fn without(self, features: u64) -> Self {
        Self { features: self.features & !features, ..self }
    }
}

/// A guest as Linux or DPDK would be one: virtio 1.x, mergeable buffers.
pub(super) fn modern(layout: Layout) -> Kind {
    let packed = if layout == Layout::Packed { f::RING_PACKED } else { 0 };
    let features = f::VERSION_1 | f::NET_MRG_RXBUF | f::RING_INDIRECT_DESC | packed;
    Kind { layout, features, size: 64, slot: 9_400, pairs: 1 }
}

/// Both layouts, with and without IN_ORDER, with and without EVENT_IDX.
pub(super) fn all_kinds() -> Vec<Kind> {
    let mut kinds = Vec::new();
    for layout in [Layout::Split, Layout::Packed] {
        for features in [0, f::IN_ORDER, f::RING_EVENT_IDX, f::IN_ORDER | f::RING_EVENT_IDX] {
            kinds.push(modern(layout).with(features));
        }
    }
    kinds
}

/// Memory that both sides reach by raw pointers only.
struct Memory {
    start: *mut u8,
    layout: std::alloc::Layout,
}

// SAFETY: only addresses; whoever uses them does so through raw pointers.
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

/// One ring, as its driver has it.
pub(super) struct Queue {
    pub(super) driver: DriverRing,
    pub(super) index: u16,
    /// Descriptors (or packed ring), driver area, device area.
    pub(super) areas: [HostRange; 3],
    /// Where the inflight region of a packed ring is.
    inflight: HostRange,
    call: EventFd,
    slots_at: usize,
    free: Vec<u32>,
    /// Where the pieces of each outstanding buffer lie: offset in memory, bytes.
    offered: HashMap<u32, Vec<(usize, usize)>>,
}

/// A frame that came in.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Received {
    pub(super) header: NetHeader,
    pub(super) bytes: Vec<u8>,
    /// Used length of each buffer.
    pub(super) used: Vec<u32>,
}

/// A virtual machine's network device, seen from inside.
pub(super) struct Guest {
    pub(super) port: Arc<VhostPort>,
    pub(super) device: VhostDevice,
    pub(super) kind: Kind,
    /// Receive rings.
    pub(super) rx: Vec<Queue>,
    /// Transmit rings.
    pub(super) tx: Vec<Queue>,
    memory: Arc<Memory>,
    mapped: Arc<GuestMemory>,
}

impl Guest {
    /// A guest with running rings on `port`.
    pub(super) fn new(port: Arc<VhostPort>, kind: Kind) -> Self {
        let sizes = AreaSizes::of(kind.layout, kind.size);
        let mut at = 0;
        // Everything begins on a page of its own, so that the dirty log tells it apart.
        let mut place = |bytes: usize| {
            let here = at;
            at += bytes.next_multiple_of(4096);
            (here, bytes)
        };
        let plans: Vec<_> = (0..2 * kind.pairs)
            .map(|index| {
                let tables = place(16 * usize::from(TABLE) * usize::from(kind.size));
                let areas = [sizes.descriptors, sizes.driver, sizes.device].map(&mut place);
                let (slots, _) = place(kind.slot * usize::from(kind.size));
                (index, tables, areas, place(4096), slots)
            })
            .collect();
        let memory = Memory::new(at);
        let range = |(at, len): (usize, usize)| HostRange {
            ptr: memory.start.wrapping_add(at),
            len,
            guest: GUEST + at as u64,
        };
        let queue = |(index, tables, areas, inflight, slots_at): (u16, _, [_; 3], _, usize)| {
            let areas @ [descriptors, driver, device] = areas.map(range);
            let direction = if index % 2 == 1 { Direction::Read } else { Direction::Write };
            let setup = DriverSetup {
                layout: kind.layout,
                direction,
                size: kind.size,
                features: kind.features,
                descriptors,
                driver,
                device,
                indirect: Some(IndirectTables { range: range(tables), entries: TABLE }),
                mapping: memory.clone(),
            };
            // SAFETY: the areas are apart and stay allocated as long as `memory`.
            let driver = unsafe { DriverRing::new(setup) }.unwrap();
            let call = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
            let free = (0..u32::from(kind.size)).rev().collect();
            let offered = HashMap::new();
            Queue { driver, index, areas, inflight: range(inflight), call, slots_at, free, offered }
        };
        let (mut rx, mut tx) = (Vec::new(), Vec::new());
        for plan in plans {
            if plan.0 % 2 == 1 { tx.push(queue(plan)) } else { rx.push(queue(plan)) }
        }
        let region = Region { guest: GUEST, user: 0x7000_0000_0000, size: at as u64, host: memory.start };
        // SAFETY: the region is `memory`.
        let mapped = unsafe { GuestMemory::new(vec![region], Box::new(memory.clone())) }.unwrap();
        let device = VhostDevice::new(port.clone(), u64::MAX, None);
        let mut guest = Self { port, device, kind, rx, tx, memory, mapped: Arc::new(mapped) };
        guest.device.connected();
        let base = if kind.layout == Layout::Packed { 0x8000_8000 } else { 0 };
        guest.start(Some(base));
        guest
    }

    /// Starts all rings: at `base`, or where the inflight region says.
    pub(super) fn start(&mut self, base: Option<u32>) {
        for queue in self.rx.iter().chain(&self.tx) {
            let start = self.queue_start(queue, base);
            self.device.start_queue(queue.index, start).unwrap();
        }
    }

    fn queue_start(&self, queue: &Queue, base: Option<u32>) -> QueueStart {
        let [descriptors, driver, device] = queue.areas;
        let ring = RingSetup {
            layout: self.kind.layout,
            direction: Direction::Read,
            size: self.kind.size,
            descriptors,
            driver,
            device,
            base,
            features: self.kind.features,
            memory: self.mapped.clone(),
            log: None,
            log_used: None,
            inflight: Some(InflightArea { range: queue.inflight, mapping: self.memory.clone() }),
        };
        let call: OwnedFd = queue.call.as_fd().try_clone_to_owned().unwrap();
        QueueStart { ring, call: Some(call), kick: None, err: None, enabled: true }
    }

    /// The same guest, after the switch was killed and another one started: nothing is left of the old port.
    pub(super) fn moved_to(mut self, port: Arc<VhostPort>) -> Self {
        self.device = VhostDevice::new(port.clone(), u64::MAX, None);
        self.port = port;
        self
    }

    /// Bytes before each frame.
    pub(super) fn header(&self) -> usize {
        header_len(self.kind.features)
    }

    /// Bytes of all memory, as the guest sees them now.
    pub(super) fn snapshot(&self) -> Vec<u8> {
        // SAFETY: the whole allocation; the switch runs on this thread and not now.
        (0..self.memory.layout.size()).map(|i| unsafe { self.memory.start.add(i).read_volatile() }).collect()
    }

    fn read(&self, at: usize, len: usize) -> Vec<u8> {
        // SAFETY: within the allocation; the switch does not run now, or the driver has not offered these bytes.
        (at..at + len).map(|i| unsafe { self.memory.start.add(i).read_volatile() }).collect()
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.memory.layout.size());
        // SAFETY: within the allocation; the switch does not run now, or the driver has not offered these bytes.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.memory.start.add(at), bytes.len()) }
    }

    /// Takes a free slot of a ring, full of canaries, and lays out pieces of these lengths in it.
    fn lay_out(&self, queue: &mut Queue, lens: &[usize]) -> (u32, Vec<Piece>) {
        let token = queue.free.pop().expect("a free slot");
        let slot = queue.slots_at + token as usize * self.kind.slot;
        self.write(slot, &vec![CANARY; self.kind.slot]);
        let mut at = slot + GAP;
        let mut places = Vec::new();
        for &len in lens {
            places.push((at, len));
            at += len + GAP;
        }
        assert!(at <= slot + self.kind.slot, "{lens:?} do not fit into a slot");
        let pieces =
            places.iter().map(|&(at, len)| Piece { address: GUEST + at as u64, len: len as u32 }).collect();
        queue.offered.insert(token, places);
        (token, pieces)
    }

    fn offer(queue: &mut Queue, pieces: &[Piece], token: u32, indirect: bool) {
        if indirect {
            queue.driver.offer_indirect(pieces, token).unwrap();
        } else {
            queue.driver.offer_chain(pieces, token).unwrap();
        }
        queue.driver.publish();
    }

    /// Offers a frame: header and bytes, cut into descriptors of `cuts` bytes and one for the rest.
    pub(super) fn send_as(
        &mut self,
        pair: usize,
        header: NetHeader,
        frame: &[u8],
        cuts: &[usize],
        indirect: bool,
    ) {
        let bytes = [&header.0[..self.header()], frame].concat();
        let mut lens = Vec::new();
        let mut left = bytes.len();
        for &cut in cuts {
            lens.push(cut.min(left));
            left -= cut.min(left);
        }
        lens.push(left);
        lens.retain(|&len| len > 0);
        let mut queue = self.tx.remove(pair);
        let (token, pieces) = self.lay_out(&mut queue, &lens);
        let mut rest = &bytes[..];
        for &(at, len) in &queue.offered[&token] {
            let (these, behind) = rest.split_at(len);
            self.write(at, these);
            rest = behind;
        }
        Self::offer(&mut queue, &pieces, token, indirect);
        self.tx.insert(pair, queue);
    }

    /// Offers a plain frame in one descriptor.
    pub(super) fn send(&mut self, frame: &[u8]) {
        self.send_as(0, NetHeader::PLAIN, frame, &[], false);
    }

    /// Offers a receive buffer of these pieces.
    pub(super) fn offer_buffer(&mut self, pair: usize, lens: &[usize], indirect: bool) {
        let mut queue = self.rx.remove(pair);
        let (token, pieces) = self.lay_out(&mut queue, lens);
        Self::offer(&mut queue, &pieces, token, indirect);
        self.rx.insert(pair, queue);
    }

    /// Offers as many receive buffers of `len` bytes as the rings take.
    pub(super) fn offer_all(&mut self, len: usize) {
        for pair in 0..self.rx.len() {
            while self.rx[pair].driver.free() > 0 {
                self.offer_buffer(pair, &[len], false);
            }
        }
    }

    /// Takes back what was sent. Returns how many came back; checks that not a byte of them was written.
    pub(super) fn reclaim_sent(&mut self) -> usize {
        let mut n = 0;
        for queue in &mut self.tx {
            n += queue
                .driver
                .reclaim(usize::MAX, |token, len| {
                    assert_eq!(len, 0, "a transmit buffer was written to");
                    queue.free.push(token);
                    queue.offered.remove(&token);
                })
                .unwrap();
        }
        n
    }

    /// The buffers that came back on a receive ring: what was written to each. Checks every canary.
    pub(super) fn returned(&mut self, pair: usize) -> Vec<Vec<u8>> {
        let mut used = Vec::new();
        self.rx[pair].driver.reclaim(usize::MAX, |token, len| used.push((token, len as usize))).unwrap();
        let mut all = Vec::new();
        for (token, len) in used {
            let places = self.rx[pair].offered.remove(&token).unwrap();
            let slot = self.rx[pair].slots_at + token as usize * self.kind.slot;
            let mut content = self.read(slot, self.kind.slot);
            let mut bytes = Vec::new();
            for (at, piece) in places {
                let n = piece.min(len - bytes.len());
                let written = &mut content[at - slot..at - slot + n];
                bytes.extend_from_slice(written);
                written.fill(CANARY);
            }
            assert_eq!(bytes.len(), len, "more used than offered");
            if let Some(at) = content.iter().position(|&b| b != CANARY) {
                panic!("byte {at} of a slot was written, and only {len} bytes were used");
            }
            self.rx[pair].free.push(token);
            all.push(bytes);
        }
        all
    }

    /// The frames that came in on a receive ring.
    pub(super) fn received_on(&mut self, pair: usize) -> Vec<Received> {
        let (header, mergeable) = (self.header(), self.kind.features & f::NET_MRG_RXBUF != 0);
        let mut buffers = self.returned(pair).into_iter();
        let mut frames = Vec::new();
        while let Some(mut bytes) = buffers.next() {
            let mut used = vec![bytes.len() as u32];
            let mut more = |bytes: &mut Vec<u8>, used: &mut Vec<u32>| {
                let next = buffers.next().expect("all buffers of a frame in one publish");
                used.push(next.len() as u32);
                bytes.extend(next);
            };
            while bytes.len() < header {
                more(&mut bytes, &mut used);
            }
            let net = NetHeader::parse(&bytes[..header]).unwrap();
            while mergeable && used.len() < usize::from(net.num_buffers()) {
                more(&mut bytes, &mut used);
            }
            frames.push(Received { header: net, bytes: bytes.split_off(header), used });
        }
        frames
    }

    /// The frames that came in on the first receive ring.
    pub(super) fn received(&mut self) -> Vec<Received> {
        self.received_on(0)
    }

    /// Whether no buffer that is still offered was written to.
    pub(super) fn is_untouched(&self) -> bool {
        self.rx.iter().all(|queue| {
            queue.offered.keys().all(|&token| {
                let slot = queue.slots_at + token as usize * self.kind.slot;
                self.read(slot, self.kind.slot).iter().all(|&b| b == CANARY)
            })
        })
    }

    /// Pages of the inflight regions, which a real front end keeps elsewhere.
    pub(super) fn inflight_pages(&self) -> BTreeSet<u64> {
        self.rx.iter().chain(&self.tx).map(|queue| queue.inflight.guest / 4096).collect()
    }
}

impl Queue {
    /// Notifications since the last look.
    pub(super) fn calls(&self) -> u64 {
        self.call.read().unwrap_or(0)
    }

    /// Writes 16 bits into an area, as a hostile driver does.
    pub(super) fn poke16(&self, area: usize, at: usize, value: u16) {
        assert!(at + 2 <= self.areas[area].len);
        // SAFETY: within the area; the switch runs on this thread and not now.
        unsafe { self.areas[area].ptr.add(at).cast::<u16>().write_volatile(value) }
    }
}
