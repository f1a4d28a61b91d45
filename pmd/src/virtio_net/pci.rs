//! A virtio device on PCI as its driver sees it: where its registers are, and what they are (virtio 1.3, section 4.1).
//!
//! Owns the registers' order and widths. Knows nothing of networks.

use std::time::Duration;

use crate::access::{AccessError, GONE, NarrowBar, PciDevice, Reading, WaitError};

/// Kinds of configuration structures (4.1.4).
const COMMON: usize = 1;
const NOTIFY: usize = 2;
const DEVICE: usize = 4;

/// Fields of the common configuration (4.1.4.3).
mod common {
    pub(super) const DEVICE_FEATURE_SELECT: u32 = 0;
    pub(super) const DEVICE_FEATURE: u32 = 4;
    pub(super) const DRIVER_FEATURE_SELECT: u32 = 8;
    pub(super) const DRIVER_FEATURE: u32 = 12;
    pub(super) const CONFIG_MSIX_VECTOR: u32 = 16;
    pub(super) const NUM_QUEUES: u32 = 18;
    pub(super) const DEVICE_STATUS: u32 = 20;
    pub(super) const QUEUE_SELECT: u32 = 22;
    pub(super) const QUEUE_SIZE: u32 = 24;
    pub(super) const QUEUE_MSIX_VECTOR: u32 = 26;
    pub(super) const QUEUE_ENABLE: u32 = 28;
    pub(super) const QUEUE_NOTIFY_OFF: u32 = 30;
    pub(super) const QUEUE_DESC: u32 = 32;
    pub(super) const QUEUE_DRIVER: u32 = 40;
    pub(super) const QUEUE_DEVICE: u32 = 48;
    pub(super) const BYTES: u32 = 56;
}

/// Bits of the device status (2.1).
pub(super) mod status {
    pub(crate) const ACKNOWLEDGE: u8 = 1;
    pub(crate) const DRIVER: u8 = 2;
    pub(crate) const DRIVER_OK: u8 = 4;
    pub(crate) const FEATURES_OK: u8 = 8;
    pub(crate) const NEEDS_RESET: u8 = 64;
}

/// No interrupt for this (4.1.4.3).
const NO_VECTOR: u16 = 0xffff;

/// What a device that is gone reads as.
pub(super) const GONE8: u8 = u8::MAX;

/// Queues that are looked at: more than any device here has.
const MOST_QUEUES: u16 = 64;

/// How long a reset may take. The specification names no time; devices wait for what is under way.
const RESET_LIMIT: Duration = Duration::from_millis(500);

/// A structure inside a region.
#[derive(Clone, Copy)]
struct Place {
    bar: u8,
    offset: u32,
    len: u32,
}

/// Registers of a device.
pub(super) struct Registers<B> {
    common: (B, u32),
    device: (B, u32),
    device_len: u32,
    notify: (B, u32),
    notify_len: u32,
    multiplier: u32,
}

/// Where a queue is told of new buffers.
pub(super) struct Doorbell(u32);

/// A queue that was set up.
pub(super) struct Started {
    pub(super) doorbell: Doorbell,
    /// The interrupt that tells of used buffers, if the device has it.
    pub(super) vector: Option<u16>,
}

impl<B: NarrowBar> Registers<B> {
    /// Finds the structures by the capabilities of the configuration space (4.1.4).
    pub(super) fn find<D: PciDevice<Bar = B>>(device: &D) -> Result<Self, AccessError> {
        let mut places = [None; 5];
        let mut multiplier = 0;
        let mut at = device.config_read(0x34) & 0xfc;
        // A list of capabilities is at most 48 long: the space has no more room.
        for _ in 0..48 {
            let word = |i: u32| device.config_read((at + 4 * i) as u16);
            let header = word(0);
            if at == 0 || header == GONE {
                break;
            }
            let kind = (header >> 24) as usize;
            if header & 0xff == 0x09
                && let Some(place) = places.get_mut(kind).filter(|place| place.is_none())
            {
                // The first of a kind that can be used is to be taken; all of them can.
                *place = Some(Place { bar: word(1) as u8, offset: word(2), len: word(3) });
                if kind == NOTIFY {
                    multiplier = word(4);
                }
            }
            at = header >> 8 & 0xfc;
        }
        let open = |kind: usize, least: u32| {
            let Some(&Some(Place { bar, offset, len })) = places.get(kind) else {
                return Err(no_bar(kind as u8, least));
            };
            let end = offset.checked_add(len).filter(|_| len >= least && offset.is_multiple_of(4));
            Ok(((device.bar(bar, end.ok_or_else(|| no_bar(bar, least))?)?, offset), len))
        };
        let (notify, notify_len) = open(NOTIFY, 2)?;
        let (device, device_len) = open(DEVICE, 8)?;
        Ok(Self {
            common: open(COMMON, common::BYTES)?.0,
            device,
            device_len,
            notify,
            notify_len,
            multiplier,
        })
    }

    pub(super) fn status(&self) -> u8 {
        self.common.0.read8(self.common.1 + common::DEVICE_STATUS)
    }

    pub(super) fn set_status(&self, bits: u8) {
        self.common.0.write8(self.common.1 + common::DEVICE_STATUS, bits);
    }

    /// Resets the device (2.4): it uses no ring any more.
    pub(super) fn reset(&self) -> Result<(), WaitError> {
        self.set_status(0);
        let register = || "device_status".to_owned();
        let step = Duration::from_millis(1);
        let mut waited = Duration::ZERO;
        loop {
            match self.status() {
                0 => return Ok(()),
                GONE8 => return Err(WaitError::Gone { register: register() }),
                got if waited >= RESET_LIMIT => {
                    return Err(WaitError::Timeout {
                        register: register(),
                        wanted: 0,
                        got: got.into(),
                        waited,
                    });
                }
                _ => self.common.0.pause(step),
            }
            waited += step;
        }
    }

    /// What the device offers (2.2).
    pub(super) fn offered(&self) -> u64 {
        let (bar, at) = &self.common;
        let half = |select: u32| {
            bar.write32(at + common::DEVICE_FEATURE_SELECT, select);
            u64::from(bar.read32(at + common::DEVICE_FEATURE))
        };
        half(0) | half(1) << 32
    }

    /// Tells the device which features are used.
    pub(super) fn accept(&self, features: u64) {
        let (bar, at) = &self.common;
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            bar.write32(at + common::DRIVER_FEATURE_SELECT, select);
            bar.write32(at + common::DRIVER_FEATURE, half);
        }
        bar.write16(at + common::CONFIG_MSIX_VECTOR, NO_VECTOR);
    }

    /// The largest size of `queue`; 0 if there is none.
    pub(super) fn queue_size(&self, queue: u16) -> u16 {
        let (bar, at) = &self.common;
        bar.write16(at + common::QUEUE_SELECT, queue);
        bar.read16(at + common::QUEUE_SIZE)
    }

    /// Sets `queue` up: descriptors, driver area, device area (4.1.5.1.3); interrupts by `vector`.
    pub(super) fn start_queue(&self, queue: u16, size: u16, areas: [u64; 3], vector: Option<u16>) -> Started {
        let (bar, at) = &self.common;
        bar.write16(at + common::QUEUE_SELECT, queue);
        bar.write16(at + common::QUEUE_SIZE, size);
        bar.write16(at + common::QUEUE_MSIX_VECTOR, vector.unwrap_or(NO_VECTOR));
        // A device that cannot says so (4.1.5.1.2.2).
        let vector = vector.filter(|&v| bar.read16(at + common::QUEUE_MSIX_VECTOR) == v);
        for (field, area) in
            [common::QUEUE_DESC, common::QUEUE_DRIVER, common::QUEUE_DEVICE].into_iter().zip(areas)
        {
            bar.write32(at + field, area as u32);
            bar.write32(at + field + 4, (area >> 32) as u32);
        }
        let doorbell = u32::from(bar.read16(at + common::QUEUE_NOTIFY_OFF)).saturating_mul(self.multiplier);
        bar.write16(at + common::QUEUE_ENABLE, 1);
        // A device that names a place outside of its own structure is not told there.
        let at = if doorbell <= self.notify_len - 2 { self.notify.1 + doorbell } else { u32::MAX };
        Started { doorbell: Doorbell(at), vector }
    }

    /// Tells the device of new buffers in `queue` (4.1.5.2).
    pub(super) fn ring(&self, doorbell: &Doorbell, queue: u16) {
        self.notify.0.write16(doorbell.0, queue);
    }

    /// What the registers read (4.1.4.3). Selects queues: never while one is being set up.
    pub(super) fn look(&self) -> Vec<Reading> {
        let (bar, at) = &self.common;
        let one =
            |name, index, offset, value: u32| Reading { name, index, offset, value, fields: Vec::new() };
        let queues = bar.read16(at + common::NUM_QUEUES);
        let offered = self.offered();
        let mut all = vec![
            one("device_feature", Some(0), common::DEVICE_FEATURE, offered as u32),
            one("device_feature", Some(1), common::DEVICE_FEATURE, (offered >> 32) as u32),
            one("num_queues", None, common::NUM_QUEUES, queues.into()),
            one("device_status", None, common::DEVICE_STATUS, self.status().into()),
        ];
        let of_queue = [
            ("queue_size", common::QUEUE_SIZE),
            ("queue_msix_vector", common::QUEUE_MSIX_VECTOR),
            ("queue_enable", common::QUEUE_ENABLE),
            ("queue_notify_off", common::QUEUE_NOTIFY_OFF),
        ];
        // A device that is gone, or makes it up, has as many as a network card can have.
        for queue in 0..queues.min(MOST_QUEUES) {
            bar.write16(at + common::QUEUE_SELECT, queue);
            let read = |(name, offset)| one(name, Some(queue.into()), offset, bar.read16(at + offset).into());
            all.extend(of_queue.map(read));
        }
        all
    }

    /// A byte of the device's own configuration.
    pub(super) fn device8(&self, offset: u32) -> u8 {
        self.device.0.read8(self.device.1 + offset)
    }

    /// Sixteen bits of it; zero where it has no such field.
    pub(super) fn device16(&self, offset: u32) -> u16 {
        if offset + 2 > self.device_len { 0 } else { self.device.0.read16(self.device.1 + offset) }
    }

    /// Lets time pass.
    pub(super) fn pause(&self, time: Duration) {
        self.common.0.pause(time);
    }
}

fn no_bar(index: u8, len: u32) -> AccessError {
    AccessError::NoBar { device: "the virtio device".into(), index, len }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    use crate::access::{Bar, IovaSpace};

    /// A region that remembers what was written, and whose status reads as it is told.
    #[derive(Clone, Default)]
    struct Told {
        status: u8,
        notify_off: u16,
        written: Arc<Mutex<Vec<(u32, u16)>>>,
    }

    impl Bar for Told {
        fn read32(&self, _: u32) -> u32 {
            0
        }
        fn write32(&self, _: u32, _: u32) {}
        fn pause(&self, _: Duration) {}
    }

    impl NarrowBar for Told {
        fn read8(&self, _: u32) -> u8 {
            self.status
        }
        fn write8(&self, _: u32, _: u8) {}
        fn read16(&self, _: u32) -> u16 {
            self.notify_off
        }
        fn write16(&self, offset: u32, value: u16) {
            self.written.lock().unwrap().push((offset, value));
        }
    }

    fn registers(told: Told) -> Registers<Told> {
        let (common, device) = ((told.clone(), 0), (told.clone(), 0x100));
        Registers { common, device, device_len: 64, notify: (told, 0x200), notify_len: 16, multiplier: 4 }
    }

    #[test]
    fn a_reset_that_never_ends_is_a_timeout_and_of_a_device_that_is_gone_an_end() {
        let error = registers(Told { status: 4, ..Told::default() }).reset().unwrap_err();
        assert_eq!(error.to_string(), "device_status: wanted 0x0, read 0x4 for 500ms");
        let error = registers(Told { status: GONE8, ..Told::default() }).reset().unwrap_err();
        assert_eq!(error, WaitError::Gone { register: "device_status".into() });
        assert_eq!(registers(Told::default()).reset(), Ok(()));
    }

    #[test]
    fn a_doorbell_outside_of_its_structure_is_never_rung_there() {
        for (notify_off, wanted) in [(0, 0x200), (3, 0x20c), (4, u32::MAX), (0xffff, u32::MAX)] {
            let told = Told { notify_off, ..Told::default() };
            let registers = registers(told.clone());
            let started = registers.start_queue(1, 64, [0; 3], None);
            registers.ring(&started.doorbell, 1);
            assert_eq!(told.written.lock().unwrap().last(), Some(&(wanted, 1)), "{notify_off}");
        }
    }

    /// A configuration space of 64 words.
    struct Space([u32; 64]);

    impl PciDevice for Space {
        type Bar = Told;
        fn bar(&self, index: u8, len: u32) -> Result<Told, AccessError> {
            if index == 4 && len <= 0x1000 { Ok(Told::default()) } else { Err(no_bar(index, len)) }
        }
        fn config_read(&self, offset: u16) -> u32 {
            self.0[usize::from(offset / 4)]
        }
        fn config_write(&self, _: u16, _: u32) {}
        fn iova_space(&self) -> Arc<dyn IovaSpace> {
            unreachable!("not asked for")
        }
    }

    /// With a capability of each kind needed, in region 4.
    fn space() -> Space {
        let mut words = [0; 64];
        words[0x34 / 4] = 0x40;
        for (i, (kind, offset, len)) in [(1, 0, 56), (2, 0x100, 16), (4, 0x200, 64)].into_iter().enumerate() {
            let at = 0x40 + 0x20 * i;
            let next = if i < 2 { at as u32 + 0x20 } else { 0 };
            words[at / 4..at / 4 + 5].copy_from_slice(&[kind << 24 | next << 8 | 0x09, 4, offset, len, 4]);
        }
        Space(words)
    }

    #[test]
    fn structures_are_found_and_ones_that_cannot_be_are_refused() {
        let found = Registers::find(&space()).unwrap();
        assert_eq!((found.common.1, found.notify.1, found.device.1, found.multiplier), (0, 0x100, 0x200, 4));
        // A list that loops, one that is empty, and structures that are too short, too long, too far or not aligned.
        let broken: [fn(&mut [u32; 64]); 6] = [
            |words| words[0x40 / 4] = 0x0000_4009,
            |words| words[0x34 / 4] = 0,
            |words| words[0x40 / 4 + 3] = 55,
            |words| words[0x40 / 4 + 2] = u32::MAX,
            |words| words[0x60 / 4 + 3] = 0x2000,
            |words| words[0x80 / 4 + 2] = 0x202,
        ];
        for (i, damage) in broken.into_iter().enumerate() {
            let mut space = space();
            damage(&mut space.0);
            assert!(Registers::find(&space).is_err(), "{i}");
        }
    }
}
