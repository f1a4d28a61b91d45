//! What the keys mean together: defaults, rules between keys, rules between ports.

use std::collections::HashMap;
use std::ops::{Range, RangeInclusive};
use std::path::{Path, PathBuf};
use std::time::Duration;

use settings::values::{CoreNumber, Name};
use settings::{DeTable, DeValue, Problems, Spanned, list, suggestion};

use super::keys::{PortKeys, StaticKeys, StormKeys, SwitchKeys, VlanKeys};
use super::machine::Surroundings;
use super::values::{FrameRate, VlanRange};
use crate::bridge::MAX_PORTS;

use super::{Config, Idle, PortConfig, PortKind, StaticAddress, Storm, SwitchConfig, Vlan};

const BURST: usize = 64;
const FDB_SIZE: usize = 65_536;
const FDB_AGE: Duration = Duration::from_secs(300);
const QUEUE_PAIRS: u16 = 1;
const LEARN_LIMIT: u32 = 4_096;

/// Validates a whole document. `None` when something essential was wrong; with a lesser problem noted, a value that the
/// caller throws away, made so that what depends on it could still be checked.
pub(super) fn document(
    document: &DeTable<'_>,
    file: &Path,
    run_dir: &Path,
    surroundings: &dyn Surroundings,
    problems: &mut Problems<'_>,
) -> Option<Config> {
    let mut switch = None;
    let mut ports = Vec::new();
    let mut has_switch = false;
    for (key, value) in document {
        match (key.get_ref().as_ref(), value.get_ref()) {
            ("switch", DeValue::Table(table)) => {
                has_switch = true;
                let keys = SwitchKeys::table("", table, problems);
                switch = Some(self::switch(keys, &key.span(), surroundings, problems));
            }
            ("switch", _) => {
                has_switch = true;
                problems.add(key.span(), "`switch` is a table: write `[switch]`");
            }
            ("port", DeValue::Array(tables)) if tables.iter().all(|table| table.get_ref().is_table()) => {
                ports = tables.iter().collect();
            }
            ("port", _) => {
                problems.add(key.span(), "ports are a list of tables: write `[[port]]` before each")
            }
            // Of a node's file (`cableway up`), the others are for others to judge.
            ("host" | "nic" | "vm", _) => {}
            (unknown, _) => {
                let hint = suggestion(unknown, &["switch", "port"]);
                problems.add(
                    key.span(),
                    format!("unknown key `{unknown}` outside of `[switch]` and `[[port]]`; {hint}"),
                );
            }
        }
    }
    if !has_switch {
        problems.add_general("`[switch]` is missing: it names the cores that poll, as in `workers = [1]`");
    }
    let workers = switch.as_ref().map(|switch: &SwitchConfig| switch.workers.as_slice()).unwrap_or_default();
    let mut reader = PortReader { run_dir, surroundings, workers, problems, seen: Seen::default() };
    if let Some(first_too_many) = ports.get(MAX_PORTS) {
        let message = format!(
            "{} ports: a switch has at most {MAX_PORTS}; start a second one for the others",
            ports.len()
        );
        reader.problems.add(first_too_many.span(), message);
    }
    let ports: Vec<_> =
        ports.iter().filter_map(|table| reader.port(table.span(), table.get_ref().as_table()?)).collect();
    Some(Config { file: file.to_owned(), switch: switch?, ports })
}

/// `[switch]`.
fn switch(
    keys: SwitchKeys,
    at: &Range<usize>,
    surroundings: &dyn Surroundings,
    problems: &mut Problems<'_>,
) -> SwitchConfig {
    if keys.workers.is_none() {
        keys.wrong.or_missing("workers", at.clone(), "the cores that poll, as in `workers = [1]`", problems);
    }
    let mut used = HashMap::new();
    let mut cores = |key: &'static str, list: Option<Spanned<Vec<Spanned<CoreNumber>>>>| {
        let list = list?;
        if list.get_ref().is_empty() {
            problems
                .add(list.span(), format!("`{key}` is empty: name at least one core, as in `{key} = [1]`"));
        }
        let mut numbers = Vec::new();
        for core in list.into_inner() {
            let (span, core) = (core.span(), core.into_inner().get::<u32>());
            if let Some((first, line)) = used.get(&core) {
                let message = format!("`{key}`: core {core} is used already, in `{first}` on line {line}");
                problems.add(span, format!("{message}; a core has one task"));
            } else {
                used.insert(core, (key, problems.line(&span)));
                if let Err(why) = surroundings.core(core) {
                    problems.add(span, format!("`{key}`: {why}"));
                }
            }
            numbers.push(core);
        }
        Some(numbers)
    };
    SwitchConfig {
        workers: cores("workers", keys.workers).unwrap_or_default(),
        housekeeping: cores("housekeeping", keys.housekeeping),
        idle: value_or(keys.idle, Idle::Poll),
        burst: keys.burst.map_or(BURST, |burst| burst.into_inner().get()),
        fdb_size: keys.fdb_size.map_or(FDB_SIZE, |size| size.into_inner().get::<usize>().next_power_of_two()),
        fdb_age: keys.fdb_age.map_or(FDB_AGE, |age| Duration::from_secs(age.into_inner().get())),
        forward_reserved: value_or(keys.forward_reserved, false),
        confine_files: value_or(keys.confine_files, true),
    }
}

/// What the user wrote, or the default.
pub(super) fn value_or<T>(written: Option<Spanned<T>>, default: T) -> T {
    written.map_or(default, Spanned::into_inner)
}

/// What the ports so far have taken, with the line.
#[derive(Default)]
pub(super) struct Seen {
    names: HashMap<String, usize>,
    pub(super) sockets: HashMap<PathBuf, (String, usize)>,
    pub(super) records: HashMap<PathBuf, (String, usize)>,
    pub(super) replays: HashMap<PathBuf, (String, usize)>,
    pub(super) devices: HashMap<String, (String, usize)>,
    addresses: HashMap<StaticAddress, (String, usize)>,
}

/// Reads one port after the other.
pub(super) struct PortReader<'a, 't> {
    pub(super) run_dir: &'a Path,
    pub(super) surroundings: &'a dyn Surroundings,
    /// Cores of the workers; empty if they were wrong.
    workers: &'a [u32],
    pub(super) problems: &'a mut Problems<'t>,
    pub(super) seen: Seen,
}

impl PortReader<'_, '_> {
    /// One `[[port]]`, whose header is at `at`.
    fn port(&mut self, at: Range<usize>, table: &DeTable<'_>) -> Option<PortConfig> {
        let written = table.get("name").and_then(|name| name.get_ref().as_str());
        let place = written.map_or_else(String::new, |name| format!("port `{name}`: "));
        let mut keys = PortKeys::table(&place, table, self.problems);
        if keys.name.is_none() {
            keys.wrong.or_missing(
                "name",
                at.clone(),
                "what to call it, as in `name = \"vnf1\"`",
                self.problems,
            );
        }
        if keys.kind.is_none() {
            let kinds = format!("what is behind it, one of {}", list(PortKind::WORDS));
            keys.wrong.or_missing("kind", at.clone(), &kinds, self.problems);
        }
        let name = keys.name.take().map(|name| self.name(name));
        let call = name.clone().unwrap_or_default();
        let behind = self.behind(&place, &call, &at, &mut keys);
        let queue_pairs = keys.queue_pairs.take().map_or(QUEUE_PAIRS, |pairs| pairs.into_inner().get());
        let queue_workers = self.queue_workers(&place, &mut keys, queue_pairs);
        let vlan = keys.vlan.take().map_or(Vlan::Unaware, |vlan| self.vlan(&place, vlan));
        let inject = keys.inject.take().map(|keys| super::inject::read(&place, keys, self.problems));
        let trace = keys.trace.take().map(|file| self.written(&place, &call, "trace", file));
        let addresses = keys.addresses.take();
        let source_check = value_or(keys.source_check.take(), false);
        if source_check && addresses.as_ref().is_none_or(|addresses| addresses.get_ref().is_empty()) {
            let at = table.get_key_value("source_check").map_or(0..0, |(key, _)| key.span());
            let message = "with `source_check` only `addresses` may be used as source, and there are none";
            self.problems.add(at, format!("{place}{message}: add `addresses = [\"02:…\"]`"));
        }
        let addresses = addresses.map(Spanned::into_inner).unwrap_or_default();
        let addresses = addresses.into_iter().filter_map(|a| self.address(&place, &call, a, &vlan)).collect();
        Some(PortConfig {
            name: name?,
            behind: behind?,
            queue_pairs,
            queue_workers,
            vlan,
            isolation: keys.isolation.map(|group| group.into_inner().0),
            mtu: keys.mtu.map(|mtu| mtu.into_inner().get()),
            storm: keys.storm.map(|storm| self::storm(storm.into_inner())).unwrap_or_default(),
            addresses,
            learn: value_or(keys.learn, true),
            learn_limit: keys.learn_limit.map_or(LEARN_LIMIT, |limit| limit.into_inner().get()),
            source_check,
            disable: keys
                .disable
                .map(Spanned::into_inner)
                .unwrap_or_default()
                .into_iter()
                .map(|name| name.into_inner().0)
                .collect(),
            max_memory: keys
                .max_memory
                .map_or_else(|| self.surroundings.memory(), |memory| memory.into_inner().0),
            inject,
            trace,
        })
    }

    fn name(&mut self, name: Spanned<Name>) -> String {
        let span = name.span();
        let name = name.into_inner().0;
        let line = self.problems.line(&span);
        if let Some(first) = self.seen.names.get(&name) {
            self.problems.add(
                span,
                format!("port `{name}` is there already, on line {first}: give this one another name"),
            );
        } else {
            self.seen.names.insert(name.clone(), line);
        }
        name
    }

    /// The core of each queue pair, if the user pinned them.
    fn queue_workers(&mut self, place: &str, keys: &mut PortKeys, queue_pairs: u16) -> Option<Vec<u32>> {
        let one = keys.worker.take();
        let each = keys.queue_workers.take();
        let pinned = match (one, each) {
            (None, None) => return None,
            (Some(_), Some(each)) => {
                let message =
                    "`queue_workers` and `worker` both say where the queues go: take one of them out";
                self.problems.add(each.span(), format!("{place}{message}"));
                return None;
            }
            (Some(one), None) => vec![one; usize::from(queue_pairs)],
            (None, Some(each)) => {
                let count = each.get_ref().len();
                if count != usize::from(queue_pairs) {
                    let wanted = format!("{count} workers for {queue_pairs} queue pairs (`queue_pairs`)");
                    self.problems
                        .add(each.span(), format!("{place}`queue_workers`: {wanted}: name one for each"));
                }
                each.into_inner()
            }
        };
        for core in &pinned {
            let number = core.get_ref().get::<u32>();
            if !self.workers.is_empty() && !self.workers.contains(&number) {
                let message =
                    format!("core {number} is not one of `workers` {:?} in `[switch]`", self.workers);
                self.problems
                    .add(core.span(), format!("{place}{message}: add it there, or choose one of them"));
            }
        }
        Some(pinned.into_iter().map(|core| core.into_inner().get()).collect())
    }

    /// Access, or trunk with or without a native VLAN.
    fn vlan(&mut self, place: &str, keys: Spanned<VlanKeys>) -> Vlan {
        let span = keys.span();
        let keys = keys.into_inner();
        match (keys.access, keys.trunk) {
            (Some(access), None) => {
                if let Some(native) = keys.native {
                    let message = "`native` belongs to a trunk; an access port's untagged VLAN is `access`";
                    self.problems.add(native.span(), format!("{place}`vlan`: {message}"));
                }
                Vlan::Access(access.into_inner().get())
            }
            (None, Some(trunk)) => Vlan::Trunk {
                allowed: merged(trunk.into_inner()),
                native: keys.native.map(|native| native.into_inner().get()),
            },
            (Some(_), Some(trunk)) => {
                let message =
                    "a port is either `access` or `trunk` (untagged frames of a trunk belong to `native`)";
                self.problems.add(trunk.span(), format!("{place}`vlan`: {message}"));
                Vlan::Unaware
            }
            (None, None) if keys.wrong.any() => Vlan::Unaware,
            (None, None) => {
                let message = "wanted `{ access = 10 }` or `{ trunk = [10, \"100-199\"], native = 1 }`";
                self.problems.add(span, format!("{place}`vlan`: {message}"));
                Vlan::Unaware
            }
        }
    }

    /// A static address in the VLAN that it belongs to.
    fn address(
        &mut self,
        place: &str,
        name: &str,
        written: Spanned<StaticKeys>,
        vlan: &Vlan,
    ) -> Option<StaticAddress> {
        let span = written.span();
        let StaticKeys { address, vlan: given } = written.into_inner();
        let given_number = given.as_ref().map(|vlan| vlan.get_ref().get::<u16>());
        let resolved = match (vlan, given_number) {
            (Vlan::Unaware, None) => Ok(None),
            (Vlan::Unaware, Some(_)) => Err("the port has no `vlan`: leave it out here".to_owned()),
            (Vlan::Access(own), None) => Ok(Some(*own)),
            (Vlan::Trunk { native: Some(native), .. }, None) => Ok(Some(*native)),
            (Vlan::Trunk { native: None, .. }, None) => {
                Err("say in which VLAN of the trunk: { address = \"…\", vlan = 20 }".to_owned())
            }
            (Vlan::Access(own), Some(vlan)) if *own == vlan => Ok(Some(vlan)),
            (Vlan::Trunk { allowed, native }, Some(vlan))
                if *native == Some(vlan) || allowed.iter().any(|range| range.contains(&vlan)) =>
            {
                Ok(Some(vlan))
            }
            (_, Some(vlan)) => Err(format!("VLAN {vlan} is not one of the port's")),
        };
        let entry = match resolved {
            Ok(vlan) => StaticAddress { address: address.0, vlan },
            Err(why) => {
                let at = given.map_or(span, |vlan| vlan.span());
                self.problems.add(at, format!("{place}`addresses`: {why}"));
                return None;
            }
        };
        let line = self.problems.line(&span);
        if let Some((other, line)) = self.seen.addresses.get(&entry) {
            let message =
                format!("this address is at port `{other}` already, on line {line}: it can be at one only");
            self.problems.add(span, format!("{place}`addresses`: {message}"));
            return None;
        }
        self.seen.addresses.insert(entry, (name.to_owned(), line));
        Some(entry)
    }
}

fn storm(keys: StormKeys) -> Storm {
    let rate = |rate: Option<Spanned<FrameRate>>| rate.map(|rate| rate.into_inner().get());
    Storm { broadcast: rate(keys.broadcast), unknown: rate(keys.unknown), multicast: rate(keys.multicast) }
}

/// The same VLANs as ranges in ascending order, none touching the next.
fn merged(written: Vec<Spanned<VlanRange>>) -> Vec<RangeInclusive<u16>> {
    let mut ranges: Vec<_> = written.into_iter().map(|range| range.into_inner().0).collect();
    ranges.sort_by_key(|range| *range.start());
    let mut apart: Vec<RangeInclusive<u16>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match apart.last_mut() {
            Some(last) if *range.start() <= last.end().saturating_add(1) => {
                *last = *last.start()..=*last.end().max(range.end());
            }
            _ => apart.push(range),
        }
    }
    apart
}
