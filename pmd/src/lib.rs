#![doc = include_str!("../README.md")]

pub mod virtio_user;
