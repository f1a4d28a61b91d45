//! The adapter's side of its virtual functions' mailboxes (82576 datasheet 7.10.2.9). Knows no message, and never waits: a function that
//! keeps its mailbox to itself loses what it wrote.

use super::message::WORDS;
use super::regs::{P2VMAILBOX, VMBMEM};
use crate::access::{Bar, Regs};

/// What a mailbox holds.
pub(super) type Message = [u32; WORDS as usize];

/// Takes the mailbox of `vf`; false if the function has it. Then it is taken from the function, for the next time.
fn lock<B: Bar>(regs: &Regs<B>, vf: u32) -> bool {
    regs.write(P2VMAILBOX(vf), P2VMAILBOX::PFU);
    let locked = P2VMAILBOX::PFU.are_in(regs.read(P2VMAILBOX(vf)));
    if !locked {
        regs.write(P2VMAILBOX(vf), P2VMAILBOX::RVFU);
    }
    locked
}

/// The message of `vf`, read once. The mailbox stays taken until [`done`] or [`reply`].
pub(super) fn take<B: Bar>(regs: &Regs<B>, vf: u32) -> Option<Message> {
    lock(regs, vf).then(|| std::array::from_fn(|i| regs.read(VMBMEM(WORDS * vf + i as u32))))
}

/// Gives the mailbox back: the message was taken.
pub(super) fn done<B: Bar>(regs: &Regs<B>, vf: u32) {
    regs.write(P2VMAILBOX(vf), P2VMAILBOX::ACK);
}

/// Gives it back with an answer.
pub(super) fn reply<B: Bar>(regs: &Regs<B>, vf: u32, words: &[u32]) {
    for (i, word) in (WORDS * vf..).zip(words) {
        regs.write_number(VMBMEM(i), *word);
    }
    regs.write(P2VMAILBOX(vf), P2VMAILBOX::ACK | P2VMAILBOX::STS);
}

/// Tells `vf` something unasked, if its mailbox is free; whether it was.
pub(super) fn tell<B: Bar>(regs: &Regs<B>, vf: u32, word: u32) -> bool {
    let locked = lock(regs, vf);
    if locked {
        regs.write_number(VMBMEM(WORDS * vf), word);
        regs.write(P2VMAILBOX(vf), P2VMAILBOX::STS);
    }
    locked
}
