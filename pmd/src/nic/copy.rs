//! A frame is copied into buffers of a pool, its VLAN tag edited on the way: how every driver sends what does not lie in a buffer
//! that its device can read.

use port::{Burst, DropReason, Frame, HEAD, Head, Offload, TagEdit};
use virtio::memory::copy::copy;

use crate::dma::{BUFFER, Pool};

/// Bytes of a VLAN tag, and where it begins.
const TAG: u32 = 4;
const TAG_AT: usize = 12;

/// Most buffers of a frame: 16 KiB, more than any card here sends.
pub(crate) const MOST_BUFFERS: u32 = 8;

/// What becomes of a frame on its way out.
pub(crate) struct Plan {
    /// What is still to be edited; the rest is the device's.
    pub(crate) edit: TagEdit,
    /// The tag that the device inserts.
    pub(crate) inserts: Option<u16>,
    /// Bytes that it becomes longer by.
    by: i16,
    /// What is left to do, as it stands after the edit.
    pub(crate) offload: Offload,
}

impl Plan {
    /// For `frame` and a device that sends frames of `max` bytes and, if `device_inserts`, inserts tags.
    pub(crate) fn new(
        frame: &Frame,
        edit: TagEdit,
        max: u32,
        device_inserts: bool,
    ) -> Result<Self, DropReason> {
        let grows = matches!(edit, TagEdit::Push(_));
        let shrinks = matches!(edit, TagEdit::Pop);
        if frame.len + if grows { TAG } else { 0 } > max + if shrinks { TAG } else { 0 } {
            return Err(DropReason::MtuExceeded);
        }
        if frame.len < TAG_AT as u32 + 2 + if shrinks { TAG } else { 0 } {
            return Err(DropReason::Runt);
        }
        let (edit, inserts) = match edit {
            TagEdit::Push(tci) if device_inserts => (TagEdit::Keep, Some(tci)),
            edit => (edit, None),
        };
        let by = match edit {
            TagEdit::Push(_) => TAG as i16,
            TagEdit::Pop => -(TAG as i16),
            TagEdit::Keep | TagEdit::SetVid(_) => 0,
        };
        let offload = frame.offload.moved(by).ok_or(DropReason::CannotFinish)?;
        Ok(Self { edit, inserts, by, offload })
    }

    /// Bytes of the frame when it was edited.
    pub(crate) fn len(&self, frame: &Frame) -> u32 {
        frame.len.saturating_add_signed(self.by.into())
    }
}

/// The pieces that a frame lies in.
pub(crate) fn pieces<'b>(burst: &'b Burst<'_>, frame: &Frame) -> impl Iterator<Item = (*const u8, u32)> + 'b {
    std::iter::once((frame.ptr, frame.first_len)).chain(burst.more(frame).iter().map(|s| (s.ptr, s.len)))
}

/// Replaces the VLAN identifier of the outermost tag, and leaves its priority.
fn set_vid(head: &mut [u8; HEAD], vid: u16) {
    if let Some([a, b]) = head.get_mut(TAG_AT + 2..TAG_AT + 4) {
        let tci = u16::from_be_bytes([*a, *b]) & 0xf000 | vid & 0xfff;
        [*a, *b] = tci.to_be_bytes();
    }
}

/// Copies a frame into buffers, piece by piece.
pub(crate) struct Writer<'p> {
    pool: &'p mut Pool,
    buffers: [u32; MOST_BUFFERS as usize],
    count: usize,
    total: usize,
    room: usize,
}

impl<'p> Writer<'p> {
    /// With `count` buffers of `pool`, or none if it does not have as many.
    pub(crate) fn new(pool: &'p mut Pool, count: u32) -> Option<Self> {
        let mut writer = Self {
            buffers: [0; MOST_BUFFERS as usize],
            count: 0,
            total: 0,
            room: (count.min(MOST_BUFFERS) * BUFFER) as usize,
            pool,
        };
        for _ in 0..count.min(MOST_BUFFERS) {
            let Some(index) = writer.pool.take() else {
                for &index in writer.buffers.get(..writer.count).unwrap_or_default() {
                    writer.pool.put(index);
                }
                return None;
            };
            if let Some(place) = writer.buffers.get_mut(writer.count) {
                *place = index;
                writer.count += 1;
            }
        }
        Some(writer)
    }

    /// Appends `len` bytes at `from`, which are mapped; what does not fit is left out.
    pub(crate) fn append(&mut self, mut from: *const u8, len: usize) {
        let mut left = len.min(self.room - self.total);
        while left > 0 {
            let (buffer, at) = (self.total / BUFFER as usize, self.total % BUFFER as usize);
            let Some(&index) = self.buffers.get(buffer) else { break };
            let n = left.min(BUFFER as usize - at);
            // SAFETY: `n` bytes at `from` are mapped (a piece of the private head, or of a frame that the burst lends); the
            // buffer has `n` bytes at `at`, and is nobody else's.
            unsafe { copy(self.pool.arena().view().ptr(index).wrapping_add(at), from, n) };
            (from, left, self.total) = (from.wrapping_add(n), left - n, self.total + n);
        }
    }

    /// Appends a frame, edited; its head from the private copy.
    pub(crate) fn frame(&mut self, burst: &Burst<'_>, frame: &Frame, head: &Head, edit: TagEdit) {
        let in_head = (frame.len as usize).min(HEAD);
        let Head(mut head) = *head;
        let resume = match edit {
            TagEdit::SetVid(vid) => {
                set_vid(&mut head, vid);
                0
            }
            TagEdit::Pop => {
                self.append(head.as_ptr(), TAG_AT);
                TAG_AT + TAG as usize
            }
            TagEdit::Push(tci) => {
                let [a, b] = tci.to_be_bytes();
                self.append(head.as_ptr(), TAG_AT);
                self.append([0x81, 0x00, a, b].as_ptr(), TAG as usize);
                TAG_AT
            }
            TagEdit::Keep => 0,
        };
        self.append(head.as_ptr().wrapping_add(resume), in_head - resume);
        let mut skip = in_head;
        for (ptr, len) in pieces(burst, frame) {
            let len = len as usize;
            let n = skip.min(len);
            skip -= n;
            self.append(ptr.wrapping_add(n), len - n);
        }
    }

    /// The buffers, in order, and the bytes in all of them.
    pub(crate) fn finish(self) -> ([u32; MOST_BUFFERS as usize], u32) {
        (self.buffers, self.total as u32)
    }
}
