//! A bus whose guest writes any bytes to its registers: configuration space by both ways, BARs at any place and alignment, MSI-X
//! tables, queues at any address.
//!
//! Asserts that identities stay, that BARs stay aligned to their size, that what is switched off answers nothing, and that each
//! device can be reset whatever came before. Needs KVM, which is told of vectors and notifications.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;

use super::Input;
use crate::config::{Config, IrqChip};
use crate::console::Console;
use crate::interrupts::Interrupts;
use crate::layout;
use crate::memory::GuestMemory;
use crate::pci::{PciBus, PciPorts};
use crate::rng::Rng;
use crate::virtio_console::VirtioConsole;
use crate::virtio_pci::{BAR_SIZE, VirtioDevice, VirtioPci};

/// Functions behind the host bridge.
const FUNCTIONS: u64 = 2;
/// Registers: identity, command, BAR 0; the device status in it.
const COMMAND: u64 = 4;
const BAR: u64 = 0x10;
const STATUS: u64 = 0x14;
/// Where BARs are at first.
const WINDOW: u32 = layout::PCI_WINDOW_32.start as u32;

/// One life of a bus.
pub fn pci(bytes: &[u8]) {
    let Ok(kvm) = Kvm::new() else {
        println!("SKIPPED /dev/kvm is not there: cargo test -p cableway-vmm, as a user of group kvm");
        return;
    };
    let vm = Arc::new(kvm.create_vm().unwrap());
    let text = "[vm]\nkernel = 'k'\nmemory = '4 MiB'";
    let config = Config::parse(text, Path::new("vm.toml")).unwrap();
    let memory = Arc::new(GuestMemory::new(&config).unwrap());
    let interrupts = Arc::new(Interrupts::new(vm, IrqChip::Kernel).unwrap());
    let (console, output) = Console::open_nowhere();
    let (device, typed) = VirtioConsole::new(output, &memory).unwrap();
    let devices: [Box<dyn VirtioDevice>; FUNCTIONS as usize] =
        [Box::new(Rng::new(&memory.for_rings().unwrap()).unwrap()), Box::new(device)];
    let mut bus = PciBus::new();
    for (n, device) in (0..).zip(devices) {
        let bar = WINDOW + n * BAR_SIZE;
        bus.add(Arc::new(VirtioPci::new(device, bar, memory.clone(), interrupts.clone()).unwrap()));
    }
    let identities = identities(&bus);
    let mut ports = PciPorts::default();
    let mut input = Input(bytes);
    while !input.is_empty() {
        step(&bus, &mut ports, &mut input);
    }
    assert_eq!(self::identities(&bus), identities, "another device");
    for function in 1..=FUNCTIONS {
        assert_eq!(bar(&bus, function) % BAR_SIZE, 0, "a BAR that is not aligned");
        assert!(reset(&bus, function), "function {function} cannot be reset");
        bus.write_ecam(function << 15 | COMMAND, &[0]);
        let mut data = [0xa5; 4];
        bus.read_memory(bar(&bus, function).into(), &mut data);
        assert_eq!(data, [0xa5; 4], "it is switched off");
    }
    drop(bus);
    drop(typed);
    console.close();
}

fn step(bus: &PciBus, ports: &mut PciPorts, input: &mut Input<'_>) {
    let what = input.byte();
    let function = u64::from(what >> 4) % (FUNCTIONS + 2);
    let register = u64::from(input.word()) & 0xfff;
    let length = usize::from(input.byte() % 9);
    let data = input.bytes(length);
    let mut read = vec![0xff; length];
    match what % 16 {
        // Anything anywhere of a function's configuration space, and of none's.
        0..3 => {
            bus.write_ecam(function << 15 | register, data);
            bus.read_ecam(function << 15 | register, &mut read);
        }
        // The header, in whole registers.
        3 => bus.write_ecam(function << 15 | register & 0x7c, &input.long().to_le_bytes()),
        4 => {
            ports.write_address(&(1 << 31 | input.long()).to_le_bytes());
            ports.write(bus, register as u16, data);
            ports.read(bus, register as u16, &mut read);
        }
        // Memory where nothing may be.
        5 => {
            bus.write_memory(input.long().into(), data);
            bus.read_memory(u64::from(input.long()) << 32, &mut read);
        }
        // Switched on where it was put first: the rest finds something more often.
        6 => {
            bus.write_ecam(function << 15 | BAR, &(WINDOW + function as u32 * BAR_SIZE).to_le_bytes());
            bus.write_ecam(function << 15 | COMMAND, &[6]);
        }
        // MSI-X control.
        7 => bus.write_ecam(function << 15 | 0x42, &[0, input.byte()]),
        kind => {
            let at = u64::from(bar(bus, function));
            let (page, within) = match kind {
                // The common structure, in the sizes of its registers.
                8..12 => (0, register % 0x40),
                // MSI-X table, in double words.
                12 | 13 => (4, register & !3),
                _ => (u64::from(input.byte() % 10), register),
            };
            let value = input.long().to_le_bytes();
            let data = match kind {
                8 | 12 => &value[..],
                9 => value.get(..2).unwrap_or_default(),
                10 => value.get(..1).unwrap_or_default(),
                _ => data,
            };
            bus.write_memory(at + page * 0x1000 + within, data);
            bus.read_memory(at + page * 0x1000 + within, &mut read);
        }
    }
}

fn identities(bus: &PciBus) -> Vec<[u8; 4]> {
    let identity = |function: u64| {
        let mut identity = [0; 4];
        bus.read_ecam(function << 15, &mut identity);
        identity
    };
    (0..=FUNCTIONS).map(identity).collect()
}

/// Where BAR 0 is.
fn bar(bus: &PciBus, function: u64) -> u32 {
    let mut bar = [0; 4];
    bus.read_ecam(function << 15 | BAR, &mut bar);
    u32::from_le_bytes(bar)
}

/// Resets a device as its driver does; whether it was done in time.
fn reset(bus: &PciBus, function: u64) -> bool {
    bus.write_ecam(function << 15 | BAR, &(WINDOW + function as u32 * BAR_SIZE).to_le_bytes());
    // Alone there: a BAR of the other may be in the same place.
    bus.write_ecam((FUNCTIONS + 1 - function) << 15 | COMMAND, &[0]);
    bus.write_ecam(function << 15 | COMMAND, &[2]);
    let at = u64::from(bar(bus, function)) + STATUS;
    bus.write_memory(at, &[0]);
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let mut status = [0xff];
        bus.read_memory(at, &mut status);
        if status == [0] || Instant::now() > end {
            return status == [0];
        }
        std::thread::yield_now();
    }
}
