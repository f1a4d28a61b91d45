//! The last bytes that a guest printed, for those who attach to its console.
//!
//! Owns a ring of fixed size with one writer, which never waits, and any readers: one that is slow finds that the oldest bytes
//! are gone.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering, fence};

/// Bytes that are kept.
const KEPT: u64 = 64 << 10;

/// The ring. Positions count all bytes that were ever printed.
pub(crate) struct Scrollback {
    bytes: Box<[AtomicU8]>,
    /// The writer is about to write, or has written, all before this.
    claimed: AtomicU64,
    /// All before this is written.
    written: AtomicU64,
}

impl Default for Scrollback {
    fn default() -> Self {
        let bytes = (0..KEPT).map(|_| AtomicU8::new(0)).collect();
        Self { bytes, claimed: AtomicU64::new(0), written: AtomicU64::new(0) }
    }
}

impl Scrollback {
    /// One byte more. Only one thread at a time may: whoever has the port.
    pub(crate) fn push(&self, byte: u8) {
        let at = self.written.load(Ordering::Relaxed);
        self.claimed.store(at + 1, Ordering::Relaxed);
        // Whoever sees the byte sees that it was claimed.
        fence(Ordering::Release);
        if let Some(slot) = self.bytes.get((at % KEPT) as usize) {
            slot.store(byte, Ordering::Relaxed);
        }
        self.written.store(at + 1, Ordering::Release);
    }

    /// Where the next byte will be.
    pub(crate) fn end(&self) -> u64 {
        self.written.load(Ordering::Acquire)
    }

    /// The bytes from position `from` on that are still there, and the position behind them.
    pub(crate) fn since(&self, from: u64) -> (u64, Vec<u8>) {
        let end = self.end();
        let first = from.min(end).max(end.saturating_sub(KEPT));
        let byte = |at: u64| self.bytes.get((at % KEPT) as usize).map_or(0, |b| b.load(Ordering::Relaxed));
        let mut bytes: Vec<u8> = (first..end).map(byte).collect();
        fence(Ordering::Acquire);
        // What was written over meanwhile.
        let gone = self.claimed.load(Ordering::Relaxed).saturating_sub(KEPT).saturating_sub(first);
        bytes.drain(..usize::try_from(gone).unwrap_or(usize::MAX).min(bytes.len()));
        (end, bytes)
    }
}

impl Write for &Scrollback {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        bytes.iter().for_each(|byte| self.push(*byte));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_find_what_came_since_and_the_slow_ones_what_is_left() {
        let ring = Scrollback::default();
        assert_eq!(ring.since(0), (0, vec![]));
        (&ring).write_all(b"hello").unwrap();
        assert_eq!(ring.since(0), (5, b"hello".to_vec()));
        assert_eq!(ring.since(3), (5, b"lo".to_vec()));
        assert_eq!(ring.since(99), (5, vec![]), "not there yet");
        (&ring).write_all(&vec![7; KEPT as usize]).unwrap();
        let (end, bytes) = ring.since(0);
        assert_eq!((end, bytes.len()), (KEPT + 5, KEPT as usize));
    }

    #[test]
    fn a_reader_beside_the_writer_sees_bytes_in_order_and_none_twice() {
        let ring = Scrollback::default();
        std::thread::scope(|scope| {
            scope.spawn(|| (0..20 * KEPT).for_each(|n| ring.push(n as u8)));
            let mut at = 0;
            while at < 20 * KEPT {
                let (end, bytes) = ring.since(at);
                let first = end - bytes.len() as u64;
                assert!(first >= at);
                assert!((first..).zip(&bytes).all(|(n, byte)| n as u8 == *byte));
                at = end;
            }
        });
    }
}
