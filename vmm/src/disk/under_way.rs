//! Requests that the kernel does by itself, many at a time, by io_uring(7).
//!
//! Owns the ring of one queue and what is under way in it. The ring can read, write and sync the disk's image and nothing else:
//! that was its last word before it was switched on (IORING_REGISTER_RESTRICTIONS). Guest memory stays mapped until nothing is
//! under way in it any more.
//!
//! System calls: io_uring_setup and io_uring_register where it is made, io_uring_enter on the queue's thread.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue, types};
use virtio::memory::GuestMemory;

use super::image::Image;
use super::request::{Refused, finish};
use crate::buffers::Buffers;

/// How long to leave a kernel alone that has no memory for a request.
const BREATHE: Duration = Duration::from_millis(1);
/// The only file of a ring.
const IMAGE: types::Fixed = types::Fixed(0);

/// Something that the kernel can do by itself, in bounds.
pub(super) enum Transfer<'r> {
    /// Fill `to` with what begins at byte `at`.
    Read {
        /// Where.
        at: u64,
        /// The guest's memory.
        to: Buffers<'r>,
    },
    /// Write `from` at byte `at`.
    Write {
        /// Where.
        at: u64,
        /// The guest's memory.
        from: Buffers<'r>,
    },
    /// What was written before is on the disk from now on.
    Flush,
}

impl<'r> Transfer<'r> {
    /// Whether the kernel takes it as it is, and it is not sooner done by waiting: what is written to the page cache is
    /// copied there, which is all that there is to do (docs/vm.md has the figures).
    pub(super) fn suits(&self, image: &Image) -> bool {
        match self {
            Transfer::Read { to, .. } => to.len() > 0 && image.takes(to),
            Transfer::Write { from, .. } => from.len() > 0 && image.is_direct() && image.takes(from),
            Transfer::Flush => true,
        }
    }

    /// What is left when `moved` bytes were moved; `None`: nothing.
    fn rest(&mut self, moved: u64) -> Option<Transfer<'r>> {
        let (Transfer::Read { at, to: buffers } | Transfer::Write { at, from: buffers }) = self else {
            return None;
        };
        drop(buffers.take(moved));
        *at += moved;
        (buffers.len() > 0).then(|| std::mem::replace(self, Transfer::Flush))
    }

    /// Does it and waits. Returns how many bytes were read.
    pub(super) fn now(self, image: &Image, write_through: bool) -> Result<u64, Refused> {
        match self {
            Transfer::Read { at, to } => {
                let length = to.len();
                image.read(at, to)?;
                Ok(length)
            }
            Transfer::Write { at, from } => {
                image.write(at, from)?;
                if write_through {
                    image.flush()?;
                }
                Ok(0)
            }
            Transfer::Flush => {
                image.flush()?;
                Ok(0)
            }
        }
    }
}

/// A request that is under way.
struct Request {
    transfer: Transfer<'static>,
    /// Bytes that it reads in all.
    read: u64,
    /// Of a write: it is to be flushed when it is done.
    flush: bool,
    /// Where the answer goes, and how many bytes are before it.
    status: Buffers<'static>,
    room: u64,
}

/// What is under way of one queue.
pub(super) struct UnderWay {
    ring: IoUring,
    requests: Vec<Option<Request>>,
    free: Vec<u16>,
    /// Done, and nobody was told: numbers, and bytes that were written.
    done: VecDeque<(u16, u32)>,
    image: Arc<Image>,
    _memory: Arc<GuestMemory>,
}

// SAFETY: the pointers in requests are into guest memory that `_memory` keeps mapped, whichever thread uses them.
unsafe impl Send for UnderWay {}

impl UnderWay {
    /// A ring for up to `most` requests.
    ///
    /// # Errors
    /// The kernel does not give one.
    pub(super) fn new(image: &Arc<Image>, memory: &Arc<GuestMemory>, most: u16) -> io::Result<Self> {
        let ring: IoUring = IoUring::builder().setup_r_disabled().build(most.into())?;
        let may = |opcode: u8| Restriction::sqe_op(opcode);
        let mut restrictions = [
            may(opcode::Readv::CODE),
            may(opcode::Writev::CODE),
            may(opcode::Fsync::CODE),
            Restriction::sqe_flags_allowed(squeue::Flags::FIXED_FILE.bits()),
            Restriction::sqe_flags_required(squeue::Flags::FIXED_FILE.bits()),
        ];
        ring.submitter().register_files(&[image.as_raw_fd()])?;
        ring.submitter().register_restrictions(&mut restrictions)?;
        ring.submitter().register_enable_rings()?;
        Ok(Self {
            ring,
            requests: (0..most).map(|_| None).collect(),
            free: (0..most).rev().collect(),
            done: VecDeque::new(),
            image: image.clone(),
            _memory: memory.clone(),
        })
    }

    /// Whether one more request fits.
    pub(super) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Whether nothing is under way.
    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == self.requests.len()
    }

    /// Takes a request in, which begins with [`UnderWay::begin`]. Returns its number. There is room.
    pub(super) fn add(&mut self, transfer: Transfer<'_>, status: Buffers<'_>, room: u64, flush: bool) -> u16 {
        let (transfer, read, flush) = match transfer {
            // SAFETY: `_memory` keeps guest memory mapped, and this does not end before nothing is under way.
            Transfer::Read { at, to } => (Transfer::Read { at, to: unsafe { to.kept() } }, room, false),
            // SAFETY: as above.
            Transfer::Write { at, from } => (Transfer::Write { at, from: unsafe { from.kept() } }, 0, flush),
            Transfer::Flush => (Transfer::Flush, 0, false),
        };
        // SAFETY: as above.
        let status = unsafe { status.kept() };
        let number = self.free.pop().unwrap_or_default();
        self.put(number, Request { transfer, read, flush, status, room });
        number
    }

    /// As many entries as requests: there is a place for each.
    fn put(&mut self, number: u16, request: Request) {
        let Some(slot) = self.requests.get_mut(usize::from(number)) else { return };
        let entry = entry(&slot.insert(request).transfer, number);
        // SAFETY: the memory of the request, and the list of its pieces, which is on the heap, stay where they are until it is
        // done: nobody else takes it out of its slot.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        debug_assert!(pushed.is_ok(), "more requests than places");
    }

    /// Gives the kernel what was taken in. False: it has no memory for it now.
    pub(super) fn begin(&mut self) -> bool {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    std::thread::sleep(BREATHE);
                    return false;
                }
            }
        }
        true
    }

    /// One that is done: its number, and how many bytes were written of it.
    pub(super) fn finished(&mut self) -> Option<(u16, u32)> {
        if self.done.is_empty() {
            self.reap();
        }
        self.done.pop_front()
    }

    /// Waits until nothing is under way.
    pub(super) fn settle(&mut self) {
        loop {
            self.reap();
            if self.is_empty() {
                return;
            }
            if let Err(error) = self.ring.submit_and_wait(1)
                && error.kind() != io::ErrorKind::Interrupted
            {
                std::thread::sleep(BREATHE);
            }
        }
    }

    /// Takes what the kernel has done.
    fn reap(&mut self) {
        loop {
            let completed = self.ring.completion().next();
            let Some(completed) = completed else { break };
            let number = completed.user_data() as u16;
            let slot = self.requests.get_mut(usize::from(number));
            let Some(request) = slot.and_then(Option::take) else { continue };
            if let Some(written) = self.answer(number, request, completed.result()) {
                self.free.push(number);
                self.done.push_back((number, written));
            }
        }
        if !self.ring.submission().is_empty() {
            self.begin();
        }
    }

    /// Answers a request; `None`: it goes on.
    fn answer(&mut self, number: u16, mut request: Request, result: i32) -> Option<u32> {
        let done = match u32::try_from(result) {
            Err(_) => match io::Error::from_raw_os_error(result.wrapping_neg()) {
                // Not without waiting.
                error if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                    request.transfer.now(&self.image, request.flush)
                }
                error => Err(error.into()),
            },
            Ok(moved) => match request.transfer.rest(moved.into()) {
                None if request.flush => {
                    request.transfer = Transfer::Flush;
                    request.flush = false;
                    self.put(number, request);
                    return None;
                }
                None => Ok(request.read),
                // The file became shorter than it was.
                Some(_) if moved == 0 => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Some(rest) => rest.now(&self.image, request.flush).map(|_| request.read),
            },
        };
        Some(finish(done, request.status, request.room))
    }
}

#[cfg(test)]
impl UnderWay {
    /// What the kernel says to a request that no disk makes.
    pub(super) fn forbidden(&mut self) -> Option<i32> {
        // SAFETY: it has no memory.
        unsafe { self.ring.submission().push(&opcode::Nop::new().build()) }.ok()?;
        self.ring.submit_and_wait(1).ok()?;
        Some(-self.ring.completion().next()?.result())
    }
}

impl AsFd for UnderWay {
    /// Readable when something is done.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: it is open as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.settle();
    }
}

/// What tells the kernel of a request.
fn entry(transfer: &Transfer<'_>, number: u16) -> squeue::Entry {
    let pieces = |buffers: &Buffers<'_>| (buffers.pieces().as_ptr(), buffers.pieces().len() as u32);
    let entry = match transfer {
        Transfer::Read { at, to } => {
            let (pieces, count) = pieces(to);
            opcode::Readv::new(IMAGE, pieces, count).offset(*at).build()
        }
        Transfer::Write { at, from } => {
            let (pieces, count) = pieces(from);
            opcode::Writev::new(IMAGE, pieces, count).offset(*at).build()
        }
        Transfer::Flush => opcode::Fsync::new(IMAGE).flags(types::FsyncFlags::DATASYNC).build(),
    };
    entry.user_data(number.into())
}
