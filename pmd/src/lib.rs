#![doc = include_str!("../README.md")]

// The stand-in devices of tests are also used by an example, where this crate is `pmd`.
#[cfg(test)]
extern crate self as pmd;

pub mod access;
pub mod dma;
pub mod e1000e;
pub mod igb;
pub mod igbvf;
pub mod intel;
pub mod kernel;
pub mod nic;
pub mod qtest;
pub mod virtio_net;
pub mod virtio_user;
