//! Core plans: who runs on which core, from how many cores are wanted for what.
//!
//! Owns the choice: workers beside the cards, vCPUs beside their memory, and nobody on the other thread of a core that polls.
//! Decides the same whenever it is asked the same of the same machine. Pins nothing.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;

use crate::machine::{Core, Machine};
use crate::topology::CoreSet;

/// Cores that are wanted: so many, or these.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// So many; the plan chooses.
    Count(u32),
    /// These, whatever the plan thinks of them.
    These(Vec<u32>),
}

/// What a plan is made for.
#[derive(Clone, Debug)]
pub struct Request {
    /// For everything that is neither a worker nor a vCPU.
    pub housekeeping: Wanted,
    /// For workers of the switch.
    pub workers: Wanted,
    /// What workers should be near to: cards, with their nodes.
    pub near: Vec<Near>,
    /// The machines, in the order in which they choose.
    pub guests: Vec<Guest>,
    /// Cores that others were given by name: no poller gets them.
    pub held: CoreSet,
}

/// Something that workers should be near to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Near {
    /// What it is called.
    pub name: String,
    /// Its memory node.
    pub node: u32,
}

/// A machine whose vCPUs want cores of their own.
#[derive(Clone, Debug)]
pub struct Guest {
    /// What it is called.
    pub name: String,
    /// How many vCPUs it has.
    pub vcpus: u32,
    /// How many of them are threads of one core, for the guest.
    pub threads: u32,
    /// The memory node of its memory.
    pub node: Option<u32>,
    /// These, whatever the plan thinks of them; `None`: the plan chooses.
    pub cores: Option<Vec<u32>>,
}

/// Who runs where.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Cores for everything else.
    pub housekeeping: Vec<u32>,
    /// Cores of workers.
    pub workers: Vec<u32>,
    /// Cores of each guest's vCPUs.
    pub guests: Vec<Vec<u32>>,
    /// Why each core has what it has, or is left idle.
    pub why: BTreeMap<u32, String>,
}

/// What a problem is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Cores for everything else.
    Housekeeping,
    /// Cores of workers.
    Workers,
    /// Cores of the vCPUs of this guest.
    Guest(usize),
}

/// Why there is no such plan.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct PlanError {
    /// What it is about.
    pub part: Part,
    /// What is wrong, and what to do.
    pub message: String,
}

/// Plans. `permitted`: the cores that this process may use.
///
/// # Errors
/// Everything that keeps it from being done.
pub fn plan(machine: &Machine, permitted: &CoreSet, request: &Request) -> Result<Plan, Vec<PlanError>> {
    let mut planner = Planner::new(machine, permitted, request);
    planner.named();
    planner.first_housekeeping();
    planner.workers();
    planner.more_housekeeping();
    for (n, guest) in request.guests.iter().enumerate() {
        planner.guest(n, guest);
    }
    planner.idle_threads();
    if planner.errors.is_empty() { Ok(planner.plan) } else { Err(planner.errors) }
}

/// What a core has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    /// Something that shares it with others.
    Shared,
    /// Something that polls, or a vCPU.
    Alone,
}

struct Planner<'a> {
    machine: &'a Machine,
    permitted: &'a CoreSet,
    request: &'a Request,
    used: BTreeMap<u32, Use>,
    plan: Plan,
    errors: Vec<PlanError>,
}

impl<'a> Planner<'a> {
    fn new(machine: &'a Machine, permitted: &'a CoreSet, request: &'a Request) -> Self {
        let used = request.held.iter().map(|core| (core, Use::Shared)).collect();
        let plan = Plan { guests: vec![Vec::new(); request.guests.len()], ..Plan::default() };
        Self { machine, permitted, request, used, plan, errors: Vec::new() }
    }

    fn error(&mut self, part: Part, message: String) {
        self.errors.push(PlanError { part, message });
    }

    fn give(&mut self, core: u32, what: Use, why: String) {
        self.used.insert(core, what);
        self.plan.why.insert(core, why);
    }

    /// Those that the file names: whoever chooses chooses among the others.
    fn named(&mut self) {
        let request = self.request;
        let mut lists = vec![(Part::Housekeeping, Use::Shared, &request.housekeeping)];
        lists.push((Part::Workers, Use::Alone, &request.workers));
        let guests: Vec<(Part, Wanted)> = (request.guests.iter().enumerate())
            .filter_map(|(n, guest)| Some((Part::Guest(n), Wanted::These(guest.cores.clone()?))))
            .collect();
        lists.extend(guests.iter().map(|(part, wanted)| (*part, Use::Alone, wanted)));
        for (part, what, wanted) in lists {
            let Wanted::These(cores) = wanted else { continue };
            for core in cores {
                self.name(part, what, *core);
            }
            match part {
                Part::Housekeeping => self.plan.housekeeping.clone_from(cores),
                Part::Workers => self.plan.workers.clone_from(cores),
                Part::Guest(n) => self.plan.guests[n].clone_from(cores),
            }
        }
    }

    fn name(&mut self, part: Part, what: Use, core: u32) {
        if !self.machine.cores.contains_key(&core) {
            let online: CoreSet = self.machine.cores.keys().copied().collect();
            return self
                .error(part, format!("core {core} does not exist or is offline; this machine has {online}"));
        }
        if !self.permitted.contains(core) {
            let permitted = self.permitted;
            let message =
                format!("core {core} is not permitted to this process (taskset, cpuset), {permitted} are");
            return self.error(part, message);
        }
        match self.used.get(&core) {
            Some(Use::Shared) if what == Use::Shared => {}
            Some(_) => self.error(
                part,
                format!("core {core} is given to two; a core that polls or runs a vCPU has one task"),
            ),
            None => {}
        }
        self.give(core, what, "named in the file".to_owned());
    }

    /// Before anybody else chooses: where the kernel does its own work, and the other threads there, which no poller can have.
    fn first_housekeeping(&mut self) {
        let Wanted::Count(count) = self.request.housekeeping else { return };
        let free =
            |core: &&Core| !self.used.contains_key(&core.number) && self.permitted.contains(core.number);
        // Those that were taken from the scheduler run nothing that is not put there: the worst place for everything else.
        let first = self.machine.cores.values().filter(free).min_by_key(|core| (core.isolated, core.number));
        let Some(first) = first else {
            return self.error(Part::Housekeeping, self.short("housekeeping", count, 0, ""));
        };
        let threads: Vec<u32> = std::iter::once(first.number).chain(first.threads.iter()).collect();
        for core in threads {
            let there = self.plan.housekeeping.len() as u32;
            if there < count && !self.used.contains_key(&core) && self.permitted.contains(core) {
                let why = if there == 0 {
                    "the first core that is not isolated".to_owned()
                } else {
                    format!("a thread of core {}", self.plan.housekeeping[0])
                };
                self.give(core, Use::Shared, why);
                self.plan.housekeeping.push(core);
            }
        }
    }

    /// The rest of it, from what the workers left.
    fn more_housekeeping(&mut self) {
        let Wanted::Count(count) = self.request.housekeeping else { return };
        let Some(first) = self.plan.housekeeping.first().copied() else { return };
        let node = self.machine.cores.get(&first).map_or(0, |core| core.node);
        while (self.plan.housekeeping.len() as u32) < count {
            // Threads beside a poller are left idle; those of housekeeping are used before another core is opened.
            let best = self
                .machine
                .cores
                .values()
                .filter(|core| !self.used.contains_key(&core.number) && self.permitted.contains(core.number))
                .filter(|core| core.threads.iter().all(|thread| self.used.get(&thread) != Some(&Use::Alone)))
                .min_by_key(|core| {
                    let opened = core.threads.iter().any(|thread| self.used.contains_key(&thread));
                    (core.isolated, self.machine.distance(node, core.node), !opened, core.number)
                });
            let Some(core) = best.map(|core| core.number) else {
                let got = self.plan.housekeeping.len() as u32;
                return self.error(Part::Housekeeping, self.short("housekeeping", count, got, ""));
            };
            self.give(core, Use::Shared, format!("beside core {first}"));
            self.plan.housekeeping.push(core);
        }
    }

    fn workers(&mut self) {
        let Wanted::Count(count) = self.request.workers else { return };
        let of_guests = self.request.guests.iter().find_map(|guest| {
            let node = guest.node?;
            Some(Near { name: format!("the memory of {}", guest.name), node })
        });
        let first = self.plan.housekeeping.first().and_then(|core| self.machine.cores.get(core));
        let fallback = of_guests.unwrap_or_else(|| {
            let node = first.map_or(0, |core| core.node);
            Near { name: "housekeeping, as no card says where it is".to_owned(), node }
        });
        let near =
            if self.request.near.is_empty() { std::slice::from_ref(&fallback) } else { &self.request.near };
        // Each node with a card gets a worker before any gets its second one.
        let mut nodes: Vec<&Near> = Vec::new();
        for card in near {
            if nodes.iter().all(|other| other.node != card.node) {
                nodes.push(card);
            }
        }
        let all = |node: u32| {
            let names: Vec<&str> = near.iter().filter(|n| n.node == node).map(|n| n.name.as_str()).collect();
            names.join(", ")
        };
        for (n, beside) in (0..count).zip(nodes.iter().cycle()) {
            let cache =
                self.plan.workers.last().and_then(|core| self.machine.cores.get(core)).map(Core::cache_group);
            let Some(core) = self.best_whole(beside.node, cache) else {
                return self.error(Part::Workers, self.short("workers", count, n, ""));
            };
            let of_core = self.machine.cores.get(&core).map_or(0, |core| core.node);
            let why = if of_core == beside.node {
                format!("node {of_core}, beside {}", all(beside.node))
            } else {
                format!("node {of_core}: node {} of {} has no core left", beside.node, all(beside.node))
            };
            self.give(core, Use::Alone, why);
            self.plan.workers.push(core);
        }
    }

    fn guest(&mut self, n: usize, guest: &Guest) {
        if guest.cores.is_some() {
            return;
        }
        let worker = self.plan.workers.first().and_then(|core| self.machine.cores.get(core));
        let beside = worker.map_or(0, |core| core.node);
        // All vCPUs of a machine on one node, the nearest to its memory or else to the workers that has room for all.
        let near = guest.node.unwrap_or(beside);
        let mut nodes: Vec<u32> = self.machine.nodes.keys().copied().collect();
        nodes.sort_by_key(|node| (self.machine.distance(near, *node), *node));
        let room =
            |node: &&u32| self.whole_on(**node).count() as u32 * self.fits(**node, guest) >= guest.vcpus;
        let node = nodes.iter().find(room).copied().unwrap_or(near);
        let cache = worker.filter(|worker| worker.node == node).map(Core::cache_group);
        let mut left = guest.vcpus;
        while left > 0 {
            let Some(core) = self.best_whole(node, cache) else {
                let what = format!("the vCPUs of {}", guest.name);
                let got = guest.vcpus - left;
                return self.error(Part::Guest(n), self.short(&what, guest.vcpus, got, "fewer `vcpus`, or "));
            };
            let (of_core, threads) = self
                .machine
                .cores
                .get(&core)
                .map_or((0, vec![core]), |c| (c.node, c.threads.iter().collect()));
            let why = match guest.node {
                Some(memory) if memory == of_core => format!("node {of_core}, its memory's"),
                Some(memory) => format!("node {of_core}: node {memory} of its memory has no core left"),
                None if of_core == beside => format!("node {of_core}, the workers'"),
                None => format!("node {of_core}: node {beside} of the workers has too few cores left"),
            };
            let together = if guest.threads as usize == threads.len() { guest.threads.min(left) } else { 1 };
            for thread in threads.iter().take(together as usize) {
                let why = if *thread == core {
                    why.clone()
                } else {
                    format!("the other thread of core {core}, as in the guest")
                };
                self.give(*thread, Use::Alone, why);
                self.plan.guests[n].push(*thread);
            }
            left -= together;
        }
    }

    /// How many vCPUs of `guest` a physical core of `node` takes.
    fn fits(&self, node: u32, guest: &Guest) -> u32 {
        let threads = self.whole_on(node).map(|core| core.threads.len() as u32).min().unwrap_or(1);
        if guest.threads == threads { threads } else { 1 }
    }

    /// Physical cores of a node that nobody has a thread of, by their first threads.
    fn whole_on(&self, node: u32) -> impl Iterator<Item = &Core> {
        self.whole().filter(move |core| core.node == node)
    }

    fn whole(&self) -> impl Iterator<Item = &Core> {
        self.machine.cores.values().filter(|core| {
            let free = |thread| !self.used.contains_key(&thread) && self.permitted.contains(thread);
            core.threads.iter().all(free) && core.threads.iter().next() == Some(core.number)
        })
    }

    /// The best core of its own near `node`, and near `cache` if that makes no other difference.
    fn best_whole(&self, node: u32, cache: Option<u32>) -> Option<u32> {
        let far = |core: &Core| self.machine.distance(core.node, node);
        let elsewhere = |core: &Core| cache.is_some_and(|cache| core.cache_group() != cache);
        let best = self
            .whole()
            .min_by_key(|core| (core.node != node, far(core), !core.isolated, elsewhere(core), core.number));
        best.map(|core| core.number)
    }

    /// Threads beside a poller, which nobody may have.
    fn idle_threads(&mut self) {
        for core in self.machine.cores.values() {
            let busy = core.threads.iter().find(|thread| self.used.get(thread) == Some(&Use::Alone));
            if let (Some(busy), None) = (busy, self.used.get(&core.number)) {
                self.plan.why.insert(core.number, format!("left idle: the other thread of core {busy}"));
            }
        }
    }

    fn short(&self, what: &str, wanted: u32, got: u32, besides: &str) -> String {
        let cores = self.machine.cores.len();
        let threads = self.machine.cores.values().any(|core| core.threads.len() > 1);
        let of_threads =
            if threads { ", of which a poller takes both threads of a physical one" } else { "" };
        let permitted = if self.permitted.len() < cores {
            format!(", {} permitted to this process", self.permitted)
        } else {
            String::new()
        };
        Short { what, wanted, got, cores, of_threads, permitted, besides }.to_string()
    }
}

struct Short<'s> {
    what: &'s str,
    wanted: u32,
    got: u32,
    cores: usize,
    of_threads: &'static str,
    permitted: String,
    besides: &'s str,
}

impl fmt::Display for Short<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, wanted, got, cores, of_threads, permitted, besides } = self;
        write!(
            f,
            "{wanted} cores for {what} are wanted, and {got} can be had: this machine has {cores}{of_threads}{permitted}; ask for {besides}fewer, or name them in a list"
        )
    }
}
