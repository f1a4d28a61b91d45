//! Requests of a disk's driver (virtio 1.3, 5.2.6).
//!
//! Owns how one is read and answered. The guest wrote it: its header is read once, sector numbers and lengths are checked
//! against the disk, and whatever it is, there is an answer in its last byte. Reads, writes and flushes go to the kernel
//! ([`under_way`](super::under_way)) where it takes them; otherwise, and everything else, they are done here and waited for.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::image::{Image, SECTOR};
use super::under_way::{Transfer, UnderWay};
use super::{MOST_RANGES, MOST_SECTORS};
use crate::buffers::{Buffers, Request};
use crate::sandbox::ThreadKind;
use crate::worker::{Serve, Served};

/// Kinds of requests.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
/// Answers.
const OK: u8 = 0;
const FAILED: u8 = 1;
const UNSUPPORTED: u8 = 2;
/// Bytes of the header, of the identifier, of a range to discard.
const HEADER: usize = 16;
pub(super) const ID: usize = 20;
const RANGE: usize = 16;
/// Flag of a range: free it.
const UNMAP: u32 = 1;

/// Features that change what requests mean (5.2.3).
pub(super) const FEATURE_FLUSH: u64 = 1 << 9;

/// What works on one queue.
pub(super) struct Server {
    pub(super) image: Arc<Image>,
    pub(super) read_only: bool,
    pub(super) discard: bool,
    pub(super) id: [u8; ID],
    /// The driver never flushes: each write is on the disk when it is answered (5.2.6.2).
    pub(super) write_through: bool,
    /// What the kernel does by itself; `None`: everything is waited for.
    pub(super) under_way: Option<UnderWay>,
}

/// What is asked for, checked.
enum Order<'r> {
    /// Something that the kernel does by itself.
    Transfer(Transfer<'r>),
    /// So many bytes were answered already.
    Done(u64),
}

/// Why a request is refused.
pub(super) enum Refused {
    Unsupported,
    Failed,
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EOPNOTSUPP) => Refused::Unsupported,
            _ => {
                tracing::debug!("disk: {error}");
                Refused::Failed
            }
        }
    }
}

impl Serve for Server {
    const KIND: ThreadKind = ThreadKind::Disk;

    fn start(&mut self, features: u64) {
        self.write_through = features & FEATURE_FLUSH == 0;
    }

    fn serve(&mut self, request: Request<'_>) -> Served {
        if self.under_way.as_ref().is_some_and(|kernel| !kernel.has_room()) {
            return Served::Kept;
        }
        let Request { readable, mut writable } = request;
        // Without a byte for the answer there is none.
        let Some(room) = writable.len().checked_sub(1) else { return Served::Done(0) };
        let answer = writable.take(room);
        let done = match self.order(readable, answer) {
            Ok(Order::Transfer(transfer)) => match &mut self.under_way {
                Some(kernel) if transfer.suits(&self.image) => {
                    return Served::UnderWay(kernel.add(transfer, writable, room, self.write_through));
                }
                _ => transfer.now(&self.image, self.write_through),
            },
            Ok(Order::Done(written)) => Ok(written),
            Err(refused) => Err(refused),
        };
        Served::Done(finish(done, writable, room))
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        self.under_way.as_ref().map(AsFd::as_fd)
    }

    fn begin(&mut self) -> bool {
        self.under_way.as_mut().is_none_or(UnderWay::begin)
    }

    fn is_under_way(&self) -> bool {
        self.under_way.as_ref().is_some_and(|kernel| !kernel.is_empty())
    }

    fn finished(&mut self) -> Option<(u16, u32)> {
        self.under_way.as_mut().and_then(UnderWay::finished)
    }

    fn settle(&mut self) {
        if let Some(kernel) = &mut self.under_way {
            kernel.settle();
        }
    }
}

/// Writes the answer to its byte. Returns how many bytes were written, from the first of the `room` before it on.
pub(super) fn finish(done: Result<u64, Refused>, mut status: Buffers<'_>, room: u64) -> u32 {
    let (status_byte, written) = match done {
        Ok(written) => (OK, written),
        Err(Refused::Failed) => (FAILED, 0),
        Err(Refused::Unsupported) => (UNSUPPORTED, 0),
    };
    status.write(&[status_byte]);
    // The length says up to where all bytes were written, and the status is the last of them (2.7.8.2).
    if written == room { u32::try_from(room + 1).unwrap_or(0) } else { 0 }
}

impl Server {
    /// Reads what is asked for, and does what is done at once.
    fn order<'r>(&self, mut asked: Buffers<'r>, mut answer: Buffers<'r>) -> Result<Order<'r>, Refused> {
        let mut header = [0; HEADER];
        if !asked.read(&mut header) {
            return Err(Refused::Failed);
        }
        let (kind, sector) = (word(&header, 0), long(&header, 8));
        let writes = matches!(kind, OUT | DISCARD | WRITE_ZEROES);
        if writes && self.read_only {
            return Err(Refused::Failed);
        }
        match kind {
            IN => {
                let at = self.checked(sector, answer.len())?;
                Ok(Order::Transfer(Transfer::Read { at, to: answer }))
            }
            OUT => {
                let at = self.checked(sector, asked.len())?;
                Ok(Order::Transfer(Transfer::Write { at, from: asked }))
            }
            FLUSH => Ok(Order::Transfer(Transfer::Flush)),
            GET_ID => Ok(Order::Done(answer.write(&self.id).into())),
            DISCARD | WRITE_ZEROES if self.discard => {
                self.ranges(kind == DISCARD, asked)?;
                self.settle_writes()
            }
            _ => Err(Refused::Unsupported),
        }
    }

    /// A driver that never flushes expects every write to be on the disk.
    fn settle_writes<'r>(&self) -> Result<Order<'r>, Refused> {
        if self.write_through {
            self.image.flush()?;
        }
        Ok(Order::Done(0))
    }

    /// Discards ranges, or fills them with zeros.
    fn ranges(&self, discard: bool, mut ranges: Buffers<'_>) -> Result<(), Refused> {
        if ranges.len() > u64::from(MOST_RANGES) * RANGE as u64 || !ranges.len().is_multiple_of(RANGE as u64)
        {
            return Err(Refused::Failed);
        }
        let mut range = [0; RANGE];
        while ranges.read(&mut range) {
            let (sector, sectors, flags) = (long(&range, 0), word(&range, 8), word(&range, 12));
            // Flags that there are not, or not for this kind (5.2.6.2).
            if flags & !UNMAP != 0 || discard && flags != 0 {
                return Err(Refused::Unsupported);
            }
            if sectors > MOST_SECTORS {
                return Err(Refused::Failed);
            }
            let bytes = u64::from(sectors) * SECTOR;
            let at = self.checked(sector, bytes)?;
            match discard {
                true => self.image.discard(at, bytes)?,
                false => self.image.zero(at, bytes, flags & UNMAP != 0)?,
            }
        }
        Ok(())
    }

    /// The byte at which `length` bytes from `sector` on begin, if they are whole sectors of the disk.
    fn checked(&self, sector: u64, length: u64) -> Result<u64, Refused> {
        let end = sector.checked_add(length / SECTOR).filter(|end| *end <= self.image.sectors());
        match end {
            Some(_) if length.is_multiple_of(SECTOR) => Ok(sector * SECTOR),
            _ => Err(Refused::Failed),
        }
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.iter().skip(at).take(4).rev().fold(0, |all, byte| all << 8 | u32::from(*byte))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at + 4)) << 32 | u64::from(word(bytes, at))
}
