//! The types of single values that only a switch has: each accepts exactly what is meaningful by itself, and its error says
//! what that is.
//!
//! Knows serde; knows nothing of tables, keys or other values.

use std::fmt;
use std::ops::RangeInclusive;

use host::pci::Bdf;
use serde::Deserialize;
use serde::de::{self, Deserializer, IntoDeserializer, Unexpected, Visitor};
use settings::values::{Bounded, DeviceName};
use settings::{suggestion, text, words};

/// An IEEE 802.1Q VLAN identifier (0 and 4095 are reserved).
pub(super) type VlanId = Bounded<1, 4_094>;
/// Frames a second.
pub(super) type FrameRate = Bounded<1, 1_000_000_000>;

text! {
    /// A group, by name or number.
    GroupName(String), "a group's name in quotes", |text| match text {
        "" => Err("the name is empty".to_owned()),
        _ => Ok(text.to_owned()),
    };

    /// A network interface by name, or a card by its PCI address, which is told by its colons.
    Device(String), "an interface's name or a card's PCI address in quotes", |text| {
        if text.contains(':') {
            return text.parse::<Bdf>().map(|bdf| bdf.to_string()).map_err(|error| error.to_string());
        }
        let name = IntoDeserializer::<de::value::Error>::into_deserializer(text);
        DeviceName::deserialize(name).map(|name| name.0).map_err(|error| error.to_string())
    };

    /// A file.
    FileName(String), "a path in quotes", |text| match text {
        "" => Err("the path is empty".to_owned()),
        _ if text.contains('\0') => Err(format!("{text:?}: a path holds no zero byte")),
        _ => Ok(text.to_owned()),
    };

    /// Permissions, octal.
    SocketMode(u32), "permissions in quotes, octal, like \"0660\"", |text| {
        let digits = text.strip_prefix("0o").unwrap_or(text);
        match u32::from_str_radix(digits, 8) {
            Ok(mode @ 0..=0o777) if !digits.starts_with('+') => Ok(mode),
            _ => Err(format!("{text:?}: wanted permissions, octal, like \"0660\"")),
        }
    };
}

words! {
    /// What a worker does when nothing comes in.
    Idle {
        /// Polls on: lowest latency, a whole core.
        Poll = "poll",
        /// Backs off and sleeps until a guest kicks.
        Sleep = "sleep",
    }

    /// Which end of the socket we are.
    SocketSide {
        /// We listen; the VMM connects.
        Server = "server",
        /// We connect, again and again, to the VMM.
        Client = "client",
    }

    /// Frames of a port.
    Direction {
        /// Those that come in from what is behind it.
        In = "in",
        /// Those that go out to it.
        Out = "out",
        /// All.
        Both = "both",
    }

    /// What is behind a port.
    PortKind {
        /// A virtual machine's virtio-net device.
        VhostUser = "vhost-user",
        /// A tap interface of this machine's kernel.
        Tap = "tap",
        /// Any Ethernet interface of this machine, by a packet socket.
        Packet = "af_packet",
        /// Any Ethernet interface of this machine, by XDP sockets: faster, and of frames up to 3,840 bytes.
        Xdp = "af_xdp",
        /// A network card that this machine's kernel gave to vfio-pci, driven by the switch itself.
        Nic = "nic",
        /// Files of frames: one that comes in, one that is written of what goes out.
        Pcap = "pcap",
        /// Nothing: what goes out is gone, and nothing comes in.
        Null = "null",
    }
}

/// The name of a feature that a port can withhold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FeatureName(pub(super) super::Feature);

impl<'de> Deserialize<'de> for FeatureName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        super::Feature::by_name(&name).map(FeatureName).ok_or_else(|| {
            let names: Vec<_> = super::Feature::ALL.iter().map(|feature| feature.name()).collect();
            de::Error::custom(format!("{name:?} is no feature; {}", suggestion(&name, &names)))
        })
    }
}

/// One VLAN, or a range like `"100-199"`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct VlanRange(pub(super) RangeInclusive<u16>);

impl<'de> Deserialize<'de> for VlanRange {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Range;
        impl Visitor<'_> for Range {
            type Value = VlanRange;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a VLAN from 1 to 4094, or a range like \"100-199\"")
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Self::Value, E> {
                match u16::try_from(value) {
                    Ok(vlan @ 1..=4_094) => Ok(VlanRange(vlan..=vlan)),
                    _ => Err(E::invalid_value(Unexpected::Signed(value), &self)),
                }
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                let (first, last) = text.split_once('-').unwrap_or((text, text));
                match (first.trim().parse::<u16>(), last.trim().parse::<u16>()) {
                    (Ok(first @ 1..=4_094), Ok(last @ 1..=4_094)) if first <= last => {
                        Ok(VlanRange(first..=last))
                    }
                    _ => Err(E::invalid_value(Unexpected::Str(text), &self)),
                }
            }
        }
        deserializer.deserialize_any(Range)
    }
}
