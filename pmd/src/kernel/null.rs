//! Nothing: frames that go out here are gone, and none ever come in. For measuring, and for what is to be thrown away.

use std::io;
use std::os::fd::BorrowedFd;

use port::{Frame, Offload, PutError, Segment, Sink, Source};

/// Where nothing comes from.
pub struct NullSource;

impl Source for NullSource {
    fn look(&mut self, _: usize) -> io::Result<usize> {
        Ok(0)
    }

    fn lend(&mut self, _: &mut [Frame]) -> usize {
        0
    }

    fn take_back(&mut self) {}

    fn waker(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// Where everything vanishes, unread.
pub struct NullSink;

impl Sink for NullSink {
    fn put(&mut self, _: Offload, _: usize, _: impl Iterator<Item = Segment>) -> Result<(), PutError> {
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
