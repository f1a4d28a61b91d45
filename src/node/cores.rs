//! `[host] cores`, and every `"auto"`: which cores a file leaves open, and what the plan makes of them.
//!
//! Owns the way from a document to a request and from the plan back into the document. `cableway up`, `cableway switch` and
//! `cableway vm` go it alike, on the same machine, so that each of them finds the same cores. Who gets which is `host::plan`.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use host::machine::Machine;
use host::plan::{self, Guest, Near, Part, Plan, Request, Wanted};
use host::topology::{self, CoreSet};
use settings::table::Read;
use settings::values::CoreNumber;
use settings::{DeTable, DeValue, Fill, Problems, Spanned, keys, nested};
use switch::config::Decide;

use super::virtuals;

#[cfg(test)]
mod tests;

keys! {
    /// `cores = { … }` in `[host]`.
    CoresKeys in "`cores`" {
        /// Cores for everything that is neither a worker nor a vCPU: how many, or which.
        housekeeping: Cores,
        /// Cores for the switch's workers: how many, or which.
        workers: Cores,
    }
}

nested!(CoresKeys);

/// `2`, or `[0, 1]`.
#[derive(Debug)]
pub(super) struct Cores(Wanted);

impl Read for Cores {
    fn read(place: &str, value: &Spanned<DeValue<'_>>, problems: &mut Problems<'_>) -> Option<Self> {
        if let Some(list) = value.get_ref().as_array() {
            let empty = list.is_empty().then(|| format!("{place} is empty: say how many, or which"));
            if let Some(message) = empty {
                problems.add(value.span(), message);
                return None;
            }
            return Some(Self(Wanted::These(core_list(place, value, problems)?)));
        }
        let count = value.get_ref().as_integer().and_then(|n| n.to_string().parse().ok());
        let count = count.filter(|count| (1..=4_096).contains(count));
        if count.is_none() {
            problems.add(
                value.span(),
                format!("{place}: wanted how many cores, from 1 to 4096, or a list of them, as in `[0, 1]`"),
            );
        }
        Some(Self(Wanted::Count(count?)))
    }
}

fn core_list(place: &str, value: &Spanned<DeValue<'_>>, problems: &mut Problems<'_>) -> Option<Vec<u32>> {
    let list = Vec::<Spanned<CoreNumber>>::read(place, value, problems)?;
    Some(list.into_iter().map(|core| core.into_inner().get()).collect())
}

/// What was decided.
#[derive(Default)]
pub(super) struct Decided {
    /// For the document.
    pub(super) fills: Vec<Fill>,
    /// Who runs where, if the file leaves that open.
    pub(super) plan: Option<Plan>,
}

/// The machine that plans are made for, read once: whoever is confined later could not read it again.
pub(crate) struct Planner {
    machine: Result<(Machine, CoreSet), String>,
}

impl Planner {
    /// This machine. Ask before the process pins its threads.
    pub(crate) fn now() -> Self {
        let read = || {
            Ok::<_, topology::TopologyError>((
                Machine::read(Path::new("/"))?,
                topology::usable_cores(Path::new("/"))?,
            ))
        };
        Self { machine: read().map_err(|error| error.to_string()) }
    }

    /// For a switch, which asks again whenever it reads its file again.
    pub(crate) fn for_switch() -> Arc<Decide> {
        let planner = Self::now();
        Arc::new(move |document, problems| planner.fills(document, problems))
    }

    /// The values that `document` leaves open. What keeps them from being decided goes to `problems`.
    pub(crate) fn fills(&self, document: &DeTable<'_>, problems: &mut Problems<'_>) -> Vec<Fill> {
        self.decide(document, problems).fills
    }

    pub(super) fn decide(&self, document: &DeTable<'_>, problems: &mut Problems<'_>) -> Decided {
        let mut decided = self.decide_cores(document, problems);
        if let Ok((machine, _)) = &self.machine {
            decided.fills.extend(virtuals::tokens(document, &machine.functions));
        }
        decided
    }

    fn decide_cores(&self, document: &DeTable<'_>, problems: &mut Problems<'_>) -> Decided {
        let Some(open) = Open::of(document, problems) else { return Decided::default() };
        let request = match &self.machine {
            Ok((machine, _)) => open.request(document, machine),
            Err(error) => {
                problems.add_general(error.clone());
                return Decided { fills: open.given_up(), plan: None };
            }
        };
        let planned = match &self.machine {
            Ok((machine, permitted)) => plan::plan(machine, permitted, &request),
            Err(_) => Ok(Plan::default()),
        };
        match planned {
            Ok(plan) => Decided { fills: open.fills(&plan), plan: Some(plan) },
            Err(errors) => {
                for error in errors {
                    let (at, key) = open.place(error.part);
                    problems.add(at, format!("{key}{error}"));
                }
                Decided { fills: open.given_up(), plan: None }
            }
        }
    }
}

/// What a key says.
enum Said {
    /// Nothing; the place is its table's.
    Nothing(Range<usize>),
    /// `"auto"`.
    Auto(Range<usize>),
    /// Cores, or something wrong, which others complain about.
    Other(Range<usize>, Vec<u32>),
}

impl Said {
    fn by(table: &DeTable<'_>, key: &str, at: &Range<usize>) -> Self {
        match table.get(key) {
            None => Self::Nothing(at.clone()),
            Some(value) if value.get_ref().as_str() == Some("auto") => Self::Auto(value.span()),
            Some(value) => {
                let list = value.get_ref().as_array().into_iter().flatten();
                let cores = list.filter_map(|core| core.get_ref().as_integer()?.to_string().parse().ok());
                Self::Other(value.span(), cores.collect())
            }
        }
    }

    fn at(&self) -> &Range<usize> {
        let (Self::Nothing(at) | Self::Auto(at) | Self::Other(at, _)) = self;
        at
    }

    fn list(&self) -> Option<&Vec<u32>> {
        match self {
            Self::Other(_, cores) => Some(cores),
            _ => None,
        }
    }

    fn is_auto(&self) -> bool {
        matches!(self, Self::Auto(_))
    }

    /// Whether the plan decides it; what is left out only where there is a plan for the whole host.
    fn is_open(&self, whole: bool) -> bool {
        self.is_auto() || whole && matches!(self, Self::Nothing(_))
    }
}

/// What a document leaves open.
struct Open {
    /// Whether `[host]` has `cores`.
    whole: bool,
    housekeeping: Option<Spanned<Cores>>,
    workers: Option<Spanned<Cores>>,
    /// `workers` and `housekeeping` of `[switch]`, if there is one.
    switch: Option<(Said, Said)>,
    machines: Vec<OpenMachine>,
}

/// One `[[vm]]`.
struct OpenMachine {
    guest: Guest,
    vcpus: Said,
    emulator: Said,
    /// Cores of its disks' threads.
    disks: Vec<u32>,
}

impl Open {
    /// `None`: nothing is open.
    fn of(document: &DeTable<'_>, problems: &mut Problems<'_>) -> Option<Self> {
        let host = document.get("host").and_then(|host| host.get_ref().as_table());
        let cores = host.and_then(|host| host.get("cores"));
        let keys = cores.and_then(|cores| CoresKeys::read("`cores`", cores, problems)).unwrap_or_default();
        let switch = document.get_key_value("switch").and_then(|(key, table)| {
            let (at, table) = (key.span(), table.get_ref().as_table()?);
            Some((Said::by(table, "workers", &at), Said::by(table, "housekeeping", &at)))
        });
        let list = document.get("vm").and_then(|list| list.get_ref().as_array()).into_iter().flatten();
        let machines: Vec<_> = list.map(OpenMachine::of).collect();
        let open = Self {
            whole: cores.is_some(),
            housekeeping: keys.housekeeping,
            workers: keys.workers,
            switch,
            machines,
        };
        let auto = open.switch.iter().any(|(workers, others)| workers.is_auto() || others.is_auto())
            || open.machines.iter().any(|m| m.vcpus.is_auto() || m.emulator.is_auto());
        let (given, wanted) = (open.switch.as_ref().and_then(|(workers, _)| workers.list()), &open.workers);
        if let (Some(given), Some(wanted)) = (given, wanted) {
            let differ = match &wanted.get_ref().0 {
                Wanted::Count(count) => *count as usize != given.len(),
                Wanted::These(cores) => cores != given,
            };
            if differ {
                problems.add(
                    wanted.span(),
                    "`cores`: `workers` differs from that of [switch]; leave one of the two out",
                );
            }
        }
        (auto || open.whole).then_some(open)
    }

    fn request(&self, document: &DeTable<'_>, machine: &Machine) -> Request {
        let said = |said: Option<&Said>| said.and_then(Said::list).cloned().map(Wanted::These);
        let of_host = |cores: &Option<Spanned<Cores>>| cores.as_ref().map(|cores| cores.get_ref().0.clone());
        let (workers, others) = self.switch.as_ref().map(|(w, h)| (w, h)).unzip();
        let default = Wanted::Count(u32::from(self.switch.is_some()));
        let emulators = self.machines.iter().filter_map(|m| m.emulator.list()).flatten();
        let shared = emulators.chain(self.machines.iter().flat_map(|machine| &machine.disks));
        Request {
            housekeeping: of_host(&self.housekeeping).or_else(|| said(others)).unwrap_or(Wanted::Count(1)),
            workers: said(workers).or_else(|| of_host(&self.workers)).unwrap_or(default),
            near: near(document, machine),
            guests: self.planned().map(|(_, machine)| machine.guest.clone()).collect(),
            held: shared.chain(others.and_then(Said::list).into_iter().flatten()).copied().collect(),
        }
    }

    /// The machines whose vCPUs have cores of their own, with their numbers in the file.
    fn planned(&self) -> impl Iterator<Item = (usize, &OpenMachine)> {
        self.machines.iter().enumerate().filter(|(_, machine)| !matches!(machine.vcpus, Said::Nothing(_)))
    }

    /// The plan, as values for the document.
    fn fills(&self, plan: &Plan) -> Vec<Fill> {
        let mut fills = Vec::new();
        let mut fill = |table, index, key, said: &Said, cores: &[u32]| {
            fills.push(Fill {
                table,
                index,
                within: None,
                key,
                value: Some(format!("{cores:?}")),
                at: said.at().clone(),
            });
        };
        if let Some((workers, others)) = &self.switch {
            if workers.is_open(self.whole) {
                fill("switch", 0, "workers", workers, &plan.workers);
            }
            if others.is_open(self.whole) {
                fill("switch", 0, "housekeeping", others, &plan.housekeeping);
            }
        }
        for ((index, machine), cores) in self.planned().zip(&plan.guests) {
            if machine.vcpus.is_auto() {
                fill("vm", index, "vcpu_cores", &machine.vcpus, cores);
            }
        }
        for (index, machine) in self.machines.iter().enumerate() {
            if machine.emulator.is_open(self.whole) {
                fill("vm", index, "emulator_cores", &machine.emulator, &plan.housekeeping);
            }
        }
        fills
    }

    /// Without a plan: nothing that depends on it, so that the rest can be judged without complaints that follow from it.
    fn given_up(&self) -> Vec<Fill> {
        let mut fills = Vec::new();
        let mut leave_out = |table, index, key, said: &Said, value: Option<&str>| {
            let value = value.map(str::to_owned);
            fills.push(Fill { table, index, within: None, key, value, at: said.at().clone() });
        };
        if let Some((workers, others)) = &self.switch {
            if workers.is_open(self.whole) {
                let first =
                    topology::permitted_cores().ok().and_then(|cores| cores.iter().next()).unwrap_or(0);
                leave_out("switch", 0, "workers", workers, Some(&format!("[{first}]")));
            }
            if others.is_auto() {
                leave_out("switch", 0, "housekeeping", others, None);
            }
        }
        for (index, machine) in self.machines.iter().enumerate() {
            if machine.vcpus.is_auto() {
                leave_out("vm", index, "vcpu_cores", &machine.vcpus, None);
                leave_out("vm", index, "vcpu_priority", &machine.vcpus, None);
            }
            if machine.emulator.is_auto() {
                leave_out("vm", index, "emulator_cores", &machine.emulator, None);
            }
        }
        fills
    }

    /// Where a problem is shown, and what its message begins with.
    fn place(&self, part: Part) -> (Range<usize>, &'static str) {
        let (workers, others) = self.switch.as_ref().map(|(w, h)| (w.at().clone(), h.at().clone())).unzip();
        let of_host = |cores: &Option<Spanned<Cores>>| cores.as_ref().map(Spanned::span);
        match part {
            Part::Workers => (of_host(&self.workers).or(workers).unwrap_or(0..0), "`workers`: "),
            Part::Housekeeping => {
                (of_host(&self.housekeeping).or(others).unwrap_or(0..0), "`housekeeping`: ")
            }
            Part::Guest(n) => {
                let machine = self.planned().nth(n).map(|(_, machine)| machine.vcpus.at().clone());
                (machine.unwrap_or(0..0), "`vcpu_cores`: ")
            }
        }
    }
}

impl OpenMachine {
    fn of(one: &Spanned<DeValue<'_>>) -> Self {
        let (at, empty) = (one.span(), DeTable::new());
        let table = one.get_ref().as_table().unwrap_or(&empty);
        let number = |table: &DeTable<'_>, key: &str| -> Option<u32> {
            table.get(key)?.get_ref().as_integer()?.to_string().parse().ok()
        };
        let topology = table.get("topology").and_then(|topology| topology.get_ref().as_table());
        let part = |key| topology.and_then(|topology| number(topology, key)).unwrap_or(1);
        let product = part("sockets").saturating_mul(part("cores")).saturating_mul(part("threads"));
        let vcpus = Said::by(table, "vcpu_cores", &at);
        let guest = Guest {
            name: table.get("name").and_then(|name| name.get_ref().as_str()).unwrap_or("?").to_owned(),
            // Others complain about more than there may be.
            vcpus: topology.map_or_else(|| number(table, "vcpus").unwrap_or(1), |_| product).min(1_024),
            threads: part("threads"),
            node: number(table, "node"),
            cores: vcpus.list().cloned(),
        };
        let disks = table.get("disk").and_then(|list| list.get_ref().as_array()).into_iter().flatten();
        let of_disk = |disk: &Spanned<DeValue<'_>>| {
            let said = Said::by(disk.get_ref().as_table()?, "iothread_cores", &at);
            said.list().cloned()
        };
        let disks = disks.filter_map(of_disk).flatten().collect();
        Self { guest, vcpus, emulator: Said::by(table, "emulator_cores", &at), disks }
    }
}

/// The cards of a document, each once. Those of `[[nic]]` are among them, so that virtual functions that are made meanwhile
/// change nothing: they are where their adapter is.
fn near(document: &DeTable<'_>, machine: &Machine) -> Vec<Near> {
    let tables =
        |name: &str| document.get(name).and_then(|list| list.get_ref().as_array()).into_iter().flatten();
    let word = |table: &Spanned<DeValue<'_>>, key: &str| -> Option<String> {
        Some(table.get_ref().as_table()?.get(key)?.get_ref().as_str()?.to_owned())
    };
    let mut near: Vec<Near> = Vec::new();
    let ports = tables("port")
        .filter(|port| matches!(word(port, "kind").as_deref(), Some("nic" | "af_packet")))
        .filter_map(|port| word(port, "device"));
    for name in tables("nic").filter_map(|nic| word(nic, "device")).chain(ports) {
        let function = match name.parse() {
            Ok(bdf) => machine.functions.iter().find(|function| function.bdf == bdf),
            Err(_) => machine.functions.iter().find(|function| function.interfaces.contains(&name)),
        };
        if let Some(node) = function.and_then(|function| function.node)
            && near.iter().all(|other| other.name != name)
        {
            near.push(Near { name, node });
        }
    }
    near
}
