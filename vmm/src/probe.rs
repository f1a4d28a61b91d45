//! How fast KVM runs a guest here: the processor's own speed, or an emulator's.
//!
//! Owns a guest of three instructions and nothing else. On a machine whose KVM is emulated everything works, a hundred times slower, and
//! nothing else says so.

use std::time::{Duration, Instant};

use host::memory::{MemoryError, Pages, SharedMemory};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit};

/// In 16-bit code: `dec ecx`, `jnz` back to it, `hlt`.
const CODE: [u8; 5] = [0x66, 0x49, 0x75, 0xfc, 0xf4];
const CODE_AT: u64 = 0x1000;
const PAGE: usize = 4096;
/// Passes of the first try: long enough for an emulator to be timed.
const FEW: u64 = 20_000;
/// What a try must take to count.
const LONG_ENOUGH: Duration = Duration::from_millis(5);
/// Passes that no processor does in less.
const MANY: u64 = 100_000_000;

/// Why it could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// KVM refuses.
    #[error("KVM cannot {0}: {1}")]
    Kvm(&'static str, kvm_ioctls::Error),
    /// A page of memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The guest ended otherwise than it is written.
    #[error("the guest ended with {0}, not by HLT")]
    Exit(String),
}

/// Instructions a second of a guest that only counts. Takes 0.1 s at most where KVM is not emulated.
///
/// # Errors
/// KVM is not there, not permitted, or does something unexpected.
pub fn instructions_per_second() -> Result<f64, ProbeError> {
    let kvm = Kvm::new().map_err(|error| ProbeError::Kvm("be opened", error))?;
    let mut passes = FEW;
    loop {
        let took = run(&kvm, passes)?;
        if took >= LONG_ENOUGH || passes >= MANY {
            return Ok(2.0 * passes as f64 / took.as_secs_f64().max(1e-9));
        }
        passes *= 10;
    }
}

/// How long a new guest takes for so many passes.
fn run(kvm: &Kvm, passes: u64) -> Result<Duration, ProbeError> {
    let failed = |doing| move |error| ProbeError::Kvm(doing, error);
    let memory = SharedMemory::new(PAGE, Pages::Ordinary, None)?;
    // SAFETY: the page is ours, `CODE` fits it, and no guest runs yet.
    unsafe { std::ptr::copy_nonoverlapping(CODE.as_ptr(), memory.as_ptr(), CODE.len()) };
    let vm = kvm.create_vm().map_err(failed("create a machine"))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: CODE_AT,
        memory_size: PAGE as u64,
        userspace_addr: memory.as_ptr() as u64,
    };
    // SAFETY: the memory outlives the machine: it is dropped last, below, and by every return above as the first to be made.
    unsafe { vm.set_user_memory_region(region) }.map_err(failed("take memory"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(failed("create a vCPU"))?;
    let mut special = vcpu.get_sregs().map_err(failed("read registers"))?;
    special.cs.base = 0;
    special.cs.selector = 0;
    vcpu.set_sregs(&special).map_err(failed("set registers"))?;
    let mut registers = vcpu.get_regs().map_err(failed("read registers"))?;
    registers.rip = CODE_AT;
    registers.rcx = passes;
    registers.rflags = 2;
    vcpu.set_regs(&registers).map_err(failed("set registers"))?;
    let began = Instant::now();
    let ended = match vcpu.run().map_err(failed("run a guest"))? {
        VcpuExit::Hlt => Ok(began.elapsed()),
        other => Err(ProbeError::Exit(format!("{other:?}"))),
    };
    // In this order: the guest ran in it.
    drop(vcpu);
    drop(vm);
    drop(memory);
    ended
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_runs_at_some_speed_wherever_there_is_kvm() {
        if !std::path::Path::new("/dev/kvm").exists() {
            println!("SKIPPED /dev/kvm is not there");
            return;
        }
        let speed = instructions_per_second().unwrap();
        // From a slow emulator to a processor that does not exist yet.
        assert!((1e4..1e12).contains(&speed), "{speed}");
    }
}
