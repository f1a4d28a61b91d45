//! The interrupts of a modelled device, without a guest: messages are writes to memory, and there is memory to look at.
//!
//! [`Function::listen`] points each vector of the device's MSI-X table (PCI 3.0, section 6.8.2) at a word of the machine's own RAM.

use super::Function;
use super::protocol::Width;
use crate::access::{PciDevice, config};

/// Where the words lie: the machine has RAM there, and nobody uses it.
const WORDS: u64 = 1 << 20;

/// What a message writes.
const MESSAGE: u64 = 0x5eed;

/// Capability of MSI-X (PCI 3.0, section 6.8.2).
const MSIX: u32 = 0x11;
/// In the first word of it: on.
const ENABLE: u32 = 1 << 31;

impl Function {
    /// Turns MSI-X on, with every vector unmasked; how many there are. None if the device has none.
    pub fn listen(&self) -> Option<u16> {
        let capability = self.capability(MSIX)?;
        let header = self.config_read(capability);
        let vectors = (header >> 16 & 0x7ff) as u16 + 1;
        let table = self.config_read(capability + 4);
        let base = self.region((table & 7) as u8)? + u64::from(table & !7);
        for vector in 0..u64::from(vectors) {
            self.take(vector as u16);
            // Address, high half, data, mask bit.
            for (i, word) in (0..).zip([WORDS + 4 * vector, 0, MESSAGE, 0]) {
                self.shared.write(base + 16 * vector + 4 * i, Width::Long, word);
            }
        }
        self.config_write(capability, header | ENABLE);
        Some(vectors)
    }

    /// Whether `vector` was raised since this was last asked.
    pub fn take(&self, vector: u16) -> bool {
        let word = WORDS + 4 * u64::from(vector);
        let raised = self.shared.read(word, Width::Long) == MESSAGE;
        if raised {
            self.shared.write(word, Width::Long, 0);
        }
        raised
    }

    /// Where capability `id` is in the configuration space.
    fn capability(&self, id: u32) -> Option<u16> {
        let mut at = self.config_read(config::CAPABILITIES) & 0xfc;
        // A list of capabilities is at most 48 long: the space has no more room.
        for _ in 0..48 {
            let header = self.config_read(at as u16);
            if at == 0 {
                break;
            }
            if header & 0xff == id {
                return Some(at as u16);
            }
            at = header >> 8 & 0xfc;
        }
        None
    }
}
