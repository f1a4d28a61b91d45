//! What a machine tells about itself: the types behind every answer of its control socket.
//!
//! Owns names and units. Counters count from the guest's last boot and never go back.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::vcpu::VcpuPlace;
use crate::vcpu::exits::ExitReason;

/// What a machine does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MachineState {
    /// It is put together, or waits for a back end.
    Starting,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs and devices rest.
    Paused,
    /// The power button was pressed.
    ShuttingDown,
    /// Its guest reboots.
    Restarting,
    /// It ended, and its process is about to.
    Ended,
}

impl MachineState {
    /// As it is printed.
    pub fn word(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::ShuttingDown => "shutting down",
            Self::Restarting => "restarting",
            Self::Ended => "ended",
        }
    }
}

/// `GET /v1/vm`: the machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MachineInfo {
    /// What it is called.
    pub name: String,
    /// Version of the program.
    pub version: String,
    /// Process.
    pub pid: u32,
    /// What it does.
    pub state: MachineState,
    /// Seconds since the process started.
    pub uptime_s: f64,
    /// How often the guest was started.
    pub boots: u64,
    /// Its kernel.
    pub kernel: String,
    /// Bytes of its memory.
    pub memory_bytes: u64,
    /// Its vCPUs; none between two boots.
    pub vcpus: Vec<VcpuReport>,
    /// Its devices on the PCI bus; none between two boots.
    pub devices: Vec<DeviceReport>,
    /// Number of the last event.
    pub last_event: u64,
}

/// A vCPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VcpuReport {
    /// Its number.
    pub number: u32,
    /// Its thread.
    pub thread: i32,
    /// The host's core that it is pinned to.
    pub core: Option<u32>,
    /// Its SCHED_FIFO priority.
    pub priority: Option<u8>,
    /// Nanoseconds that its thread ran, in the guest or for it.
    pub ran_ns: u64,
    /// Nanoseconds that its thread could have run and waited for a core: what a guest calls steal.
    pub steal_ns: u64,
    /// How often it left the guest, in all.
    pub exits_total: u64,
    /// How often it left the guest, by reason; those that happened.
    pub exits: BTreeMap<String, u64>,
}

impl VcpuReport {
    pub(crate) fn of(vcpu: &VcpuPlace) -> Self {
        let counts = ExitReason::ALL.iter().map(|reason| (reason.name().to_owned(), vcpu.exits.get(*reason)));
        let exits: BTreeMap<_, _> = counts.filter(|(_, count)| *count > 0).collect();
        // Of a kernel without CONFIG_SCHED_INFO there is none.
        let times = std::fs::read_to_string(format!("/proc/self/task/{}/schedstat", vcpu.thread));
        let times: Vec<u64> =
            times.unwrap_or_default().split_ascii_whitespace().filter_map(|t| t.parse().ok()).collect();
        Self {
            number: vcpu.number,
            thread: vcpu.thread,
            core: vcpu.scheduling.core,
            priority: vcpu.scheduling.priority,
            ran_ns: times.first().copied().unwrap_or(0),
            steal_ns: times.get(1).copied().unwrap_or(0),
            exits_total: exits.values().sum(),
            exits,
        }
    }
}

/// A device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DeviceReport {
    /// What it is called.
    pub name: String,
    /// `net`, `disk`, `console`, `rng`.
    pub kind: String,
    /// Whether its back end is connected, if it has one.
    pub back_end: Option<bool>,
    /// Notifications of its queues that took an exit; the others go straight to whoever works on the queue.
    pub kicks: u64,
    /// Queues that this process works on; those of a vhost-user card are its back end's.
    pub queues: Vec<QueueReport>,
}

/// A queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct QueueReport {
    /// Its index.
    pub index: u16,
    /// Requests that were served.
    pub requests: u64,
    /// Bytes of them that were read and written.
    pub bytes: u64,
    /// How often the ring made no sense.
    pub errors: u64,
    /// How often the driver was interrupted.
    pub interrupts: u64,
}

/// What can happen to a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// The guest was started.
    Started,
    /// The machine was paused.
    Paused,
    /// It goes on.
    Resumed,
    /// The power button was pressed.
    PowerButton,
    /// The guest turned itself off.
    PowerOff,
    /// The guest, or a user, reset it.
    Reset,
    /// The guest's kernel panicked.
    Panicked,
    /// A vCPU met a triple fault.
    TripleFault,
    /// KVM could not go on.
    Failed,
    /// A user, or the time-out of a shutdown, ended it.
    Killed,
    /// A card's back end is connected.
    BackEndConnected,
    /// A card's back end is gone.
    BackEndGone,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct EventReport {
    /// Its number; the first is 1.
    pub sequence: u64,
    /// When: seconds since 1970 (UTC).
    pub time_s: f64,
    /// What.
    pub kind: EventKind,
    /// To which device, if to one.
    pub device: Option<String>,
}

/// `GET /v1/events`: what happened since the event that was asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct EventsReport {
    /// In order.
    pub events: Vec<EventReport>,
    /// How many happened since, and are forgotten.
    pub missed: u64,
    /// The number of the last one: ask for those after it.
    pub last: u64,
}

/// What was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ActionReport {
    /// The machine's state since then.
    pub state: MachineState,
}

/// `POST /v1/console`: what was typed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TypedReport {
    /// How many of the bytes the guest's console had room for; type the others again.
    pub taken: usize,
}

/// One of the consoles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Port {
    /// The serial port.
    Serial,
    /// The virtio console.
    Virtio,
}
