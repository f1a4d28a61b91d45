//! The switch with clients that we did not write: DPDK's virtio-user ports and QEMU's guests; and our virtio-user driver with
//! a back end that we did not write: DPDK's `net_vhost`.
//!
//! Owns what is between `cableway switch` and those clients, and nothing that can be tested without them. All tests here
//! are ignored by a plain `cargo test`, because they take minutes, whole cores and Debian packages: `./check testpmd` and
//! `./check qemu` run them, one at a time, against the release build (`CABLEWAY` names another one). So are, for the release
//! build's sake, its limits (`./check limits`), the kernel's devices as ports (`./check kernel`),
//! the latency of cores beside cyclictest (`./check latency`), the kernel's knobs (`./check tune`) and the documents' commands (`./check documented`).

// What a test's world is made of stops the test by panicking, with what it expected.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod cables;
mod documented;
mod guest;
mod kernel_guest;
mod kernel_packet;
mod kernel_tap;
mod kernel_xdp;
mod latency;
mod limits;
mod namespaces;
mod qemu;
mod qemu_migration;
mod switch;
mod testpmd;
mod testpmd_back_end;
mod testpmd_measured;
mod tune;
