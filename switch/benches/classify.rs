//! What the bridge costs for one frame: `cargo bench -p cableway-switch --bench classify`.
//!
//! Each iteration is one burst of 32 frames whose addresses were just written to their heads, as a receive queue does it (that
//! store is part of the figure). "Elements" are frames; time the TSC's frequency gives cycles.

#![allow(clippy::expect_used)] // a benchmark whose world cannot be built has nothing to measure

use criterion::{BenchmarkId, Criterion, Throughput};
use port::{Burst, BurstBuffer, DropReason, Frame, FrameSet, Release};
use std::hint::black_box;
use std::sync::Arc;
use switch::bridge::{BridgePlan, Clock, Fdb, IngressState, Outputs, PortPlan, VlanMode, VlanSet};

const BURST: usize = 32;

/// Gives frames back to nobody.
struct Nobody;

impl Release for Nobody {
    fn release(&mut self) {}
    fn dropped(&mut self, set: FrameSet, reason: DropReason) {
        panic!("{} frames dropped: {}", set.len(), reason.sentence());
    }
}

/// Destination, source, IPv4, no options.
type Lead = [u8; 16];

fn lead(from: u32, to: u32) -> Lead {
    let mut lead = [0x02; 16];
    lead[2..6].copy_from_slice(&to.to_be_bytes());
    lead[8..12].copy_from_slice(&from.to_be_bytes());
    lead[12..].copy_from_slice(&[8, 0, 0x45, 0]);
    lead
}

struct Worker {
    plan: BridgePlan,
    buffer: BurstBuffer,
    state: IngressState,
    out: Outputs,
}

impl Worker {
    fn new(ports: Vec<PortPlan>, entries: usize) -> Self {
        let fdb = Arc::new(Fdb::new(entries).expect("a size of a table"));
        let plan = BridgePlan::new(ports.into_iter().map(Some).collect(), fdb, false).expect("few ports");
        let mut buffer = BurstBuffer::default();
        buffer.frames.fill(Frame { len: 64, first_len: 64, ..Frame::EMPTY });
        Self { plan, buffer, state: IngressState::default(), out: Outputs::default() }
    }

    fn burst(&mut self, ingress: u16, leads: &[Lead], now: u32) -> u32 {
        for (head, lead) in self.buffer.heads.iter_mut().zip(leads) {
            head.0[..16].copy_from_slice(lead);
        }
        let mut nobody = Nobody;
        let mut burst = Burst::new(&mut nobody, &self.buffer, leads.len());
        let clock = Clock { cycles: 0, seconds: now };
        let classified = self.plan.classify(ingress, &mut burst, clock, &mut self.state, &mut self.out);
        for (port, set, edit) in self.out.drain() {
            black_box((port, set, edit));
        }
        burst.release();
        classified.replicas
    }
}

fn frames(c: &mut Criterion, name: &str, mut worker: Worker, leads: &[Lead]) {
    let mut group = c.benchmark_group("classify");
    group.throughput(Throughput::Elements(BURST as u64));
    let mut bursts = leads.chunks_exact(BURST).cycle();
    group.bench_function(BenchmarkId::from_parameter(name), |b| {
        b.iter(|| bursts.next().map(|leads| worker.burst(0, black_box(leads), 0)));
    });
    group.finish();
}

/// Half of `stations` behind port 0, half behind port 1, all learnt; frames from the first to the second.
fn between(c: &mut Criterion, name: &str, stations: u32, entries: usize, vlan: &VlanMode) {
    let port = || PortPlan { vlan: vlan.clone(), ..PortPlan::default() };
    let mut worker = Worker::new(vec![port(), port()], entries);
    let half = stations / 2;
    for n in 0..half {
        worker.burst(0, &[lead(n, half)], 0);
        worker.burst(1, &[lead(half + n, 0)], 0);
    }
    // A multiplicative walk comes by every station in no order that a cache or a predictor likes.
    let walk = |n: u32| (u64::from(n) * 40_503 % u64::from(half)) as u32;
    let leads: Vec<Lead> = (0..half.max(BURST as u32)).map(|n| lead(walk(n), half + walk(n + 7))).collect();
    frames(c, name, worker, &leads);
}

fn classify(c: &mut Criterion) {
    between(c, "2 stations", 2, 65_536, &VlanMode::Unaware);
    between(c, "16 stations", 16, 65_536, &VlanMode::Unaware);
    between(c, "1,000 stations", 1_000, 65_536, &VlanMode::Unaware);
    between(c, "100,000 stations, 262,144 entries", 100_000, 262_144, &VlanMode::Unaware);
    between(c, "100,000 stations, 131,072 entries", 100_000, 131_072, &VlanMode::Unaware);
    let trunk = VlanMode::Trunk { vlans: VlanSet::all(), native: Some(1) };
    between(c, "2 stations, trunks", 2, 65_536, &trunk);
    between(c, "100,000 stations, trunks", 100_000, 262_144, &trunk);
    let flooded = Worker::new(vec![PortPlan::default(); 4], 65_536);
    frames(c, "unknown, flooded to 3 ports", flooded, &[lead(1, 2); BURST]);
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    classify(&mut criterion);
    criterion.final_summary();
}
