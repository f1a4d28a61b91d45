//! Registers of the 82574L that this driver uses (82574 GbE Controller Family datasheet 3.4, chapter 10.2).

use crate::registers;

registers! {
    /// Device control (10.2.2.1).
    CTRL @ 0x0000 rw { 0 => FD, 2 => GIO_MASTER_DISABLE, 5 => ASDE, 6 => SLU, 26 => RST, 27 => RFCE, 28 => TFCE, 30 => VME }
    /// Device status (10.2.2.2).
    STATUS @ 0x0008 ro { 0 => FD, 1 => LU, 6..=7 => SPEED, 19 => GIO_MASTER_ENABLE }
    /// EEPROM control: whether the device has loaded its own settings after a reset (10.2.2.3).
    EEC @ 0x0010 ro { 9 => AUTO_RD }
    /// EtherType of VLAN tags (10.2.2.9).
    VET @ 0x0038 rw {}

    /// Interrupt cause, cleared by reading (10.2.4.1).
    ICR @ 0x00C0 ro {}
    /// Interrupt mask clear (10.2.4.6).
    IMC @ 0x00D8 wo {}

    /// Receive control (10.2.5.1).
    RCTL @ 0x0100 rw { 1 => EN, 3 => UPE, 4 => MPE, 5 => LPE, 15 => BAM, 16..=17 => BSIZE, 25 => BSEX, 26 => SECRC }
    /// Receive descriptor base, length, head and tail (10.2.5.5 ff.), one of each for both queues.
    RDBAL @ 0x2800 + 0x100 * queue rw {}
    RDBAH @ 0x2804 + 0x100 * queue rw {}
    RDLEN @ 0x2808 + 0x100 * queue rw {}
    RDH @ 0x2810 + 0x100 * queue rw {}
    RDT @ 0x2818 + 0x100 * queue rw {}
    /// Receive descriptor control: when descriptors are fetched and written back.
    RXDCTL @ 0x2828 + 0x100 * queue rw { 0..=5 => PTHRESH, 8..=13 => HTHRESH, 16..=21 => WTHRESH, 24 => GRAN }
    /// Receive checksum control.
    RXCSUM @ 0x5000 rw { 8 => IPOFLD, 9 => TUOFLD, 13 => PCSD }
    /// Receive filter control: extended descriptors.
    RFCTL @ 0x5008 rw { 15 => EXSTEN }
    /// Multicast table: a bit for each of 4,096 hashes.
    MTA @ 0x5200 + 4 * word rw {}
    /// Receive addresses, low and high part.
    RAL @ 0x5400 + 8 * address rw {}
    RAH @ 0x5404 + 8 * address rw { 0..=15 => HIGH, 31 => AV }
    /// Multiple receive queues: none.
    MRQC @ 0x5818 rw {}

    /// Transmit control (10.2.6.1).
    TCTL @ 0x0400 rw { 1 => EN, 3 => PSP, 4..=11 => CT, 12..=21 => COLD, 24 => RTLC }
    /// Transmit inter-packet gap (10.2.6.2).
    TIPG @ 0x0410 rw { 0..=9 => IPGT, 10..=19 => IPGR1, 20..=29 => IPGR2 }
    /// Transmit descriptor base, length, head and tail, one of each for both queues.
    TDBAL @ 0x3800 + 0x100 * queue rw {}
    TDBAH @ 0x3804 + 0x100 * queue rw {}
    TDLEN @ 0x3808 + 0x100 * queue rw {}
    TDH @ 0x3810 + 0x100 * queue rw {}
    TDT @ 0x3818 + 0x100 * queue rw {}
    /// Transmit descriptor control. Bit 22 is to be set always.
    TXDCTL @ 0x3828 + 0x100 * queue rw { 0..=5 => PTHRESH, 8..=13 => HTHRESH, 16..=21 => WTHRESH, 22 => ALWAYS, 24 => GRAN }

    /// Hardware counters, cleared by reading (10.2.7): see `statistics`.
    COUNTER @ 0x4000 + 4 * number ro {}
}
