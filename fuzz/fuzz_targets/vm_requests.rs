//! The control socket of a machine whose clients write any bytes.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vmm::any_bytes::requests(bytes));
