//! Drivers of Intel's cards with a device that writes any bytes into its rings: frames lie in buffers of the driver's, and every
//! buffer comes home. The same as the property tests of `pmd` (`intel::hostile_tests`), with bytes that are led by coverage.
#![no_main]

#[allow(dead_code)]
#[path = "../../pmd/src/intel/standin.rs"]
mod standin;

use std::sync::Arc;

use host::memory::Pages;
use pmd::dma::{Arena, ArenaOptions, BUFFER, Pool};
use pmd::e1000e::E1000e;
use pmd::igb::Igb;
use pmd::igbvf::Igbvf;
use pmd::nic::{Nic, Opened, Options, TransmitQueue};
use port::{BurstBuffer, RxQueue, Scratch, TagEdit, TxQueue};
use standin::{IGB_RX_RING, IGB_TX_RING, Identity, RX_RING, Standin, TX_RING};

const BUFFERS: u32 = 400;
const LONGEST: u32 = 9018;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some((card, steps)) = bytes.split_first() else { return };
    match card % 3 {
        0 => play::<E1000e<Standin>>([RX_RING, TX_RING], steps),
        1 => play::<Igb<Standin>>([IGB_RX_RING, IGB_TX_RING], steps),
        _ => play::<Igbvf<Standin>>([RX_RING, TX_RING], steps),
    }
});

/// Ten bytes a step: what to do, where, and which word the device writes there.
fn play<N: Nic<Device = Standin>>([receive_ring, transmit_ring]: [u32; 2], steps: &[u8]) {
    let space = Arc::new(Identity::default());
    let options = ArenaOptions { rings: 64 << 10, buffers: BUFFERS, pages: Pages::Ordinary, node: None };
    let arena = Arena::new(options, space.clone()).unwrap();
    let card = Standin::new(&space, N::IDS[0]);
    card.adapter_that_grants();
    let options = Options { receive_ring: 64, transmit_ring: 64, spare: 8, mtu: 9000, ..Options::default() };
    let Opened { mut nic, mut receive, mut transmit } = N::open(card.clone(), &arena, options).unwrap();
    let mut buffer = BurstBuffer::default();
    for step in steps.chunks_exact(10) {
        let (act, at) = (step[0], u32::from(step[1]) & 63);
        let word = u64::from_le_bytes(step[2..].try_into().unwrap());
        let ring = if act & 1 == 0 { receive_ring } else { transmit_ring };
        card.write_back(ring, at, word);
        let burst = receive[0].poll(&mut buffer);
        for frame in burst.frames() {
            let more = burst.more(frame);
            assert!((14..=LONGEST).contains(&frame.len) && more.len() == usize::from(frame.more));
            assert_eq!(frame.first_len + more.iter().map(|s| s.len).sum::<u32>(), frame.len);
            for (ptr, len) in std::iter::once((frame.ptr, frame.first_len)).chain(more.iter().map(|s| (s.ptr, s.len))) {
                assert!(len <= BUFFER && arena.view().buffer_of(ptr).is_some());
            }
        }
        if act & 2 != 0 {
            transmit[0].send(&burst, burst.all(), TagEdit::Keep, &mut Scratch::default());
            transmit[0].notify();
        }
        drop(burst);
        if act & 4 != 0 {
            // Whether it is still up is told by whoever asks; nothing else may happen.
            let _ = nic.link();
        }
    }
    let counters = transmit[0].counters();
    assert_eq!(counters.offered.get(), counters.sent.get() + counters.drops.sum());
    drop((nic, receive, transmit));
    assert!(Pool::new(&arena, BUFFERS).is_ok(), "a buffer is lost");
}
