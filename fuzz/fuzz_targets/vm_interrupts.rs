//! An I/O APIC of a machine whose guest writes any bytes to its registers (needs /dev/kvm).
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vmm::any_bytes::interrupts(bytes));
