//! An isolated partition of cores by cgroup v2: cores that the scheduler takes from everybody but the threads that joined it.
//!
//! Owns the control group `cableway` at the top of the hierarchy: making it, joining it, and removing it. It is threaded, so that a
//! process has its polling threads in it and all others outside; that works only below the root, where every process may be
//! (Linux, Documentation/admin-guide/cgroup-v2.rst, "Threads" and "Cpuset"). Never touches another group.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use crate::topology::CoreSet;

/// Its folder below the root of the hierarchy.
const NAME: &str = "cableway";

/// The files of a group that matter here.
const THREADS: &str = "cgroup.threads";
const PROCESSES: &str = "cgroup.procs";
const CONTROLLERS: &str = "cgroup.controllers";
const SUBTREE: &str = "cgroup.subtree_control";
const CORES: &str = "cpuset.cpus";
const STATE: &str = "cpuset.cpus.partition";

/// The hierarchy of control groups, version 2.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy(PathBuf);

impl Hierarchy {
    /// Where it is mounted below `root`; `None` if it is not.
    pub fn find(root: &Path) -> Option<Self> {
        let mounts = fs::read_to_string(root.join("proc/self/mounts")).ok()?;
        let place = mounts.lines().find_map(|line| {
            let mut words = line.split_whitespace().skip(1);
            let place = words.next()?;
            (words.next()? == "cgroup2").then_some(place)
        })?;
        Some(Self(root.join(place.strip_prefix('/').unwrap_or(place))))
    }

    /// Where the partition says what it is.
    pub fn partition_file(&self) -> PathBuf {
        self.folder().join(STATE)
    }

    /// Where it is said which controllers groups have.
    pub fn controller_file(&self) -> PathBuf {
        self.0.join(SUBTREE)
    }

    /// Why there can be no partition here.
    pub fn obstacle(&self) -> Option<String> {
        if has_word(&self.0.join(CONTROLLERS), "cpuset").unwrap_or(false) {
            return None;
        }
        Some(
            "the controller cpuset is not with cgroup v2 here, but with v1 or not in this kernel; systemd.unified_cgroup_hierarchy=1 \
             on the kernel's command line brings it"
                .to_owned(),
        )
    }

    /// Whether groups have the controller cpuset.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn has_controller(&self) -> io::Result<bool> {
        has_word(&self.controller_file(), "cpuset")
    }

    /// Gives groups the controller cpuset, or takes it from them.
    ///
    /// # Errors
    /// Somebody's group uses it (EBUSY), or this is not the machine's own hierarchy.
    pub fn set_controller(&self, on: bool) -> io::Result<()> {
        write(&self.controller_file(), if on { "+cpuset" } else { "-cpuset" })
    }

    /// What the partition is: its cores, `none`, or in what state it is while it isolates nothing.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn partition(&self) -> io::Result<String> {
        if !self.folder().exists() {
            return Ok("none".to_owned());
        }
        let state = match fs::read_to_string(self.partition_file()) {
            // Its controller was taken away, or not given yet.
            Err(error) if error.kind() == io::ErrorKind::NotFound => "not a partition".to_owned(),
            read => read?.trim().to_owned(),
        };
        if state != "isolated" {
            return Ok(state);
        }
        Ok(fs::read_to_string(self.folder().join(CORES))?.trim().to_owned())
    }

    /// Its cores, if it isolates any.
    pub fn cores(&self) -> CoreSet {
        self.partition().ok().and_then(|cores| cores.parse().ok()).unwrap_or_default()
    }

    /// Takes `cores` from all threads that have not joined.
    ///
    /// # Errors
    /// The kernel refuses; what there was before is removed then.
    pub fn isolate(&self, cores: &CoreSet) -> io::Result<()> {
        let made = self.make(cores);
        if made.is_err() {
            let _ = self.remove();
        }
        made
    }

    fn make(&self, cores: &CoreSet) -> io::Result<()> {
        let folder = self.folder();
        match fs::create_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made?,
        }
        if fs::read_to_string(folder.join("cgroup.type"))?.trim() != "threaded" {
            write(&folder.join("cgroup.type"), "threaded")?;
        }
        // Nobody above can take the controller away while a group below hands it on: systemd takes away what its units do not need.
        write(&folder.join(SUBTREE), "+cpuset")?;
        write(&folder.join(CORES), &cores.to_string())?;
        write(&folder.join(STATE), "isolated")?;
        // The kernel takes the word and says here whether it means anything.
        match fs::read_to_string(folder.join(STATE))?.trim() {
            "isolated" => Ok(()),
            state => Err(io::Error::other(format!("the kernel says: {state}"))),
        }
    }

    /// Gives its cores back to everybody, and those who had joined to the root. No partition is no error.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn remove(&self) -> io::Result<()> {
        let folder = self.folder();
        if !folder.exists() {
            return Ok(());
        }
        if folder.join(STATE).exists() {
            write(&folder.join(STATE), "member")?;
        }
        // A thread that ends may be in it for a moment; others may still come.
        let mut tries = 0;
        loop {
            for thread in fs::read_to_string(folder.join(THREADS)).unwrap_or_default().lines() {
                match write(&self.0.join(THREADS), thread) {
                    Err(error) if error.raw_os_error() != Some(libc::ESRCH) => return Err(error),
                    _ => {}
                }
            }
            match fs::remove_dir(&folder) {
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) && tries < 200 => tries += 1,
                done => return done,
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The way in.
    ///
    /// # Errors
    /// The process may not.
    fn door(&self) -> io::Result<Door> {
        let open = |file: PathBuf| fs::OpenOptions::new().write(true).open(file);
        Ok(Door {
            cores: self.cores(),
            threads: open(self.folder().join(THREADS))?,
            processes: open(self.0.join(PROCESSES))?,
        })
    }

    /// The partition's folder.
    pub fn folder(&self) -> PathBuf {
        self.0.join(NAME)
    }
}

/// The way into a partition. It is found when a process asks which cores it can use, and serves threads that are started when the
/// process can open no files any more.
static KEPT: OnceLock<Option<Door>> = OnceLock::new();

struct Door {
    cores: CoreSet,
    threads: fs::File,
    processes: fs::File,
}

impl Door {
    /// Brings the calling thread in. Its process comes to the root of the hierarchy for that, if it is elsewhere.
    fn enter(&self) -> io::Result<()> {
        let order = |mut file: &fs::File| file.write_all(b"0");
        match order(&self.threads) {
            // Only a process of the root has threads in a threaded group below it.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                order(&self.processes)?;
                order(&self.threads)
            }
            done => done,
        }
    }
}

/// The cores of this machine's partition. Ask before the process is confined: the way in is kept open for its threads.
pub(crate) fn cores_to_join() -> CoreSet {
    let Some(groups) = Hierarchy::find(Path::new("/")) else { return CoreSet::default() };
    let cores = groups.cores();
    if !cores.is_empty() {
        KEPT.get_or_init(|| groups.door().ok());
    }
    cores
}

/// Brings the calling thread in if `core` belongs to the partition.
///
/// # Errors
/// The process may not; with the partition's folder.
pub(crate) fn join(core: u32) -> Result<(), (PathBuf, io::Error)> {
    let now = Hierarchy::find(Path::new("/")).filter(|groups| groups.cores().contains(core));
    match (now, KEPT.get().and_then(Option::as_ref)) {
        (Some(groups), _) => {
            groups.door().and_then(|door| door.enter()).map_err(|error| (groups.folder(), error))
        }
        // What was there when files could be opened.
        (None, Some(door)) if door.cores.contains(core) => door.enter().map_err(|error| (NAME.into(), error)),
        _ => Ok(()),
    }
}

/// A thread of a process that is pinned to some of `cores` and to no other: a partition of them would drive it away. Those that
/// have joined it are at home there.
pub fn in_the_way(root: &Path, cores: &CoreSet) -> Option<String> {
    let numbered = |folder: PathBuf| {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()).collect::<Vec<_>>()
    };
    for pid in numbered(root.join("proc")) {
        for tid in numbered(root.join(format!("proc/{pid}/task"))) {
            let folder = root.join(format!("proc/{pid}/task/{tid}"));
            let status = fs::read_to_string(folder.join("status")).unwrap_or_default();
            let field =
                |name: &str| status.lines().find_map(|line| Some(line.strip_prefix(name)?.trim().to_owned()));
            // Threads of the kernel have no memory of their own; those that are bound to a core stay there.
            let Some(pinned) = field("VmSize:").and(field("Cpus_allowed_list:")) else { continue };
            let pinned: CoreSet = pinned.parse().unwrap_or_default();
            let joined = fs::read_to_string(folder.join("cgroup"))
                .is_ok_and(|groups| groups.lines().any(|line| line.trim() == format!("0::/{NAME}")));
            if !joined && !pinned.is_empty() && pinned.iter().all(|core| cores.contains(core)) {
                let name = field("Name:").unwrap_or_default();
                return Some(format!(
                    "thread {tid} ({name}) of process {pid} is pinned to {pinned} and would be driven away: start it afterwards"
                ));
            }
        }
    }
    None
}

fn has_word(file: &Path, word: &str) -> io::Result<bool> {
    Ok(fs::read_to_string(file)?.split_whitespace().any(|found| found == word))
}

/// One order to the kernel. The file is not made.
fn write(file: &Path, text: &str) -> io::Result<()> {
    let said = |error: io::Error| match error.raw_os_error() {
        // Keeps the number, which callers look at.
        Some(number) => io::Error::from_raw_os_error(number),
        None => error,
    };
    fs::OpenOptions::new()
        .write(true)
        .open(file)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(said)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    const UNIFIED: &str = "proc /proc proc rw 0 0\ncgroup /sys/fs/cgroup/cpuset cgroup rw,cpuset 0 0\n\
                           cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";

    #[test]
    fn the_hierarchy_is_where_it_is_mounted_and_may_lack_the_controller() {
        assert_eq!(
            Hierarchy::find(machine(&[("proc/self/mounts", "proc /proc proc rw 0 0\n")]).path()),
            None
        );
        let root =
            machine(&[("proc/self/mounts", UNIFIED), ("sys/fs/cgroup/unified/cgroup.controllers", "\n")]);
        let hierarchy = Hierarchy::find(root.path()).unwrap();
        assert_eq!(hierarchy.folder(), root.path().join("sys/fs/cgroup/unified/cableway"));
        assert!(hierarchy.obstacle().unwrap().contains("not with cgroup v2 here"));
        let root = machine(&[
            ("proc/self/mounts", UNIFIED),
            ("sys/fs/cgroup/unified/cgroup.controllers", "cpuset cpu\n"),
        ]);
        assert_eq!(Hierarchy::find(root.path()).unwrap().obstacle(), None);
    }

    #[test]
    fn a_partition_has_cores_only_while_the_kernel_says_that_it_isolates_them() {
        let state = "sys/fs/cgroup/unified/cableway/cpuset.cpus.partition";
        let of = |files: &[(&str, &str)]| {
            Hierarchy::find(machine(files).path()).map(|h| (h.partition().unwrap(), h.cores()))
        };
        let mounts = ("proc/self/mounts", UNIFIED);
        let cores = ("sys/fs/cgroup/unified/cableway/cpuset.cpus", "2-3\n");
        assert_eq!(of(&[mounts]), Some(("none".to_owned(), CoreSet::default())));
        assert_eq!(of(&[mounts, cores]), Some(("not a partition".to_owned(), CoreSet::default())));
        let some = of(&[mounts, cores, (state, "isolated\n")]);
        assert_eq!(some, Some(("2-3".to_owned(), "2-3".parse().unwrap())));
        let invalid =
            of(&[mounts, cores, (state, "isolated invalid (Cpu list in cpuset.cpus not exclusive)\n")]);
        assert_eq!(invalid.unwrap().1, CoreSet::default());
    }

    #[test]
    fn whoever_is_pinned_to_these_cores_and_has_not_joined_is_in_the_way() {
        let task =
            |name: &str, cores: &str| format!("Name:\t{name}\nVmSize:\t 9 kB\nCpus_allowed_list:\t{cores}\n");
        let (of_core_2, of_all) = (task("worker-2", "2"), task("bash", "0-3"));
        let with = |group: &str, kernel: &str| {
            let root = machine(&[
                ("proc/7/task/7/status", &of_all),
                ("proc/7/task/9/status", &of_core_2),
                ("proc/7/task/9/cgroup", group),
                ("proc/20/task/20/status", kernel),
            ]);
            in_the_way(root.path(), &"2-3".parse().unwrap())
        };
        let kernel = "Name:\tksoftirqd/2\nCpus_allowed_list:\t2\n";
        let said = with("0::/\n", kernel).unwrap();
        assert!(said.starts_with("thread 9 (worker-2) of process 7 is pinned to 2"), "{said}");
        assert_eq!(with("0::/cableway\n", kernel), None);
    }

    #[test]
    fn what_the_kernel_refuses_keeps_its_reason() {
        let root = machine(&[("proc/self/mounts", UNIFIED)]);
        let hierarchy = Hierarchy::find(root.path()).unwrap();
        let refused = hierarchy.isolate(&"1".parse().unwrap()).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::NotFound);
        hierarchy.remove().unwrap();
    }
}
