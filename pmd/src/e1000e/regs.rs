//! Registers that the 82574L has in places of its own (82574 GbE Controller Family datasheet 3.4, chapter 10.2).

use crate::registers;

registers! {
    /// Extended device control (10.2.2.5): pending bits as MSI-X has them.
    CTRL_EXT @ 0x0018 rw { 31 => PBA_SUPPORT }
    /// Interrupt cause, cleared by reading, or by writing ones (10.2.4.1).
    ICR @ 0x00C0 rcw { 20 => RXQ0 }
    /// Interrupt cause set (10.2.4.4).
    ICS @ 0x00C8 wo { 20 => RXQ0 }
    /// Interrupt mask set (10.2.4.5).
    IMS @ 0x00D0 rw { 20 => RXQ0 }
    /// Interrupt mask clear (10.2.4.6).
    IMC @ 0x00D8 wo { 20 => RXQ0 }
    /// Causes that their message clears (10.2.4.7).
    EIAC @ 0x00DC rw { 20 => RXQ0 }
    /// The vectors of causes (10.2.4.9).
    IVAR @ 0x00E4 rw { 0..=2 => RXQ0, 3 => RXQ0_VALID }

    /// Receive descriptor base, length, head and tail (10.2.5.5 ff.), one of each for both queues.
    RDBAL @ 0x2800 + 0x100 * queue[2] rw {}
    RDBAH @ 0x2804 + 0x100 * queue[2] rw {}
    RDLEN @ 0x2808 + 0x100 * queue[2] rw {}
    RDH @ 0x2810 + 0x100 * queue[2] rw {}
    RDT @ 0x2818 + 0x100 * queue[2] rw {}
    /// Receive descriptor control: when descriptors are fetched and written back.
    RXDCTL @ 0x2828 + 0x100 * queue[2] rw { 0..=5 => PTHRESH, 8..=13 => HTHRESH, 16..=21 => WTHRESH, 24 => GRAN }
    /// Receive filter control: extended descriptors.
    RFCTL @ 0x5008 rw { 15 => EXSTEN }

    /// Transmit inter-packet gap (10.2.6.2).
    TIPG @ 0x0410 rw { 0..=9 => IPGT, 10..=19 => IPGR1, 20..=29 => IPGR2 }
    /// Transmit descriptor base, length, head and tail, one of each for both queues.
    TDBAL @ 0x3800 + 0x100 * queue[2] rw {}
    TDBAH @ 0x3804 + 0x100 * queue[2] rw {}
    TDLEN @ 0x3808 + 0x100 * queue[2] rw {}
    TDH @ 0x3810 + 0x100 * queue[2] rw {}
    TDT @ 0x3818 + 0x100 * queue[2] rw {}
    /// Transmit descriptor control. Bit 22 is to be set always.
    TXDCTL @ 0x3828 + 0x100 * queue[2] rw { 0..=5 => PTHRESH, 8..=13 => HTHRESH, 16..=21 => WTHRESH, 22 => ALWAYS, 24 => GRAN }
}
