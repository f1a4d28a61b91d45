//! A queue pair against the device side of our own rings, in one thread.

use std::sync::Arc;

use host::memory::Pages;
use virtio::device::{DeviceRing, Direction, Layout, Ring, RingSetup};
use virtio::features as f;
use virtio::memory::{GuestMemory, Region};
use virtio::net::NetHeader;
use virtio::with_ring;

use super::Buffer;
use super::memory::{DeviceMemory, GUEST_BASE, HEADROOM, Plan};
use super::queue::QueuePair;

const OWNER: u16 = 7;

/// A queue pair whose back end returns every frame it gets.
struct Loop {
    pair: QueuePair,
    negotiated: u64,
    buffers: usize,
    receive: DeviceRing,
    transmit: DeviceRing,
}

impl Loop {
    fn new(layout: Layout, queue_size: u16, features: u64, buffers: u32, buffer_size: u32) -> Self {
        let packed = if layout == Layout::Packed { f::RING_PACKED } else { 0 };
        let negotiated = f::VERSION_1 | features | packed;
        let plan = Plan { layout, queue_size, queue_pairs: 1, buffers, buffer_size };
        let memory = DeviceMemory::new(plan, Pages::Ordinary).unwrap();
        let host = memory.shared().as_ptr();
        let region =
            Region { guest: GUEST_BASE, user: host.addr() as u64, size: memory.shared().len() as u64, host };
        // SAFETY: the region is the memory that the box keeps mapped.
        let guest = Arc::new(unsafe { GuestMemory::new(vec![region], Box::new(memory.clone())) }.unwrap());
        let mut pair = QueuePair::new(memory.clone(), OWNER, 0, queue_size, negotiated, 0..buffers).unwrap();
        let device = |queue, direction| {
            let ring = memory.ring(queue);
            DeviceRing::start(RingSetup {
                layout,
                direction,
                size: queue_size,
                descriptors: ring.descriptors,
                driver: ring.driver,
                device: ring.device,
                base: Some(if layout == Layout::Packed { 0x8000_8000 } else { 0 }),
                features: negotiated,
                memory: guest.clone(),
                log: None,
                log_used: None,
                inflight: None,
            })
            .unwrap()
        };
        let (receive, transmit) = (device(0, Direction::Write), device(1, Direction::Read));
        pair.start(None, None);
        Self { pair, negotiated, buffers: buffers as usize, receive, transmit }
    }

    /// Copies every frame from the transmit ring to the receive ring, over as many buffers as it takes.
    fn turn(&mut self) -> usize {
        let mut frames = 0;
        with_ring!(&mut self.transmit, tx => with_ring!(&mut self.receive, rx => {
            let n = tx.fetch(64).unwrap();
            for i in 0..n {
                let mut frame = Vec::new();
                let chain = *tx.stock().get(i);
                let mut take = |ptr: *mut u8, len: u32| {
                    // SAFETY: the device side checked the buffer against guest memory.
                    frame.extend_from_slice(unsafe { std::slice::from_raw_parts(ptr, len as usize) });
                };
                take(chain.ptr, chain.len);
                tx.stock().more(&chain).iter().for_each(|b| take(b.ptr, b.len));
                let mut left = &frame[..];
                let mut header = std::ptr::null_mut::<u8>();
                let mut used = 0u16;
                while !left.is_empty() {
                    assert!(rx.fetch(1).unwrap() > 0, "the receive ring is empty");
                    let to = *rx.stock().get(0);
                    let (now, later) = left.split_at(left.len().min(to.len as usize));
                    // SAFETY: as above.
                    unsafe { to.ptr.copy_from(now.as_ptr(), now.len()) };
                    if used == 0 { header = to.ptr; }
                    used += 1;
                    rx.use_written(now.len() as u32);
                    left = later;
                }
                // SAFETY: as above; a header has 12 bytes.
                unsafe { header.add(10).cast::<u16>().write_unaligned(used) };
                frames += 1;
            }
            tx.use_read(n);
            tx.publish();
            rx.publish();
        }));
        frames
    }

    fn fill(&mut self, len: usize, seed: u32) -> Vec<Buffer> {
        let mut frame = Vec::new();
        let mut at = 0;
        while at < len || frame.is_empty() {
            let mut b = self.pair.allocate().unwrap();
            let here = (len - at).min(self.pair.capacity(&b));
            let bytes: Vec<u8> = (at..at + here).map(|i| byte(seed, i)).collect();
            self.pair.write(&mut b, 0, &bytes);
            self.pair.set_len(&mut b, here);
            at += here;
            frame.push(b);
        }
        let follows = frame.len() as u16 - 1;
        frame[0].set_follows(follows);
        frame
    }
}

fn byte(seed: u32, i: usize) -> u8 {
    (seed.wrapping_mul(31).wrapping_add(i as u32).wrapping_mul(2_654_435_761) >> 24) as u8
}

/// Sends frames of these lengths, a few at a time, and expects each back, whole, in order, once.
fn round_trip(mut world: Loop, lens: &[usize]) {
    let (mut sent, mut seen) = (0, 0);
    let mut pending: Vec<Buffer> = Vec::new();
    let mut got = Vec::new();
    let mut idle = 0;
    while seen < lens.len() {
        idle += 1;
        assert!(idle < 100, "stuck after {seen} frames");
        while sent < lens.len() && pending.len() < 8 {
            pending.extend(world.fill(lens[sent], sent as u32));
            sent += 1;
        }
        world.pair.transmit(&mut pending);
        world.turn();
        world.pair.receive(&mut got, 16);
        let mut frames = got.drain(..);
        while let Some(first) = frames.next() {
            let mut bytes = vec![0; first.len()];
            world.pair.read(&first, 0, &mut bytes);
            let follows = first.follows();
            world.pair.free(first);
            for b in frames.by_ref().take(follows) {
                let mut more = vec![0; b.len()];
                world.pair.read(&b, 0, &mut more);
                bytes.extend(more);
                world.pair.free(b);
            }
            assert_eq!(bytes.len(), lens[seen], "frame {seen}");
            assert!(bytes.iter().enumerate().all(|(i, b)| *b == byte(seen as u32, i)), "frame {seen}");
            seen += 1;
            idle = 0;
        }
    }
    let c = *world.pair.counters();
    let bytes: usize = lens.iter().sum();
    assert_eq!((c.transmitted, c.transmitted_bytes), (lens.len() as u64, bytes as u64));
    assert_eq!((c.received, c.received_bytes), (lens.len() as u64, bytes as u64));
    assert_eq!((c.malformed, c.unsendable), (0, 0));
    assert_eq!(world.pair.fault(), None);
    // What the rings do not hold is free again.
    world.pair.reset(world.negotiated).unwrap();
    assert_eq!(world.pair.available(), world.buffers, "buffers lost");
}

const ALL: u64 = f::NET_MRG_RXBUF | f::IN_ORDER | f::RING_EVENT_IDX | f::RING_INDIRECT_DESC;

#[test]
fn small_frames_come_back_in_order_whatever_was_negotiated() {
    for layout in [Layout::Split, Layout::Packed] {
        for features in [0, f::IN_ORDER, f::RING_EVENT_IDX, f::NET_MRG_RXBUF, ALL] {
            let lens: Vec<usize> = (0..3000).map(|i| 14 + i % 1500).collect();
            round_trip(Loop::new(layout, 64, features, 512, 2048), &lens);
        }
    }
}

#[test]
fn a_frame_may_span_many_buffers_both_ways() {
    for layout in [Layout::Split, Layout::Packed] {
        for features in [f::NET_MRG_RXBUF, f::NET_MRG_RXBUF | f::RING_INDIRECT_DESC, ALL] {
            let lens: Vec<usize> = (0..200).map(|i| 60 + i * 397 % 9000).collect();
            round_trip(Loop::new(layout, 128, features, 1024, 1024), &lens);
            round_trip(Loop::new(layout, 256, features, 1024, 2048), &[65_000, 60, 33_000, 64_000]);
        }
    }
}

#[test]
fn a_frame_of_too_many_buffers_is_counted_and_its_buffers_are_free_again() {
    let mut world = Loop::new(Layout::Split, 256, ALL, 512, 1024);
    let before = world.pair.available();
    let mut long = world.fill(65 * 960, 1);
    long.extend(world.fill(60, 2));
    assert!(long[0].follows() >= 64);
    world.pair.transmit(&mut long);
    assert!(long.is_empty());
    assert_eq!((world.pair.counters().unsendable, world.pair.counters().transmitted), (1, 1));
    assert_eq!(world.pair.available(), before - 1);
}

#[test]
fn frames_that_do_not_fit_stay_in_the_list_in_order() {
    let mut world = Loop::new(Layout::Packed, 16, ALL, 64, 2048);
    let mut frames: Vec<Buffer> = (0..20).flat_map(|i| world.fill(60 + i, i as u32)).collect();
    assert_eq!(world.pair.transmit(&mut frames), 16);
    assert_eq!(frames.iter().map(Buffer::len).collect::<Vec<_>>(), [76, 77, 78, 79]);
    assert_eq!(world.pair.transmit(&mut frames), 0);
    world.turn();
    assert_eq!(world.pair.transmit(&mut frames), 4);
}

#[test]
fn offload_requests_go_out_as_set_and_nothing_of_them_stays_in_the_buffer() {
    let mut world = Loop::new(Layout::Split, 16, ALL, 64, 2048);
    let asked = NetHeader::PLAIN.with_checksum(34, 16).with_gso(1, 54, 1448);
    let mut frame = world.fill(100, 0);
    world.pair.set_header(&mut frame[0], asked);
    world.pair.transmit(&mut frame);
    world.turn();
    let mut got = Vec::new();
    assert_eq!(world.pair.receive(&mut got, 4), 1);
    assert_eq!(world.pair.header(&got[0]), asked.with_num_buffers(1));
    // Sent on without setting it again: it is whole.
    world.pair.transmit(&mut got);
    world.turn();
    assert_eq!(world.pair.receive(&mut got, 4), 1);
    assert_eq!(world.pair.header(&got[0]), NetHeader::PLAIN.with_num_buffers(1));
}

#[test]
fn macs_are_exchanged_and_the_rest_stays() {
    let mut world = Loop::new(Layout::Split, 16, 0, 64, 2048);
    let mut frame = world.fill(60, 9);
    world.pair.swap_macs(&mut frame[0]);
    let mut bytes = [0; 60];
    world.pair.read(&frame[0], 0, &mut bytes);
    let want: Vec<u8> = (6..12).chain(0..6).chain(12..60).map(|i| byte(9, i)).collect();
    assert_eq!(bytes[..], want);
}

#[test]
#[should_panic(expected = "outside the buffer")]
fn reading_past_the_end_of_a_buffer_panics() {
    let mut world = Loop::new(Layout::Split, 16, 0, 64, 2048);
    let frame = world.fill(60, 9);
    world.pair.read(&frame[0], 2048 - HEADROOM, &mut [0]);
}

#[test]
fn a_back_end_that_lies_about_a_frame_costs_that_frame_and_no_buffer() {
    for features in [0, f::NET_MRG_RXBUF] {
        let mut world = Loop::new(Layout::Split, 16, features, 64, 2048);
        for (written, buffers) in [(11, 1), (0, 1), (100, 0), (100, 17), (100, 1)] {
            with_ring!(&mut world.receive, rx => {
                rx.fetch(1).unwrap();
                let to = rx.stock().get(0).ptr;
                // SAFETY: the device side checked the buffer; it has more than 12 bytes.
                unsafe { to.add(10).cast::<u16>().write_unaligned(buffers) };
                rx.use_written(written);
                rx.publish();
            });
        }
        let mut got = Vec::new();
        let frames = world.pair.receive(&mut got, 16);
        let lies = if features == 0 { 2 } else { 4 };
        assert_eq!((frames as u64, world.pair.counters().malformed), (5 - lies, lies));
        got.drain(..).for_each(|b| world.pair.free(b));
        world.pair.reset(world.negotiated).unwrap();
        assert_eq!(world.pair.available(), world.buffers);
    }
}
