//! Cores, memory nodes and huge pages, as the kernel lists them in `/sys`.
//!
//! Reads only. Every function takes the root below which `sys/` lies (`/` on a real machine), so that a test can describe
//! any machine as a tree of files.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::{fs, io};

use crate::partition;

/// The most cores that a list may name: four times what Linux can be built for.
const MAX_CORES: u32 = 32_768;

/// Why the machine could not be read.
#[derive(Debug, thiserror::Error)]
pub enum TopologyError {
    /// A file of the kernel is not there or not readable.
    #[error("cannot read {}: {source}; is /sys mounted?", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file of the kernel has a form that is not understood.
    #[error("{}: {text:?} is not a list of cores", path.display())]
    Form {
        /// The file.
        path: PathBuf,
        /// What it holds.
        text: String,
    },
    /// The kernel does not say which cores this thread may run on.
    #[error("cannot ask which cores this thread may run on: {0}")]
    Affinity(io::Error),
}

/// A set of cores; as text it has the kernel's list form (`0-3,8`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CoreSet(BTreeSet<u32>);

impl CoreSet {
    /// Whether `core` is in it.
    pub fn contains(&self, core: u32) -> bool {
        self.0.contains(&core)
    }

    /// The cores, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.iter().copied()
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// As the kernel writes masks: 32 bits a group, the highest first.
    pub fn mask(&self) -> String {
        let highest = self.iter().max().unwrap_or(0);
        let group = |n: u32| -> u32 {
            self.iter().filter(|core| core / 32 == n).fold(0, |bits, core| bits | 1 << (core % 32))
        };
        let groups: Vec<String> = (0..=highest / 32).rev().map(|n| format!("{:08x}", group(n))).collect();
        groups.join(",")
    }

    /// What a mask of the kernel's means.
    ///
    /// # Errors
    /// It is none.
    pub fn from_mask(mask: &str) -> Result<Self, NotACoreList> {
        let digits: Vec<u32> = mask
            .trim()
            .chars()
            .rev()
            .filter(|digit| *digit != ',')
            .map(|digit| digit.to_digit(16).ok_or(NotACoreList))
            .collect::<Result<_, _>>()?;
        if digits.len() > MAX_CORES as usize / 4 {
            return Err(NotACoreList);
        }
        let bits = |(digit, place): (&u32, u32)| {
            let digit = *digit;
            (0..4).filter(move |bit| digit >> bit & 1 == 1).map(move |bit| 4 * place + bit)
        };
        Ok(digits.iter().zip(0u32..).flat_map(bits).collect())
    }
}

impl FromIterator<u32> for CoreSet {
    fn from_iter<I: IntoIterator<Item = u32>>(cores: I) -> Self {
        Self(cores.into_iter().collect())
    }
}

impl fmt::Display for CoreSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut cores = self.iter().peekable();
        let mut separator = "";
        while let Some(first) = cores.next() {
            let mut last = first;
            while let Some(next) = cores.next_if(|&c| c == last + 1) {
                last = next;
            }
            if first == last {
                write!(f, "{separator}{first}")?;
            } else {
                write!(f, "{separator}{first}-{last}")?;
            }
            separator = ",";
        }
        Ok(())
    }
}

/// Text that is not a list of cores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a list of cores such as 0-3,8")]
pub struct NotACoreList;

impl FromStr for CoreSet {
    type Err = NotACoreList;

    fn from_str(text: &str) -> Result<Self, NotACoreList> {
        let number = |s: &str| s.parse().ok().filter(|&n| n < MAX_CORES).ok_or(NotACoreList);
        let mut cores = BTreeSet::new();
        for part in text.trim().split(',').filter(|p| !p.is_empty()) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last): (u32, u32) = (number(first)?, number(last)?);
            if first > last {
                return Err(NotACoreList);
            }
            cores.extend(first..=last);
        }
        Ok(Self(cores))
    }
}

/// The cores that the calling thread may run on: what `taskset` and the cgroup left of the machine. Ask before pinning.
///
/// # Errors
/// [`TopologyError::Affinity`].
pub fn permitted_cores() -> Result<CoreSet, TopologyError> {
    // The C library's `cpu_set_t` ends at 1,024 cores; the system call takes any size.
    let mut mask = [0u8; MAX_CORES as usize / 8];
    // SAFETY: the kernel writes at most the given number of bytes to `mask`; 0 names the calling thread.
    let written = unsafe { libc::syscall(libc::SYS_sched_getaffinity, 0, mask.len(), mask.as_mut_ptr()) };
    let written =
        usize::try_from(written).map_err(|_| TopologyError::Affinity(io::Error::last_os_error()))?;
    let bits = mask.iter().take(written).zip(0u32..);
    Ok(bits
        .flat_map(|(byte, i)| (0..8).filter(move |b| byte >> b & 1 == 1).map(move |b| i * 8 + b))
        .collect())
}

/// The cores that this process can have its threads run on: those that it may run on, and those that nobody runs on who does not
/// ask for it: isolated by the kernel at its start (`isolcpus=`), or by our partition. A cpuset that forbids one of them says so
/// when a thread is pinned. Ask before pinning.
///
/// # Errors
/// [`TopologyError::Affinity`].
pub fn usable_cores(root: &Path) -> Result<CoreSet, TopologyError> {
    let partition = partition::cores_to_join();
    Ok(with_isolated(root, &permitted_cores()?).iter().chain(partition.iter()).collect())
}

fn with_isolated(root: &Path, permitted: &CoreSet) -> CoreSet {
    permitted.iter().chain(boot_isolated_cores(root).iter()).collect()
}

/// The cores that the kernel took from the scheduler at its start (`isolcpus=`).
pub fn boot_isolated_cores(root: &Path) -> CoreSet {
    // A kernel without that file isolates none.
    core_list(root.join("sys/devices/system/cpu/isolated")).unwrap_or_default()
}

/// The cores that are switched on.
///
/// # Errors
/// The list cannot be read.
pub fn online_cores(root: &Path) -> Result<CoreSet, TopologyError> {
    core_list(root.join("sys/devices/system/cpu/online"))
}

/// The cores that share execution units with `core`, itself included: two of them polling halve each other.
///
/// # Errors
/// The list cannot be read (the core is offline or does not exist).
pub fn smt_siblings(root: &Path, core: u32) -> Result<CoreSet, TopologyError> {
    core_list(root.join(format!("sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")))
}

/// The memory node of `core`; `None` on a machine whose kernel knows no nodes, or if the core does not exist.
pub fn node_of_core(root: &Path, core: u32) -> Option<u32> {
    let folder = fs::read_dir(root.join(format!("sys/devices/system/cpu/cpu{core}"))).ok()?;
    folder.flatten().find_map(|entry| number_after("node", &entry.file_name().to_string_lossy()))
}

/// The huge pages of one size on one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HugePool {
    /// Memory node.
    pub node: u32,
    /// Bytes of a page.
    pub page_size: u64,
    /// Pages set aside.
    pub total: u64,
    /// Of these, not in use.
    pub free: u64,
}

/// All pools of huge pages, by node and page size. A kernel without memory nodes shows its pools as node 0; one without
/// huge pages has none.
pub fn huge_pools(root: &Path) -> Vec<HugePool> {
    let mut pools = Vec::new();
    let nodes = fs::read_dir(root.join("sys/devices/system/node")).into_iter().flatten().flatten();
    for entry in nodes {
        if let Some(node) = number_after("node", &entry.file_name().to_string_lossy()) {
            pools.extend(pools_in(&entry.path().join("hugepages"), node));
        }
    }
    if pools.is_empty() {
        pools = pools_in(&root.join("sys/kernel/mm/hugepages"), 0);
    }
    pools.sort_by_key(|p| (p.node, p.page_size));
    pools
}

fn pools_in(folder: &Path, node: u32) -> Vec<HugePool> {
    let sizes = fs::read_dir(folder).into_iter().flatten().flatten();
    sizes
        .filter_map(|entry| {
            let name = entry.file_name();
            let kib: u64 = name.to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
            let count = |file: &str| -> Option<u64> {
                fs::read_to_string(entry.path().join(file)).ok()?.trim().parse().ok()
            };
            Some(HugePool {
                node,
                page_size: kib.checked_mul(1024)?,
                total: count("nr_hugepages")?,
                free: count("free_hugepages")?,
            })
        })
        .collect()
}

fn core_list(path: PathBuf) -> Result<CoreSet, TopologyError> {
    match fs::read_to_string(&path) {
        Ok(text) => text.parse().map_err(|NotACoreList| TopologyError::Form { path, text }),
        Err(source) => Err(TopologyError::Read { path, source }),
    }
}

/// The number in names such as `node3`.
fn number_after(prefix: &str, name: &str) -> Option<u32> {
    name.strip_prefix(prefix)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A machine of two nodes with two cores of two threads each; core 7 is offline.
    fn two_nodes() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let write = |path: String, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("sys/devices/system/cpu/online".into(), "0-6\n");
        for core in 0..8 {
            let node = core / 2 % 2;
            let cpu = format!("sys/devices/system/cpu/cpu{core}");
            write(format!("{cpu}/node{node}/cpulist"), "");
            if core < 7 {
                let pair = format!("{},{}\n", core % 4, core % 4 + 4);
                write(format!("{cpu}/topology/thread_siblings_list"), &pair);
            }
        }
        for (node, total, free) in [(0, "64\n", "12\n"), (1, "8\n", "8\n")] {
            let pool = format!("sys/devices/system/node/node{node}/hugepages/hugepages-2048kB");
            write(format!("{pool}/nr_hugepages"), total);
            write(format!("{pool}/free_hugepages"), free);
        }
        root
    }

    #[test]
    fn cores_nodes_and_siblings_are_read_from_the_tree_that_is_given() {
        let machine = two_nodes();
        let root = machine.path();
        assert_eq!(online_cores(root).unwrap().to_string(), "0-6");
        assert_eq!(smt_siblings(root, 5).unwrap().iter().collect::<Vec<_>>(), [1, 5]);
        assert_eq!(
            (node_of_core(root, 1), node_of_core(root, 6), node_of_core(root, 9)),
            (Some(0), Some(1), None)
        );
        let gone = smt_siblings(root, 7).unwrap_err().to_string();
        assert!(gone.contains("cpu7/topology/thread_siblings_list"), "{gone}");
    }

    #[test]
    fn huge_pages_are_counted_per_node_and_size() {
        let machine = two_nodes();
        let pool = |node, total, free| HugePool { node, page_size: 2 << 20, total, free };
        assert_eq!(huge_pools(machine.path()), [pool(0, 64, 12), pool(1, 8, 8)]);
    }

    #[test]
    fn a_kernel_without_nodes_has_its_huge_pages_on_node_0() {
        let root = tempfile::tempdir().unwrap();
        let pool = root.path().join("sys/kernel/mm/hugepages/hugepages-1048576kB");
        fs::create_dir_all(&pool).unwrap();
        fs::write(pool.join("nr_hugepages"), "2\n").unwrap();
        fs::write(pool.join("free_hugepages"), "1\n").unwrap();
        assert_eq!(huge_pools(root.path()), [HugePool { node: 0, page_size: 1 << 30, total: 2, free: 1 }]);
        assert!(huge_pools(Path::new("/nonexistent")).is_empty());
    }

    #[test]
    fn cores_that_were_isolated_at_the_start_are_usable_although_nobody_runs_there_unasked() {
        let machine = two_nodes();
        let file = machine.path().join("sys/devices/system/cpu/isolated");
        let permitted: CoreSet = "0".parse().unwrap();
        assert_eq!(with_isolated(machine.path(), &permitted), permitted);
        fs::write(&file, "\n").unwrap();
        assert_eq!(with_isolated(machine.path(), &permitted), permitted);
        fs::write(&file, "1-3\n").unwrap();
        assert_eq!(with_isolated(machine.path(), &permitted).to_string(), "0-3");
    }

    #[test]
    fn a_list_that_is_none_or_endless_is_refused() {
        for text in ["x", "1-", "-1", "3-1", "0-4294967295", "1 2", "99999999999"] {
            assert_eq!(text.parse::<CoreSet>(), Err(NotACoreList), "{text}");
        }
        assert!("\n".parse::<CoreSet>().unwrap().is_empty());
        for mask in ["x", "0-1", &"f".repeat(10_000)] {
            assert_eq!(CoreSet::from_mask(mask), Err(NotACoreList), "{mask}");
        }
        assert_eq!(CoreSet::from_mask("00000001,00000003\n").unwrap().to_string(), "0-1,32");
    }

    #[test]
    fn this_machine_has_at_least_the_core_that_we_run_on() {
        let permitted = permitted_cores().unwrap();
        let online = online_cores(Path::new("/")).unwrap();
        assert!(!permitted.is_empty());
        assert!(permitted.iter().all(|c| online.contains(c)), "{permitted} of {online}");
    }

    proptest! {
        #[test]
        fn any_set_of_cores_survives_being_written_and_read(cores in proptest::collection::btree_set(0..MAX_CORES, 0..40)) {
            let set: CoreSet = cores.into_iter().collect();
            prop_assert_eq!(CoreSet::from_mask(&set.mask()), Ok(set.clone()));
            prop_assert_eq!(set.to_string().parse::<CoreSet>(), Ok(set));
        }
    }
}
