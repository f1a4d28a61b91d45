#![doc = include_str!("README.md")]

mod adapter;
pub(crate) mod core;
mod descriptors;
pub(crate) mod filter;
pub(crate) mod functions;
#[cfg(test)]
mod hostile_tests;
mod receive;
pub(crate) mod regs;
mod selftest;
#[cfg(test)]
pub(crate) mod standin;
mod statistics;
#[cfg(test)]
pub(crate) mod tests;
mod transmit;

use std::time::Duration;

use port::{DropReason, Head};

use crate::access::{Bar, Bits, Entry, Regs, Scratch, WaitError, Writable};
use crate::nic::{DeviceError, Options};

pub use adapter::Adapter;
pub use descriptors::{Ask, Checksum};
pub(crate) use descriptors::{CHECKSUM, INSERT_TAG};
pub use functions::{Functions, Groups};
pub use receive::Receive;
pub use transmit::Transmit;

use regs::{CTRL, MDIC, RCTL, RXCSUM, STATUS, TCTL, VET};

/// How long requests under way may take to end (82574 datasheet 5.2.5.3 wants them to within completion timeouts, tens of ms).
const MASTER_LIMIT: Duration = Duration::from_millis(100);

/// How long a reset may take: the datasheets promise 1 µs for RST, and some ms for the EEPROM.
pub(crate) const RESET_LIMIT: Duration = Duration::from_millis(100);

/// How long the PHY may take to be told something: 64 µs (82576 datasheet 8.2, MDIC), and firmware may have it at the moment.
const PHY_LIMIT: Duration = Duration::from_millis(10);

/// What a card's queues differ in from those of others.
pub trait Card: Send + Sync + 'static {
    /// What it is called.
    const NAME: &'static str;
    /// The functions that it is, as at [`crate::access::config::ID`].
    const IDS: &'static [u32];
    /// Bytes of BAR 0 that hold registers.
    const BAR_BYTES: u32;
    /// Its own registers.
    const TABLE: &'static [Entry];
    /// Where rings begin: a multiple of so many bytes.
    const RING_ALIGN: u32;
    /// Bits of a receive descriptor's second word that make a frame no frame.
    const DAMAGED: u64;
    /// The bit of it that says that checksums are to be ignored, if the card has one.
    const IGNORE_CHECKSUM: u64;
    /// The names of its bits 24 to 31.
    const RECEIVE_ERRORS: [&'static str; 8];

    /// Receive descriptor tail.
    fn receive_tail(queue: u32) -> impl Writable;

    /// The vector that tells of frames in receive queue `queue`.
    fn vector(queue: u32) -> u16;

    /// That vector's interrupt comes once, at the next frame: what caused it before is forgotten. Has arrived at the device when
    /// it returns.
    fn arm<B: Bar>(regs: &Regs<B>, queue: u32);

    /// That interrupt's cause, without a frame.
    fn raise<B: Bar>(regs: &Regs<B>, queue: u32);

    /// Its registers that may hold anything while it is stopped: where its rings are, and how long.
    fn scratch() -> Vec<Scratch> {
        let low = 0u32.wrapping_sub(Self::RING_ALIGN);
        let (high, len) = (u32::MAX, 0xf_ff80);
        let names = [
            ("RDBAL", low),
            ("RDBAH", high),
            ("RDLEN", len),
            ("TDBAL", low),
            ("TDBAH", high),
            ("TDLEN", len),
        ];
        names.into_iter().flat_map(|(name, bits)| Scratch::all(Self::TABLE, name, bits)).collect()
    }

    /// It does not come any more.
    fn disarm<B: Bar>(regs: &Regs<B>, queue: u32);

    /// Transmit descriptor tail.
    fn transmit_tail(queue: u32) -> impl Writable;

    /// The second word of a data descriptor for `len` bytes of a frame of `frame` bytes.
    fn data(len: u32, frame: u32, flags: u64) -> u64;

    /// How the device is asked to calculate a checksum, or to insert a tag, for a frame with this head.
    ///
    /// # Errors
    /// It cannot.
    fn ask(checksum: Option<Checksum>, tag: Option<u16>, head: &Head) -> Result<Ask, DropReason>;

    /// Turns both directions off, and waits until requests have ended.
    ///
    /// # Errors
    /// They have not; the device has to be kept from memory otherwise.
    fn quiet<B: Bar>(regs: &Regs<B>) -> Result<(), WaitError>;
}

/// A card that is a whole network adapter (a physical function): how it is started. The registers of [`regs`] are its.
pub trait Physical: Card {
    /// Queue pairs.
    const QUEUES: u16;
    /// Longest IP packet in bytes.
    const MTU: u32;
    /// Addresses that it compares with exactly; the first is its own.
    const EXACT: u32;

    /// Masks all interrupts, and waits until that has arrived.
    fn mask_interrupts<B: Bar>(regs: &Regs<B>);

    /// Waits until the device has read its own settings after a reset.
    ///
    /// # Errors
    /// It cannot do without, and has not.
    fn wait_for_settings<B: Bar>(regs: &Regs<B>) -> Result<(), WaitError>;

    /// What it does for its virtual functions.
    type Functions: Functions;

    /// What there is to do after a reset before queues are set up.
    ///
    /// # Errors
    /// The device does not take it.
    fn prepare<B: Bar>(regs: &Regs<B>, options: &Options) -> Result<Self::Functions, DeviceError>;

    /// Sets up receive queue `queue`, with its ring at `ring` and nothing in it.
    ///
    /// # Errors
    /// The device does not take it.
    fn start_receive<B: Bar>(
        regs: &Regs<B>,
        queue: u32,
        ring: u64,
        options: &Options,
    ) -> Result<(), DeviceError>;

    /// Sets up transmit queue `queue`.
    ///
    /// # Errors
    /// The device does not take it.
    fn start_transmit<B: Bar>(
        regs: &Regs<B>,
        queue: u32,
        ring: u64,
        options: &Options,
    ) -> Result<(), DeviceError>;
}

/// Both directions off; what is under way ends (82574 datasheet 10.2.5.1, 10.2.6.1).
fn quiesce<B: Bar>(regs: &Regs<B>) {
    regs.write(RCTL, Bits::new(0));
    regs.clear(TCTL, TCTL::EN);
    regs.flush(STATUS);
    regs.pause(Duration::from_millis(10));
}

/// [`Card::quiet`] of an adapter.
pub(crate) fn quiet<B: Bar, C: Physical>(regs: &Regs<B>) -> Result<(), WaitError> {
    C::mask_interrupts(regs);
    quiesce(regs);
    // 82574 datasheet 5.2.5.3: no new requests; those under way end.
    regs.set(CTRL, CTRL::GIO_MASTER_DISABLE);
    regs.wait_clear(STATUS, STATUS::GIO_MASTER_ENABLE, MASTER_LIMIT)
}

/// Brings an adapter into a known state, with its rings empty and nothing enabled: 82574 datasheet 4.6.1 (interrupts off during
/// initialization) and 4.6.2 (global reset and general configuration).
fn reset<B: Bar, C: Physical>(regs: &Regs<B>) -> Result<(), DeviceError> {
    quiet::<B, C>(regs)?;
    regs.set(CTRL, CTRL::RST);
    // 10.2.2.1: registers may be touched 1 µs after RST, and are ready when the EEPROM was read.
    regs.pause(Duration::from_millis(1));
    regs.wait_clear(CTRL, CTRL::RST, RESET_LIMIT)?;
    C::wait_for_settings(regs)?;
    C::mask_interrupts(regs);
    // Speed and duplex come from the PHY; the MAC follows it (4.6.3). Flow control off: a slow guest must not stop the wire.
    regs.clear(CTRL, CTRL::GIO_MASTER_DISABLE | CTRL::RFCE | CTRL::TFCE);
    regs.set(CTRL, CTRL::SLU);
    Ok(())
}

/// Writes the PHY's control register, number 0 (IEEE 802.3, 22.2.4.1). The PHY's address is 1, a write is 1.
fn control_phy<B: Bar>(regs: &Regs<B>, bits: u32) -> Result<(), WaitError> {
    regs.write(MDIC, MDIC::DATA.is(bits) | MDIC::REGADD.is(0) | MDIC::PHYADD.is(1) | MDIC::OP.is(1));
    regs.wait_set(MDIC, MDIC::READY, PHY_LIMIT)
}

/// Lets the PHY begin a link anew: negotiation on, and begun (82576 datasheet 3.5.7).
pub(crate) fn negotiate<B: Bar>(regs: &Regs<B>) -> Result<(), WaitError> {
    control_phy(regs, 1 << 12 | 1 << 9)
}

/// Lets the PHY send back what it is to send, at 1 Gbit/s and both ways at once, without a cable; or ends that (82576 datasheet
/// 3.5.6.3.2).
fn loop_back<B: Bar>(regs: &Regs<B>, on: bool) -> Result<(), WaitError> {
    let forced = CTRL::FRCSPD | CTRL::FRCDPX | CTRL::SPEED.is(2) | CTRL::FD | CTRL::SLU;
    if !on {
        regs.clear(CTRL, CTRL::FRCSPD | CTRL::FRCDPX);
        return negotiate(regs);
    }
    control_phy(regs, 1 << 14 | 1 << 8 | 1 << 6)?;
    regs.clear(CTRL, CTRL::SPEED.is(3));
    regs.set(CTRL, forced);
    regs.pause(Duration::from_millis(500));
    Ok(())
}

/// Lets frames in: 82574 datasheet 4.6.5, the end of receive initialization.
fn receive<B: Bar>(regs: &Regs<B>, options: &Options) {
    regs.write_number(VET, 0x8100);
    if options.strip_tags {
        regs.set(CTRL, CTRL::VME);
    } else {
        regs.clear(CTRL, CTRL::VME);
    }
    // BSIZE 0 without BSEX: 2,048 bytes a buffer. SECRC: the FCS is taken off.
    let long = if options.longest() > 1518 { RCTL::LPE } else { Bits::new(0) };
    regs.set(RXCSUM, RXCSUM::IPOFLD | RXCSUM::TUOFLD);
    regs.write(RCTL, RCTL::EN | RCTL::BAM | RCTL::SECRC | long);
}

/// Lets frames out.
fn transmit<B: Bar>(regs: &Regs<B>) {
    regs.write(TCTL, TCTL::EN | TCTL::PSP | TCTL::RTLC | TCTL::CT.is(15) | TCTL::COLD.is(63));
}
