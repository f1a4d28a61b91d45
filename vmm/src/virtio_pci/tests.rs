use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use kvm_ioctls::Kvm;

use super::*;
use crate::config::{Config, IrqChip};
use crate::rng::Rng;
use crate::test_driver::{DATA, Driver};

/// Where the function is.
const BAR: u32 = 0xd000_0000;
/// The status register.
const STATUS: u64 = BAR as u64 + COMMON + 0x14;

/// A device that takes its time.
#[derive(Clone, Default)]
struct Slow {
    resets: Arc<AtomicUsize>,
    done: Arc<AtomicBool>,
}

impl VirtioDevice for Slow {
    fn kind(&self) -> (u16, u16) {
        (1, 0x0200)
    }
    fn features(&self) -> u64 {
        virtio::features::VERSION_1
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![16]
    }
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }
    fn activate(&mut self, _: Activation) {}
    fn lifecycle(&self) -> &dyn Lifecycle {
        self
    }
    fn reset(&mut self) {
        self.resets.fetch_add(1, Ordering::Relaxed);
    }
    fn is_reset(&self) -> bool {
        self.done.load(Ordering::Relaxed)
    }
}

impl Lifecycle for Slow {
    fn name(&self) -> String {
        "slow".to_owned()
    }
    fn pause(&self) {}
    fn is_paused(&self) -> bool {
        true
    }
    fn resume(&self) {}
}

/// The function of `device`, with its memory switched on; `None` where there is no KVM.
fn function(device: &Slow) -> Option<VirtioPci> {
    let text = "[vm]\nkernel = 'k'\nmemory = '4 MiB'";
    let config = Config::parse(text, std::path::Path::new("vm.toml")).unwrap();
    function_on(Box::new(device.clone()), &Arc::new(GuestMemory::new(&config).unwrap()))
}

fn function_on(device: Box<dyn VirtioDevice>, memory: &Arc<GuestMemory>) -> Option<VirtioPci> {
    let Ok(kvm) = Kvm::new() else {
        println!("SKIPPED /dev/kvm is not there: cargo test -p cableway-vmm, as a user of group kvm");
        return None;
    };
    let vm = Arc::new(kvm.create_vm().unwrap());
    let interrupts = Arc::new(Interrupts::new(vm, IrqChip::Kernel).unwrap());
    let function = VirtioPci::new(device, BAR, memory.clone(), interrupts).unwrap();
    function.write_config(4, &[2, 0]);
    Some(function)
}

fn status(function: &VirtioPci) -> u8 {
    let mut status = [0];
    assert!(function.read_memory(STATUS, &mut status));
    status[0]
}

#[test]
fn a_driver_that_does_not_wait_for_its_reset_is_not_listened_to_until_it_is_done() {
    let device = Slow::default();
    let Some(function) = function(&device) else { return };
    assert!(function.write_memory(STATUS, &[3]));
    assert_eq!(status(&function), 3);
    for _ in 0..1_000 {
        function.write_memory(STATUS, &[0]);
        function.write_memory(STATUS, &[7]);
    }
    assert_eq!((device.resets.load(Ordering::Relaxed), status(&function)), (1, 3));
    device.done.store(true, Ordering::Relaxed);
    assert_eq!(status(&function), 0);
    function.write_memory(STATUS, &[1]);
    assert_eq!(status(&function), 1);
}

fn write(function: &VirtioPci, register: u64, data: &[u8]) {
    assert!(function.write_memory(u64::from(BAR) + register, data));
}

fn bar(function: &VirtioPci) -> u32 {
    let mut bar = [0; 4];
    function.read_config(0x10, &mut bar);
    u32::from_le_bytes(bar)
}

/// A source of randomness that its driver set up by registers, its one queue where `driver` has it; nothing of it is the test's.
fn started(driver: &mut Driver) -> Option<VirtioPci> {
    let rng = Box::new(Rng::new(&driver.for_rings()).unwrap());
    let function = function_on(rng, driver.memory())?;
    let queue = driver.activation(&[0], virtio::features::VERSION_1).queues.remove(0);
    write(&function, COMMON + 0x14, &[3]);
    write(&function, COMMON + 8, &1_u32.to_le_bytes());
    write(&function, COMMON + 12, &1_u32.to_le_bytes());
    write(&function, COMMON + 0x14, &[11]);
    for (at, area) in [(0x20, queue.descriptors), (0x28, queue.driver), (0x30, queue.device)] {
        write(&function, COMMON + at, &area.guest.to_le_bytes());
    }
    write(&function, COMMON + 0x1c, &1_u16.to_le_bytes());
    write(&function, COMMON + 0x14, &[15]);
    assert_eq!(status(&function), 15);
    Some(function)
}

/// Asks for eight bytes, notifies the device, and waits for them.
fn is_served(function: &VirtioPci, driver: &mut Driver) {
    driver.put(&[(DATA, 8, true)]);
    write(function, NOTIFY, &[0, 0]);
    assert_eq!(driver.wait(), 8);
}

#[test]
fn queue_registers_that_are_rewritten_while_the_device_runs_change_nothing() {
    let mut driver = Driver::new();
    let Some(function) = started(&mut driver) else { return };
    is_served(&function, &mut driver);
    for value in [0, 0x20_0000, 0x1234, u64::MAX, 1 << 40] {
        let value = value.to_le_bytes();
        for register in (0x18..0x38).filter(|register| !(0x1e..0x20).contains(register)) {
            for length in [1, 2, 4, 8] {
                write(&function, COMMON + register, &value[..length]);
            }
        }
        for features in [0x08, 0x0c] {
            write(&function, COMMON + features, &value[..4]);
        }
        is_served(&function, &mut driver);
        assert_eq!(status(&function), 15);
    }
}

#[test]
fn a_table_of_vectors_that_was_garbage_takes_a_message_and_delivers_it() {
    let mut driver = Driver::new();
    let Some(function) = started(&mut driver) else { return };
    let control = |value: u16| function.write_config(0x42, &value.to_le_bytes());
    let connected = || lock(&function.0).msix.is_connected(0);
    for enabled in [0, 1 << 15, 1 << 15 | 1 << 14] {
        control(enabled);
        for value in [0, u64::MAX, 0xfee0_0000_ffff_ffff, 0x5555_5555_5555_5555] {
            let value = value.to_le_bytes();
            for at in 0..0x80 {
                for length in [1, 2, 4, 8] {
                    write(&function, MSIX_TABLE + at, &value[..length]);
                    write(&function, MSIX_PENDING + at, &value[..length]);
                }
            }
        }
        is_served(&function, &mut driver);
    }
    control(1 << 15);
    write(&function, MSIX_TABLE + 12, &1_u32.to_le_bytes());
    assert!(!connected(), "masked");
    write(&function, MSIX_TABLE, &0xfee0_0000_u64.to_le_bytes());
    write(&function, MSIX_TABLE + 8, &0x41_u64.to_le_bytes());
    assert!(connected(), "a message, and not masked");
    control(0);
    assert!(!connected(), "off");
}

#[test]
fn a_bar_that_is_written_at_every_alignment_stays_aligned_and_answers_where_it_is() {
    let mut driver = Driver::new();
    let Some(function) = started(&mut driver) else { return };
    let mut places: Vec<u32> = (0..32).map(|bit| 1 << bit).collect();
    places.extend([0, u32::MAX, 0xdead_beef, 0x7fff, 0x8000, 0xc000_7ff0, BAR + 1]);
    for place in places {
        for (offset, length) in [(0, 4), (0, 1), (1, 1), (2, 1), (3, 1), (0, 2), (2, 2)] {
            function.write_config(0x10, &BAR.to_le_bytes());
            function.write_config(0x10 + offset, &place.to_le_bytes()[offset..offset + length]);
            let now = bar(&function);
            assert_eq!(now % BAR_SIZE, 0, "{place:#x}");
            if length == 4 {
                assert_eq!(now, place & !(BAR_SIZE - 1));
            }
            let mut status = [0];
            assert!(function.read_memory(u64::from(now) + COMMON + 0x14, &mut status), "not at {now:#x}");
            assert_eq!(status, [15]);
            let elsewhere = u64::from(now ^ BAR_SIZE) + COMMON + 0x14;
            assert!(!function.read_memory(elsewhere, &mut status), "also at {elsewhere:#x}");
        }
    }
    function.write_config(0x10, &BAR.to_le_bytes());
    is_served(&function, &mut driver);
}

#[test]
fn a_device_whose_memory_is_switched_off_answers_nothing_and_goes_on_when_it_is_switched_on() {
    let mut driver = Driver::new();
    let Some(function) = started(&mut driver) else { return };
    for command in [0_u16, 1, 4, 5, 0x400] {
        function.write_config(4, &command.to_le_bytes());
        for page in (0..u64::from(BAR_SIZE)).step_by(0x1000) {
            let mut data = [0xa5; 4];
            assert!(!function.read_memory(u64::from(BAR) + page, &mut data) && data == [0xa5; 4]);
            assert!(!function.write_memory(u64::from(BAR) + page, &[0; 4]), "{page:#x}");
        }
        function.write_config(4, &[2, 0]);
        is_served(&function, &mut driver);
    }
}
