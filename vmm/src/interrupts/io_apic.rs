//! The registers of an I/O APIC: Intel's 82093AA (order number 290566-001), with the EOI register of its successors (ICH9
//! datasheet, 13.5.5), as version 0x20 says.
//!
//! Owns what the guest wrote and which message that makes of an input. KVM lets a guest of this chip keep its local APICs from
//! broadcasting the end of an interrupt, and such a guest writes the EOI register: hence the version. Never talks to KVM, and
//! knows nothing of what is on an input.

use super::Message;

/// Inputs, and redirection entries.
pub(super) const PINS: usize = 24;

// Offsets of the registers that are memory (3.1; ICH9 13.5.1).
const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const END: u64 = 0x40;

// Numbers of those behind the window (3.2).
const ID: u8 = 0;
const VERSION: u8 = 1;
const ARBITRATION: u8 = 2;
const ENTRIES: u8 = 0x10;

/// Highest entry, version.
const VERSION_VALUE: u32 = (PINS as u32 - 1) << 16 | 0x20;
/// The four bits of the identifier.
const ID_BITS: u32 = 0xf << 24;

// A redirection entry (3.2.4). What is not named is reserved, or, as the state of a delivery, always clear: ours are done at once.
const VECTOR: u64 = 0xff;
const DELIVERY_MODE: u64 = 7 << 8;
const LOGICAL: u64 = 1 << 11;
const ACTIVE_LOW: u64 = 1 << 13;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const DESTINATION: u64 = 0xff << 56;
const WRITABLE: u64 = VECTOR | DELIVERY_MODE | LOGICAL | ACTIVE_LOW | LEVEL | MASKED | DESTINATION;

// A message (Intel SDM volume 3, 11.11).
const MESSAGE_ADDRESS: u64 = 0xfee0_0000;
const MESSAGE_LOGICAL: u64 = 1 << 2;
const MESSAGE_ASSERT: u32 = 1 << 14;
const MESSAGE_LEVEL: u32 = 1 << 15;

/// What a write came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Written {
    /// Nothing that concerns anybody else.
    Nothing,
    /// Another redirection entry of this input.
    Entry(usize),
    /// The end of the interrupt with this vector.
    End(u8),
}

/// The registers.
pub(super) struct IoApic {
    select: u8,
    id: u32,
    entries: [u64; PINS],
}

impl IoApic {
    /// As it is after a reset: everything masked.
    pub(super) fn new() -> Self {
        Self { select: 0, id: 0, entries: [MASKED; PINS] }
    }

    /// Reads at an offset; zeros where nothing is. The window is a double word and no other access reaches it (3.0).
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match (offset, &mut *data) {
            (SELECT, [low, ..]) => *low = self.select,
            (WINDOW, [_, _, _, _]) => data.copy_from_slice(&self.register().to_le_bytes()),
            _ => {}
        }
    }

    /// Writes at an offset.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Written {
        match (offset, data) {
            (SELECT, [low, ..]) => self.select = *low,
            (WINDOW, [a, b, c, d]) => return self.set_register(u32::from_le_bytes([*a, *b, *c, *d])),
            (END, [vector, _, _, _]) => return Written::End(*vector),
            _ => {}
        }
        Written::Nothing
    }

    /// What stands for input `pin` among messages.
    pub(super) fn message(&self, pin: usize) -> Message {
        let entry = self.entry(pin);
        let logical = if entry & LOGICAL != 0 { MESSAGE_LOGICAL } else { 0 };
        let level = if entry & LEVEL != 0 { MESSAGE_LEVEL | MESSAGE_ASSERT } else { 0 };
        Message {
            address: MESSAGE_ADDRESS | (entry & DESTINATION) >> 56 << 12 | logical,
            data: (entry & (VECTOR | DELIVERY_MODE)) as u32 | level,
        }
    }

    pub(super) fn is_masked(&self, pin: usize) -> bool {
        self.entry(pin) & MASKED != 0
    }

    /// Whether it interrupts as long as it is active, not when it becomes so.
    pub(super) fn is_level(&self, pin: usize) -> bool {
        self.entry(pin) & LEVEL != 0
    }

    /// Input `pin` becomes active, and inactive again. The message to send; none if the input is masked (an edge is lost then,
    /// 3.2.4), or if the guest takes it for a level and has not ended the last one.
    pub(super) fn pulse(&mut self, pin: usize) -> Option<Message> {
        let entry = self.entries.get_mut(pin)?;
        if *entry & MASKED != 0 || *entry & REMOTE_IRR != 0 {
            return None;
        }
        if *entry & LEVEL != 0 {
            *entry |= REMOTE_IRR;
        }
        Some(self.message(pin))
    }

    /// The guest ended the interrupt with this vector. The level-triggered inputs that it ends, a bit each.
    pub(super) fn end(&mut self, vector: u8) -> u32 {
        let mut ended = 0;
        for (pin, entry) in self.entries.iter_mut().enumerate() {
            if *entry & LEVEL != 0 && *entry & VECTOR == u64::from(vector) {
                *entry &= !REMOTE_IRR;
                ended |= 1 << pin;
            }
        }
        ended
    }

    /// An input that is not there is masked.
    fn entry(&self, pin: usize) -> u64 {
        self.entries.get(pin).copied().unwrap_or(MASKED)
    }

    /// The entry, and how far to shift for its half, that is selected.
    fn selected(&self) -> Option<(usize, u32)> {
        let half = usize::from(self.select.checked_sub(ENTRIES)?);
        (half / 2 < PINS).then_some((half / 2, if half.is_multiple_of(2) { 0 } else { 32 }))
    }

    fn register(&self) -> u32 {
        match (self.select, self.selected()) {
            (ID | ARBITRATION, _) => self.id,
            (VERSION, _) => VERSION_VALUE,
            (_, Some((pin, shift))) => (self.entry(pin) >> shift) as u32,
            _ => 0,
        }
    }

    fn set_register(&mut self, value: u32) -> Written {
        if self.select == ID {
            self.id = value & ID_BITS;
        }
        let Some((pin, shift)) = self.selected() else { return Written::Nothing };
        let Some(entry) = self.entries.get_mut(pin) else { return Written::Nothing };
        let may = WRITABLE & 0xffff_ffff << shift;
        *entry = *entry & !may | u64::from(value) << shift & may;
        if *entry & LEVEL == 0 {
            *entry &= !REMOTE_IRR;
        }
        Written::Entry(pin)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn get(chip: &mut IoApic, register: u8) -> u32 {
        assert_eq!(chip.write(SELECT, &[register, 0, 0, 0]), Written::Nothing);
        let mut data = [0xff; 4];
        chip.read(WINDOW, &mut data);
        u32::from_le_bytes(data)
    }

    fn set(chip: &mut IoApic, register: u8, value: u32) -> Written {
        assert_eq!(chip.write(SELECT, &[register]), Written::Nothing);
        chip.write(WINDOW, &value.to_le_bytes())
    }

    /// Input `pin` with an entry whose low half is `low`, sent to APIC 3.
    fn with(pin: u8, low: u32) -> IoApic {
        let mut chip = IoApic::new();
        assert_eq!(set(&mut chip, ENTRIES + 2 * pin + 1, 3 << 24), Written::Entry(pin.into()));
        assert_eq!(set(&mut chip, ENTRIES + 2 * pin, low), Written::Entry(pin.into()));
        chip
    }

    #[test]
    fn it_says_what_it_is_and_all_its_inputs_are_masked() {
        let mut chip = IoApic::new();
        assert_eq!(get(&mut chip, VERSION), 0x0017_0020);
        assert_eq!(set(&mut chip, ID, u32::MAX), Written::Nothing);
        assert_eq!((get(&mut chip, ID), get(&mut chip, ARBITRATION)), (0x0f00_0000, 0x0f00_0000));
        set(&mut chip, VERSION, 0);
        set(&mut chip, ARBITRATION, 0);
        assert_eq!((get(&mut chip, VERSION), get(&mut chip, ARBITRATION)), (0x0017_0020, 0x0f00_0000));
        for pin in 0..PINS {
            assert!(chip.is_masked(pin) && chip.pulse(pin).is_none());
            assert_eq!(get(&mut chip, ENTRIES + 2 * pin as u8), 1 << 16);
        }
        for register in [3, 0xf, ENTRIES + 2 * PINS as u8, 0xff] {
            set(&mut chip, register, u32::MAX);
            assert_eq!(get(&mut chip, register), 0, "{register:#x}");
        }
    }

    #[test]
    fn an_entry_becomes_the_message_that_it_describes() {
        // Fixed, physical, edge; then lowest priority, logical, level.
        assert_eq!(with(4, 0x31).message(4), Message { address: 0xfee0_3000, data: 0x31 });
        assert_eq!(with(17, 0x8941).message(17), Message { address: 0xfee0_3004, data: 0xc141 });
        assert_eq!(with(4, 0x31).pulse(4), Some(Message { address: 0xfee0_3000, data: 0x31 }));
        assert_eq!(with(4, 0x31).pulse(5), None);
        assert_eq!(with(4, 0x1_0031).pulse(4), None, "masked");
    }

    #[test]
    fn a_level_is_sent_once_until_its_end_by_broadcast_or_by_register() {
        let mut chip = with(17, 0x8041);
        assert!(chip.pulse(17).is_some());
        assert_eq!(get(&mut chip, ENTRIES + 34), 0xc041, "remote IRR");
        assert!(chip.pulse(17).is_none());
        assert_eq!(chip.end(0x40), 0, "another vector's");
        assert_eq!(chip.end(0x41), 1 << 17);
        assert_eq!(get(&mut chip, ENTRIES + 34), 0x8041);
        assert!(chip.pulse(17).is_some());
        assert_eq!(chip.write(END, &[0x41, 0, 0, 0]), Written::End(0x41));
        // Two inputs that share a vector end together; an edge has no end.
        set(&mut chip, ENTRIES + 36, 0x8041);
        set(&mut chip, ENTRIES + 38, 0x41);
        assert_eq!(chip.end(0x41), 1 << 17 | 1 << 18);
        // Who has no EOI register ends it so (Linux, `__eoi_ioapic_pin`).
        assert!(chip.pulse(17).is_some());
        set(&mut chip, ENTRIES + 34, 0x1_0041);
        set(&mut chip, ENTRIES + 34, 0x8041);
        assert_eq!(get(&mut chip, ENTRIES + 34), 0x8041);
    }

    #[test]
    fn the_window_and_the_end_are_double_words_and_the_rest_of_the_page_is_empty() {
        let mut chip = with(0, 0x31);
        for offset in 0..0x100 {
            for length in 0..=9 {
                let mut data = vec![0xa5; length];
                chip.read(offset, &mut data);
                let something = offset == SELECT && length > 0 || offset == WINDOW && length == 4;
                assert!(something || data.iter().all(|byte| *byte == 0), "{length} bytes at {offset:#x}");
                let written = chip.write(offset, &vec![ENTRIES; length]);
                let expected = match (offset, length) {
                    (WINDOW, 4) => Written::Entry(0),
                    (END, 4) => Written::End(ENTRIES),
                    _ => Written::Nothing,
                };
                assert_eq!(written, expected, "{length} bytes at {offset:#x}");
            }
        }
    }

    proptest! {
        #[test]
        fn whatever_a_guest_writes_reserved_bits_stay_clear_and_a_masked_input_is_silent(
            steps in proptest::collection::vec((any::<u8>(), any::<u8>(), proptest::collection::vec(any::<u8>(), 0..9)), 0..200)
        ) {
            let mut chip = IoApic::new();
            for (what, offset, data) in steps {
                match what % 8 {
                    0 => drop(chip.end(offset)),
                    1 => {
                        let pin = usize::from(offset % 32);
                        let (masked, sent) = (chip.is_masked(pin), chip.pulse(pin));
                        prop_assert!(!(masked && sent.is_some()));
                    }
                    2 => drop(chip.write(offset.into(), &data)),
                    3 => chip.read(offset.into(), &mut data.clone()),
                    // More often where something is.
                    4 | 5 => drop(chip.write(SELECT, &[offset % 0x48])),
                    _ => drop(chip.write(WINDOW, &[what, offset, data.len() as u8 & 1, 0x80])),
                }
                for (pin, entry) in chip.entries.iter().enumerate() {
                    prop_assert_eq!(entry & !(WRITABLE | REMOTE_IRR), 0);
                    prop_assert!(entry & REMOTE_IRR == 0 || entry & LEVEL != 0);
                    let message = chip.message(pin);
                    prop_assert_eq!(message.address & !0xf_f004, MESSAGE_ADDRESS);
                    prop_assert_eq!(message.data & !0xc7ff, 0);
                }
                prop_assert_eq!(get(&mut chip, VERSION), VERSION_VALUE);
            }
        }
    }
}
