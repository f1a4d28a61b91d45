//! A running machine, as the clients of its control socket see it.

use std::path::Path;
use std::time::{Duration, Instant};

use control::client::{self, ClientError};
use control::{ControlServer, ControlSocket, Door};
use vmm::control::report::*;
use vmm::control::{NEXT, door, names, router};
use vmm::machine::Ended;

use crate::guest::{Code, Guest, no_kvm};

/// Prints dots for ever: mov dx, 0x3f8; mov al, '.'; out dx, al; jmp to the out.
fn dots() -> Guest {
    Guest::start(&Code::default().raw(&[0x66, 0xba, 0xf8, 0x03, 0xb0, b'.', 0xee, 0xeb, 0xfd]).elf(), "")
}

pub(crate) fn serve(guest: &Guest, run_dir: &Path) -> (Door, ControlServer) {
    let door = door(run_dir, "vm");
    let server = ControlSocket::bind(&door).unwrap().serve(router(guest.life.clone()), || {}).unwrap();
    (door, server)
}

pub(crate) fn printed(door: &Door) -> u64 {
    client::get_bytes_at(door, "/v1/console", NEXT).unwrap().0
}

pub(crate) fn until(what: &str, mut is: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !is() {
        assert!(Instant::now() < end, "not within a minute: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn info(door: &Door) -> MachineInfo {
    client::get(door, "/v1/vm").unwrap().value
}

fn tell(door: &Door, what: &str) -> Result<MachineState, ClientError> {
    client::post::<ActionReport>(door, what).map(|answer| answer.value.state)
}

#[test]
fn a_machine_rests_goes_on_and_reboots_as_it_is_told() {
    if no_kvm() {
        return;
    }
    let run_dir = tempfile::tempdir().unwrap();
    let guest = dots();
    let (door, _server) = serve(&guest, run_dir.path());
    assert_eq!(names(run_dir.path()).unwrap(), ["vm"]);
    let waiting = std::thread::spawn(move || guest.end());
    until("it prints", || printed(&door) > 0);
    assert_eq!(tell(&door, "/v1/pause").unwrap(), MachineState::Paused);
    let (at, exits) = (printed(&door), info(&door).vcpus[0].exits_total);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(printed(&door), at, "it printed while it rested");
    assert_eq!(info(&door).vcpus[0].exits_total, exits);
    assert_eq!(info(&door).state, MachineState::Paused);
    assert!(tell(&door, "/v1/pause").unwrap_err().to_string().contains("paused already"));
    assert_eq!(tell(&door, "/v1/resume").unwrap(), MachineState::Running);
    until("it goes on", || printed(&door) > at);
    assert!(tell(&door, "/v1/resume").unwrap_err().to_string().contains("is not paused"));
    for _ in 0..20 {
        tell(&door, "/v1/pause").unwrap();
        tell(&door, "/v1/resume").unwrap();
    }
    let (next, bytes) = client::get_bytes_at(&door, &format!("/v1/console?from={at}"), NEXT).unwrap();
    assert!(next > at && bytes.iter().all(|byte| *byte == b'.'));
    let typed = client::post_bytes::<TypedReport>(&door, "/v1/console", b"abc").unwrap().value;
    assert_eq!(typed.taken, 3);
    let none = client::get_bytes(&door, "/v1/console?port=virtio").unwrap_err().to_string();
    assert!(none.contains("no such console"), "{none}");
    assert_eq!(tell(&door, "/v1/reboot").unwrap(), MachineState::Restarting);
    assert_eq!(waiting.join().unwrap().0, Ended::Reset);
    let events = client::get::<EventsReport>(&door, "/v1/events").unwrap().value;
    let kinds: Vec<EventKind> = events.events.iter().map(|event| event.kind).collect();
    assert_eq!(kinds[..3], [EventKind::Started, EventKind::Paused, EventKind::Resumed]);
    assert_eq!(kinds.last(), Some(&EventKind::Reset));
    assert_eq!((kinds.len() as u64, events.missed), (events.last, 0));
    let gone = tell(&door, "/v1/pause").unwrap_err().to_string();
    assert!(gone.contains("no guest to tell"), "{gone}");
}

/// A guest of dots that rests, and is told `what`: how it ends.
fn resting_and_told(what: &str) -> Ended {
    let run_dir = tempfile::tempdir().unwrap();
    let guest = dots();
    let (door, _server) = serve(&guest, run_dir.path());
    let waiting = std::thread::spawn(move || guest.end());
    assert_eq!(tell(&door, "/v1/pause").unwrap(), MachineState::Paused);
    tell(&door, what).unwrap();
    waiting.join().unwrap().0
}

#[test]
fn a_guest_that_does_not_listen_to_its_power_button_is_ended_in_time_also_when_it_rested() {
    if no_kvm() {
        return;
    }
    let start = Instant::now();
    assert_eq!(resting_and_told("/v1/shutdown?timeout=1"), Ended::Stopped);
    let took = start.elapsed();
    // Whoever waits for a guest of these tests ends it after five minutes.
    assert!((Duration::from_secs(1)..Duration::from_secs(50)).contains(&took), "{took:?}");
}

#[test]
fn a_resting_machine_is_ended_at_once() {
    if no_kvm() {
        return;
    }
    assert_eq!(resting_and_told("/v1/kill"), Ended::Stopped);
}
