//! The frames of a file, one after the other as their time comes.
//!
//! Owns them in private memory. A worker that was elsewhere for a moment finds the frames of that moment at once; what is
//! longer ago than [`PATIENCE_MILLISECONDS`] is not caught up, so that a pause ends in no avalanche.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::Duration;

use host::cpu::{rdtsc, tsc_hz};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use pcap_file::DataLink;
use pcap_file::pcap::PcapReader;
use port::{Frame, MAX_FRAME, Source};

use super::wrong;
use crate::kernel::OpenError;

/// The longest file: it is held in memory.
const LONGEST: u64 = 1 << 30;

/// What is later than this is sent as if it were now.
const PATIENCE_MILLISECONDS: u64 = 10;

/// How often a worker that sleeps looks after frames whose time has come.
const WAKE: Duration = Duration::from_millis(1);

/// A pcapng file begins with this (draft-ietf-opsawg-pcapng, section 4.1).
const PCAPNG: [u8; 4] = [0x0a, 0x0d, 0x0d, 0x0a];

/// A frame: where its bytes are, and when it is due, in ticks of the time-stamp counter behind the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    at: usize,
    len: u32,
    due: u64,
}

/// A file that comes in.
pub struct PcapSource {
    bytes: Box<[u8]>,
    entries: Box<[Entry]>,
    /// Ticks from the first frame of one round to the first of the next; `None`: there is one round.
    round: Option<u64>,
    next: usize,
    /// When the first frame of this round was due; `None`: nobody looked yet.
    begun: Option<u64>,
    ready: usize,
    patience: u64,
    /// Expires again and again while a worker sleeps; `None`: there is nothing to come.
    timer: Option<TimerFd>,
}

impl PcapSource {
    /// Nothing.
    pub(super) fn empty() -> Self {
        Self::of(Vec::new(), Vec::new(), None)
    }

    /// The frames of `file`, `rate` a second or at their own times, again and again if wanted.
    pub(super) fn of_file(file: &Path, rate: Option<u32>, repeat: bool) -> Result<Self, OpenError> {
        let opened = File::open(file).map_err(|e| wrong(file, format!("cannot be opened: {e}")))?;
        let (frames, bytes) = read(opened).map_err(|what| wrong(file, what))?;
        let hz = tsc_hz();
        let first = frames.first().map_or(Duration::ZERO, |(time, ..)| *time);
        let ticks = |time: Duration| {
            u64::try_from(time.as_nanos() * u128::from(hz) / 1_000_000_000).unwrap_or(u64::MAX)
        };
        let gap = rate.map(|rate| hz / u64::from(rate.max(1)));
        let mut last = 0;
        let entries: Vec<Entry> = (0u64..)
            .zip(frames)
            .map(|(i, (time, at, len))| {
                // A clock that was set back: at once.
                last = gap.map_or_else(|| ticks(time.saturating_sub(first)).max(last), |gap| i * gap);
                Entry { at, len, due: last }
            })
            .collect();
        let average = last / (entries.len().max(2) as u64 - 1);
        let round = repeat.then(|| last + gap.unwrap_or(average).max(1));
        let mut source = Self::of(bytes, entries, round);
        let timer = timer().map_err(|e| wrong(file, format!("cannot be replayed, no timer: {e}")))?;
        source.timer = Some(timer);
        Ok(source)
    }

    fn of(bytes: Vec<u8>, entries: Vec<Entry>, round: Option<u64>) -> Self {
        let patience = tsc_hz() / 1000 * PATIENCE_MILLISECONDS;
        let (bytes, entries) = (bytes.into(), entries.into());
        Self { bytes, entries, round, next: 0, begun: None, ready: 0, patience, timer: None }
    }

    /// How many frames are due at `now`, at most `limit`, from the next one on.
    fn due(&mut self, now: u64, limit: usize) -> usize {
        let begun = *self.begun.get_or_insert(now);
        if self.next == self.entries.len() {
            match self.round {
                Some(round) if now.saturating_sub(begun) >= round => {
                    (self.next, self.begun) = (0, Some(begun + round));
                }
                _ => return 0,
            }
        }
        let Some(next) = self.entries.get(self.next) else { return 0 };
        let begun = self.begun.unwrap_or(now);
        let late = now.saturating_sub(begun + next.due);
        let begun = if late > self.patience { now.saturating_sub(next.due) } else { begun };
        self.begun = Some(begun);
        let due = self.entries.iter().skip(self.next).take(limit);
        due.take_while(|entry| begun + entry.due <= now).count()
    }
}

/// A timer that expires every [`WAKE`].
fn timer() -> nix::Result<TimerFd> {
    let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
    let every = Expiration::Interval(TimeSpec::from_duration(WAKE));
    timer.set(every, TimerSetTimeFlags::empty())?;
    Ok(timer)
}

/// When each frame was seen, where its bytes begin, and how many there are.
type Frames = Vec<(Duration, usize, u32)>;

/// The frames of a pcap file, and their bytes one behind the other.
fn read(file: impl Read) -> Result<(Frames, Vec<u8>), String> {
    let mut text = Vec::new();
    file.take(LONGEST + 1).read_to_end(&mut text).map_err(|e| format!("cannot be read: {e}"))?;
    if text.len() as u64 > LONGEST {
        return Err("is longer than 1 GiB, and would be held in memory: cut it (editcap -c)".to_owned());
    }
    if text.starts_with(&PCAPNG) {
        return Err("is a pcapng file; to make a pcap file of it: editcap -F pcap IN OUT".to_owned());
    }
    let mut reader = PcapReader::new(&text[..]).map_err(|e| format!("is no pcap file: {e}"))?;
    let link = reader.header().datalink;
    if link != DataLink::ETHERNET {
        return Err(format!("holds no Ethernet frames but {link:?}"));
    }
    let (mut frames, mut bytes) = (Vec::new(), Vec::new());
    while let Some(packet) = reader.next_packet() {
        let n = frames.len() + 1;
        let packet = packet.map_err(|e| format!("is broken at frame {n}: {e}"))?;
        let len = packet.data.len();
        if len > MAX_FRAME as usize {
            return Err(format!(
                "has a frame of {len} bytes, number {n}; the longest possible has {MAX_FRAME}"
            ));
        }
        frames.push((packet.timestamp, bytes.len(), len as u32));
        bytes.extend_from_slice(&packet.data);
    }
    Ok((frames, bytes))
}

impl Source for PcapSource {
    fn look(&mut self, limit: usize) -> io::Result<usize> {
        self.ready = self.due(rdtsc(), limit);
        Ok(self.ready)
    }

    fn lend(&mut self, frames: &mut [Frame]) -> usize {
        let entries = self.entries.iter().skip(self.next).take(self.ready);
        let mut lent = 0;
        for (frame, entry) in frames.iter_mut().zip(entries) {
            let bytes = self.bytes.get(entry.at..).unwrap_or_default();
            *frame = Frame { ptr: bytes.as_ptr(), first_len: entry.len, len: entry.len, ..Frame::EMPTY };
            lent += 1;
        }
        (self.next, self.ready) = (self.next + lent, 0);
        lent
    }

    fn take_back(&mut self) {}

    fn before_sleep(&mut self) {
        if self.next < self.entries.len() || self.round.is_some() {
            // An expired timer goes on when it is read.
            if let Some(timer) = &self.timer {
                let mut count = [0; 8];
                let _ = nix::unistd::read(timer, &mut count);
            }
        }
    }

    fn waker(&self) -> Option<BorrowedFd<'_>> {
        self.timer.as_ref().map(AsFd::as_fd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pcap_file::pcap::{PcapPacket, PcapWriter};

    fn file(times_ms: &[u64]) -> Vec<u8> {
        let mut writer = PcapWriter::new(Vec::new()).unwrap();
        for (i, ms) in times_ms.iter().enumerate() {
            let data = vec![i as u8; 60 + i];
            let packet = PcapPacket::new(Duration::from_millis(1_000_000 + ms), data.len() as u32, &data);
            writer.write_packet(&packet).unwrap();
        }
        writer.into_writer()
    }

    fn source(times_ms: &[u64], rate: Option<u32>, repeat: bool) -> PcapSource {
        let at = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(at.path(), file(times_ms)).unwrap();
        PcapSource::of_file(at.path(), rate, repeat).unwrap()
    }

    /// Takes what is due at `ms` milliseconds after the first look.
    fn lengths(source: &mut PcapSource, ms: u64) -> Vec<u32> {
        let now = 1_000_000_000_000 + ms * (tsc_hz() / 1000);
        source.ready = source.due(now, 64);
        let mut frames = [Frame::EMPTY; 64];
        let n = source.lend(&mut frames);
        frames[..n].iter().map(|f| f.len).collect()
    }

    #[test]
    fn frames_come_at_the_times_of_the_file() {
        let mut source = source(&[0, 2, 2, 5], None, false);
        assert_eq!(lengths(&mut source, 0), [60]);
        assert_eq!(lengths(&mut source, 1), [0; 0]);
        assert_eq!(lengths(&mut source, 3), [61, 62]);
        assert_eq!(lengths(&mut source, 6), [63]);
        assert_eq!(lengths(&mut source, 99), [0; 0]);
    }

    #[test]
    fn frames_come_at_the_rate_and_again_from_the_start() {
        let mut source = source(&[0, 500, 900], Some(1_000), true);
        let seen: Vec<_> = (0..7).flat_map(|ms| lengths(&mut source, ms)).collect();
        assert_eq!(seen, [60, 61, 62, 60, 61, 62, 60]);
    }

    #[test]
    fn a_pause_is_not_caught_up() {
        let mut source = source(&[0, 4, 8, 12, 16, 20], None, true);
        assert_eq!(lengths(&mut source, 0), [60]);
        assert_eq!(lengths(&mut source, 1_000), [61], "as if its time were now");
        assert_eq!(lengths(&mut source, 1_005), [62]);
    }

    #[test]
    fn a_clock_that_was_set_back_holds_nothing_up() {
        let mut source = source(&[9, 3, 10], None, false);
        assert_eq!(lengths(&mut source, 0), [60, 61]);
        assert_eq!(lengths(&mut source, 1), [62]);
    }

    #[test]
    fn a_file_that_is_cut_off_anywhere_or_altered_is_refused_or_read_and_never_a_panic() {
        let whole = file(&[0, 1, 2]);
        for end in 0..whole.len() {
            let read = read(&whole[..end]).map(|(frames, _)| frames.len());
            assert!(read.as_ref().map_or(true, |n| *n < 3), "{end}: {read:?}");
        }
        for at in 0..whole.len() {
            let mut altered = whole.clone();
            altered[at] ^= 0xff;
            let _ = read(&altered[..]);
        }
    }

    #[test]
    fn what_is_no_pcap_file_is_told_so() {
        assert!(read(&b"hello, world, this is a long text"[..]).unwrap_err().starts_with("is no pcap file"));
        assert!(read(&PCAPNG[..]).unwrap_err().contains("editcap -F pcap"));
        let header = pcap_file::pcap::PcapHeader { datalink: DataLink::RAW, ..Default::default() };
        let raw = PcapWriter::with_header(Vec::new(), header).unwrap().into_writer();
        assert!(read(&raw[..]).unwrap_err().contains("no Ethernet frames"));
    }
}
