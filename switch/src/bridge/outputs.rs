//! Where the frames of one burst go: a worker's scratch, filled by the bridge and emptied by the worker.
//!
//! Allocated once. Holds sets of frames only, never frames.

use super::portset::MAX_PORTS;
use super::vlan::Class;
use port::{DropReason, FrameSet, MAX_BURST, TagEdit};

/// One set for each kind of tag edit.
const EDITS: usize = 4;

/// The sets of frames of one burst by output port and tag edit. One per worker.
pub struct Outputs {
    /// By port, then by kind of edit. All empty but those of the ports in `order`.
    sets: Box<[[FrameSet; EDITS]; MAX_PORTS]>,
    /// Ports with a set that is not empty, in the order in which they were first met.
    order: Box<[u16; MAX_PORTS]>,
    touched: usize,
    /// The VLAN that tags get: one for a burst, because only frames that came in without a VLAN of their own get one, and those
    /// of one port all belong to the same.
    vid: u16,
    /// Frames that go somewhere.
    pub(super) switched: FrameSet,
    /// Copies of them, over all ports.
    pub(super) replicas: u32,
    /// Frames that go nowhere, by reason; all empty between bursts.
    refused: Box<[FrameSet; DropReason::COUNT]>,
    /// One bit for each reason with a set that is not empty.
    reasons: u32,
    /// The class of each frame that is to be flooded, where classes differ.
    pub(super) classes: Box<[Class; MAX_BURST]>,
}

impl Default for Outputs {
    fn default() -> Self {
        const { assert!(DropReason::COUNT <= u32::BITS as usize) };
        Self {
            sets: Box::new([[FrameSet::EMPTY; EDITS]; MAX_PORTS]),
            order: Box::new([0; MAX_PORTS]),
            touched: 0,
            vid: 0,
            switched: FrameSet::EMPTY,
            replicas: 0,
            refused: Box::new([FrameSet::EMPTY; DropReason::COUNT]),
            reasons: 0,
            classes: Box::new([Class::UNAWARE; MAX_BURST]),
        }
    }
}

impl Outputs {
    /// Takes out the sets, in the order in which their ports were first met: what is to be sent, to which port, with which
    /// edit. No set is empty.
    #[inline(always)]
    pub fn drain(&mut self) -> impl Iterator<Item = (u16, FrameSet, TagEdit)> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            while at < self.touched {
                let port = self.order[at];
                let sets = &mut self.sets[usize::from(port)];
                if let Some(kind) = sets.iter().position(|set| !set.is_empty()) {
                    return Some((port, std::mem::take(&mut sets[kind]), edit_of(kind, self.vid)));
                }
                at += 1;
            }
            self.touched = 0;
            None
        })
    }

    /// How many ports have something to send.
    #[inline(always)]
    pub fn ports(&self) -> usize {
        self.touched
    }

    /// Empty for the next burst, even if the last one was not drained to the end.
    #[inline(always)]
    pub(super) fn begin(&mut self) {
        if self.touched != 0 {
            self.drain().for_each(drop);
        }
        self.switched = FrameSet::EMPTY;
        self.replicas = 0;
    }

    /// Sends `set`, which is not empty, to `port`.
    #[inline(always)]
    pub(super) fn add(&mut self, port: u16, edit: TagEdit, set: FrameSet) {
        let kind = match edit {
            TagEdit::Keep => 0,
            TagEdit::Pop => 1,
            TagEdit::Push(vid) => {
                self.vid = vid;
                2
            }
            TagEdit::SetVid(vid) => {
                self.vid = vid;
                3
            }
        };
        let sets = &mut self.sets[usize::from(port) % MAX_PORTS];
        if *sets == [FrameSet::EMPTY; EDITS] && self.touched < MAX_PORTS {
            self.order[self.touched] = port;
            self.touched += 1;
        }
        sets[kind] = FrameSet(sets[kind].0 | set.0);
        self.switched = FrameSet(self.switched.0 | set.0);
        self.replicas += set.len() as u32;
    }

    /// Notes that the frames of `set` go nowhere.
    #[inline(always)]
    pub(super) fn refuse(&mut self, set: FrameSet, reason: DropReason) {
        let refused = &mut self.refused[reason as usize];
        *refused = FrameSet(refused.0 | set.0);
        self.reasons |= u32::from(!set.is_empty()) << reason as u32;
    }

    /// Takes out what goes nowhere.
    #[inline(always)]
    pub(super) fn drain_refused(&mut self, mut report: impl FnMut(FrameSet, DropReason)) {
        while self.reasons != 0 {
            let reason = self.reasons.trailing_zeros() as usize;
            self.reasons &= self.reasons - 1;
            if let (Some(set), Some(reason)) = (self.refused.get_mut(reason), DropReason::ALL.get(reason)) {
                report(std::mem::take(set), *reason);
            }
        }
    }
}

fn edit_of(kind: usize, vid: u16) -> TagEdit {
    match kind {
        0 => TagEdit::Keep,
        1 => TagEdit::Pop,
        2 => TagEdit::Push(vid),
        _ => TagEdit::SetVid(vid),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_come_out_once_by_port_in_the_order_in_which_ports_were_met() {
        let mut out = Outputs::default();
        out.begin();
        out.add(200, TagEdit::Keep, FrameSet(0b1));
        out.add(3, TagEdit::Push(10), FrameSet(0b10));
        out.add(200, TagEdit::Keep, FrameSet(0b100));
        out.add(3, TagEdit::Pop, FrameSet(0b1000));
        assert_eq!((out.ports(), out.switched, out.replicas), (2, FrameSet(0b1111), 4));
        let drained: Vec<_> = out.drain().collect();
        assert_eq!(
            drained,
            [
                (200, FrameSet(0b101), TagEdit::Keep),
                (3, FrameSet(0b1000), TagEdit::Pop),
                (3, FrameSet(0b10), TagEdit::Push(10)),
            ]
        );
        assert_eq!((out.drain().count(), out.ports()), (0, 0));
    }

    #[test]
    fn what_a_worker_left_is_not_sent_with_the_next_burst() {
        let mut out = Outputs::default();
        out.add(1, TagEdit::Keep, FrameSet(0b1));
        out.add(2, TagEdit::Keep, FrameSet(0b1));
        out.drain().next();
        out.begin();
        out.add(2, TagEdit::Pop, FrameSet(0b10));
        assert_eq!(out.drain().collect::<Vec<_>>(), [(2, FrameSet(0b10), TagEdit::Pop)]);
    }
}
