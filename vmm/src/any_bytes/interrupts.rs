//! A guest that writes any bytes to the registers of an I/O APIC of ours, devices that signal at any time, ends of any vector.
//!
//! Asserts that the chip stays what it is, and that a line works after all that came before. Needs KVM, which has the routes.

use std::sync::Arc;

use kvm_ioctls::Kvm;

use super::Input;
use crate::config::IrqChip;
use crate::interrupts::{Interrupts, Line};

/// Two devices share an input.
const LINES: [u32; 3] = [17, 17, 20];
const SELECT: u64 = 0;
const WINDOW: u64 = 0x10;

/// One life of a chip.
pub fn interrupts(bytes: &[u8]) {
    let Ok(kvm) = Kvm::new() else {
        println!("SKIPPED /dev/kvm is not there: cargo test -p cableway-vmm, as a user of group kvm");
        return;
    };
    let vm = Arc::new(kvm.create_vm().unwrap());
    let chip = Arc::new(Interrupts::new(vm, IrqChip::Split).unwrap());
    let mut lines: Vec<Line> = LINES.iter().map(|pin| Line::new(chip.clone(), *pin).unwrap()).collect();
    let mut input = Input(bytes);
    while !input.is_empty() {
        step(&chip, &mut lines, &mut input);
    }
    chip.write(SELECT, &[1]);
    let mut version = [0; 4];
    chip.read(WINDOW, &mut version);
    assert_eq!(u32::from_le_bytes(version), 0x0017_0020, "another chip");
    for (pin, line) in LINES.iter().zip(&lines) {
        let _ = line.done.read();
        chip.write(SELECT, &[0x10 + 2 * *pin as u8]);
        chip.write(WINDOW, &0x8041_u32.to_le_bytes());
        chip.end(0x41);
        assert!(line.done.read().is_ok(), "the device on input {pin} is not asked");
    }
}

fn step(chip: &Arc<Interrupts>, lines: &mut [Line], input: &mut Input<'_>) {
    let (what, number) = (input.byte(), input.byte());
    let line = usize::from(number) % LINES.len();
    match what % 8 {
        // Anything anywhere.
        0 => {
            let length = usize::from(what >> 4);
            let data = input.bytes(length);
            chip.write(number.into(), data);
            chip.read(number.into(), &mut vec![0; length]);
        }
        // A redirection entry, whole.
        1..4 => {
            chip.write(SELECT, &[0x10 + number % 0x30]);
            chip.write(WINDOW, &input.long().to_le_bytes());
        }
        4 => {
            // What KVM refuses of a message is the guest's mistake.
            let _ = chip.pulse(u32::from(number) % 32);
        }
        5 => chip.end(number),
        6 => drop(lines.get(line).map(|line| line.signal.write(1))),
        // A device goes, and another comes.
        _ => {
            if let (Some(line), Some(pin)) = (lines.get_mut(line), LINES.get(line)) {
                *line = Line::new(chip.clone(), *pin).unwrap();
            }
        }
    }
}
