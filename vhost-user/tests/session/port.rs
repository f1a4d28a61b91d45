//! A port of the back end, with a recorder for a device.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use vhost_user::Mode;
use vhost_user::backend::{Endpoint, Options, SessionHandle, serve};
use virtio::features;

use crate::raw::Raw;
use crate::recorder::{FEATURES, Recorder};

/// A port with a recorder behind it, and its socket.
pub(crate) struct Port {
    pub(crate) recorder: Recorder,
    pub(crate) path: PathBuf,
    handle: Option<SessionHandle>,
    _dir: tempfile::TempDir,
}

impl Port {
    pub(crate) fn new() -> Self {
        Self::with(|_| {})
    }

    pub(crate) fn with(change: impl FnOnce(&mut Options)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v0.sock");
        let recorder = Recorder::default();
        let mut options = Options::new("v0");
        change(&mut options);
        let endpoint = Endpoint { path: path.clone(), mode: Mode::server() };
        let handle = serve(endpoint, options, Box::new(recorder.clone())).unwrap();
        Self { recorder, path, handle: Some(handle), _dir: dir }
    }

    pub(crate) fn connect(&self) -> Raw {
        Raw::new(UnixStream::connect(&self.path).unwrap())
    }

    /// A front end that negotiated everything, with `size` bytes of memory at guest 0 and user 0x10_0000_0000.
    pub(crate) fn ready(&self, size: u64) -> Raw {
        let mut raw = self.connect();
        raw.negotiate(FEATURES & !features::RING_PACKED);
        raw.memory(size);
        raw
    }

    pub(crate) fn stop(&mut self) {
        self.handle.take().unwrap().stop();
    }

    /// Waits until the recorder was called so.
    pub(crate) fn expect(&self, call: &str) {
        let start = Instant::now();
        while !self.recorder.was_called(call) {
            let calls = self.recorder.seen().calls.clone();
            assert!(start.elapsed() < Duration::from_secs(60), "never called {call:?}, but {calls:#?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
