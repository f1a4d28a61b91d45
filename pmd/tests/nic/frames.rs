//! Frames whose every byte follows from their number, and a receive queue that lends them from ordinary memory.

use std::time::{Duration, Instant};

use pmd::qtest::Wire;
use port::{Burst, BurstBuffer, DropReason, Frame, FrameSet, HEAD, Offload, Release, RxQueue};

/// Sizes cycle through all from 60 to 9,018 bytes, without FCS.
pub(crate) const LEAST: usize = 60;
pub(crate) const MOST: usize = 9_018;

/// Bytes of no pattern, from which frames are cut.
pub(crate) struct Pattern(Vec<u8>);

impl Pattern {
    pub(crate) fn new() -> Self {
        let mut x = 0x9e37_79b9_7f4a_7c15u64;
        let byte = || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x >> 24) as u8
        };
        Self(std::iter::repeat_with(byte).take(MOST + 7919).collect())
    }

    /// Frame `number`, of `len` bytes.
    pub(crate) fn write(&self, number: u64, len: usize, frame: &mut Vec<u8>) {
        frame.clear();
        frame.extend_from_slice(&[0x02, 0, 0, 0, 0, 1, 0x02, 0, 0, 0, 0, 2, 0x88, 0xb5]);
        frame.extend_from_slice(&number.to_be_bytes());
        let at = (number % 7919) as usize;
        frame.extend_from_slice(&self.0[at..at + len - frame.len()]);
    }

    /// Frame `number` of those whose sizes cycle.
    pub(crate) fn cycling(&self, number: u64, frame: &mut Vec<u8>) {
        self.write(number, LEAST + number as usize % (MOST - LEAST + 1), frame);
    }
}

/// What a frame of a burst holds, gathered from where it lies.
pub(crate) fn gather(burst: &Burst<'_>, frame: &Frame, bytes: &mut Vec<u8>) {
    bytes.clear();
    let pieces = std::iter::once((frame.ptr, frame.first_len));
    for (ptr, len) in pieces.chain(burst.more(frame).iter().map(|s| (s.ptr, s.len))) {
        // SAFETY: the burst lends these bytes, and the card is done with them.
        bytes.extend_from_slice(unsafe { std::slice::from_raw_parts(ptr, len as usize) });
    }
    assert_eq!(bytes.len(), frame.len as usize);
}

/// Lends frames that it was given, as a guest's port would.
#[derive(Default)]
pub(crate) struct Source {
    pub(crate) frames: Vec<(Vec<u8>, Offload)>,
}

impl RxQueue for Source {
    fn peek(&mut self) -> usize {
        self.frames.len()
    }
    fn poll<'q>(&'q mut self, buffer: &'q mut BurstBuffer) -> Burst<'q> {
        for (i, (bytes, offload)) in self.frames.iter().enumerate() {
            let n = bytes.len().min(HEAD);
            buffer.heads[i].0 = [0; HEAD];
            buffer.heads[i].0[..n].copy_from_slice(&bytes[..n]);
            let len = bytes.len() as u32;
            buffer.frames[i] =
                Frame { ptr: bytes.as_ptr(), first_len: len, len, more_at: 0, more: 0, offload: *offload };
        }
        let n = self.frames.len();
        Burst::new(self, buffer, n)
    }
}

impl Release for Source {
    fn release(&mut self) {
        self.frames.clear();
    }
    fn dropped(&mut self, _: FrameSet, _: DropReason) {}
}

/// What is waited for comes in microseconds; machines that run tests may stand still for many seconds.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The next frame on the wire, or a panic.
pub(crate) fn next(wire: &Wire, frame: &mut Vec<u8>) {
    frame.resize(16 << 10, 0);
    let len = wire.receive(frame, PATIENCE).expect("QEMU is there");
    frame.truncate(len.expect("a frame within a minute"));
}

/// Calls `step` until it is true, at most a minute.
pub(crate) fn until(what: &str, mut step: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !step() {
        assert!(begin.elapsed() < PATIENCE, "{what}: not within a minute");
        // QEMU and the test's other threads may have to share this core.
        std::thread::yield_now();
    }
}
