//! What housekeeping does to the learning table: ageing, flushing, static entries, listing.
//!
//! Never called by a worker: these wait for turns. Each call looks at no more buckets than it was asked to.

use super::{Bucket, Fdb, FdbError, Found, Home, Key, Ordering, Turn, Value, update};
use crate::bridge::Mac;

/// An address in the table, as it was at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FdbEntry {
    /// The address.
    pub mac: Mac,
    /// Its VLAN; 0 where VLANs are not looked at.
    pub vid: u16,
    /// The port it is on.
    pub port: u16,
    /// Whether the configuration put it there.
    pub fixed: bool,
    /// The second in which it was last seen, of the clock that workers are given.
    pub seen: u32,
}

/// An address that the configuration puts on a port: it never moves and never ages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StaticEntry {
    /// The address.
    pub mac: Mac,
    /// Its VLAN; 0 where VLANs are not looked at.
    pub vid: u16,
    /// The port.
    pub port: u16,
}

/// How far a pass over the table came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pass {
    /// The bucket to go on from, or `None` at the table's end.
    pub next: Option<usize>,
    /// Entries removed.
    pub removed: usize,
}

impl Fdb {
    /// How many buckets a pass over the whole table looks at.
    pub fn buckets(&self) -> usize {
        self.buckets.len()
    }

    /// Removes what was not seen for more than `max_age` seconds, in `count` buckets from bucket `from`.
    pub fn age(&self, from: usize, count: usize, now: u32, max_age: u32) -> Pass {
        // Seconds of workers may be one ahead of the caller's: that is age 0, not four billion.
        let age = |seen: u32| (now.wrapping_sub(seen) as i32).max(0) as u32;
        self.remove_if(from, count, |entry| !entry.fixed && age(entry.seen) > max_age)
    }

    /// Forgets what was learnt on `port`: it went away, or its VLANs changed.
    pub fn flush_port(&self, port: u16) -> usize {
        self.remove_if(0, self.buckets(), |entry| !entry.fixed && entry.port == port).removed
    }

    /// Forgets everything that was learnt.
    pub fn flush(&self) -> usize {
        self.remove_if(0, self.buckets(), |entry| !entry.fixed).removed
    }

    /// Makes `wanted` the static entries of the table, and removes all others. Learnt entries for the same address give way.
    ///
    /// # Errors
    /// [`FdbError::NotAStation`], with nothing changed; [`FdbError::Full`], with the entries before it in place.
    pub fn set_static(&self, wanted: &[StaticEntry]) -> Result<(), FdbError> {
        if let Some(wrong) = wanted.iter().find(|entry| !entry.mac.is_station()) {
            return Err(FdbError::NotAStation(wrong.mac));
        }
        let mut keys: Vec<u64> = wanted.iter().map(|entry| Key::new(entry.mac, entry.vid).0).collect();
        keys.sort_unstable();
        self.remove_if(0, self.buckets(), |entry| {
            entry.fixed && keys.binary_search(&Key::new(entry.mac, entry.vid).0).is_err()
        });
        wanted.iter().try_for_each(|entry| self.pin(entry))
    }

    fn pin(&self, entry: &StaticEntry) -> Result<(), FdbError> {
        let key = Key::new(entry.mac, entry.vid);
        let home = self.home(key);
        let _turn = self.await_turn(home);
        if let Some(found) = self.find(key, home) {
            let old = update(found.value, |value| value.fixed_at(entry.port));
            if !old.is_static() {
                self.forget_one(old.port());
            }
            return Ok(());
        }
        if self.insert(key, home, entry.port, true, 0) { Ok(()) } else { Err(FdbError::Full(entry.mac)) }
    }

    /// All entries, in no order. Reads the table as the caller goes on; what changes meanwhile may be missed or be old.
    pub fn entries(&self) -> impl Iterator<Item = FdbEntry> + '_ {
        self.buckets.iter().flat_map(|bucket| {
            bucket.keys.iter().filter_map(|word| {
                let key = Key::from_word(word.load(Ordering::Acquire))?;
                bucket.find(key).map(|found| FdbEntry::new(key, found.seen))
            })
        })
    }

    fn remove_if(&self, from: usize, count: usize, gone: impl Fn(&FdbEntry) -> bool) -> Pass {
        let end = from.saturating_add(count).min(self.buckets.len());
        let removed = self
            .buckets
            .get(from..end)
            .unwrap_or_default()
            .iter()
            .map(|bucket| self.remove_from(bucket, &gone))
            .sum();
        Pass { next: (end < self.buckets.len()).then_some(end), removed }
    }

    fn remove_from(&self, bucket: &Bucket, gone: &impl Fn(&FdbEntry) -> bool) -> usize {
        let is_gone = |key, found: &Found<'_>| gone(&FdbEntry::new(key, found.seen));
        let mut removed = 0;
        for word in &bucket.keys {
            let Some(key) = Key::from_word(word.load(Ordering::Acquire)) else { continue };
            if !bucket.find(key).is_some_and(|found| is_gone(key, &found)) {
                continue;
            }
            let _turn = self.await_turn(self.home(key));
            // Looked for again: it may have been seen, moved or removed before it was our turn.
            if let Some(found) = bucket.find(key).filter(|found| is_gone(key, found)) {
                if !found.seen.is_static() {
                    self.forget_one(found.seen.port());
                }
                found.remove();
                removed += 1;
            }
        }
        removed
    }

    fn await_turn(&self, home: Home) -> Turn<'_> {
        loop {
            if let Some(turn) = self.turn(home) {
                return turn;
            }
            // Whoever has it needs less than a microsecond, unless it was preempted: sleep, in case it is we who keep it away.
            #[cfg(not(model_check))]
            std::thread::sleep(std::time::Duration::from_micros(50));
            #[cfg(model_check)]
            loom::thread::yield_now();
        }
    }
}

impl FdbEntry {
    fn new(key: Key, value: Value) -> Self {
        Self {
            mac: key.mac(),
            vid: key.vid(),
            port: value.port(),
            fixed: value.is_static(),
            seen: value.seen(),
        }
    }
}
