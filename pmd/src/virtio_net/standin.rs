//! A stand-in for a virtio-net device: registers in a struct, rings where the driver put them, and a test that plays the device.
//! Its control queue it plays itself, as it is told.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::access::{AccessError, Bar, IovaSpace, NarrowBar, PciDevice};
use crate::intel::standin::Identity;
use virtio::features;

/// Where the structures begin in region 4: common, notifications, the device's own.
const NOTIFY: u32 = 0x100;
const OWN: u32 = 0x200;

/// Descriptors of each ring.
pub(super) const SIZE: u16 = 64;

/// Queue pairs that it has, if it is asked for several.
pub(super) const PAIRS: u16 = 2;

/// What it does with an order.
#[derive(Clone, Copy, Debug)]
pub(super) enum Answer {
    /// Nothing.
    None,
    /// Answers with this byte, and returns the buffer; or another one, with more bytes written.
    With { answer: u8, id: Option<u16>, len: u32 },
}

impl Answer {
    pub(super) const fn just(answer: u8) -> Self {
        Self::With { answer, id: None, len: 1 }
    }
}

/// What the driver wrote.
pub(super) struct State {
    status: u8,
    select: u32,
    accepted: u64,
    queue: usize,
    vector: u16,
    /// What it does with orders, and all of those that it had.
    pub(super) answer: Answer,
    pub(super) orders: Vec<Vec<u8>>,
    /// How many it answered.
    turn: u16,
    /// No link; a reset that does not end.
    pub(super) no_link: bool,
    pub(super) no_reset: bool,
    /// Descriptors, driver area, device area of each queue.
    pub(super) areas: [[u64; 3]; 2 * PAIRS as usize + 1],
}

impl Default for State {
    fn default() -> Self {
        let (status, select, accepted, queue, vector, turn) = (0, 0, 0, 0, 0, 0);
        let (answer, orders, areas) = (Answer::just(0), Vec::new(), Default::default());
        let (no_link, no_reset) = (false, false);
        Self { status, select, accepted, queue, vector, answer, orders, turn, no_link, no_reset, areas }
    }
}

impl State {
    /// Behind its pairs.
    fn control(&self) -> u16 {
        if self.accepted & features::NET_MQ != 0 { 2 * PAIRS } else { 2 }
    }

    /// Takes the order in the control queue, and answers. A ring of two descriptors, both of which an order takes.
    pub(super) fn obey(&mut self) {
        let [descriptors, driver, device] = self.areas[usize::from(self.control())];
        let at =
            |area: u64, offset: u64| std::ptr::with_exposed_provenance_mut::<u8>((area + offset) as usize);
        // SAFETY: the driver's memory, which it keeps while it has the device.
        let read = |area, offset| unsafe { at(area, offset).cast::<u64>().read_volatile() };
        let turn = self.turn;
        let packed = self.accepted & features::RING_PACKED != 0;
        let slot = 4 + 2 * u64::from(turn % 2);
        // SAFETY: as above.
        let offered = unsafe { at(driver, slot).cast::<u16>().read_volatile() };
        let head = if packed { 0 } else { offered };
        let (order, len) =
            (read(descriptors, 16 * u64::from(head)), read(descriptors, 16 * u64::from(head) + 8) as u32);
        let next = 16 * u64::from(1 - head % 2);
        let (answer_at, word) = (read(descriptors, next), read(descriptors, next + 8));
        assert_eq!(
            (word as u32, word >> if packed { 48 } else { 32 } & 3),
            (1, 2),
            "a byte to be written, the last"
        );
        // SAFETY: as above.
        self.orders.push((0..u64::from(len)).map(|i| unsafe { at(order, i).read_volatile() }).collect());
        let Answer::With { answer, id, len } = self.answer else { return };
        self.turn = turn.wrapping_add(1);
        // SAFETY: as above; the used descriptor, or element and index, last.
        unsafe {
            at(answer_at, 0).write_volatile(answer);
            if packed {
                let flags = if turn.is_multiple_of(2) { 0x8080 } else { 0 };
                let id = id.unwrap_or((word >> 32) as u16);
                let word = u64::from(len) | u64::from(id) << 32 | flags << 48;
                at(descriptors, 8).cast::<u64>().write_volatile(word);
            } else {
                let element = [u32::from(id.unwrap_or(head)), len];
                at(device, 4 + 8 * u64::from(turn % 2)).cast::<[u32; 2]>().write_volatile(element);
                at(device, 2).cast::<u16>().write_volatile(self.turn);
            }
        }
    }
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
            0 | 8 => state.select = value,
            12 => state.accepted |= u64::from(value) << (32 * (state.select & 1)),
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
            26 => self.state.lock().unwrap().vector,
            // A link.
            o if o == OWN + 6 => u16::from(!self.state.lock().unwrap().no_link),
            o if o == OWN + 8 => PAIRS,
            _ => 0,
        }
    }
    fn write16(&self, offset: u32, value: u16) {
        let mut state = self.state.lock().unwrap();
        match offset {
            22 => state.queue = usize::from(value % (2 * PAIRS + 1)),
            26 => state.vector = value,
            NOTIFY if value == state.control() => state.obey(),
            _ => {}
        }
    }
}
