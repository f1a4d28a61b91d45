//! Tells the network where a guest is now that has moved here: a reverse ARP request with its address, flooded like any other
//! broadcast (vhost-user, VHOST_USER_SEND_RARP), so that every bridge on the way learns the new place.

use port::{Burst, BurstBuffer, HEAD, Head, Nobody, Scratch};

use crate::bridge::{Clock, IngressState, Outputs};
use crate::plan::Plan;
use crate::worker;

/// Shortest frame without FCS.
const LENGTH: usize = 60;

/// A RARP request for `mac` (RFC 903).
fn rarp(mac: [u8; 6]) -> [u8; LENGTH] {
    let mut frame = [0; LENGTH];
    let parts: [&[u8]; 8] = [
        &[0xff; 6],
        &mac,
        &[0x80, 0x35],          // type: RARP
        &[0, 1, 0x08, 0, 6, 4], // Ethernet, IPv4, lengths
        &[0, 3],                // request reverse
        &mac,
        &[0; 4],
        &mac,
    ];
    let bytes = parts.into_iter().flatten().copied();
    frame.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    frame
}

/// Floods a RARP of `mac` as if it came in on `port`. No guest sent it, so each one that goes out counts as a copy, of which
/// the port's first queue keeps account.
pub(super) fn announce(plan: &Plan, port: u16, mac: [u8; 6], clock: Clock) {
    let frame = rarp(mac);
    let mut buffer = BurstBuffer::default();
    let mut head = [0; HEAD];
    head.iter_mut().zip(frame).for_each(|(to, from)| *to = from);
    if let (Some(f), Some(h)) = (buffer.frames.first_mut(), buffer.heads.first_mut()) {
        (f.ptr, f.first_len, f.len) = (frame.as_ptr(), LENGTH as u32, LENGTH as u32);
        *h = Head(head);
    }
    let mut nobody = Nobody;
    let mut burst = Burst::new(&mut nobody, &buffer, 1);
    let (mut outputs, mut ingress) = (Outputs::default(), IngressState::default());
    let done = plan.bridge.classify(port, &mut burst, clock, &mut ingress, &mut outputs);
    if let Some(slot) = plan.port(port).and_then(|p| p.rx.first()) {
        // Counters have one writer at a time: whoever holds the queue's claim.
        let _claim = slot.state.take();
        slot.counters.replicas.add(u64::from(done.replicas));
    }
    for (to, set, edit) in outputs.drain() {
        worker::send(plan, to, &burst, set, edit, &mut Scratch::default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rarp_request_names_the_guest_as_sender_and_target() {
        let frame = rarp([2, 0, 0, 0, 0, 9]);
        assert_eq!(frame[..14], [255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 9, 0x80, 0x35]);
        assert_eq!(frame[20..32], [0, 3, 2, 0, 0, 0, 0, 9, 0, 0, 0, 0]);
        assert_eq!(frame[32..38], [2, 0, 0, 0, 0, 9]);
    }
}
