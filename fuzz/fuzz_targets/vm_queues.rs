//! Devices of a machine whose drivers write any bytes to their queues.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vmm::any_bytes::queues(bytes));
