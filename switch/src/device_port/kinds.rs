//! The kinds of devices that a port can have: one variant each, looked at once per burst.
//!
//! All are a [`port::Source`] and a [`port::Sink`], but for the receive queue of a card, which lends bursts itself ([`Inlet`]).

use pmd::kernel::OpenError;
use pmd::kernel::null::{NullSink, NullSource};
use pmd::kernel::packet::{self, PacketSink, PacketSource};
use pmd::kernel::pcap::{self, PcapSink, PcapSource};
use pmd::kernel::tap::{self, TapOptions, TapSink, TapSource};
use pmd::kernel::xdp::{self, OpenedXdp, XdpDevice, XdpSink, XdpSource};

use super::card::{Card, CardError, Cards, OpenedCard};
use super::card_queues::{CardReceive, CardSend};
use crate::config::{Behind, PortConfig};
use crate::runtime::OFFERED;

/// A receive queue of any kind of device.
pub(crate) enum Sources {
    Tap(TapSource),
    Packet(PacketSource),
    Xdp(Box<XdpSource>),
    Pcap(PcapSource),
    Null(NullSource),
}

/// A transmit queue of any kind of device.
pub(crate) enum Sinks {
    Tap(TapSink),
    Packet(PacketSink),
    Xdp(XdpSink),
    Pcap(PcapSink),
    Null(NullSink),
    Card(Box<CardSend>),
}

/// Where a port's frames come from.
pub(crate) enum Inlet {
    Device(Sources),
    Card(Box<CardReceive>),
}

/// Why a port's device is not open.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// One of the kernel's.
    #[error(transparent)]
    Kernel(#[from] OpenError),
    /// A card.
    #[error(transparent)]
    Card(#[from] CardError),
}

impl DeviceError {
    /// Whether another try is worth it: what is missing may come.
    pub(crate) fn may_pass(&self) -> bool {
        match self {
            Self::Kernel(error) => matches!(error, OpenError::Absent { .. } | OpenError::Down { .. }),
            Self::Card(error) => error.may_pass(),
        }
    }
}

/// Does the same with whatever kind it is.
macro_rules! each {
    ($kinds:ident $(+ $more:ident)*, $device:expr, $queue:ident => $act:expr) => {
        match $device {
            $kinds::Tap($queue) => $act,
            $kinds::Packet($queue) => $act,
            $kinds::Xdp($queue) => $act,
            $kinds::Pcap($queue) => $act,
            $kinds::Null($queue) => $act,
            $($kinds::$more(boxed) => { let $queue = &mut **boxed; $act })*
        }
    };
}
pub(super) use each;

/// A device that is open.
pub(crate) struct Opened {
    pub(crate) queues: Vec<(Inlet, Sinks)>,
    /// The virtio features that say what it leaves and takes undone.
    pub(crate) features: u64,
    /// What housekeeping does with it, if it is a card.
    pub(crate) card: Option<Card>,
    /// The same, if it is an interface behind XDP sockets.
    pub(crate) xdp: Option<XdpDevice>,
    /// The memory node that its worker should be on.
    pub(crate) node: Option<u32>,
}

impl Opened {
    fn of(queues: impl IntoIterator<Item = (Sources, Sinks)>, features: u64) -> Self {
        let queues = queues.into_iter().map(|(source, sink)| (Inlet::Device(source), sink)).collect();
        Self { queues, features, card: None, xdp: None, node: None }
    }
}

/// Opens the device of a port. `create`: makes the interface if it is not there and can be made.
///
/// # Errors
/// It is not there, or cannot be had.
pub(crate) fn open(config: &PortConfig, create: bool, cards: &mut Cards) -> Result<Opened, DeviceError> {
    let features = OFFERED & !config.disable.virtio_bits();
    match &config.behind {
        Behind::Tap { device } => {
            let options = TapOptions { name: device.clone(), queues: config.queue_pairs, features, create };
            let queues = tap::open(&options)?;
            let features = queues.first().map_or(0, |(_, sink)| sink.features());
            let queues = queues.into_iter().map(|(rx, tx)| (Sources::Tap(rx), Sinks::Tap(tx)));
            Ok(Opened::of(queues, features))
        }
        Behind::Nic { bdf, token, .. } => {
            let OpenedCard { card, queues, node } = cards.open(config, *bdf, token.as_deref())?;
            let queues = queues.into_iter().map(|(receive, bell, transmit)| {
                let receive = Inlet::Card(Box::new(CardReceive::new(receive, bell)));
                (receive, Sinks::Card(Box::new(CardSend::new(transmit))))
            });
            Ok(Opened { queues: queues.collect(), features: 0, card: Some(card), xdp: None, node })
        }
        Behind::Packet { device } => {
            let (source, sink) = packet::open(device)?;
            let features = sink.features();
            Ok(Opened::of([(Sources::Packet(source), Sinks::Packet(sink))], features))
        }
        Behind::Xdp { device } => {
            let OpenedXdp { device, queues } = xdp::open(device, config.queue_pairs)?;
            let queues = queues.into_iter().map(|(rx, tx)| (Sources::Xdp(Box::new(rx)), Sinks::Xdp(tx)));
            Ok(Opened { xdp: Some(device), ..Opened::of(queues, 0) })
        }
        Behind::Pcap(files) => {
            let (source, sink) = pcap::open(files)?;
            Ok(Opened::of([(Sources::Pcap(source), Sinks::Pcap(sink))], 0))
        }
        Behind::Null | Behind::VhostUser { .. } => {
            let queue = |_| (Sources::Null(NullSource), Sinks::Null(NullSink));
            Ok(Opened::of((0..config.queue_pairs).map(queue), features))
        }
    }
}
