//! The device's own counters (82574 datasheet 10.2.7). They are cleared by reading, so the driver adds them up.

use super::regs::COUNTER;
use crate::access::{Bar, GONE, Regs};

macro_rules! statistics {
    ($($(#[doc = $doc:literal])+ $name:ident @ $low:literal $(, $high:literal)?;)+) => {
        /// What the hardware counted since the driver took it.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub(super) struct Statistics { $($(#[doc = $doc])+ $name: u64,)+ }

        impl Statistics {
            /// Reads all counters and adds them.
            pub(super) fn update<B: Bar>(&mut self, regs: &Regs<B>) {
                $(self.$name += read(regs, $low, 0 $(+ $high)?);)+
            }

            /// All of them, by name.
            pub(super) fn each(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name)),+].into_iter()
            }
        }
    };
}

statistics! {
    /// Frames with a bad FCS.
    crc_errors @ 0x4000;
    /// Frames that did not end on a byte.
    alignment_errors @ 0x4004;
    /// Frames with a damaged symbol.
    receive_errors @ 0x400C;
    /// Frames lost because the device's own buffer was full.
    missed @ 0x4010;
    /// Frames whose length field was wrong.
    length_errors @ 0x4040;
    /// Frames received without error.
    received @ 0x4074;
    /// Of these, broadcasts.
    received_broadcast @ 0x4078;
    /// Of these, multicasts.
    received_multicast @ 0x407C;
    /// Frames sent without error.
    sent @ 0x4080;
    /// Bytes received, FCS included.
    received_bytes @ 0x4088, 0x408C;
    /// Bytes sent, FCS included.
    sent_bytes @ 0x4090, 0x4094;
    /// Times that a frame came and the ring had no buffer.
    no_buffers @ 0x40A0;
    /// Frames that were too short.
    undersize @ 0x40A4;
    /// Frames that were too long.
    oversize @ 0x40AC;
}

/// Reads a counter of 32 bits, or of 64: its high half, in the next register, is what clears both.
fn read<B: Bar>(regs: &Regs<B>, low: u32, high: u32) -> u64 {
    let number = |offset: u32| COUNTER((offset - 0x4000) / 4);
    let value = u64::from(regs.read(number(low)));
    let value = if high == 0 { value } else { value | u64::from(regs.read(number(high))) << 32 };
    // A device that is gone counts nothing.
    if value as u32 == GONE { 0 } else { value }
}
