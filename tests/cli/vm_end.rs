//! How a machine ends that has no guest: between two boots, and before the first.

use std::fs;
use std::process::{Command, Stdio};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::vm::elf;
use crate::vm_sandbox::no_kvm;
use crate::world::{CABLEWAY, Place, Running, eventually, port};

/// A machine whose guest does nothing, with a card that waits for the port `p`; in a switch's place, whose file it has beside it.
fn start(place: &Place) -> Running {
    let at = |name: &str| place.0.path().join(name);
    // For ever.
    fs::write(at("kernel"), elf(&[0xeb, 0xfe])).unwrap();
    let log = at("vm-log");
    let mut command = Command::new(CABLEWAY);
    command.args(["vm", "--name", "vm", "--memory", "4MiB", "--serial", "off"]);
    command.arg("--kernel").arg(at("kernel")).arg("--run-dir").arg(place.run_dir());
    command.arg("--net").arg(format!("vhost-user,socket={}", place.socket("p").display()));
    let out = fs::File::create(&log).unwrap();
    let process = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(out).spawn().unwrap();
    Running { process, log }
}

fn ask(place: &Place, words: &[&str]) -> String {
    let output =
        Command::new(CABLEWAY).arg("vm").args(words).arg("--run-dir").arg(place.run_dir()).output().unwrap();
    assert!(output.status.success(), "{words:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn state(place: &Place) -> String {
    let info: Value = serde_json::from_str(&ask(place, &["info", "vm", "--json"])).unwrap();
    info["state"].as_str().unwrap().to_owned()
}

/// A machine that is told to reboot when its back end is gone, and waits for that with nothing to be told.
fn between_two_boots(place: &Place) -> Running {
    place.write(&port("p"));
    let mut switch = Running::start(place);
    let mut machine = start(place);
    machine.wait_for_log("started in");
    switch.signal(Signal::SIGTERM);
    assert_eq!(switch.end().1, Some(0));
    ask(place, &["reboot", "vm"]);
    machine.wait_for_log("waiting for its back end");
    eventually("it is between two boots", || state(place) == "restarting");
    machine
}

/// It ended by itself, with success, and nothing of it is there.
fn is_over(place: &Place, mut machine: Running) {
    eventually("its process ends", || machine.process.try_wait().unwrap().is_some());
    assert_eq!(machine.end().1, Some(0), "{}", machine.log());
    assert_eq!(place.left_behind(), [""; 0]);
}

#[test]
fn a_machine_is_killed_between_two_boots() {
    if no_kvm() {
        return;
    }
    let place = Place::new();
    let machine = between_two_boots(&place);
    assert_eq!(ask(&place, &["kill", "vm"]), "vm is ended\n");
    is_over(&place, machine);
}

#[test]
fn a_machine_is_killed_while_it_waits_for_its_first_boot() {
    if no_kvm() {
        return;
    }
    let place = Place::new();
    let mut machine = start(&place);
    machine.wait_for_log("waiting for its back end");
    assert_eq!(state(&place), "starting");
    assert_eq!(ask(&place, &["kill", "vm"]), "vm is ended\n");
    is_over(&place, machine);
}

#[test]
fn a_power_button_that_no_guest_can_hear_ends_the_machine() {
    if no_kvm() {
        return;
    }
    let place = Place::new();
    let machine = between_two_boots(&place);
    machine.signal(Signal::SIGTERM);
    is_over(&place, machine);
}
