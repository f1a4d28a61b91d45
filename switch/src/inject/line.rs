//! One direction of one queue, on which frames are lost, damaged, doubled, exchanged and kept waiting.
//!
//! Owns copies of the frames that are on it, which alone are damaged: the memory of whoever sent them is only read. What is taken
//! in comes out again ([`Line::lend`]) when it is due, or is counted as lost. Never waits, allocates nothing once it is made.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};

use port::{BurstBuffer, DropReason, Frame, Gso, HEAD, MAX_BURST};
use virtio::memory::copy::copy;

use super::faults::{Fate, Faults, REACH};
use super::store::{FRAMES, Place, Store};
use crate::config::Inject;
use crate::offload::finish_checksum;
use crate::outgoing::Outgoing;

/// How long a frame waits for others to pass it, in microseconds.
const WAIT_MICROSECONDS: u64 = 1_000;

/// What was done, for whoever asks.
#[derive(Debug, Default)]
pub(crate) struct LineCounters {
    pub(crate) corrupted: AtomicU64,
    pub(crate) duplicated: AtomicU64,
    pub(crate) reordered: AtomicU64,
    pub(crate) delayed: AtomicU64,
    /// Frames that are on the line now.
    pub(crate) held: AtomicU64,
}

/// Frames under way.
pub(super) struct Line {
    /// `None`: whatever is taken in comes out at once, as it is.
    faults: Option<Faults>,
    /// TSC cycles that each frame takes.
    delay: u64,
    /// TSC cycles that one waits for others to pass it.
    patience: u64,
    store: Store,
    /// Frames taken in, lost ones included.
    taken: u64,
    /// Those that others must pass first: at most [`REACH`].
    behind: Vec<Behind>,
    /// Those that leave as soon as they are due, in this order.
    leaving: VecDeque<Leaving>,
    /// Those in the buffer that was filled last.
    lent: usize,
}

/// A frame that waits for others to pass it.
struct Behind {
    frame: Leaving,
    /// It goes behind this one.
    after: u64,
    /// It goes then at the latest.
    expires: u64,
}

/// A frame that leaves, so often.
#[derive(Clone, Copy)]
struct Leaving {
    place: Place,
    due: u64,
    times: u8,
}

impl Line {
    /// An empty one, that does nothing to frames yet.
    pub(super) fn new() -> Self {
        Self {
            faults: None,
            delay: 0,
            patience: 0,
            store: Store::new(),
            taken: 0,
            behind: Vec::with_capacity(REACH as usize + 1),
            leaving: VecDeque::with_capacity(2 * FRAMES),
            lent: 0,
        }
    }

    /// From now on does to frames what `inject` says. `stream` tells the lines of a port apart.
    pub(super) fn change(&mut self, inject: Option<&Inject>, stream: u64) {
        let cycles = |microseconds: u64| host::cpu::tsc_hz() / 1_000_000 * microseconds;
        self.faults = inject.map(|inject| Faults::new(inject, stream));
        self.delay = inject.map_or(0, |inject| cycles(inject.delay.as_micros() as u64));
        self.patience = cycles(WAIT_MICROSECONDS);
    }

    /// Forgets what waits; how many frames.
    pub(super) fn clear(&mut self, counters: &LineCounters) -> u64 {
        let mut lost = 0;
        let behind = self.behind.drain(..).map(|behind| behind.frame);
        for frame in behind.chain(self.leaving.drain(..)) {
            lost += u64::from(frame.times);
            (0..frame.times).for_each(|_| self.store.give_back(frame.place));
        }
        counters.held.store(0, Ordering::Relaxed);
        lost
    }

    /// Takes a frame in at `now`: how many come out of it.
    ///
    /// # Errors
    /// It is lost, and this is why.
    pub(super) fn take(
        &mut self,
        now: u64,
        frame: &Outgoing<'_>,
        counters: &LineCounters,
    ) -> Result<u64, DropReason> {
        let number = self.taken;
        self.taken += 1;
        let fate = self.faults.as_mut().map(Faults::next).unwrap_or_default();
        let taken =
            if fate.drop { Err(DropReason::Injected) } else { self.hold(number, now, fate, frame, counters) };
        // A frame that is lost is passed by all the same.
        self.let_pass(number);
        taken
    }

    fn hold(
        &mut self,
        number: u64,
        now: u64,
        fate: Fate,
        frame: &Outgoing<'_>,
        counters: &LineCounters,
    ) -> Result<u64, DropReason> {
        let len = frame.len();
        let times = 1 + u8::from(fate.duplicate);
        // Never beyond what was allocated.
        if self.leaving.len() + self.behind.len() + 1 >= FRAMES {
            return Err(DropReason::InjectedLost);
        }
        let undone = frame.offload();
        let whole = undone.is_none() || undone.gso() == Ok(Gso::None);
        let damaged = fate.corrupt.filter(|_| whole);
        // A wire damages what has its checksum already, so that it is noticed.
        let left = if damaged.is_some() { port::Offload::NONE } else { undone };
        let (place, bytes) = self.store.add(len, left, times).ok_or(DropReason::InjectedLost)?;
        let mut at = 0;
        for piece in frame.pieces() {
            let Some(to) = bytes.get_mut(at..(at + piece.len as usize).min(len)) else { break };
            // SAFETY: the piece is the frame's (see `Outgoing::pieces`), and `to` is no longer.
            unsafe { copy(to.as_mut_ptr(), piece.ptr, to.len()) };
            at += to.len();
        }
        if let Some(bit) = damaged {
            // What cannot be finished is damaged as it is.
            let _ = finish_checksum(bytes, &undone);
            let bit = bit as usize % (len * 8).max(1);
            if let Some(byte) = bytes.get_mut(bit / 8) {
                *byte ^= 1 << (bit % 8);
                counters.corrupted.fetch_add(1, Ordering::Relaxed);
            }
        }
        if fate.duplicate {
            counters.duplicated.fetch_add(1, Ordering::Relaxed);
        }
        if self.delay > 0 {
            counters.delayed.fetch_add(u64::from(times), Ordering::Relaxed);
        }
        let due = now + self.delay;
        let leaving = Leaving { place, due, times };
        if fate.behind > 0 && self.behind.len() < self.behind.capacity() {
            counters.reordered.fetch_add(u64::from(times), Ordering::Relaxed);
            let (after, expires) = (number + fate.behind, due + self.patience);
            self.behind.push(Behind { frame: leaving, after, expires });
        } else {
            self.leaving.push_back(leaving);
        }
        counters.held.fetch_add(u64::from(times), Ordering::Relaxed);
        Ok(u64::from(times))
    }

    /// Frame `number` has passed those that waited for it to.
    fn let_pass(&mut self, number: u64) {
        while let Some(i) = self.behind.iter().position(|behind| behind.after <= number) {
            let Behind { mut frame, .. } = self.behind.remove(i);
            // Not before the one that it goes behind.
            frame.due = self.leaving.back().map_or(frame.due, |last| frame.due.max(last.due));
            self.leaving.push_back(frame);
        }
    }

    /// Fills `buffer` with frames that are due at `now`: how many. They stay as they are until [`Self::take_back`].
    pub(super) fn lend(&mut self, now: u64, buffer: &mut BurstBuffer) -> usize {
        // Nobody came to pass it.
        while let Some(i) = self.behind.iter().position(|behind| behind.expires <= now) {
            let Behind { frame, expires, .. } = self.behind.remove(i);
            let at = self.leaving.partition_point(|other| other.due <= expires);
            self.leaving.insert(at, Leaving { due: expires, ..frame });
        }
        let mut count = 0;
        for leaving in self.leaving.iter().take_while(|leaving| leaving.due <= now) {
            if count + usize::from(leaving.times) > MAX_BURST {
                break;
            }
            let (bytes, offload) = self.store.get(leaving.place);
            for _ in 0..leaving.times {
                let (Some(frame), Some(head)) = (buffer.frames.get_mut(count), buffer.heads.get_mut(count))
                else {
                    break;
                };
                let len = bytes.len() as u32;
                *frame = Frame { ptr: bytes.as_ptr(), first_len: len, len, offload, ..Frame::EMPTY };
                head.0 = [0; HEAD];
                head.0.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
                count += 1;
            }
            self.lent += 1;
        }
        count
    }

    /// What was lent last is not looked at any more.
    pub(super) fn take_back(&mut self, counters: &LineCounters) {
        for _ in 0..std::mem::take(&mut self.lent) {
            let Some(leaving) = self.leaving.pop_front() else { break };
            (0..leaving.times).for_each(|_| self.store.give_back(leaving.place));
            counters.held.fetch_sub(u64::from(leaving.times), Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Direction, Share};
    use port::{Burst, Head, Nobody, Offload, TagEdit};
    use std::time::Duration;

    fn take(
        line: &mut Line,
        now: u64,
        bytes: &[u8],
        offload: Offload,
        counters: &LineCounters,
    ) -> Result<u64, DropReason> {
        let mut buffer = BurstBuffer::default();
        let len = bytes.len() as u32;
        let mut head = Head([0; HEAD]);
        head.0.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        buffer.frames[0] = Frame { ptr: bytes.as_ptr(), first_len: len, len, offload, ..Frame::EMPTY };
        buffer.heads[0] = head;
        let mut nobody = Nobody;
        let burst = Burst::new(&mut nobody, &buffer, 1);
        let out = Outgoing::new(&burst, &burst.frames()[0], &burst.heads()[0], TagEdit::Keep).unwrap();
        line.take(now, &out, counters)
    }

    /// All that is due at `now`.
    fn due(line: &mut Line, now: u64, counters: &LineCounters) -> Vec<Vec<u8>> {
        let (mut buffer, mut came) = (BurstBuffer::default(), Vec::new());
        loop {
            let count = line.lend(now, &mut buffer);
            for (frame, head) in buffer.frames.iter().zip(&buffer.heads[..]).take(count) {
                // SAFETY: the line lends `len` bytes at `ptr` until they are taken back.
                let bytes = unsafe { std::slice::from_raw_parts(frame.ptr, frame.len as usize) };
                let n = bytes.len().min(HEAD);
                assert_eq!(head.0[..n], bytes[..n]);
                came.push(bytes.to_vec());
            }
            line.take_back(counters);
            if count == 0 {
                return came;
            }
        }
    }

    fn line(inject: &Inject) -> (Line, LineCounters) {
        let mut line = Line::new();
        line.change(Some(inject), 0);
        (line, LineCounters::default())
    }

    fn of(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::Relaxed)
    }

    fn percent(percent: u32) -> Share {
        Share::of_millionths(percent * 10_000)
    }

    /// A frame that says which it is.
    fn numbered(number: usize, len: usize) -> Vec<u8> {
        let mut frame = vec![number as u8; len.max(16)];
        frame[..8].copy_from_slice(&(number as u64).to_be_bytes());
        frame
    }

    fn number(frame: &[u8]) -> usize {
        u64::from_be_bytes(frame[..8].try_into().unwrap()) as usize
    }

    #[test]
    fn a_delayed_frame_comes_when_its_time_is_over_and_not_before() {
        let (mut line, counters) = line(&Inject { delay: Duration::from_micros(10), ..Inject::default() });
        let delay = line.delay;
        assert!(delay > 0);
        for n in 0..100 {
            assert_eq!(take(&mut line, n * 10, &numbered(n as usize, 60), Offload::NONE, &counters), Ok(1));
        }
        assert_eq!(of(&counters.held), 100);
        assert!(due(&mut line, delay - 1, &counters).is_empty());
        assert_eq!(
            due(&mut line, delay + 500, &counters).iter().map(|f| number(f)).collect::<Vec<_>>(),
            (0..51).collect::<Vec<_>>()
        );
        assert_eq!(due(&mut line, delay + 5_000, &counters).len(), 49);
        assert_eq!((of(&counters.held), of(&counters.delayed)), (0, 100));
    }

    #[test]
    fn a_reordered_frame_that_nobody_passes_does_not_wait_for_ever() {
        let (mut line, counters) = line(&Inject { reorder: percent(100), ..Inject::default() });
        take(&mut line, 5, &numbered(1, 60), Offload::NONE, &counters).unwrap();
        assert!(due(&mut line, 5, &counters).is_empty());
        let patience = line.patience;
        assert_eq!(due(&mut line, 5 + patience, &counters), [numbered(1, 60)]);
    }

    #[test]
    fn what_finds_no_room_is_lost_under_its_name_and_what_is_cleared_is_told() {
        let (mut line, counters) =
            line(&Inject { delay: Duration::from_secs(1), duplicate: percent(100), ..Inject::default() });
        let mut held = 0;
        let lost = loop {
            match take(&mut line, 0, &numbered(0, 9_000), Offload::NONE, &counters) {
                Ok(times) => held += times,
                Err(reason) => break reason,
            }
        };
        assert_eq!(lost, DropReason::InjectedLost);
        assert!(held > 1_000 && held == of(&counters.held));
        assert_eq!(line.clear(&counters), held);
        assert_eq!(take(&mut line, 0, &numbered(0, 9_000), Offload::NONE, &counters), Ok(2));
    }

    #[test]
    fn a_checksum_that_is_left_to_others_is_filled_in_before_the_damage() {
        // UDP over IPv4 whose checksum is to be filled in.
        let mut frame = vec![0u8; 60];
        frame[12..24].copy_from_slice(&[8, 0, 0x45, 0, 0, 46, 0, 0, 0, 0, 64, 17]);
        frame[38..40].copy_from_slice(&[0, 26]);
        let undone = Offload::new(Offload::NEEDS_CSUM, 0, 0, 0, 34, 6);
        let mut whole = frame.clone();
        finish_checksum(&mut whole, &undone).unwrap();
        assert_ne!(whole, frame);
        let (mut line, counters) = line(&Inject { corrupt: percent(100), ..Inject::default() });
        take(&mut line, 0, &frame, undone, &counters).unwrap();
        let mut buffer = BurstBuffer::default();
        assert_eq!(line.lend(0, &mut buffer), 1);
        assert!(buffer.frames[0].offload.is_none(), "nobody finishes it again");
        let came = &due(&mut line, 0, &counters)[0];
        let flipped: u32 = came.iter().zip(&whole).map(|(a, b)| (a ^ b).count_ones()).sum();
        assert_eq!(flipped, 1);
    }

    fn any_inject() -> impl proptest::strategy::Strategy<Value = Inject> {
        use proptest::strategy::Strategy;
        let shares = proptest::array::uniform4(0u32..=100);
        (proptest::num::u64::ANY, shares, 0u64..2).prop_map(|(seed, shares, delay)| {
            let [drop, corrupt, duplicate, reorder] = shares.map(percent);
            let delay = Duration::from_micros(delay * 50);
            Inject { seed, drop, corrupt, duplicate, reorder, delay, direction: Direction::Both }
        })
    }

    proptest::proptest! {
        #[test]
        fn with_everything_at_zero_frames_come_out_at_once_as_they_went_in(lens in proptest::collection::vec(16usize..2_000, 1..300)) {
            let (mut line, counters) = line(&Inject::default());
            let frames: Vec<_> = lens.iter().enumerate().map(|(n, len)| numbered(n, *len)).collect();
            for frame in &frames {
                assert_eq!(take(&mut line, 7, frame, Offload::NONE, &counters), Ok(1));
            }
            assert_eq!(due(&mut line, 7, &counters), frames);
        }

        #[test]
        fn the_same_seed_gives_the_same_frames_in_the_same_order_however_they_are_looked_for(
            inject in any_inject(), lens in proptest::collection::vec(16usize..200, 1..200), every in 1usize..50,
        ) {
            let pass = |every: usize| {
                let (mut line, counters) = line(&inject);
                let mut came = Vec::new();
                for (n, len) in lens.iter().enumerate() {
                    let _ = take(&mut line, 0, &numbered(n, *len), Offload::NONE, &counters);
                    if n.is_multiple_of(every) {
                        came.extend(due(&mut line, 0, &counters));
                    }
                }
                came.extend(due(&mut line, u64::MAX / 2, &counters));
                came
            };
            assert_eq!(pass(1), pass(every));
        }

        #[test]
        fn every_frame_comes_as_often_as_was_said_and_at_most_one_bit_of_it_differs(
            inject in any_inject(), lens in proptest::collection::vec(16usize..9_000, 1..200),
        ) {
            let (mut line, counters) = line(&inject);
            let frames: Vec<_> = lens.iter().enumerate().map(|(n, len)| numbered(n, *len)).collect();
            let copies = frames.clone();
            let mut told = 0;
            for frame in &frames {
                match take(&mut line, 0, frame, Offload::NONE, &counters) {
                    Ok(times) => told += times,
                    Err(reason) => assert_eq!(reason, DropReason::Injected),
                }
            }
            assert_eq!(of(&counters.held), told);
            let came = due(&mut line, u64::MAX / 2, &counters);
            assert_eq!((came.len() as u64, of(&counters.held)), (told, 0));
            assert_eq!(frames, copies, "nobody wrote to the sender's memory");
            let mut damaged = 0;
            for frame in &came {
                let differ = |sent: &Vec<u8>| sent.iter().zip(frame).map(|(a, b)| (a ^ b).count_ones()).sum::<u32>();
                let bits = frames.iter().filter(|sent| sent.len() == frame.len()).map(differ).min();
                assert!(bits.is_some_and(|bits| bits <= 1), "{bits:?} bits differ");
                damaged += u64::from(bits == Some(1));
            }
            assert!(damaged <= 2 * of(&counters.corrupted));
        }

        #[test]
        fn a_reordered_frame_is_passed_by_four_at_most(seed: u64, share in 1u32..=100) {
            let (mut line, counters) = line(&Inject { seed, reorder: percent(share), ..Inject::default() });
            for n in 0..500 {
                take(&mut line, 0, &numbered(n, 60), Offload::NONE, &counters).unwrap();
            }
            let came: Vec<usize> = due(&mut line, u64::MAX / 2, &counters).iter().map(|f| number(f)).collect();
            for (place, number) in came.iter().enumerate() {
                assert!(place.abs_diff(*number) <= 2 * REACH as usize, "{number} came as {place}");
            }
            let mut sorted = came.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..500).collect::<Vec<_>>());
        }
    }
}
