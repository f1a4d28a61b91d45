//! Registers by which a guest ends: ACPI sleep control and reset (ACPI 6.5, 4.8.3.6 and 4.8.3.7), and pvpanic (QEMU,
//! docs/specs/pvpanic.rst).

use crate::acpi::{RESET_VALUE, SLEEP_ENABLE, SLEEP_TYPE_S5};
use crate::layout;

/// The guest panicked; what it does next (a crash dump, say) is not announced to us, so we do not offer the other events.
const PANICKED: u8 = 1;

/// What a write came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum Outcome {
    /// The guest goes on.
    Done,
    /// It turned itself off.
    PowerOff,
    /// It wants to start again.
    Reset,
    /// It says that it panicked.
    Panicked,
}

/// What one of our registers holds; `None`: it is none of ours.
pub(crate) fn port_read(port: u16) -> Option<u8> {
    match port {
        layout::PANIC_PORT => Some(PANICKED),
        layout::SLEEP_CONTROL_PORT | layout::SLEEP_STATUS_PORT | layout::RESET_PORT => Some(0),
        _ => None,
    }
}

/// A write to a register, ours or not.
pub(crate) fn port_write(port: u16, value: u8) -> Outcome {
    match port {
        layout::PANIC_PORT if value & PANICKED != 0 => Outcome::Panicked,
        layout::SLEEP_CONTROL_PORT if value & SLEEP_ENABLE != 0 && value >> 2 & 7 == SLEEP_TYPE_S5 => {
            Outcome::PowerOff
        }
        layout::RESET_PORT if value == RESET_VALUE => Outcome::Reset,
        _ => Outcome::Done,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_soft_off_with_the_enable_bit_turns_the_machine_off() {
        let ends: Vec<u8> =
            (0..=255).filter(|v| port_write(layout::SLEEP_CONTROL_PORT, *v) == Outcome::PowerOff).collect();
        assert!(ends.contains(&(SLEEP_ENABLE | SLEEP_TYPE_S5 << 2)));
        assert!(ends.iter().all(|v| v & SLEEP_ENABLE != 0 && v >> 2 & 7 == SLEEP_TYPE_S5));
    }

    #[test]
    fn reset_and_panic_need_their_values() {
        assert_eq!(port_write(layout::RESET_PORT, 0), Outcome::Done);
        assert_eq!(port_write(layout::RESET_PORT, RESET_VALUE), Outcome::Reset);
        assert_eq!(port_write(layout::PANIC_PORT, 2), Outcome::Done);
        assert_eq!(port_write(layout::PANIC_PORT, PANICKED), Outcome::Panicked);
    }
}
