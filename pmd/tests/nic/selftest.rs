//! What cards find out about themselves, and what is wrong with one whose parts fail.

use std::sync::Arc;

use pmd::dma::{Arena, ArenaOptions};
use pmd::e1000e::E1000e;
use pmd::igb::Igb;
use pmd::igbvf::Igbvf;
use pmd::nic::Nic;
use pmd::nic::selftest::{self, Line, Outcome, SelfTest};
use pmd::qtest::{Function, Machine};
use pmd::virtio_net::VirtioNet;

/// The lines of a test of `function`, in words: `name: outcome`.
fn test<N: SelfTest<Device = Function>>(machine: &Machine, function: &Arc<Function>) -> Vec<String> {
    let arena = Arena::new(ArenaOptions::default(), machine.space()).unwrap();
    // One that is gone has no interrupts either.
    function.listen();
    let lines = selftest::run::<N>(function, &arena, &mut |vector| function.take(vector));
    let word = |Line { name, outcome }: &Line| match outcome {
        Outcome::Ok(seen) => format!("{name}: ok ({seen})"),
        Outcome::Failed(why) => format!("{name}: failed ({why})"),
        Outcome::NotSupported => format!("{name}: not supported"),
    };
    lines.iter().map(word).collect()
}

fn starts(lines: &[String], wanted: &[&str]) {
    assert!(
        lines.len() == wanted.len() && lines.iter().zip(wanted).all(|(l, w)| l.starts_with(w)),
        "{lines:#?}"
    );
}

/// An adapter that is well, and one whose cable is out: its frames come back to it all the same, where the model lets them.
fn adapter<N: SelfTest<Device = Function>>(model: &str) {
    let machine = Machine::start(model).unwrap();
    let lines = test::<N>(&machine, &machine.function());
    starts(
        &lines,
        &[
            "registers: ok",
            "start: ok",
            "eeprom: ok",
            "interrupt: ok",
            "dma: ok",
            "loopback: ok",
            "link: ok (1000",
        ],
    );
    // Nothing of it left by the wire, and it can be used again.
    let lines = test::<N>(&machine, &machine.function());
    assert!(lines.iter().all(|line| line.contains(": ok")), "{lines:#?}");
    machine.set_link(false).unwrap();
    let lines = test::<N>(&machine, &machine.function());
    assert!(lines.iter().any(|line| line.starts_with("link: failed (STATUS.LU")), "{lines:#?}");
    machine.remove().unwrap();
    let lines = test::<N>(&machine, &machine.function());
    assert!(lines.iter().all(|line| line.contains("failed")), "{lines:#?}");
}

#[test]
#[ignore = "needs QEMU: ./check nic"]
fn e1000e_passes_what_it_has_and_fails_what_is_wrong() {
    adapter::<E1000e<Function>>("e1000e");
}

#[test]
#[ignore = "needs QEMU: ./check nic"]
fn igb_passes_what_it_has_and_fails_what_is_wrong() {
    adapter::<Igb<Function>>("igb");
}

#[test]
#[ignore = "needs QEMU: ./check nic"]
fn virtio_says_what_it_does_not_have() {
    let machine = Machine::start("virtio-net-pci,disable-legacy=on").unwrap();
    let lines = test::<VirtioNet<Function>>(&machine, &machine.function());
    let none = ": not supported";
    let wanted = ["registers", "start: ok", "eeprom", "interrupt", "dma", "loopback", "link: ok"];
    let wanted: Vec<_> =
        wanted.iter().map(|w| if w.contains(':') { (*w).to_owned() } else { format!("{w}{none}") }).collect();
    starts(&lines, &wanted.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
#[ignore = "needs QEMU: ./check nic"]
fn a_function_whose_adapter_nobody_drives_does_not_start_and_the_rest_is_told() {
    let machine = Machine::start("igb").unwrap();
    let functions = machine.virtual_functions(1).unwrap();
    let lines = test::<Igbvf<Function>>(&machine, &functions[0]);
    starts(
        &lines,
        &[
            "registers: ok",
            "start: failed (V2PMAILBOX.RSTI",
            "eeprom: failed (not tried",
            "interrupt: failed",
            "dma: failed",
            "loopback: failed",
            "link: failed",
        ],
    );
}

#[test]
#[ignore = "needs QEMU: ./check nic"]
fn registers_are_read_by_name_and_none_that_reading_changes() {
    let machine = Machine::start("igb,mac=52:54:00:12:34:56").unwrap();
    let readings = Igb::<Function>::registers(&machine.function()).unwrap();
    let of = |name: &str, index| {
        readings.iter().find(|r| (r.name, r.index) == (name, index)).map(|r| (r.offset, r.value))
    };
    assert_eq!(of("RAL", Some(0)), Some((0x5400, 0x1200_5452)));
    assert_eq!(of("RDBAL", Some(3)), Some((0xc0c0, 0)));
    let status = readings.iter().find(|r| r.name == "STATUS").unwrap();
    assert!(status.fields.contains(&("FD", 1)) || status.fields.contains(&("FD", 0)), "{status:?}");
    for changing in ["COUNTER", "ICR", "EICR"] {
        assert_eq!(readings.iter().find(|r| r.name == changing), None);
    }
}
