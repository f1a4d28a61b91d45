//! Functions that send on what they get: to the other interface, or back.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;

use super::side::{Side, wait};
use super::{Clock, Tell};
use crate::output;

/// The longest that nobody looks whether it is to end.
const NAP: Duration = Duration::from_millis(100);

/// `cableway vnf forward`.
pub(super) fn forward(one: &str, other: &str, tell: &Tell, stop: &AtomicBool) -> Result<()> {
    let (mut one, mut other) = (Side::open(one)?, Side::open(other)?);
    output::print(&format!("vnf: forwards between {} and {}\n", one.name, other.name))?;
    let mut clock = Clock::new(tell);
    let mut told = String::new();
    while !stop.load(Ordering::Relaxed) {
        let there = one.take(|frame, offload, _| other.out.send(offload, &[frame]))?;
        let back = other.take(|frame, offload, _| one.out.send(offload, &[frame]))?;
        if there + back == 0 {
            wait(&[&one, &other], NAP);
        }
        if clock.strikes() {
            tell_changed(&format!("{}, {}", counts(&one), counts(&other)), &mut told)?;
        }
    }
    tell_changed(&format!("{}, {}", counts(&one), counts(&other)), &mut told)
}

/// `cableway vnf reflect`.
pub(super) fn reflect(interface: &str, tell: &Tell, stop: &AtomicBool) -> Result<()> {
    let mut side = Side::open(interface)?;
    output::print(&format!("vnf: reflects at {}\n", side.name))?;
    let mut clock = Clock::new(tell);
    let mut told = String::new();
    let mut stayed = 0u64;
    while !stop.load(Ordering::Relaxed) {
        let came = side.take(|frame, offload, out| match reflected(frame) {
            Some(addresses) => out.send(offload, &[&addresses, &frame[12..]]),
            None => stayed += 1,
        })?;
        if came == 0 {
            wait(&[&side], NAP);
        }
        if clock.strikes() {
            tell_changed(&format!("{} stayed {stayed}", counts(&side)), &mut told)?;
        }
    }
    tell_changed(&format!("{} stayed {stayed}", counts(&side)), &mut told)
}

/// The addresses of a frame that goes back: none for one to a group, which nobody can have sent.
fn reflected(frame: &[u8]) -> Option<[u8; 12]> {
    let (to, from) = (frame.get(..6)?, frame.get(6..12)?);
    if to[0] & 1 == 1 {
        return None;
    }
    [from, to].concat().try_into().ok()
}

fn counts(side: &Side) -> String {
    format!("{} in {} out {} dropped {}", side.name, side.received, side.out.sent, side.out.dropped)
}

/// Prints counts that are not those that were told last.
fn tell_changed(counts: &str, told: &mut String) -> Result<()> {
    if counts != told {
        output::print(&format!("vnf: {counts}\n"))?;
        counts.clone_into(told);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_goes_back_to_its_sender_and_one_to_a_group_stays() {
        let frame = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
        assert_eq!(reflected(&frame), Some([2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1]));
        assert_eq!(reflected(&[0xff; 14]), None);
        for length in 0..12 {
            assert_eq!(reflected(&frame[..length]), None);
        }
    }
}
