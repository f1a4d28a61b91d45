//! The machine whole, in one reading: sockets, memory nodes, cores with their threads and caches, huge-page pools, PCI functions.
//!
//! Reads only, below a root that the caller gives (`/` on a real machine). Whoever decides where something runs decides on one
//! such value, so that everything that reads the same machine decides the same.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::pci::{self, Function};
use crate::topology::{self, CoreSet, HugePool, TopologyError};

/// How far a node is from another one when the firmware does not say (ACPI 6.5, section 5.2.17: 10 is local).
const UNKNOWN_DISTANCE: u32 = 20;

/// A machine.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    /// Cores that are online, by number.
    pub cores: BTreeMap<u32, Core>,
    /// Memory nodes, by number: some have no core, some no memory, and numbers may be missing.
    pub nodes: BTreeMap<u32, Node>,
    /// PCI functions, each with its node and IOMMU group.
    pub functions: Vec<Function>,
}

/// A core, as the kernel counts them: a thread, where a physical core has several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Core {
    /// Its number.
    pub number: u32,
    /// The socket that it is in; 0 if the kernel does not say.
    pub socket: u32,
    /// Its memory node; 0 on a machine whose kernel knows no nodes.
    pub node: u32,
    /// The threads of its physical core that are online, itself included.
    pub threads: CoreSet,
    /// Its caches, the nearest first.
    pub caches: Vec<Cache>,
    /// Whether it was taken from the scheduler at the start of the kernel (`isolcpus=`).
    pub isolated: bool,
}

/// A cache of a core.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cache {
    /// 1 is the nearest.
    pub level: u32,
    /// What it holds: `Data`, `Instruction` or `Unified`.
    pub kind: String,
    /// How much, in bytes; 0 if the kernel does not say.
    pub size: u64,
    /// The cores that have it in common.
    pub shared: CoreSet,
}

/// A memory node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Its cores that are online; there may be none.
    pub cores: CoreSet,
    /// Its memory in bytes; there may be none.
    pub memory: u64,
    /// How far each node is: 10 is itself.
    pub distances: BTreeMap<u32, u32>,
    /// Its huge pages.
    pub pools: Vec<HugePool>,
}

impl Core {
    /// The lowest core of those that share its last cache; itself if the kernel does not say.
    pub fn cache_group(&self) -> u32 {
        let last = self.caches.iter().max_by_key(|cache| cache.level);
        last.and_then(|cache| cache.shared.iter().next()).unwrap_or(self.number)
    }
}

impl Machine {
    /// Reads the machine below `root`.
    ///
    /// # Errors
    /// The kernel does not say which cores there are.
    pub fn read(root: &Path) -> Result<Self, TopologyError> {
        let online = topology::online_cores(root)?;
        let isolated = topology::boot_isolated_cores(root);
        let cores: BTreeMap<u32, Core> =
            online.iter().map(|n| (n, core(root, n, &online, isolated.contains(n)))).collect();
        Ok(Self { nodes: nodes(root, &cores), cores, functions: pci::list(root) })
    }

    /// How far memory on node `to` is from cores on node `from`.
    pub fn distance(&self, from: u32, to: u32) -> u32 {
        let said = self.nodes.get(&from).and_then(|node| node.distances.get(&to)).copied();
        said.unwrap_or(if from == to { 10 } else { UNKNOWN_DISTANCE })
    }

    /// The node of a PCI function, where the firmware says.
    pub fn node_of(&self, function: pci::Bdf) -> Option<u32> {
        self.functions.iter().find(|f| f.bdf == function)?.node
    }
}

fn core(root: &Path, number: u32, online: &CoreSet, isolated: bool) -> Core {
    let folder = root.join(format!("sys/devices/system/cpu/cpu{number}"));
    let threads = topology::smt_siblings(root, number).unwrap_or_default();
    // A thread that is switched off disturbs nobody.
    let threads = threads.iter().filter(|thread| online.contains(*thread)).chain([number]).collect();
    let socket = text(&folder.join("topology/physical_package_id")).and_then(|t| t.parse().ok());
    let mut caches: Vec<Cache> =
        names(&folder.join("cache"), "index").map(|(_, folder)| cache(&folder)).collect();
    caches.sort_by_key(|cache| cache.level);
    let node = topology::node_of_core(root, number).unwrap_or(0);
    Core { number, socket: socket.unwrap_or(0), node, threads, caches, isolated }
}

fn cache(folder: &Path) -> Cache {
    let of = |file: &str| text(&folder.join(file)).unwrap_or_default();
    let size = of("size");
    let kib = size.strip_suffix('K').and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0);
    Cache {
        level: of("level").parse().unwrap_or(0),
        kind: of("type"),
        size: kib.saturating_mul(1024),
        shared: of("shared_cpu_list").parse().unwrap_or_default(),
    }
}

fn nodes(root: &Path, cores: &BTreeMap<u32, Core>) -> BTreeMap<u32, Node> {
    let folders: BTreeMap<u32, _> = names(&root.join("sys/devices/system/node"), "node").collect();
    let pools = topology::huge_pools(root);
    let numbers: Vec<u32> = if folders.is_empty() { vec![0] } else { folders.keys().copied().collect() };
    let mut nodes = BTreeMap::new();
    for node in &numbers {
        let folder = folders.get(node);
        let of = |file: &str| folder.and_then(|folder| text(&folder.join(file))).unwrap_or_default();
        // The kernel lists one distance for each node that is online, in the order of their numbers, which may have gaps.
        let distances = of("distance");
        let distances = distances.split_whitespace().map_while(|n| n.parse().ok());
        let kib = of("meminfo")
            .lines()
            .find_map(|line| line.split_once("MemTotal:")?.1.split_whitespace().next()?.parse::<u64>().ok());
        nodes.insert(
            *node,
            Node {
                cores: cores.values().filter(|core| core.node == *node).map(|core| core.number).collect(),
                memory: kib.unwrap_or(0).saturating_mul(1024),
                distances: numbers.iter().copied().zip(distances).collect(),
                pools: pools.iter().filter(|pool| pool.node == *node).copied().collect(),
            },
        );
    }
    nodes
}

fn text(file: &Path) -> Option<String> {
    Some(fs::read_to_string(file).ok()?.trim().to_owned())
}

/// Entries such as `node3`: number and path.
fn names<'p>(folder: &Path, prefix: &'p str) -> impl Iterator<Item = (u32, std::path::PathBuf)> + use<'p> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(move |entry| {
        let name = entry.file_name();
        Some((name.to_str()?.strip_prefix(prefix)?.parse().ok()?, entry.path()))
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A machine laid out as files.
    pub(crate) struct Tree(tempfile::TempDir);

    impl Tree {
        /// `nodes` nodes, one socket each, of `cores` physical cores with `threads` threads; as Linux counts them on most
        /// servers, first threads first.
        pub(crate) fn new(nodes: u32, cores: u32, threads: u32) -> Self {
            let tree = Self(tempfile::tempdir().unwrap());
            let physical = nodes * cores;
            tree.file("sys/devices/system/cpu/online", &format!("0-{}", physical * threads - 1));
            for node in 0..nodes {
                tree.node(node, 16 << 20);
                let all: Vec<String> =
                    (0..nodes).map(|n| if n == node { "10" } else { "21" }.to_owned()).collect();
                tree.file(&format!("sys/devices/system/node/node{node}/distance"), &all.join(" "));
            }
            for cpu in 0..physical * threads {
                let core = cpu % physical;
                let all: Vec<String> = (0..threads).map(|t| (core + t * physical).to_string()).collect();
                tree.cpu(cpu, core / cores, &all.join(","));
                let (first, last) = (core / cores * cores, core / cores * cores + cores - 1);
                let mut shared = format!("{first}-{last}");
                for thread in 1..threads {
                    shared += &format!(",{}-{}", first + thread * physical, last + thread * physical);
                }
                tree.cache(cpu, &shared);
            }
            tree
        }

        pub(crate) fn root(&self) -> &Path {
            self.0.path()
        }

        pub(crate) fn file(&self, path: &str, text: &str) {
            let path = self.root().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{text}\n")).unwrap();
        }

        pub(crate) fn node(&self, node: u32, kib: u64) {
            let meminfo = format!("Node {node} MemTotal:       {kib} kB\nNode {node} MemFree: 1 kB");
            self.file(&format!("sys/devices/system/node/node{node}/meminfo"), &meminfo);
        }

        pub(crate) fn cpu(&self, cpu: u32, node: u32, threads: &str) {
            let folder = format!("sys/devices/system/cpu/cpu{cpu}");
            self.file(&format!("{folder}/node{node}/cpulist"), "");
            self.file(&format!("{folder}/topology/thread_siblings_list"), threads);
            self.file(&format!("{folder}/topology/physical_package_id"), &node.to_string());
        }

        pub(crate) fn cache(&self, cpu: u32, shared: &str) {
            for (index, level, kind, size, shared) in
                [(0, 1, "Data", "32K", cpu.to_string().as_str()), (3, 3, "Unified", "16384K", shared)]
            {
                let folder = format!("sys/devices/system/cpu/cpu{cpu}/cache/index{index}");
                self.file(&format!("{folder}/level"), &format!("{level}"));
                self.file(&format!("{folder}/type"), kind);
                self.file(&format!("{folder}/size"), size);
                self.file(&format!("{folder}/shared_cpu_list"), shared);
            }
        }

        pub(crate) fn machine(&self) -> Machine {
            Machine::read(self.root()).unwrap()
        }
    }

    #[test]
    fn four_sockets_of_two_threads_are_read_whole() {
        let tree = Tree::new(4, 4, 2);
        tree.file("sys/devices/system/node/node2/hugepages/hugepages-2048kB/nr_hugepages", "64");
        tree.file("sys/devices/system/node/node2/hugepages/hugepages-2048kB/free_hugepages", "60");
        let machine = tree.machine();
        assert_eq!((machine.cores.len(), machine.nodes.len()), (32, 4));
        let core = &machine.cores[&9];
        assert_eq!((core.socket, core.node, core.threads.to_string().as_str()), (2, 2, "9,25"));
        let last = core.caches.last().unwrap();
        assert_eq!((last.level, last.size, last.kind.as_str()), (3, 16 << 20, "Unified"));
        assert_eq!((core.cache_group(), machine.cores[&25].cache_group()), (8, 8));
        let node = &machine.nodes[&2];
        assert_eq!(
            (node.cores.to_string().as_str(), node.memory, node.pools[0].free),
            ("8-11,24-27", 16 << 30, 60)
        );
        assert_eq!((machine.distance(2, 2), machine.distance(2, 3)), (10, 21));
    }

    #[test]
    fn nodes_without_cores_or_memory_and_gaps_in_their_numbers_are_no_surprise() {
        let tree = Tree::new(1, 4, 1);
        // Node 2 has memory only (a card's, or CXL), node 5 cores only; there is no node 1, 3 or 4.
        tree.node(2, 1 << 20);
        tree.node(5, 0);
        tree.file("sys/devices/system/cpu/online", "0-5");
        tree.cpu(4, 5, "4");
        tree.cpu(5, 5, "5");
        tree.file("sys/devices/system/node/node0/distance", "10 17 28");
        tree.file("sys/devices/system/node/node5/distance", "28 99 10");
        let machine = tree.machine();
        assert_eq!(machine.nodes.keys().copied().collect::<Vec<_>>(), [0, 2, 5]);
        assert!(machine.nodes[&2].cores.is_empty() && machine.nodes[&5].memory == 0);
        assert_eq!((machine.distance(0, 2), machine.distance(0, 5), machine.distance(5, 2)), (17, 28, 99));
        // Whoever the firmware says nothing about is as far as another socket.
        assert_eq!((machine.distance(2, 0), machine.distance(2, 2)), (20, 10));
        assert_eq!(machine.cores[&4].caches, []);
        assert_eq!(machine.cores[&4].cache_group(), 4);
    }

    #[test]
    fn cores_that_are_offline_are_nobody_and_nobodys_threads() {
        let tree = Tree::new(1, 4, 2);
        tree.file("sys/devices/system/cpu/online", "0-4,6");
        tree.file("sys/devices/system/cpu/isolated", "2-3");
        let machine = tree.machine();
        assert_eq!(machine.cores.keys().copied().collect::<Vec<_>>(), [0, 1, 2, 3, 4, 6]);
        assert_eq!(machine.cores[&1].threads.to_string(), "1");
        assert_eq!(machine.cores[&2].threads.to_string(), "2,6");
        assert!(machine.cores[&3].isolated && !machine.cores[&1].isolated);
    }

    #[test]
    fn a_kernel_that_knows_no_nodes_has_everything_on_node_0() {
        let tree = Tree(tempfile::tempdir().unwrap());
        tree.file("sys/devices/system/cpu/online", "0-1");
        let machine = tree.machine();
        assert_eq!(machine.nodes[&0].cores.to_string(), "0-1");
        assert_eq!(machine.cores[&1].threads.to_string(), "1");
        let missing = Machine::read(Path::new("/nonexistent")).unwrap_err().to_string();
        assert!(missing.contains("cpu/online"), "{missing}");
        assert!(!Machine::read(Path::new("/")).unwrap().cores.is_empty());
    }
}
