//! The vocabulary: the keys of `[switch]` and `[[port]]` as a user writes them, the same in a switch's own file and in an
//! appliance file.
//!
//! Owns names, types and one-line meanings; never decides what a combination of keys means (that is `validate`).

use settings::table::Read;
use settings::values::{Bounded, CoreNumber, HardwareAddress, Memory, Name, SocketName, VfToken};
use settings::{DeValue, Problems, Spanned, keys, nested, plain};

use super::inject::Share;
use super::values::{
    Device, Direction, FeatureName, FileName, FrameRate, GroupName, Idle, PortKind, SocketMode, SocketSide,
    VlanId, VlanRange,
};

plain!(
    Device,
    Direction,
    Share,
    FeatureName,
    FileName,
    GroupName,
    Idle,
    PortKind,
    SocketMode,
    SocketSide,
    VlanRange
);

keys! {
    /// `[switch]`.
    SwitchKeys in "[switch]" {
        /// Cores that poll, one worker thread each.
        workers: Vec<Spanned<CoreNumber>>,
        /// Cores for everything that is not a worker (default: all permitted cores that are no worker's).
        housekeeping: Vec<Spanned<CoreNumber>>,
        /// What a worker does when nothing comes in.
        idle: Idle,
        /// Frames taken from a queue at a time.
        burst: Bounded<1, { port::MAX_BURST as i64 }>,
        /// Entries of the learning table, rounded up to a power of two.
        fdb_size: Bounded<1_024, 16_777_216>,
        /// Seconds after which an address that was not heard from is forgotten.
        fdb_age: Bounded<1, 1_000_000>,
        /// Whether frames to 01:80:c2:00:00:00 to 0f are forwarded.
        forward_reserved: bool,
        /// Whether the running switch is held to its own files.
        confine_files: bool,
    }
}

keys! {
    /// `[[port]]`.
    PortKeys in "[[port]]" {
        /// What it is called in statistics, logs and commands.
        name: Name,
        /// What is behind it.
        kind: PortKind,
        /// The network interface behind a tap or a packet socket, or the PCI address of a card.
        device: Device,
        /// What a virtual function needs whose physical function is with vfio-pci too, and what that one sets.
        vf_token: VfToken,
        /// What the virtual functions of a card may, in order.
        vfs: Vec<Spanned<VfKeys>>,
        /// A pcap file whose frames come in; a relative path lies in the run directory.
        replay: FileName,
        /// Frames a second of `replay`.
        rate: FrameRate,
        /// Whether `replay` begins anew at its end.
        repeat: bool,
        /// A pcap file that is written of what goes out; a relative path lies in the run directory.
        record: FileName,
        /// The UNIX socket; a relative path lies in the run directory.
        socket: SocketName,
        /// Whether we listen on the socket or connect to it.
        mode: SocketSide,
        /// Permissions of a socket that we listen on, octal.
        socket_mode: SocketMode,
        /// Group of a socket that we listen on, by name or number.
        socket_group: GroupName,
        /// Milliseconds between attempts to connect.
        reconnect_ms: Bounded<10, 3_600_000>,
        /// Most queue pairs that the guest may use.
        queue_pairs: Bounded<1, 128>,
        /// The worker (by its core) that polls all queues of this port.
        worker: CoreNumber,
        /// The worker (by its core) of each queue pair.
        queue_workers: Vec<Spanned<CoreNumber>>,
        /// VLANs of this port.
        vlan: VlanKeys,
        /// Ports of one isolation group do not talk to each other.
        isolation: Name,
        /// Largest layer-3 packet that is sent to this port.
        mtu: Bounded<68, 9_202>,
        /// Limits, in frames a second, on what comes in here and has to be flooded.
        storm: StormKeys,
        /// Addresses that always are at this port.
        addresses: Vec<Spanned<StaticKeys>>,
        /// Whether source addresses are learnt.
        learn: bool,
        /// Most addresses that this port may occupy in the learning table.
        learn_limit: Bounded<1, 16_777_216>,
        /// Whether only `addresses` may be used as source.
        source_check: bool,
        /// Features that are not offered.
        disable: Vec<Spanned<FeatureName>>,
        /// Most memory that a guest may share with us.
        max_memory: Memory,
        /// Faults on purpose.
        inject: InjectKeys,
        /// A pcapng file that is written of all its frames; a relative path lies in the run directory.
        trace: FileName,
    }
}

keys! {
    /// `vlan = { … }`.
    VlanKeys in "`vlan`" {
        /// Untagged frames belong to this VLAN, and no tagged ones come in.
        access: VlanId,
        /// VLANs that come and go with their tag.
        trunk: Vec<Spanned<VlanRange>>,
        /// The VLAN of a trunk's untagged frames.
        native: VlanId,
    }
}

keys! {
    /// `storm = { … }`.
    StormKeys in "`storm`" {
        /// Frames to ff:ff:ff:ff:ff:ff.
        broadcast: FrameRate,
        /// Frames to unicast addresses that were not learnt.
        unknown: FrameRate,
        /// Frames to group addresses.
        multicast: FrameRate,
    }
}

keys! {
    /// One of `addresses`, when its VLAN is given.
    StaticTable in "an address" {
        /// The address.
        address: HardwareAddress,
        /// Its VLAN.
        vlan: VlanId,
    }
}

keys! {
    /// One of `vfs`.
    VfKeys in "one of `vfs`" {
        /// Its address.
        mac: HardwareAddress,
        /// Its VLAN.
        vlan: VlanId,
        /// The priority of what it sends, in that VLAN.
        qos: Bounded<0, 7>,
        /// Whether it may change its address and receive all groups.
        trust: bool,
        /// Whether what it sends must come from its own address.
        spoof_check: bool,
    }
}

keys! {
    /// `inject = { … }`.
    InjectKeys in "`inject`" {
        /// What the faults are drawn from.
        seed: Bounded<0, { i64::MAX }>,
        /// Percent of frames that are lost.
        drop: Share,
        /// Percent of frames of which one bit is turned round.
        corrupt: Share,
        /// Percent of frames that come twice.
        duplicate: Share,
        /// Percent of frames that come later than some that were sent after them.
        reorder: Share,
        /// Microseconds that each frame takes.
        delay_us: Bounded<1, 1_000_000>,
        /// Which frames suffer.
        direction: Direction,
    }
}

nested!(VlanKeys, StormKeys, StaticTable, VfKeys, InjectKeys);

/// One of `addresses`: `"02:00:00:00:00:01"` or `{ address = "02:00:00:00:00:01", vlan = 20 }`.
#[derive(Debug)]
pub(super) struct StaticKeys {
    /// The address.
    pub(super) address: HardwareAddress,
    /// Its VLAN, if the user gave one.
    pub(super) vlan: Option<Spanned<VlanId>>,
}

impl Read for StaticKeys {
    fn read(place: &str, value: &Spanned<DeValue<'_>>, problems: &mut Problems<'_>) -> Option<Self> {
        if !value.get_ref().is_table() {
            return Some(Self { address: HardwareAddress::read(place, value, problems)?, vlan: None });
        }
        let table = StaticTable::read(place, value, problems)?;
        let Some(address) = table.address else {
            problems.add(
                value.span(),
                format!("{place}: `address` is missing: {{ address = \"02:…\", vlan = 20 }}"),
            );
            return None;
        };
        Some(Self { address: address.into_inner(), vlan: table.vlan })
    }
}

/// All keys of the vocabulary: (table, key). Documentation and the example are checked against it.
pub fn vocabulary() -> Vec<(&'static str, &'static str)> {
    let of = |table: &'static str, keys: &'static [&'static str]| keys.iter().map(move |key| (table, *key));
    of("switch", SwitchKeys::KEYS)
        .chain(of("port", PortKeys::KEYS))
        .chain(of("vlan", VlanKeys::KEYS))
        .chain(of("storm", StormKeys::KEYS))
        .chain(of("addresses", StaticTable::KEYS))
        .chain(of("vfs", VfKeys::KEYS))
        .chain(of("inject", InjectKeys::KEYS))
        .collect()
}
