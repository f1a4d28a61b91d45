//! Ports of files: what one replays, another records.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal::SIGTERM;
use pcap_file::pcap::{PcapPacket, PcapReader, PcapWriter};

use crate::world::{Place, Running, eventually, port};

/// Frames from one station to others, of all lengths from 60 bytes on.
pub(crate) fn frames(count: usize) -> Vec<Vec<u8>> {
    let addresses = |i: usize| [2, 0, 0, 0, 1, i as u8, 2, 0, 0, 0, 0, 1, 0x88, 0xb5];
    (0..count).map(|i| [&addresses(i)[..], &vec![i as u8; 46 + i]].concat()).collect()
}

pub(crate) fn write(file: &Path, frames: &[Vec<u8>]) {
    let mut writer = PcapWriter::new(File::create(file).unwrap()).unwrap();
    for (i, data) in frames.iter().enumerate() {
        let time = Duration::from_micros(1_000_000 + 100 * i as u64);
        writer.write_packet(&PcapPacket::new(time, data.len() as u32, data)).unwrap();
    }
}

fn read(file: &Path) -> Vec<Vec<u8>> {
    let mut reader = PcapReader::new(File::open(file).unwrap()).unwrap();
    let mut frames = Vec::new();
    while let Some(packet) = reader.next_packet() {
        frames.push(packet.unwrap().data.into_owned());
    }
    frames
}

/// Keys of a port of files.
pub(crate) fn files(name: &str, keys: &str) -> String {
    format!("[[port]]\nname = \"{name}\"\nkind = \"pcap\"\n{keys}\n")
}

#[test]
fn what_one_port_replays_another_records_bit_for_bit_and_in_order() {
    let place = Place::new();
    let sent = frames(1_000);
    write(&place.run_dir().join("in.pcap"), &sent);
    place
        .write(&(files("from", "replay = \"in.pcap\"\nrate = 5000") + &files("to", "record = \"out.pcap\"")));
    let mut running = Running::start(&place);
    let of = |key: &str| place.json(&["stats"])["totals"][key].as_u64().unwrap();
    eventually("all frames arrive", || of("sent") == 1_000);
    assert_eq!((of("received"), of("dropped")), (1_000, 0));
    running.signal(SIGTERM);
    assert_eq!(running.end().1, Some(0));
    assert!(read(&place.run_dir().join("out.pcap")) == sent, "other frames, or in another order");
}

#[test]
fn a_file_is_replayed_at_its_rate_again_and_again() {
    let place = Place::new();
    write(&place.run_dir().join("in.pcap"), &frames(10));
    let keys = "replay = \"in.pcap\"\nrate = 1000\nrepeat = true";
    place.write(&(files("from", keys) + "[[port]]\nname = \"to\"\nkind = \"null\"\n"));
    let _running = Running::start(&place);
    let seen = || {
        let stats = place.json(&["stats"]);
        (stats["uptime_s"].as_f64().unwrap(), stats["totals"]["sent"].as_u64().unwrap())
    };
    let rate = || {
        let first = seen();
        std::thread::sleep(Duration::from_millis(500));
        let second = seen();
        (second.1 - first.1) as f64 / (second.0 - first.0)
    };
    // Less where the machine is busy elsewhere, and anything where it stood still between the time and the count.
    let mut rates = Vec::new();
    while !rates.last().is_some_and(|rate| (300.0..1_060.0).contains(rate)) {
        assert!(rates.len() < 20, "frames a second: {rates:?}");
        rates.push(rate());
    }
}

#[test]
fn files_that_cannot_be_used_are_refused_with_the_reason_and_nothing_is_started() {
    let place = Place::new();
    fs::write(place.run_dir().join("text"), "this is text, and long enough for a header").unwrap();
    for (keys, wanted) in [
        ("replay = \"none.pcap\"", "none.pcap is not there, or is no file"),
        ("replay = \"text\"", "text: is no pcap file"),
        ("record = \"/nowhere/x.pcap\"", "/nowhere: ENOENT"),
    ] {
        place.write(&files("a", keys));
        let output = place.ask(&[place.file().to_str().unwrap()]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!((output.status.code(), said.contains(wanted)), (Some(2), true), "{keys}: {said}");
        assert_eq!(place.left_behind(), ["text"]);
    }
}

#[test]
fn a_reload_records_only_where_the_switch_confined_itself_to() {
    let place = Place::new();
    let first = files("one", "record = \"one.pcap\"");
    place.write(&(first.clone() + &port("v")));
    let running = Running::start(&place);
    let elsewhere = tempfile::tempdir().unwrap();
    let with = |file: &str| first.clone() + &port("v") + &files("two", &format!("record = \"{file}\""));
    place.write(&with(elsewhere.path().join("two.pcap").to_str().unwrap()));
    let refused = String::from_utf8_lossy(&place.ask(&["reload"]).stderr).into_owned();
    assert!(
        refused.contains("`record`") && refused.contains("restart the switch")
            || running.log().contains("no Landlock"),
        "{refused}"
    );
    place.write(&with("two.pcap"));
    assert!(place.ask(&["reload"]).status.success());
    assert!(place.run_dir().join("two.pcap").exists());
}
