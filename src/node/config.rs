//! A node's file: `[host]`, `[[nic]]`, `[switch]`, `[[port]]` and `[[vm]]` in one document.
//!
//! Owns the keys of `[host]` and `[[nic]]`; what the parts mean together is `together`, what they mean by themselves is for
//! the crates that own them. Finds all problems in one pass; changes nothing.

use std::ops::Range;
use std::path::{Path, PathBuf};

use control::client;
use host::doctor::Needs;
use host::pci::{self, Bdf, bind};
use host::plan::Plan;
use host::topology::{self, CoreSet, HugePool};
use host::tune::Division;
use host::tune::profile::Profile;
use settings::values::Bounded;
use settings::{
    ConfigErrors, DeTable, DeValue, Problems, Spanned, keys, nested, plain, suggestion, text, words,
};
use switch::config::ThisMachine;
use switch::control::report::PortsReport;
use vmm::preflight::Preflight;

use super::cores::{CoresKeys, Planner};
use super::planned::Planned;
use super::state::State;
use crate::output;

/// A whole node.
pub(super) struct Node {
    /// The file.
    pub(super) file: PathBuf,
    /// `[host]`.
    pub(super) host: Host,
    /// `[[nic]]`.
    pub(super) nics: Vec<Nic>,
    /// `[switch]` and `[[port]]`.
    pub(super) switch: switch::config::Config,
    /// `[[vm]]`, with different names.
    pub(super) machines: Vec<vmm::config::Config>,
    /// Who runs on which core, as far as the file leaves that open.
    pub(super) cores: Option<Plan>,
}

/// `[host]`.
#[derive(Clone, Debug)]
pub(super) struct Host {
    /// Huge pages that there must be.
    pub(super) pools: Vec<Pool>,
    /// What becomes of a machine that ended.
    pub(super) restart: Restart,
    /// The kernel's knobs, for the cores of workers and vCPUs.
    pub(super) tuning: Option<Tuning>,
}

/// Knobs that are set while the node is up.
#[derive(Clone, Debug)]
pub(super) struct Tuning {
    /// As the file names it.
    pub(super) name: String,
    /// Which.
    pub(super) profile: Profile,
    /// For which cores.
    pub(super) division: Division,
    /// Where it is saved what they held.
    pub(super) saved: PathBuf,
}

/// One of `huge_pages`.
#[derive(Clone, Debug)]
pub(super) struct Pool {
    /// Memory node.
    pub(super) node: u32,
    /// Bytes of a page.
    pub(super) page_size: u64,
    /// At least so many.
    pub(super) pages: u64,
}

/// One `[[nic]]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Nic {
    /// Which.
    pub(super) device: Bdf,
    /// Whether it goes to vfio-pci.
    pub(super) bind: bool,
    /// Virtual functions that it gets.
    pub(super) vfs: Option<u16>,
    /// Whether it is taken even if it is in use.
    pub(super) force: bool,
}

words! {
    /// What becomes of a machine that ended.
    Restart {
        /// It is started again if it did not end by itself with success.
        OnFailure = "on-failure",
        /// It is started again.
        Always = "always",
        /// Nothing.
        Never = "never",
    }

    /// What huge pages there are.
    HugePageSize {
        /// 2 MiB.
        Huge2M = "2M",
        /// 1 GiB.
        Huge1G = "1G",
    }
}

text! {
    /// A PCI function.
    Device(Bdf), "a PCI address like \"0000:01:00.0\"", |text: &str| text.parse::<Bdf>().map_err(|e| e.to_string());
}

plain!(Restart, HugePageSize, Device);

keys! {
    /// `[host]`.
    HostKeys in "[host]" {
        /// Huge pages that there must be.
        huge_pages: Vec<Spanned<PoolKeys>>,
        /// How many cores, or which, for what; what of `[switch]` and `[[vm]]` is left open is chosen.
        cores: CoresKeys,
        /// What becomes of a machine that ended.
        restart: Restart,
        /// A tuning profile: `nfv`, `realtime`, or a file.
        profile: String,
    }
}

keys! {
    /// One of `huge_pages`.
    PoolKeys in "`huge_pages`" {
        /// Memory node.
        node: Bounded<0, 1_023>,
        /// Size of a page.
        size: HugePageSize,
        /// How many.
        pages: Bounded<1, 16_777_216>,
    }
}

keys! {
    /// `[[nic]]`.
    NicKeys in "[[nic]]" {
        /// Which.
        device: Device,
        /// Whether it goes to vfio-pci.
        bind: bool,
        /// Virtual functions that it gets.
        vfs: Bounded<0, 256>,
        /// Whether it is taken even if it is in use.
        force: bool,
    }
}

nested!(PoolKeys);

/// What a node's file asks of the machine. Read leniently: `cableway up --plan` says what is wrong with it, a doctor is asked when
/// something does not work.
///
/// # Errors
/// It cannot be read, or is no TOML.
pub(super) fn needs(file: &Path) -> Result<(Needs, Option<ConfigErrors>), ConfigErrors> {
    let text = settings::read_file(file)?;
    let planned = settings::parse(&text, file, |document, problems| {
        let decided = Planner::now().fills(document, problems);
        Some(needs_of(&settings::filled(document, &decided)))
    });
    match planned {
        Ok(needs) => Ok((needs, None)),
        // A file that can be read, whose cores this machine does not have: everything else can be judged.
        Err(errors) => {
            let needs = settings::parse(&text, file, |document, _| Some(needs_of(document)))?;
            Ok((Needs { busy_cores: CoreSet::default(), ..needs }, Some(errors)))
        }
    }
}

fn needs_of(document: &DeTable<'_>) -> Needs {
    let tables =
        |name: &str| document.get(name).and_then(|list| list.get_ref().as_array()).into_iter().flatten();
    let numbers = |value: Option<&Spanned<DeValue<'_>>>| -> Vec<u32> {
        let list = value.and_then(|list| list.get_ref().as_array()).into_iter().flatten();
        list.filter_map(|n| n.get_ref().as_integer()?.to_string().parse().ok()).collect()
    };
    let mut busy = numbers(document.get("switch").and_then(|switch| switch.get_ref().get("workers")));
    busy.extend(tables("vm").flat_map(|machine| numbers(machine.get_ref().get("vcpu_cores"))));
    let is_nic = |port: &Spanned<DeValue<'_>>| {
        port.get_ref().get("kind").is_some_and(|kind| kind.get_ref().as_str() == Some("nic"))
    };
    let passed = tables("vm").flat_map(|machine| {
        machine.get_ref().get("pci").and_then(|list| list.get_ref().as_array()).into_iter().flatten()
    });
    // A virtual function that is not made yet is where its adapter is, which is named as well.
    let devices: Vec<Bdf> = tables("nic")
        .chain(tables("port").filter(|port| is_nic(port)))
        .chain(passed)
        .filter_map(|table| table.get_ref().get("device")?.get_ref().as_str()?.parse().ok())
        .collect();
    let real_time = |machine: &Spanned<DeValue<'_>>| machine.get_ref().get("vcpu_priority").is_some();
    Needs {
        busy_cores: busy.into_iter().collect(),
        cards: !devices.is_empty() || tables("nic").next().is_some() || tables("port").any(is_nic),
        devices,
        machines: tables("vm").next().is_some(),
        real_time: tables("vm").any(real_time),
    }
}

impl Node {
    /// Reads and validates a file on this machine. `found` is a node of this file whose supervisor is gone: what it holds is no
    /// obstacle.
    ///
    /// # Errors
    /// Everything that is wrong.
    pub(super) fn load(file: &Path, run_dir: &Path, found: Option<&State>) -> Result<Self, ConfigErrors> {
        let text = settings::read_file(file)?;
        let ports =
            found.and_then(|_| client::get::<PortsReport>(&switch::control::door(run_dir), "/v1/ports").ok());
        let ours = ports.iter().flat_map(|answer| &answer.value.ports);
        let ours = ours.filter_map(|port| Some(port.socket.clone()?.into())).collect();
        let machine = ThisMachine::now().listening_on(ours);
        settings::parse(&text, file, |document, problems| {
            let decided = Planner::now().decide(document, problems);
            let document = &settings::filled(document, &decided.fills);
            Reader { document, file, run_dir, found, problems }.node(machine, decided.plan)
        })
    }
}

/// Whether a `[[nic]]` goes to vfio-pci.
fn binds(nic: &DeTable<'_>) -> bool {
    nic.get("bind").is_none_or(|bind| bind.get_ref().as_bool() != Some(false))
}

/// Reads one document.
pub(super) struct Reader<'a, 'd, 't> {
    document: &'a DeTable<'d>,
    file: &'a Path,
    pub(super) run_dir: &'a Path,
    pub(super) found: Option<&'a State>,
    pub(super) problems: &'a mut Problems<'t>,
}

/// One `[[vm]]` and its table, for the places of its keys.
pub(super) struct Machine<'a, 'd> {
    pub(super) config: vmm::config::Config,
    table: &'a DeTable<'d>,
    at: Range<usize>,
}

impl Machine<'_, '_> {
    /// Where `key` is, or the whole machine.
    pub(super) fn at(&self, key: &str) -> Range<usize> {
        self.table.get_key_value(key).map_or_else(|| self.at.clone(), |(key, _)| key.span())
    }

    /// Where `key` is in table number `n` of the list `name`, or the list, or the whole machine.
    pub(super) fn at_in(&self, name: &str, n: usize, key: &str) -> Range<usize> {
        let tables = self.table.get(name).and_then(|list| list.get_ref().as_array());
        let table = tables.and_then(|list| list.get(n)).and_then(|table| table.get_ref().as_table());
        table.and_then(|table| table.get_key_value(key)).map_or_else(|| self.at(name), |(key, _)| key.span())
    }
}

impl<'a, 'd> Reader<'a, 'd, '_> {
    fn node(mut self, machine: ThisMachine, cores: Option<Plan>) -> Option<Node> {
        let known = ["host", "nic", "switch", "port", "vm"];
        for key in self.document.keys().filter(|key| !known.contains(&key.get_ref().as_ref())) {
            // The switch's own reading complains about it as well, but does not know what else a node has.
            let hint = suggestion(key.get_ref(), &known);
            self.problems.add(key.span(), format!("unknown key `{}`; {hint}", key.get_ref()));
        }
        let host = self.host();
        let nics = self.nics();
        let part = self.document.iter().filter(|(key, _)| known.contains(&key.get_ref().as_ref()));
        let part: DeTable<'d> = part.map(|(key, value)| (key.clone(), value.clone())).collect();
        // Those that are not there or cannot be taken were complained about already.
        let cards = self
            .tables("nic")
            .into_iter()
            .filter(|(_, table)| binds(table))
            .filter_map(|(_, table)| table.get("device")?.get_ref().as_str()?.parse().ok());
        let planned = Planned { now: machine, cards: cards.collect() };
        let switch =
            switch::config::Config::of_document(&part, self.file, self.run_dir, &planned, self.problems);
        let machines = self.machines();
        self.names(&machines);
        self.cores(switch.as_ref(), &machines);
        self.sockets(switch.as_ref(), &machines);
        self.functions(switch.as_ref(), &planned.cards, &nics, &machines);
        self.addresses(&machines);
        self.pages(&host, &machines);
        for machine in &machines {
            for (key, error) in Preflight::problems_besides_memory(&machine.config) {
                self.add(machine, key, &error);
            }
        }
        let machines = machines.into_iter().map(|machine| machine.config).collect();
        Some(Node { file: self.file.to_owned(), host, nics, switch: switch?, machines, cores })
    }

    fn host(&mut self) -> Host {
        let keys = match self.document.get_key_value("host").map(|(key, value)| (key, value.get_ref())) {
            None => HostKeys::default(),
            Some((_, DeValue::Table(table))) => HostKeys::table("", table, self.problems),
            Some((key, _)) => {
                self.problems.add(key.span(), "`host` is a table: write `[host]`");
                HostKeys::default()
            }
        };
        let mut pools = Vec::new();
        let there = topology::huge_pools(Path::new("/"));
        for pool in keys.huge_pages.into_iter().flat_map(Spanned::into_inner) {
            let (at, keys) = (pool.span(), pool.into_inner());
            let (Some(size), Some(pages)) = (&keys.size, &keys.pages) else {
                keys.wrong.or_missing("size", at.clone(), "`size = \"2M\"` or `\"1G\"`", self.problems);
                keys.wrong.or_missing("pages", at, "how many, as in `pages = 512`", self.problems);
                continue;
            };
            let node = keys.node.as_ref().map_or(0, |node| node.get_ref().get());
            let page_size = match size.get_ref() {
                HugePageSize::Huge2M => 2 << 20,
                HugePageSize::Huge1G => 1 << 30,
            };
            let pages = pages.get_ref().get();
            if !there.iter().any(|pool| (pool.node, pool.page_size) == (node, page_size)) {
                let (word, message) = (size.get_ref().word(), "huge pages, this machine has pools");
                let pool = |p: &HugePool| format!("{} on node {}", output::bytes(p.page_size), p.node);
                let all: Vec<_> = there.iter().map(pool).collect();
                self.problems
                    .add(at, format!("memory node {node} has no {word} {message}: {}", all.join(", ")));
                continue;
            }
            pools.push(Pool { node, page_size, pages });
        }
        let tuning = keys.profile.and_then(|name| self.tuning(&name.span(), name.get_ref()));
        Host { pools, restart: keys.restart.map_or(Restart::OnFailure, Spanned::into_inner), tuning }
    }

    /// What a profile sets for the cores of this node's workers and vCPUs.
    fn tuning(&mut self, at: &Range<usize>, name: &str) -> Option<Tuning> {
        let busy = needs_of(self.document).busy_cores;
        let made =
            topology::online_cores(Path::new("/")).map_err(|error| error.to_string()).and_then(|online| {
                let profile = Profile::load(name).map_err(|error| error.to_string())?;
                let division = Division::new(busy, &online).map_err(|error| error.to_string())?;
                Ok(Tuning { name: name.to_owned(), profile, division, saved: self.run_dir.join("tune.json") })
            });
        made.map_err(|error| self.problems.add(at.clone(), format!("`profile`: {error}"))).ok()
    }

    fn nics(&mut self) -> Vec<Nic> {
        let tables = self.tables("nic");
        let mut nics: Vec<(Nic, Range<usize>)> = Vec::new();
        for (at, table) in tables {
            let keys = NicKeys::table("", table, self.problems);
            let Some(device) = keys.device else {
                keys.wrong.or_missing("device", at, "as in `device = \"0000:01:00.0\"`", self.problems);
                continue;
            };
            let (at, device) = (device.span(), device.into_inner().0);
            if nics.iter().any(|(other, _)| other.device == device) {
                self.problems.add(at, format!("[[nic]]: {device} is there already"));
                continue;
            }
            let nic = Nic {
                device,
                bind: keys.bind.is_none_or(Spanned::into_inner),
                vfs: keys.vfs.map(|vfs| vfs.get_ref().get()),
                force: keys.force.is_some_and(Spanned::into_inner),
            };
            nics.push((nic, at));
        }
        let root = Path::new("/");
        let along: Vec<Bdf> = nics.iter().filter(|(nic, _)| nic.bind).map(|(nic, _)| nic.device).collect();
        for (nic, at) in &nics {
            let bdf = nic.device;
            let Some(function) = pci::find(root, bdf) else {
                self.problems.add(at.clone(), bind::BindError::Unknown(bdf).to_string());
                continue;
            };
            let bound = function.driver.as_deref() == Some("vfio-pci");
            if let Err(error) = bind::check(root, bdf, &along, nic.force)
                && nic.bind
                && !bound
            {
                self.problems.add(at.clone(), error.to_string());
            }
            if let Some(vfs) = nic.vfs {
                let (most, now) = (function.most_virtuals.unwrap_or(0), function.virtuals.len());
                if vfs > most {
                    self.problems.add(
                        at.clone(),
                        format!("`vfs`: {bdf} can have {most} virtual functions, not {vfs}"),
                    );
                } else if now > 0 && now != usize::from(vfs) {
                    let fix = format!("cableway nic vfs {bdf} 0 removes them");
                    self.problems
                        .add(at.clone(), format!("`vfs`: {bdf} has {now} virtual functions already; {fix}"));
                }
            }
        }
        nics.into_iter().map(|(nic, _)| nic).collect()
    }

    fn machines(&mut self) -> Vec<Machine<'a, 'd>> {
        let mut machines = Vec::new();
        for (at, table) in self.tables("vm") {
            let config = vmm::config::Config::of_table(table, &at, self.file, self.run_dir, self.problems);
            machines.extend(config.map(|config| Machine { config, table, at }));
        }
        machines
    }

    /// The tables of a list, each with the place of its header.
    pub(super) fn tables(&mut self, name: &str) -> Vec<(Range<usize>, &'a DeTable<'d>)> {
        match self.document.get_key_value(name).map(|(key, value)| (key, value.get_ref())) {
            None => Vec::new(),
            Some((_, DeValue::Array(tables))) if tables.iter().all(|table| table.get_ref().is_table()) => {
                tables.iter().filter_map(|t| Some((t.span(), t.get_ref().as_table()?))).collect()
            }
            Some((key, _)) => {
                self.problems.add(key.span(), format!("a list of tables: write `[[{name}]]` before each"));
                Vec::new()
            }
        }
    }

    /// Says what is wrong with a machine's key.
    pub(super) fn add(&mut self, machine: &Machine<'_, '_>, key: &str, message: impl std::fmt::Display) {
        self.add_at(machine, machine.at(key), message);
    }

    /// Says what is wrong at a place of a machine's table.
    pub(super) fn add_at(
        &mut self,
        machine: &Machine<'_, '_>,
        at: Range<usize>,
        message: impl std::fmt::Display,
    ) {
        self.problems.add(at, format!("machine `{}`: {message}", machine.config.name));
    }
}
