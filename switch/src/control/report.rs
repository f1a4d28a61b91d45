//! What the switch tells about itself: the types behind every answer of the control socket.
//!
//! Owns names and units of the answers; the runtime fills them in. All counters count from the start of the switch (or of
//! the port, if it was added later) and never go back. Seen from the switch: `rx` is what a guest sent, `tx` what it gets.

use port::DropReason;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// `GET /v1/switch`: which switch this is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SwitchInfo {
    /// Version of the program.
    pub version: String,
    /// Process.
    pub pid: u32,
    /// Seconds since the start.
    pub uptime_s: f64,
    /// The configuration file, absolute.
    pub config: String,
    /// The run directory.
    pub run_dir: String,
    /// Cores of the workers.
    pub workers: Vec<u32>,
    /// Ports configured.
    pub ports: usize,
    /// Entries that the learning table has room for.
    pub fdb_size: usize,
}

/// `GET /v1/stats`: all counters.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct StatsReport {
    /// Seconds since the start.
    pub uptime_s: f64,
    /// Ticks of the time-stamp counter in a second, the unit of cycles.
    pub tsc_hz: u64,
    /// Every worker.
    pub workers: Vec<WorkerStats>,
    /// Every port, in the order of the configuration.
    pub ports: Vec<PortStats>,
    /// The sums over all ports. `received` + `replicas` = `sent` + `dropped`, but for frames in flight.
    pub totals: Totals,
}

/// One worker thread.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct WorkerStats {
    /// Core that it is pinned to.
    pub core: u32,
    /// Memory node of the core, where there are any.
    pub node: Option<u32>,
    /// What it does now.
    pub state: WorkerState,
    /// Frames taken from guests.
    pub frames: u64,
    /// Bytes of these, without FCS.
    pub bytes: u64,
    /// Of the frames, those that the bridge handed to nobody; the reasons are at their ports. What a receiver had no room for counts there.
    pub dropped: u64,
    /// Bursts with at least one frame.
    pub bursts: u64,
    /// Cycles of turns in which anything was done.
    pub busy_cycles: u64,
    /// Cycles of turns in which nothing came in.
    pub idle_cycles: u64,
    /// `busy_cycles` / `frames`; absent before the first frame.
    pub cycles_per_frame: Option<f64>,
}

/// What a worker does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum WorkerState {
    /// Polls.
    Polling,
    /// Waits for a kick (`idle = "sleep"`).
    Sleeping,
}

/// The counters of one port.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PortStats {
    /// The port.
    pub name: String,
    /// From the guest, per queue that ever ran.
    pub rx: Vec<RxStats>,
    /// To the guest, per queue that ever ran.
    pub tx: Vec<TxStats>,
    /// What the device behind it counts itself since it was opened, by its own names (`af_xdp` and `nic`).
    #[serde(default)]
    pub device: Vec<DeviceCount>,
    /// What its frames suffered on purpose (`inject`), while they do.
    #[serde(default)]
    pub inject: Option<InjectStats>,
    /// The file that its frames are written to (`trace`).
    #[serde(default)]
    pub trace: Option<TraceStats>,
}

/// What the frames of a port suffered on purpose. Those that were lost are among the queues' drops.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InjectStats {
    /// What happens to them, in the words of the configuration.
    pub faults: String,
    /// Those that came in.
    pub rx: Suffered,
    /// Those that went out.
    pub tx: Suffered,
}

/// Frames that suffered, since they began to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Suffered {
    /// One bit of each was turned round.
    pub corrupted: u64,
    /// They came twice; the second of each counts as received, or as a copy for flooding.
    pub duplicated: u64,
    /// They let others pass.
    pub reordered: u64,
    /// They were kept waiting.
    pub delayed: u64,
    /// They wait now.
    pub held: u64,
}

/// A file that a port's frames are written to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TraceStats {
    /// The file.
    pub file: String,
    /// Frames that are in it, or will be soon.
    pub captured: u64,
    /// Frames that are not: more than were written in time.
    pub missed: u64,
    /// Why nothing is written any more.
    pub error: Option<String>,
}

/// What a device counts itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DeviceCount {
    /// As the device calls it.
    pub name: String,
    /// How many.
    pub count: u64,
}

/// Frames from a guest's transmit queue. `received` = `switched` + `dropped`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RxStats {
    /// Queue pair.
    pub queue: u16,
    /// Core of the worker that polls it; absent while it is not running.
    pub worker: Option<u32>,
    /// Frames taken from the guest.
    pub received: u64,
    /// Bytes of these, without FCS.
    pub bytes: u64,
    /// Bursts with at least one frame.
    pub bursts: u64,
    /// Frames handed to at least one port.
    pub switched: u64,
    /// Copies handed to further ports, when a frame was flooded.
    pub replicas: u64,
    /// Frames not handed to anyone.
    pub dropped: u64,
    /// Of these, by reason.
    pub drops: Vec<DropCount>,
    /// Cycles that its worker spent on bursts with at least one frame, until these were handed to the other ports.
    pub busy_cycles: u64,
    /// `busy_cycles` / `received`; absent before the first frame.
    pub cycles_per_frame: Option<f64>,
    /// What became of the addresses that they came from.
    pub addresses: AddressStats,
}

/// Source addresses that came in on a queue. Frames whose address is not learnt are forwarded all the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AddressStats {
    /// Addresses learnt.
    pub learnt: u64,
    /// Addresses that were at another port before.
    pub moved: u64,
    /// Frames whose address was not learnt because the port has `learn_limit` addresses.
    pub limit_reached: u64,
    /// Frames whose address was not learnt because its part of the table is full.
    pub table_full: u64,
}

/// Frames to a guest's receive queue. `offered` = `sent` + `dropped`.
///
/// It belongs to no worker: each sends what it took in.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TxStats {
    /// Queue pair.
    pub queue: u16,
    /// Frames for the guest.
    pub offered: u64,
    /// Frames that it got.
    pub sent: u64,
    /// Bytes of these, without FCS.
    pub bytes: u64,
    /// Bursts with at least one frame sent.
    pub bursts: u64,
    /// Frames made by cutting unsegmented ones; a frame that was cut counts once in `sent`, and with all its pieces here.
    pub segments: u64,
    /// Frames that it did not get.
    pub dropped: u64,
    /// Of these, by reason.
    pub drops: Vec<DropCount>,
}

/// Frames dropped for one reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DropCount {
    /// Its key, as the documentation lists it.
    pub reason: String,
    /// What it means.
    pub sentence: String,
    /// How many frames.
    pub frames: u64,
}

impl DropCount {
    /// Counters in the order of [`DropReason::ALL`], without those that are zero.
    pub fn nonzero(counters: impl IntoIterator<Item = u64>) -> Vec<Self> {
        let counted = DropReason::ALL.iter().zip(counters).filter(|(_, frames)| *frames > 0);
        counted
            .map(|(reason, frames)| DropCount {
                reason: reason.key().to_owned(),
                sentence: reason.sentence().to_owned(),
                frames,
            })
            .collect()
    }
}

/// Sums over all ports.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Totals {
    /// Frames taken from guests.
    pub received: u64,
    /// Bytes of these.
    pub received_bytes: u64,
    /// Copies made by flooding.
    pub replicas: u64,
    /// Frames that guests got.
    pub sent: u64,
    /// Bytes of these.
    pub sent_bytes: u64,
    /// Frames dropped, on the way in or out.
    pub dropped: u64,
    /// Of these, by reason.
    pub drops: Vec<DropCount>,
}

impl Totals {
    /// Adds up the counters of ports.
    pub fn of(ports: &[PortStats]) -> Self {
        let rx = || ports.iter().flat_map(|port| &port.rx);
        let tx = || ports.iter().flat_map(|port| &port.tx);
        let drops = || rx().flat_map(|queue| &queue.drops).chain(tx().flat_map(|queue| &queue.drops));
        let of_reason = |reason: &DropReason| {
            drops().filter(|count| count.reason == reason.key()).map(|count| count.frames).sum()
        };
        Totals {
            received: rx().map(|queue| queue.received).sum(),
            received_bytes: rx().map(|queue| queue.bytes).sum(),
            replicas: rx().map(|queue| queue.replicas).sum(),
            sent: tx().map(|queue| queue.sent).sum(),
            sent_bytes: tx().map(|queue| queue.bytes).sum(),
            dropped: rx().map(|queue| queue.dropped).chain(tx().map(|queue| queue.dropped)).sum(),
            drops: DropCount::nonzero(DropReason::ALL.iter().map(of_reason)),
        }
    }
}

/// `GET /v1/ports/{name}`, and an element of `GET /v1/ports`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PortReport {
    /// The port.
    pub name: String,
    /// What is behind it, as in the configuration.
    pub kind: String,
    /// Path of its socket (`vhost-user` only).
    pub socket: Option<String>,
    /// `server` or `client` (`vhost-user` only).
    pub mode: Option<String>,
    /// The network interface (`tap`, `af_packet` and `af_xdp`) or the card's address (`nic`).
    pub device: Option<String>,
    /// How far it has come.
    pub state: PortState,
    /// Why it stopped, what it refused last since it came up, or why the last connection ended; absent if none of these
    /// happened.
    pub reason: Option<String>,
    /// Virtio features that the guest acknowledged, by name (of a tap: the offloads in use, as a guest would call them); empty
    /// before.
    pub features: Vec<String>,
    /// Layout of the guest's rings: `split` or `packed`; absent before they run.
    pub layout: Option<String>,
    /// The guest's rings that run.
    pub rings: Vec<RingReport>,
    /// Bytes of guest memory that are mapped.
    pub memory_bytes: u64,
    /// Largest layer-3 packet that is sent to it, if limited.
    pub mtu: Option<u16>,
    /// VLANs, in the words of the configuration; absent: unaware of VLANs.
    pub vlan: Option<String>,
    /// Isolation group.
    pub isolation: Option<String>,
    /// Virtual functions of its card, in order (`nic` only).
    #[serde(default)]
    pub vfs: Vec<VfReport>,
}

/// A virtual function of a port's card, and the answer of `POST /v1/ports/{name}/vfs/{number}`. Names are those of ip-link(8).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VfReport {
    /// Its number.
    pub number: u16,
    /// Its address.
    pub mac: String,
    /// Its VLAN; absent: it may ask for VLANs itself.
    pub vlan: Option<u16>,
    /// The priority of what it sends in that VLAN.
    pub qos: u8,
    /// Whether it may change its address and receive all groups.
    pub trust: bool,
    /// Whether what it sends must come from its own address.
    pub spoof_check: bool,
    /// Whether a driver has it.
    pub active: bool,
    /// What that asked for and got.
    pub granted: u64,
    /// What it asked for and did not get, and what made no sense.
    pub refused: u64,
}

/// `GET /v1/ports/{name}/registers`: what a port's card counts, and what its registers read (`nic` only).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CardReport {
    /// The hardware's counters since it was opened.
    pub counters: Vec<DeviceCount>,
    /// Registers that its driver uses and that reading does not change.
    pub registers: Vec<RegisterReport>,
}

/// A register of a card, by the datasheet's name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RegisterReport {
    /// As the datasheet calls it.
    pub name: String,
    /// Which of an array.
    pub index: Option<u32>,
    /// Where it is, in bytes.
    pub offset: u32,
    /// What it read.
    pub value: u32,
    /// The fields that the driver uses.
    pub fields: Vec<FieldReport>,
}

/// A field of a register.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FieldReport {
    /// As the datasheet calls it.
    pub name: String,
    /// What it read.
    pub value: u32,
}

impl From<pmd::access::Reading> for RegisterReport {
    fn from(reading: pmd::access::Reading) -> Self {
        let field = |(name, value): (&str, u32)| FieldReport { name: name.to_owned(), value };
        Self {
            name: reading.name.to_owned(),
            index: reading.index,
            offset: reading.offset,
            value: reading.value,
            fields: reading.fields.into_iter().map(field).collect(),
        }
    }
}

/// How far a port has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum PortState {
    /// Waits for a VMM (server mode).
    Listening,
    /// Tries to reach a VMM (client mode).
    Connecting,
    /// A VMM is connected; its guest's driver has not started the rings.
    Connected,
    /// Frames can pass.
    Up,
    /// Broken by its guest or VMM, until they reconnect, or without its network device, until that is there again; `reason` says
    /// how.
    Stopped,
}

impl PortState {
    /// As it is in JSON.
    pub fn word(self) -> &'static str {
        match self {
            PortState::Listening => "listening",
            PortState::Connecting => "connecting",
            PortState::Connected => "connected",
            PortState::Up => "up",
            PortState::Stopped => "stopped",
        }
    }
}

/// A ring that runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RingReport {
    /// Virtqueue index: 2n is the guest's receive ring n, 2n+1 its transmit ring n.
    pub index: u16,
    /// Descriptors.
    pub size: u16,
    /// Whether the driver enabled it.
    pub enabled: bool,
}

/// `GET /v1/ports`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PortsReport {
    /// Every port, in the order of the configuration.
    pub ports: Vec<PortReport>,
}

/// `GET /v1/fdb`: the learning table.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FdbReport {
    /// Entries that it has room for.
    pub size: usize,
    /// Entries that are in it, learnt and static.
    pub used: usize,
    /// The entries (those that were asked for), by VLAN and address.
    pub entries: Vec<FdbEntry>,
}

/// Where an address is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FdbEntry {
    /// The address, as `02:00:00:00:00:01`.
    pub address: String,
    /// Its VLAN; absent: learnt on ports without VLANs.
    pub vlan: Option<u16>,
    /// Its port.
    pub port: String,
    /// Seconds since it was last heard from (learnt entries only).
    pub age_s: Option<u64>,
    /// Whether it is from the configuration.
    #[serde(rename = "static")]
    pub is_static: bool,
}

/// `POST /v1/captures` and `DELETE /v1/captures/{id}`: a capture of one port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CaptureReport {
    /// Its number.
    pub id: u64,
    /// Its port.
    pub port: String,
    /// Frames copied so far.
    pub captured: u64,
    /// Frames that were wanted and not copied: beyond what the client fetched in time, or while it fetched.
    pub missed: u64,
}

/// `POST /v1/reload`: what a reload changed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ReloadReport {
    /// Ports that were added.
    pub added: Vec<String>,
    /// Ports that were removed.
    pub removed: Vec<String>,
    /// Ports that stayed, with other settings.
    pub changed: Vec<String>,
    /// Of these, the ones whose guests were disconnected, because the change was one that they must renegotiate.
    pub reconnected: Vec<String>,
    /// Ports that were not touched.
    pub unchanged: usize,
    /// Whether anything in `[switch]` changed.
    pub switch_changed: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drops(reason: DropReason, frames: u64) -> Vec<DropCount> {
        DropCount::nonzero(DropReason::ALL.iter().map(|r| if *r == reason { frames } else { 0 }))
    }

    #[test]
    fn totals_conserve_frames_when_every_queue_does() {
        let rx = RxStats {
            received: 10,
            switched: 7,
            replicas: 14,
            dropped: 3,
            drops: drops(DropReason::Runt, 3),
            ..RxStats::default()
        };
        let tx = TxStats {
            offered: 21,
            sent: 17,
            dropped: 4,
            drops: drops(DropReason::ReceiverFull, 4),
            ..TxStats::default()
        };
        let ports = [PortStats { name: "a".into(), rx: vec![rx], tx: vec![tx], ..PortStats::default() }];
        let totals = Totals::of(&ports);
        assert_eq!(totals.received + totals.replicas, totals.sent + totals.dropped);
        let by_reason: Vec<_> =
            totals.drops.iter().map(|count| (count.reason.as_str(), count.frames)).collect();
        assert_eq!(by_reason, [("runt", 3), ("receiver_full", 4)]);
    }
}
