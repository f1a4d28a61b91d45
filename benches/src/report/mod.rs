//! What was found, as a table, as JSON and as one page: a campaign's here, that of cores in [`cores`].
//!
//! Owns the [`Report`] value; how it looks is in the files beside this one. Never measures.

mod chart;
pub mod cores;
mod html;
mod table;

pub use html::page;
pub use table::tables;

use serde::Serialize;

use crate::campaign::{Plan, SizeResult};
use crate::machine::Machine;

/// Everything about one campaign.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What was measured, in the user's words: a file, a command, two sockets.
    pub subject: String,
    /// Settings of the ports: ring layout and size, pages.
    pub ports: Vec<(&'static str, String)>,
    /// What was asked for.
    pub plan: Plan,
    /// On which machine.
    pub machine: Machine,
    /// By frame size.
    pub results: Vec<SizeResult>,
    /// Why it ended early, if it did.
    pub ended: Option<String>,
}

impl Report {
    /// The report as JSON.
    pub fn json(&self) -> String {
        // A report is made of strings and numbers: nothing in it can fail to be written.
        serde_json::to_string_pretty(self).unwrap_or_else(|e| format!("{{\"error\": \"{e}\"}}"))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::campaign::{ClosedLoop, LoadLatency, Rate, Throughput};
    use crate::clock::Clock;
    use crate::frame::Verify;
    use crate::histogram::Latencies;
    use crate::search::{Burst, Found};

    fn latency(size: usize, percent: u32, pps: f64, scale: f64) -> LoadLatency {
        let mut latencies = Latencies::default();
        // A body and a long tail.
        for i in 0..200_000u64 {
            let x = (i * 2_654_435_761 % 200_000) as f64 / 200_000.0;
            latencies.record((scale * (900.0 - 300.0 * (1.0 - x).ln() + 4.0 / (1.000_002 - x))) as u64);
        }
        let clock = Clock { hz: 2.6e9 };
        LoadLatency {
            percent,
            rate: Rate::new(pps * f64::from(percent) / 100.0, size),
            one_way: latencies.summary(&clock),
            curve: latencies.curve(&clock),
            lost: 0,
        }
    }

    /// A report as a fast switch would give.
    pub(crate) fn example() -> Report {
        let result = |&size: &usize| {
            let pps = 1e9 / (45.0 + size as f64 * 0.045);
            let found = |rate: f64| Found { rate, at_ceiling: false, trials: Vec::new() };
            let throughput = |share: f64, generator_limited: bool| Throughput {
                rate: Rate::new(pps * share, size),
                found: found(pps * share),
                generator_limited,
            };
            let full = latency(size, 100, pps, 14.0);
            SizeResult {
                size,
                closed_loop: ClosedLoop {
                    rate: Rate::new(pps, size),
                    worker_cycles: Some(74.0 + size as f64 * 0.08),
                    round_trip: full.one_way,
                    lost: 0,
                    duplicates: 0,
                    corrupt: 0,
                    generator_busy: 0.97,
                },
                ndr: Some(throughput(0.86, size == 64)),
                pdr: Some(throughput(0.93, size == 64)),
                back_to_back: Some(Burst { frames: 412, at_limit: false, trials: 60 }),
                latency: [(10, 1.0), (50, 1.5), (90, 4.0)].map(|(p, s)| latency(size, p, pps, s)).into(),
            }
        };
        let sizes = vec![64, 128, 256, 512, 1024, 1280, 1518, 9000];
        let plan = Plan {
            sizes: sizes.clone(),
            seconds: 2.0,
            in_flight: 192,
            addresses: 1,
            verify: Verify::Whole,
            search: true,
            latency: true,
        };
        Report {
            subject: "configs/<vv> & \"co\".toml".into(),
            ports: vec![("Rings", "split, 256 entries".into()), ("Buffers", "2 MiB huge pages".into())],
            plan,
            machine: Machine::read(std::path::Path::new("/")),
            results: sizes.iter().map(result).collect(),
            ended: None,
        }
    }

    #[test]
    fn the_json_holds_every_size_with_rates_and_percentiles() {
        let json: serde_json::Value = serde_json::from_str(&example().json()).unwrap();
        let first = &json["results"][0];
        assert_eq!(first["size"], 64);
        assert!(first["ndr"]["rate"]["mpps"].as_f64().unwrap() > 10.0);
        assert!(first["latency"][1]["one_way"]["percentiles"][2]["ns"].as_f64().unwrap() > 100.0);
        assert_eq!(json["plan"]["verify"], "whole");
    }
}
