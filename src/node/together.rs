//! What the parts of a node mean together: cores, sockets, addresses and memory that only one of them may have.
//!
//! Owns the rules between the switch and its machines. What each part means by itself its own crate has judged.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use host::memory::Pages;
use host::pci::{self, Bdf};
use host::topology::{self, HugePool};
use settings::{DeTable, list};
use switch::config::{Behind, Side};
use vmm::config::{NetBack, PageSize};

use super::config::{Host, Machine, Nic, Pool, Reader};
use super::state::Kind;
use super::virtuals;
use crate::output;

/// A core that a machine's file names.
struct Claim {
    /// Where the file does.
    at: Range<usize>,
    key: &'static str,
    core: u32,
    what: String,
    /// Whether nobody else may be there.
    alone: bool,
}

/// All of a machine's, those that it has alone first.
fn claims(machine: &Machine<'_, '_>) -> Vec<Claim> {
    let config = &machine.config;
    let mut claims = Vec::new();
    let mut add = |at: Range<usize>, key, cores: &Option<Vec<u32>>, alone, what: &dyn Fn(usize) -> String| {
        let cores = cores.iter().flatten().enumerate();
        claims.extend(cores.map(|(n, core)| Claim {
            at: at.clone(),
            key,
            core: *core,
            what: what(n),
            alone,
        }));
    };
    let of_vcpus = |n| format!("vCPU {n}");
    add(machine.at("vcpu_cores"), "vcpu_cores", &config.vcpu_cores, true, &of_vcpus);
    let of_emulator = |_| "an emulator thread".to_owned();
    add(machine.at("emulator_cores"), "emulator_cores", &config.emulator_cores, false, &of_emulator);
    for (n, disk) in config.disk.iter().enumerate() {
        let key = "iothread_cores";
        add(machine.at_in("disk", n, key), key, &disk.iothread_cores, false, &|_| {
            format!("a thread of {}", disk.name)
        });
    }
    claims
}

impl Reader<'_, '_, '_> {
    /// A machine's name is its own, and nobody else's in logs and `status`.
    pub(super) fn names(&mut self, machines: &[Machine<'_, '_>]) {
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

    /// A worker's or vCPU's core has one task; housekeeping, emulator threads and those of disks share theirs.
    pub(super) fn cores(&mut self, switch: Option<&switch::config::Config>, machines: &[Machine<'_, '_>]) {
        // Whose, for what, alone.
        let mut taken: HashMap<u32, (String, bool)> = HashMap::new();
        if let Some(switch) = switch {
            let workers = switch.switch.workers.iter().map(|core| (*core, ("a worker's".to_owned(), true)));
            let others = switch.switch.housekeeping.iter().flatten();
            let others = others.map(|core| (*core, ("the switch's housekeeping's".to_owned(), false)));
            taken.extend(others.chain(workers));
        }
        for machine in machines {
            // Within one machine its own reading has looked.
            let mut mine = HashMap::new();
            for Claim { at, key, core, what, alone } in claims(machine) {
                match taken.get(&core) {
                    Some((whose, theirs)) if alone || *theirs => {
                        let message = format!("`{key}`: core {core} is {whose} already; a core has one task");
                        self.add_at(machine, at, message);
                    }
                    _ => {
                        mine.entry(core).or_insert_with(|| {
                            (format!("{what}'s of machine `{}`", machine.config.name), alone)
                        });
                    }
                }
            }
            taken.extend(mine);
        }
    }

    /// Each card on a back end has a port to itself, and one of both ends listens.
    pub(super) fn sockets(&mut self, switch: Option<&switch::config::Config>, machines: &[Machine<'_, '_>]) {
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

    /// A PCI function has one user, and is with vfio-pci when its machine starts; `cards` are going to be.
    pub(super) fn functions(
        &mut self,
        switch: Option<&switch::config::Config>,
        cards: &[Bdf],
        nics: &[Nic],
        machines: &[Machine<'_, '_>],
    ) {
        let found = pci::list(Path::new("/"));
        let mut ports: HashMap<Bdf, (&str, Option<&str>)> = HashMap::new();
        for port in switch.iter().flat_map(|switch| &switch.ports) {
            let Behind::Nic { bdf, token, vfs, .. } = &port.behind else { continue };
            ports.insert(*bdf, (&port.name, token.as_deref()));
            let made = nics.iter().find(|nic| nic.device == *bdf).and_then(|nic| nic.vfs).map(usize::from);
            let there =
                found.iter().find(|function| function.bdf == *bdf).map(|function| function.virtuals.len());
            let (will, wanted) = (made.or(there).unwrap_or(0), vfs.len());
            if will < wanted && there.is_some() {
                let of = |table: &DeTable<'_>| table.get("name")?.get_ref().as_str().map(str::to_owned);
                let table =
                    self.tables("port").into_iter().find(|(_, table)| of(table).as_ref() == Some(&port.name));
                let at = table.and_then(|(_, table)| Some(table.get("vfs")?.span())).unwrap_or_default();
                let fix = format!("`vfs = {wanted}` in its [[nic]] makes them");
                let message =
                    format!("`vfs` says what {wanted} virtual functions may, and {bdf} has {will}; {fix}");
                self.problems.add(at, format!("port `{}`: {message}", port.name));
            }
        }
        let mut taken: HashMap<Bdf, &str> = HashMap::new();
        for machine in machines {
            for function in &machine.config.pci {
                let bdf = function.device;
                if let Some((port, _)) = ports.get(&bdf) {
                    let fix = "a function has one user: the switch or a machine";
                    self.add(machine, "pci", format!("{bdf} is port `{port}`'s already; {fix}"));
                    continue;
                }
                if let Some(other) = taken.insert(bdf, &machine.config.name) {
                    self.add(
                        machine,
                        "pci",
                        format!("{bdf} is machine `{other}`'s already; a function has one user"),
                    );
                    continue;
                }
                let card = virtuals::card_of(&found, bdf);
                if let Some((port, token)) = card.and_then(|card| ports.get(&card.bdf)) {
                    match (token, &function.vf_token) {
                        (None, _) => self.add(
                            machine,
                            "pci",
                            format!(
                                "{bdf} is a virtual function of port `{port}`'s card: give that port a `vf_token` (uuidgen makes one)"
                            ),
                        ),
                        (Some(token), Some(given)) if !given.eq_ignore_ascii_case(token) => self.add(
                            machine,
                            "pci",
                            format!("`vf_token` of {bdf} is not port `{port}`'s: leave it out, it is taken from there"),
                        ),
                        _ => {}
                    }
                }
                let made = card.is_some_and(|card| {
                    let count =
                        nics.iter().find(|nic| nic.device == card.bdf).and_then(|nic| nic.vfs).unwrap_or(0);
                    (0..count).any(|number| card.virtual_at(number) == Some(bdf))
                });
                if !made
                    && !cards.contains(&bdf)
                    && !self.runs(&machine.config.name)
                    && let Err(error) = host::vfio::check(Path::new("/"), bdf)
                {
                    let fix = card.map_or_else(String::new, |card| {
                        format!(
                            "; it would be a virtual function of {}: `vfs` in its [[nic]] makes some",
                            card.bdf
                        )
                    });
                    self.add(machine, "pci", format!("`pci`: {error}{fix}"));
                }
            }
        }
    }

    /// No address is there twice.
    pub(super) fn addresses(&mut self, machines: &[Machine<'_, '_>]) {
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
    pub(super) fn pages(&mut self, host: &Host, machines: &[Machine<'_, '_>]) {
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
            // Those that may lie anywhere take what is left.
            for (on_node, bytes) in config.memory_by_host_node().into_iter().rev() {
                let mut needed = bytes / page_size;
                let fits = |pool: &HugePool| {
                    pool.page_size == page_size && on_node.is_none_or(|node| node == pool.node)
                };
                let free: u64 = pools.iter().filter(|pool| fits(pool)).map(|pool| pool.free).sum();
                if free < needed {
                    let on = on_node.map_or_else(String::new, |node| format!(" on memory node {node}"));
                    let (size, word) = (output::bytes(page_size), config.pages.word());
                    let node = on_node.unwrap_or(0);
                    let key = if config.numa { "numa" } else { "memory" };
                    self.add(
                        machine,
                        key,
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
