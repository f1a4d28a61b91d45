//! Faults on purpose and traces: by a file, changed under way, shown by the statistics.

use std::fs;
use std::path::Path;

use nix::sys::signal::Signal::SIGHUP;
use pcap_file::pcapng::{Block, PcapNgReader};
use serde_json::Value;

use crate::files::{files, frames, write};
use crate::world::{Place, Running, eventually};

/// The statistics of port `name`.
fn stats(place: &Place, name: &str) -> Value {
    let all = place.json(&["stats"]);
    all["ports"].as_array().unwrap().iter().find(|port| port["name"] == name).unwrap().clone()
}

/// Frames that came in on port `from` and were dropped for this reason.
fn dropped(place: &Place, reason: &str) -> u64 {
    let port = stats(place, "from");
    let drops = port["rx"][0]["drops"].as_array().unwrap().clone();
    drops.iter().find(|drop| drop["reason"] == reason).map_or(0, |drop| drop["frames"].as_u64().unwrap())
}

/// Frames in a trace.
fn traced(file: &Path) -> Vec<Vec<u8>> {
    let bytes = fs::read(file).unwrap();
    let mut reader = PcapNgReader::new(&bytes[..]).unwrap();
    let mut found = Vec::new();
    while let Some(block) = reader.next_block() {
        if let Block::EnhancedPacket(block) = block.unwrap() {
            found.push(block.data.into_owned());
        }
    }
    found
}

#[test]
fn faults_and_traces_begin_change_and_end_by_reloads_and_no_frame_goes_without_a_name() {
    let place = Place::new();
    let sent = frames(100);
    write(&place.run_dir().join("in.pcap"), &sent);
    let with = |from: &str, to: &str| {
        let replay = format!("replay = \"in.pcap\"\nrate = 2000\nrepeat = true\n{from}");
        place.write(&(files("from", &replay) + &format!("[[port]]\nname = \"to\"\nkind = \"null\"\n{to}\n")));
    };
    with("inject = { drop = 50, corrupt = 10 }", "trace = \"to.pcapng\"");
    let check = place.ask(&[place.file().to_str().unwrap(), "--check"]);
    let said = String::from_utf8_lossy(&check.stdout).into_owned();
    let flat: String = said.split_whitespace().filter(|word| *word != "|").collect::<Vec<_>>().join(" ");
    assert!(check.status.success() && said.contains("to.pcapng"), "{said}");
    assert!(flat.contains("suffer"), "{said}");
    let running = Running::start(&place);
    eventually("frames are lost and damaged", || {
        dropped(&place, "injected") > 100
            && stats(&place, "from")["inject"]["rx"]["corrupted"].as_u64().unwrap() > 10
    });
    assert!(
        running
            .log()
            .contains("port from: frames suffer on purpose: inject = { seed = 1, drop = 50, corrupt = 10 }")
    );
    eventually("frames are traced", || stats(&place, "to")["trace"]["captured"].as_u64().unwrap() > 50);
    let shown = String::from_utf8_lossy(&place.ask(&["stats"]).stdout).into_owned();
    assert!(
        shown.contains("Lost on purpose") && shown.contains("corrupted") && shown.contains("traced"),
        "{shown}"
    );

    // Others, and another file, without opening the port anew.
    with("inject = { duplicate = 100, delay_us = 1000000, direction = \"in\" }", "trace = \"other.pcapng\"");
    let lost = dropped(&place, "injected");
    running.signal(SIGHUP);
    eventually("frames wait", || stats(&place, "from")["inject"]["rx"]["held"].as_u64().unwrap() > 100);
    let later = dropped(&place, "injected");
    assert!(later < lost + 2_000, "counters go on from where they were, and none is lost any more");
    eventually("they come twice", || stats(&place, "to")["trace"]["captured"].as_u64().unwrap() > 50);
    let first = traced(&place.run_dir().join("to.pcapng"));
    assert!(first.iter().any(|frame| sent.contains(frame)), "{} frames", first.len());

    // None any more: what waited is counted, everything else arrives.
    with("", "");
    assert!(place.ask(&["reload"]).status.success());
    assert!(dropped(&place, "injected_lost") > 100);
    let port = stats(&place, "from");
    assert!(port["inject"].is_null() && stats(&place, "to")["trace"].is_null());
    let second = traced(&place.run_dir().join("other.pcapng"));
    assert!(second.len() > 50 && second.iter().all(|frame| sent.contains(frame)));
    assert!(second.windows(2).any(|two| two[0] == two[1]), "they came twice");
    let rx = &port["rx"][0];
    let of = |key: &str| rx[key].as_u64().unwrap();
    // The switch goes on while it is asked.
    assert!(of("received").abs_diff(of("switched") + of("dropped")) < 200, "{rx}");
}

#[test]
fn a_trace_that_cannot_be_written_refuses_the_reload_and_everything_goes_on() {
    let place = Place::new();
    write(&place.run_dir().join("in.pcap"), &frames(10));
    let with = |trace: &str| {
        let to = format!("[[port]]\nname = \"to\"\nkind = \"null\"\n{trace}\n");
        place.write(&(files("from", "replay = \"in.pcap\"\nrate = 1000\nrepeat = true") + &to));
    };
    with("trace = \"a.pcapng\"");
    let _running = Running::start(&place);
    with("trace = \"/nowhere/b.pcapng\"");
    let refused = place.ask(&["reload"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("`trace`: ") && said.contains("/nowhere"), "{said}");
    let seen = || stats(&place, "to")["trace"]["captured"].as_u64().unwrap();
    let before = seen();
    eventually("the trace goes on", || seen() > before);
}
