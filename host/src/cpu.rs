//! The processor: whether it can run this build at all, and its time-stamp counter.
//!
//! Asks `cpuid` itself: the build is compiled for x86-64-v3, so `is_x86_feature_detected!` answers "yes" at compile time.

use std::arch::x86_64::{__cpuid, __cpuid_count, _rdtsc, _xgetbv};
use std::sync::OnceLock;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Why this processor cannot run this build.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CpuError {
    /// Instructions of x86-64-v3 are missing.
    #[error(
        "this processor lacks {}; this build needs x86-64-v3 (Intel Haswell or AMD Zen and later). In a virtual \
         machine, give it the host's processor model (QEMU: -cpu host); otherwise build with \
         RUSTFLAGS=-Ctarget-cpu=x86-64-v2",
        .missing.join(", ")
    )]
    NotV3 {
        /// What is missing, by the names that `/proc/cpuinfo` uses.
        missing: Vec<&'static str>,
    },
}

/// The words of `cpuid` that tell about x86-64-v3.
#[derive(Clone, Copy, Debug)]
struct Features {
    /// Leaf 1, ECX.
    leaf1_ecx: u32,
    /// Leaf 7.0, EBX.
    leaf7_ebx: u32,
    /// Leaf 0x8000_0001, ECX.
    extended_ecx: u32,
    /// XCR0: which register files the kernel saves; 0 if the kernel does not use XSAVE.
    xcr0: u64,
}

impl Features {
    fn of_this_cpu() -> Self {
        let highest = __cpuid(0).eax;
        let highest_extended = __cpuid(0x8000_0000).eax;
        let leaf1_ecx = __cpuid(1).ecx;
        let xsave_in_use = leaf1_ecx & 1 << 27 != 0;
        Self {
            leaf1_ecx,
            leaf7_ebx: if highest >= 7 { __cpuid_count(7, 0).ebx } else { 0 },
            extended_ecx: if highest_extended >= 0x8000_0001 { __cpuid(0x8000_0001).ecx } else { 0 },
            // SAFETY: OSXSAVE (leaf 1, ECX bit 27) says that the kernel enabled the instruction.
            xcr0: if xsave_in_use { unsafe { xcr0() } } else { 0 },
        }
    }

    /// What x86-64-v3 has and this processor has not (System V psABI for x86-64, table 3.1).
    fn missing(&self) -> Vec<&'static str> {
        const LEAF1: [(u32, &str); 11] = [
            (0, "sse3"),
            (9, "ssse3"),
            (12, "fma"),
            (13, "cx16"),
            (19, "sse4_1"),
            (20, "sse4_2"),
            (22, "movbe"),
            (23, "popcnt"),
            (27, "osxsave"),
            (28, "avx"),
            (29, "f16c"),
        ];
        const LEAF7: [(u32, &str); 3] = [(3, "bmi1"), (5, "avx2"), (8, "bmi2")];
        const EXTENDED: [(u32, &str); 2] = [(0, "lahf_lm"), (5, "lzcnt")];

        let lacking = |word: u32, table: &[(u32, &'static str)]| -> Vec<&'static str> {
            table.iter().filter(|(bit, _)| word >> bit & 1 == 0).map(|&(_, name)| name).collect()
        };
        let mut missing = lacking(self.leaf1_ecx, &LEAF1);
        missing.extend(lacking(self.leaf7_ebx, &LEAF7));
        missing.extend(lacking(self.extended_ecx, &EXTENDED));
        // Bits 1 and 2: the kernel saves XMM and YMM registers at a context switch.
        if self.xcr0 & 0b110 != 0b110 {
            missing.push("ymm state (kernel support for AVX)");
        }
        missing
    }
}

/// # Safety
/// The kernel has enabled XSAVE.
#[target_feature(enable = "xsave")]
unsafe fn xcr0() -> u64 {
    // SAFETY: XSAVE is enabled (the caller's duty), and register 0 always exists.
    unsafe { _xgetbv(0) }
}

/// Checks that the processor has what this build was compiled for. Call it first: later it would be an illegal instruction.
///
/// # Errors
/// [`CpuError::NotV3`] names what is missing.
pub fn require_x86_64_v3() -> Result<(), CpuError> {
    let missing = Features::of_this_cpu().missing();
    if missing.is_empty() { Ok(()) } else { Err(CpuError::NotV3 { missing }) }
}

/// The time-stamp counter of this core, in ticks of [`tsc_hz`]. Not ordered against the instructions around it.
#[inline(always)]
pub fn rdtsc() -> u64 {
    // SAFETY: RDTSC exists on every x86-64 processor; Linux leaves it enabled for user space (CR4.TSD clear) unless the
    // process itself asked otherwise.
    unsafe { _rdtsc() }
}

/// Whether the counter runs at one rate in all power states, so that it can be used as a clock (leaf 0x8000_0007, EDX
/// bit 8).
pub fn tsc_is_invariant() -> bool {
    __cpuid(0x8000_0000).eax >= 0x8000_0007 && __cpuid(0x8000_0007).edx & 1 << 8 != 0
}

/// Ticks of the time-stamp counter per second. Found out once per process: from `cpuid` where it says so exactly, else
/// by 10 ms of watching the kernel's raw monotonic clock (good to about 10 ppm).
pub fn tsc_hz() -> u64 {
    static HZ: OnceLock<u64> = OnceLock::new();
    *HZ.get_or_init(|| tsc_hz_by_cpuid().unwrap_or_else(tsc_hz_by_clock))
}

/// Leaf 0x15: core crystal clock and its ratio to the counter. A hypervisor that scales the counter passes the host's
/// values on, so there it is not believed; leaf 0x16 is nominal only (rounded to MHz) and never used.
fn tsc_hz_by_cpuid() -> Option<u64> {
    let in_virtual_machine = __cpuid(1).ecx & 1 << 31 != 0;
    if in_virtual_machine || __cpuid(0).eax < 0x15 {
        return None;
    }
    let leaf = __cpuid(0x15);
    (leaf.eax != 0 && leaf.ebx != 0 && leaf.ecx != 0)
        .then(|| u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax))
}

fn tsc_hz_by_clock() -> u64 {
    let (clock0, tsc0) = clock_and_tsc();
    std::thread::sleep(Duration::from_millis(10));
    let (clock1, tsc1) = clock_and_tsc();
    let ns = clock1.saturating_sub(clock0).as_nanos().max(1);
    let hz = u128::from(tsc1.wrapping_sub(tsc0)) * 1_000_000_000 / ns;
    u64::try_from(hz).unwrap_or(u64::MAX).max(1)
}

/// Both clocks as close together as possible: of several tries, the one that took the least time, so that being
/// preempted between the two readings does not spoil the result.
fn clock_and_tsc() -> (Duration, u64) {
    let mut best = (Duration::ZERO, 0, u64::MAX);
    for _ in 0..16 {
        let before = rdtsc();
        // The raw clock is in every kernel since 2.6.28; reading it cannot fail.
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC_RAW).map(Duration::from).unwrap_or_default();
        let took = rdtsc().wrapping_sub(before);
        if took < best.2 {
            best = (now, before.wrapping_add(took / 2), took);
        }
    }
    (best.0, best.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Features =
        Features { leaf1_ecx: u32::MAX, leaf7_ebx: u32::MAX, extended_ecx: u32::MAX, xcr0: 7 };

    #[test]
    fn the_machine_that_runs_this_test_has_what_it_was_compiled_for() {
        assert_eq!(require_x86_64_v3(), Ok(()));
    }

    #[test]
    fn a_processor_that_lacks_instructions_is_told_which() {
        assert!(ALL.missing().is_empty());
        // What a Sandy Bridge (x86-64-v2 with AVX) answers.
        let old =
            Features { leaf1_ecx: !(1 << 12 | 1 << 22 | 1 << 29), leaf7_ebx: 0, extended_ecx: 1, ..ALL };
        assert_eq!(old.missing(), ["fma", "movbe", "f16c", "bmi1", "avx2", "bmi2", "lzcnt"]);
        let text = CpuError::NotV3 { missing: old.missing() }.to_string();
        assert!(text.starts_with("this processor lacks fma, movbe, f16c, bmi1, avx2"), "{text}");
    }

    #[test]
    fn a_kernel_that_does_not_save_ymm_registers_is_refused() {
        let no_ymm = Features { xcr0: 0b011, ..ALL };
        assert_eq!(no_ymm.missing(), ["ymm state (kernel support for AVX)"]);
    }

    #[test]
    fn the_tick_rate_agrees_with_the_clock() {
        let hz = tsc_hz();
        assert_eq!(hz, tsc_hz(), "found out once");
        let measured = tsc_hz_by_clock();
        let difference = hz.abs_diff(measured) as f64 / hz as f64;
        assert!(difference < 1e-3, "{hz} and {measured} Hz");
    }
}
