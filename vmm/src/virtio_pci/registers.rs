//! The common configuration structure (virtio 1.3, 4.1.4.3): what a driver sets before it says DRIVER_OK, and no longer then.
//!
//! Owns the registers and their rules; never knows a device.

use virtio::features;

/// Bytes of the structure.
pub(super) const LENGTH: usize = 0x38;
/// No vector.
pub(super) const NO_VECTOR: u16 = 0xffff;

/// Device status (2.1).
const FEATURES_OK: u8 = 8;
const DRIVER_OK: u8 = 4;
const NEEDS_RESET: u8 = 64;

/// What a write asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Wanted {
    Nothing,
    /// The driver said DRIVER_OK.
    Start,
    /// The driver wrote 0 to the status.
    Reset,
}

/// One queue's registers.
#[derive(Clone, Copy, Debug)]
pub(super) struct QueueRegisters {
    most: u16,
    pub(super) size: u16,
    pub(super) vector: u16,
    pub(super) enabled: bool,
    pub(super) descriptors: u64,
    pub(super) driver: u64,
    pub(super) device: u64,
}

/// Bytes of a queue's areas.
pub(super) struct Lengths {
    pub(super) descriptors: u64,
    pub(super) driver: u64,
    pub(super) driver_align: u64,
    pub(super) device: u64,
}

impl QueueRegisters {
    fn new(most: u16) -> Self {
        Self { most, size: most, vector: NO_VECTOR, enabled: false, descriptors: 0, driver: 0, device: 0 }
    }

    /// How long its areas are (2.7 and 2.8).
    pub(super) fn lengths(&self, features: u64) -> Lengths {
        let size = u64::from(self.size);
        match features & features::RING_PACKED {
            0 => Lengths {
                descriptors: 16 * size,
                driver: 6 + 2 * size,
                driver_align: 2,
                device: 6 + 8 * size,
            },
            _ => Lengths { descriptors: 16 * size, driver: 4, driver_align: 4, device: 4 },
        }
    }

    /// A size that the layout allows: any up to the most for packed rings, powers of two for split ones.
    fn size_fits(&self, size: u16, features: u64) -> bool {
        (1..=self.most).contains(&size) && (features & features::RING_PACKED != 0 || size.is_power_of_two())
    }
}

/// The structure.
pub(super) struct Registers {
    offered: u64,
    offered_select: u32,
    accepted: u64,
    accepted_select: u32,
    status: u8,
    config_vector: u16,
    vectors: u16,
    generation: u8,
    select: u16,
    queues: Vec<QueueRegisters>,
}

impl Registers {
    pub(super) fn new(offered: u64, sizes: &[u16], vectors: u16) -> Self {
        Self {
            offered,
            offered_select: 0,
            accepted: 0,
            accepted_select: 0,
            status: 0,
            config_vector: NO_VECTOR,
            vectors,
            generation: 0,
            select: 0,
            queues: sizes.iter().map(|most| QueueRegisters::new(*most)).collect(),
        }
    }

    /// What was agreed on.
    pub(super) fn features(&self) -> u64 {
        self.accepted
    }

    pub(super) fn queues(&self) -> &[QueueRegisters] {
        &self.queues
    }

    /// Which vector tells the driver of changes of the configuration.
    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector
    }

    /// The device's configuration may have changed.
    pub(super) fn set_generation(&mut self, generation: u8) {
        self.generation = generation;
    }

    /// As at the start.
    pub(super) fn reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.most).collect();
        *self = Self::new(self.offered, &sizes, self.vectors);
    }

    /// The device cannot go on with what the driver set up (2.1.2).
    pub(super) fn needs_reset(&mut self) {
        self.status |= NEEDS_RESET;
    }

    /// Reads one register; what is none, or is read across its borders, stays as it is.
    pub(super) fn read(&self, offset: usize, data: &mut [u8]) {
        let queue = self.queues.get(usize::from(self.select));
        let of = |register: fn(&QueueRegisters) -> u64| queue.map_or(0, register);
        let half = |word: u64, select: u32| if select < 2 { word >> (32 * select) & 0xffff_ffff } else { 0 };
        let (start, length, value) = match offset {
            0x00..0x04 => (0x00, 4, self.offered_select.into()),
            0x04..0x08 => (0x04, 4, half(self.offered, self.offered_select)),
            0x08..0x0c => (0x08, 4, self.accepted_select.into()),
            0x0c..0x10 => (0x0c, 4, half(self.accepted, self.accepted_select)),
            0x10..0x12 => (0x10, 2, self.config_vector.into()),
            0x12..0x14 => (0x12, 2, self.queues.len() as u64),
            0x14 => (0x14, 1, self.status.into()),
            0x15 => (0x15, 1, self.generation.into()),
            0x16..0x18 => (0x16, 2, self.select.into()),
            0x18..0x1a => (0x18, 2, of(|q| q.size.into())),
            0x1a..0x1c => (0x1a, 2, queue.map_or(NO_VECTOR.into(), |q| q.vector.into())),
            0x1c..0x1e => (0x1c, 2, of(|q| q.enabled.into())),
            // Notification addresses are in the order of queues.
            0x1e..0x20 => (0x1e, 2, self.select.into()),
            0x20..0x28 => (0x20, 8, of(|q| q.descriptors)),
            0x28..0x30 => (0x28, 8, of(|q| q.driver)),
            0x30..0x38 => (0x30, 8, of(|q| q.device)),
            _ => return,
        };
        let bytes = value.to_le_bytes();
        let from = offset - start;
        if from + data.len() <= length {
            data.iter_mut().zip(bytes.iter().skip(from)).for_each(|(to, from)| *to = *from);
        }
    }

    /// Writes one register, whole or, for those of 64 bits, by halves (4.1.3.1); other accesses are ignored.
    pub(super) fn write(&mut self, offset: usize, data: &[u8]) -> Wanted {
        let value = data.iter().rev().fold(0_u64, |all, byte| all << 8 | u64::from(*byte));
        let frozen = self.status & DRIVER_OK != 0;
        let (features, vectors) = (self.accepted, self.vectors);
        let vector = |value: u64| match value as u16 {
            vector if vector < vectors => vector,
            _ => NO_VECTOR,
        };
        match (offset, data.len()) {
            (0x00, 4) => self.offered_select = value as u32,
            (0x08, 4) => self.accepted_select = value as u32,
            (0x0c, 4) if self.status & FEATURES_OK == 0 && self.accepted_select < 2 => {
                let shift = 32 * self.accepted_select;
                self.accepted = self.accepted & !(0xffff_ffff << shift) | value << shift;
            }
            (0x10, 2) => self.config_vector = vector(value),
            (0x14, 1) => return self.write_status(value as u8),
            (0x16, 2) => self.select = value as u16,
            _ if frozen => {}
            _ => {
                let Some(queue) = self.queues.get_mut(usize::from(self.select)) else {
                    return Wanted::Nothing;
                };
                // An address is fixed once the queue is enabled.
                let address = |register: &mut u64, at: usize| {
                    let shift = 8 * (offset - at);
                    let mask = if data.len() == 8 { u64::MAX } else { 0xffff_ffff << shift };
                    *register = *register & !mask | value << shift & mask;
                };
                match (offset, data.len()) {
                    (0x1a, 2) => queue.vector = vector(value),
                    (0x1c, 2) => queue.enabled |= value == 1,
                    _ if queue.enabled => {}
                    (0x18, 2) if queue.size_fits(value as u16, features) => queue.size = value as u16,
                    (0x20, 4 | 8) | (0x24, 4) => address(&mut queue.descriptors, 0x20),
                    (0x28, 4 | 8) | (0x2c, 4) => address(&mut queue.driver, 0x28),
                    (0x30, 4 | 8) | (0x34, 4) => address(&mut queue.device, 0x30),
                    _ => {}
                }
            }
        }
        Wanted::Nothing
    }

    /// The driver moves on, or resets the device.
    fn write_status(&mut self, value: u8) -> Wanted {
        if value == 0 {
            return Wanted::Reset;
        }
        let added = value & !self.status;
        let mut status = self.status | value & !NEEDS_RESET;
        // Features are agreed on whole, or not at all (2.2.2).
        let acceptable = self.accepted & !self.offered == 0 && self.accepted & features::VERSION_1 != 0;
        if added & FEATURES_OK != 0 && !acceptable {
            status &= !FEATURES_OK;
        }
        if status & FEATURES_OK == 0 {
            status &= !DRIVER_OK;
        }
        let starts = status & !self.status & DRIVER_OK != 0;
        self.status = status;
        if starts { Wanted::Start } else { Wanted::Nothing }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OFFERED: u64 = features::VERSION_1 | features::NET_MAC | features::RING_PACKED;

    fn registers() -> Registers {
        Registers::new(OFFERED, &[256, 64], 3)
    }

    fn read(registers: &Registers, offset: usize, length: usize) -> u64 {
        let mut data = vec![0; length];
        registers.read(offset, &mut data);
        data.iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte))
    }

    fn accept(registers: &mut Registers, features: u64) {
        for half in 0..2_u32 {
            let _ = registers.write(0x08, &half.to_le_bytes());
            let _ = registers.write(0x0c, &((features >> (32 * half)) as u32).to_le_bytes());
        }
    }

    #[test]
    fn features_are_agreed_on_whole_and_then_stay() {
        let mut registers = registers();
        accept(&mut registers, OFFERED | 1 << 50);
        assert_eq!(registers.write(0x14, &[1 | 2 | 8]), Wanted::Nothing);
        assert_eq!(read(&registers, 0x14, 1), 3, "one that was not offered");
        accept(&mut registers, features::NET_MAC);
        let _ = registers.write(0x14, &[1 | 2 | 8]);
        assert_eq!(read(&registers, 0x14, 1), 3, "a legacy driver");
        accept(&mut registers, features::VERSION_1);
        let _ = registers.write(0x14, &[1 | 2 | 8]);
        assert_eq!(read(&registers, 0x14, 1), 11);
        accept(&mut registers, OFFERED);
        assert_eq!(registers.features(), features::VERSION_1);
    }

    #[test]
    fn nothing_starts_before_features_are_agreed_on_and_then_queues_are_frozen() {
        let mut registers = registers();
        assert_eq!(registers.write(0x14, &[1 | 2 | 4]), Wanted::Nothing);
        accept(&mut registers, features::VERSION_1);
        let _ = registers.write(0x14, &[1 | 2 | 8]);
        let _ = registers.write(0x20, &0x1000_u64.to_le_bytes());
        let _ = registers.write(0x1c, &1_u16.to_le_bytes());
        let _ = registers.write(0x20, &0x2000_u64.to_le_bytes());
        assert_eq!(read(&registers, 0x20, 8), 0x1000, "an enabled queue stays where it is");
        assert_eq!(registers.write(0x14, &[1 | 2 | 4 | 8]), Wanted::Start);
        assert_eq!(registers.write(0x14, &[1 | 2 | 4 | 8]), Wanted::Nothing, "once");
        let _ = registers.write(0x16, &1_u16.to_le_bytes());
        let _ = registers.write(0x18, &32_u16.to_le_bytes());
        let _ = registers.write(0x20, &0x3000_u64.to_le_bytes());
        assert_eq!((read(&registers, 0x18, 2), read(&registers, 0x20, 8)), (64, 0));
        assert_eq!(registers.write(0x14, &[0]), Wanted::Reset);
    }

    #[test]
    fn sizes_and_vectors_that_there_are_not_are_not_taken() {
        let mut registers = registers();
        for size in [0, 3, 300, 512_u16] {
            let _ = registers.write(0x18, &size.to_le_bytes());
            assert_eq!(read(&registers, 0x18, 2), 256, "{size}");
        }
        let _ = registers.write(0x1a, &2_u16.to_le_bytes());
        assert_eq!(read(&registers, 0x1a, 2), 2);
        let _ = registers.write(0x1a, &3_u16.to_le_bytes());
        assert_eq!(read(&registers, 0x1a, 2), 0xffff);
        let _ = registers.write(0x16, &2_u16.to_le_bytes());
        assert_eq!(read(&registers, 0x18, 2), 0, "no such queue");
    }

    #[test]
    fn accesses_of_any_offset_and_length_are_answered() {
        let mut registers = registers();
        for offset in 0..0x1000 {
            for length in 0..=9 {
                let mut data = vec![0xa5; length];
                registers.read(offset, &mut data);
                if offset != 0x14 {
                    assert_eq!(registers.write(offset, &data), Wanted::Nothing);
                }
            }
        }
        registers.reset();
        assert_eq!(read(&registers, 0x12, 2), 2);
    }
}
