//! Each driver against a device that writes whatever it likes into its rings, in any order.

use std::sync::Arc;

use port::{BurstBuffer, RxQueue, Scratch, TagEdit, TxQueue};
use proptest::prelude::*;

use super::standin::{IGB_RX_RING, IGB_TX_RING, RX_RING, Standin, TX_RING};
use super::tests::{BUFFERS, options, space_and_arena};
use super::{Card, Receive, Transmit};
use crate::dma::{Arena, BUFFER, Pool};
use crate::e1000e::{E1000e, I82574};
use crate::igb::{I82576, Igb};
use crate::igbvf::{I82576Vf, Igbvf};
use crate::nic::{MIN_FRAME, Nic, Opened, ReceiveQueue, TransmitQueue};

/// What the device does at one step: where, in which ring, what, and how much of it.
type Write = (u32, bool, u64, u8);

fn writes() -> impl Strategy<Value = Vec<Write>> {
    proptest::collection::vec((0..64u32, any::<bool>(), any::<u64>(), 0..4u8), 1..200)
}

/// A device with this driver, and where its rings are told.
fn survives<N, C>(
    card: &Arc<Standin>,
    arena: &Arc<Arena>,
    opened: Opened<N>,
    rings: [u32; 2],
    writes: Vec<Write>,
) -> Result<(), TestCaseError>
where
    C: Card,
    N: Nic<Receive = Receive<Standin, C>, Transmit = Transmit<Standin, C>>,
{
    let Opened { nic, mut receive, mut transmit } = opened;
    let (receiver, sender) = (receive.first_mut().unwrap(), transmit.first_mut().unwrap());
    let [receive_ring, transmit_ring] = rings;
    let mut buffer = BurstBuffer::default();
    for (at, to_receive, word, act) in writes {
        // Mostly plausible descriptors, or the port stops at the first.
        let plausible = word & 0xffff_07ff_0000_0003 | 1;
        match (to_receive, act) {
            (true, 0) => card.write_back(receive_ring, at, word),
            (true, _) => (0..8).for_each(|i| card.write_back(receive_ring, (at + i) & 63, plausible)),
            (false, _) => card.write_back(transmit_ring, at, word),
        }
        let burst = receiver.poll(&mut buffer);
        for frame in burst.frames() {
            prop_assert!((MIN_FRAME..=9018).contains(&frame.len));
            let more = burst.more(frame);
            prop_assert_eq!(more.len(), usize::from(frame.more));
            prop_assert_eq!(frame.first_len + more.iter().map(|s| s.len).sum::<u32>(), frame.len);
            let pieces =
                std::iter::once((frame.ptr, frame.first_len)).chain(more.iter().map(|s| (s.ptr, s.len)));
            for (ptr, len) in pieces {
                let index = arena.view().buffer_of(ptr);
                prop_assert!(len <= BUFFER && index.is_some_and(|i| arena.view().ptr(i) == ptr.cast_mut()));
            }
        }
        if act > 1 {
            sender.send(&burst, burst.all(), TagEdit::Keep, &mut Scratch::default());
            sender.notify();
        }
    }
    let (r, t) = (receiver.counters(), sender.counters());
    prop_assert_eq!(t.offered.get(), t.sent.get() + t.drops.sum());
    prop_assert!(r.frames.get() >= r.drops.sum());
    drop((nic, receive, transmit));
    prop_assert!(Pool::new(arena, BUFFERS).is_ok(), "a buffer is lost");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 300 }))]

    #[test]
    fn whatever_an_82574_writes_frames_lie_in_its_buffers_and_no_buffer_is_lost(writes in writes()) {
        let (space, arena) = space_and_arena();
        let card = Standin::new(&space, I82574::IDS[0]);
        let opened = E1000e::open(card.clone(), &arena, options()).unwrap();
        survives::<_, I82574>(&card, &arena, opened, [RX_RING, TX_RING], writes)?;
    }

    #[test]
    fn whatever_an_82576_writes_frames_lie_in_its_buffers_and_no_buffer_is_lost(writes in writes()) {
        let (space, arena) = space_and_arena();
        let card = Standin::new(&space, I82576::IDS[0]);
        let opened = Igb::open(card.clone(), &arena, options()).unwrap();
        survives::<_, I82576>(&card, &arena, opened, [IGB_RX_RING, IGB_TX_RING], writes)?;
    }

    #[test]
    fn whatever_its_virtual_function_writes_frames_lie_in_its_buffers_and_no_buffer_is_lost(writes in writes()) {
        let (space, arena) = space_and_arena();
        let card = Standin::new(&space, I82576Vf::IDS[0]);
        card.adapter_that_grants();
        let opened = Igbvf::open(card.clone(), &arena, options()).unwrap();
        survives::<_, I82576Vf>(&card, &arena, opened, [RX_RING, TX_RING], writes)?;
    }
}
