//! Room for copies of frames that wait, of a fixed size: a ring of bytes, and a ring of who lies where.
//!
//! Each copy lies in one run of bytes. Copies may be given back in any order; their bytes are free again when all that came
//! before them are back. Allocates nothing after it was made.

use port::Offload;

/// Bytes that may wait.
pub(super) const BYTES: usize = 8 << 20;

/// Frames that may wait: a power of two.
pub(super) const FRAMES: usize = 16_384;

/// A frame's place: places are counted and never used again.
pub(super) type Place = u64;

/// Copies of frames.
pub(super) struct Store {
    bytes: Box<[u8]>,
    places: Box<[Copied]>,
    /// The oldest place that is not free, and the next one to be given.
    oldest: Place,
    next: Place,
    /// Where the next copy begins, if it fits there.
    write: usize,
}

/// One copy.
#[derive(Clone, Copy)]
struct Copied {
    at: u32,
    len: u32,
    offload: Offload,
    /// How often it has yet to leave; 0: it is not needed any more.
    uses: u8,
}

impl Store {
    /// An empty one. Its bytes cost memory when they are first written.
    pub(super) fn new() -> Self {
        let nothing = Copied { at: 0, len: 0, offload: Offload::NONE, uses: 0 };
        Self {
            bytes: vec![0; BYTES].into(),
            places: vec![nothing; FRAMES].into(),
            oldest: 0,
            next: 0,
            write: 0,
        }
    }

    /// Room for `len` bytes, which will be needed `uses` times; `None`: there is none.
    pub(super) fn add(&mut self, len: usize, offload: Offload, uses: u8) -> Option<(Place, &mut [u8])> {
        let at = self.room_for(len)?;
        let place = self.next;
        *self.places.get_mut(place as usize % FRAMES)? =
            Copied { at: at as u32, len: len as u32, offload, uses };
        let bytes = self.bytes.get_mut(at..at + len)?;
        self.next += 1;
        self.write = at + len;
        Some((place, bytes))
    }

    /// Where `len` bytes can go. What waits lies from the oldest's first byte to `write`, round the end if `write` is before it.
    fn room_for(&mut self, len: usize) -> Option<usize> {
        if self.oldest == self.next {
            self.write = 0;
            return (len <= BYTES).then_some(0);
        }
        if self.next - self.oldest == FRAMES as u64 {
            return None;
        }
        let (begin, write) = (self.places.get(self.oldest as usize % FRAMES)?.at as usize, self.write);
        // A byte is left between the two, so that full is not empty.
        if write > begin {
            if write + len <= BYTES {
                return Some(write);
            }
            return (len < begin).then_some(0);
        }
        (write + len < begin).then_some(write)
    }

    /// The bytes at `place`, and what they leave undone.
    pub(super) fn get(&self, place: Place) -> (&[u8], Offload) {
        let copied =
            self.places.get(place as usize % FRAMES).filter(|_| (self.oldest..self.next).contains(&place));
        copied.map_or((&[], Offload::NONE), |copied| {
            let at = copied.at as usize;
            (self.bytes.get(at..at + copied.len as usize).unwrap_or_default(), copied.offload)
        })
    }

    /// One use of `place` less.
    pub(super) fn give_back(&mut self, place: Place) {
        if let Some(copied) = self.places.get_mut(place as usize % FRAMES) {
            copied.uses = copied.uses.saturating_sub(1);
        }
        while self.oldest < self.next
            && self.places.get(self.oldest as usize % FRAMES).is_some_and(|copied| copied.uses == 0)
        {
            self.oldest += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    #[test]
    fn a_store_that_is_full_has_room_again_when_the_oldest_is_back() {
        let mut store = Store::new();
        let mut places = VecDeque::new();
        while let Some((place, _)) = store.add(9_000, Offload::NONE, 1) {
            places.push_back(place);
        }
        assert_eq!(places.len(), BYTES / 9_000);
        store.give_back(places[1]);
        assert!(store.add(9_000, Offload::NONE, 1).is_none(), "the oldest is still there");
        store.give_back(places[0]);
        assert!(store.add(9_000, Offload::NONE, 1).is_some());
        let mut small = Store::new();
        assert_eq!(std::iter::from_fn(|| small.add(60, Offload::NONE, 1).map(drop)).count(), FRAMES);
    }

    proptest::proptest! {
        #[test]
        fn what_waits_is_never_written_over(steps in proptest::collection::vec((1usize..65_557, 0usize..200, 0u8..3), 1..900)) {
            let mut store = Store::new();
            let mut waiting: Vec<(Place, u8, usize)> = Vec::new();
            for (n, (len, which, back)) in steps.into_iter().enumerate() {
                if let Some((place, bytes)) = store.add(len, Offload::NONE, 1) {
                    bytes.fill(n as u8);
                    waiting.push((place, n as u8, len));
                }
                for _ in 0..back.min(waiting.len() as u8) {
                    let (place, byte, len) = waiting.remove(which % waiting.len());
                    let (bytes, _) = store.get(place);
                    assert!(bytes.len() == len && bytes.iter().all(|b| *b == byte));
                    store.give_back(place);
                }
            }
            for (place, byte, len) in waiting {
                let (bytes, _) = store.get(place);
                assert!(bytes.len() == len && bytes.iter().all(|b| *b == byte));
            }
        }
    }
}
