//! The housekeeping thread: everything that is rare. It opens and closes ports, builds plans, ages addresses, places queues
//! on workers and answers what workers report.

mod publish;
mod stopping;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, select};

use super::attached::{self, Attached};
use super::placement::{Queue, load, rebalance};
use super::ports::{self, RunningPort};
use super::{ApplyError, Shared, StartError};
use crate::bridge::{Clock, MAX_PORTS, PlanError};
use crate::capture::Before;
use crate::config::{Behind, Config, PortConfig, VirtualFunction, far_cards};
use crate::control::VfChange;
use crate::control::report::ReloadReport;
use crate::device_port::Cards;
use crate::events::{Event, Events};
use crate::slot::PortState;
use crate::worker::clock_since;

/// How often ageing, placement and lost events are looked after.
const TICK: Duration = Duration::from_millis(200);

/// How often queues may move to another worker.
const REBALANCE: Duration = Duration::from_secs(2);

/// How often a device that is gone is looked for.
const REOPEN: Duration = Duration::from_secs(1);

/// Buckets of the learning table that are aged in one tick.
const AGED_PER_TICK: usize = 16_384;

/// What the housekeeping thread is asked to do.
pub(super) enum Command {
    /// Put a configuration in force.
    Apply(Box<Config>, Sender<Result<ReloadReport, ApplyError>>),
    /// Change what a virtual function of a port's card may.
    Function { port: String, number: u16, change: VfChange, reply: Sender<Result<(), String>> },
    /// Workers follow what changed beside the configuration.
    Republish,
    /// Close everything and end.
    Stop,
}

/// The state of the housekeeping thread.
pub(super) struct Housekeeper {
    shared: Arc<Shared>,
    events: Events,
    config: Config,
    ports: Vec<RunningPort>,
    /// What its ports with network cards share. Dropped after the ports.
    cards: Cards,
    /// Where each queue is: port number and queue pair to worker.
    places: Vec<(u16, usize, usize)>,
    /// What had come in on each queue when load was last measured.
    measured: Vec<(u16, usize, u64, u64)>,
    rebalanced: Instant,
    aged_to: usize,
}

impl Housekeeper {
    /// Opens all ports.
    pub(super) fn new(shared: Arc<Shared>, events: Events, config: Config) -> Result<Self, StartError> {
        let mut ports = Vec::new();
        let mut cards = Cards::default();
        cards.expect(&config);
        for (number, port) in config.ports.iter().enumerate() {
            ports.push(ports::open(port, number as u16, &events, &mut cards)?);
        }
        let mut this = Self {
            shared,
            events,
            config,
            ports,
            cards,
            places: Vec::new(),
            measured: Vec::new(),
            rebalanced: Instant::now(),
            aged_to: 0,
        };
        this.shared.fdb.set_static(&ports::static_entries(&this.numbered()))?;
        this.publish()?;
        this.tell_far_cards();
        Ok(this)
    }

    /// Works until told to stop.
    pub(super) fn run(&mut self, orders: &Receiver<Command>, inbox: &Receiver<Event>) {
        // Not when nothing happens for a while: a front end may see to it that something always does.
        let mut due = Instant::now() + TICK;
        loop {
            select! {
                recv(orders) -> order => match order {
                    Ok(Command::Apply(config, reply)) => {
                        let result = self.apply(*config);
                        let _ = reply.send(result);
                    }
                    Ok(Command::Function { port, number, change, reply }) => {
                        let _ = reply.send(self.change_function(&port, number, &change));
                    }
                    Ok(Command::Republish) => self.republish(),
                    Ok(Command::Stop) | Err(_) => break,
                },
                recv(inbox) -> event => if let Ok(event) = event {
                    self.event(event, inbox);
                },
                default(due.saturating_duration_since(Instant::now())) => {}
            }
            if Instant::now() >= due {
                self.tick();
                due = Instant::now() + TICK;
            }
        }
        // Sessions close while the workers still run: a ring is taken from a worker, never torn away.
        self.ports.clear();
    }

    /// Ports with their numbers, as the configuration in force has them.
    fn numbered(&self) -> Vec<(u16, PortConfig)> {
        self.ports.iter().map(|p| (p.port.number(), p.config.clone())).collect()
    }

    /// Warns of cards that are polled from another memory node.
    fn tell_far_cards(&self) {
        for far in far_cards(&self.config, std::path::Path::new("/")) {
            tracing::warn!("{far}");
        }
    }

    fn clock(&self) -> Clock {
        clock_since(self.shared.epoch)
    }

    fn event(&mut self, event: Event, inbox: &Receiver<Event>) {
        match event {
            Event::RingBroken { port, queue, error } => self.broken(port, queue, &error.to_string()),
            Event::DeviceGone { port, error } => self.device_gone(port, &error.to_string()),
            Event::Announce { port, mac } => {
                super::announce::announce(&self.shared.plans.load().1, port, mac, self.clock());
            }
            // Rings start in pairs and at once: one plan for all that is known by now.
            Event::RingsChanged => {
                while let Ok(next) = inbox.try_recv() {
                    match next {
                        Event::RingsChanged => {}
                        other => self.event(other, inbox),
                    }
                }
                self.republish();
            }
        }
    }

    /// Opens devices that are there again.
    fn reopen_devices(&mut self) {
        let mut opened = false;
        for running in &mut self.ports {
            let Attached::Device(port) = &running.port else { continue };
            if running.config.behind.device().is_none() {
                continue; // files do not come back, and opening one anew would empty it
            }
            let runs = port.shared.state() == PortState::Up || port.has_card();
            if runs && !port.shared.broken.load(Ordering::Acquire) || running.tried.elapsed() < REOPEN {
                continue;
            }
            port.halt();
            running.tried = Instant::now();
            match port.open(&running.config, false, &mut self.cards) {
                Ok(()) => {
                    tracing::info!("port {} is up again", running.config.name);
                    opened = true;
                }
                Err(error) => port.wait(&error),
            }
        }
        if opened {
            self.republish();
        }
    }

    /// Follows the links of cards, and closes those that must go.
    fn look_at_cards(&mut self) {
        let mut stopped = Vec::new();
        let faults = self.cards.faults();
        for running in &mut self.ports {
            let Attached::Device(port) = &running.port else { continue };
            let fault = match &running.config.behind {
                Behind::Nic { bdf, .. } if port.has_card() => faults.iter().find(|(who, _)| who == bdf),
                _ => None,
            };
            let looked = match fault {
                Some((_, text)) => {
                    Err(format!("the card reached for memory that is not mapped for it ({text})"))
                }
                None => port.look_at_card(),
            };
            match looked {
                Ok(None) => {}
                Ok(Some(up)) => {
                    tracing::info!(
                        "port {}: {}",
                        running.config.name,
                        if up { "link up" } else { "no link" }
                    );
                }
                Err(reason) => {
                    stopped.push((port.shared.number, reason));
                    running.tried = Instant::now();
                }
            }
        }
        for (number, reason) in stopped {
            self.stop_port(number, &reason);
        }
    }

    fn tick(&mut self) {
        self.age();
        self.shared.plans.collect();
        if self.shared.workers.len() > 1 && self.rebalanced.elapsed() >= REBALANCE {
            self.rebalanced = Instant::now();
            self.rebalance();
        }
        self.find_broken();
        self.look_at_cards();
        self.reopen_devices();
        let forgotten = self.shared.change_captures(|captures| {
            let before = captures.len();
            captures.retain(|capture| !capture.is_forgotten());
            captures.len() < before
        });
        if forgotten {
            self.republish();
        }
        // Should an event ever be lost, what it told of is still true.
        let active: usize = self.ports.iter().map(|p| p.port.polled().len()).sum();
        if active != self.places.len() {
            self.republish();
        }
    }

    fn age(&mut self) {
        let age = self.config.switch.fdb_age.as_secs() as u32;
        let pass = self.shared.fdb.age(self.aged_to, AGED_PER_TICK, self.clock().seconds, age);
        self.aged_to = pass.next.unwrap_or(0);
    }

    /// Queues that run, where they are and what came in on them since the last look.
    fn queues(&mut self) -> Vec<(u16, usize, attached::Queue, Queue)> {
        let workers = &self.config.switch.workers;
        let mut queues = Vec::new();
        let mut measured = Vec::new();
        for running in &self.ports {
            let number = running.port.number();
            for (pair, slot) in running.port.polled() {
                let counters = slot.counters();
                let (frames, bytes) = (counters.received.get(), counters.bytes.get());
                let before = self.measured.iter().find(|m| (m.0, m.1) == (number, pair));
                let (f, b) = before.map_or((0, 0), |m| (m.2, m.3));
                let core = running.config.queue_workers.as_ref().and_then(|cores| cores.get(pair));
                let place = self.places.iter().find(|p| (p.0, p.1) == (number, pair));
                let queue = Queue {
                    pinned: core.and_then(|core| workers.iter().position(|w| w == core)),
                    current: place.map(|p| p.2),
                    node: slot.memory_node(),
                    load: load(frames - f, bytes - b),
                };
                queues.push((number, pair, slot, queue));
                measured.push((number, pair, frames, bytes));
            }
        }
        self.measured = measured;
        queues
    }

    fn worker_nodes(&self) -> Vec<Option<u32>> {
        let sys = std::path::Path::new("/");
        self.config.switch.workers.iter().map(|core| host::topology::node_of_core(sys, *core)).collect()
    }

    fn rebalance(&mut self) {
        let queues = self.queues();
        let plain: Vec<Queue> = queues.iter().map(|q| q.3).collect();
        let Some((i, worker)) = rebalance(&plain, &self.worker_nodes()) else { return };
        let Some((number, pair, ..)) = queues.get(i) else { return };
        if let Some(place) = self.places.iter_mut().find(|p| (p.0, p.1) == (*number, *pair)) {
            place.2 = worker;
        }
        let name = self.ports.iter().find(|p| p.port.number() == *number).map(|p| &*p.config.name);
        tracing::info!("port {} queue {pair} moves to worker {worker}", name.unwrap_or_default());
        self.republish();
    }

    /// Puts `config` in force, whole or not at all. What fails is opening sockets and the bridge's tables, so that comes first;
    /// a port that changes on the same socket must close before it opens anew, and is put back if anything fails.
    fn apply(&mut self, config: Config) -> Result<ReloadReport, ApplyError> {
        self.check_restart(&config)?;
        let mut report = self.difference(&config);
        let gone = |p: &RunningPort| config.port(&p.config.name).is_none();
        // Sockets and devices that somebody else wants from now on are free before they are opened.
        let wanted_anew = |p: &RunningPort| {
            config.ports.iter().any(|c| c.behind.collides(&p.config.behind) || c.shares_a_file(&p.config))
        };
        let (leaving, staying): (Vec<_>, Vec<_>) = std::mem::take(&mut self.ports)
            .into_iter()
            .partition(|p| report.reconnected.contains(&p.config.name) || (gone(p) && wanted_anew(p)));
        self.ports = staying;
        let mut closed = Vec::new();
        for old in leaving {
            self.shared.fdb.flush_port(old.port.number());
            closed.push(old.config.clone());
        }
        // The file may be another's from now on.
        for p in &mut self.ports {
            if config.port(&p.config.name).and_then(|c| c.trace.as_ref()) != p.config.trace.as_ref() {
                p.trace = None;
            }
        }
        self.cards.expect(&config);
        let opened = self.open_missing(&config.ports).and_then(|opened| {
            let ports = self.ports.iter().chain(&opened);
            let entries: Vec<(u16, PortConfig)> =
                ports.filter_map(|p| Some((p.port.number(), config.port(&p.config.name)?.clone()))).collect();
            self.shared.fdb.set_static(&ports::static_entries(&entries))?;
            self.grant(&config)?;
            for p in &mut self.ports {
                if let Some(wanted) = config.port(&p.config.name) {
                    p.trace(wanted, Before::Emptied)?;
                }
            }
            Ok(opened)
        });
        let opened = match opened {
            Ok(opened) => opened,
            Err(error) => {
                self.cards.expect(&self.config);
                self.put_back(&closed);
                return Err(error.into());
            }
        };
        self.ports.extend(opened);
        let (removed, kept): (Vec<_>, Vec<_>) = std::mem::take(&mut self.ports).into_iter().partition(gone);
        self.ports = kept;
        for port in &mut self.ports {
            if let Some(wanted) = config.port(&port.config.name) {
                port.configure(wanted.clone());
            }
        }
        self.ports.sort_by_key(|p| config.ports.iter().position(|c| c.name == p.config.name));
        report.switch_changed = self.config.switch != config.switch;
        self.config = config;
        self.publish().map_err(StartError::from)?;
        self.tell_far_cards();
        for port in removed {
            self.shared.fdb.flush_port(port.port.number());
        }
        Ok(report)
    }

    /// Changes what a virtual function of a port's card may, until the next reload.
    fn change_function(&mut self, name: &str, number: u16, change: &VfChange) -> Result<(), String> {
        let running = self.ports.iter_mut().find(|p| p.config.name == name);
        let running = running.ok_or_else(|| format!("there is no port {name:?}"))?;
        let Attached::Device(port) = &running.port else {
            return Err(format!("port {name} has no card"));
        };
        let there = port.functions().len();
        let Behind::Nic { vfs, device, .. } = &mut running.config.behind else {
            return Err(format!("port {name} has no card"));
        };
        if usize::from(number) >= there {
            let state = match port.shared.state() {
                PortState::Stopped(reason) if !port.has_card() => format!("; it is not open: {reason}"),
                _ => String::new(),
            };
            return Err(format!(
                "card {device} has {there} virtual functions, there is no number {number}{state}"
            ));
        }
        let mut wanted = vfs.clone();
        wanted.resize(wanted.len().max(usize::from(number) + 1), VirtualFunction::default());
        if let Some(function) = wanted.get_mut(usize::from(number)) {
            change.apply(function)?;
        }
        port.grant(&wanted).map_err(|error| error.to_string())?;
        *vfs = wanted;
        tracing::info!("port {name}: virtual function {number} was changed");
        self.republish();
        Ok(())
    }

    /// Lets virtual functions of cards that stay open have what `config` says; all of them, or none.
    fn grant(&self, config: &Config) -> Result<(), StartError> {
        for (done, running) in self.ports.iter().enumerate() {
            let (Attached::Device(port), Some(wanted)) = (&running.port, config.port(&running.config.name))
            else {
                continue;
            };
            if let Err(source) = port.grant(wanted.behind.functions()) {
                for before in self.ports.iter().take(done) {
                    if let Attached::Device(port) = &before.port
                        && let Err(error) = port.grant(before.config.behind.functions())
                    {
                        tracing::error!("port {}: {error}", before.config.name);
                    }
                }
                return Err(StartError::Device { port: running.config.name.clone(), source: source.into() });
            }
        }
        Ok(())
    }

    /// What `config` changes.
    fn difference(&self, config: &Config) -> ReloadReport {
        let mut report = ReloadReport::default();
        for wanted in &config.ports {
            let name = wanted.name.clone();
            match self.ports.iter().find(|p| p.config.name == name) {
                None => report.added.push(name),
                Some(old) if old.config == *wanted => report.unchanged += 1,
                Some(old) => {
                    if !ports::same_session(&old.config, wanted) {
                        report.reconnected.push(name.clone());
                    }
                    report.changed.push(name);
                }
            }
        }
        let names = self.ports.iter().map(|p| p.config.name.clone());
        report.removed = names.filter(|name| config.port(name).is_none()).collect();
        report
    }

    /// Opens those of `wanted` that do not run.
    fn open_missing(&mut self, wanted: &[PortConfig]) -> Result<Vec<RunningPort>, StartError> {
        let mut numbers: Vec<u16> = self.ports.iter().map(|p| p.port.number()).collect();
        let mut opened = Vec::new();
        for port in wanted {
            if self.ports.iter().all(|p| p.config.name != port.name) {
                let number = free_number(&numbers);
                opened.push(ports::open(port, number, &self.events, &mut self.cards)?);
                numbers.push(number);
            }
        }
        Ok(opened)
    }

    /// After a change that failed: opens what was closed for it.
    fn put_back(&mut self, closed: &[PortConfig]) {
        for p in &mut self.ports {
            if let Err(e) = p.trace(&p.config.clone(), Before::Kept) {
                tracing::error!("{e}; nothing is written until the next reload");
            }
        }
        for old in closed {
            match self.open_missing(std::slice::from_ref(old)) {
                Ok(port) => self.ports.extend(port),
                Err(e) => tracing::error!("{e}; the port is closed until the next reload"),
            }
        }
        if let Err(e) = self.shared.fdb.set_static(&ports::static_entries(&self.numbered())) {
            tracing::error!("static addresses are not as they were: {e}");
        }
        self.republish();
    }

    fn check_restart(&self, new: &Config) -> Result<(), ApplyError> {
        if new.ports.len() > MAX_PORTS {
            return Err(StartError::from(PlanError::TooManyPorts(new.ports.len())).into());
        }
        let (a, b) = (&self.config.switch, &new.switch);
        let keys = [
            ("workers", a.workers != b.workers),
            ("housekeeping", a.housekeeping != b.housekeeping),
            ("fdb_size", a.fdb_size != b.fdb_size),
            ("confine_files", a.confine_files != b.confine_files),
        ];
        let changed: Vec<&str> = keys.iter().filter(|k| k.1).map(|k| k.0).collect();
        if changed.is_empty() { Ok(()) } else { Err(ApplyError::NeedsRestart(changed.join(", "))) }
    }
}

fn free_number(taken: &[u16]) -> u16 {
    (0..u16::MAX).find(|n| !taken.contains(n)).unwrap_or_default()
}
