//! A node's file: `[host]`, `[[nic]]`, `[switch]`, `[[port]]` and `[[vm]]` in one document.
//!
//! Owns the keys of `[host]` and `[[nic]]`, and what the parts mean together: cores, pages, sockets and addresses that only one
//! of them may have. The switch's and the machines' own keys are judged by the crates that own them. Finds all problems in one
//! pass; changes nothing.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use host::memory::Pages;
use host::pci::{self, Bdf, bind};
use host::topology::{self, HugePool};
use settings::values::Bounded;
use settings::{
    ConfigErrors, DeTable, DeValue, Problems, Spanned, keys, list, nested, plain, suggestion, text, words,
};
use switch::config::{Behind, Side, ThisMachine};
use switch::control::{client, report::PortsReport};
use vmm::config::{NetBack, PageSize};
use vmm::preflight::Preflight;

use super::planned::Planned;
use super::state::{Kind, State};
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
}

/// `[host]`.
#[derive(Clone, Debug)]
pub(super) struct Host {
    /// Huge pages that there must be.
    pub(super) pools: Vec<Pool>,
    /// What becomes of a machine that ended.
    pub(super) restart: Restart,
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
        /// What becomes of a machine that ended.
        restart: Restart,
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

impl Node {
    /// Reads and validates a file on this machine. `found` is a node of this file whose supervisor is gone: what it holds is no
    /// obstacle.
    ///
    /// # Errors
    /// Everything that is wrong.
    pub(super) fn load(file: &Path, run_dir: &Path, found: Option<&State>) -> Result<Self, ConfigErrors> {
        let text = settings::read_file(file)?;
        let ports = found.and_then(|_| client::get::<PortsReport>(run_dir, "/v1/ports").ok());
        let ours = ports.iter().flat_map(|answer| &answer.value.ports);
        let ours = ours.filter_map(|port| Some(port.socket.clone()?.into())).collect();
        let machine = ThisMachine::now().listening_on(ours);
        settings::parse(&text, file, |document, problems| {
            Reader { document, file, run_dir, found, problems }.node(machine)
        })
    }
}

/// Whether a `[[nic]]` goes to vfio-pci.
fn binds(nic: &DeTable<'_>) -> bool {
    nic.get("bind").is_none_or(|bind| bind.get_ref().as_bool() != Some(false))
}

/// Reads one document.
struct Reader<'a, 'd, 't> {
    document: &'a DeTable<'d>,
    file: &'a Path,
    run_dir: &'a Path,
    found: Option<&'a State>,
    problems: &'a mut Problems<'t>,
}

/// One `[[vm]]` and its table, for the places of its keys.
struct Machine<'a, 'd> {
    config: vmm::config::Config,
    table: &'a DeTable<'d>,
    at: Range<usize>,
}

impl Machine<'_, '_> {
    /// Where `key` is, or the whole machine.
    fn at(&self, key: &str) -> Range<usize> {
        self.table.get_key_value(key).map_or_else(|| self.at.clone(), |(key, _)| key.span())
    }
}

impl<'a, 'd> Reader<'a, 'd, '_> {
    fn node(mut self, machine: ThisMachine) -> Option<Node> {
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
        self.addresses(&machines);
        self.pages(&host, &machines);
        for machine in &machines {
            for (key, error) in Preflight::problems_besides_memory(&machine.config) {
                self.add(machine, key, &error);
            }
        }
        let machines = machines.into_iter().map(|machine| machine.config).collect();
        Some(Node { file: self.file.to_owned(), host, nics, switch: switch?, machines })
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
        Host { pools, restart: keys.restart.map_or(Restart::OnFailure, Spanned::into_inner) }
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
    fn tables(&mut self, name: &str) -> Vec<(Range<usize>, &'a DeTable<'d>)> {
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
    fn add(&mut self, machine: &Machine<'_, '_>, key: &str, message: impl std::fmt::Display) {
        self.problems.add(machine.at(key), format!("machine `{}`: {message}", machine.config.name));
    }

    fn names(&mut self, machines: &[Machine<'_, '_>]) {
        let mut seen = HashMap::new();
        for machine in machines {
            let name = machine.config.name.as_str();
            if name == "switch" || name == "node" {
                self.add(machine, "name", "the name is taken: logs and `status` call other things so");
            }
            if let Some(line) = seen.insert(name, self.problems.line(&machine.at("name"))) {
                self.add(machine, "name", format!("there is one already, on line {line}"));
            }
        }
    }

    /// A worker's or vCPU's core has one task; emulator threads and housekeeping share theirs.
    fn cores(&mut self, switch: Option<&switch::config::Config>, machines: &[Machine<'_, '_>]) {
        // Whose, for what, alone.
        let mut taken: HashMap<u32, (String, bool)> = HashMap::new();
        if let Some(switch) = switch {
            let workers = switch.switch.workers.iter().map(|core| (*core, ("a worker's".to_owned(), true)));
            let others = switch.switch.housekeeping.iter().flatten();
            let others = others.map(|core| (*core, ("the switch's housekeeping's".to_owned(), false)));
            taken.extend(others.chain(workers));
        }
        for machine in machines {
            let config = &machine.config;
            let mut mine = Vec::new();
            for (key, cores, alone) in
                [("vcpu_cores", &config.vcpu_cores, true), ("emulator_cores", &config.emulator_cores, false)]
            {
                for (n, core) in cores.iter().flatten().enumerate() {
                    match taken.get(core) {
                        Some((whose, theirs)) if alone || *theirs => {
                            self.add(
                                machine,
                                key,
                                format!("`{key}`: core {core} is {whose} already; a core has one task"),
                            );
                        }
                        _ => {
                            let what =
                                if alone { format!("vCPU {n}") } else { "an emulator thread".to_owned() };
                            mine.push((*core, (format!("{what}'s of machine `{}`", config.name), alone)));
                        }
                    }
                }
            }
            taken.extend(mine);
        }
    }

    /// Each card on a back end has a port to itself, and one of both ends listens.
    fn sockets(&mut self, switch: Option<&switch::config::Config>, machines: &[Machine<'_, '_>]) {
        let ports: HashMap<&Path, (&str, bool)> = switch
            .iter()
            .flat_map(|switch| &switch.ports)
            .filter_map(|port| match &port.behind {
                Behind::VhostUser { socket, side } => {
                    Some((socket.as_path(), (port.name.as_str(), matches!(side, Side::Server { .. }))))
                }
                _ => None,
            })
            .collect();
        let mut taken: HashMap<&Path, &str> = HashMap::new();
        for machine in machines {
            for card in &machine.config.net {
                let NetBack::VhostUser(back) = &card.back else { continue };
                let socket = back.socket.as_path();
                let shown = socket.display();
                if let Some(other) = taken.insert(socket, &machine.config.name) {
                    self.add(machine, "net", format!("{shown} is a card's of machine `{other}` already"));
                }
                match ports.get(socket) {
                    Some((port, listens)) if *listens == back.listen => {
                        let (both, other) =
                            if back.listen { ("listen", "client") } else { ("connect", "server") };
                        self.add(
                            machine,
                            "net",
                            format!("port `{port}` and its card both {both} at {shown}; give one `mode = \"{other}\"`"),
                        );
                    }
                    Some(_) => {}
                    // A socket elsewhere may be somebody else's.
                    None if socket.starts_with(self.run_dir) && switch.is_some() => {
                        let sockets: Vec<_> =
                            ports.keys().filter_map(|path| path.file_name()?.to_str()).collect();
                        let there = list(&sockets);
                        self.add(
                            machine,
                            "net",
                            format!("no port has the socket {shown}; ports have {there}"),
                        );
                    }
                    None => {}
                }
            }
        }
    }

    fn addresses(&mut self, machines: &[Machine<'_, '_>]) {
        let mut seen: HashMap<[u8; 6], &str> = HashMap::new();
        for machine in machines {
            for card in &machine.config.net {
                if let Some(other) = seen.insert(card.mac, &machine.config.name)
                    && other != machine.config.name
                {
                    let mac = card.mac.map(|byte| format!("{byte:02x}")).join(":");
                    let fix = "give each card a `mac` of its own";
                    self.add(
                        machine,
                        "net",
                        format!("{mac} is the address of a card of `{other}`, too; {fix}"),
                    );
                }
            }
        }
    }

    /// Whether there will be enough memory for all machines together.
    fn pages(&mut self, host: &Host, machines: &[Machine<'_, '_>]) {
        let mut pools = topology::huge_pools(Path::new("/"));
        for pool in &mut pools {
            let wanted = |p: &&Pool| (p.node, p.page_size) == (pool.node, pool.page_size);
            let more = host.pools.iter().find(wanted).map_or(0, |p| p.pages.saturating_sub(pool.total));
            pool.free += more;
        }
        let mut ordinary = 0;
        for machine in machines {
            let config = &machine.config;
            if self.runs(&config.name) {
                continue;
            }
            let page_size = match config.pages {
                PageSize::Huge2M => 2 << 20,
                PageSize::Huge1G => 1 << 30,
                PageSize::Ordinary | PageSize::Auto => {
                    ordinary += config.memory;
                    continue;
                }
            };
            let mut needed = config.memory / page_size;
            let fits = |pool: &HugePool| {
                pool.page_size == page_size && config.node.is_none_or(|node| node == pool.node)
            };
            let free: u64 = pools.iter().filter(|pool| fits(pool)).map(|pool| pool.free).sum();
            if free < needed {
                let on = config.node.map_or_else(String::new, |node| format!(" on memory node {node}"));
                let (size, word) = (output::bytes(page_size), config.pages.word());
                let node = config.node.unwrap_or(0);
                self.add(
                    machine,
                    "memory",
                    format!(
                        "needs {needed} huge pages of {size}{on}, and {free} are left for it: {} more in [host], `huge_pages = \
                         [{{ node = {node}, size = \"{word}\", pages = … }}]`",
                        needed - free
                    ),
                );
            }
            for pool in pools.iter_mut().filter(|pool| fits(pool)) {
                let taken = needed.min(pool.free);
                pool.free -= taken;
                needed -= taken;
            }
        }
        if let Err(error) =
            usize::try_from(ordinary).map_err(|_| "more than this processor can address".to_owned()).and_then(
                |len| host::memory::check_available(len, Pages::Ordinary, None).map_err(|e| e.to_string()),
            )
            && ordinary > 0
        {
            self.problems.add_general(format!("`memory` of all machines together: {error}"));
        }
    }

    /// Whether a machine runs already, left by a supervisor that is gone.
    fn runs(&self, name: &str) -> bool {
        let children = self.found.iter().flat_map(|state| &state.children);
        children
            .filter(|child| child.kind == Kind::Vm && child.name == name)
            .any(|child| child.process.is_some_and(|process| process.is_alive()))
    }
}
