//! The driver side of both layouts with a device that writes any bytes.
#![no_main]

#[allow(dead_code)]
#[path = "../../virtio/tests/any_bytes/harness.rs"]
mod harness;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| harness::driver(bytes));
