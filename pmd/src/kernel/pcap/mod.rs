//! Files of frames (pcap): one that comes in, at its own pace or a given rate, and one that is written of what goes out.
//!
//! [`replay`] owns the frames of a file, read whole before the first comes in; [`record`] hands frames to a thread of its own that
//! writes them. So neither ever waits for a disk on the data path.

mod record;
mod replay;

use std::path::{Path, PathBuf};

pub use record::PcapSink;
pub use replay::PcapSource;

use super::OpenError;

/// What to replay and to record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PcapOptions {
    /// Frames that come in are those of this file.
    pub replay: Option<PathBuf>,
    /// Frames a second; `None`: at the times in the file.
    pub rate: Option<u32>,
    /// Whether the file begins anew at its end.
    pub repeat: bool,
    /// Frames that go out are written to this file, which is emptied first.
    pub record: Option<PathBuf>,
}

/// Reads the one file and makes the other.
///
/// # Errors
/// One cannot be read or made, or the first is no pcap file of Ethernet frames.
pub fn open(options: &PcapOptions) -> Result<(PcapSource, PcapSink), OpenError> {
    let source = match &options.replay {
        Some(file) => PcapSource::of_file(file, options.rate, options.repeat)?,
        None => PcapSource::empty(),
    };
    let sink = match &options.record {
        Some(file) => PcapSink::to_file(file)?,
        None => PcapSink::nowhere(),
    };
    Ok((source, sink))
}

/// What went wrong with a file.
fn wrong(file: &Path, what: impl std::fmt::Display) -> OpenError {
    OpenError::File { file: file.to_owned(), what: what.to_string() }
}
