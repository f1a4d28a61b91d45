//! A stand-in for an Intel card: registers and rings in memory, and whoever holds it plays the device. For what no model does on
//! request: registers that hang, write-backs that no device should make, and counting instructions.
//!
//! Shared by the unit tests, the example `driver_cost` and a fuzz target, which is why it says `pmd` for its own crate.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use host::memory::SharedMemory;
use pmd::access::{AccessError, Bar, GONE, IovaSpace, MapError, Mmio, PciDevice};

const BYTES: usize = 128 << 10;

/// Offsets of registers that behave, or that tell where rings are.
pub(crate) const CTRL: u32 = 0x0000;
pub(crate) const STATUS: u32 = 0x0008;
pub(crate) const EEC: u32 = 0x0010;
pub(crate) const MDIC: u32 = 0x0020;
pub(crate) const RCTL: u32 = 0x0100;
pub(crate) const TCTL: u32 = 0x0400;
/// Of the 82574L; tails are 0x18 behind the rings.
pub(crate) const RX_RING: u32 = 0x2800;
pub(crate) const RDT: u32 = 0x2818;
pub(crate) const TX_RING: u32 = 0x3800;
pub(crate) const TDT: u32 = 0x3818;

/// Of the 82576.
pub(crate) const IGB_RX_RING: u32 = 0xC000;
pub(crate) const IGB_TX_RING: u32 = 0xE000;

/// Command register of the configuration space, and its bus master bit.
pub(crate) const COMMAND: usize = 1;
pub(crate) const MASTER: u32 = 1 << 2;

/// Devices know memory by the addresses that this process has for it.
#[derive(Default)]
pub(crate) struct Identity {
    /// Asked, when memory is unmapped, whether the device is quiet.
    pub(crate) quiet: Mutex<Option<Box<dyn Fn() -> bool + Send>>>,
    /// What the answers were.
    pub(crate) answers: Mutex<Vec<bool>>,
}

impl IovaSpace for Identity {
    fn map(&self, memory: &SharedMemory) -> Result<u64, MapError> {
        Ok(memory.as_ptr().addr() as u64)
    }
    fn unmap(&self, _: u64, _: usize) {
        if let Some(quiet) = &*self.quiet.lock().unwrap() {
            self.answers.lock().unwrap().push(quiet());
        }
    }
}

/// The device.
pub(crate) struct Standin {
    registers: Arc<[AtomicU32; BYTES / 4]>,
    pub(crate) config: [AtomicU32; 16],
    /// Register, bits, and what they always read as.
    pub(crate) stuck: Arc<Mutex<Vec<(u32, u32, u32)>>>,
    pub(crate) gone: Arc<AtomicBool>,
    space: Arc<Identity>,
}

/// Its registers.
pub(crate) struct Registers {
    mapped: Mmio,
    stuck: Arc<Mutex<Vec<(u32, u32, u32)>>>,
    gone: Arc<AtomicBool>,
}

impl Standin {
    pub(crate) fn new(space: &Arc<Identity>, id: u32) -> Arc<Self> {
        let config = [const { AtomicU32::new(0) }; 16];
        config[0].store(id, Ordering::Relaxed);
        Arc::new(Self {
            registers: Arc::new([const { AtomicU32::new(0) }; BYTES / 4]),
            config,
            stuck: Arc::default(),
            gone: Arc::default(),
            space: space.clone(),
        })
    }

    pub(crate) fn register(&self, offset: u32) -> u32 {
        self.registers[offset as usize / 4].load(Ordering::Acquire)
    }

    /// Descriptor `at` of the ring whose base is in the registers at `ring`.
    pub(crate) fn descriptor(&self, ring: u32, at: u32) -> *mut [u64; 2] {
        let base = u64::from(self.register(ring)) | u64::from(self.register(ring + 4)) << 32;
        std::ptr::with_exposed_provenance_mut::<[u64; 2]>(base as usize).wrapping_add(at as usize)
    }

    /// Writes the second word of descriptor `at`, as the device does when it is done.
    pub(crate) fn write_back(&self, ring: u32, at: u32, word: u64) {
        // SAFETY: the driver has told where its ring is, and keeps it while it has the device.
        unsafe { (&raw mut (*self.descriptor(ring, at))[1]).write_volatile(word) };
    }

    /// Reads descriptor `at`.
    pub(crate) fn read(&self, ring: u32, at: u32) -> [u64; 2] {
        // SAFETY: as above.
        unsafe { self.descriptor(ring, at).read_volatile() }
    }
}

/// A virtual function's mailbox: V2PMAILBOX and VMBMEM.
pub(crate) const MAILBOX: u32 = 0x0C40;
pub(crate) const MAILBOX_MEMORY: u32 = 0x0800;

impl Standin {
    /// Its adapter answers at once, and grants whatever it is asked: the question is the answer, with ACK. Then comes an address.
    pub(crate) fn adapter_that_grants(&self) {
        let mut stuck = self.stuck.lock().unwrap();
        stuck.push((MAILBOX, 1 << 4, 1 << 4));
        stuck.push((MAILBOX_MEMORY, 1 << 31, 1 << 31));
        stuck.push((MAILBOX_MEMORY + 4, u32::MAX, 0x0000_0002));
    }
}

impl PciDevice for Standin {
    type Bar = Registers;

    fn bar(&self, index: u8, len: u32) -> Result<Registers, AccessError> {
        if index != 0 || len as usize > BYTES {
            return Err(AccessError::NoBar { device: "stand-in".into(), index, len });
        }
        let base = NonNull::from(&self.registers[0]).cast();
        // SAFETY: the array's bytes, kept by its `Arc`; atomics may be written through shared references.
        let mapped = unsafe { Mmio::new(base, BYTES as u32, self.registers.clone()) };
        Ok(Registers { mapped, stuck: self.stuck.clone(), gone: self.gone.clone() })
    }

    fn config_read(&self, offset: u16) -> u32 {
        if self.gone.load(Ordering::Relaxed) {
            return GONE;
        }
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
        if self.gone.load(Ordering::Relaxed) {
            return GONE;
        }
        let stored = self.mapped.read32(offset);
        let value = match offset {
            // A reset is over at once.
            CTRL => stored & !(1 << 26),
            // A link, and requests while they are not disabled.
            STATUS => 0x83 | (!self.mapped.read32(CTRL) >> 2 & 1) << 19,
            EEC => 1 << 9,
            // The PHY is told at once.
            MDIC => stored | 1 << 28,
            _ => stored,
        };
        let stuck = self.stuck.lock().unwrap();
        stuck.iter().filter(|s| s.0 == offset).fold(value, |value, &(_, mask, bits)| value & !mask | bits)
    }

    #[inline(always)]
    fn write32(&self, offset: u32, value: u32) {
        self.mapped.write32(offset, value);
    }

    fn pause(&self, _: Duration) {}
}
