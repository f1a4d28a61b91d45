//! From a device's receive queue into a burst.
//!
//! Copies each frame's first bytes once, into the worker's memory; refuses what cannot be a frame; lends the rest out of the
//! driver's buffers.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use port::{
    Burst, BurstBuffer, DropReason, Frame, FrameSet, HEAD, Head, MAX_BURST, Release, RxQueue, Source,
};
use virtio::memory::copy::{copy, full_fence};

use super::kinds::each;
use super::{DeviceRx, Inlet, Sources, fail};
use crate::claim::{Entered, Owner};
use crate::counters::RxCounters;
use crate::sleeper::{Kick, Sleeper};
use crate::slot::{Polled, PortShared, Running, RxState};

/// A device's receive queue between its opening and its end.
pub struct Receiving {
    inlet: Inlet,
    /// Wakes a sleeping worker; `None`: there is nothing to wake for.
    wake: Option<Kick>,
    /// Set when the device went away: it is not asked any more.
    broken: bool,
}

impl Receiving {
    /// # Errors
    /// The process has no descriptors left.
    pub(super) fn new(inlet: Inlet) -> io::Result<Self> {
        let waker = match &inlet {
            Inlet::Device(source) => each!(Sources, source, s => s.waker()),
            Inlet::Card(card) => card.bell.as_ref().map(AsFd::as_fd),
        };
        // A descriptor of its own: epoll forgets one when it is closed, and the device keeps its.
        let wake = waker.map(|fd| fd.try_clone_to_owned().map(Kick::new)).transpose()?;
        Ok(Self { inlet, wake, broken: false })
    }

    /// How many frames are here, at most `limit`; none of a device that is gone.
    fn look(&mut self, port: &PortShared, limit: usize) -> usize {
        let source = match &mut self.inlet {
            Inlet::Device(source) => source,
            Inlet::Card(card) => return card.queue.peek(),
        };
        match each!(Sources, source, s => s.look(limit)) {
            Ok(n) => n,
            Err(error) => {
                self.broken = true;
                fail(port, error);
                0
            }
        }
    }
}

/// A device's receive queue, claimed for one burst.
pub(crate) struct ReceiveQueue<'c> {
    receiving: &'c mut Receiving,
    port: &'c PortShared,
    counters: &'c RxCounters,
    limit: usize,
}

impl Running for Receiving {
    type Queue<'c> = ReceiveQueue<'c>;

    fn number(index: u16) -> usize {
        usize::from(index)
    }

    fn polled<'c>(
        slot: &'c DeviceRx,
        entered: &'c mut Entered<'_, RxState<Self>>,
        limit: usize,
    ) -> Option<Polled<'c, ReceiveQueue<'c>>> {
        let RxState { ring, ingress, likely } = &mut **entered;
        let receiving = ring.as_mut().filter(|r| !r.broken)?;
        let (port, counters) = (&*slot.port, &slot.counters);
        let ring = ReceiveQueue { receiving, port, counters, limit: limit.min(MAX_BURST) };
        Some(Polled { ring, ingress, likely })
    }
}

impl DeviceRx {
    /// Its worker goes elsewhere.
    pub(crate) fn leave(&self, owner: &mut Owner) {
        self.state.leave(owner);
    }

    /// Before a worker sleeps: lets `sleeper` hear the device. True if the worker must not sleep: frames wait, or somebody else has
    /// the queue.
    pub(crate) fn arm(&self, owner: &mut Owner, sleeper: &Arc<Sleeper>) -> bool {
        let Some(mut entered) = self.state.enter(owner) else { return true };
        let Some(receiving) = entered.ring.as_mut().filter(|r| !r.broken) else { return false };
        match &mut receiving.inlet {
            Inlet::Device(source) => {
                let Some(wake) = &mut receiving.wake else { return false };
                wake.watch(sleeper);
                each!(Sources, source, s => s.before_sleep());
                // What came since the device last had nothing is heard: each arrival is an event, and so is the first watch.
                receiving.look(&self.port, 1) > 0
            }
            Inlet::Card(card) => {
                // A card without interrupts wakes nobody: its worker polls on.
                let Some(wake) = &mut receiving.wake else { return true };
                wake.watch(sleeper);
                card.queue.arm()
            }
        }
    }

    /// After a worker slept, or did not after all: a card's interrupts cost time that polling has better use for.
    pub(crate) fn disarm(&self, owner: &mut Owner) {
        if let Some(mut entered) = self.state.enter(owner)
            && let Some(Receiving { inlet: Inlet::Card(card), wake: Some(_), .. }) = entered.ring.as_mut()
        {
            card.queue.disarm();
        }
    }
}

impl RxQueue for ReceiveQueue<'_> {
    fn peek(&mut self) -> usize {
        self.receiving.look(self.port, self.limit)
    }

    fn poll<'q>(&'q mut self, buffer: &'q mut BurstBuffer) -> Burst<'q> {
        let source = match &mut self.receiving.inlet {
            Inlet::Device(source) => source,
            Inlet::Card(card) => {
                let came = card.poll(buffer, self.counters);
                return Burst::new(self, buffer, came);
            }
        };
        let came = each!(Sources, source, s => s.lend(&mut buffer.frames[..]));
        let (mut kept, mut bytes) = (0, 0u64);
        for i in 0..came.min(MAX_BURST) {
            let Some(&frame) = buffer.frames.get(i) else { break };
            let (Some(slot), Some(head)) = (buffer.frames.get_mut(kept), buffer.heads.get_mut(kept)) else {
                break;
            };
            *slot = frame;
            *head = read_head(&frame);
            match slot.check() {
                Ok(()) => {
                    bytes += u64::from(frame.len);
                    kept += 1;
                }
                Err(reason) => self.counters.drops.add(reason, 1),
            }
        }
        if came > 0 {
            self.counters.received.add(came as u64);
            self.counters.bytes.add(bytes);
            self.counters.bursts.add(1);
        }
        if kept == 0 {
            // An empty burst is not released.
            self.release();
        }
        Burst::new(self, buffer, kept)
    }
}

/// The frame's first bytes; zeros past its end.
fn read_head(frame: &Frame) -> Head {
    let mut head = Head([0; HEAD]);
    let n = frame.first_len.min(frame.len).min(HEAD as u32) as usize;
    // SAFETY: `first_len` bytes at `ptr` are in the driver's buffer until the burst is released ([`Source::lend`]).
    unsafe { copy(head.0.as_mut_ptr(), frame.ptr, n) };
    head
}

impl Release for ReceiveQueue<'_> {
    fn release(&mut self) {
        match &mut self.receiving.inlet {
            Inlet::Device(source) => each!(Sources, source, s => s.take_back()),
            Inlet::Card(card) => card.queue.release(),
        }
        full_fence();
    }

    fn dropped(&mut self, set: FrameSet, reason: DropReason) {
        self.counters.drops.add(reason, set.len() as u64);
    }
}
