//! The measuring commands as a user meets them: short runs, on whatever cores this machine has. What they measure here means
//! nothing (other tests run beside them); that nothing is lost and everything is said does.

#![allow(clippy::unwrap_used, reason = "helpers of tests may panic, too")]

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

const CABLEWAY: &str = env!("CARGO_BIN_EXE_cableway");

fn run(args: &[&str]) -> Output {
    Command::new(CABLEWAY).args(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"))
}

/// A learning bridge on the last core that we may use, which sleeps when it has nothing to do.
fn configuration() -> tempfile::NamedTempFile {
    let core = host::topology::permitted_cores().unwrap().iter().last().unwrap();
    let port = |n: u8| format!("[[port]]\nname = \"v{n}\"\nkind = \"vhost-user\"\nsocket = \"v{n}.sock\"\n");
    let file = tempfile::NamedTempFile::new().unwrap();
    let head = format!("[switch]\nworkers = [{core}]\nidle = \"sleep\"\n");
    fs::write(file.path(), head + &port(0) + &port(1)).unwrap();
    file
}

#[test]
fn the_demo_loses_nothing_and_ends_with_the_table() {
    for ring in ["split", "packed"] {
        let output = run(&["demo", "--seconds", "1", "--ring", ring]);
        let shown = text(&output.stdout);
        assert!(output.status.success(), "{output:?}");
        for part in [
            "frames delivered",
            "cycles a frame",
            "lost       0\n",
            "corrupt    0\n",
            "p99.9",
            "max",
            "samples",
        ] {
            assert!(shown.contains(part), "{part:?} is not in:\n{shown}");
        }
    }
}

#[test]
fn the_demo_carries_frames_of_every_size_and_says_it_in_json() {
    for size in ["65", "1518", "9216"] {
        let found = json(&run(&["demo", "--seconds", "1", "--size", size, "--json"]));
        assert!(found["delivered"].as_u64().unwrap() > 100, "{found}");
        assert_eq!(
            (&found["lost"], &found["corrupt"], &found["duplicates"]),
            (&0.into(), &0.into(), &0.into())
        );
    }
}

#[test]
fn an_interrupted_demo_ends_at_once_with_the_table_so_far() {
    let mut child = Command::new(CABLEWAY)
        .args(["demo", "--seconds", "600"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut shown = BufReader::new(child.stdout.take().unwrap());
    // The first line of the table: frames count since a second.
    let mut line = String::new();
    while line.split_whitespace().next() != Some("1") {
        line.clear();
        assert!(shown.read_line(&mut line).unwrap() > 0, "the demo ended before its first second was over");
    }
    let asked = Instant::now();
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).unwrap();
    let mut rest = String::new();
    shown.read_to_string(&mut rest).unwrap();
    let status = child.wait().unwrap();
    assert!(rest.contains("seconds, interrupted"), "{rest}");
    assert!(status.success(), "{rest}");
    // "At once", also where other programs have the cores; 600 seconds were to come.
    assert!(asked.elapsed() < Duration::from_secs(300));
}

#[test]
fn bench_vv_measures_a_configuration_and_writes_a_report() {
    let (file, dir) = (configuration(), tempfile::tempdir().unwrap());
    let path = file.path().to_str().unwrap();
    let report = dir.path().join("report");
    let output = run(&[
        "bench",
        "vv",
        path,
        "--quick",
        "--json",
        "--sizes",
        "64,1500",
        "--seconds",
        "0.3",
        "--addresses",
        "500",
        "--report",
        report.to_str().unwrap(),
    ]);
    assert!(output.status.success(), "{output:?}");
    let found = json(&output);
    assert_eq!(found["results"].as_array().unwrap().len(), 2);
    for result in found["results"].as_array().unwrap() {
        let closed_loop = &result["closed_loop"];
        assert_eq!((&closed_loop["lost"], &closed_loop["corrupt"]), (&0.into(), &0.into()), "{result}");
        assert!(closed_loop["worker_cycles"].as_f64().unwrap() > 1.0, "{result}");
    }
    assert!(fs::read_to_string(report.join("report.html")).unwrap().contains("<svg"));
    assert_eq!(
        serde_json::from_slice::<Value>(&fs::read(report.join("report.json")).unwrap()).unwrap(),
        found
    );
}

#[test]
fn wrong_arguments_are_refused_with_status_2_before_anything_starts() {
    for (args, says) in [
        (vec!["bench", "vv"], "FILE of a switch to start, or --socket twice"),
        (vec!["bench", "vv", "--socket", "/tmp/a"], "--socket twice"),
        (vec!["bench", "vv", "x.toml", "--sizes", "63"], "64 to 9216"),
        (vec!["bench", "vv", "no-such-file.toml"], "there is no such file"),
        (vec!["demo", "--ring", "round"], "split or packed"),
        (vec!["demo", "--size", "60"], "64"),
    ] {
        let output = run(&args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {output:?}");
        assert!(text(&output.stderr).contains(says), "{args:?}: {output:?}");
    }
}

#[test]
fn latency_measures_the_named_core_says_what_disturbed_it_and_judges_it() {
    let core = host::topology::permitted_cores().unwrap().iter().last().unwrap();
    let place = tempfile::tempdir().unwrap();
    let report = place.path().join("report");
    // Every timer interrupt is a gap.
    let common =
        ["latency", "--seconds", "0.5", "--priority", "0", "--gap", "200ns", "--cores", &core.to_string()];
    let with = |more: &[&str]| run(&[common.as_slice(), more].concat());

    let kept = with(&["--limit", "100s", "--report", report.to_str().unwrap()]);
    assert_eq!(kept.status.code(), Some(0), "{kept:?}");
    let shown = text(&kept.stdout);
    let parts = [
        "How late a timer wakes a thread",
        "Passes of a busy loop",
        "p99.999",
        "taken away",
        "gaps from",
        "kept.",
    ];
    for part in parts {
        assert!(shown.contains(part), "{part:?} is not in:\n{shown}");
    }
    assert_eq!(fs::read_to_string(report.join("latency.html")).unwrap().matches("<svg").count(), 3);
    assert!(report.join("latency.json").exists());

    // Nobody is woken within a nanosecond.
    let beyond = with(&["--test", "wakeup", "--limit", "1ns", "--json"]);
    assert_eq!(beyond.status.code(), Some(1), "{beyond:?}");
    let found = json(&beyond);
    let [result] = found["results"].as_array().unwrap().as_slice() else { panic!("{found}") };
    assert_eq!((&result["test"], &result["core"]), (&"wakeup".into(), &core.into()));
    assert!(result["times"]["samples"].as_u64().unwrap() > 0, "{found}");

    for (wrong, message) in [
        (["--cores", "1000"], "core 1000 does not exist"),
        (["--limit", "20"], "give a number and a unit"),
        (["--seconds", "0"], "0.01 to 604800"),
        (["--interval", "1us"], "10us to 10s"),
    ] {
        let refused = run(&[["latency"].as_slice(), &wrong].concat());
        let why = text(&refused.stderr);
        assert_eq!(refused.status.code(), Some(2), "{wrong:?}: {refused:?}");
        assert!(why.contains(message) && refused.stdout.is_empty(), "{wrong:?}: {why}");
    }
}
