//! What a running switch tells of itself: counters and states as they are at this moment, in the control socket's terms.
//!
//! Reads atomics and small locks that no worker takes; changes nothing.

use std::sync::atomic::Ordering;

use port::DropReason;

use super::housekeeper::Command;
use super::{PortView, Switch};
use crate::bridge::Mac;
use crate::capture::{Capture, Filter, Traced};
use crate::config::{Behind, Config, Side, Vlan};
use crate::control::report::{
    AddressStats, CaptureReport, CardReport, DropCount, FdbEntry, FdbReport, InjectStats, PortReport,
    PortState, PortStats, PortsReport, ReloadReport, RingReport, RxStats, StatsReport, Suffered, SwitchInfo,
    Totals, TraceStats, TxStats, VfReport, WorkerState, WorkerStats,
};
use crate::control::{SwitchState, VfChange, feature_names};
use crate::counters::{RxCounters, TxCounters};
use crate::inject::Done;
use crate::slot::PortState as State;
use crate::vhost_port::RingView;
use crate::worker::clock_since;

/// Captures at a time.
const CAPTURES: usize = 8;

impl SwitchState for Switch {
    fn info(&self) -> SwitchInfo {
        let view = self.shared.view.load();
        let file = std::path::absolute(&view.config.file).unwrap_or_else(|_| view.config.file.clone());
        SwitchInfo {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_s: self.shared.started.elapsed().as_secs_f64(),
            config: file.display().to_string(),
            run_dir: self.run_dir.display().to_string(),
            workers: view.config.switch.workers.clone(),
            ports: view.ports.len(),
            fdb_size: self.shared.fdb.capacity(),
        }
    }

    fn stats(&self) -> StatsReport {
        let view = self.shared.view.load();
        let ports: Vec<PortStats> = view.ports.iter().map(|p| self.port_stats(p)).collect();
        StatsReport {
            uptime_s: self.shared.started.elapsed().as_secs_f64(),
            tsc_hz: host::cpu::tsc_hz(),
            workers: self.worker_stats(),
            totals: Totals::of(&ports),
            ports,
        }
    }

    fn ports(&self) -> PortsReport {
        PortsReport { ports: self.shared.view.load().ports.iter().map(port_report).collect() }
    }

    fn fdb(&self) -> FdbReport {
        let view = self.shared.view.load();
        let now = clock_since(self.shared.epoch).seconds;
        let name = |number: u16| {
            let port = view.ports.iter().find(|p| p.port.number() == number);
            port.map_or_else(|| number.to_string(), |p| p.config.name.clone())
        };
        let mut found: Vec<_> = self.shared.fdb.entries().collect();
        found.sort_unstable_by_key(|e| (e.vid, e.mac.0));
        let entries: Vec<FdbEntry> = (found.iter())
            .map(|e| FdbEntry {
                address: e.mac.to_string(),
                vlan: (e.vid != 0).then_some(e.vid),
                port: name(e.port),
                age_s: (!e.fixed).then(|| u64::from(now.saturating_sub(e.seen))),
                is_static: e.fixed,
            })
            .collect();
        FdbReport { size: self.shared.fdb.capacity(), used: entries.len(), entries }
    }

    fn capture(&self, port: &str, longest: u32, filter: Filter) -> Result<CaptureReport, String> {
        let view = self.shared.view.load();
        let found = view.port(port)?;
        let capture = Capture::new(found.port.number(), port, longest, filter)?;
        self.shared.change_captures(|captures| {
            if captures.len() >= CAPTURES {
                return Err(format!("{CAPTURES} captures run already: end one first"));
            }
            captures.push(capture.clone());
            Ok(())
        })?;
        self.republish();
        Ok(capture.report())
    }

    fn captured(&self, id: u64) -> Option<Vec<u8>> {
        let found = self.shared.captures().into_iter().find(|c| c.id == id)?;
        found.drain().ok()
    }

    fn end_capture(&self, id: u64) -> Option<CaptureReport> {
        let ended = self.shared.change_captures(|captures| {
            let at = captures.iter().position(|c| c.id == id)?;
            Some(captures.remove(at))
        })?;
        self.republish();
        Some(ended.report())
    }

    fn card(&self, port: &str) -> Result<CardReport, String> {
        let view = self.shared.view.load();
        view.port(port)?.port.card().unwrap_or_else(|| Err(format!("port {port} has no card open")))
    }

    fn set_vf(&self, port: &str, number: u16, change: VfChange) -> Result<VfReport, String> {
        let (reply, answer) = crossbeam::channel::bounded(1);
        let ending = "the switch is ending";
        let order = Command::Function { port: port.to_owned(), number, change, reply };
        self.commands.send(order).map_err(|_| ending)?;
        answer.recv().map_err(|_| ending)??;
        let ports = self.ports().ports;
        let found = ports.into_iter().find(|p| p.name == port).map(|p| p.vfs).unwrap_or_default();
        found.into_iter().find(|vf| vf.number == number).ok_or_else(|| format!("port {port} was closed"))
    }

    fn reload(&self) -> Result<ReloadReport, String> {
        let view = self.shared.view.load_full();
        let ours = view.config.ports.iter().filter_map(|p| Some(p.behind.socket()?.to_owned())).collect();
        let machine = self.machine.listening_on(ours);
        let config = Config::load(&view.config.file, &self.run_dir, &machine).map_err(|e| e.to_string())?;
        self.apply(config).map_err(|e| e.to_string())
    }
}

impl Switch {
    /// Lets workers follow what changed beside the configuration.
    fn republish(&self) {
        // Housekeeping that has ended has no workers to tell.
        let _ = self.commands.send(Command::Republish);
    }

    fn worker_stats(&self) -> Vec<WorkerStats> {
        let sys = std::path::Path::new("/");
        let stats = self.shared.workers.iter().map(|w| {
            let c = &w.counters;
            let (frames, busy) = (c.frames.get(), c.busy.get());
            WorkerStats {
                core: w.core,
                node: host::topology::node_of_core(sys, w.core),
                state: if w.asleep.load(Ordering::Relaxed) {
                    WorkerState::Sleeping
                } else {
                    WorkerState::Polling
                },
                frames,
                bytes: c.bytes.get(),
                dropped: c.dropped.get(),
                bursts: c.bursts.get(),
                busy_cycles: busy,
                idle_cycles: c.idle.get(),
                cycles_per_frame: (frames > 0).then(|| busy as f64 / frames as f64),
            }
        });
        stats.collect()
    }

    fn port_stats(&self, view: &PortView) -> PortStats {
        let (_, plan) = self.shared.plans.load();
        let core_of = |queue: u16| {
            let worker = view.port.worker_of(usize::from(queue), &plan)?;
            self.shared.workers.get(worker).map(|w| w.core)
        };
        let received = (0u16..).zip(view.port.received());
        let rx = received.map(|(queue, counters)| rx_stats(queue, core_of(queue), counters));
        let tx = (0u16..).zip(view.port.sent()).map(|(queue, counters)| tx_stats(queue, counters));
        PortStats {
            name: view.config.name.clone(),
            rx: rx.filter(|q| q.queue == 0 || q.worker.is_some() || q.received > 0).collect(),
            tx: tx.filter(|q| q.queue == 0 || q.offered > 0).collect(),
            device: view.port.device_counts(),
            inject: inject_stats(view),
            trace: view.trace.as_deref().map(trace_stats),
        }
    }
}

fn inject_stats(view: &PortView) -> Option<InjectStats> {
    let suffered = |Done { corrupted, duplicated, reordered, delayed, held }| Suffered {
        corrupted,
        duplicated,
        reordered,
        delayed,
        held,
    };
    let (faults, (rx, tx)) = (view.config.inject?.to_string(), view.lanes.as_ref()?.done());
    Some(InjectStats { faults, rx: suffered(rx), tx: suffered(tx) })
}

fn trace_stats(trace: &Traced) -> TraceStats {
    let CaptureReport { captured, missed, .. } = trace.capture.report();
    let error = trace.error.get().cloned();
    TraceStats { file: trace.file.display().to_string(), captured, missed, error }
}

fn drop_counts(drops: &[(DropReason, u64)]) -> Vec<DropCount> {
    let of = |reason: &DropReason| drops.iter().filter(|(r, _)| r == reason).map(|(_, n)| n).sum();
    DropCount::nonzero(DropReason::ALL.iter().map(of))
}

fn rx_stats(queue: u16, worker: Option<u32>, c: &RxCounters) -> RxStats {
    let drops = c.drops.list();
    let (received, busy) = (c.received.get(), c.cycles.get());
    RxStats {
        queue,
        worker,
        received,
        bytes: c.bytes.get(),
        bursts: c.bursts.get(),
        switched: c.switched.get(),
        replicas: c.replicas.get(),
        dropped: drops.iter().map(|d| d.1).sum(),
        drops: drop_counts(&drops),
        busy_cycles: busy,
        cycles_per_frame: (received > 0).then(|| busy as f64 / received as f64),
        addresses: AddressStats {
            learnt: c.addresses.learnt.get(),
            moved: c.addresses.moved.get(),
            limit_reached: c.addresses.limit_reached.get(),
            table_full: c.addresses.table_full.get(),
        },
    }
}

fn tx_stats(queue: u16, c: &TxCounters) -> TxStats {
    let drops = c.all_drops();
    TxStats {
        queue,
        offered: c.all_offered(),
        sent: c.sent.get(),
        bytes: c.bytes.get(),
        bursts: c.bursts.get(),
        segments: c.segments.get(),
        dropped: drops.iter().map(|d| d.1).sum(),
        drops: drop_counts(&drops),
    }
}

fn port_report(view: &PortView) -> PortReport {
    let (c, shared) = (&view.config, view.port.shared());
    let info = shared.info();
    let (socket, mode, device) = match &c.behind {
        Behind::VhostUser { socket, side } => {
            let mode = if matches!(side, Side::Server { .. }) { "server" } else { "client" };
            (Some(socket.display().to_string()), Some(mode.to_owned()), None)
        }
        other => (None, None, other.device().map(str::to_owned)),
    };
    let server = mode.as_deref() == Some("server");
    let (state, reason) = match shared.state() {
        State::Waiting if server => (PortState::Listening, info.last_end),
        State::Waiting => (PortState::Connecting, info.last_end),
        State::Connected => (PortState::Connected, info.refused),
        State::Up => (PortState::Up, info.refused),
        State::Stopped(reason) => (PortState::Stopped, Some(reason)),
    };
    let rings: Vec<RingView> = view.port.rings();
    PortReport {
        name: c.name.clone(),
        kind: c.behind.kind().word().to_owned(),
        socket,
        mode,
        device,
        state,
        reason,
        features: feature_names(info.features),
        layout: rings.first().map(|r| if r.packed { "packed" } else { "split" }.to_owned()),
        rings: (rings.iter())
            .map(|r| RingReport { index: r.index, size: r.size, enabled: r.enabled })
            .collect(),
        memory_bytes: info.memory.0,
        mtu: c.mtu,
        vlan: (c.vlan != Vlan::Unaware).then(|| c.vlan.to_string()),
        isolation: c.isolation.clone(),
        vfs: (0..)
            .zip(view.port.functions())
            .map(|(number, function)| vf_report(number, &function))
            .collect(),
    }
}

fn vf_report(number: u16, function: &pmd::igb::VirtualFunction) -> VfReport {
    let settings = &function.settings;
    VfReport {
        number,
        mac: Mac(function.mac).to_string(),
        vlan: settings.vlan.map(|tag| tag & 0xfff),
        qos: settings.vlan.map_or(0, |tag| (tag >> 13) as u8),
        trust: settings.trusted,
        spoof_check: settings.spoof_check,
        active: function.active,
        granted: function.granted,
        refused: function.refused,
    }
}
