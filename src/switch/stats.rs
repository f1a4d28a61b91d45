//! The tables of `cableway switch stats`: counters since the start, or rates between two answers.

use std::collections::BTreeMap;
use std::fmt::Write;

use switch::control::report::{
    AddressStats, DropCount, PortStats, StatsReport, Suffered, SwitchInfo, WorkerState, WorkerStats,
};

use crate::output::{self, grouped, rate};

/// Everything since the start.
pub(super) fn since_start(info: &SwitchInfo, report: &StatsReport) -> String {
    let mut text = format!(
        "cableway {} (pid {}), up {}, {}\n\n",
        info.version,
        info.pid,
        output::duration(report.uptime_s),
        info.config
    );
    let header = ["worker", "state", "frames", "bytes", "dropped", "frames/burst", "cycles/frame", "busy"];
    let mut table = output::table(&header, &[2, 3, 4, 5, 6, 7]);
    for worker in &report.workers {
        table.add_row([
            worker_name(worker),
            state(worker).to_owned(),
            grouped(worker.frames),
            grouped(worker.bytes),
            grouped(worker.dropped),
            ratio(worker.frames, worker.bursts),
            cycles(worker.cycles_per_frame),
            busy(worker.busy_cycles, worker.idle_cycles),
        ]);
    }
    text += &format!("{table}\n\n");

    let header = [
        "port",
        "queue",
        "direction",
        "frames",
        "bytes",
        "frames/burst",
        "dropped",
        "cycles/frame",
        "polled by core",
    ];
    let mut table = output::table(&header, &[1, 3, 4, 5, 6, 7, 8]);
    for port in &report.ports {
        let polled_by = |core: Option<u32>| core.map_or_else(|| "-".to_owned(), |core| core.to_string());
        for rx in &port.rx {
            table.add_row([
                port.name.clone(),
                rx.queue.to_string(),
                "in".to_owned(),
                grouped(rx.received),
                grouped(rx.bytes),
                ratio(rx.received, rx.bursts),
                grouped(rx.dropped),
                cycles(rx.cycles_per_frame),
                polled_by(rx.worker),
            ]);
        }
        for tx in &port.tx {
            table.add_row([
                port.name.clone(),
                tx.queue.to_string(),
                "out".to_owned(),
                grouped(tx.sent),
                grouped(tx.bytes),
                ratio(tx.sent, tx.bursts),
                grouped(tx.dropped),
                cycles(None),
                polled_by(None),
            ]);
        }
    }
    text += &format!("{table}\n\n");
    text += &drops(&report.ports);
    text += &addresses(&report.ports);
    text += &devices(&report.ports);
    text += &suffering(&report.ports);
    text += &traces(&report.ports);
    let totals = &report.totals;
    let (received, replicas) = (grouped(totals.received), grouped(totals.replicas));
    text + &format!(
        "{received} received + {replicas} copies for flooding = {} sent + {} dropped\n",
        grouped(totals.sent),
        grouped(totals.dropped)
    )
}

/// Drops by port, direction and reason, each with its sentence.
fn drops(ports: &[PortStats]) -> String {
    let mut table = output::table(&["dropped", "port", "direction", "reason", "meaning"], &[0]);
    let mut any = false;
    for port in ports {
        let rx = port.rx.iter().flat_map(|queue| &queue.drops).map(|count| ("in", count));
        let tx = port.tx.iter().flat_map(|queue| &queue.drops).map(|count| ("out", count));
        let mut sums: BTreeMap<(&str, &str), (u64, &DropCount)> = BTreeMap::new();
        for (direction, count) in rx.chain(tx) {
            sums.entry((direction, &count.reason)).or_insert((0, count)).0 += count.frames;
        }
        for ((direction, reason), (frames, count)) in sums {
            any = true;
            table.add_row([&grouped(frames), &port.name, direction, reason, &count.sentence]);
        }
    }
    if any { format!("{table}\n\n") } else { String::new() }
}

/// What became of source addresses, by port; nothing where no address came in.
fn addresses(ports: &[PortStats]) -> String {
    let header = ["port", "addresses learnt", "moved here", "frames over the limit", "table full"];
    let mut table = output::table(&header, &[1, 2, 3, 4]);
    let mut any = false;
    for port in ports {
        let sum =
            |of: fn(&AddressStats) -> u64| port.rx.iter().map(|queue| of(&queue.addresses)).sum::<u64>();
        let sums = [sum(|a| a.learnt), sum(|a| a.moved), sum(|a| a.limit_reached), sum(|a| a.table_full)];
        if sums.iter().any(|n| *n > 0) {
            any = true;
            let [learnt, moved, limit, full] = sums.map(grouped);
            table.add_row([&port.name, &learnt, &moved, &limit, &full]);
        }
    }
    if any { format!("{table}\n\n") } else { String::new() }
}

/// What devices count themselves, where they counted anything.
fn devices(ports: &[PortStats]) -> String {
    let mut table = output::table(&["counted by the device", "port", "counter"], &[0]);
    let mut any = false;
    for port in ports {
        for counter in port.device.iter().filter(|counter| counter.count > 0) {
            any = true;
            table.add_row([&grouped(counter.count), &port.name, &counter.name]);
        }
    }
    if any { format!("{table}\n\n") } else { String::new() }
}

/// What frames suffer on purpose, by port and direction.
fn suffering(ports: &[PortStats]) -> String {
    let header =
        ["port", "direction", "corrupted", "duplicated", "reordered", "delayed", "waiting", "inject"];
    let mut table = output::table(&header, &[2, 3, 4, 5, 6]);
    let mut any = false;
    for port in ports {
        let Some(inject) = &port.inject else { continue };
        any = true;
        for (direction, suffered) in [("in", &inject.rx), ("out", &inject.tx)] {
            let Suffered { corrupted, duplicated, reordered, delayed, held } = suffered;
            let [corrupted, duplicated, reordered, delayed, held] =
                [corrupted, duplicated, reordered, delayed, held].map(|n| grouped(*n));
            let faults = inject.faults.as_str();
            table.add_row([
                port.name.as_str(),
                direction,
                &corrupted,
                &duplicated,
                &reordered,
                &delayed,
                &held,
                faults,
            ]);
        }
    }
    if any { format!("{table}\n\n") } else { String::new() }
}

/// Files that frames are written to.
fn traces(ports: &[PortStats]) -> String {
    let mut table = output::table(&["port", "traced", "missed", "file"], &[1, 2]);
    let mut any = false;
    for port in ports {
        let Some(trace) = &port.trace else { continue };
        any = true;
        let ended = trace.error.as_ref().map_or_else(String::new, |why| format!(" (ended: {why})"));
        let file = format!("{}{ended}", trace.file);
        table.add_row([&port.name, &grouped(trace.captured), &grouped(trace.missed), &file]);
    }
    if any { format!("{table}\n\n") } else { String::new() }
}

/// Rates between two answers: one line for each worker and port.
pub(super) fn between(before: &StatsReport, now: &StatsReport) -> String {
    let seconds = (now.uptime_s - before.uptime_s).max(f64::EPSILON);
    let per_second = |now: u64, before: u64| now.saturating_sub(before) as f64 / seconds;
    let mut text = String::new();
    for worker in &now.workers {
        let zero = WorkerStats { frames: 0, bursts: 0, busy_cycles: 0, idle_cycles: 0, ..worker.clone() };
        let old = before.workers.iter().find(|old| old.core == worker.core).unwrap_or(&zero);
        let frames = worker.frames.saturating_sub(old.frames);
        let busy_cycles = worker.busy_cycles.saturating_sub(old.busy_cycles);
        let _ = writeln!(
            text,
            "{:<12} {:>12}  {:>5} cycles/frame  {:>5} frames/burst  {:>4} busy",
            worker_name(worker),
            rate(per_second(worker.frames, old.frames), "pps"),
            if frames == 0 { "-".to_owned() } else { format!("{:.0}", busy_cycles as f64 / frames as f64) },
            ratio(frames, worker.bursts.saturating_sub(old.bursts)),
            busy(busy_cycles, worker.idle_cycles.saturating_sub(old.idle_cycles)),
        );
    }
    let none = PortStats::default();
    for port in &now.ports {
        let old = before.ports.iter().find(|old| old.name == port.name).unwrap_or(&none);
        let sums = |port: &PortStats| {
            [
                port.rx.iter().map(|queue| queue.received).sum::<u64>(),
                port.rx.iter().map(|queue| queue.bytes).sum(),
                port.tx.iter().map(|queue| queue.sent).sum(),
                port.tx.iter().map(|queue| queue.bytes).sum(),
                port.rx
                    .iter()
                    .map(|queue| queue.dropped)
                    .chain(port.tx.iter().map(|queue| queue.dropped))
                    .sum(),
            ]
        };
        let [rx, rx_bytes, tx, tx_bytes, dropped] =
            std::array::from_fn(|i| per_second(sums(port)[i], sums(old)[i]));
        let _ = writeln!(
            text,
            "{:<12} in {:>10} {:>11}   out {:>10} {:>11}   dropped {:>9}",
            port.name,
            rate(rx, "pps"),
            rate(rx_bytes * 8.0, "bit/s"),
            rate(tx, "pps"),
            rate(tx_bytes * 8.0, "bit/s"),
            rate(dropped, "pps"),
        );
    }
    text + "\n"
}

fn worker_name(worker: &WorkerStats) -> String {
    let node = worker.node.map_or_else(String::new, |node| format!(" (node {node})"));
    format!("core {}{node}", worker.core)
}

fn state(worker: &WorkerStats) -> &'static str {
    match worker.state {
        WorkerState::Polling => "polling",
        WorkerState::Sleeping => "sleeping",
    }
}

/// The share of cycles in which there was something to do.
fn busy(busy: u64, idle: u64) -> String {
    let all = busy.saturating_add(idle);
    if all == 0 { "-".to_owned() } else { format!("{:.0} %", busy as f64 * 100.0 / all as f64) }
}

fn cycles(per_frame: Option<f64>) -> String {
    per_frame.map_or_else(|| "-".to_owned(), |cycles| format!("{cycles:.0}"))
}

fn ratio(frames: u64, bursts: u64) -> String {
    if bursts == 0 { "-".to_owned() } else { format!("{:.1}", frames as f64 / bursts as f64) }
}
