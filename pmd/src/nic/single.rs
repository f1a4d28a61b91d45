//! A card's transmit queue as a [`Sink`]: frames one by one, from wherever they lie, for whoever had to finish them in private
//! memory. Bursts go to the queue itself, which copies none that lies in its arena.

use std::io;
use std::sync::Arc;

use port::{
    Burst, BurstBuffer, DropReason, Frame, HEAD, Nobody, Offload, PutError, Scratch, Segment, Sink, TagEdit,
    TxQueue,
};
use virtio::memory::copy::copy;

use super::TransmitCounters;

/// The queue, and a burst of one.
pub struct Single<Q> {
    /// The queue itself.
    pub queue: Q,
    counters: Arc<TransmitCounters>,
    buffer: BurstBuffer,
    scratch: Scratch,
}

impl<Q: TxQueue> Single<Q> {
    /// `counters`: those of the queue.
    pub fn new(queue: Q, counters: Arc<TransmitCounters>) -> Self {
        Self { queue, counters, buffer: BurstBuffer::default(), scratch: Scratch::default() }
    }

    /// What the queue counts.
    pub fn counters(&self) -> &TransmitCounters {
        &self.counters
    }
}

impl<Q: TxQueue> Sink for Single<Q> {
    fn put(
        &mut self,
        offload: Offload,
        len: usize,
        pieces: impl Iterator<Item = Segment>,
    ) -> Result<(), PutError> {
        let BurstBuffer { heads, frames, segments } = &mut self.buffer;
        let ([head, ..], [frame, ..]) = (&mut heads[..], &mut frames[..]) else {
            return Err(PutError::Refused);
        };
        *frame = Frame { len: u32::try_from(len).map_err(|_| PutError::Refused)?, offload, ..Frame::EMPTY };
        head.0 = [0; HEAD];
        let mut copied = 0;
        for (i, piece) in pieces.enumerate() {
            if let Some(room) = head.0.get_mut(copied..) {
                let n = room.len().min(piece.len as usize);
                // SAFETY: `n` bytes at `piece.ptr` are there until this returns (the contract of `put`), and fit into the room.
                unsafe { copy(room.as_mut_ptr(), piece.ptr, n) };
                copied += n;
            }
            match i.checked_sub(1) {
                None => (frame.ptr, frame.first_len) = (piece.ptr, piece.len),
                Some(i) => {
                    *segments.get_mut(i).ok_or(PutError::Refused)? = piece;
                    frame.more = i as u16 + 1;
                }
            }
        }
        let before = (
            self.counters.sent.get(),
            self.counters.drops.get(DropReason::PortDown),
            self.counters.drops.get(DropReason::ReceiverFull),
        );
        let mut lender = Nobody;
        let burst = Burst::new(&mut lender, &self.buffer, 1);
        self.queue.send(&burst, burst.all(), TagEdit::Keep, &mut self.scratch);
        drop(burst);
        if self.counters.sent.get() != before.0 {
            Ok(())
        } else if self.counters.drops.get(DropReason::PortDown) != before.1 {
            Err(PutError::Down)
        } else if self.counters.drops.get(DropReason::ReceiverFull) != before.2 {
            Err(PutError::Full)
        } else {
            Err(PutError::Refused)
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.queue.notify();
        Ok(())
    }
}
