//! Registers that the 82576 has in places of its own (82576EB datasheet 2.7, chapter 8).

use crate::registers;

registers! {
    /// Access to the PHY's registers (8.2).
    MDIC @ 0x0020 rw { 0..=15 => DATA, 16..=20 => REGADD, 21..=25 => PHYADD, 26..=27 => OP, 28 => READY, 30 => ERROR }

    /// Interrupt cause, cleared by reading (8.8).
    ICR @ 0x1500 ro {}
    /// Interrupt mask clear (8.8).
    IMC @ 0x150C wo {}
    /// General purpose interrupt enable (8.8).
    GPIE @ 0x1514 rw { 0 => NSICR, 4 => MULTIPLE_MSIX, 31 => PBA_SUPPORT }
    /// Extended interrupt mask: set, clear; which causes a message clears; causes, cleared by writing ones. A bit is a vector (8.8).
    EIMS @ 0x1524 rw {}
    EIMC @ 0x1528 wo {}
    EIAC @ 0x152C rw {}
    EICR @ 0x1580 rw {}
    /// Vectors of queues `pair` (receive, transmit) and `pair` + 8 (8.8).
    IVAR @ 0x1700 + 4 * pair rw {}

    /// Longest frame that is received, with FCS (8.10).
    RLPML @ 0x5004 rw {}
    /// Redirection table: a queue for each of 128 hashes, four to a register (8.10).
    RETA @ 0x5C00 + 4 * word rw {}
    /// The hash's key (8.10).
    RSSRK @ 0x5C80 + 4 * word rw {}

    /// Receive descriptor base, length, head and tail (8.10), one of each for 16 queues.
    RDBAL @ 0xC000 + 0x40 * queue rw {}
    RDBAH @ 0xC004 + 0x40 * queue rw {}
    RDLEN @ 0xC008 + 0x40 * queue rw {}
    /// Which descriptors, and buffers of how many KiB.
    SRRCTL @ 0xC00C + 0x40 * queue rw { 0..=6 => BSIZEPACKET, 25..=27 => DESCTYPE, 31 => DROP_EN }
    RDH @ 0xC010 + 0x40 * queue rw {}
    RDT @ 0xC018 + 0x40 * queue rw {}
    /// Receive descriptor control.
    RXDCTL @ 0xC028 + 0x40 * queue rw { 0..=4 => PTHRESH, 8..=12 => HTHRESH, 16..=20 => WTHRESH, 25 => ENABLE }

    /// Transmit descriptor base, length, head and tail (8.12), one of each for 16 queues.
    TDBAL @ 0xE000 + 0x40 * queue rw {}
    TDBAH @ 0xE004 + 0x40 * queue rw {}
    TDLEN @ 0xE008 + 0x40 * queue rw {}
    TDH @ 0xE010 + 0x40 * queue rw {}
    TDT @ 0xE018 + 0x40 * queue rw {}
    /// Transmit descriptor control.
    TXDCTL @ 0xE028 + 0x40 * queue rw { 0..=4 => PTHRESH, 8..=12 => HTHRESH, 16..=20 => WTHRESH, 25 => ENABLE }
}
