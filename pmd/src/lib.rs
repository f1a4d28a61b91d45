//! Poll-mode drivers: one module for each device family. A driver owns its device's rings and buffers and is polled; it
//! never starts a thread, never sleeps and never allocates once it runs.

pub mod virtio_user;
