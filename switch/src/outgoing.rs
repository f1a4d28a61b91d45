//! A frame on its way out of any kind of port: its tag pushed or popped, and what its sender left undone finished in software
//! where the receiver wants that.
//!
//! A frame is a list of pieces: its edited head, a private copy, then what the sender's memory holds behind the head. Where they
//! end up is the [`Destination`]'s business; whole frames are gathered only if they must be finished.

use port::{Burst, DropReason, Frame, HEAD, Head, Offload, Scratch, Segment, TagEdit};
use virtio::memory::copy::copy;

use crate::counters::TxCounters;
use crate::offload::{self, Accepts, Segments, Work};

/// Where frames go, for as long as one burst is sent.
pub(crate) trait Destination {
    /// Why it takes nothing any more.
    type Broken;

    /// Takes one frame of `len` bytes, in `pieces`, whole or not at all.
    fn write(
        &mut self,
        offload: Offload,
        len: usize,
        pieces: impl Iterator<Item = Segment>,
    ) -> Result<(), Refusal<Self::Broken>>;
}

/// Why a frame was not sent.
pub(crate) enum Refusal<B> {
    /// Counted under this reason; the burst goes on.
    Drop(DropReason),
    /// The destination broke; the burst ends.
    Broken(B),
}

/// Bytes of a VLAN tag.
const TAG: usize = 4;

/// Where a VLAN tag sits: behind the two addresses.
const TAG_AT: usize = 12;

/// A frame as it will leave: its head, edited, then the bytes behind it.
pub(crate) struct Outgoing<'b> {
    head: [u8; HEAD + TAG],
    head_len: usize,
    /// Bytes of the frame that the head stands for.
    skip: usize,
    len: usize,
    first: Segment,
    more: &'b [Segment],
    offload: Offload,
}

impl<'b> Outgoing<'b> {
    /// `None` if the frame's checksum would begin outside the frame without its tag.
    pub(crate) fn new(burst: &'b Burst<'_>, frame: &Frame, head: &Head, edit: TagEdit) -> Option<Self> {
        let len = frame.len as usize;
        let skip = len.min(HEAD);
        let mut out = Self {
            head: [0; HEAD + TAG],
            head_len: skip,
            skip,
            len,
            first: Segment { ptr: frame.ptr, len: frame.first_len },
            more: burst.more(frame),
            offload: frame.offload,
        };
        let (addresses, rest) = head.0.split_at(TAG_AT);
        let (to_addresses, to_rest) = out.head.split_at_mut(TAG_AT);
        to_addresses.copy_from_slice(addresses);
        match edit {
            TagEdit::Push(tci) => {
                let (tag, to_rest) = to_rest.split_at_mut(TAG);
                let [hi, lo] = tci.to_be_bytes();
                tag.copy_from_slice(&[0x81, 0x00, hi, lo]);
                to_rest.copy_from_slice(rest);
                (out.head_len, out.len) = (out.head_len + TAG, out.len + TAG);
                out.offload = out.offload.moved(TAG as i16)?;
            }
            // The pipeline only pops a tag that it saw; a frame too short to have one is left alone.
            TagEdit::Pop if skip >= TAG_AT + TAG => {
                let (_, behind) = rest.split_at(TAG);
                let (to_behind, _) = to_rest.split_at_mut(behind.len());
                to_behind.copy_from_slice(behind);
                (out.head_len, out.len) = (out.head_len - TAG, out.len - TAG);
                out.offload = out.offload.moved(-(TAG as i16))?;
            }
            TagEdit::SetVid(vid) => {
                to_rest[..rest.len()].copy_from_slice(rest);
                if let [_, _, hi, lo, ..] = to_rest {
                    let tci = u16::from_be_bytes([*hi, *lo]) & 0xf000 | vid & 0x0fff;
                    [*hi, *lo] = tci.to_be_bytes();
                }
            }
            TagEdit::Keep | TagEdit::Pop => to_rest[..rest.len()].copy_from_slice(rest),
        }
        Some(out)
    }

    /// What is left undone of it.
    pub(crate) fn offload(&self) -> Offload {
        self.offload
    }

    /// Its length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The frame's bytes as pieces of memory, in order.
    pub(crate) fn pieces(&self) -> impl Iterator<Item = Segment> + '_ {
        let head = Segment { ptr: self.head.as_ptr(), len: self.head_len as u32 };
        let mut skip = self.skip as u32;
        let sent = std::iter::once(&self.first).chain(self.more).filter_map(move |s| {
            let n = skip.min(s.len);
            skip -= n;
            (s.len > n).then(|| Segment { ptr: s.ptr.wrapping_add(n as usize), len: s.len - n })
        });
        std::iter::once(head).chain(sent)
    }

    /// Gathers the whole frame into private memory.
    fn gather<'s>(&self, room: &'s mut [u8]) -> Option<&'s mut [u8]> {
        let room = room.get_mut(..self.len)?;
        let mut at = 0;
        for piece in self.pieces() {
            let n = (piece.len as usize).min(room.len() - at);
            // SAFETY: `n` bytes at `piece.ptr` are in the sender's memory (or in `self.head`), and fit behind `at`.
            unsafe { copy(room.as_mut_ptr().add(at), piece.ptr, n) };
            at += n;
        }
        Some(room)
    }

    /// Sends it to a destination that accepts this much undone. Returns its length as it was sent.
    pub(crate) fn send<D: Destination>(
        &self,
        accepts: Accepts,
        to: &mut D,
        scratch: &mut Scratch,
        counters: &TxCounters,
    ) -> Result<u32, Refusal<D::Broken>> {
        match accepts.work(&self.offload) {
            Work::Nothing => {
                to.write(self.offload, self.len, self.pieces())?;
                Ok(self.len as u32)
            }
            Work::Checksum => self.finish(to, scratch),
            Work::Cut => self.cut(to, scratch, counters),
        }
    }

    /// Fills in the checksum that the sender left out, in private memory, and sends the result.
    fn finish<D: Destination>(&self, to: &mut D, scratch: &mut Scratch) -> Result<u32, Refusal<D::Broken>> {
        if !scratch.spend(0, self.len as u32) {
            return Err(Refusal::Drop(DropReason::SegmentBudget));
        }
        let whole = self.gather(&mut scratch.frame).ok_or(Refusal::Drop(DropReason::Oversize))?;
        offload::finish_checksum(whole, &self.offload).map_err(|e| Refusal::Drop(e.reason()))?;
        to.write(Offload::NONE, self.len, std::iter::once(piece(whole)))?;
        Ok(self.len as u32)
    }

    /// Cuts a frame that the sender left unsegmented, in private memory, and sends the segments. A receiver that runs full in
    /// the middle loses the rest, as it would on a wire; the frame counts as sent if its first segment was.
    fn cut<D: Destination>(
        &self,
        to: &mut D,
        scratch: &mut Scratch,
        counters: &TxCounters,
    ) -> Result<u32, Refusal<D::Broken>> {
        let most = (self.len as u32).div_ceil(u32::from(self.offload.gso_size()).max(1));
        if !scratch.spend(most, self.len as u32) {
            return Err(Refusal::Drop(DropReason::SegmentBudget));
        }
        let Scratch { frame, segment, .. } = scratch;
        let whole = self.gather(frame).ok_or(Refusal::Drop(DropReason::Oversize))?;
        let segments = Segments::new(whole, &self.offload, most as usize);
        let mut segments = segments.map_err(|e| Refusal::Drop(e.reason()))?;
        let mut sent = 0;
        while let Some(n) = segments.write_next(segment).map_err(|e| Refusal::Drop(e.reason()))? {
            let Some(bytes) = segment.get(..n) else { break };
            match to.write(Offload::NONE, n, std::iter::once(piece(bytes))) {
                Ok(()) => {}
                Err(Refusal::Drop(_)) if sent > 0 => break,
                Err(e) => return Err(e),
            }
            counters.segments.add(1);
            sent += n as u32;
        }
        Ok(sent)
    }
}

/// Private bytes as a piece.
fn piece(bytes: &[u8]) -> Segment {
    Segment { ptr: bytes.as_ptr(), len: bytes.len() as u32 }
}
