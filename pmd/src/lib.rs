#![doc = include_str!("../README.md")]

pub mod access;
pub mod dma;
pub mod kernel;
pub mod qtest;
pub mod virtio_user;
