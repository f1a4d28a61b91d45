//! Interrupts: who polls may sleep, and is woken by the next frame.

use std::time::Duration;

use pmd::dma::{Arena, ArenaOptions};
use pmd::e1000e::E1000e;
use pmd::igb::Igb;
use pmd::nic::{Nic, Options, ReceiveQueue};
use pmd::qtest::{Function, Machine};
use pmd::virtio_net::VirtioNet;
use port::{BurstBuffer, RxQueue};

use crate::adapters::udp;
use crate::frames::{PATIENCE, until};

/// Sleeps, is woken, polls and sleeps again, as an idle worker does.
fn a_queue_that_is_armed_is_told_of_the_next_frame_and_one_that_is_polled_is_not<
    N: Nic<Device = Function>,
>(
    model: &str,
) {
    let mut machine = Machine::start(model).unwrap();
    let wire = machine.wire().unwrap();
    let arena = Arena::new(ArenaOptions::default(), machine.space()).unwrap();
    let function = machine.function();
    assert!(function.listen().unwrap() > 1);
    let mut opened = N::open(function.clone(), &arena, Options::default()).unwrap();
    opened.nic.wait_for_link(PATIENCE).unwrap();
    let queue = &mut opened.receive[0];
    let vector = queue.vector().expect("it has an interrupt");
    let mut buffer = BurstBuffer::default();
    let mut came_in = |queue: &mut N::Receive, frames: usize| {
        let mut seen = 0;
        until("the frames come in", || {
            seen += queue.poll(&mut buffer).len();
            seen == frames
        });
    };
    // Polled: nothing is heard, but perhaps of the first frame ever, before which QEMU does not look at a virtio ring's wishes.
    for _ in 0..2 {
        function.take(vector);
        wire.send(&udp(b"polled", 0)).unwrap();
        came_in(queue, 1);
    }
    assert!(!function.take(vector));
    for round in 0..20 {
        assert!(!queue.arm(), "round {round}: nothing waits");
        wire.send(&udp(b"wake up", 0)).unwrap();
        until("the vector is raised", || function.take(vector));
        queue.disarm();
        came_in(queue, 1);
        // Up to two may have been on their way when it was disarmed: the 82574L's are throttled, and its model sends one more behind.
        let late = (0..10).filter(|_| {
            wire.send(&udp(b"polled", 0)).unwrap();
            came_in(queue, 1);
            function.take(vector)
        });
        assert!(late.count() <= 2, "round {round}: disarmed");
        std::thread::sleep(Duration::from_millis(20));
        function.take(vector);
    }
    // Who would sleep although a frame waits is told not to, and hears nothing later.
    wire.send(&udp(b"waits", 0)).unwrap();
    until("the frame is in the ring", || queue.peek() > 0);
    assert!(queue.arm());
    came_in(queue, 1);
    let late = (0..10).filter(|_| {
        wire.send(&udp(b"polled", 0)).unwrap();
        came_in(queue, 1);
        function.take(vector)
    });
    assert!(late.count() <= 2);
}

macro_rules! interrupts {
    ($($name:ident: $driver:ident, $model:literal;)+) => {$(
        #[test]
        #[ignore = "needs QEMU: ./check nic"]
        fn $name() {
            a_queue_that_is_armed_is_told_of_the_next_frame_and_one_that_is_polled_is_not::<$driver<Function>>($model);
        }
    )+};
}

interrupts! {
    e1000e_sleeps_and_is_woken: E1000e, "e1000e";
    igb_sleeps_and_is_woken: Igb, "igb";
    virtio_split_sleeps_and_is_woken: VirtioNet, "virtio-net-pci,disable-legacy=on";
    virtio_packed_sleeps_and_is_woken: VirtioNet, "virtio-net-pci,disable-legacy=on,packed=on";
}
