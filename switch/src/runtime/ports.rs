//! From a port's configuration to what runs: its session or device, its place in the bridge, its part of a plan.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use vhost_user::backend::{Endpoint, Options, SUPPORTED, SessionHandle, serve};
use vhost_user::{Mode, ProtocolFeatures, SocketError};
use virtio::features;

use crate::bridge::fdb::Key;
use crate::bridge::{
    BridgePlan, Fdb, Mac, PlanError, PortPlan, StaticEntry, StormGuard, StormRate, VlanMode,
};
use crate::capture::{Before, Trace};
use crate::config::{Behind, Config, Feature, Inject, PortConfig, Side, Storm, Vlan};
use crate::device_port::{Cards, DevicePort};
use crate::events::Events;
use crate::inject::Lanes;
use crate::plan::{Devices, Plan};
use crate::vhost_port::{VhostDevice, VhostPort};

use super::{Attached, StartError};

/// A port and what serves it.
pub(super) struct RunningPort {
    pub(super) config: PortConfig,
    pub(super) port: Attached,
    /// Shared by all plans, so that a change elsewhere does not refill the buckets.
    storm: Arc<StormGuard>,
    /// While its frames suffer on purpose.
    pub(super) lanes: Option<Arc<Lanes>>,
    /// Those of a port whose frames do not suffer any more, while workers may still follow the old plan.
    ended: Option<Arc<Lanes>>,
    /// While its frames are written to a file.
    pub(super) trace: Option<Trace>,
    /// A guest's: dropping it closes the socket and the connection.
    _session: Option<SessionHandle>,
    /// When opening a device was last tried.
    pub(super) tried: Instant,
    /// When the log was last told that it stopped.
    pub(super) told: Option<Instant>,
}

impl RunningPort {
    /// Takes a configuration that needs no new session.
    pub(super) fn configure(&mut self, config: PortConfig) {
        if config.storm != self.config.storm {
            self.storm = storm_guard(&config.storm);
        }
        match (&self.lanes, &config.inject) {
            (None, Some(inject)) => {
                self.lanes = Some(lanes(&config.name, inject, config.queue_pairs));
            }
            (Some(lanes), Some(inject)) if self.config.inject.as_ref() != Some(inject) => {
                warn(&config.name, inject);
                lanes.change(inject);
            }
            (Some(_), None) => self.ended = self.lanes.take(),
            _ => {}
        }
        self.config = config;
    }

    /// Counts what waited on lanes that are not needed any more, as lost. Once workers have a plan without them, but for those that
    /// do not know it yet.
    pub(super) fn settle(&mut self) {
        if let Some(ended) = self.ended.take() {
            let (inward, outward) = ended.end();
            for (queue, frames) in inward.into_iter().enumerate() {
                self.port.count_lost(queue, frames);
            }
            self.port.count_lost_outward(outward);
        }
        let Some(lanes) = &self.lanes else { return };
        let running: Vec<usize> = self.port.polled().into_iter().map(|(queue, _)| queue).collect();
        for queue in (0..usize::from(self.config.queue_pairs)).filter(|queue| !running.contains(queue)) {
            self.port.count_lost(queue, lanes.clear_inward(queue));
        }
    }

    /// Begins to write the file that `wanted` says, unless that is done.
    pub(super) fn trace(&mut self, wanted: &PortConfig, before: Before) -> Result<(), StartError> {
        if self.trace.as_ref().map(|trace| &trace.shared.file) != wanted.trace.as_ref() {
            self.trace = None;
            self.trace = trace(wanted, self.port.number(), before)?;
        }
        Ok(())
    }
}

impl Drop for RunningPort {
    /// A device is free when its port is gone, not when the last worker has forgotten the plan that it was in.
    fn drop(&mut self) {
        if let Attached::Device(port) = &self.port {
            port.halt();
        }
    }
}

/// The lanes of a port whose frames are to suffer.
fn lanes(name: &str, inject: &Inject, queues: u16) -> Arc<Lanes> {
    warn(name, inject);
    Lanes::new(inject, queues)
}

fn warn(name: &str, inject: &Inject) {
    tracing::warn!("port {name}: frames suffer on purpose: inject = {{ {inject} }}");
}

/// The trace of a port that wants one.
fn trace(config: &PortConfig, number: u16, before: Before) -> Result<Option<Trace>, StartError> {
    let begin = |file: &PathBuf| {
        Trace::begin(number, &config.name, file, before).map_err(|source| StartError::Trace {
            port: config.name.clone(),
            file: file.clone(),
            source,
        })
    };
    config.trace.as_ref().map(begin).transpose()
}

/// Limits, and twice a hundredth of a second's worth at once.
fn storm_guard(storm: &Storm) -> Arc<StormGuard> {
    let rate = |frames: Option<u32>| frames.map(|frames| StormRate { frames, burst: (frames / 50).max(1) });
    let (broadcast, multicast, unknown) = (rate(storm.broadcast), rate(storm.multicast), rate(storm.unknown));
    Arc::new(StormGuard::new(broadcast, multicast, unknown, host::cpu::tsc_hz()))
}

/// Virtio features on offer, before a port's `disable`.
pub(crate) const OFFERED: u64 = features::VERSION_1
    | features::NET_MRG_RXBUF
    | features::RING_INDIRECT_DESC
    | features::RING_EVENT_IDX
    | features::RING_PACKED
    | features::IN_ORDER
    | features::NET_CSUM
    | features::NET_GUEST_CSUM
    | features::NET_GUEST_TSO4
    | features::NET_GUEST_TSO6
    | features::NET_GUEST_ECN
    | features::NET_GUEST_UFO
    | features::NET_GUEST_USO4
    | features::NET_GUEST_USO6
    | features::NET_HOST_TSO4
    | features::NET_HOST_TSO6
    | features::NET_HOST_ECN
    | features::NET_HOST_UFO
    | features::NET_HOST_USO
    | features::NET_MTU
    | features::NET_STATUS
    | features::NET_MQ
    | features::NET_CTRL_VQ
    | features::NET_GUEST_ANNOUNCE;

/// Opens a port: when it returns, its socket can be connected to (or is being connected), or its device is in use (or is being
/// waited for).
pub(super) fn open(
    config: &PortConfig,
    number: u16,
    events: &Events,
    cards: &mut Cards,
) -> Result<RunningPort, StartError> {
    let name = config.name.clone();
    let (port, session) = match &config.behind {
        Behind::VhostUser { socket, side } => {
            let port = VhostPort::new(number, &config.name, config.queue_pairs, events.clone());
            let session = open_session(config, socket, side, &port);
            let session = session.map_err(|source| StartError::Port { port: name, source })?;
            (Attached::Guest(port), Some(session))
        }
        _ => {
            let port = DevicePort::new(number, &config.name, config.queue_pairs, events.clone());
            match port.open(config, true, cards) {
                Ok(()) => {}
                Err(absent) if absent.may_pass() => port.wait(&absent),
                Err(source) => return Err(StartError::Device { port: name, source }),
            }
            (Attached::Device(port), None)
        }
    };
    let (storm, tried) = (storm_guard(&config.storm), Instant::now());
    let trace = trace(config, number, Before::Emptied)?;
    let lanes = config.inject.as_ref().map(|inject| lanes(&config.name, inject, config.queue_pairs));
    let config = config.clone();
    Ok(RunningPort { storm, config, port, lanes, ended: None, trace, _session: session, tried, told: None })
}

fn open_session(
    config: &PortConfig,
    socket: &Path,
    side: &Side,
    port: &Arc<VhostPort>,
) -> Result<SessionHandle, SocketError> {
    let offered = OFFERED & !config.disable.virtio_bits();
    let device = VhostDevice::new(port.clone(), offered, config.mtu);
    let mode = match *side {
        Side::Server { mode, group } => Mode::Server { mode, group },
        Side::Client { reconnect } => Mode::Client { retry: reconnect },
    };
    let endpoint = Endpoint { path: socket.to_owned(), mode };
    let options = Options {
        protocol_features: protocol_features(config),
        memory_limit: config.max_memory,
        ..Options::new(&config.name)
    };
    serve(endpoint, options, Box::new(device))
}

fn protocol_features(config: &PortConfig) -> ProtocolFeatures {
    let named = [
        (Feature::Mq, ProtocolFeatures::MQ),
        (Feature::ReplyAck, ProtocolFeatures::REPLY_ACK),
        (Feature::MemSlots, ProtocolFeatures::CONFIGURE_MEM_SLOTS),
        (Feature::Inflight, ProtocolFeatures::INFLIGHT_SHMFD),
        (Feature::Log, ProtocolFeatures::LOG_SHMFD),
        (Feature::Mtu, ProtocolFeatures::MTU),
        (Feature::Rarp, ProtocolFeatures::RARP),
        (Feature::Status, ProtocolFeatures::STATUS),
    ];
    let withheld = named.iter().filter(|(f, _)| config.disable.contains(*f));
    withheld.fold(SUPPORTED, |offered, (_, bit)| offered - *bit)
}

/// Whether two configurations can have the same session or device; what they differ in otherwise is the bridge's.
pub(super) fn same_session(a: &PortConfig, b: &PortConfig) -> bool {
    a.behind.is_same_device(&b.behind)
        && a.queue_pairs == b.queue_pairs
        && a.disable == b.disable
        && a.max_memory == b.max_memory
        && a.mtu == b.mtu
}

/// The bridge of these ports.
pub(super) fn bridge(config: &Config, ports: &[RunningPort], fdb: Arc<Fdb>) -> Result<BridgePlan, PlanError> {
    let mut groups: Vec<&str> = ports.iter().filter_map(|p| p.config.isolation.as_deref()).collect();
    groups.sort_unstable();
    groups.dedup();
    let highest = ports.iter().map(|p| usize::from(p.port.number()) + 1).max().unwrap_or(0);
    let mut plans: Vec<Option<PortPlan>> = (0..highest).map(|_| None).collect();
    for running in ports {
        let c = &running.config;
        let group = c.isolation.as_deref().and_then(|g| groups.binary_search(&g).ok());
        let plan = PortPlan {
            vlan: vlan_mode(&c.vlan),
            isolation: group.map(|g| g as u16),
            mtu: c.mtu.map(u32::from),
            learn: c.learn,
            learn_limit: c.learn_limit,
            sources: c
                .source_check
                .then(|| c.addresses.iter().map(|a| Key::new(Mac(a.address), a.vlan.unwrap_or(0))).collect()),
            storm: running.storm.clone(),
        };
        if let Some(slot) = plans.get_mut(usize::from(running.port.number())) {
            *slot = Some(plan);
        }
    }
    BridgePlan::new(plans, fdb, config.switch.forward_reserved)
}

fn vlan_mode(vlan: &Vlan) -> VlanMode {
    match vlan {
        Vlan::Unaware => VlanMode::Unaware,
        Vlan::Access(vid) => VlanMode::Access(*vid),
        Vlan::Trunk { allowed, native } => {
            VlanMode::Trunk { vlans: allowed.iter().cloned().flatten().collect(), native: *native }
        }
    }
}

/// The addresses that always are at one port.
pub(super) fn static_entries(ports: &[(u16, PortConfig)]) -> Vec<StaticEntry> {
    let of_port = |(number, c): &(u16, PortConfig)| {
        let number = *number;
        c.addresses.clone().into_iter().map(move |a| StaticEntry {
            mac: Mac(a.address),
            vid: a.vlan.unwrap_or(0),
            port: number,
        })
    };
    ports.iter().flat_map(of_port).collect()
}

/// A plan without ports.
pub(super) fn empty_plan(config: &Config, fdb: Arc<Fdb>) -> Result<Plan, PlanError> {
    Ok(Plan {
        bridge: bridge(config, &[], fdb)?,
        ports: Vec::new(),
        queues: vec![Vec::new(); config.switch.workers.len()],
        devices: Devices::default(),
        extras: None,
        burst: config.switch.burst,
        idle: config.switch.idle,
    })
}
