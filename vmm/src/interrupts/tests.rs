//! Controllers on a KVM without a guest: what KVM takes of a line, and what stays.

use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;

use super::*;

const PIN: u32 = 17;
const LEVEL: u32 = 0x8041;
const MASKED: u32 = 1 << 16;

fn split() -> Option<Arc<Interrupts>> {
    let Ok(kvm) = Kvm::new() else {
        println!("SKIPPED /dev/kvm is not there: cargo test -p cableway-vmm, as a user of group kvm");
        return None;
    };
    let vm = Arc::new(kvm.create_vm().unwrap());
    Some(Arc::new(Interrupts::new(vm, IrqChip::Split).unwrap()))
}

fn set_entry(interrupts: &Interrupts, pin: u32, low: u32) {
    interrupts.write(0, &[0x10 + 2 * pin as u8]);
    interrupts.write(0x10, &low.to_le_bytes());
}

/// Whether KVM takes a signal within a while; it stays where it is otherwise.
fn is_taken(event: &EventFd) -> bool {
    event.write(1).unwrap();
    let end = Instant::now() + Duration::from_millis(200);
    // Reading takes what is there: it is put back.
    while event.read().is_ok_and(|value| event.write(value).is_ok()) {
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

#[test]
fn a_line_reaches_kvm_while_its_input_is_unmasked_and_waits_otherwise() {
    let Some(interrupts) = split() else { return };
    let line = Line::new(interrupts.clone(), PIN).unwrap();
    assert!(!is_taken(&line.signal), "masked from the start");
    assert!(line.done.read().is_err());
    set_entry(&interrupts, PIN, LEVEL);
    assert!(line.signal.read().is_err(), "it may be over");
    assert_eq!(line.done.read().unwrap(), 1, "it is asked anew");
    assert!(is_taken(&line.signal));
    set_entry(&interrupts, PIN, LEVEL);
    assert!(line.done.read().is_err(), "nothing changed");
    set_entry(&interrupts, PIN, LEVEL | MASKED);
    assert!(!is_taken(&line.signal));
}

#[test]
fn the_end_of_an_interrupt_asks_all_devices_on_its_input_and_no_others() {
    let Some(interrupts) = split() else { return };
    let line = |pin| Line::new(interrupts.clone(), pin).unwrap();
    let (one, two, other) = (line(PIN), line(PIN), line(PIN + 1));
    let asked = || [&one, &two, &other].map(|line| line.done.read().is_ok());
    set_entry(&interrupts, PIN, LEVEL);
    set_entry(&interrupts, PIN + 1, LEVEL + 1);
    assert_eq!(asked(), [true; 3], "unmasked");
    interrupts.end(0x41);
    assert_eq!(asked(), [true, true, false]);
    // By the EOI register; while masked, too: it may have been under way.
    set_entry(&interrupts, PIN, LEVEL | MASKED);
    interrupts.write(0x40, &0x41_u32.to_le_bytes());
    assert_eq!(asked(), [true, true, false]);
    interrupts.end(0x99);
    assert_eq!(asked(), [false; 3]);
    drop(two);
    interrupts.end(0x41);
    assert!(one.done.read().is_ok());
}

#[test]
fn a_line_that_is_gone_is_not_kvms_any_more() {
    let Some(interrupts) = split() else { return };
    set_entry(&interrupts, PIN, LEVEL);
    let line = Line::new(interrupts.clone(), PIN).unwrap();
    let signal = line.signal.try_clone().unwrap();
    assert!(is_taken(&signal));
    drop(line);
    assert!(!is_taken(&signal));
    assert!(Line::new(interrupts, PINS).is_err(), "there is no such input");
}
