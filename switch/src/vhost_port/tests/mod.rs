//! The switch's data path in one process: guests with real rings, a real bridge, a worker that is stepped by the test (and
//! two that run, in `contention`).

mod broken;
mod buffers;
mod captures;
mod contention;
mod frames;
mod guest;
mod injected;
mod migration;
mod mix;
mod offloads;
mod packets;
mod tags;
mod world;
