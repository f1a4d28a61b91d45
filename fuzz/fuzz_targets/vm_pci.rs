//! PCI functions of a machine whose guest writes any bytes to their registers (needs /dev/kvm).
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vmm::any_bytes::pci(bytes));
