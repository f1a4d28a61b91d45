//! `cableway switch capture`: frames of a running switch in a file, chosen and counted.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use pcap_file::pcapng::blocks::enhanced_packet::EnhancedPacketOption;
use pcap_file::pcapng::{Block, PcapNgReader};

use crate::files::{files, frames, write};
use crate::world::{CABLEWAY, Place, Running, eventually};

/// A switch that replays ten frames, over and over, from port `from` to port `to`.
fn replaying() -> (Place, Running) {
    let place = Place::new();
    write(&place.run_dir().join("in.pcap"), &frames(10));
    let keys = "replay = \"in.pcap\"\nrate = 2000\nrepeat = true";
    place.write(&(files("from", keys) + "[[port]]\nname = \"to\"\nkind = \"null\"\n"));
    let running = Running::start(&place);
    (place, running)
}

/// The frames of a pcapng file, each with its direction: 1 in, 2 out.
fn read(file: &Path) -> Vec<(Vec<u8>, u32)> {
    let mut reader = PcapNgReader::new(File::open(file).unwrap()).unwrap();
    let mut frames = Vec::new();
    while let Some(block) = reader.next_block() {
        if let Block::EnhancedPacket(block) = block.unwrap() {
            let Some(EnhancedPacketOption::Flags(way)) = block.options.first() else {
                panic!("no direction")
            };
            frames.push((block.data.to_vec(), *way));
        }
    }
    frames
}

#[test]
fn a_capture_holds_the_ports_frames_in_order_with_their_direction_and_nothing_is_missed() {
    let (place, _running) = replaying();
    let file = place.0.path().join("out.pcapng");
    for (port, way) in [("from", 1), ("to", 2)] {
        let output = place.ask(&["capture", port, "-w", file.to_str().unwrap(), "--seconds", "0.5"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            output.status.success() && said.contains(&format!("frames of port {port} captured, 0 beyond")),
            "{said}"
        );
        let captured = read(&file);
        assert!(captured.len() > 100, "{} frames", captured.len());
        let sent = frames(10);
        let first = sent.iter().position(|frame| *frame == captured[0].0).unwrap();
        for (i, (frame, direction)) in captured.iter().enumerate() {
            assert!((frame, *direction) == (&sent[(first + i) % 10], way), "frame {i} of port {port}");
        }
    }
}

#[test]
fn a_filter_and_a_length_choose_what_is_kept() {
    let (place, _running) = replaying();
    let file = place.0.path().join("out.pcapng");
    let options = ["--seconds", "0.3", "--snaplen", "20", "--filter", "ether dst 02:00:00:00:01:03"];
    let output = place.ask(&[&["capture", "to", "-w", file.to_str().unwrap()][..], &options].concat());
    assert!(output.status.success(), "{output:?}");
    let captured = read(&file);
    assert!(captured.len() > 5 && captured.iter().all(|(frame, _)| frame[..] == frames(10)[3][..20]));
}

/// A reader that we did not write, where it is installed.
#[test]
fn tcpdump_reads_every_frame_of_a_capture_in_order() {
    if Command::new("tcpdump").arg("--version").output().is_err() {
        println!("skipped: no tcpdump (Debian's package tcpdump)");
        return;
    }
    let (place, _running) = replaying();
    let file = place.0.path().join("out.pcapng");
    for port in ["from", "to"] {
        let output = place.ask(&["capture", port, "-w", file.to_str().unwrap(), "--seconds", "0.3"]);
        assert!(output.status.success(), "{output:?}");
        let captured = read(&file);
        assert!(captured.len() > 50, "{} frames", captured.len());
        let shown = Command::new("tcpdump").args(["-n", "-e", "-t", "-r"]).arg(&file).output().unwrap();
        assert!(shown.status.success(), "{shown:?}");
        let text = String::from_utf8_lossy(&shown.stdout).into_owned();
        let lines: Vec<_> = text.lines().filter(|line| line.contains("02:00:00:00:01:")).collect();
        assert_eq!(lines.len(), captured.len(), "port {port}: {text:.500}");
        for ((frame, _), line) in captured.iter().zip(lines) {
            let address = |at: usize| {
                frame[at..at + 6].iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(":")
            };
            let length = format!("length {}", frame.len());
            assert!(line.contains(&address(0)) && line.contains(&address(6)), "{line}");
            assert!(line.contains(&length), "{line}: wanted {length}");
        }
    }
}

#[test]
fn mistakes_are_told_and_touch_no_file() {
    let (place, _running) = replaying();
    let file = place.0.path().join("precious");
    fs::write(&file, "kept").unwrap();
    let file = file.to_str().unwrap();
    for (args, wanted) in [
        (
            ["capture", "nobody", "-w", file, "--filter", ""],
            "there is no port \"nobody\"; there are from, to",
        ),
        (["capture", "to", "-w", file, "--filter", "tpc"], "filter: \"tpc\" is unknown; there are arp,"),
    ] {
        let output = place.ask(&args);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(wanted), "{said}");
        assert_eq!(fs::read_to_string(file).unwrap(), "kept");
    }
    let full = place.ask(&["capture", "to", "-w", "/dev/full", "--seconds", "5"]);
    let said = String::from_utf8_lossy(&full.stderr).into_owned();
    assert!(!full.status.success() && said.contains("/dev/full"), "{said}");
}

#[test]
fn a_capture_whose_client_was_killed_ends_by_itself() {
    let (place, _running) = replaying();
    let mut command = Command::new(CABLEWAY);
    command.args(["switch", "capture", "to", "-w", "/dev/null", "--run-dir"]).arg(place.run_dir());
    let mut client = command.stdin(Stdio::null()).spawn().unwrap();
    eventually("it captures", || status(&place, "GET /v1/captures/1") == "200");
    client.kill().unwrap();
    client.wait().unwrap();
    // Whoever asks keeps it for five seconds more: it is asked for seldom.
    let mut asked = (0..10).map(|_| {
        std::thread::sleep(Duration::from_millis(6_000));
        status(&place, "GET /v1/captures/1")
    });
    assert!(asked.any(|status| status == "404"), "it goes on");
}

#[test]
fn a_capture_ends_with_its_port_and_never_shows_the_port_that_gets_its_number() {
    let (place, _running) = replaying();
    assert_eq!(status(&place, "POST /v1/captures?port=to"), "200");
    assert_eq!(status(&place, "GET /v1/captures/1"), "200");
    let keys = "replay = \"in.pcap\"\nrate = 2000\nrepeat = true";
    place.write(&(files("from", keys) + "[[port]]\nname = \"other\"\nkind = \"null\"\n"));
    assert!(place.ask(&["reload"]).status.success());
    assert_eq!(status(&place, "GET /v1/captures/1"), "404");
}

/// Asks the control socket, and returns the status of the answer.
fn status(place: &Place, request: &str) -> String {
    let mut stream = UnixStream::connect(place.run_dir().join("switch.sock")).unwrap();
    write!(stream, "{request} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let answer = String::from_utf8_lossy(&answer).into_owned();
    answer.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)).unwrap_or(&answer).to_owned()
}
