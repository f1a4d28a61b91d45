//! A worker never allocates once it runs: a million frames of all the shapes that take the long way too, under an allocator
//! that counts what the worker's thread asks of it.

#![allow(clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout as Bytes, System};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use switch::bridge::{BridgePlan, Fdb, PortPlan};
use switch::config::{Idle, Inject, Share};
use switch::events::Events;
use switch::inject::{Injection, Injections, Lanes};
use switch::plan::{Devices, Extras, Plan, Plans};
use switch::vhost_port::{VhostDevice, VhostPort};
use switch::worker::{Worker, WorkerShared};
use vhost_user::{Device, QueueStart};
use virtio::device::{Direction, Layout, RingSetup};
use virtio::driver::{AreaSizes, DriverRing, DriverSetup, Piece};
use virtio::features as f;
use virtio::memory::{GuestMemory, HostRange, Region};
use virtio::net::NetHeader;

/// How many frames pass.
const FRAMES: u64 = 1_000_000;
/// Descriptors of each ring.
const SIZE: u16 = 256;
/// Bytes of each transmit and receive buffer.
const BUFFER: usize = 1024;

thread_local! {
    static WATCHED: Cell<bool> = const { Cell::new(false) };
}

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

/// The system's allocator; counts what a watched thread allocates or frees.
struct Counting;

impl Counting {
    fn count() {
        if WATCHED.get() {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
    }
}

// SAFETY: passes everything on to the system's allocator; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Bytes) -> *mut u8 {
        Self::count();
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Bytes) {
        Self::count();
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Bytes, size: usize) -> *mut u8 {
        Self::count();
        // SAFETY: the caller's promise.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes that both sides reach by raw pointers only.
struct Memory(*mut u8, Bytes);

// SAFETY: an address; whoever uses it does so through raw pointers.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout (`Guest::new`).
        unsafe { System.dealloc(self.0, self.1) }
    }
}

/// A guest with one queue pair: receive ring, transmit ring.
struct Guest {
    rings: [DriverRing; 2],
    buffers: [usize; 2],
    memory: Arc<Memory>,
    _device: VhostDevice,
}

impl Guest {
    fn new(port: &Arc<VhostPort>, layout: Layout) -> Self {
        let packed = if layout == Layout::Packed { f::RING_PACKED } else { 0 };
        let features = f::VERSION_1 | f::NET_MRG_RXBUF | f::IN_ORDER | packed;
        let sizes = AreaSizes::of(layout, SIZE);
        let mut at = 0;
        let mut place = |bytes: usize| {
            let here = at;
            at += bytes.next_multiple_of(64);
            (here, bytes)
        };
        let plans = [(); 2].map(|()| {
            let areas = [sizes.descriptors, sizes.driver, sizes.device].map(&mut place);
            (areas, place(BUFFER * usize::from(SIZE)).0)
        });
        let bytes = Bytes::from_size_align(at, 4096).unwrap();
        // SAFETY: the size is not zero.
        let memory = Arc::new(Memory(unsafe { System.alloc_zeroed(bytes) }, bytes));
        let region = Region { guest: 0, user: 0, size: at as u64, host: memory.0 };
        // SAFETY: the region is `memory`.
        let mapped = Arc::new(unsafe { GuestMemory::new(vec![region], Box::new(memory.clone())) }.unwrap());
        let mut device = VhostDevice::new(port.clone(), u64::MAX, None);
        device.connected();
        let mut index = 0;
        let rings = plans.map(|(areas, _)| {
            let [descriptors, driver, device_area] =
                areas.map(|(at, len)| HostRange { ptr: memory.0.wrapping_add(at), len, guest: at as u64 });
            let direction = if index == 1 { Direction::Read } else { Direction::Write };
            let setup = DriverSetup {
                layout,
                direction,
                size: SIZE,
                features,
                descriptors,
                driver,
                device: device_area,
                indirect: None,
                mapping: memory.clone(),
            };
            // SAFETY: the areas are apart and stay allocated as long as `memory`.
            let ring = unsafe { DriverRing::new(setup) }.unwrap();
            let ring_setup = RingSetup {
                layout,
                direction,
                size: SIZE,
                descriptors,
                driver,
                device: device_area,
                base: Some(if layout == Layout::Packed { 0x8000_8000 } else { 0 }),
                features,
                memory: mapped.clone(),
                log: None,
                log_used: None,
                inflight: None,
            };
            let start = QueueStart { ring: ring_setup, call: None, kick: None, err: None, enabled: true };
            device.start_queue(index, start).unwrap();
            index += 1;
            ring
        });
        Self { rings, buffers: plans.map(|plan| plan.1), memory, _device: device }
    }

    /// Gives every free receive buffer to the device, and forgets what came.
    fn receive(&mut self) {
        let at = self.buffers[0] as u64;
        self.rings[0].reclaim(usize::MAX, |_, _| {}).unwrap();
        while self.rings[0].free() > 0 {
            // In-order rings take the buffers round: any address will do, and this one is never read.
            let piece = Piece { address: at, len: 512 };
            self.rings[0].offer_chain(&[piece], 0).unwrap();
        }
        self.rings[0].publish();
    }

    /// Sends frame `n`: of one descriptor or three, whole or without its checksum, to one buffer or two.
    fn send(&mut self, n: u64) -> bool {
        self.rings[1].reclaim(usize::MAX, |_, _| {}).unwrap();
        if self.rings[1].free() < 3 {
            return false;
        }
        let at = self.buffers[1] + (n as usize % usize::from(SIZE)) * BUFFER;
        let len = if n.is_multiple_of(5) { 700 } else { 60 + n as usize % 400 };
        let unfinished = n.is_multiple_of(7);
        let header = if unfinished { NetHeader::PLAIN.with_checksum(34, 16) } else { NetHeader::PLAIN };
        // Addresses that differ in more than the one bit that damage may turn round.
        let frame = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0xfe, 0x88, 0xb5];
        for (i, byte) in header.0.iter().chain(&frame).enumerate() {
            // SAFETY: within this frame's buffer, which the device has given back.
            unsafe { self.memory.0.add(at + i).write_volatile(*byte) };
        }
        let piece = |from: usize, len: usize| Piece { address: (at + from) as u64, len: len as u32 };
        let pieces = [piece(0, 12), piece(12, 14), piece(26, len - 14)];
        let pieces = if n.is_multiple_of(3) { &pieces[..] } else { &[piece(0, 12 + len)] };
        self.rings[1].offer_chain(pieces, 0).unwrap();
        self.rings[1].publish();
        true
    }
}

/// Lets frames pass from one guest to the other, who suffer on purpose if `inject` says so: as they come in, and as they go out.
fn pass_frames(layout: Layout, frames: u64, inject: Option<&Inject>) {
    let events = Events::channel(64).0;
    let ports = [0, 1].map(|number| VhostPort::new(number, "vnf", 1, events.clone()));
    let [mut sender, mut receiver] = [&ports[0], &ports[1]].map(|port| Guest::new(port, layout));
    let fdb = Arc::new(Fdb::new(1024).unwrap());
    let plan = Plan {
        bridge: BridgePlan::new(vec![Some(PortPlan::default()); 2], fdb, false).unwrap(),
        ports: ports.iter().cloned().map(Some).collect(),
        queues: vec![ports.iter().flat_map(|port| port.rx.iter().cloned()).collect()],
        devices: Devices::default(),
        extras: Extras { injections: injections(inject), ..Extras::default() }.any(),
        burst: 64,
        idle: Idle::Poll,
    };
    let shared = Arc::new(WorkerShared::new(0, 0, host::cpu::rdtsc()).unwrap());
    let mut worker = Worker::new(shared.clone(), Arc::new(Plans::new(plan))).unwrap();
    let thread = std::thread::spawn(move || {
        WATCHED.set(true);
        worker.run();
        WATCHED.set(false);
    });
    let mut sent = 0;
    while sent < frames {
        receiver.receive();
        let before = sent;
        while sent < before + 64 && sender.send(sent) {
            sent += 1;
        }
        if sent == before {
            std::thread::yield_now();
        }
    }
    let counters = &ports[0].rx[0].counters;
    while counters.received.get() < sent {
        receiver.receive();
        std::thread::yield_now();
    }
    shared.stop.store(true, Ordering::Relaxed);
    thread.join().unwrap();
    let (out, dropped) = (&ports[1].tx[0].counters, counters.drops.total());
    assert_eq!((counters.received.get(), dropped > 0), (sent, inject.is_some()));
    let out_dropped: u64 = out.all_drops().iter().map(|(_, n)| n).sum();
    assert_eq!(out.sent.get() + out_dropped, out.all_offered());
    // Those that waited when the worker ended are no more.
    assert!(
        (sent - dropped).abs_diff(out.all_offered()) < 1_000,
        "{sent} - {dropped}, {}",
        out.all_offered()
    );
    let drops = (counters.drops.list(), out.all_drops());
    assert!(out.sent.get() > sent / 10, "{} of {sent} frames arrived: {drops:?}", out.sent.get());
}

fn injections(inject: Option<&Inject>) -> Injections {
    let of = |inject| [0, 1].map(|port| Injection { port, lanes: Lanes::new(inject, 1) }).into();
    Injections::new(inject.map_or_else(Vec::new, of))
}

#[test]
fn a_worker_allocates_nothing_over_a_million_frames() {
    for layout in [Layout::Split, Layout::Packed] {
        pass_frames(layout, FRAMES / 2, None);
    }
    // Not twice: a frame that comes twice is received twice, and who sends counts on the number.
    let share = Share::of_millionths(20_000);
    let delay = std::time::Duration::from_micros(100);
    pass_frames(
        Layout::Split,
        FRAMES / 10,
        Some(&Inject { drop: share, corrupt: share, reorder: share, delay, ..Inject::default() }),
    );
    assert_eq!(ALLOCATIONS.load(Ordering::Relaxed), 0);
    // The allocator does count: one box on a watched thread is seen.
    WATCHED.set(true);
    drop(std::hint::black_box(Box::new(1)));
    WATCHED.set(false);
    assert_eq!(ALLOCATIONS.load(Ordering::Relaxed), 2);
}
