//! Registers that Intel's gigabit cards have in the same places. Sections are of the 82574 GbE Controller Family datasheet 3.4,
//! chapter 10.2; the 82576 datasheet 2.7 has them in chapter 8.

use crate::registers;

registers! {
    /// Device control (10.2.2.1).
    CTRL @ 0x0000 rw { 0 => FD, 2 => GIO_MASTER_DISABLE, 5 => ASDE, 6 => SLU, 8..=9 => SPEED, 11 => FRCSPD, 12 => FRCDPX, 26 => RST, 27 => RFCE, 28 => TFCE, 30 => VME }
    /// Device status (10.2.2.2).
    STATUS @ 0x0008 ro { 0 => FD, 1 => LU, 6..=7 => SPEED, 14..=17 => NUM_VFS, 18 => IOV_MODE, 19 => GIO_MASTER_ENABLE }
    /// EEPROM control: whether the device has loaded its own settings after a reset (10.2.2.3).
    EEC @ 0x0010 ro { 8 => PRES, 9 => AUTO_RD }
    /// EEPROM read: a word of it (10.2.2.4).
    EERD @ 0x0014 rw { 0 => START, 1 => DONE, 2..=15 => ADDR, 16..=31 => DATA }
    /// Access to the PHY's registers (10.2.2.7).
    MDIC @ 0x0020 rw { 0..=15 => DATA, 16..=20 => REGADD, 21..=25 => PHYADD, 26..=27 => OP, 28 => READY, 30 => ERROR }
    /// EtherType of VLAN tags (10.2.2.9).
    VET @ 0x0038 rw {}

    /// Receive control (10.2.5.1).
    RCTL @ 0x0100 rw { 1 => EN, 3 => UPE, 4 => MPE, 5 => LPE, 15 => BAM, 18 => VFE, 16..=17 => BSIZE, 25 => BSEX, 26 => SECRC }
    /// Receive checksum control.
    RXCSUM @ 0x5000 rw { 8 => IPOFLD, 9 => TUOFLD, 13 => PCSD }
    /// Multicast table: a bit for each of 4,096 hashes.
    MTA @ 0x5200 + 4 * word[128] rw {}
    /// Receive addresses, low and high part.
    RAL @ 0x5400 + 8 * address[16] rw {}
    RAH @ 0x5404 + 8 * address[16] rw { 0..=15 => HIGH, 18..=25 => POOL, 31 => AV }
    /// Multiple receive queues.
    MRQC @ 0x5818 rw { 0..=2 => ENABLE, 16 => TCP4, 17 => IP4, 20 => IP6, 21 => TCP6, 22 => UDP4, 23 => UDP6 }

    /// Transmit control (10.2.6.1).
    TCTL @ 0x0400 rw { 1 => EN, 3 => PSP, 4..=11 => CT, 12..=21 => COLD, 24 => RTLC }

    /// Hardware counters, cleared by reading (10.2.7): see `statistics`.
    COUNTER @ 0x4000 + 4 * number[64] rc {}
}
