//! Frames into a file, by a thread of its own.
//!
//! Owns the thread and the room between it and the workers, which is bounded: a worker that finds no room drops the frame. Neither
//! side waits for the other.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pcap_file::pcap::{PcapHeader, PcapPacket, PcapWriter};
use pcap_file::{DataLink, PcapError, TsResolution};
use port::{MAX_FRAME, Offload, PutError, Segment, Sink};
use virtio::memory::copy::copy;

use super::wrong;
use crate::kernel::OpenError;

/// Bytes that wait for the disk at most.
const ROOM: usize = 16 << 20;

/// How often the thread looks for frames.
const LOOK: Duration = Duration::from_millis(10);

/// Frames on their way to the file: bytes one behind the other, with time and length of each.
struct Waiting {
    bytes: Vec<u8>,
    frames: Vec<(Duration, u32)>,
}

/// What workers and the thread share.
struct Shared {
    waiting: Mutex<Waiting>,
    end: AtomicBool,
    /// The error that ended the recording; 0: none.
    error: AtomicI32,
}

/// A file that is written, or nothing.
pub struct PcapSink(Option<Recording>);

struct Recording {
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
}

impl PcapSink {
    /// Throws away what it gets.
    pub(super) fn nowhere() -> Self {
        Self(None)
    }

    /// Empties `file` and writes to it from now on.
    pub(super) fn to_file(file: &Path) -> Result<Self, OpenError> {
        let cannot = |e| wrong(file, format!("cannot be written: {e}"));
        let made = File::create(file).map_err(cannot)?;
        let shared = Arc::new(Shared {
            waiting: Mutex::new(Waiting::new()),
            end: AtomicBool::new(false),
            error: AtomicI32::new(0),
        });
        let thread = std::thread::Builder::new().name("pcap-record".into());
        let writer = thread.spawn({
            let shared = shared.clone();
            move || write(&shared, made)
        });
        let writer = Some(writer.map_err(cannot)?);
        Ok(Self(Some(Recording { shared, writer })))
    }
}

/// The file behind its buffer, which the thread keeps too: the library's writer does not let it be written out.
#[derive(Clone)]
struct Buffered(Rc<RefCell<BufWriter<File>>>);

impl Write for Buffered {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.borrow_mut().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.borrow_mut().flush()
    }
}

/// The thread: writes what waits until told to end, or until it cannot.
fn write(shared: &Shared, file: File) {
    if let Err(e) = write_all(shared, file) {
        let code = match e {
            PcapError::IoError(e) => e.raw_os_error().unwrap_or(libc::EIO),
            _ => libc::EIO,
        };
        shared.error.store(code, Ordering::Release);
    }
}

fn write_all(shared: &Shared, file: File) -> Result<(), PcapError> {
    let header = PcapHeader {
        snaplen: MAX_FRAME,
        datalink: DataLink::ETHERNET,
        ts_resolution: TsResolution::NanoSecond,
        ..PcapHeader::default()
    };
    let mut buffered = Buffered(Rc::new(RefCell::new(BufWriter::with_capacity(1 << 20, file))));
    let mut out = PcapWriter::with_header(buffered.clone(), header)?;
    let mut taken = Waiting::new();
    loop {
        let ending = shared.end.load(Ordering::Acquire);
        taken = shared.take(taken);
        let mut at = 0;
        for &(time, len) in &taken.frames {
            let data = taken.bytes.get(at..at + len as usize).unwrap_or_default();
            at += len as usize;
            out.write_packet(&PcapPacket::new(time, len, data))?;
        }
        buffered.flush().map_err(PcapError::IoError)?;
        if ending {
            return Ok(());
        }
        std::thread::sleep(LOOK);
    }
}

impl Waiting {
    /// Room for everything that may wait.
    fn new() -> Self {
        Self { bytes: Vec::with_capacity(ROOM), frames: Vec::with_capacity(ROOM / 256) }
    }
}

impl Shared {
    /// What waits, in exchange for room.
    fn take(&self, mut room: Waiting) -> Waiting {
        room.bytes.clear();
        room.frames.clear();
        loop {
            // Tried, as the workers do: nobody ever sleeps on this lock, so nobody has to be woken.
            if let Ok(mut waiting) = self.waiting.try_lock() {
                return std::mem::replace(&mut waiting, room);
            }
            std::thread::yield_now();
        }
    }
}

impl Sink for PcapSink {
    fn put(&mut self, _: Offload, len: usize, pieces: impl Iterator<Item = Segment>) -> Result<(), PutError> {
        let Some(Recording { shared, .. }) = &self.0 else { return Ok(()) };
        match shared.error.load(Ordering::Acquire) {
            0 => {}
            code => return Err(PutError::Gone(io::Error::from_raw_os_error(code))),
        }
        let Ok(mut waiting) = shared.waiting.try_lock() else { return Err(PutError::Full) };
        let Waiting { bytes, frames } = &mut *waiting;
        let begin = bytes.len();
        // Never beyond what was allocated at the start.
        if begin + len > ROOM.min(bytes.capacity()) || frames.len() == frames.capacity() {
            return Err(PutError::Full);
        }
        bytes.resize(begin + len, 0);
        let mut at = begin;
        for piece in pieces {
            let Some(to) = bytes.get_mut(at..at + piece.len as usize) else { break };
            // SAFETY: the caller's piece is `len` bytes at `ptr`, and `to` has as many.
            unsafe { copy(to.as_mut_ptr(), piece.ptr, to.len()) };
            at += to.len();
        }
        frames.push((SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(), len as u32));
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        self.shared.end.store(true, Ordering::Release);
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pcap_file::pcap::PcapReader;

    fn put(sink: &mut PcapSink, bytes: &[u8]) -> Result<(), PutError> {
        let pieces = bytes.chunks(40).map(|c| Segment { ptr: c.as_ptr(), len: c.len() as u32 });
        sink.put(Offload::NONE, bytes.len(), pieces)
    }

    #[test]
    fn what_goes_out_is_in_the_file_when_the_port_ends() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut sink = PcapSink::to_file(file.path()).unwrap();
        let frames: Vec<Vec<u8>> = (0..1_000usize).map(|i| vec![i as u8; 60 + i]).collect();
        for frame in &frames {
            while let Err(e) = put(&mut sink, frame) {
                assert!(matches!(e, PutError::Full), "{e:?}");
            }
        }
        drop(sink);
        let mut reader = PcapReader::new(File::open(file.path()).unwrap()).unwrap();
        let mut read = Vec::new();
        while let Some(packet) = reader.next_packet() {
            read.push(packet.unwrap().data.into_owned());
        }
        assert_eq!(read, frames);
    }

    #[test]
    fn a_full_disk_ends_the_recording_with_its_error() {
        let mut sink = PcapSink::to_file(Path::new("/dev/full")).unwrap();
        let end = std::time::Instant::now() + Duration::from_secs(60);
        loop {
            match put(&mut sink, &[0; 60_000]) {
                Err(PutError::Gone(e)) => break assert_eq!(e.raw_os_error(), Some(libc::ENOSPC)),
                _ => assert!(std::time::Instant::now() < end, "no error"),
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn what_the_disk_does_not_keep_up_with_is_refused() {
        let room = Waiting { bytes: Vec::with_capacity(100), frames: Vec::with_capacity(10) };
        let (waiting, end, error) = (Mutex::new(room), AtomicBool::new(false), AtomicI32::new(0));
        let mut sink =
            PcapSink(Some(Recording { shared: Arc::new(Shared { waiting, end, error }), writer: None }));
        assert!(put(&mut sink, &[1; 60]).is_ok());
        assert!(matches!(put(&mut sink, &[2; 60]), Err(PutError::Full)));
        assert!(put(&mut sink, &[3; 40]).is_ok());
    }
}
