//! What `disable` can withhold from a guest: names, and the bits behind them.
//!
//! Features that build on another (segmentation offload on checksum offload) go with it, as virtio 1.3, section 5.1.3.1,
//! demands of whoever negotiates.

use virtio::features as bit;

macro_rules! features {
    ($($(#[doc = $meaning:literal])+ $variant:ident = $name:literal, $virtio:expr;)+) => {
        /// A feature of a vhost-user port that can be withheld.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum Feature { $($(#[doc = $meaning])+ $variant,)+ }

        impl Feature {
            /// All of them, in the order of the documentation.
            pub const ALL: &'static [Feature] = &[$(Feature::$variant,)+];

            /// As it is written in `disable`.
            pub fn name(self) -> &'static str {
                match self { $(Feature::$variant => $name,)+ }
            }

            /// What it is, as a sentence.
            pub fn sentence(self) -> &'static str {
                match self { $(Feature::$variant => concat!($($meaning,)+).trim_ascii(),)+ }
            }

            /// The virtio feature bits that it stands for (0: it is a vhost-user protocol feature only).
            pub fn virtio_bits(self) -> u64 {
                match self { $(Feature::$variant => $virtio,)+ }
            }
        }
    };
}

const HOST_SEGMENTATION: u64 =
    bit::NET_HOST_TSO4 | bit::NET_HOST_TSO6 | bit::NET_HOST_ECN | bit::NET_HOST_UFO | bit::NET_HOST_USO;
const GUEST_SEGMENTATION: u64 = bit::NET_GUEST_TSO4
    | bit::NET_GUEST_TSO6
    | bit::NET_GUEST_ECN
    | bit::NET_GUEST_UFO
    | bit::NET_GUEST_USO4
    | bit::NET_GUEST_USO6;

/// What only a driver of virtio 1 can negotiate: the earlier ones have 32 bits.
const SINCE_1: u64 = bit::VERSION_1
    | bit::RING_PACKED
    | bit::IN_ORDER
    | bit::NET_GUEST_USO4
    | bit::NET_GUEST_USO6
    | bit::NET_HOST_USO;

features! {
    /// Virtio 1: the guest's driver is a legacy one, with split rings, not in order, and no UDP unsegmented.
    Version1 = "version_1", SINCE_1;
    /// Packed rings (the guest uses split ones).
    Packed = "packed", bit::RING_PACKED;
    /// Buffers used in the order in which they were made available.
    InOrder = "in_order", bit::IN_ORDER;
    /// Frames to the guest that span several receive buffers.
    MrgRxbuf = "mrg_rxbuf", bit::NET_MRG_RXBUF;
    /// Indirect descriptor tables.
    Indirect = "indirect", bit::RING_INDIRECT_DESC;
    /// Notifications suppressed by index.
    EventIdx = "event_idx", bit::RING_EVENT_IDX;
    /// Frames from the guest whose checksum is left to us; without it no segmentation offload from the guest either.
    Csum = "csum", bit::NET_CSUM | HOST_SEGMENTATION;
    /// Frames to the guest whose checksum is left to it; without it no segmentation offload to the guest either.
    GuestCsum = "guest_csum", bit::NET_GUEST_CSUM | GUEST_SEGMENTATION;
    /// TCP over IPv4 unsegmented, both ways.
    Tso4 = "tso4", bit::NET_HOST_TSO4 | bit::NET_GUEST_TSO4;
    /// TCP over IPv6 unsegmented, both ways.
    Tso6 = "tso6", bit::NET_HOST_TSO6 | bit::NET_GUEST_TSO6;
    /// Unsegmented TCP with congestion marks, both ways.
    Ecn = "ecn", bit::NET_HOST_ECN | bit::NET_GUEST_ECN;
    /// UDP unfragmented, both ways.
    Ufo = "ufo", bit::NET_HOST_UFO | bit::NET_GUEST_UFO;
    /// UDP unsegmented, both ways.
    Uso = "uso", bit::NET_HOST_USO | bit::NET_GUEST_USO4 | bit::NET_GUEST_USO6;
    /// Any segmentation offload to the guest: it gets every frame cut to size (the guest may still send unsegmented).
    GuestSegmentation = "guest_segmentation", GUEST_SEGMENTATION;
    /// Any segmentation offload from the guest (it may still receive unsegmented).
    HostSegmentation = "host_segmentation", HOST_SEGMENTATION;
    /// All checksum and segmentation offloads, both ways.
    Offloads = "offloads", bit::NET_CSUM | bit::NET_GUEST_CSUM | HOST_SEGMENTATION | GUEST_SEGMENTATION;
    /// The MTU told to the guest, and by its VMM to us.
    Mtu = "mtu", bit::NET_MTU;
    /// The link status told to the guest, and the device status told by its VMM.
    Status = "status", bit::NET_STATUS;
    /// More than one queue pair.
    Mq = "mq", bit::NET_MQ;
    /// The guest announces itself after a migration.
    GuestAnnounce = "guest_announce", bit::NET_GUEST_ANNOUNCE;
    /// Positions of packed rings kept across a restart of the switch.
    Inflight = "inflight", 0;
    /// The log of written pages: without it the guest does not migrate.
    Log = "log", bit::VHOST_LOG_ALL;
    /// Acknowledgements of protocol messages.
    ReplyAck = "reply_ack", 0;
    /// Memory added and removed piece by piece (hot-plug).
    MemSlots = "mem_slots", 0;
    /// A RARP sent for the guest after a migration, when it does not announce itself.
    Rarp = "rarp", 0;
}

impl Feature {
    /// The feature of this name.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|feature| feature.name() == name)
    }
}

/// A set of features.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FeatureSet(u32);

impl FeatureSet {
    /// Whether `feature` is in it.
    pub fn contains(self, feature: Feature) -> bool {
        self.0 >> feature as u8 & 1 == 1
    }

    /// The virtio feature bits that are withheld when this set is disabled.
    pub fn virtio_bits(self) -> u64 {
        let mut bits = self.iter().map(Feature::virtio_bits).fold(0, |all, bits| all | bits);
        // Congestion marks ride on unsegmented TCP: without it, they are not offered either.
        for (tcp, marks) in [
            (bit::NET_HOST_TSO4 | bit::NET_HOST_TSO6, bit::NET_HOST_ECN),
            (bit::NET_GUEST_TSO4 | bit::NET_GUEST_TSO6, bit::NET_GUEST_ECN),
        ] {
            if bits & tcp == tcp {
                bits |= marks;
            }
        }
        bits
    }

    /// Its features.
    pub fn iter(self) -> impl Iterator<Item = Feature> {
        Feature::ALL.iter().copied().filter(move |feature| self.contains(*feature))
    }
}

impl FromIterator<Feature> for FeatureSet {
    fn from_iter<I: IntoIterator<Item = Feature>>(features: I) -> Self {
        Self(features.into_iter().fold(0, |set, feature| set | 1 << feature as u8))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn withholding_checksums_withholds_what_builds_on_them() {
        let set: FeatureSet = [Feature::Csum, Feature::Log].into_iter().collect();
        assert_eq!(set.virtio_bits() & bit::NET_HOST_TSO4, bit::NET_HOST_TSO4);
        assert_eq!(set.virtio_bits() & bit::NET_GUEST_TSO4, 0);
        assert!(set.contains(Feature::Log) && !set.contains(Feature::Rarp));
    }

    #[test]
    fn every_feature_has_its_own_name_and_fits_the_set() {
        let names: std::collections::BTreeSet<_> =
            Feature::ALL.iter().map(|feature| feature.name()).collect();
        assert_eq!(names.len(), Feature::ALL.len());
        assert!(Feature::ALL.len() <= 32);
        assert!(Feature::ALL.iter().all(|feature| Feature::by_name(feature.name()) == Some(*feature)));
    }
}
