#![doc = include_str!("README.md")]

mod regs;

use port::{DropReason, Head};

use crate::access::{Bar, Entry, Regs, WaitError, Writable};
use crate::intel::regs::{CTRL, EEC, MRQC, STATUS};
use crate::intel::{self, Adapter, Ask, CHECKSUM, Card, Checksum, INSERT_TAG, Physical, RESET_LIMIT};
use crate::nic::{DeviceError, Options};
use regs::{
    CTRL_EXT, EIAC, ICR, ICS, IMC, IMS, IVAR, RDBAH, RDBAL, RDH, RDLEN, RDT, RFCTL, RXDCTL, TDBAH, TDBAL,
    TDH, TDLEN, TDT, TIPG, TXDCTL,
};

/// An 82574L.
pub type E1000e<D> = Adapter<D, I82574>;

/// What the 82574L differs in from others.
pub struct I82574;

impl Card for I82574 {
    const NAME: &'static str = "an 82574L";
    const IDS: &'static [u32] = &[0x10d3_8086];
    /// Datasheet 10.1.
    const BAR_BYTES: u32 = 128 << 10;
    const TABLE: &'static [Entry] = regs::TABLE;
    const RING_ALIGN: u32 = 16;
    /// CRC or alignment (CE), symbol (SE), sequence (SEQ), carrier extension (CXE), data (RXE).
    const DAMAGED: u64 = 1 << 24 | 1 << 25 | 1 << 26 | 1 << 28 | 1 << 31;
    /// IXSM.
    const IGNORE_CHECKSUM: u64 = 1 << 2;
    /// Datasheet 7.1, extended errors.
    const RECEIVE_ERRORS: [&'static str; 8] = [
        "crc_or_alignment",
        "symbol",
        "sequence",
        "",
        "carrier_extension",
        "tcp_udp_checksum",
        "ip_checksum",
        "data",
    ];

    #[inline(always)]
    fn receive_tail(_: u32) -> impl Writable {
        RDT(0)
    }

    /// Of five (datasheet 7.4.1.2).
    fn vector(_: u32) -> u16 {
        0
    }

    fn arm<B: Bar>(regs: &Regs<B>, _: u32) {
        regs.write(ICR, ICR::RXQ0);
        regs.write(IMS, IMS::RXQ0);
        regs.flush(STATUS);
    }

    fn raise<B: Bar>(regs: &Regs<B>, _: u32) {
        regs.write(ICS, ICS::RXQ0);
        regs.flush(STATUS);
    }

    fn disarm<B: Bar>(regs: &Regs<B>, _: u32) {
        regs.write(IMC, IMC::RXQ0);
    }

    #[inline(always)]
    fn transmit_tail(_: u32) -> impl Writable {
        TDT(0)
    }

    /// Datasheet 7.2.10: DTYP 1, DEXT.
    #[inline(always)]
    fn data(len: u32, _: u32, flags: u64) -> u64 {
        u64::from(len) | 1 << 20 | 1 << 29 | flags
    }

    /// The tag is in the data descriptor; the checksum in a context descriptor (datasheet 7.2.11).
    fn ask(checksum: Option<Checksum>, tag: Option<u16>, _: &Head) -> Result<Ask, DropReason> {
        let tag = tag.map_or(0, |tci| u64::from(tci) << 48 | INSERT_TAG);
        Ok(Ask {
            flags: tag | checksum.map_or(0, |_| CHECKSUM),
            // TUCSE 0: to the end of the frame. The TCP bit only matters for segmentation.
            context: checksum
                .map(|Checksum { start, at }| [u64::from(start) << 32 | u64::from(at) << 40, 1 << 29]),
        })
    }

    fn quiet<B: Bar>(regs: &Regs<B>) -> Result<(), WaitError> {
        intel::quiet::<B, Self>(regs)
    }
}

impl Physical for I82574 {
    /// Of the device's two.
    const QUEUES: u16 = 1;
    const MTU: u32 = 9000;
    const EXACT: u32 = 16;

    fn mask_interrupts<B: Bar>(regs: &Regs<B>) {
        regs.write_number(IMC, u32::MAX);
        regs.flush(ICR);
    }

    fn wait_for_settings<B: Bar>(regs: &Regs<B>) -> Result<(), WaitError> {
        regs.wait_set(EEC, EEC::AUTO_RD, RESET_LIMIT)
    }

    type Functions = ();

    fn prepare<B: Bar>(regs: &Regs<B>, _: &Options) -> Result<(), DeviceError> {
        regs.set(CTRL, CTRL::ASDE);
        regs.write_number(MRQC, 0);
        // The queue's vector; its message clears the cause. None is enabled.
        regs.set(CTRL_EXT, CTRL_EXT::PBA_SUPPORT);
        regs.write(IVAR, IVAR::RXQ0.is(Self::vector(0).into()) | IVAR::RXQ0_VALID);
        regs.write(EIAC, EIAC::RXQ0);
        regs.set(RFCTL, RFCTL::EXSTEN);
        // The values that 10.2.6.2 names for copper.
        regs.write(TIPG, TIPG::IPGT.is(8) | TIPG::IPGR1.is(8) | TIPG::IPGR2.is(6));
        Ok(())
    }

    /// Datasheet 4.6.5: receive initialization.
    fn start_receive<B: Bar>(
        regs: &Regs<B>,
        queue: u32,
        ring: u64,
        options: &Options,
    ) -> Result<(), DeviceError> {
        regs.write_number(RDBAL(queue), ring as u32);
        regs.write_number(RDBAH(queue), (ring >> 32) as u32);
        regs.write_number(RDLEN(queue), 16 * options.receive_ring);
        regs.write_number(RDH(queue), 0);
        regs.write_number(RDT(queue), 0);
        // Descriptors are written back one by one, so that the last frame of a burst is seen at once.
        regs.write(RXDCTL(queue), RXDCTL::GRAN | RXDCTL::PTHRESH.is(16) | RXDCTL::WTHRESH.is(0));
        Ok(())
    }

    /// Datasheet 4.6.6: transmit initialization.
    fn start_transmit<B: Bar>(
        regs: &Regs<B>,
        queue: u32,
        ring: u64,
        options: &Options,
    ) -> Result<(), DeviceError> {
        regs.write_number(TDBAL(queue), ring as u32);
        regs.write_number(TDBAH(queue), (ring >> 32) as u32);
        regs.write_number(TDLEN(queue), 16 * options.transmit_ring);
        regs.write_number(TDH(queue), 0);
        regs.write_number(TDT(queue), 0);
        // WTHRESH 0: what was asked for is reported at once.
        regs.write(
            TXDCTL(queue),
            TXDCTL::GRAN | TXDCTL::ALWAYS | TXDCTL::PTHRESH.is(31) | TXDCTL::HTHRESH.is(1),
        );
        Ok(())
    }
}
