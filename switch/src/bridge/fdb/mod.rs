//! The learning table: which port an address was last seen on.
//!
//! One fixed array for the whole switch, shared by every worker and by housekeeping, allocated once. Looking up is
//! loads only. A worker never waits for anyone here: where two of them want to change entries of the same bucket, one does
//! and the other's address is learnt from its next frame. Nobody's entry makes room for another's: an address that
//! finds its port's limit reached, or its buckets full, is not learnt (its frames are still forwarded).
//!
//! # Layout
//! Buckets of four entries, one cache line each. An address belongs to the bucket that its hash names (its *home*), or, if that
//! is full, to one of [`CHAIN`] - 1 others, which lie apart by a step that also comes from the hash; every full bucket passed
//! on the way is marked as chained, so that a look-up usually reads one line. The mark stays when entries leave (a
//! look-up of an unknown address may then read up to [`CHAIN`] lines, never more).
//!
//! The hash is two 64 x 64 bit multiplications by secret random numbers, each with both halves of the product folded
//! together. It is not CRC32: CRC is linear, a secret start value only permutes the buckets, and a guest could send
//! addresses that all share one bucket whatever the secret is. One multiplication is not enough: for some secrets, addresses
//! that count upwards crowd together (10,000 of 42,000 found no bucket in the worst of 30 trials; with two, as many
//! as with random addresses).
//!
//! # Races
//! *Turns* serialise all changes of membership: whoever inserts, moves or removes an address holds the turn of its home
//! bucket (tried once by workers, waited for by housekeeping), so an address is never in the table twice and the counts
//! per port are exact. Slots of a bucket may be wanted under different turns (chains overlap): a slot is claimed by
//! compare-exchange of its key word, from `EMPTY` to `CLAIMED`.
//!
//! A *reader* holds nothing. It loads value, key, value of a slot. Each owner of a slot has its own generation in the value
//! word: the writer claims the slot, writes the value with the next generation, then publishes the key; the remover
//! stores `EMPTY`. Say the reader saw generation g before and after, and key A in between, but g belongs to B. The first load
//! acquired g, so the key load saw the slot claimed for B or anything later; A is later than B's removal, so it was published
//! after a value of a later generation, which the third load must then see: it cannot be g. Hence a look-up never
//! returns another address's port. (The generation has 14 bits: it would take exactly 16,384 removals of one slot,
//! each at least a housekeeping pass, between two adjacent loads.)
//!
//! A *refresh* of the time is a compare-exchange of the value word and needs no turn: if the slot changed hands, the
//! generation differs and it fails; if the entry was just removed, it changes a word that nobody reads.

mod entry;
mod housekeeping;
#[cfg(test)]
#[cfg(model_check)]
mod loom_model;
#[cfg(test)]
#[cfg(not(model_check))]
mod tests;

pub use entry::{Key, Value};
pub use housekeeping::{FdbEntry, Pass, StaticEntry};

use super::{Mac, portset::MAX_PORTS};
use crossbeam::utils::CachePadded;
use entry::{CLAIMED, EMPTY};
use std::hash::{BuildHasher, RandomState};

#[cfg(model_check)]
use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
#[cfg(not(model_check))]
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// Entries in a bucket: 16 bytes each, one cache line together. The model checker gets buckets of one.
const SLOTS: usize = if cfg!(model_check) { 1 } else { 4 };

/// The most buckets that one address may be looked for in. With 8, one of 30,000 addresses finds no room in a table that
/// is three quarters full, and is flooded for ever; with 16, none does.
const CHAIN: usize = 16;

/// Locks that insertions and removals share out among the buckets.
const TURNS: usize = 256;

/// Entries of a table when the configuration does not say: 1 MiB.
pub const DEFAULT_ENTRIES: usize = 65_536;

/// The sizes a table may have: powers of two from 1,024 to 16,777,216 entries (256 MiB).
pub const ENTRIES: std::ops::RangeInclusive<usize> = 1_024..=16_777_216;

/// What is wrong with a table or with what it was asked to hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FdbError {
    /// Not a size a table can have.
    #[error("a learning table of {0} entries: the size is a power of two from 1024 to 16777216")]
    Size(usize),
    /// A static entry for something that is no station.
    #[error("static entry {0}: a group address or zero names no station; give the address of one")]
    NotAStation(Mac),
    /// No room for a static entry.
    #[error(
        "no room for the static entry {0}: its buckets hold static entries only or are full; give the table more entries"
    )]
    Full(Mac),
}

/// What became of a source address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Learn {
    /// It was known on this port (its time is up to date).
    Known,
    /// It is new.
    Learnt,
    /// It was known on another port and is now on this one.
    Moved,
    /// A static entry has it on another port, where it stays.
    Pinned,
    /// Not learnt: this port has its limit of addresses.
    LimitReached,
    /// Not learnt: the buckets it may lie in are full.
    Full,
    /// Not learnt: somebody else is changing entries of the same bucket. The next frame learns it.
    Busy,
}

/// Where an address is looked for first. Computed once per frame, used to prefetch, look up and learn.
#[derive(Clone, Copy, Debug, Default)]
pub struct Home(u64);

#[repr(C, align(64))]
struct Bucket {
    keys: [AtomicU64; SLOTS],
    values: [AtomicU64; SLOTS],
}

/// A slot that holds the address looked for.
struct Found<'a> {
    key: &'a AtomicU64,
    value: &'a AtomicU64,
    slot: usize,
    seen: Value,
}

/// Where an address was seen in the table, and what was known of it: to find out later, without looking for it, that this
/// still holds.
#[derive(Clone, Copy, Debug)]
pub struct Sighting {
    bucket: usize,
    slot: usize,
    key: Key,
    value: Value,
}

impl Sighting {
    /// What was known of the address.
    pub fn value(&self) -> Value {
        self.value
    }
}

/// The learning table. See the module's description.
pub struct Fdb {
    buckets: Box<[Bucket]>,
    turns: Box<[AtomicBool]>,
    /// Addresses learnt on each port; static ones do not count.
    learnt: Box<[CachePadded<AtomicU32>]>,
    secret: [u64; 2],
}

/// The right to change which addresses of one home bucket the table holds.
struct Turn<'a>(&'a AtomicBool);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl Fdb {
    /// A table for `entries` addresses. It works best up to half of that: then 96 of 100 lie in their
    /// home buckets.
    ///
    /// # Errors
    /// [`FdbError::Size`] unless `entries` is a power of two in [`ENTRIES`].
    pub fn new(entries: usize) -> Result<Self, FdbError> {
        if !ENTRIES.contains(&entries) || !entries.is_power_of_two() {
            return Err(FdbError::Size(entries));
        }
        let random = RandomState::new();
        Ok(Self::with(entries / SLOTS, MAX_PORTS, [random.hash_one(1), random.hash_one(2)]))
    }

    /// `buckets` is a power of two.
    fn with(buckets: usize, ports: usize, secret: [u64; 2]) -> Self {
        debug_assert!(buckets.is_power_of_two());
        let bucket = || Bucket {
            keys: std::array::from_fn(|_| AtomicU64::new(EMPTY)),
            values: std::array::from_fn(|_| AtomicU64::new(0)),
        };
        Self {
            buckets: (0..buckets).map(|_| bucket()).collect(),
            turns: (0..TURNS.min(buckets)).map(|_| AtomicBool::new(false)).collect(),
            learnt: (0..ports).map(|_| CachePadded::new(AtomicU32::new(0))).collect(),
            secret: [secret[0], secret[1] | 1],
        }
    }

    /// How many addresses it has room for.
    pub fn capacity(&self) -> usize {
        self.buckets.len() * SLOTS
    }

    /// How many addresses are learnt on `port` now; static ones do not count.
    pub fn learnt_on(&self, port: u16) -> u32 {
        self.learnt.get(usize::from(port)).map_or(0, |count| count.load(Ordering::Relaxed))
    }

    /// Where `key` is looked for first.
    #[inline(always)]
    pub fn home(&self, key: Key) -> Home {
        let fold = |product: u128| product as u64 ^ (product >> 64) as u64;
        let once = fold(u128::from(key.0 ^ self.secret[0]) * u128::from(self.secret[1]));
        Home(fold(u128::from(once) * u128::from(self.secret[1])))
    }

    /// Starts loading the line that [`Fdb::at_home`] reads.
    #[inline(always)]
    pub fn prefetch(&self, home: Home) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch reads nothing and faults on nothing, whatever the address.
        unsafe { _mm_prefetch(std::ptr::from_ref(self.bucket(home, 0)).cast(), _MM_HINT_T0) };
    }

    /// The value of `key` if it lies in its home bucket, else [`Value::ABSENT`]: without a branch, for a burst of
    /// addresses that the processor cannot predict.
    #[inline(always)]
    pub fn at_home(&self, key: Key, home: Home) -> Value {
        self.bucket(home, 0).find(key).map_or(Value::ABSENT, |found| found.seen)
    }

    /// What is known of `key`.
    #[inline]
    pub fn lookup(&self, key: Key, home: Home) -> Option<Value> {
        self.find(key, home).map(|found| found.seen)
    }

    /// What is known of `key`, and where.
    pub fn sight(&self, key: Key) -> Option<Sighting> {
        let (bucket, found) = self.find_in(key, self.home(key))?;
        Some(Sighting { bucket, slot: found.slot, key, value: found.seen })
    }

    /// Whether exactly what was known of an address when it was seen is known of it now.
    #[inline(always)]
    pub fn still(&self, sighting: &Sighting) -> bool {
        let Some(bucket) = self.buckets.get(sighting.bucket) else { return false };
        // As a look-up reads a slot (see the module's description).
        let (word, value) = (&bucket.keys[sighting.slot % SLOTS], &bucket.values[sighting.slot % SLOTS]);
        let before = value.load(Ordering::Acquire);
        let is_key = word.load(Ordering::Acquire) == sighting.key.0;
        let after = value.load(Ordering::Relaxed);
        is_key & (before == sighting.value.0) & (after == sighting.value.0)
    }

    /// Notes that a frame from `key` came in on `port` in second `now`. At most `limit` addresses are learnt on a port.
    #[inline]
    pub fn learn(&self, key: Key, home: Home, port: u16, limit: u32, now: u32) -> Learn {
        match self.find(key, home) {
            Some(found) if found.seen.port() == port => {
                found.refresh(now);
                Learn::Known
            }
            Some(found) if found.seen.is_static() => Learn::Pinned,
            _ => self.change(key, home, port, limit, now),
        }
    }

    /// The part of [`Fdb::learn`] that changes who is where.
    #[cold]
    fn change(&self, key: Key, home: Home, port: u16, limit: u32, now: u32) -> Learn {
        // Before anything shared is written: a flood of new addresses beyond the limit costs loads only.
        let Some(count) = self.learnt.get(usize::from(port)) else { return Learn::LimitReached };
        if count.load(Ordering::Relaxed) >= limit {
            return Learn::LimitReached;
        }
        let Some(_turn) = self.turn(home) else { return Learn::Busy };
        // Looked for again: it may have come, moved or gone before it was our turn.
        let found = self.find(key, home);
        match &found {
            Some(found) if found.seen.port() == port => return Learn::Known,
            Some(found) if found.seen.is_static() => return Learn::Pinned,
            _ => {}
        }
        // Other turns may add to the same count meanwhile: what was taken beyond the limit goes back.
        if count.fetch_add(1, Ordering::Relaxed) >= limit {
            count.fetch_sub(1, Ordering::Relaxed);
            return Learn::LimitReached;
        }
        match found {
            Some(found) => {
                let old = update(found.value, |value| value.seen_at(port, now));
                self.forget_one(old.port());
                Learn::Moved
            }
            None if self.insert(key, home, port, false, now) => Learn::Learnt,
            None => {
                count.fetch_sub(1, Ordering::Relaxed);
                Learn::Full
            }
        }
    }

    /// Puts `key`, which is not in the table, into a free slot; the caller has its turn. False if there is none.
    fn insert(&self, key: Key, home: Home, port: u16, fixed: bool, now: u32) -> bool {
        let chain = self.chain();
        for step in 0..chain {
            let bucket = self.bucket(home, step);
            for (word, value) in bucket.keys.iter().zip(&bucket.values) {
                if word.load(Ordering::Relaxed) != EMPTY
                    || word.compare_exchange(EMPTY, CLAIMED, Ordering::AcqRel, Ordering::Relaxed).is_err()
                {
                    continue;
                }
                update(value, |old| old.next_owner(port, fixed, now));
                word.store(key.0, Ordering::Release);
                return true;
            }
            if step + 1 < chain && !bucket.is_chained() {
                bucket.values[0].fetch_or(Value::CHAINED, Ordering::Release);
            }
        }
        false
    }

    fn find(&self, key: Key, home: Home) -> Option<Found<'_>> {
        self.find_in(key, home).map(|(_, found)| found)
    }

    /// The slot of `key`, and in which bucket it is.
    #[inline(always)]
    fn find_in(&self, key: Key, home: Home) -> Option<(usize, Found<'_>)> {
        for step in 0..self.chain() {
            let bucket = self.bucket(home, step);
            if let Some(found) = bucket.find(key) {
                return Some((self.index(home, step), found));
            }
            if !bucket.is_chained() {
                break;
            }
        }
        None
    }

    /// Tries once to get the turn for the addresses of `home`.
    fn turn(&self, home: Home) -> Option<Turn<'_>> {
        let turn = &self.turns[home.0 as usize & (self.turns.len() - 1)];
        turn.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).ok().map(|_| Turn(turn))
    }

    fn forget_one(&self, port: u16) {
        if let Some(count) = self.learnt.get(usize::from(port)) {
            count.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn chain(&self) -> usize {
        CHAIN.min(self.buckets.len())
    }

    #[inline(always)]
    fn index(&self, home: Home, step: usize) -> usize {
        // The low bits name the home, the high ones the step to the next: odd, so that it comes by every bucket.
        let apart = (home.0 >> 40 | 1) as usize;
        (home.0 as usize).wrapping_add(step * apart) & (self.buckets.len() - 1)
    }

    #[inline(always)]
    fn bucket(&self, home: Home, step: usize) -> &Bucket {
        // SAFETY: the number of buckets is a power of two (see `with`), so the mask in `index` keeps it below.
        unsafe { self.buckets.get_unchecked(self.index(home, step)) }
    }
}

impl Bucket {
    #[inline(always)]
    fn find(&self, key: Key) -> Option<Found<'_>> {
        let mut hits = 1 << (SLOTS - 1); // a miss looks at the last slot, and finds that it is another's
        for (i, word) in self.keys.iter().enumerate() {
            hits |= u32::from(word.load(Ordering::Relaxed) == key.0) << i;
        }
        let slot = hits.trailing_zeros() as usize % SLOTS;
        let (word, value) = (&self.keys[slot], &self.values[slot]);
        let before = Value(value.load(Ordering::Acquire));
        let is_key = word.load(Ordering::Acquire) == key.0;
        let seen = Value(value.load(Ordering::Relaxed));
        (is_key & before.same_owner(seen)).then_some(Found { key: word, value, slot, seen })
    }

    #[inline(always)]
    fn is_chained(&self) -> bool {
        self.values[0].load(Ordering::Acquire) & Value::CHAINED != 0
    }
}

impl Found<'_> {
    /// Writes the time if it is another second than it was; somebody else's newer word stands.
    #[inline]
    fn refresh(&self, now: u32) {
        if self.seen.seen() != now {
            let new = self.seen.seen_at(self.seen.port(), now);
            let _ = self.value.compare_exchange(self.seen.0, new.0, Ordering::Release, Ordering::Relaxed);
        }
    }

    /// Takes the entry out of the table; the caller has the turn.
    fn remove(&self) {
        self.key.store(EMPTY, Ordering::Release);
    }
}

/// Changes a value word whose slot the caller owns. Only refreshes (once a second) and chain marks (once) can come between.
fn update(word: &AtomicU64, change: impl Fn(Value) -> Value) -> Value {
    let mut old = word.load(Ordering::Relaxed);
    loop {
        match word.compare_exchange(old, change(Value(old)).0, Ordering::AcqRel, Ordering::Relaxed) {
            Ok(old) => return Value(old),
            Err(current) => old = current,
        }
    }
}
