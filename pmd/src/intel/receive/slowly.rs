//! Descriptors that are not simply a frame each: frames over several of them, damaged ones, and what no device should write.

use port::{BurstBuffer, DropReason, Frame, Segment};
use virtio::memory::copy::copy;

use super::Receive;
use crate::access::PciDevice;
use crate::dma::BUFFER;
use crate::intel::Card;
use crate::nic::{DeviceError, MIN_FRAME, MOST_BUFFERS};

/// What one or more descriptors hold.
enum Found {
    /// The end of the frame has not come yet.
    Wait,
    /// No frame, in so many descriptors.
    Drop(DropReason, u32),
    /// A frame, in so many descriptors, and the tag taken off it.
    Frame(u32, Option<u16>),
}

impl<D: PciDevice, C: Card> Receive<D, C> {
    /// Goes on where [`Receive::read`] stopped, after as many frames as descriptors.
    #[inline(never)]
    pub(super) fn read_on(&mut self, buffer: &mut BurstBuffer) -> usize {
        let (mut frames, mut dropped, mut bytes, mut segments) = (self.taken as usize, 0, 0, 0);
        let before = frames;
        let posted = self.posted();
        while self.taken < posted {
            let (Some(frame), Some(head)) = (buffer.frames.get_mut(frames), buffer.heads.get_mut(frames))
            else {
                break;
            };
            let (at, room) = (self.next.wrapping_add(self.taken), &mut buffer.segments[..]);
            match self.read_any(at, posted - self.taken, frame, &mut head.0, room, segments) {
                Found::Wait => break,
                Found::Frame(n, tag) => {
                    self.taken += n;
                    segments += usize::from(frame.more);
                    bytes += u64::from(frame.len);
                    if let Some(place) = self.tags.get_mut(frames) {
                        *place = tag;
                    }
                    frames += 1;
                }
                Found::Drop(reason, n) => {
                    self.counters.drops.add(reason, 1);
                    self.taken += n;
                    dropped += 1;
                }
            }
        }
        self.counters.frames.add((frames - before) as u64 + dropped);
        self.counters.bytes.add(bytes);
        frames
    }

    /// Frames over any number of descriptors, damaged ones, and what no device should write. At most `posted` descriptors are its.
    fn read_any(
        &self,
        at: u32,
        posted: u32,
        frame: &mut Frame,
        head: &mut [u8; 64],
        table: &mut [Segment],
        used: usize,
    ) -> Found {
        let mut found = [(0u32, 0u32); MOST_BUFFERS as usize];
        let (mut total, mut count) = (0, 0);
        let last = loop {
            if count == posted {
                return Found::Wait;
            }
            let here = at.wrapping_add(count);
            let d = self.written(here);
            if !d.done() {
                return Found::Wait;
            }
            let Some(place) = found.get_mut(count as usize) else {
                return self.broken(here, format!("a frame does not end after {MOST_BUFFERS} descriptors"));
            };
            let len = d.len();
            if len == 0 || len > BUFFER {
                return self.broken(here, format!("{len} bytes in a buffer of {BUFFER}"));
            }
            *place = (self.slot(here), len);
            total += len;
            count += 1;
            if d.ends() {
                break d;
            }
        };
        for (bit, counter) in self.counters.errors.iter().enumerate() {
            counter.add(u64::from(last.errors() >> bit & 1));
        }
        let found = found.get(..count as usize).unwrap_or_default();
        if last.0 & C::DAMAGED != 0 {
            return Found::Drop(DropReason::Damaged, count);
        }
        if total < MIN_FRAME {
            return Found::Drop(DropReason::Runt, count);
        }
        if total > self.max {
            return Found::Drop(DropReason::Oversize, count);
        }
        let Some(room) = table.get_mut(used..used + found.len() - 1) else { return Found::Wait };
        let arena = self.pool.arena().view();
        let (mut in_head, mut pieces) = (0, room.iter_mut());
        *head = [0; 64];
        for (i, &(index, len)) in found.iter().enumerate() {
            let ptr = arena.ptr(index);
            if let Some(rest) = head.get_mut(in_head..) {
                let n = rest.len().min(len as usize);
                // SAFETY: `n` bytes of the buffer (`len` was checked), and as many in `rest`.
                unsafe { copy(rest.as_mut_ptr(), ptr, n) };
                in_head += n;
            }
            if i == 0 {
                let offload = last.offload::<C>();
                let more = found.len() as u16 - 1;
                *frame = Frame { ptr, first_len: len, len: total, more_at: used as u16, more, offload };
            } else if let Some(piece) = pieces.next() {
                *piece = Segment { ptr, len };
            }
        }
        Found::Frame(count, last.tag())
    }

    /// The device wrote what it cannot mean: the port stops. The frame at hand is not counted as received.
    fn broken(&self, at: u32, what: String) -> Found {
        self.core.state.fail(DeviceError::Broken { descriptor: at & self.mask, what });
        Found::Wait
    }
}
