//! The transmit queue: frames of a burst become buffers for the device.
//!
//! A frame that lies in buffers of the same arena (it came in by another card) is not copied: its buffers are taken out of the
//! burst and go home when the device has sent them. Every other frame is copied once. Its header comes first, from memory of the
//! queue's own. Never blocks, never allocates.

use std::mem::ManuallyDrop;
use std::sync::Arc;

use port::{Burst, DropReason, Frame, FrameSet, Gso, Head, Scratch, TagEdit, TxQueue};
use virtio::driver::{DriverRing, OfferError, Piece};
use virtio::memory::copy::write_net_header;
use virtio::net::HEADER_LEN;

use super::core::{Core, MOST_PIECES};
use super::pci::Doorbell;
use crate::access::{NarrowBar, PciDevice};
use crate::dma::{BUFFER, Block, Chain, Pool, View};
use crate::nic::{DeviceError, MOST_BUFFERS, Plan, TransmitCounters, TransmitQueue, Writer, pieces};

/// From one header to the next.
pub(super) const HEADER_STRIDE: usize = 16;

/// The transmit queue of a device. One thread uses it at a time.
pub struct Transmit<D: PciDevice<Bar: NarrowBar>> {
    ring: ManuallyDrop<DriverRing>,
    number: u16,
    doorbell: Doorbell,
    /// A header for each frame under way.
    headers: Block,
    under_way: UnderWay,
    /// Most buffers under way: a frame takes one descriptor however many it has, so the ring does not bound them.
    most: u32,
    indirect: bool,
    /// The device calculates checksums.
    finishes: bool,
    unannounced: bool,
    /// Longest frame in bytes, without FCS.
    max: u32,
    pool: Pool,
    core: Arc<Core<D>>,
    counters: Arc<TransmitCounters>,
}

// SAFETY: the headers are memory of the device's arena that belongs to no thread, and `&mut self` is needed to touch them.
unsafe impl<D: PciDevice<Bar: NarrowBar>> Send for Transmit<D> {}

/// The frames that the device has.
struct UnderWay {
    /// The buffers of each and how many they are, by the number of its header.
    frames: Box<[(Chain, u32)]>,
    /// Numbers that no frame has.
    free: Vec<u32>,
    /// Buffers of all of them.
    buffers: u32,
}

impl UnderWay {
    /// The frame with number `token` was sent.
    fn go_home(&mut self, view: View<'_>, token: u32) {
        if let Some(frame) = self.frames.get_mut(token as usize) {
            let (chain, buffers) = std::mem::replace(frame, (Chain::EMPTY, 0));
            chain.go_home(view);
            self.buffers -= buffers;
            self.free.push(token);
        }
    }
}

/// How a queue is used.
pub(super) struct Use {
    pub(super) number: u16,
    pub(super) doorbell: Doorbell,
    pub(super) indirect: bool,
    pub(super) finishes: bool,
    pub(super) max: u32,
    /// Most buffers that may be under way.
    pub(super) most: u32,
}

impl<D: PciDevice<Bar: NarrowBar>> Transmit<D> {
    /// `headers` has [`HEADER_STRIDE`] bytes for each descriptor of the ring.
    pub(super) fn new(core: Arc<Core<D>>, ring: DriverRing, headers: Block, how: Use, pool: Pool) -> Self {
        let size = u32::from(ring.free());
        let Use { number, doorbell, indirect, finishes, max, most } = how;
        Self {
            ring: ManuallyDrop::new(ring),
            number,
            doorbell,
            headers,
            under_way: UnderWay {
                frames: vec![(Chain::EMPTY, 0); size as usize].into(),
                free: (0..size).collect(),
                buffers: 0,
            },
            most,
            indirect,
            finishes,
            unannounced: false,
            max,
            pool,
            core,
            counters: Arc::default(),
        }
    }

    /// Takes back what the device has sent, and lets its buffers go home.
    fn reclaim(&mut self) {
        let view = self.pool.arena().view();
        let under_way = &mut self.under_way;
        let result = self.ring.reclaim(usize::MAX, |token, _| under_way.go_home(view, token));
        if let Err(fault) = result {
            self.core.state.fail(DeviceError::Ring(fault));
        }
    }

    /// Sends a frame; its length as sent.
    fn send_one(
        &mut self,
        burst: &Burst<'_>,
        frame: &Frame,
        head: &Head,
        edit: TagEdit,
    ) -> Result<u32, DropReason> {
        let plan = Plan::new(frame, edit, self.max, false)?;
        if !plan.offload.is_none() && (!self.finishes || plan.offload.gso() != Ok(Gso::None)) {
            return Err(DropReason::CannotFinish);
        }
        let arena = self.pool.arena().clone();
        let view = arena.view();
        let uncopied = plan.edit == TagEdit::Keep
            && u32::from(frame.more) < MOST_BUFFERS
            && pieces(burst, frame).all(|(ptr, _)| view.buffer_of(ptr).is_some_and(|i| view.is_held(i)));
        let total = plan.len(frame);
        let buffers = if uncopied { u32::from(frame.more) + 1 } else { total.div_ceil(BUFFER) };
        if buffers > MOST_BUFFERS {
            return Err(DropReason::Oversize);
        }
        let descriptors = if self.indirect { 1 } else { buffers as u16 + 1 };
        if self.ring.free() < descriptors || self.under_way.buffers + buffers > self.most {
            return Err(DropReason::ReceiverFull);
        }
        let &token = self.under_way.free.last().ok_or(DropReason::ReceiverFull)?;
        let header = token as usize * HEADER_STRIDE;
        // SAFETY: HEADER_LEN bytes of the block, for a number that no frame under way has.
        unsafe {
            let at = self.headers.ptr().wrapping_add(header);
            write_net_header(at, plan.offload.low, plan.offload.csum_offset, 0, HEADER_LEN);
        }
        let mut list = [Piece { address: 0, len: 0 }; MOST_PIECES];
        let mut places = list.iter_mut();
        let mut add = |address, len| {
            if let Some(place) = places.next() {
                *place = Piece { address, len };
            }
        };
        add(self.headers.iova() + header as u64, HEADER_LEN as u32);
        let mut chain = Chain::EMPTY;
        let total = if uncopied {
            for (ptr, len) in pieces(burst, frame) {
                let Some(index) = view.buffer_of(ptr) else { break };
                if chain.is_empty() {
                    chain = Chain::beginning_with(view, index);
                }
                chain.add(view, index);
                add(view.iova_of(ptr), len);
            }
            total
        } else {
            let mut writer = Writer::new(&mut self.pool, buffers).ok_or(DropReason::ReceiverFull)?;
            writer.frame(burst, frame, head, plan.edit);
            let (copied, total) = writer.finish();
            let mut left = total;
            for &index in copied.get(..buffers as usize).unwrap_or_default() {
                if chain.is_empty() {
                    chain = Chain::beginning_with(view, index);
                }
                chain.add(view, index);
                add(view.iova(index), left.min(BUFFER));
                left -= left.min(BUFFER);
            }
            total
        };
        let list = list.get(..buffers as usize + 1).unwrap_or_default();
        let offered = if self.indirect {
            self.ring.offer_indirect(list, token)
        } else {
            self.ring.offer_chain(list, token)
        };
        if let Err(e) = offered {
            chain.go_home(view);
            return Err(match e {
                OfferError::Full => DropReason::ReceiverFull,
                OfferError::Pieces(_) | OfferError::NoTables | OfferError::OneWay => {
                    DropReason::ReceiverTooSmall
                }
            });
        }
        self.under_way.free.pop();
        self.under_way.buffers += buffers;
        if let Some(place) = self.under_way.frames.get_mut(token as usize) {
            *place = (chain, buffers);
        }
        if uncopied {
            self.counters.uncopied.add(1);
        }
        Ok(total)
    }
}

impl<D: PciDevice<Bar: NarrowBar>> TxQueue for Transmit<D> {
    fn prepare(&mut self, _: usize) {}

    fn send(&mut self, burst: &Burst<'_>, set: FrameSet, edit: TagEdit, _: &mut Scratch) {
        self.counters.offered.add(set.len() as u64);
        if !self.core.state.is_up() {
            self.counters.drops.add(DropReason::PortDown, set.len() as u64);
            return;
        }
        // Buffers of other cards go home as soon as they can: those cards may run short of them.
        self.reclaim();
        for i in set {
            let (Some(frame), Some(head)) = (burst.frames().get(i), burst.heads().get(i)) else { break };
            match self.send_one(burst, frame, head, edit) {
                Ok(len) => {
                    self.counters.sent.add(1);
                    self.counters.bytes.add(u64::from(len));
                    self.unannounced = true;
                }
                Err(reason) => self.counters.drops.add(reason, 1),
            }
        }
    }

    fn notify(&mut self) {
        if std::mem::take(&mut self.unannounced) && self.ring.publish() {
            self.core.registers.ring(&self.doorbell, self.number);
        }
    }
}

impl<D: PciDevice<Bar: NarrowBar>> TransmitQueue for Transmit<D> {
    fn counters(&self) -> Arc<TransmitCounters> {
        self.counters.clone()
    }
}

impl<D: PciDevice<Bar: NarrowBar>> Drop for Transmit<D> {
    fn drop(&mut self) {
        // The device may read these buffers until it has stopped.
        self.core.stop();
        let view = self.pool.arena().view();
        let under_way = &mut self.under_way;
        // SAFETY: it is not used after this.
        unsafe { ManuallyDrop::take(&mut self.ring) }.abandon(|token| under_way.go_home(view, token));
    }
}
