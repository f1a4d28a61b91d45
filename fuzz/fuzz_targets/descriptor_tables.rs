//! The device side of both layouts on rings of any bytes.
#![no_main]

#[allow(dead_code)]
#[path = "../../virtio/tests/any_bytes/harness.rs"]
mod harness;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| harness::device(bytes));
