//! The kinds of devices that a port can have: one variant each, looked at once per burst.

use pmd::kernel::OpenError;
use pmd::kernel::null::{NullSink, NullSource};
use pmd::kernel::packet::{self, PacketSink, PacketSource};
use pmd::kernel::pcap::{self, PcapSink, PcapSource};
use pmd::kernel::tap::{self, TapOptions, TapSink, TapSource};

use crate::config::{Behind, PortConfig};
use crate::runtime::OFFERED;

/// A receive queue of any kind of device.
pub(crate) enum Sources {
    Tap(TapSource),
    Packet(PacketSource),
    Pcap(PcapSource),
    Null(NullSource),
}

/// A transmit queue of any kind of device.
pub(crate) enum Sinks {
    Tap(TapSink),
    Packet(PacketSink),
    Pcap(PcapSink),
    Null(NullSink),
}

/// Does the same with whatever kind it is.
macro_rules! each {
    ($kinds:ident, $device:expr, $queue:ident => $act:expr) => {
        match $device {
            $kinds::Tap($queue) => $act,
            $kinds::Packet($queue) => $act,
            $kinds::Pcap($queue) => $act,
            $kinds::Null($queue) => $act,
        }
    };
}
pub(super) use each;

/// A device's queues, and the virtio features that say what it leaves and takes undone.
pub(crate) type Opened = (Vec<(Sources, Sinks)>, u64);

/// Opens the device of a port. `create`: makes the interface if it is not there and can be made.
///
/// # Errors
/// It is not there, or cannot be had.
pub(crate) fn open(config: &PortConfig, create: bool) -> Result<Opened, OpenError> {
    let features = OFFERED & !config.disable.virtio_bits();
    match &config.behind {
        Behind::Tap { device } => {
            let options = TapOptions { name: device.clone(), queues: config.queue_pairs, features, create };
            let queues = tap::open(&options)?;
            let features = queues.first().map_or(0, |(_, sink)| sink.features());
            let queues = queues.into_iter().map(|(rx, tx)| (Sources::Tap(rx), Sinks::Tap(tx)));
            Ok((queues.collect(), features))
        }
        Behind::Packet { device } => {
            let (source, sink) = packet::open(device)?;
            let features = sink.features();
            Ok((vec![(Sources::Packet(source), Sinks::Packet(sink))], features))
        }
        Behind::Pcap(files) => {
            let (source, sink) = pcap::open(files)?;
            Ok((vec![(Sources::Pcap(source), Sinks::Pcap(sink))], 0))
        }
        Behind::Null | Behind::VhostUser { .. } => {
            let queue = |_| (Sources::Null(NullSource), Sinks::Null(NullSink));
            Ok(((0..config.queue_pairs).map(queue).collect(), features))
        }
    }
}
