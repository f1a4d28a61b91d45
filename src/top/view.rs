//! What happened between two samples, in the units that people read; what `--json` prints, and the plain table of it.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Serialize;
use switch::control::report::{PortStats, StatsReport};
use vmm::control::report::VcpuReport;

use super::sample::{Process, Sample, Switch, Thread};
use crate::output::{self, rate};

/// Everything, between two moments.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct View {
    /// How far they are apart.
    pub(super) seconds: f64,
    /// The switch's configuration; `None`: no switch answers.
    pub(super) switch: Option<String>,
    /// Why not.
    pub(super) switch_absent: Option<String>,
    pub(super) cores: Vec<Core>,
    pub(super) workers: Vec<Worker>,
    pub(super) ports: Vec<Port>,
    pub(super) machines: Vec<Machine>,
}

/// A core.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Core {
    pub(super) core: u32,
    /// Time that anything ran on it, per cent; a worker that polls is busy for the kernel.
    pub(super) busy: f64,
    /// Time that a hypervisor below this machine gave to others.
    pub(super) steal: f64,
    /// Threads of ours that ran there last, with their time, per cent.
    pub(super) runs: Vec<Runs>,
}

/// A thread on a core.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Runs {
    pub(super) process: String,
    pub(super) thread: String,
    pub(super) busy: f64,
}

/// A worker of the switch.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Worker {
    pub(super) core: u32,
    /// Its cycles in which frames were moved, per cent.
    pub(super) busy: Option<f64>,
    pub(super) frames_per_s: f64,
    /// Microseconds of each second that its thread was ready to run and had to wait for its core: the delay that the kernel adds
    /// to frames.
    pub(super) waited_us_per_s: Option<f64>,
}

/// A port of the switch.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Port {
    pub(super) name: String,
    pub(super) state: String,
    pub(super) in_pps: f64,
    pub(super) in_bps: f64,
    pub(super) out_pps: f64,
    pub(super) out_bps: f64,
    pub(super) dropped_pps: f64,
    /// Frames dropped a second, by reason, on both ways.
    pub(super) drops: BTreeMap<String, f64>,
}

/// A virtual machine.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Machine {
    pub(super) name: String,
    pub(super) pid: u32,
    /// What it says that it does; absent if it does not say.
    pub(super) state: Option<String>,
    pub(super) vcpus: usize,
    /// Time that its vCPUs ran, per cent of one core.
    pub(super) busy: f64,
    /// Time that its vCPUs were ready to run and had to wait for a core, per cent: what its guest sees as steal.
    pub(super) steal: f64,
    /// How often its vCPUs left the guest for `cableway vm`; what KVM does by itself is not among it. Absent if it does not say.
    pub(super) exits_per_s: Option<f64>,
    /// The same, by reason.
    pub(super) exits: BTreeMap<String, f64>,
}

impl View {
    /// Between `before` and `now`. What was not there before has done nothing.
    pub(super) fn between(before: &Sample, now: &Sample) -> Self {
        let seconds = (now.at - before.at).as_secs_f64().max(1e-6);
        let old_process = |pid: u32| before.processes.iter().find(|process| process.pid == pid);
        let threads: Vec<_> = now
            .processes
            .iter()
            .flat_map(|process| {
                let old = old_process(process.pid);
                process.threads.iter().map(move |thread| (process, thread, spent(old, thread)))
            })
            .collect();
        let cores = now.cores.iter().map(|(core, times)| {
            let old_times = before.cores.get(core).copied().unwrap_or(*times);
            let share = |now: u64, old: u64| {
                let all = times.all.saturating_sub(old_times.all).max(1);
                now.saturating_sub(old) as f64 * 100.0 / all as f64
            };
            let on = threads.iter().filter(|(_, thread, (ran, _))| thread.core == *core && *ran > 0);
            let mut runs: Vec<_> = on
                .map(|(process, thread, (ran, _))| Runs {
                    process: process.name.clone(),
                    thread: thread.name.clone(),
                    busy: *ran as f64 / seconds / 1e7,
                })
                .collect();
            runs.sort_by(|a, b| b.busy.total_cmp(&a.busy));
            Core {
                core: *core,
                busy: share(times.busy, old_times.busy),
                steal: share(times.steal, old_times.steal),
                runs,
            }
        });
        let machines = now.processes.iter().filter(|process| process.is_machine);
        let machines = machines.map(|process| Machine::between(old_process(process.pid), process, seconds));
        let mut view = Self {
            seconds,
            switch: now.switch.as_ref().ok().map(|switch| switch.info.config.clone()),
            switch_absent: now.switch.as_ref().err().cloned(),
            cores: cores.collect(),
            machines: machines.collect(),
            ..Self::default()
        };
        if let Ok(switch) = &now.switch {
            // A switch that was started again counts from zero.
            let old = before.switch.as_ref().ok().filter(|old| old.info.pid == switch.info.pid);
            let none = StatsReport::default();
            let stats = old.map_or(&none, |old| &old.stats);
            let since =
                if old.is_some() { switch.stats.uptime_s - stats.uptime_s } else { switch.stats.uptime_s };
            view.add_switch(switch, stats, since.max(1e-6), &threads, seconds);
        }
        view
    }

    fn add_switch(
        &mut self,
        now: &Switch,
        old: &StatsReport,
        since: f64,
        threads: &[(&Process, &Thread, (u64, u64))],
        seconds: f64,
    ) {
        let per_second = |now: u64, old: u64| now.saturating_sub(old) as f64 / since;
        for worker in &now.stats.workers {
            let of = old.workers.iter().find(|old| old.core == worker.core);
            let busy = worker.busy_cycles.saturating_sub(of.map_or(0, |old| old.busy_cycles));
            let idle = worker.idle_cycles.saturating_sub(of.map_or(0, |old| old.idle_cycles));
            let all = busy.saturating_add(idle);
            let thread = threads.iter().find(|(process, thread, _)| {
                !process.is_machine && thread.core == worker.core && thread.name.starts_with("worker")
            });
            self.workers.push(Worker {
                core: worker.core,
                busy: (all > 0).then(|| busy as f64 * 100.0 / all as f64),
                frames_per_s: per_second(worker.frames, of.map_or(0, |old| old.frames)),
                waited_us_per_s: thread.map(|(_, _, (_, waited))| *waited as f64 / 1e3 / seconds),
            });
        }
        for port in &now.stats.ports {
            let of = old.ports.iter().find(|old| old.name == port.name);
            let change = |of_port: fn(&PortStats) -> u64| per_second(of_port(port), of.map_or(0, of_port));
            let (reasons, old_reasons) = (reasons(port), of.map(reasons).unwrap_or_default());
            let drops = reasons.iter().map(|(reason, frames)| {
                (reason.clone(), per_second(*frames, old_reasons.get(reason).copied().unwrap_or(0)))
            });
            let drops: BTreeMap<_, _> = drops.filter(|(_, rate)| *rate > 0.0).collect();
            let state = now.ports.ports.iter().find(|found| found.name == port.name);
            self.ports.push(Port {
                name: port.name.clone(),
                state: state.map_or("-", |port| port.state.word()).to_owned(),
                in_pps: change(|port| port.rx.iter().map(|queue| queue.received).sum()),
                in_bps: change(|port| port.rx.iter().map(|queue| queue.bytes * 8).sum()),
                out_pps: change(|port| port.tx.iter().map(|queue| queue.sent).sum()),
                out_bps: change(|port| port.tx.iter().map(|queue| queue.bytes * 8).sum()),
                // A sum of nothing is minus zero.
                dropped_pps: drops.values().sum::<f64>() + 0.0,
                drops,
            });
        }
    }

    /// Microseconds of a second that workers waited for their cores, all together.
    pub(super) fn waited_us(&self) -> f64 {
        self.workers.iter().filter_map(|worker| worker.waited_us_per_s).sum::<f64>() + 0.0
    }

    /// As plain tables.
    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        let mut table = output::table(&["core", "busy", "steal", "runs"], &[0, 1, 2]);
        for core in &self.cores {
            table.add_row([core.core.to_string(), percent(core.busy), percent(core.steal), core.runs_text()]);
        }
        let _ = writeln!(text, "{table}\n");
        match (&self.switch, &self.switch_absent) {
            (Some(config), _) => {
                let _ = writeln!(text, "switch of {config}");
                let mut table =
                    output::table(&["worker", "busy", "frames", "waited for its core"], &[1, 2, 3]);
                for worker in &self.workers {
                    table.add_row(worker.cells());
                }
                let _ = writeln!(text, "{table}\n");
                let mut table = output::table(&PORT_HEADER, &[2, 3, 4, 5, 6]);
                for port in &self.ports {
                    table.add_row(port.cells());
                }
                let _ = writeln!(text, "{table}\n");
            }
            (None, why) => {
                let _ = writeln!(text, "{}\n", why.as_deref().unwrap_or("no switch"));
            }
        }
        if self.machines.is_empty() {
            return text + "no virtual machine of ours runs\n";
        }
        let mut table = output::table(&MACHINE_HEADER, &[2, 3, 4, 5, 6]);
        for machine in &self.machines {
            table.add_row(machine.cells());
        }
        let _ = writeln!(text, "{table}");
        text
    }
}

pub(super) const PORT_HEADER: [&str; 8] =
    ["port", "state", "in", "in bits", "out", "out bits", "dropped", "why"];
pub(super) const MACHINE_HEADER: [&str; 8] =
    ["machine", "state", "process", "vCPUs", "busy", "steal", "exits", "why"];

impl Core {
    /// What runs there, the busiest first.
    pub(super) fn runs_text(&self) -> String {
        let one = |runs: &Runs| format!("{}/{} {}", runs.process, runs.thread, percent(runs.busy));
        self.runs.iter().map(one).collect::<Vec<_>>().join(", ")
    }
}

impl Worker {
    pub(super) fn cells(&self) -> [String; 4] {
        [
            format!("core {}", self.core),
            self.busy.map_or_else(|| "-".to_owned(), percent),
            rate(self.frames_per_s, "pps"),
            self.waited_us_per_s.map_or_else(|| "-".to_owned(), |us| micros(us) + "/s"),
        ]
    }
}

impl Port {
    pub(super) fn cells(&self) -> [String; 8] {
        let why: Vec<_> =
            self.drops.iter().map(|(reason, frames)| format!("{reason} {}", rate(*frames, "pps"))).collect();
        [
            self.name.clone(),
            self.state.clone(),
            rate(self.in_pps, "pps"),
            rate(self.in_bps, "bit/s"),
            rate(self.out_pps, "pps"),
            rate(self.out_bps, "bit/s"),
            rate(self.dropped_pps, "pps"),
            why.join(", "),
        ]
    }
}

impl Machine {
    /// What the machine of `now` did since `old`: as it tells, or as the threads of its vCPUs show.
    fn between(old: Option<&Process>, now: &Process, seconds: f64) -> Self {
        let (was, is) = (old.and_then(|old| old.told.as_ref()), now.told.as_ref());
        // A guest that booted again counts from zero.
        let was = was.filter(|was| is.is_some_and(|is| is.boots == was.boots));
        let before =
            |vcpu: &VcpuReport| was.and_then(|was| was.vcpus.iter().find(|old| old.number == vcpu.number));
        let spent: Vec<(u64, u64)> = match is {
            Some(is) => is
                .vcpus
                .iter()
                .map(|vcpu| {
                    let (ran, steal) =
                        before(vcpu).map_or((vcpu.ran_ns, vcpu.steal_ns), |old| (old.ran_ns, old.steal_ns));
                    (vcpu.ran_ns.saturating_sub(ran), vcpu.steal_ns.saturating_sub(steal))
                })
                .collect(),
            None => {
                now.threads.iter().filter(|thread| is_vcpu(thread)).map(|thread| spent(old, thread)).collect()
            }
        };
        let sum = |of: fn(&(u64, u64)) -> u64| spent.iter().map(of).sum::<u64>() as f64 / seconds / 1e7;
        let mut exits: BTreeMap<String, f64> = BTreeMap::new();
        for vcpu in is.iter().flat_map(|is| &is.vcpus) {
            let Some(old) = before(vcpu) else { continue };
            for (reason, count) in &vcpu.exits {
                let count = count.saturating_sub(old.exits.get(reason).copied().unwrap_or(0));
                if count > 0 {
                    *exits.entry(reason.clone()).or_default() += count as f64 / seconds;
                }
            }
        }
        Self {
            name: now.name.clone(),
            pid: now.pid,
            state: is.map(|is| is.state.word().to_owned()),
            vcpus: spent.len(),
            busy: sum(|spent| spent.0),
            steal: sum(|spent| spent.1),
            exits_per_s: is.map(|_| exits.values().sum::<f64>() + 0.0),
            exits,
        }
    }

    pub(super) fn cells(&self) -> [String; 8] {
        let mut why: Vec<_> = self.exits.iter().collect();
        why.sort_by(|a, b| b.1.total_cmp(a.1));
        let why: Vec<_> =
            why.iter().map(|(reason, exits)| format!("{reason} {}", rate(**exits, "/s"))).collect();
        [
            self.name.clone(),
            self.state.clone().unwrap_or_else(|| "-".to_owned()),
            self.pid.to_string(),
            self.vcpus.to_string(),
            percent(self.busy),
            percent(self.steal),
            self.exits_per_s.map_or_else(|| "-".to_owned(), |exits| rate(exits, "/s")),
            why.join(", "),
        ]
    }
}

pub(super) fn micros(us: f64) -> String {
    if us < 10_000.0 { format!("{us:.0} µs") } else { format!("{:.0} ms", us / 1e3) }
}

pub(super) fn percent(share: f64) -> String {
    format!("{share:.0} %")
}

/// Nanoseconds that a thread ran and waited since `old`.
fn spent(old: Option<&Process>, thread: &Thread) -> (u64, u64) {
    let old = old.and_then(|old| old.threads.iter().find(|old| old.id == thread.id));
    old.map_or((0, 0), |old| (thread.ran.saturating_sub(old.ran), thread.waited.saturating_sub(old.waited)))
}

fn is_vcpu(thread: &Thread) -> bool {
    thread.name.to_ascii_lowercase().contains("vcpu")
}

/// Drops of a port by reason, on both ways.
fn reasons(port: &PortStats) -> BTreeMap<String, u64> {
    let mut sums = BTreeMap::new();
    let rx = port.rx.iter().flat_map(|queue| &queue.drops);
    for count in rx.chain(port.tx.iter().flat_map(|queue| &queue.drops)) {
        *sums.entry(count.reason.clone()).or_insert(0) += count.frames;
    }
    sums
}
