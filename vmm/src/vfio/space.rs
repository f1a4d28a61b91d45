//! What a guest sees of a function's configuration space, and what it may change there (PCI 3.0, chapter 6; PCI Express 6.0,
//! chapter 7).
//!
//! Owns the filter: a byte is ours (read as it was at the start, or as the guest wrote it), or the device's (live). Only listed
//! capabilities are passed on, and of them only listed registers may be written; expansion ROM, I/O ports, SR-IOV, address
//! translation and whatever else is not listed are not there. BARs are ours: the guest never moves the device's own. Never
//! touches a device: it says what is to be written there.

use super::Hardware;

/// Bytes of configuration space by ECAM, and of the part that is not extended.
const SIZE: usize = 4096;
const CONVENTIONAL: usize = 0x100;

// Registers of the header (PCI 3.0, figure 6-1).
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const HEADER_TYPE: usize = 0x0e;
const BIST: usize = 0x0f;
const BARS: usize = 0x10;
const ROM: usize = 0x30;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;
const HEADER_END: usize = 0x40;

/// Command: memory, bus master, parity, SERR, interrupts off. Not I/O: there are no ports.
const COMMAND_WRITABLE: u16 = 1 << 10 | 1 << 8 | 1 << 6 | 1 << 2 | 1 << 1;
const COMMAND_MEMORY: u8 = 1 << 1;

// Capabilities that are passed on (PCI Code and ID Assignment 1.11, section 2).
const POWER: u8 = 0x01;
const MSI: u8 = 0x05;
const VENDOR: u8 = 0x09;
const EXPRESS: u8 = 0x10;
const MSIX: u8 = 0x11;
const ADVANCED_FEATURES: u8 = 0x13;
/// Extended ones (section 3): serial number, two kinds of vendor-specific.
const EXTENDED_SERIAL: u16 = 0x0003;
const EXTENDED_VENDOR: [u16; 2] = [0x000b, 0x0023];

/// PCI Express: the types of endpoints, and the one on a root bus (7.5.3.2).
const ENDPOINTS: [u8; 2] = [0x0, 0x1];
const INTEGRATED_ENDPOINT: u8 = 0x9;

/// A memory region of the device: bytes, a power of two, and whether it may lie above 4 GiB and be prefetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bar {
    pub(super) len: u64,
    pub(super) wide: bool,
}

/// Where the guest drives MSI-X: its capability, how many vectors, the table and the pending bits (BAR and offset).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MsixAt {
    pub(super) at: usize,
    pub(super) count: u16,
    pub(super) table: (usize, u64),
    pub(super) pending: (usize, u64),
}

/// Where the guest drives MSI, and whether its addresses have 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MsiAt {
    at: usize,
    wide: bool,
}

/// A message as the guest wrote it to the MSI capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Msi {
    pub(super) enabled: bool,
    pub(super) address: u64,
    pub(super) data: u32,
}

/// Bytes to write to the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Forward {
    pub(super) at: u16,
    pub(super) bytes: Vec<u8>,
}

/// The filter.
pub(super) struct Space {
    bytes: Box<[u8; SIZE]>,
    /// Bits that the guest may change in `bytes`.
    writable: Box<[u8; SIZE]>,
    /// Bytes that are read from the device.
    live: Box<[bool; SIZE]>,
    /// Bits that the guest may write to the device.
    forward: Box<[u8; SIZE]>,
    pub(super) bars: [Option<Bar>; 6],
    pub(super) msix: Option<MsixAt>,
    pub(super) msi: Option<MsiAt>,
    /// The power management control register.
    power: Option<usize>,
}

impl Space {
    /// The filter of a device whose configuration space holds `raw`, with regions of these lengths (0: none), and an interrupt
    /// line or none.
    pub(super) fn new(raw: &[u8], lengths: [u64; 6], line: bool) -> Self {
        let mut space = Self {
            bytes: Box::new([0; SIZE]),
            writable: Box::new([0; SIZE]),
            live: Box::new([false; SIZE]),
            forward: Box::new([0; SIZE]),
            bars: [None; 6],
            msix: None,
            msi: None,
            power: None,
        };
        space.copy(raw, 0..HEADER_END);
        space.set(COMMAND, &[0, 0]);
        // One function of one device, whatever it is to the host.
        let header = space.byte(HEADER_TYPE) & 0x7f;
        space.set(HEADER_TYPE, &[header]);
        space.set(BIST, &[0]);
        space.set(ROM, &[0; 4]);
        space.set(CAPABILITIES, &[0]);
        space.set(INTERRUPT_LINE, &[0xff]);
        space.set(INTERRUPT_PIN, &[u8::from(line)]);
        space.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        space.pass(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        space.watch(STATUS..STATUS + 2);
        space.pass(STATUS, &[0xff; 2]);
        // Cache line size: nothing depends on it, and Linux writes it.
        space.allow(0x0c, &[0xff]);
        space.allow(INTERRUPT_LINE, &[0xff]);
        space.add_bars(raw, lengths);
        space.add_capabilities(raw);
        space.add_extended_capabilities(raw);
        space
    }

    /// The guest reads up to 4 bytes within a double word.
    pub(super) fn read(&self, register: usize, data: &mut [u8], device: &dyn Hardware) {
        let all = register..register + data.len();
        for (to, at) in data.iter_mut().zip(all.clone()) {
            *to = self.byte(at);
        }
        let is_live = |at: usize| self.live.get(at).copied().unwrap_or(false);
        if all.clone().any(is_live) {
            let mut now = vec![0xff; data.len()];
            device.config_read(register as u16, &mut now);
            for ((to, from), at) in data.iter_mut().zip(now).zip(all) {
                if is_live(at) {
                    *to = from;
                }
            }
        }
    }

    /// The guest writes; returns what is to be written to the device.
    pub(super) fn write(&mut self, register: usize, data: &[u8]) -> Vec<Forward> {
        let mut forwards: Vec<Forward> = Vec::new();
        for (value, at) in data.iter().zip(register..) {
            let (Some(byte), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) else { break };
            *byte = *byte & !mask | value & mask;
            let mask = self.forward.get(at).copied().unwrap_or(0);
            if mask == 0 {
                continue;
            }
            match forwards.last_mut() {
                Some(last) if usize::from(last.at) + last.bytes.len() == at => last.bytes.push(value & mask),
                _ => forwards.push(Forward { at: at as u16, bytes: vec![value & mask] }),
            }
        }
        forwards
    }

    /// Where region `index` is, if the guest has memory accesses switched on.
    pub(super) fn bar(&self, index: usize) -> Option<u64> {
        let bar = self.bars.get(index).copied().flatten()?;
        let low = u64::from(self.word(BARS + 4 * index) & !0xf);
        let high = if bar.wide { u64::from(self.word(BARS + 4 * index + 4)) } else { 0 };
        (self.byte(COMMAND) & COMMAND_MEMORY != 0).then_some(high << 32 | low)
    }

    /// Puts region `index` to an address.
    pub(super) fn place(&mut self, index: usize, address: u64) {
        let at = BARS + 4 * index;
        let Some(bar) = self.bars.get(index).copied().flatten() else { return };
        let flags = self.word(at) & 0xf;
        self.set(at, &(address as u32 | flags).to_le_bytes());
        if bar.wide {
            self.set(at + 4, &((address >> 32) as u32).to_le_bytes());
        }
    }

    /// The guest's message control word of MSI-X.
    pub(super) fn msix_control(&self) -> u16 {
        self.msix.map_or(0, |msix| (self.word(msix.at) >> 16) as u16)
    }

    /// What the guest wrote to the MSI capability.
    pub(super) fn msi_message(&self) -> Option<Msi> {
        let MsiAt { at, wide } = self.msi?;
        let high = if wide { u64::from(self.word(at + 8)) } else { 0 };
        Some(Msi {
            enabled: self.byte(at + 2) & 1 != 0,
            address: high << 32 | u64::from(self.word(at + 4)),
            data: self.word(at + if wide { 12 } else { 8 }) & 0xffff,
        })
    }

    /// Whether these writes put the device to sleep (1) or touch its power state at all (2).
    pub(super) fn power_change(&self, forwards: &[Forward]) -> Option<u8> {
        let at = self.power?;
        let value = |forward: &Forward| forward.bytes.get(at.checked_sub(forward.at.into())?).copied();
        forwards.iter().find_map(value).map(|state| state & 3)
    }

    /// The device's power state: 0 is awake.
    pub(super) fn power_state(&self, device: &dyn Hardware) -> u8 {
        let Some(at) = self.power else { return 0 };
        let mut state = [0];
        device.config_read(at as u16, &mut state);
        state.first().map_or(0, |state| state & 3)
    }

    /// Memory BARs as the device has them; what makes no sense is not there.
    fn add_bars(&mut self, raw: &[u8], lengths: [u64; 6]) {
        let mut second_half = false;
        for (index, len) in lengths.into_iter().enumerate() {
            let at = BARS + 4 * index;
            self.set(at, &[0; 4]);
            if std::mem::take(&mut second_half) {
                continue;
            }
            let flags = raw.get(at).copied().unwrap_or(0) & 0xf;
            // Bit 0: I/O ports. Bits 2 and 1: 64 bits if 10 (PCI 3.0, 6.2.5.1).
            let (io, wide) = (flags & 1 != 0, flags & 0b110 == 0b100);
            second_half = !io && wide && index < 5;
            let fits = if second_half { len <= 1 << 52 } else { len <= 1 << 31 && !wide };
            if io || !fits || len < 16 || !len.is_power_of_two() {
                continue;
            }
            self.set(at, &[flags]);
            let mask = !(len - 1);
            self.allow(at, &((mask as u32) & !0xf).to_le_bytes());
            if second_half {
                self.allow(at + 4, &((mask >> 32) as u32).to_le_bytes());
            }
            if let Some(bar) = self.bars.get_mut(index) {
                *bar = Some(Bar { len, wide: second_half });
            }
        }
    }

    fn add_capabilities(&mut self, raw: &[u8]) {
        let byte = |at: usize| raw.get(at).copied().unwrap_or(0);
        let mut all: Vec<usize> = Vec::new();
        let mut at = usize::from(byte(CAPABILITIES) & 0xfc);
        while at >= HEADER_END && !all.contains(&at) {
            all.push(at);
            at = usize::from(byte(at + 1) & 0xfc);
        }
        let mut link = CAPABILITIES;
        for at in all.iter().copied() {
            // None reaches into its neighbour.
            let end = all.iter().copied().filter(|other| *other > at).min().unwrap_or(CONVENTIONAL);
            if self.add_capability(raw, byte(at), at, end) {
                self.set(link, &[at as u8]);
                self.set(at, &[byte(at), 0]);
                link = at + 1;
            }
        }
    }

    /// One that lies from `at` to `end` at most. Whether the guest gets it.
    fn add_capability(&mut self, raw: &[u8], number: u8, at: usize, end: usize) -> bool {
        let room = end - at;
        match number {
            POWER if room >= 6 && self.power.is_none() => {
                self.copy(raw, at..at + 6);
                // Wakes nobody (PCI Power Management 1.2, 3.2.3): there is no one to hear it.
                let capabilities = self.byte(at + 3) & 0x07;
                self.set(at + 3, &[capabilities]);
                self.watch(at + 4..at + 6);
                self.pass(at + 4, &[0x03]);
                self.power = Some(at + 4);
            }
            MSI if room >= 10 && self.msi.is_none() => {
                self.copy(raw, at..at + 4);
                let wide = self.byte(at + 2) & 0x80 != 0 && room >= 14;
                // One message, not masked (PCI 3.0, 6.8.1.3).
                self.set(at + 2, &[if wide { 0x80 } else { 0 }, 0]);
                self.allow(at + 2, &[1]);
                self.allow(at + 4, &[0xfc, 0xff, 0xff, 0xff]);
                if wide {
                    self.allow(at + 8, &[0xff; 4]);
                }
                self.allow(at + if wide { 12 } else { 8 }, &[0xff; 2]);
                self.msi = Some(MsiAt { at, wide });
            }
            MSIX if room >= 12 && self.msix.is_none() => {
                let Some(msix) = self.msix_at(raw, at) else { return false };
                self.copy(raw, at..at + 12);
                let control = (msix.count - 1).to_le_bytes();
                self.set(at + 2, &control);
                self.allow(at + 2, &(1_u16 << 15 | 1 << 14).to_le_bytes());
                self.msix = Some(msix);
            }
            EXPRESS if room >= 0x0c => {
                self.copy(raw, at..at + room.min(0x3c));
                let kind = self.byte(at + 2) >> 4;
                if ENDPOINTS.contains(&kind) {
                    // Nothing is above it on this bus, so it has no link, slot or root registers.
                    let version = self.byte(at + 2) & 0xf;
                    self.set(at + 2, &[INTEGRATED_ENDPOINT << 4 | version, 0]);
                    let clear = |space: &mut Self, from: usize, to: usize| {
                        (at + from..end.min(at + to)).for_each(|byte| space.set(byte, &[0]));
                    };
                    clear(self, 0x0c, 0x24);
                    clear(self, 0x2c, 0x3c);
                }
                // Device control, with its reset, and status; the kernel keeps payload sizes to itself.
                self.watch(at + 8..at + 0x0c);
                self.pass(at + 8, &[0xff; 4]);
            }
            VENDOR if room >= 3 => {
                let len = usize::from(raw.get(at + 2).copied().unwrap_or(0)).clamp(3, room);
                self.copy(raw, at..at + len);
                self.watch(at + 3..at + len);
                self.pass(at + 3, &vec![0xff; len - 3]);
            }
            // Conventional PCI Advanced Capabilities ECN: control with its reset, status.
            ADVANCED_FEATURES if room >= 6 => {
                self.copy(raw, at..at + 6);
                self.watch(at + 4..at + 6);
                self.pass(at + 4, &[1]);
            }
            _ => return false,
        }
        true
    }

    /// What the MSI-X capability says (PCI 3.0, 6.8.2), if its structures lie in regions that are there.
    fn msix_at(&self, raw: &[u8], at: usize) -> Option<MsixAt> {
        let word = |at: usize| Some(u32::from_le_bytes(raw.get(at..at + 4)?.try_into().ok()?));
        let count = (word(at)? >> 16 & 0x7ff) as u16 + 1;
        let structure = |register: u32, len: u64| {
            let (bar, offset) = (register as usize & 7, u64::from(register & !7));
            let region = self.bars.get(bar).copied().flatten()?;
            (offset + len <= region.len).then_some((bar, offset))
        };
        let table = structure(word(at + 4)?, u64::from(count) * 16)?;
        let pending = structure(word(at + 8)?, u64::from(count).div_ceil(64) * 8)?;
        Some(MsixAt { at, count, table, pending })
    }

    fn add_extended_capabilities(&mut self, raw: &[u8]) {
        let word =
            |at: usize| raw.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes);
        let mut all: Vec<usize> = Vec::new();
        let mut at = CONVENTIONAL;
        while at >= CONVENTIONAL && !all.contains(&at) && !matches!(word(at), 0 | u32::MAX) {
            all.push(at);
            at = (word(at) >> 20) as usize & 0xffc;
        }
        // The list begins at 0x100, by a null capability if that one is not for the guest (7.9.28).
        let mut link = CONVENTIONAL;
        let mut header = 0_u32;
        for at in all.iter().copied() {
            let end = all.iter().copied().filter(|other| *other > at).min().unwrap_or(SIZE);
            let number = (word(at) & 0xffff) as u16;
            let room = end - at;
            let len = if number == EXTENDED_SERIAL && room >= 12 {
                12
            } else if EXTENDED_VENDOR.contains(&number) && room >= 8 {
                ((word(at + 4) >> 20) as usize).clamp(8, room)
            } else {
                continue;
            };
            self.copy(raw, at..at + len);
            if at != CONVENTIONAL {
                self.set(link, &(header & 0xf_ffff | (at as u32) << 20).to_le_bytes());
            }
            (link, header) = (at, word(at));
            self.set(at, &(header & 0xf_ffff).to_le_bytes());
        }
    }

    fn byte(&self, at: usize) -> u8 {
        self.bytes.get(at).copied().unwrap_or(0xff)
    }

    fn word(&self, at: usize) -> u32 {
        (0..4).rev().fold(0, |all, n| all << 8 | u32::from(self.byte(at + n)))
    }

    fn copy(&mut self, raw: &[u8], part: std::ops::Range<usize>) {
        let from = raw.iter().skip(part.start).take(part.len());
        self.bytes.iter_mut().skip(part.start).zip(from).for_each(|(to, from)| *to = *from);
    }

    fn set(&mut self, at: usize, value: &[u8]) {
        self.bytes.iter_mut().skip(at).zip(value).for_each(|(to, from)| *to = *from);
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable.iter_mut().skip(at).zip(mask).for_each(|(to, from)| *to = *from);
    }

    fn watch(&mut self, part: std::ops::Range<usize>) {
        self.live.iter_mut().skip(part.start).take(part.len()).for_each(|live| *live = true);
    }

    fn pass(&mut self, at: usize, mask: &[u8]) {
        self.forward.iter_mut().skip(at).zip(mask).for_each(|(to, from)| *to = *from);
    }
}
