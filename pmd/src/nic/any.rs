//! A card of whichever kind there is a driver for, opened by VFIO: the list of drivers.
//!
//! Which one it is, is looked at once per burst.

use std::sync::Arc;
use std::time::Duration;

use port::{Burst, BurstBuffer, DropReason, FrameSet, Release, RxQueue, Scratch, TagEdit, TxQueue};

use super::selftest::{self, Line};
use super::{
    DeviceError, Filter, Link, Mac, Nic, Opened, Options, ReceiveCounters, ReceiveQueue, TransmitCounters,
    TransmitQueue,
};
use crate::access::vfio::VfioFunction;
use crate::access::{PciDevice, Reading, config};
use crate::dma::Arena;
use crate::e1000e::E1000e;
use crate::igb::{Igb, Settings, VirtualFunction};
use crate::igbvf::Igbvf;
use crate::virtio_net::VirtioNet;

/// A card that was opened, as [`Opened`].
pub struct OpenedAny {
    /// For housekeeping.
    pub nic: AnyNic,
    /// As there.
    pub receive: Vec<AnyReceive>,
    /// As many.
    pub transmit: Vec<AnyTransmit>,
}

macro_rules! drivers {
    ($($name:ident: $driver:ident,)+) => {
        /// A card's handle ([`Nic`]).
        #[allow(missing_docs)]
        pub enum AnyNic { $($name($driver<VfioFunction>),)+ }

        /// A card's receive queue. Of the variants' sizes the largest counts: there are few, each on a heap of its own.
        #[allow(missing_docs, clippy::large_enum_variant)]
        pub enum AnyReceive { $($name(<$driver<VfioFunction> as Nic>::Receive),)+ }

        /// A card's transmit queue; as for those that receive.
        #[allow(missing_docs, clippy::large_enum_variant)]
        pub enum AnyTransmit { $($name(<$driver<VfioFunction> as Nic>::Transmit),)+ }

        /// What the card is called whose PCI function has this identifier (device in the high half, vendor in the low); none
        /// where there is no driver for it.
        pub fn driver_for(id: u32) -> Option<&'static str> {
            $(if $driver::<VfioFunction>::IDS.contains(&id) {
                return Some($driver::<VfioFunction>::NAME);
            })+
            None
        }

        /// Starts the card that `function` is.
        ///
        /// # Errors
        /// There is no driver for it, or see [`Nic::open`].
        pub fn open(
            function: Arc<VfioFunction>,
            arena: &Arc<Arena>,
            options: Options,
        ) -> Result<OpenedAny, DeviceError> {
            let id = function.config_read(config::ID);
            $(if $driver::<VfioFunction>::IDS.contains(&id) {
                let Opened { nic, receive, transmit } = $driver::open(function, arena, options)?;
                return Ok(OpenedAny {
                    nic: AnyNic::$name(nic),
                    receive: receive.into_iter().map(AnyReceive::$name).collect(),
                    transmit: transmit.into_iter().map(AnyTransmit::$name).collect(),
                });
            })+
            Err(DeviceError::NoDriver { vendor: id as u16, device: (id >> 16) as u16 })
        }

        /// What the registers of the card that `function` is read: see [`Nic::registers`].
        ///
        /// # Errors
        /// There is no driver for it, or it has no such registers.
        pub fn registers(function: &VfioFunction) -> Result<Vec<Reading>, DeviceError> {
            let id = function.config_read(config::ID);
            $(if $driver::<VfioFunction>::IDS.contains(&id) {
                return $driver::registers(function);
            })+
            Err(DeviceError::NoDriver { vendor: id as u16, device: (id >> 16) as u16 })
        }

        /// Tests the card that `function` is, which nobody uses, with memory in `arena`. `raised`: whether a vector was raised since
        /// it was asked of it last.
        ///
        /// # Errors
        /// There is no driver for it.
        pub fn self_test(
            function: &Arc<VfioFunction>,
            arena: &Arc<Arena>,
            raised: &mut dyn FnMut(u16) -> bool,
        ) -> Result<Vec<Line>, DeviceError> {
            let id = function.config_read(config::ID);
            $(if $driver::<VfioFunction>::IDS.contains(&id) {
                return Ok(selftest::run::<$driver<VfioFunction>>(function, arena, raised));
            })+
            Err(DeviceError::NoDriver { vendor: id as u16, device: (id >> 16) as u16 })
        }

        /// Does the same with whichever it is.
        macro_rules! each {
            ($kind:ident, $queue:expr, $one:ident => $act:expr) => {
                match $queue { $($kind::$name($one) => $act,)+ }
            };
        }
    };
}

drivers! {
    E1000e: E1000e,
    Igb: Igb,
    Igbvf: Igbvf,
    VirtioNet: VirtioNet,
}

impl AnyNic {
    /// As [`Nic::mac`].
    pub fn mac(&self) -> Mac {
        each!(AnyNic, self, nic => nic.mac())
    }

    /// As [`Nic::set_filter`].
    ///
    /// # Errors
    /// As there.
    pub fn set_filter(&mut self, filter: &Filter) -> Result<(), DeviceError> {
        each!(AnyNic, self, nic => nic.set_filter(filter))
    }

    /// As [`Nic::link`].
    ///
    /// # Errors
    /// As there.
    pub fn link(&mut self) -> Result<Link, DeviceError> {
        each!(AnyNic, self, nic => nic.link())
    }

    /// As [`Nic::wait_for_link`].
    ///
    /// # Errors
    /// As there.
    pub fn wait_for_link(&mut self, limit: Duration) -> Result<Link, DeviceError> {
        each!(AnyNic, self, nic => nic.wait_for_link(limit))
    }

    /// The virtual functions that it administers.
    pub fn virtual_functions(&self) -> &[VirtualFunction] {
        match self {
            Self::Igb(nic) => nic.virtual_functions(),
            Self::E1000e(_) | Self::Igbvf(_) | Self::VirtioNet(_) => &[],
        }
    }

    /// Changes what all virtual functions may, those beyond the end of `settings` to the default; all or none. Drivers of those that
    /// change have to begin anew, and are told.
    ///
    /// # Errors
    /// There are fewer, or one may not have its address.
    pub fn set_virtual_functions(&mut self, settings: &[Settings]) -> Result<(), DeviceError> {
        match self {
            Self::Igb(nic) => nic.set_virtual_functions(settings),
            Self::E1000e(_) | Self::Igbvf(_) | Self::VirtioNet(_) if settings.is_empty() => Ok(()),
            Self::E1000e(_) | Self::Igbvf(_) | Self::VirtioNet(_) => Err(DeviceError::Unsupported {
                card: each!(AnyNic, self, nic => name_of(nic)),
                what: "administering virtual functions",
            }),
        }
    }

    /// As [`Nic::statistics`].
    pub fn statistics(&mut self) -> Vec<(&'static str, u64)> {
        each!(AnyNic, self, nic => nic.statistics())
    }
}

fn name_of<N: Nic>(_: &N) -> &'static str {
    N::NAME
}

impl AnyReceive {
    /// As [`ReceiveQueue::counters`].
    pub fn counters(&self) -> Arc<ReceiveCounters> {
        each!(AnyReceive, self, queue => queue.counters())
    }

    /// As [`ReceiveQueue::vector`].
    pub fn vector(&self) -> Option<u16> {
        each!(AnyReceive, self, queue => queue.vector())
    }

    /// As [`ReceiveQueue::arm`].
    pub fn arm(&mut self) -> bool {
        each!(AnyReceive, self, queue => queue.arm())
    }

    /// As [`ReceiveQueue::disarm`].
    pub fn disarm(&mut self) {
        each!(AnyReceive, self, queue => queue.disarm());
    }
}

impl RxQueue for AnyReceive {
    #[inline(always)]
    fn peek(&mut self) -> usize {
        each!(AnyReceive, self, queue => queue.peek())
    }

    #[inline(always)]
    fn poll<'q>(&'q mut self, buffer: &'q mut BurstBuffer) -> Burst<'q> {
        each!(AnyReceive, self, queue => queue.poll(buffer))
    }
}

impl Release for AnyReceive {
    #[inline(always)]
    fn release(&mut self) {
        each!(AnyReceive, self, queue => queue.release());
    }

    fn dropped(&mut self, set: FrameSet, reason: DropReason) {
        each!(AnyReceive, self, queue => queue.dropped(set, reason));
    }
}

impl AnyTransmit {
    /// As [`TransmitQueue::counters`].
    pub fn counters(&self) -> Arc<TransmitCounters> {
        each!(AnyTransmit, self, queue => queue.counters())
    }
}

impl TxQueue for AnyTransmit {
    #[inline(always)]
    fn prepare(&mut self, frames: usize) {
        each!(AnyTransmit, self, queue => queue.prepare(frames));
    }

    #[inline(always)]
    fn send(&mut self, burst: &Burst<'_>, set: FrameSet, edit: TagEdit, scratch: &mut Scratch) {
        each!(AnyTransmit, self, queue => queue.send(burst, set, edit, scratch));
    }

    #[inline(always)]
    fn notify(&mut self) {
        each!(AnyTransmit, self, queue => queue.notify());
    }
}
