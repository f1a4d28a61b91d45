//! A stand-in for a virtio-net device: registers in a struct, rings where the driver put them, and a test that plays the device.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::access::{AccessError, Bar, IovaSpace, NarrowBar, PciDevice};
use crate::intel::standin::Identity;

/// Where the structures begin in region 4: common, notifications, the device's own.
const NOTIFY: u32 = 0x100;
const OWN: u32 = 0x200;

/// Descriptors of each ring.
pub(super) const SIZE: u16 = 64;

/// What the driver wrote.
#[derive(Default)]
pub(super) struct State {
    status: u8,
    select: u32,
    queue: usize,
    /// No link; a reset that does not end.
    pub(super) no_link: bool,
    pub(super) no_reset: bool,
    /// Descriptors, driver area, device area of each queue.
    pub(super) areas: [[u64; 3]; 2],
}

/// The device.
pub(super) struct Standin {
    pub(super) config: [AtomicU32; 64],
    features: u64,
    pub(super) state: Arc<Mutex<State>>,
    space: Arc<Identity>,
}

/// Its region.
pub(super) struct Registers {
    features: u64,
    state: Arc<Mutex<State>>,
}

impl Standin {
    pub(super) fn new(space: &Arc<Identity>, features: u64) -> Arc<Self> {
        let mut words = [0; 64];
        words[0] = super::IDS[0];
        words[0x34 / 4] = 0x40;
        // Capabilities of a vendor's own kind (virtio 1.3, section 4.1.4), each in its place.
        for (i, (kind, offset, len)) in [(1, 0, 56), (2, NOTIFY, 16), (4, OWN, 64)].into_iter().enumerate() {
            let at = 0x40 + 0x20 * i;
            let next = if i < 2 { at as u32 + 0x20 } else { 0 };
            words[at / 4..at / 4 + 5].copy_from_slice(&[kind << 24 | next << 8 | 0x09, 4, offset, len, 0]);
        }
        let state = Arc::default();
        Arc::new(Self { config: words.map(AtomicU32::new), features, state, space: space.clone() })
    }
}

impl PciDevice for Standin {
    type Bar = Registers;

    fn bar(&self, _: u8, _: u32) -> Result<Registers, AccessError> {
        Ok(Registers { features: self.features, state: self.state.clone() })
    }
    fn config_read(&self, offset: u16) -> u32 {
        self.config[usize::from(offset / 4)].load(Ordering::Relaxed)
    }
    fn config_write(&self, offset: u16, value: u32) {
        self.config[usize::from(offset / 4)].store(value, Ordering::Relaxed);
    }
    fn iova_space(&self) -> Arc<dyn IovaSpace> {
        self.space.clone()
    }
}

impl Bar for Registers {
    fn read32(&self, offset: u32) -> u32 {
        let select = self.state.lock().unwrap().select;
        if offset == 4 { (self.features >> (32 * (select & 1))) as u32 } else { 0 }
    }
    fn write32(&self, offset: u32, value: u32) {
        let mut state = self.state.lock().unwrap();
        let queue = state.queue;
        match offset {
            0 => state.select = value,
            32..56 => {
                let shift = offset / 4 % 2 * 32;
                let area = &mut state.areas[queue][(offset as usize - 32) / 8];
                *area = *area & !(0xffff_ffff << shift) | u64::from(value) << shift;
            }
            _ => {}
        }
    }
    fn pause(&self, _: Duration) {}
}

impl NarrowBar for Registers {
    fn read8(&self, offset: u32) -> u8 {
        if offset == 20 { self.state.lock().unwrap().status } else { 2 }
    }
    fn write8(&self, offset: u32, value: u8) {
        if offset == 20 {
            let mut state = self.state.lock().unwrap();
            if value != 0 || !state.no_reset {
                state.status = value;
            }
        }
    }
    fn read16(&self, offset: u32) -> u16 {
        match offset {
            24 => SIZE,
            // A link.
            o if o == OWN + 6 => u16::from(!self.state.lock().unwrap().no_link),
            _ => 0,
        }
    }
    fn write16(&self, offset: u32, value: u16) {
        if offset == 22 {
            self.state.lock().unwrap().queue = usize::from(value & 1);
        }
    }
}
