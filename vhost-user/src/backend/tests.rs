//! Sessions against a front end that sends whatever a test wants. One behaviour a test; the world is built here.

mod negotiation;
mod raw;
mod recorder;
mod rings;
