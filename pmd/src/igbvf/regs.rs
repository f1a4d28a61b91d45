//! Registers of a virtual function of the 82576 (82576EB datasheet 2.7, section 8.26): its own few, in places of the older cards.

use crate::registers;

registers! {
    /// Device control: only its reset.
    VTCTRL @ 0x0000 rw { 26 => RST }
    /// The function's side of its mailbox. PFSTS, PFACK and RSTD are cleared by reading.
    V2PMAILBOX @ 0x0C40 rcw { 0 => REQ, 1 => ACK, 2 => VFU, 3 => PFU, 4 => PFSTS, 5 => PFACK, 6 => RSTI, 7 => RSTD }
    /// What is said.
    VMBMEM @ 0x0800 + 4 * word[16] rw {}

    /// Interrupt cause set.
    VTEICS @ 0x1520 wo {}
    /// Interrupt mask: set, clear; which causes a message clears; causes. A bit is one of three vectors.
    VTEIMS @ 0x1524 wo {}
    VTEIMC @ 0x1528 wo {}
    VTEIAC @ 0x152C wo {}
    VTEICR @ 0x1580 wo {}
    /// The vectors of queue 0, receive and transmit.
    VTIVAR @ 0x1700 wo { 0..=2 => RECEIVE, 7 => RECEIVE_VALID }

    /// Receive descriptor base, length, head and tail, one of each for two queues.
    RDBAL @ 0x2800 + 0x100 * queue[2] rw {}
    RDBAH @ 0x2804 + 0x100 * queue[2] rw {}
    RDLEN @ 0x2808 + 0x100 * queue[2] rw {}
    /// Which descriptors, and buffers of how many KiB.
    SRRCTL @ 0x280C + 0x100 * queue[2] rw { 0..=6 => BSIZEPACKET, 25..=27 => DESCTYPE, 31 => DROP_EN }
    RDH @ 0x2810 + 0x100 * queue[2] rw {}
    RDT @ 0x2818 + 0x100 * queue[2] rw {}
    /// Receive descriptor control.
    RXDCTL @ 0x2828 + 0x100 * queue[2] rw { 0..=4 => PTHRESH, 8..=12 => HTHRESH, 16..=20 => WTHRESH, 25 => ENABLE }

    /// Transmit descriptor base, length, head and tail, one of each for two queues.
    TDBAL @ 0x3800 + 0x100 * queue[2] rw {}
    TDBAH @ 0x3804 + 0x100 * queue[2] rw {}
    TDLEN @ 0x3808 + 0x100 * queue[2] rw {}
    TDH @ 0x3810 + 0x100 * queue[2] rw {}
    TDT @ 0x3818 + 0x100 * queue[2] rw {}
    /// Transmit descriptor control.
    TXDCTL @ 0x3828 + 0x100 * queue[2] rw { 0..=4 => PTHRESH, 8..=12 => HTHRESH, 16..=20 => WTHRESH, 25 => ENABLE }

    /// Hardware counters of 32 bits, which count on: frames received and sent, their bytes, groups' frames received.
    VFGPRC @ 0x0F10 ro {}
    VFGPTC @ 0x0F14 ro {}
    VFGORC @ 0x0F18 ro {}
    VFGOTC @ 0x0F34 ro {}
    VFMPRC @ 0x0F3C ro {}
}
