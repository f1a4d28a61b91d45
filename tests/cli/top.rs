//! `cableway top --once`: with a switch that moves frames, and with nothing.

use std::process::{Command, Output};

use serde_json::Value;

use crate::files::{files, frames, write};
use crate::world::{CABLEWAY, Place, Running};

fn top(place: &Place, more: &[&str]) -> Output {
    let mut command = Command::new(CABLEWAY);
    command.args(["top", "--once", "--interval", "0.5", "--run-dir"]).arg(place.run_dir()).args(more);
    command.output().unwrap()
}

#[test]
fn the_rates_of_a_running_switch_are_shown() {
    let place = Place::new();
    write(&place.run_dir().join("in.pcap"), &frames(10));
    let keys = "replay = \"in.pcap\"\nrate = 1000\nrepeat = true";
    place.write(&(files("from", keys) + "[[port]]\nname = \"to\"\nkind = \"null\"\n"));
    let _running = Running::start(&place);
    let told = top(&place, &["--json"]);
    let view: Value =
        serde_json::from_slice(&told.stdout).unwrap_or_else(|error| panic!("{error}: {told:?}"));
    let port =
        |name: &str| view["ports"].as_array().unwrap().iter().find(|port| port["name"] == name).unwrap();
    let (came, left) = (port("from")["in_pps"].as_f64().unwrap(), port("to")["out_pps"].as_f64().unwrap());
    // Never much more than asked for; less where the machine is busy elsewhere.
    assert!((200.0..1_200.0).contains(&came), "{came} frames a second");
    assert!((came - left).abs() < came / 2.0, "{came} came, {left} left");
    let worker = &view["workers"][0];
    assert!(worker["waited_us_per_s"].as_f64().is_some(), "the worker's thread was found: {view}");
    let runs = view["cores"].to_string();
    assert!(runs.contains("worker-"), "{runs}");
    let text = String::from_utf8(top(&place, &[]).stdout).unwrap();
    for wanted in ["core ", "worker", "from", "to", "pps", "s/s"] {
        assert!(text.contains(wanted), "{wanted}: {text}");
    }
}

#[test]
fn where_nothing_runs_it_says_so_and_shows_the_cores() {
    let place = Place::new();
    let told = top(&place, &[]);
    let text = String::from_utf8(told.stdout).unwrap();
    assert!(told.status.success() && text.contains("no switch is running in"), "{text}");
    assert!(text.lines().next().is_some_and(|line| line.contains("core") && line.contains("busy")), "{text}");
}

#[test]
fn without_a_terminal_it_names_the_plain_table() {
    let place = Place::new();
    let mut command = Command::new(CABLEWAY);
    let refused = command.args(["top", "--run-dir"]).arg(place.run_dir()).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!((refused.status.code(), said.contains("--once")), (Some(2), true), "{said}");
}
