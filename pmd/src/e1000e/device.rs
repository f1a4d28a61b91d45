//! The device itself: started, watched, stopped.
//!
//! Owns the registers, the memory of the rings, and the order of things at the end: queues off, bus mastering off, and only then
//! may memory go. Each step cites the 82574 datasheet (revision 3.4). Every wait is bounded.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use super::error::DeviceError;
use super::regs::{
    CTRL, EEC, ICR, IMC, MRQC, MTA, RCTL, RDBAH, RDBAL, RDH, RDLEN, RDT, RFCTL, RXCSUM, RXDCTL, STATUS, TCTL,
    TDBAH, TDBAL, TDH, TDLEN, TDT, TIPG, TXDCTL, VET,
};
use super::{Options, QUEUE, ring_bytes};
use crate::access::{Bits, GONE, PciDevice, Regs, WaitError, config, set_bus_master};
use crate::dma::{Arena, Block};

/// Bytes of BAR 0 that hold registers (datasheet 10.1).
const BAR_BYTES: u32 = 128 << 10;

/// Vendor in the low half.
const ID: u32 = 0x10d3_8086;

/// How long requests under way may take to end (datasheet 5.2.5.3 wants them to within completion timeouts, tens of ms).
const MASTER_LIMIT: Duration = Duration::from_millis(100);

/// How long a reset may take: the datasheet promises 1 µs for RST, and some ms for the EEPROM.
const RESET_LIMIT: Duration = Duration::from_millis(100);

/// What the queues look at once a burst.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum State {
    /// Frames go both ways.
    Up,
    /// Frames come in; what is sent is dropped.
    LinkDown,
    /// Nothing moves any more: stopped, gone or broken.
    Stopped,
}

/// What handle and queues of a device share. The device stops when the last of them goes, at the latest.
pub(super) struct Core<D: PciDevice> {
    regs: Regs<D::Bar>,
    state: AtomicU8,
    strips_tags: AtomicBool,
    reason: Mutex<Option<DeviceError>>,
    stopped: Mutex<bool>,
    receive_ring: Block,
    transmit_ring: Block,
    device: Arc<D>,
}

impl<D: PciDevice> Core<D> {
    /// Takes the device and brings it into a known state, with its rings empty and nothing enabled.
    pub(super) fn open(device: Arc<D>, arena: &Arc<Arena>, options: &Options) -> Result<Self, DeviceError> {
        let id = device.config_read(config::ID);
        if id == GONE {
            return Err(DeviceError::Gone);
        }
        if id != ID {
            return Err(DeviceError::Unknown { vendor: id as u16, device: (id >> 16) as u16 });
        }
        if !std::ptr::addr_eq(Arc::as_ptr(arena.space()), Arc::as_ptr(&device.iova_space())) {
            return Err(DeviceError::OtherSpace);
        }
        let regs = Regs::new(device.bar(0, BAR_BYTES)?);
        let core = Self {
            regs,
            state: AtomicU8::new(State::LinkDown as u8),
            strips_tags: AtomicBool::new(options.strip_tags),
            reason: Mutex::new(None),
            stopped: Mutex::new(false),
            receive_ring: Block::new(arena, ring_bytes(options.receive_ring))?,
            transmit_ring: Block::new(arena, ring_bytes(options.transmit_ring))?,
            device,
        };
        core.reset()?;
        Ok(core)
    }

    /// Datasheet 4.6.1 (interrupts off during initialization) and 4.6.2 (global reset and general configuration).
    fn reset(&self) -> Result<(), DeviceError> {
        let regs = &self.regs;
        self.mask_interrupts();
        self.quiesce();
        // 5.2.5.3: no new requests; those under way end before the reset.
        regs.set(CTRL, CTRL::GIO_MASTER_DISABLE);
        regs.wait_clear(STATUS, STATUS::GIO_MASTER_ENABLE, MASTER_LIMIT)?;
        regs.set(CTRL, CTRL::RST);
        // 10.2.2.1: registers may be touched 1 µs after RST, and are ready when the EEPROM was read.
        regs.pause(Duration::from_millis(1));
        regs.wait_clear(CTRL, CTRL::RST, RESET_LIMIT)?;
        regs.wait_set(EEC, EEC::AUTO_RD, RESET_LIMIT)?;
        self.mask_interrupts();
        // Speed and duplex come from the PHY; the MAC follows it (4.6.3). Flow control off: a slow guest must not stop the wire.
        regs.clear(CTRL, CTRL::GIO_MASTER_DISABLE | CTRL::RFCE | CTRL::TFCE);
        regs.set(CTRL, CTRL::ASDE | CTRL::SLU);
        set_bus_master(&*self.device, true);
        Ok(())
    }

    fn mask_interrupts(&self) {
        self.regs.write_number(IMC, u32::MAX);
        self.regs.flush(ICR);
    }

    /// Both directions off; what is under way ends (datasheet 10.2.5.1, 10.2.6.1).
    fn quiesce(&self) {
        self.regs.write(RCTL, Bits::new(0));
        self.regs.clear(TCTL, TCTL::EN);
        self.regs.flush(STATUS);
        self.regs.pause(Duration::from_millis(10));
    }

    /// Datasheet 4.6.5: receive initialization. `max` is the longest frame without FCS.
    pub(super) fn start_receive(&self, options: &Options, max: u32) {
        let regs = &self.regs;
        for word in 0..128 {
            regs.write_number(MTA(word), 0);
        }
        let base = self.receive_ring.iova();
        regs.write_number(RDBAL(QUEUE), base as u32);
        regs.write_number(RDBAH(QUEUE), (base >> 32) as u32);
        regs.write_number(RDLEN(QUEUE), ring_bytes(options.receive_ring) as u32);
        regs.write_number(RDH(QUEUE), 0);
        regs.write_number(RDT(QUEUE), 0);
        // Descriptors are written back one by one, so that the last frame of a burst is seen at once.
        regs.write(RXDCTL(QUEUE), RXDCTL::GRAN | RXDCTL::PTHRESH.is(16) | RXDCTL::WTHRESH.is(0));
        regs.write_number(MRQC, 0);
        regs.set(RFCTL, RFCTL::EXSTEN);
        regs.write(RXCSUM, RXCSUM::IPOFLD | RXCSUM::TUOFLD);
        regs.write_number(VET, 0x8100);
        if options.strip_tags {
            regs.set(CTRL, CTRL::VME);
        } else {
            regs.clear(CTRL, CTRL::VME);
        }
        // BSIZE 0 without BSEX: 2,048 bytes a buffer. SECRC: the FCS is taken off.
        let long = if max > 1518 { RCTL::LPE } else { Bits::new(0) };
        regs.write(RCTL, RCTL::EN | RCTL::BAM | RCTL::SECRC | long);
    }

    /// Datasheet 4.6.6: transmit initialization.
    pub(super) fn start_transmit(&self, options: &Options) {
        let regs = &self.regs;
        let base = self.transmit_ring.iova();
        regs.write_number(TDBAL(QUEUE), base as u32);
        regs.write_number(TDBAH(QUEUE), (base >> 32) as u32);
        regs.write_number(TDLEN(QUEUE), ring_bytes(options.transmit_ring) as u32);
        regs.write_number(TDH(QUEUE), 0);
        regs.write_number(TDT(QUEUE), 0);
        // WTHRESH 0: what was asked for is reported at once.
        regs.write(
            TXDCTL(QUEUE),
            TXDCTL::GRAN | TXDCTL::ALWAYS | TXDCTL::PTHRESH.is(31) | TXDCTL::HTHRESH.is(1),
        );
        // The values that 10.2.6.2 names for copper.
        regs.write(TIPG, TIPG::IPGT.is(8) | TIPG::IPGR1.is(8) | TIPG::IPGR2.is(6));
        regs.write(TCTL, TCTL::EN | TCTL::PSP | TCTL::RTLC | TCTL::CT.is(15) | TCTL::COLD.is(63));
    }

    pub(super) fn regs(&self) -> &Regs<D::Bar> {
        &self.regs
    }

    pub(super) fn receive_ring(&self) -> *mut u8 {
        self.receive_ring.ptr()
    }

    pub(super) fn transmit_ring(&self) -> *mut u8 {
        self.transmit_ring.ptr()
    }

    /// Whether frames may be sent.
    #[inline(always)]
    pub(super) fn is_up(&self) -> bool {
        self.state.load(Ordering::Relaxed) == State::Up as u8
    }

    /// Whether frames may come in.
    #[inline(always)]
    pub(super) fn runs(&self) -> bool {
        self.state.load(Ordering::Relaxed) != State::Stopped as u8
    }

    /// Whether VLAN tags are taken off by the device.
    #[inline(always)]
    pub(super) fn strips_tags(&self) -> bool {
        self.strips_tags.load(Ordering::Relaxed)
    }

    /// Looks whether the device is there and has a link: for housekeeping, as it reads a register.
    pub(super) fn look(&self) -> Result<u32, DeviceError> {
        let status = self.regs.read(STATUS);
        if status == GONE {
            self.fail(DeviceError::Gone);
        }
        // Everybody who asks is told.
        if let Some(reason) = self.reason().as_ref().map(ToString::to_string) {
            return Err(DeviceError::Down(reason));
        }
        let state = if STATUS::LU.are_in(status) { State::Up } else { State::LinkDown };
        // A queue may fail the device meanwhile: that stays.
        let _ = self.state.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| {
            (now != State::Stopped as u8).then_some(state as u8)
        });
        Ok(status)
    }

    /// Nothing moves any more, and `reason` is why. The first one counts.
    #[cold]
    pub(super) fn fail(&self, reason: DeviceError) {
        self.state.store(State::Stopped as u8, Ordering::Relaxed);
        self.reason().get_or_insert(reason);
    }

    fn reason(&self) -> MutexGuard<'_, Option<DeviceError>> {
        self.reason.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Stops the device, once: afterwards it neither reads nor writes memory.
    pub(super) fn stop(&self) {
        let mut stopped = self.stopped.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if std::mem::replace(&mut *stopped, true) {
            return;
        }
        self.state.store(State::Stopped as u8, Ordering::Relaxed);
        self.mask_interrupts();
        self.quiesce();
        self.regs.set(CTRL, CTRL::GIO_MASTER_DISABLE);
        let ended = self.regs.wait_clear(STATUS, STATUS::GIO_MASTER_ENABLE, MASTER_LIMIT);
        if let Err(e @ WaitError::Timeout { .. }) = &ended {
            tracing::warn!("82574L: requests did not end ({e}); bus mastering is turned off under them");
        }
        // Whatever the device thinks, the bus takes no more requests from it (PCI 3.0, 6.2.2).
        set_bus_master(&*self.device, false);
    }
}

impl<D: PciDevice> Drop for Core<D> {
    fn drop(&mut self) {
        self.stop();
    }
}
