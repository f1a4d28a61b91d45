//! Sessions of the back end against a front end that sends whatever a test wants. One behaviour a test.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod cves;
mod negotiation;
mod port;
mod raw;
mod recorder;
mod rings;
