//! `cableway latency` beside Debian's cyclictest, which measures the same thing and which we did not write.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::switch::binary;

/// Alternating runs of each.
const ROUNDS: usize = 5;

#[test]
#[ignore = "needs root and rt-tests: ./check latency"]
fn wake_ups_are_as_late_as_cyclictest_finds_them() {
    let core = host::topology::permitted_cores().unwrap().iter().last().unwrap().to_string();
    let place = tempfile::tempdir().unwrap();
    let runs: Vec<(f64, f64)> = (0..ROUNDS).map(|_| (cyclictest(&core, place.path()), ours(&core))).collect();
    let theirs = median(runs.iter().map(|r| r.0).collect());
    let ours = median(runs.iter().map(|r| r.1).collect());
    println!(
        "p99 of wake-ups, medians of {ROUNDS}: cyclictest {theirs:.1} µs, cableway {ours:.1} µs; {runs:.1?}"
    );
    // On a machine that does nothing else they agree within 20 % or 3 µs (docs/measuring.md); tests share theirs with others.
    let far = (0.5 * theirs - 5.0)..=(2.0 * theirs + 20.0);
    assert!(far.contains(&ours), "cyclictest {theirs:.1} µs, cableway {ours:.1} µs, {runs:.1?}");
}

/// p99 in microseconds, from its histogram: lines of microseconds and how many (cyclictest(8), `--histogram`).
fn cyclictest(core: &str, place: &Path) -> f64 {
    let file = place.join("histogram");
    let output = Command::new("cyclictest")
        .args(["--quiet", "--mlockall", "--priority=95", "--interval=200", "--threads=1", "--duration=2"])
        .args([
            "--histogram=2000".into(),
            format!("--affinity={core}"),
            format!("--histfile={}", file.display()),
        ])
        .output()
        .expect("cyclictest of Debian's rt-tests");
    assert!(output.status.success(), "{output:?}");
    let text = std::fs::read_to_string(file).unwrap();
    let line = |line: &str| {
        let mut words = line.split_whitespace();
        Some((words.next()?.parse::<f64>().ok()?, words.next()?.parse::<u64>().ok()?))
    };
    let counts: Vec<(f64, u64)> = text.lines().filter_map(line).collect();
    let all: u64 = counts.iter().map(|c| c.1).sum();
    let mut seen = 0;
    let reached = |&&(_, count): &&(f64, u64)| {
        seen += count;
        seen * 100 >= all * 99
    };
    counts.iter().find(reached).unwrap_or_else(|| panic!("no wake-ups in\n{text}")).0
}

/// p99 in microseconds.
fn ours(core: &str) -> f64 {
    let output = Command::new(binary())
        .args(["latency", "--test", "wakeup", "--seconds", "2", "--cores", core, "--json"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let percentiles = found["results"][0]["times"]["percentiles"].as_array().unwrap();
    let p99 = percentiles.iter().find(|p| p["name"] == "p99").unwrap_or_else(|| panic!("{found}"));
    p99["ns"].as_f64().unwrap() / 1e3
}

fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    of[of.len() / 2]
}
