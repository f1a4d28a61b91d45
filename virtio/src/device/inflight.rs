//! What a packed ring's inflight region keeps across a crash of the device (vhost-user, "Inflight I/O tracking", packed
//! virtqueue): the position of the next used descriptor, before and after the batch that is being published.
//!
//! Owns the layout of the region and the rules by which a successor finds out how far its predecessor got. A device that
//! completes in order needs no list of descriptors: the position is all there is to know.

use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use super::packed::Position;
use super::setup::{InflightArea, RingError};
use crate::memory::packed::Ring as Descriptors;

/// The header of a queue's part of the region.
#[derive(Clone, Copy)]
pub(super) struct Inflight {
    at: *mut u8,
}

impl Inflight {
    /// Bytes of the header.
    const BYTES: usize = 32;
    const VERSION: usize = 8;
    const DESC_NUM: usize = 10;
    /// `used_idx`, `old_used_idx` (16 bits each), their wrap counters (8 bits each), and two bytes of the padding: 1 once a ring
    /// ran on this region; 1 if the batch between the two positions has one used descriptor for each. Eight aligned bytes:
    /// one store, which a crash does not tear.
    const POSITIONS: usize = 16;

    #[inline(always)]
    pub(super) fn of(area: &InflightArea) -> Option<Self> {
        let fits = area.range.len >= Self::BYTES && (area.range.ptr as usize).is_multiple_of(8);
        fits.then_some(Self { at: area.range.ptr })
    }

    #[inline(always)]
    fn word(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: even offsets below BYTES of an area that `of` checked and that its `InflightArea` keeps mapped.
        unsafe { AtomicU16::from_ptr(self.at.add(offset) as *mut u16) }
    }

    #[inline(always)]
    fn positions(&self) -> &AtomicU64 {
        // SAFETY: as above, and aligned to 8.
        unsafe { AtomicU64::from_ptr(self.at.add(Self::POSITIONS) as *mut u64) }
    }

    pub(super) fn in_use(&self, size: u16) -> bool {
        let [.., started, _] = self.positions().load(Ordering::Relaxed).to_le_bytes();
        started == 1 && self.word(Self::DESC_NUM).load(Ordering::Relaxed) == size
    }

    /// The position after a crash. Between [`Inflight::intend`] and [`Inflight::commit`] the two that are kept differ, and the
    /// ring says how far the batch got: its used descriptors were written in order.
    pub(super) fn recover(&self, descriptors: &Descriptors, size: u16) -> Result<Position, RingError> {
        let [n0, n1, o0, o1, new_wrap, old_wrap, _, singles] =
            self.positions().load(Ordering::Relaxed).to_le_bytes();
        let old = Position { at: u16::from_le_bytes([o0, o1]), wrap: old_wrap != 0 };
        let new = Position { at: u16::from_le_bytes([n0, n1]), wrap: new_wrap != 0 };
        if old.at >= size || new.at >= size {
            return Err(RingError::Base(u32::from(old.bits()) << 16 | u32::from(new.bits())));
        }
        let is_used = |position: Position| position.used(descriptors.flags(position.at));
        if singles == 0 {
            return Ok(if is_used(old) { new } else { old });
        }
        let mut reached = old;
        // At most a lap, whatever the region says.
        for _ in 0..size {
            if reached == new || !is_used(reached) {
                break;
            }
            reached.advance(1, size);
        }
        Ok(reached)
    }

    pub(super) fn begin(&self, size: u16, position: Position) {
        self.word(Self::VERSION).store(1, Ordering::Relaxed);
        self.word(Self::DESC_NUM).store(size, Ordering::Relaxed);
        self.commit(position);
    }

    /// Used descriptors from `old` up to `new` will be written now: one for each position (`singles`), or one for them all.
    #[inline(always)]
    pub(super) fn intend(&self, old: Position, new: Position, singles: bool) {
        let ([n0, n1], [o0, o1]) = (new.at.to_le_bytes(), old.at.to_le_bytes());
        let bytes = [n0, n1, o0, o1, u8::from(new.wrap), u8::from(old.wrap), 1, u8::from(singles)];
        self.positions().store(u64::from_le_bytes(bytes), Ordering::Release);
    }

    /// They were written, up to `position`.
    #[inline(always)]
    pub(super) fn commit(&self, position: Position) {
        self.intend(position, position, false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::HostRange;
    use std::sync::Arc;

    /// A ring of `SIZE` descriptors and a region, in memory of their own.
    struct World {
        ring: Descriptors,
        inflight: Inflight,
    }

    const SIZE: u16 = 8;

    /// A device that was killed after `written` of the used descriptors that it intended, each of `slots` positions.
    fn killed(at: Position, batch: u16, slots: u16, written: u16) -> (World, Position) {
        // Leaked: a few hundred bytes for each case of a test.
        let range = |bytes: usize| {
            let memory = Box::leak(vec![0u128; bytes / 16].into_boxed_slice());
            HostRange { ptr: memory.as_mut_ptr().cast(), len: bytes, guest: 0 }
        };
        let descriptors = range(usize::from(SIZE) * 16);
        let ring = Descriptors::new(descriptors, SIZE).unwrap();
        let mut lap = at;
        for _ in 0..SIZE {
            ring.put(lap.at, u64::from(lap.available_flags()) << 48);
            lap.advance(1, SIZE);
        }
        let area = InflightArea { range: range(64), mapping: Arc::new(()) };
        let inflight = Inflight::of(&area).unwrap();
        inflight.begin(SIZE, at);
        let mut end = at;
        end.advance(batch * slots, SIZE);
        inflight.intend(at, end, slots == 1);
        let mut used = at;
        for _ in 0..written {
            ring.put(used.at, u64::from(used.used_flags()) << 48);
            used.advance(slots, SIZE);
        }
        (World { ring, inflight }, used)
    }

    #[test]
    fn a_successor_goes_on_behind_the_last_used_descriptor_that_was_written() {
        for at in 0..SIZE {
            for wrap in [false, true] {
                for batch in 1..=SIZE {
                    for written in 0..=batch {
                        let (world, reached) = killed(Position { at, wrap }, batch, 1, written);
                        assert_eq!(
                            world.inflight.recover(&world.ring, SIZE),
                            Ok(reached),
                            "{at} {wrap} {batch} {written}"
                        );
                    }
                }
                for (slots, written) in [(3, 0), (3, 1), (SIZE, 0), (SIZE, 1)] {
                    let (world, reached) = killed(Position { at, wrap }, 1, slots, written);
                    assert_eq!(
                        world.inflight.recover(&world.ring, SIZE),
                        Ok(reached),
                        "{at} {wrap} {slots} {written}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_region_that_says_nonsense_is_an_error_or_a_position_in_the_ring() {
        let (world, _) = killed(Position::START, 1, 1, 0);
        for i in 0..200_000u64 {
            world.inflight.positions().store(i.wrapping_mul(0x9e37_79b9_7f4a_7c15), Ordering::Relaxed);
            match world.inflight.recover(&world.ring, SIZE) {
                Ok(position) => assert!(position.at < SIZE),
                Err(e) => assert!(matches!(e, RingError::Base(_))),
            }
        }
    }
}
