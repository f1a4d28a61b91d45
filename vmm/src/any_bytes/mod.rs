//! What guests and control clients may write, made of any bytes: queues ([`queues`]), PCI ([`pci`]), interrupt controllers
//! ([`interrupts`]), HTTP ([`requests`]).
//!
//! Shared by the property tests here, which try some of it everywhere, and the fuzz targets in `fuzz/`, which go on. Never part
//! of a program.

mod interrupts;
mod pci;
mod queues;
mod requests;

pub use interrupts::interrupts;
pub use pci::pci;
pub use queues::queues;
pub use requests::requests;

/// Bytes taken from the input, zeros when it is used up.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or(0)
    }

    fn word(&mut self) -> u16 {
        u16::from(self.byte()) | u16::from(self.byte()) << 8
    }

    fn long(&mut self) -> u32 {
        u32::from(self.word()) | u32::from(self.word()) << 16
    }

    /// The next bytes, fewer at the end.
    fn bytes(&mut self, most: usize) -> &'a [u8] {
        let (first, rest) = self.0.split_at(most.min(self.0.len()));
        self.0 = rest;
        first
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    fn bytes(most: usize) -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec(any::<u8>(), 0..most)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

        #[test]
        fn devices_survive_whatever_their_drivers_write_to_queues(bytes in bytes(1000)) {
            super::queues(&bytes);
        }

    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

        #[test]
        fn a_machine_answers_whatever_its_control_clients_write(bytes in bytes(600)) {
            super::requests(&bytes);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

        #[test]
        fn functions_survive_whatever_a_guest_writes_to_their_registers(bytes in bytes(1500)) {
            super::pci(&bytes);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

        #[test]
        fn controllers_survive_whatever_a_guest_writes_to_their_registers(bytes in bytes(400)) {
            super::interrupts(&bytes);
        }
    }
}
