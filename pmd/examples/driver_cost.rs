//! What a driver costs: instructions for a frame that is received from one card and sent by another, in bursts of 32.
//!
//! ```text
//! cargo run --release -p cableway-pmd --example driver_cost
//! ```
//!
//! runs itself under `valgrind --tool=callgrind`, which counts only what happens in [`forward`]: polling, sending, giving back,
//! announcing. The cards are stand-ins in memory, whose part is played outside of it. Instructions do not move with the machine;
//! what they cost on it does. Fails if a frame costs more than its limit.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use host::memory::Pages;
use pmd::dma::{Arena, ArenaOptions};
use pmd::e1000e::E1000e;
use pmd::igb::Igb;
use pmd::nic::{Nic, Options, TransmitQueue};
use port::{BurstBuffer, RxQueue, Scratch, TagEdit, TxQueue};

#[allow(dead_code)] // the unit tests use all of it
#[path = "../src/intel/standin.rs"]
mod standin;

use standin::{IGB_RX_RING, IGB_TX_RING, Identity, RX_RING, Standin, TX_RING};

/// From the registers of a ring to its tail.
const TAIL: u32 = 0x18;

const BURST: u32 = 32;
const ROUNDS: u32 = 1000;

/// Instructions a frame may cost, both drivers together. ixy in C has 127, ixy.rs 209 (82599).
const LIMIT: f64 = 110.0;

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("82574L") => {
            play::<E1000e<Standin>>(RX_RING, TX_RING);
            ExitCode::SUCCESS
        }
        Some("82576") => {
            play::<Igb<Standin>>(IGB_RX_RING, IGB_TX_RING);
            ExitCode::SUCCESS
        }
        _ if ["82574L", "82576"].into_iter().all(is_cheap) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

/// Counts what `card` costs.
fn is_cheap(card: &str) -> bool {
    let us = std::env::current_exe().unwrap();
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--collect-atstart=no"])
        .arg("--toggle-collect=*driver_cost*forward*")
        .arg(us)
        .arg(card)
        .output();
    let output = match output {
        Ok(output) => output,
        Err(e) => {
            eprintln!("cannot run valgrind: {e}; it is in Debian's package valgrind");
            return false;
        }
    };
    let text = String::from_utf8_lossy(&output.stderr);
    let collected = text.lines().find_map(|l| l.split_once("Collected : ")).map(|(_, n)| n.trim());
    let Some(collected) = collected.and_then(|n| n.parse::<f64>().ok()).filter(|&n| n > 0.0) else {
        eprintln!("valgrind counted nothing:\n{text}");
        return false;
    };
    let each = collected / f64::from(ROUNDS * BURST);
    println!(
        "{card}: {each:.1} instructions for a frame received and sent, bursts of {BURST} (limit {LIMIT:.0})"
    );
    each <= LIMIT
}

/// One burst from one card to the other.
#[inline(never)]
fn forward(
    receive: &mut impl RxQueue,
    transmit: &mut impl TxQueue,
    buffer: &mut BurstBuffer,
    scratch: &mut Scratch,
) -> usize {
    let waiting = receive.peek();
    transmit.prepare(waiting);
    let burst = receive.poll(buffer);
    let frames = burst.len();
    transmit.send(&burst, burst.all(), TagEdit::Keep, scratch);
    burst.release();
    transmit.notify();
    frames
}

/// Plays both devices around [`forward`].
fn play<N: Nic<Device = Standin>>(rx_ring: u32, tx_ring: u32) {
    let space = Arc::new(Identity::default());
    let options = ArenaOptions { buffers: 4096, pages: Pages::Ordinary, ..ArenaOptions::default() };
    let arena = Arena::new(options, space.clone()).unwrap();
    let (a, b) = (Standin::new(&space, N::IDS[0]), Standin::new(&space, N::IDS[0]));
    let open = |card: &Arc<Standin>| N::open(card.clone(), &arena, Options::default()).unwrap();
    let (mut from, mut to) = (open(&a), open(&b));
    let (receive, transmit) = (&mut from.receive[0], &mut to.transmit[0]);
    let (mut buffer, mut scratch) = (BurstBuffer::default(), Scratch::default());
    let size = Options::default().receive_ring;
    let (mut received, mut sent) = (0u32, 0u32);
    for _ in 0..ROUNDS {
        let tail = a.register(rx_ring + TAIL);
        assert!(tail.wrapping_sub(received) & (size - 1) >= BURST, "the ring is kept filled");
        for _ in 0..BURST {
            // DD and EOP, 60 bytes.
            a.write_back(rx_ring, received & (size - 1), 3 | 60 << 32);
            received = received.wrapping_add(1);
        }
        std::sync::atomic::fence(Ordering::SeqCst);
        assert_eq!(forward(receive, transmit, &mut buffer, &mut scratch), BURST as usize);
        // What was reported on is sent.
        while sent & (size - 1) != b.register(tx_ring + TAIL) {
            let [_, word] = b.read(tx_ring, sent & (size - 1));
            if word & 1 << 27 != 0 {
                b.write_back(tx_ring, sent & (size - 1), word | 1 << 32);
            }
            sent = sent.wrapping_add(1);
        }
    }
    let counters = transmit.counters();
    assert_eq!(counters.uncopied.get(), u64::from(ROUNDS * BURST));
}
