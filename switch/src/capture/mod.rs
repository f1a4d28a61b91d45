//! Copies of the frames of one port, for a person to look at: `cableway switch capture`.
//!
//! Workers copy into a room of fixed size and never wait for it: what finds no room, or finds it held, is counted. The control
//! thread empties the room when the client asks, as blocks of a pcapng file. A capture whose client does not ask any more ends
//! by itself. While there is none, no worker knows that there could be.

mod filter;
mod trace;

use std::borrow::Cow;
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use pcap_file::DataLink;
use pcap_file::pcapng::PcapNgWriter;
use pcap_file::pcapng::blocks::enhanced_packet::{EnhancedPacketBlock, EnhancedPacketOption};
use pcap_file::pcapng::blocks::interface_description::{
    InterfaceDescriptionBlock, InterfaceDescriptionOption,
};
use port::{Burst, FrameSet, TagEdit};
use virtio::memory::copy::copy;

pub use filter::Filter;
pub(crate) use trace::{Before, Trace, Traced};

use crate::claim::Claimed;
use crate::control::report::CaptureReport;
use crate::outgoing::Outgoing;

/// Bytes that wait for the client at most: its budget. A client that asks every 50 ms gets 80 MB a second.
const ROOM: usize = 4 << 20;

/// A client that asks for nothing for so long is gone.
const PATIENCE: Duration = Duration::from_secs(5);

/// Which way a frame went, as in a pcapng file's flags (draft-ietf-opsawg-pcapng, section 4.3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// It came in from what is behind the port.
    In = 1,
    /// It was about to go out to it.
    Out = 2,
}

/// A frame that waits; its bytes are with those of the others.
struct Record {
    time: Duration,
    way: Way,
    len: u32,
    kept: u32,
}

/// What waits for the client.
struct Room {
    bytes: Vec<u8>,
    records: Vec<Record>,
}

impl Room {
    fn new() -> Self {
        Self { bytes: Vec::with_capacity(ROOM), records: Vec::with_capacity(ROOM / 64) }
    }
}

/// A capture of one port.
pub struct Capture {
    /// Its number.
    pub(crate) id: u64,
    /// Name and number of its port.
    pub(crate) name: String,
    pub(crate) port: u16,
    longest: u32,
    filter: Filter,
    room: Claimed<Room>,
    taken: AtomicU64,
    missed: AtomicU64,
    client: Mutex<Client>,
}

/// What the control thread keeps of it.
struct Client {
    writer: PcapNgWriter<Blocks>,
    blocks: Blocks,
    spare: Room,
    asked: Instant,
}

/// Where the library writes its blocks, from which they are taken.
#[derive(Clone, Default)]
struct Blocks(Arc<Mutex<Vec<u8>>>);

impl Blocks {
    fn take(&self) -> Vec<u8> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Write for Blocks {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Capture {
    /// Of the port with this number and name: the first `longest` bytes of each frame that `filter` wants.
    ///
    /// # Errors
    /// The library cannot begin a file.
    pub(crate) fn new(port: u16, name: &str, longest: u32, filter: Filter) -> Result<Arc<Self>, String> {
        static LAST: AtomicU64 = AtomicU64::new(0);
        let blocks = Blocks::default();
        let mut writer = PcapNgWriter::new(blocks.clone()).map_err(|e| e.to_string())?;
        let mut interface = InterfaceDescriptionBlock::new(DataLink::ETHERNET, longest);
        interface.options.push(InterfaceDescriptionOption::IfName(Cow::Borrowed(name)));
        interface.options.push(InterfaceDescriptionOption::IfTsResol(9)); // nanoseconds
        writer.write_pcapng_block(interface).map_err(|e| e.to_string())?;
        let client = Client { writer, blocks, spare: Room::new(), asked: Instant::now() };
        Ok(Arc::new(Self {
            id: LAST.fetch_add(1, Ordering::Relaxed) + 1,
            name: name.to_owned(),
            port,
            longest,
            filter,
            room: Claimed::new(Room::new()),
            taken: AtomicU64::new(0),
            missed: AtomicU64::new(0),
            client: Mutex::new(client),
        }))
    }

    /// For workers: copies those frames of `set` that are wanted, if they are of port `port`.
    pub(crate) fn take(&self, port: u16, burst: &Burst<'_>, set: FrameSet, edit: TagEdit, way: Way) {
        if port != self.port {
            return;
        }
        let wanted = |i: &usize| {
            let (head, frame) = (burst.heads().get(*i), burst.frames().get(*i));
            head.zip(frame).is_some_and(|(head, frame)| self.filter.wants(&head.0, frame.len))
        };
        let Some(mut room) = self.room.try_claim() else {
            self.missed.fetch_add(set.filter(wanted).count() as u64, Ordering::Relaxed);
            return;
        };
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let (mut taken, mut missed) = (0, 0);
        for i in set.filter(wanted) {
            let (Some(frame), Some(head)) = (burst.frames().get(i), burst.heads().get(i)) else { continue };
            // A frame that cannot leave as it is meant to is no frame that goes out.
            let Some(out) = Outgoing::new(burst, frame, head, edit) else { continue };
            let Room { bytes, records } = &mut *room;
            let (len, begin) = (out.len() as u32, bytes.len());
            let kept = len.min(self.longest) as usize;
            // Never beyond what was allocated.
            if begin + kept > ROOM || records.len() == records.capacity() {
                missed += 1;
                continue;
            }
            bytes.resize(begin + kept, 0);
            let mut at = begin;
            for piece in out.pieces() {
                let n = (piece.len as usize).min(begin + kept - at);
                let Some(to) = bytes.get_mut(at..at + n) else { break };
                // SAFETY: `n` bytes at `piece.ptr` are the frame's (see `Outgoing::pieces`), and `to` has as many.
                unsafe { copy(to.as_mut_ptr(), piece.ptr, n) };
                at += n;
            }
            records.push(Record { time, way, len, kept: kept as u32 });
            taken += 1;
        }
        self.taken.fetch_add(taken, Ordering::Relaxed);
        self.missed.fetch_add(missed, Ordering::Relaxed);
    }

    /// For the control thread: what came since the last call, as blocks of a pcapng file.
    pub(crate) fn drain(&self) -> Result<Vec<u8>, String> {
        let mut client = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        client.asked = Instant::now();
        let Client { writer, spare, .. } = &mut *client;
        std::mem::swap(&mut *self.room.take(), spare);
        let mut at = 0;
        for record in &spare.records {
            let kept = record.kept as usize;
            let block = EnhancedPacketBlock {
                interface_id: 0,
                timestamp: record.time,
                original_len: record.len,
                data: Cow::Borrowed(spare.bytes.get(at..at + kept).unwrap_or_default()),
                options: vec![EnhancedPacketOption::Flags(record.way as u32)],
            };
            at += kept;
            writer.write_pcapng_block(block).map_err(|e| e.to_string())?;
        }
        spare.bytes.clear();
        spare.records.clear();
        Ok(client.blocks.take())
    }

    /// Whether its client is gone.
    pub(crate) fn is_forgotten(&self) -> bool {
        self.client.lock().unwrap_or_else(PoisonError::into_inner).asked.elapsed() > PATIENCE
    }

    /// What became of the frames so far.
    pub(crate) fn report(&self) -> CaptureReport {
        CaptureReport {
            id: self.id,
            port: self.name.clone(),
            captured: self.taken.load(Ordering::Relaxed),
            missed: self.missed.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pcap_file::pcapng::{Block, PcapNgReader};
    use port::{BurstBuffer, Frame, HEAD, Nobody};

    /// A burst of copies of `bytes`, given to `capture` as frames of port 1.
    pub(super) fn take(capture: &Capture, bytes: &[u8], copies: usize, edit: TagEdit) {
        let mut buffer = BurstBuffer::default();
        for i in 0..copies {
            let len = bytes.len() as u32;
            buffer.frames[i] = Frame { ptr: bytes.as_ptr(), first_len: len, len, ..Frame::EMPTY };
            let n = bytes.len().min(HEAD);
            buffer.heads[i].0[..n].copy_from_slice(&bytes[..n]);
        }
        let mut nobody = Nobody;
        let burst = Burst::new(&mut nobody, &buffer, copies);
        capture.take(1, &burst, burst.all(), edit, Way::Out);
        capture.take(2, &burst, burst.all(), edit, Way::Out);
    }

    pub(super) fn frames(file: &[u8]) -> Vec<(Vec<u8>, u32)> {
        let mut reader = PcapNgReader::new(file).unwrap();
        let mut frames = Vec::new();
        while let Some(block) = reader.next_block() {
            if let Block::EnhancedPacket(block) = block.unwrap() {
                assert_eq!(block.options, [EnhancedPacketOption::Flags(2)]);
                frames.push((block.data.into_owned(), block.original_len));
            }
        }
        frames
    }

    #[test]
    fn what_is_drained_piece_by_piece_is_one_file_of_the_ports_frames_as_they_went_out() {
        let capture = Capture::new(1, "vnf1", 100, Filter::default()).unwrap();
        let sent: Vec<u8> = (0..200).collect();
        take(&capture, &sent, 1, TagEdit::Keep);
        let mut file = capture.drain().unwrap();
        take(&capture, &sent[..60], 1, TagEdit::Push(20));
        file.extend(capture.drain().unwrap());
        let tagged = [&sent[..12], &[0x81, 0, 0, 20], &sent[12..60]].concat();
        assert_eq!(frames(&file), [(sent[..100].to_vec(), 200), (tagged, 64)]);
        assert_eq!((capture.report().captured, capture.report().missed), (2, 0));
    }

    #[test]
    fn what_is_beyond_the_budget_is_counted_and_nothing_is_waited_for() {
        let capture = Capture::new(1, "vnf1", 65_535, Filter::default()).unwrap();
        let sent = vec![7; 9_000];
        for _ in 0..20 {
            take(&capture, &sent, 64, TagEdit::Keep);
        }
        let report = capture.report();
        assert_eq!((report.captured, report.captured + report.missed), (ROOM as u64 / 9_000, 20 * 64));
        let held = capture.room.try_claim();
        take(&capture, &sent, 3, TagEdit::Keep);
        assert_eq!(capture.report().missed, report.missed + 3, "somebody else had the room");
        drop(held);
        assert_eq!(frames(&capture.drain().unwrap()).len() as u64, report.captured);
    }

    #[test]
    fn only_frames_that_the_filter_wants_are_taken_or_missed() {
        let capture = Capture::new(1, "vnf1", 100, Filter::parse("arp").unwrap()).unwrap();
        take(&capture, &[0; 60], 5, TagEdit::Keep);
        let held = capture.room.try_claim();
        take(&capture, &[0; 60], 5, TagEdit::Keep);
        drop(held);
        assert_eq!((capture.report().captured, capture.report().missed), (0, 0));
    }
}
