//! The general copy into a receive ring: tags pushed and popped, frames of several segments, buffers of several descriptors,
//! mergeable buffers, dirty logging, and frames that must be finished in software because the receiver takes none unfinished.
//!
//! A frame is a list of pieces (its edited head, then what the sender's memory holds behind the head), copied as one stream
//! into a list of buffers. Sums are taken before anything is written: a frame fits, or leaves the ring as it was.

use port::{Burst, DropReason, Frame, HEAD, Head, Offload, Scratch, Segment, TagEdit};
use virtio::device::{Buffer, MAX_CHAIN, Ring};
use virtio::memory::copy::copy;

use super::tx::{Receiver, Refusal};
use crate::offload::{self, Segments, Work};

/// Bytes of a VLAN tag.
const TAG: usize = 4;

/// Where a VLAN tag sits: behind the two addresses.
const TAG_AT: usize = 12;

/// A frame as it will leave: its head, edited, then the bytes behind it.
struct Outgoing<'b> {
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
    fn new(burst: &'b Burst<'_>, frame: &Frame, head: &Head, edit: TagEdit) -> Option<Self> {
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

    /// The frame's bytes as pieces of memory, in order.
    fn pieces(&self) -> impl Iterator<Item = Segment> + '_ {
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
}

impl Receiver<'_> {
    /// Sends one frame of any shape. Returns its length as it was sent.
    #[cold]
    #[inline(never)]
    pub(super) fn send_any<R: Ring>(
        &self,
        ring: &mut R,
        burst: &Burst<'_>,
        frame: &Frame,
        head: &Head,
        edit: TagEdit,
        scratch: &mut Scratch,
    ) -> Result<u32, Refusal> {
        let bad_offload = Refusal::Drop(DropReason::BadOffload);
        let out = Outgoing::new(burst, frame, head, edit).ok_or(bad_offload)?;
        match self.accepts.work(&out.offload) {
            Work::Nothing => {
                self.write(ring, out.offload, out.len, out.pieces())?;
                Ok(out.len as u32)
            }
            Work::Checksum => self.finish(ring, &out, scratch),
            Work::Cut => self.cut(ring, &out, scratch),
        }
    }

    /// Fills in the checksum that the sender left out, in private memory, and sends the result.
    fn finish<R: Ring>(
        &self,
        ring: &mut R,
        out: &Outgoing<'_>,
        scratch: &mut Scratch,
    ) -> Result<u32, Refusal> {
        if !scratch.spend(0, out.len as u32) {
            return Err(Refusal::Drop(DropReason::SegmentBudget));
        }
        let whole = out.gather(&mut scratch.frame).ok_or(Refusal::Drop(DropReason::Oversize))?;
        offload::finish_checksum(whole, &out.offload).map_err(|e| Refusal::Drop(e.reason()))?;
        self.write(ring, Offload::NONE, out.len, std::iter::once(piece(whole)))?;
        Ok(out.len as u32)
    }

    /// Cuts a frame that the sender left unsegmented, in private memory, and sends the segments. A receiver that runs full in
    /// the middle loses the rest, as it would on a wire; the frame counts as sent if its first segment was.
    fn cut<R: Ring>(&self, ring: &mut R, out: &Outgoing<'_>, scratch: &mut Scratch) -> Result<u32, Refusal> {
        let refused = |e: offload::OffloadRefused| Refusal::Drop(e.reason());
        let most = (out.len as u32).div_ceil(u32::from(out.offload.gso_size()).max(1));
        if !scratch.spend(most, out.len as u32) {
            return Err(Refusal::Drop(DropReason::SegmentBudget));
        }
        let Scratch { frame, segment, .. } = scratch;
        let whole = out.gather(frame).ok_or(Refusal::Drop(DropReason::Oversize))?;
        let mut segments = Segments::new(whole, &out.offload, most as usize).map_err(refused)?;
        let mut sent = 0;
        while let Some(n) = segments.write_next(segment).map_err(refused)? {
            let Some(bytes) = segment.get(..n) else { break };
            match self.write(ring, Offload::NONE, n, std::iter::once(piece(bytes))) {
                Ok(()) => {}
                Err(Refusal::Drop(_)) if sent > 0 => break,
                Err(e) => return Err(e),
            }
            self.counters.segments.add(1);
            sent += n as u32;
        }
        Ok(sent)
    }

    /// Writes a virtio-net header and `len` bytes into as many chains as it takes.
    fn write<R: Ring>(
        &self,
        ring: &mut R,
        offload: Offload,
        len: usize,
        pieces: impl Iterator<Item = Segment>,
    ) -> Result<(), Refusal> {
        let need = self.header + len;
        let chains = self.reserve(ring, need)?;
        let mut net_header = [0u8; 12];
        let (low, high) = net_header.split_at_mut(8);
        low.copy_from_slice(&offload.low.to_le_bytes());
        if let [o0, o1, n0, n1] = high {
            [*o0, *o1] = offload.csum_offset.to_le_bytes();
            [*n0, *n1] = chains.to_le_bytes();
        }
        let header = Segment { ptr: net_header.as_ptr(), len: self.header as u32 };
        let mut stream = std::iter::once(header).chain(pieces);
        let mut piece = Segment { ptr: std::ptr::null(), len: 0 };
        let mut left = need;
        for _ in 0..chains {
            let written = left.min(ring.stock().get(0).total as usize);
            Self::fill(ring, written, &mut piece, &mut stream);
            ring.use_written(written as u32);
            left -= written;
        }
        Ok(())
    }

    /// How many chains hold `need` bytes: one, unless the receiver merges buffers.
    fn reserve<R: Ring>(&self, ring: &mut R, need: usize) -> Result<u16, Refusal> {
        let most = if self.mergeable { MAX_CHAIN } else { 1 };
        let (mut chains, mut room) = (0, 0);
        while room < need {
            if chains == most {
                return Err(Refusal::Drop(DropReason::ReceiverTooSmall));
            }
            if chains == ring.stock().len() && ring.fetch(chains + 1).map_err(Refusal::Broken)? == chains {
                return Err(Refusal::Drop(DropReason::ReceiverFull));
            }
            let total = ring.stock().get(chains).total as usize;
            if total == 0 {
                // Not a receive buffer at all: it goes back empty, with those before it, so that the ring moves on.
                for _ in 0..=chains {
                    ring.use_written(0);
                }
                return Err(Refusal::Drop(DropReason::ReceiverTooSmall));
            }
            room += total;
            chains += 1;
        }
        Ok(chains as u16)
    }

    /// Copies the next `n` bytes of the stream into the first chain in stock, which holds at least as many.
    fn fill<R: Ring>(ring: &R, n: usize, piece: &mut Segment, stream: &mut impl Iterator<Item = Segment>) {
        let stock = ring.stock();
        let chain = stock.get(0);
        let first = Buffer { ptr: chain.ptr, len: chain.len };
        let mut left = n;
        for buffer in std::iter::once(&first).chain(stock.more(chain)) {
            let (mut to, mut room) = (buffer.ptr, (buffer.len as usize).min(left));
            if let Some(log) = &ring.setup().log
                && let Some(region) = ring.setup().memory.region_of_host(to)
            {
                log.mark(region.guest + (to as u64 - region.host as u64), room as u64);
            }
            left -= room;
            while room > 0 {
                if piece.len == 0 {
                    let Some(next) = stream.next() else { return };
                    *piece = next;
                    continue;
                }
                let n = room.min(piece.len as usize);
                // SAFETY: `n` bytes at `to` are in the receiver's memory (the chain was checked at fetch), `n` bytes at
                // `piece.ptr` are in the sender's or private; see `send` about overlap.
                unsafe { copy(to, piece.ptr, n) };
                to = to.wrapping_add(n);
                room -= n;
                *piece = Segment { ptr: piece.ptr.wrapping_add(n), len: piece.len - n as u32 };
            }
            if left == 0 {
                return;
            }
        }
    }
}

/// Private bytes as a piece.
fn piece(bytes: &[u8]) -> Segment {
    Segment { ptr: bytes.as_ptr(), len: bytes.len() as u32 }
}
