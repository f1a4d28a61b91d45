//! How a function is reset: by itself where it can (function level reset), else with its bus where it is alone there, else by its power
//! states.
//!
//! The kernel's own order tries power states before the bus, and a function may keep its settings through these: its next user's memory
//! would be written by what the last one set up.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use super::sys;
use crate::pci::Bdf;

/// Capabilities with a function level reset, and the bits that say so: PCI Express device capabilities (PCI Express 4.0, 7.5.3.3), conventional
/// PCI's advanced features (ECN of 2006).
const EXPRESS: u8 = 0x10;
const EXPRESS_RESETS: u32 = 1 << 28;
const ADVANCED_FEATURES: u8 = 0x13;
const ADVANCED_FEATURES_RESETS: u32 = 1 << 25;

/// The most functions of a bus that are read of the kernel's list.
const LISTED: usize = 64;

/// Whether the function resets itself; `read` reads a double word of its configuration space.
fn resets_itself(read: impl Fn(u16) -> u32) -> bool {
    let mut at = read(0x34) as u16 & 0xfc;
    // A list that does not end is none.
    for _ in 0..48 {
        if at < 0x40 {
            return false;
        }
        let header = read(at);
        match header as u8 {
            EXPRESS if read(at + 4) & EXPRESS_RESETS != 0 => return true,
            ADVANCED_FEATURES if header & ADVANCED_FEATURES_RESETS != 0 => return true,
            _ => at = (header >> 8) as u16 & 0xfc,
        }
    }
    false
}

/// Resets the function at `bdf`, whose file this is, and the group that it was opened out of if it was.
pub(super) fn reset(
    file: &File,
    group: Option<BorrowedFd<'_>>,
    bdf: Bdf,
    read: impl Fn(u16) -> u32,
) -> io::Result<()> {
    if !resets_itself(read) && is_alone(file, bdf) && with_bus(file, group).is_ok() {
        return Ok(());
    }
    sys::with_number(file.as_fd(), sys::DEVICE_RESET, 0).map(drop)
}

/// Whether a reset of the bus is one of this function only, as the kernel lists them: size, flags and number, a word each; then group, segment,
/// bus and place of each, in two words (of a function that was opened by its own device, its number in iommufd instead of its group).
fn is_alone(file: &File, bdf: Bdf) -> bool {
    let mut words = [0u32; 3 + 2 * LISTED];
    let size = size_of_val(&words) as u32;
    let [argsz, ..] = &mut words;
    *argsz = size;
    // SAFETY: the structure of this request begins with its size, and the kernel writes no more than that.
    if unsafe { sys::with_bytes(file.as_fd(), sys::DEVICE_GET_PCI_HOT_RESET_INFO, &mut words) }.is_err() {
        return false;
    }
    let [_, _, 1, _, place, ..] = words else { return false };
    let (domain, bus, function) = (place & 0xffff, place >> 16 & 0xff, place >> 24);
    format!("{domain:04x}:{bus:02x}:{:02x}.{}", function >> 3, function & 7) == bdf.to_string()
}

/// Resets the bus; the group's descriptor shows that we may. A function that was opened by its own device needs none.
fn with_bus(file: &File, group: Option<BorrowedFd<'_>>) -> io::Result<()> {
    // Size, flags, how many groups, and the groups.
    let mut words = match group {
        Some(group) => vec![16, 0, 1, group.as_raw_fd()],
        None => vec![12, 0, 0],
    };
    // SAFETY: the structure of this request and what it says follows, of the size that it says.
    unsafe { sys::with_bytes(file.as_fd(), sys::DEVICE_PCI_HOT_RESET, &mut words) }.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A configuration space with these double words.
    fn space(words: &'static [(u16, u32)]) -> impl Fn(u16) -> u32 {
        move |at| words.iter().find(|(of, _)| *of == at).map_or(0, |(_, word)| *word)
    }

    #[test]
    fn a_function_resets_itself_if_a_capability_says_so() {
        assert!(resets_itself(space(&[(0x34, 0x40), (0x40, 0x5001), (0x50, 0x0010), (0x54, 1 << 28)])));
        assert!(!resets_itself(space(&[(0x34, 0x40), (0x40, 0x5001), (0x50, 0x0010), (0x54, 0)])));
        assert!(resets_itself(space(&[(0x34, 0x40), (0x40, 0x0306_0013)])));
        assert!(!resets_itself(space(&[(0x34, 0x40), (0x40, 0x0106_0013)])));
        assert!(!resets_itself(space(&[])));
        assert!(!resets_itself(space(&[(0x34, 0x40), (0x40, 0x4001)])), "a list that leads to itself");
        assert!(!resets_itself(|_| u32::MAX), "a function that is gone");
    }
}
