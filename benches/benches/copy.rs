//! The copy of a frame, between buffers that are in the second-level cache at best: 512 pairs in turn.

#![allow(missing_docs)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use virtio::memory::copy::{copy, copy_64};

const PAIRS: usize = 512;
const STRIDE: usize = 2048 + 64;

fn copies(c: &mut Criterion) {
    let mut group = c.benchmark_group("copy");
    let from = vec![1u8; PAIRS * STRIDE];
    let mut to = vec![2u8; PAIRS * STRIDE];
    for size in [64usize, 256, 1500] {
        group.throughput(Throughput::Bytes(size as u64));
        let mut i = 0;
        group.bench_function(BenchmarkId::from_parameter(size), |b| {
            b.iter(|| {
                i = (i + 1) % PAIRS;
                let (to, from) =
                    (to.as_mut_ptr().wrapping_add(i * STRIDE), from.as_ptr().wrapping_add(i * STRIDE));
                if size == 64 {
                    // SAFETY: 64 bytes from the start of a buffer of `STRIDE`, in two vectors apart.
                    unsafe { copy_64(to, from) }
                } else {
                    // SAFETY: `size` is below `STRIDE`; otherwise as above.
                    unsafe { copy(to, from, size) }
                }
            });
        });
    }
}

criterion_group!(benches, copies);
criterion_main!(benches);
