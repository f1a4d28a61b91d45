//! A file of all frames of one port: `trace = "…"` of the configuration.
//!
//! Owns the thread that empties a [`Capture`] into the file, so that workers do the same for a trace as for anybody who looks at
//! frames: they copy into a room of fixed size, and never wait. What the disk does not keep up with is counted.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};

use super::{Capture, Filter};

/// How often the room is emptied.
const TURN: Duration = Duration::from_millis(50);

/// What the file had before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Before {
    /// Goes.
    Emptied,
    /// Stays: what is written is a further section of it.
    Kept,
}

/// A trace that is written. Ends when dropped, with all that was seen until then in the file.
pub(crate) struct Trace {
    pub(crate) shared: Arc<Traced>,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// What others see of it.
pub(crate) struct Traced {
    pub(crate) file: PathBuf,
    pub(crate) capture: Arc<Capture>,
    /// Why nothing is written any more.
    pub(crate) error: OnceLock<String>,
}

impl Trace {
    /// Of the port with this number and name.
    ///
    /// # Errors
    /// The file cannot be written, or there are no more threads.
    pub(crate) fn begin(port: u16, name: &str, file: &Path, before: Before) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        match before {
            Before::Emptied => options.write(true).truncate(true),
            Before::Kept => options.append(true),
        };
        let made = options.create(true).open(file)?;
        let capture =
            Capture::new(port, name, port::MAX_FRAME, Filter::default()).map_err(io::Error::other)?;
        let shared = Arc::new(Traced { file: file.to_owned(), capture, error: OnceLock::new() });
        let (stop, stopped) = bounded::<()>(0);
        let thread = std::thread::Builder::new().name("trace".into()).spawn({
            let shared = shared.clone();
            move || {
                if let Err(why) = write(&shared.capture, made, &stopped) {
                    tracing::error!("{}: the trace ends here: {why}", shared.file.display());
                    let _ = shared.error.set(why);
                }
            }
        })?;
        Ok(Self { shared, stop: Some(stop), thread: Some(thread) })
    }
}

/// Writes until told to stop, or until it cannot.
fn write(capture: &Capture, mut file: File, stopped: &Receiver<()>) -> Result<(), String> {
    loop {
        let ends = stopped.recv_timeout(TURN) != Err(RecvTimeoutError::Timeout);
        file.write_all(&capture.drain()?).map_err(|error| error.to_string())?;
        if ends {
            return Ok(());
        }
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::tests::{frames, take};
    use port::TagEdit;
    use std::time::Instant;

    #[test]
    fn a_trace_has_every_frame_when_it_ends_and_goes_on_in_a_further_section() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("vnf1.pcapng");
        std::fs::write(&file, "something else").unwrap();
        let sent: Vec<u8> = (0..100).collect();
        let mut sections = Vec::new();
        for before in [Before::Emptied, Before::Kept] {
            let trace = Trace::begin(1, "vnf1", &file, before).unwrap();
            take(&trace.shared.capture, &sent, 20, TagEdit::Keep);
            drop(trace);
            let all = std::fs::read(&file).unwrap();
            let old: usize = sections.iter().map(Vec::len).sum();
            sections.push(all[old..].to_vec());
        }
        for section in sections {
            assert_eq!(frames(&section), vec![(sent.clone(), 100); 20]);
        }
    }

    #[test]
    fn a_full_disk_ends_the_trace_and_nothing_else() {
        let trace = Trace::begin(1, "vnf1", Path::new("/dev/full"), Before::Kept).unwrap();
        let end = Instant::now() + Duration::from_secs(60);
        while trace.shared.error.get().is_none() {
            assert!(Instant::now() < end, "no error");
            take(&trace.shared.capture, &[1; 9_000], 64, TagEdit::Keep);
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(trace.shared.error.get().unwrap().contains("No space left"));
        let missed = trace.shared.capture.report().missed;
        (0..20).for_each(|_| take(&trace.shared.capture, &[1; 9_000], 64, TagEdit::Keep));
        assert!(trace.shared.capture.report().missed > missed, "what is not written is counted");
        assert!(Trace::begin(1, "vnf1", Path::new("/nowhere/x"), Before::Emptied).is_err());
    }
}
