//! Index publishing under loom: every interleaving, and every reordering that the memory model allows, of the driver's own
//! code with a device written down here in its bare accesses.

use std::sync::Arc;

use loom::sync::atomic::{Ordering, fence};
use loom::thread;

use super::area::Area;
use super::packed::{self, PackedDriver};
use super::split::{self, SplitDriver};
use super::{Single, word};
use crate::device::Direction;
use crate::features;

const SIZE: usize = 2;

fn single(token: u32) -> Single {
    Single { address: 0x1000 + u64::from(token), len: 64, token }
}

/// The areas of a split ring of two descriptors: driver's view and device's.
fn split_ring(negotiated: u64) -> (SplitDriver, Area, Area, Area) {
    let descriptors = Area::of([8; 2 * SIZE]);
    let avail = Area::of([2; 3 + SIZE]);
    let used = Area::of([2, 2].into_iter().chain([4; 2 * SIZE]).chain([2]));
    let shared = split::Shared {
        descriptors: descriptors.clone(),
        avail: avail.clone(),
        used: used.clone(),
        tables: None,
        mask: SIZE as u16 - 1,
    };
    (SplitDriver::on(shared, Direction::Write, negotiated, Arc::new(())), descriptors, avail, used)
}

/// The areas of a packed ring of two descriptors: driver's view and device's.
fn packed_ring(negotiated: u64) -> (PackedDriver, Area, Area, Area) {
    let ring = Area::of([8; 2 * SIZE]);
    let driver = Area::of([2, 2]);
    let device = Area::of([4]);
    let shared =
        packed::Shared { ring: ring.clone(), driver: driver.clone(), device: device.clone(), tables: None };
    (PackedDriver::on(shared, SIZE as u16, Direction::Write, negotiated, Arc::new(())), ring, driver, device)
}

#[test]
fn loom_split_the_device_sees_whole_descriptors_and_the_driver_whole_used_elements() {
    loom::model(|| {
        let (mut driver, descriptors, avail, used) = split_ring(0);
        let device = thread::spawn(move || {
            // SAFETY: cells check their own bounds.
            unsafe {
                while avail.load16(2, Ordering::Acquire) != 2 {
                    thread::yield_now();
                }
                for i in 0..2 {
                    let head = avail.load16(4 + 2 * i, Ordering::Relaxed);
                    let at = 16 * usize::from(head);
                    assert_eq!(descriptors.load64(at, Ordering::Relaxed), single(i as u32).address);
                    assert_eq!(descriptors.load64(at + 8, Ordering::Relaxed) as u32, 64);
                    used.store32(4 + 8 * i, u32::from(head), Ordering::Relaxed);
                    used.store32(8 + 8 * i, 10 + i as u32, Ordering::Relaxed);
                }
                used.store16(2, 2, Ordering::Release);
            }
        });
        assert_eq!(driver.offer((0..2).map(single)), 2);
        driver.publish();
        let mut got = Vec::new();
        while driver.reclaim(2, |token, len| got.push((token, len))).unwrap() == 0 {
            thread::yield_now();
        }
        assert_eq!(got, [(0, 10), (1, 11)]);
        device.join().unwrap();
    });
}

#[test]
fn loom_packed_the_device_sees_a_burst_whole_and_the_driver_whole_used_descriptors() {
    loom::model(|| {
        let (mut driver, ring, _, _) = packed_ring(features::IN_ORDER);
        let device = thread::spawn(move || {
            const AVAIL: u16 = 1 << 7;
            const USED: u16 = 1 << 15;
            // SAFETY: cells check their own bounds.
            unsafe {
                let flags = |order| (ring.load64(8, order) >> 48) as u16;
                while flags(Ordering::Acquire) & (AVAIL | USED) != AVAIL {
                    thread::yield_now();
                }
                for i in 0..2u32 {
                    let at = 16 * i as usize;
                    let w = ring.load64(at + 8, Ordering::Acquire);
                    assert_eq!(
                        (w >> 48) as u16 & (AVAIL | USED),
                        AVAIL,
                        "descriptor {i} of a burst is missing"
                    );
                    assert_eq!(ring.load64(at, Ordering::Relaxed), single(i).address);
                    assert_eq!((w as u32, (w >> 32) as u16), (64, i as u16));
                }
                // The second first: the driver looks at one position only.
                ring.store64(24, word(11, 1, AVAIL | USED), Ordering::Relaxed);
                ring.store64(8, word(10, 0, AVAIL | USED), Ordering::Release);
            }
        });
        assert_eq!(driver.offer((0..2).map(single)), 2);
        driver.publish();
        let mut got = Vec::new();
        while driver.reclaim(2, |token, len| got.push((token, len))).unwrap() == 0 {
            thread::yield_now();
        }
        assert_eq!(got, [(0, 10), (1, 11)]);
        device.join().unwrap();
    });
}

/// A device that goes to sleep while the driver publishes is either notified or sees what was published.
#[test]
fn loom_split_no_notification_of_the_device_is_lost() {
    for negotiated in [0, features::RING_EVENT_IDX] {
        loom::model(move || {
            let (mut driver, _, avail, used) = split_ring(negotiated);
            // SAFETY: cells check their own bounds.
            unsafe {
                used.store16(0, 1, Ordering::Relaxed);
                used.store16(4 + 8 * SIZE, u16::MAX, Ordering::Relaxed);
            }
            let device = thread::spawn(move || {
                // SAFETY: as above.
                unsafe {
                    used.store16(0, 0, Ordering::Relaxed);
                    used.store16(4 + 8 * SIZE, 0, Ordering::Relaxed);
                    fence(Ordering::SeqCst);
                    avail.load16(2, Ordering::Acquire) != 0
                }
            });
            driver.offer([single(0)].into_iter());
            let kick = driver.publish();
            let seen = device.join().unwrap();
            assert!(kick || seen, "the device sleeps on");
        });
    }
}

#[test]
fn loom_packed_no_notification_of_the_device_is_lost() {
    loom::model(|| {
        let (mut driver, ring, _, device_area) = packed_ring(features::RING_EVENT_IDX);
        // SAFETY: cells check their own bounds.
        unsafe { device_area.store32(0, 1 << 16, Ordering::Relaxed) };
        let device = thread::spawn(move || {
            // SAFETY: as above.
            unsafe {
                device_area.store32(0, 2 << 16 | 1 << 15, Ordering::Relaxed);
                fence(Ordering::SeqCst);
                ring.load64(8, Ordering::Acquire) >> 48 != 0
            }
        });
        driver.offer([single(0)].into_iter());
        let kick = driver.publish();
        let seen = device.join().unwrap();
        assert!(kick || seen, "the device sleeps on");
    });
}

/// A driver that goes to sleep while the device publishes is either notified or sees what was published.
#[test]
fn loom_split_no_notification_of_the_driver_is_lost() {
    for negotiated in [0, features::RING_EVENT_IDX] {
        loom::model(move || {
            let (mut driver, _, avail, used) = split_ring(negotiated);
            driver.offer([single(0)].into_iter());
            driver.publish();
            let device = thread::spawn(move || {
                // SAFETY: cells check their own bounds.
                unsafe {
                    used.store16(2, 1, Ordering::Release);
                    fence(Ordering::SeqCst);
                    if negotiated == 0 {
                        avail.load16(0, Ordering::Relaxed) & 1 == 0
                    } else {
                        avail.load16(4 + 2 * SIZE, Ordering::Relaxed) == 0
                    }
                }
            });
            let ready = driver.request_notification();
            let call = device.join().unwrap();
            assert!(ready || call, "the driver sleeps on");
        });
    }
}

#[test]
fn loom_packed_no_notification_of_the_driver_is_lost() {
    loom::model(|| {
        let (mut driver, ring, driver_area, _) = packed_ring(0);
        driver.offer([single(0)].into_iter());
        driver.publish();
        let device = thread::spawn(move || {
            // SAFETY: cells check their own bounds.
            unsafe {
                ring.store64(8, word(10, 0, 1 << 7 | 1 << 15), Ordering::Release);
                fence(Ordering::SeqCst);
                driver_area.load16(2, Ordering::Acquire) != 1
            }
        });
        let ready = driver.request_notification();
        let call = device.join().unwrap();
        assert!(ready || call, "the driver sleeps on");
    });
}
