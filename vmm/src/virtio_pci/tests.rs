use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use kvm_ioctls::Kvm;

use super::*;
use crate::config::Config;

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
    let Ok(kvm) = Kvm::new() else {
        println!("SKIPPED /dev/kvm is not there: cargo test -p cableway-vmm, as a user of group kvm");
        return None;
    };
    let text = "[vm]\nkernel = 'k'\nmemory = '4 MiB'";
    let config = Config::parse(text, std::path::Path::new("vm.toml")).unwrap();
    let memory = Arc::new(GuestMemory::new(&config).unwrap());
    let interrupts = Arc::new(Interrupts::new(Arc::new(kvm.create_vm().unwrap())));
    let function = VirtioPci::new(Box::new(device.clone()), BAR, memory, interrupts).unwrap();
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
