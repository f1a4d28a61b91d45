//! The device side of a virtqueue: takes what the driver made available, gives it back used.

mod setup;

pub use setup::{Direction, InflightArea, Layout, RingError, RingSetup};
