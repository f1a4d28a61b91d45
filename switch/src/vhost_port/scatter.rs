//! The general copy into a receive ring: tags pushed and popped, frames of several segments, buffers of several descriptors,
//! mergeable buffers, dirty logging, and frames that must be finished in software because the receiver takes none unfinished.
//!
//! The pieces of a frame ([`Outgoing`]) are copied as one stream into a list of buffers. Sums are taken before anything is
//! written: a frame fits, or leaves the ring as it was.

use port::{Burst, DropReason, Frame, Head, Offload, Scratch, Segment, TagEdit};
use virtio::device::{Buffer, MAX_CHAIN, Ring, RingError};
use virtio::memory::copy::copy;

use super::tx::{Receiver, Refusal};
use crate::outgoing::{Destination, Outgoing};

/// Bytes of the longest frame that every receive buffer must hold: an Ethernet frame of 1500 bytes with a VLAN tag.
const ORDINARY: usize = 1518;

/// A guest's receive ring, as where frames of any shape go.
struct Chains<'r, 'c, R> {
    receiver: &'r Receiver<'c>,
    ring: &'r mut R,
}

impl<R: Ring> Destination for Chains<'_, '_, R> {
    type Broken = RingError;

    fn write(
        &mut self,
        offload: Offload,
        len: usize,
        pieces: impl Iterator<Item = Segment>,
    ) -> Result<(), Refusal> {
        self.receiver.write(self.ring, offload, len, pieces)
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
        out.send(self.accepts, &mut Chains { receiver: self, ring }, scratch, self.counters)
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
                // A driver that merges no buffers offers none that is too small for an ordinary frame (virtio 1.3,
                // 5.1.6.3.1). One that is goes back empty, or the ring would be stuck behind it; for a longer frame it
                // stays, and serves the next that fits.
                if chains == 1 && need <= self.header + ORDINARY {
                    ring.use_written(0);
                }
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
