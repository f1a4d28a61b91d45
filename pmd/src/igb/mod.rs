#![doc = include_str!("README.md")]

mod functions;
#[cfg(test)]
mod functions_tests;
mod mailbox;
pub(crate) mod message;
pub(crate) mod regs;

use std::time::Duration;

use port::{DropReason, Head};

use crate::access::{Bar, Entry, Regs, WaitError, Writable};
use crate::intel::regs::{EEC, MRQC, RXCSUM, STATUS};
use crate::intel::{self, Adapter, Ask, CHECKSUM, Card, Checksum, Functions as _, INSERT_TAG, Physical};
use crate::nic::{DeviceError, Options};
use regs::{
    EIAC, EICR, EICS, EIMC, EIMS, GPIE, ICR, IMC, IVAR, RDBAH, RDBAL, RDH, RDLEN, RDT, RETA, RLPML, RSSRK,
    RXDCTL, SRRCTL, TDBAH, TDBAL, TDH, TDLEN, TDT, TXDCTL,
};

pub use functions::{Functions, Settings, VirtualFunction};

/// An 82576, as a physical function.
pub type Igb<D> = Adapter<D, I82576>;

/// What the 82576 differs in from others.
pub struct I82576;

/// How long a queue may take to start or end.
const QUEUE_LIMIT: Duration = Duration::from_millis(100);

/// How long the EEPROM is waited for: it is read within some ms.
const EEPROM_LIMIT: Duration = Duration::from_millis(20);

/// The key of the receive side's hash: that of Microsoft's specification of RSS, as other drivers have it.
const KEY: [u32; 10] = [
    0xda56_5a6d,
    0xc20e_5b25,
    0x3d25_6741,
    0xb08f_a343,
    0xcb2b_cad0,
    0xb430_7bae,
    0xa32d_cb77,
    0x0cf2_3080,
    0x3bb7_426a,
    0xfa01_acbe,
];

impl Card for I82576 {
    const NAME: &'static str = "an 82576";
    /// Copper, fibre and SerDes; and what QEMU models is the first.
    const IDS: &'static [u32] = &[0x10c9_8086, 0x10e6_8086, 0x10e7_8086];
    /// Datasheet 8.1: 128 KiB.
    const BAR_BYTES: u32 = 128 << 10;
    const TABLE: &'static [Entry] = regs::TABLE;
    const RING_ALIGN: u32 = 128;
    /// Data (RXE), of the extended errors (datasheet 7.1.5).
    const DAMAGED: u64 = 1 << 31;
    /// None: bit 2 is reserved.
    const IGNORE_CHECKSUM: u64 = 0;
    const RECEIVE_ERRORS: [&'static str; 8] = ["", "", "", "", "", "tcp_udp_checksum", "ip_checksum", "data"];

    #[inline(always)]
    fn receive_tail(queue: u32) -> impl Writable {
        RDT(queue)
    }

    /// The first is for the device's own affairs; queues share the nine others (datasheet 7.3.1).
    fn vector(queue: u32) -> u16 {
        1 + (queue % 9) as u16
    }

    fn arm<B: Bar>(regs: &Regs<B>, queue: u32) {
        let bit = 1 << Self::vector(queue);
        regs.write_number(EICR, bit);
        regs.write_number(EIMS, bit);
        regs.flush(STATUS);
    }

    fn raise<B: Bar>(regs: &Regs<B>, queue: u32) {
        regs.write_number(EICS, 1 << Self::vector(queue));
        regs.flush(STATUS);
    }

    fn disarm<B: Bar>(regs: &Regs<B>, queue: u32) {
        regs.write_number(EIMC, 1 << Self::vector(queue));
    }

    #[inline(always)]
    fn transmit_tail(queue: u32) -> impl Writable {
        TDT(queue)
    }

    /// An advanced data descriptor (datasheet 7.2.2.3): DTYP 3, DEXT; PAYLEN is the whole frame's.
    #[inline(always)]
    fn data(len: u32, frame: u32, flags: u64) -> u64 {
        // A rotation, which takes an instruction less than a shift; lengths have 18 bits at most.
        u64::from(len) | u64::from(frame).rotate_right(18) | 3 << 20 | 1 << 29 | flags
    }

    fn ask(checksum: Option<Checksum>, tag: Option<u16>, head: &Head) -> Result<Ask, DropReason> {
        advanced(checksum, tag, head)
    }

    fn quiet<B: Bar>(regs: &Regs<B>) -> Result<(), WaitError> {
        intel::quiet::<B, Self>(regs)
    }
}

/// What the advanced context descriptor (datasheet 7.2.2.2) says about a frame. The device finds the checksum by the kind of
/// packet, not by its place, so only TCP and UDP behind IP can be asked for.
fn advanced(checksum: Option<Checksum>, tag: Option<u16>, head: &Head) -> Result<Ask, DropReason> {
    if checksum.is_none() && tag.is_none() {
        return Ok(Ask::default());
    }
    let (before, ethertype) = network_header(head);
    let (header, kind) = match checksum {
        None => (0, 0),
        Some(Checksum { start, at }) => {
            let header = u64::from(start).checked_sub(before).filter(|n| (20..512).contains(n));
            // L4T: TCP is 1, UDP 0.
            let kind = match (ethertype, at.wrapping_sub(start)) {
                (0x0800 | 0x86dd, 16) => 1 << 11,
                (0x0800 | 0x86dd, 6) => 0,
                _ => return Err(DropReason::CannotFinish),
            };
            (header.ok_or(DropReason::CannotFinish)?, kind)
        }
    };
    let ipv4 = if ethertype == 0x0800 { 1 << 10 } else { 0 };
    let low = header | before << 9 | u64::from(tag.unwrap_or(0)) << 16;
    // DTYP 2, DEXT, the first of the queue's contexts.
    let high = 2 << 20 | 1 << 29 | ipv4 | kind;
    let flags = checksum.map_or(0, |_| CHECKSUM) | tag.map_or(0, |_| INSERT_TAG);
    Ok(Ask { flags, context: Some([low, high]) })
}

/// Where the header behind the Ethernet header and up to two tags begins, and its type.
fn network_header(Head(head): &Head) -> (u64, u16) {
    let ethertype = |at: usize| match head.get(at..at + 2) {
        Some(&[a, b]) => u16::from_be_bytes([a, b]),
        _ => 0,
    };
    let mut at = 12;
    while at < 20 && matches!(ethertype(at), 0x8100 | 0x88a8) {
        at += 4;
    }
    (at as u64 + 2, ethertype(at))
}

impl Physical for I82576 {
    const QUEUES: u16 = 16;
    const MTU: u32 = 9000;
    /// Of 24: the upper eight are elsewhere.
    const EXACT: u32 = 16;

    fn mask_interrupts<B: Bar>(regs: &Regs<B>) {
        regs.write_number(IMC, u32::MAX);
        regs.write_number(EIMC, u32::MAX);
        regs.flush(ICR);
    }

    /// A card without an EEPROM (QEMU's has none) never says that it was read, and works by its defaults.
    fn wait_for_settings<B: Bar>(regs: &Regs<B>) -> Result<(), WaitError> {
        match regs.wait_set(EEC, EEC::AUTO_RD, EEPROM_LIMIT) {
            Err(e @ WaitError::Timeout { .. }) => {
                tracing::info!("82576: no settings were read from an EEPROM ({e})");
                Ok(())
            }
            other => other,
        }
    }

    type Functions = Functions;

    /// Datasheet 4.5.9, and 7.1.1.7 for the spreading of frames over queues.
    fn prepare<B: Bar>(regs: &Regs<B>, options: &Options) -> Result<Functions, DeviceError> {
        intel::negotiate(regs)?;
        regs.write_number(RLPML, options.longest() + 4);
        // Each vector is a cause of its own, which its message clears; none is enabled (datasheet 7.3.1, 8.8).
        regs.write(GPIE, GPIE::MULTIPLE_MSIX | GPIE::PBA_SUPPORT | GPIE::NSICR);
        regs.write_number(EIAC, 0x3ff);
        let functions = functions::find(regs, options)?;
        if functions.first_queue() > 0 {
            return Ok(functions);
        }
        if options.queues == 1 {
            regs.write_number(MRQC, 0);
            return Ok(functions);
        }
        for (word, key) in (0..).zip(KEY) {
            regs.write_number(RSSRK(word), key);
        }
        for word in 0..32u32 {
            let queue = |i: u32| (4 * word + i) % u32::from(options.queues);
            regs.write_number(RETA(word), queue(0) | queue(1) << 8 | queue(2) << 16 | queue(3) << 24);
        }
        // PCSD: hashes in place of a checksum of the whole packet.
        regs.set(RXCSUM, RXCSUM::PCSD);
        let fields = MRQC::TCP4 | MRQC::IP4 | MRQC::IP6 | MRQC::TCP6 | MRQC::UDP4 | MRQC::UDP6;
        regs.write(MRQC, MRQC::ENABLE.is(2) | fields);
        Ok(functions)
    }

    /// Datasheet 4.5.9: the tail may only be written once the queue reports that it is enabled.
    fn start_receive<B: Bar>(
        regs: &Regs<B>,
        queue: u32,
        ring: u64,
        options: &Options,
    ) -> Result<(), DeviceError> {
        regs.clear(RXDCTL(queue), RXDCTL::ENABLE);
        regs.write_number(RDBAL(queue), ring as u32);
        regs.write_number(RDBAH(queue), (ring >> 32) as u32);
        regs.write_number(RDLEN(queue), 16 * options.receive_ring);
        regs.write_number(RDH(queue), 0);
        regs.write_number(RDT(queue), 0);
        // Advanced descriptors with one buffer of 2 KiB. With several queues, one that is full must not hold up the others.
        let full = if options.queues > 1 { SRRCTL::DROP_EN } else { crate::access::Bits::new(0) };
        regs.write(SRRCTL(queue), SRRCTL::DESCTYPE.is(1) | SRRCTL::BSIZEPACKET.is(2) | full);
        // WTHRESH 0: descriptors are written back one by one, so that the last frame of a burst is seen at once.
        regs.write(RXDCTL(queue), RXDCTL::ENABLE | RXDCTL::PTHRESH.is(16) | RXDCTL::HTHRESH.is(8));
        regs.wait_set(RXDCTL(queue), RXDCTL::ENABLE, QUEUE_LIMIT)?;
        // Datasheet 7.3.1.2: a byte for receive and one for transmit, first of the queues 0 to 7, then of 8 to 15. Bit 7: valid.
        let (pair, shift) = (IVAR(queue % 8), queue / 8 * 16);
        let others = regs.read(pair) & !(0xffff << shift);
        regs.write_number(pair, others | (u32::from(Self::vector(queue)) | 0x80) << shift);
        Ok(())
    }

    /// Datasheet 4.5.10: transmit initialization.
    fn start_transmit<B: Bar>(
        regs: &Regs<B>,
        queue: u32,
        ring: u64,
        options: &Options,
    ) -> Result<(), DeviceError> {
        regs.clear(TXDCTL(queue), TXDCTL::ENABLE);
        regs.write_number(TDBAL(queue), ring as u32);
        regs.write_number(TDBAH(queue), (ring >> 32) as u32);
        regs.write_number(TDLEN(queue), 16 * options.transmit_ring);
        regs.write_number(TDH(queue), 0);
        regs.write_number(TDT(queue), 0);
        // WTHRESH 0: what was asked for is reported at once.
        regs.write(TXDCTL(queue), TXDCTL::ENABLE | TXDCTL::PTHRESH.is(8) | TXDCTL::HTHRESH.is(1));
        regs.wait_set(TXDCTL(queue), TXDCTL::ENABLE, QUEUE_LIMIT)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(types: &[u16]) -> Head {
        let mut head = [0; 64];
        for (i, t) in types.iter().enumerate() {
            head[12 + 4 * i..14 + 4 * i].copy_from_slice(&t.to_be_bytes());
        }
        Head(head)
    }

    #[test]
    fn a_context_names_the_headers_lengths_their_kind_and_the_tag() {
        let tcp = Some(Checksum { start: 34, at: 50 });
        let ask = advanced(tcp, None, &head(&[0x0800])).unwrap();
        assert_eq!(ask.context, Some([20 | 14 << 9, 1 << 29 | 2 << 20 | 1 << 11 | 1 << 10]));
        assert_eq!(ask.flags, CHECKSUM);
        // UDP over IPv6 behind two tags, and a third to be inserted.
        let udp = Some(Checksum { start: 22 + 40, at: 22 + 46 });
        let ask = advanced(udp, Some(0xa064), &head(&[0x88a8, 0x8100, 0x86dd])).unwrap();
        assert_eq!(ask.context, Some([40 | 22 << 9 | 0xa064 << 16, 1 << 29 | 2 << 20]));
        assert_eq!(ask.flags, CHECKSUM | INSERT_TAG);
        assert_eq!(advanced(None, None, &head(&[0x0800])), Ok(Ask::default()));
    }

    #[test]
    fn a_checksum_that_the_device_would_put_elsewhere_is_not_asked_for() {
        for (start, at, ethertype) in [(34, 44, 0x0800), (34, 50, 0x88b5), (30, 46, 0x0800), (10, 26, 0x0800)]
        {
            let ask = advanced(Some(Checksum { start, at }), None, &head(&[ethertype]));
            assert_eq!(ask, Err(DropReason::CannotFinish), "{start} {at} {ethertype:#x}");
        }
    }
}
