//! Registers that the 82576 has in places of its own (82576EB datasheet 2.7, chapter 8).

use crate::registers;

registers! {
    /// Interrupt cause, cleared by reading (8.8).
    ICR @ 0x1500 rc {}
    /// Interrupt mask clear (8.8).
    IMC @ 0x150C wo {}
    /// General purpose interrupt enable (8.8).
    GPIE @ 0x1514 rw { 0 => NSICR, 4 => MULTIPLE_MSIX, 31 => PBA_SUPPORT }
    /// Extended interrupt cause set (8.8).
    EICS @ 0x1520 wo {}
    /// Extended interrupt mask: set, clear; which causes a message clears; causes, cleared by writing ones. A bit is a vector (8.8).
    EIMS @ 0x1524 rw {}
    EIMC @ 0x1528 wo {}
    EIAC @ 0x152C rw {}
    EICR @ 0x1580 rcw {}
    /// Vectors of queues `pair` (receive, transmit) and `pair` + 8 (8.8).
    IVAR @ 0x1700 + 4 * pair[8] rw {}

    /// Extended device control: the adapter was reset and is ready for its virtual functions (8.2.3).
    CTRL_EXT @ 0x0018 rw { 14 => PFRSTD }

    /// What virtual function `vf` and the adapter tell each other: words 16 * vf and up (8.14).
    VMBMEM @ 0x0800 + 4 * word[128] rw {}
    /// The adapter's side of the mailbox of `vf` (8.14).
    P2VMAILBOX @ 0x0C00 + 4 * vf[8] rw { 0 => STS, 1 => ACK, 2 => VFU, 3 => PFU, 4 => RVFU }
    /// Which mailboxes have a request, cleared by writing ones; which functions were reset, likewise (8.14).
    MBVFICR @ 0x0C80 rw { 0..=7 => VFREQ, 16..=23 => VFACK }
    VFLRE @ 0x0C88 rw {}
    /// Which pools may receive, and send (8.14).
    VFRE @ 0x0C8C rw {}
    VFTE @ 0x0C90 rw {}
    /// Queues that drop what they have no room for (8.10).
    QDE @ 0x2408 rw {}
    /// Checks of what pools send, and whether pools hear each other (8.12).
    DTXSWC @ 0x3500 rw { 0..=7 => MAC_SPOOF, 8..=15 => VLAN_SPOOF, 31 => LOOPBACK }
    /// What tag a pool's frames get (8.14).
    VMVIR @ 0x3700 + 4 * pool[8] rw { 0..=15 => TAG, 30 => ALWAYS }
    /// Further receive addresses, low and high part (8.10).
    RAL2 @ 0x54E0 + 8 * address[8] rw {}
    RAH2 @ 0x54E4 + 8 * address[8] rw { 0..=15 => HIGH, 18..=25 => POOL, 31 => AV }
    /// VLANs that are received: a bit for each (8.10).
    VFTA @ 0x5600 + 4 * word[128] rw {}
    /// How pools share the device (8.10).
    VT_CTL @ 0x581C rw { 7..=9 => DEFAULT_POOL, 30 => REPLICATE }
    /// What pool `pool` receives (8.14).
    VMOLR @ 0x5AD0 + 4 * pool[8] rw { 0..=13 => RLPML, 16 => LPE, 24 => AUPE, 25 => ROMPE, 27 => BAM, 28 => MPME, 30 => STRVLAN,
        31 => STRCRC }
    /// Of frames for several pools: no FCS.
    RPLOLR @ 0x5AF0 rw { 31 => STRCRC }
    /// The pools of a VLAN (8.14).
    VLVF @ 0x5D00 + 4 * entry[32] rw { 0..=11 => VLAN, 12..=19 => POOLS, 31 => VALID }

    /// Longest frame that is received, with FCS (8.10).
    RLPML @ 0x5004 rw {}
    /// Redirection table: a queue for each of 128 hashes, four to a register (8.10).
    RETA @ 0x5C00 + 4 * word[32] rw {}
    /// The hash's key (8.10).
    RSSRK @ 0x5C80 + 4 * word[10] rw {}

    /// Receive descriptor base, length, head and tail (8.10), one of each for 16 queues.
    RDBAL @ 0xC000 + 0x40 * queue[16] rw {}
    RDBAH @ 0xC004 + 0x40 * queue[16] rw {}
    RDLEN @ 0xC008 + 0x40 * queue[16] rw {}
    /// Which descriptors, and buffers of how many KiB.
    SRRCTL @ 0xC00C + 0x40 * queue[16] rw { 0..=6 => BSIZEPACKET, 25..=27 => DESCTYPE, 31 => DROP_EN }
    RDH @ 0xC010 + 0x40 * queue[16] rw {}
    RDT @ 0xC018 + 0x40 * queue[16] rw {}
    /// Receive descriptor control.
    RXDCTL @ 0xC028 + 0x40 * queue[16] rw { 0..=4 => PTHRESH, 8..=12 => HTHRESH, 16..=20 => WTHRESH, 25 => ENABLE }

    /// Transmit descriptor base, length, head and tail (8.12), one of each for 16 queues.
    TDBAL @ 0xE000 + 0x40 * queue[16] rw {}
    TDBAH @ 0xE004 + 0x40 * queue[16] rw {}
    TDLEN @ 0xE008 + 0x40 * queue[16] rw {}
    TDH @ 0xE010 + 0x40 * queue[16] rw {}
    TDT @ 0xE018 + 0x40 * queue[16] rw {}
    /// Transmit descriptor control.
    TXDCTL @ 0xE028 + 0x40 * queue[16] rw { 0..=4 => PTHRESH, 8..=12 => HTHRESH, 16..=20 => WTHRESH, 25 => ENABLE }
}
