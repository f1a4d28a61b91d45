//! Somebody looks at the frames between two guests: they arrive as if nobody did.

use virtio::device::Layout;

use super::super::VhostPort;
use super::guest::{Guest, modern};
use super::packets::frame;
use super::world::World;
use crate::bridge::PortPlan;
use crate::capture::{Capture, Filter};
use crate::events::Events;

#[test]
fn what_is_captured_at_sender_and_receiver_is_what_arrives() {
    let (sender, events) = Events::channel(64);
    let guests: Vec<_> = [0, 1]
        .map(|n| Guest::new(VhostPort::new(n, "vnf", 1, sender.clone()), modern(Layout::Packed)))
        .into_iter()
        .collect();
    let captures = [0, 1, 1].map(|n| Capture::new(n, "vnf", 65_557, Filter::default()).unwrap());
    let other = Filter::parse("udp").unwrap();
    let unwanted = Capture::new(1, "vnf", 65_557, other).unwrap();
    let all = captures.iter().cloned().chain([unwanted.clone()]).collect();
    let mut world = World::captured(guests, vec![PortPlan::default(); 2], events, all);
    let sent: Vec<_> = (0..100).map(|i| frame(0, 1, 60 + 13 * i as usize, i)).collect();
    let arrived = world.carry(&sent, 2_048);
    assert_eq!(arrived.iter().map(|r| r.bytes.clone()).collect::<Vec<_>>(), sent);
    for capture in &captures {
        let file = capture.drain().unwrap();
        // Each frame's bytes are in the file, one behind the other.
        let mut rest = &file[..];
        for frame in &sent {
            let at =
                rest.windows(frame.len()).position(|bytes| bytes == frame).expect("the frame in the file");
            rest = &rest[at + frame.len()..];
        }
        assert_eq!((capture.report().captured, capture.report().missed), (100, 0));
    }
    assert_eq!(unwanted.report().captured, 0);
    world.assert_conserved();
}
