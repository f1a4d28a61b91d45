//! The switch against a front end that means harm (CVES.md: the security record of other vhost implementations).
//!
//! Each test is one cause that shipped somewhere. While it attacks, a well-behaved pair of ports forwards beside it; a test
//! passes if the pair lost nothing, the switch lives and holds no more memory and descriptors than before, and the port
//! that was attacked says what was wrong with it. What each attack costs when it is repeated ten thousand times is in
//! `repeats`.

// What a test's world is made of stops the test by panicking, with what it expected.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod chains;
mod frames;
mod fuse;
mod guest;
mod messages;
mod pair;
#[allow(dead_code)] // the session tests of `vhost-user` need the rest
#[path = "../../vhost-user/tests/session/raw.rs"]
mod raw;
mod regions;
mod repeats;
mod rings;
mod sessions;
mod world;
