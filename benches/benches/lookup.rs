//! Looking up a burst of addresses in the learning table, with few addresses and with more than the caches hold.

#![allow(clippy::expect_used, missing_docs)]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use switch::bridge::fdb::Key;
use switch::bridge::{Fdb, Mac};

const BURST: usize = 32;

fn key(i: u32) -> Key {
    Key::new(Mac(benches::frame::mac(0, i)), 0)
}

fn lookups(c: &mut Criterion) {
    let mut group = c.benchmark_group("lookup, a burst of 32 addresses");
    group.throughput(Throughput::Elements(BURST as u64));
    for addresses in [2u32, 1_000, 100_000] {
        let fdb = Fdb::new((addresses as usize * 4).next_power_of_two().max(1024)).expect("a power of two");
        for i in 0..addresses {
            fdb.learn(key(i), fdb.home(key(i)), (i % 2) as u16, u32::MAX, 1);
        }
        let mut at = 0;
        group.bench_function(BenchmarkId::from_parameter(addresses), |b| {
            b.iter(|| {
                // A stride that no prefetcher follows. As the bridge does it: all homes first, then the values.
                let keys: [Key; BURST] = std::array::from_fn(|_| {
                    at = (at + 61_803) % addresses;
                    key(at)
                });
                let homes = keys.map(|k| fdb.home(k));
                homes.iter().for_each(|home| fdb.prefetch(*home));
                let found = std::iter::zip(keys, homes).filter(|(k, home)| fdb.lookup(*k, *home).is_some());
                black_box(found.count())
            });
        });
    }
}

criterion_group!(benches, lookups);
criterion_main!(benches);
