//! The calling thread: which core it runs on, and the name that `top -H` shows.

use std::ffi::CString;
use std::io;
use std::path::{Path, PathBuf};

use core_affinity::CoreId;

use crate::partition;
use crate::topology::{self, CoreSet, TopologyError};

/// Why a thread could not be pinned.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// No such core, or it is switched off.
    #[error("core {core} does not exist or is offline; this machine has cores {online}")]
    NoSuchCore {
        /// The core asked for.
        core: u32,
        /// What there is.
        online: CoreSet,
    },
    /// The process is confined to other cores.
    #[error(
        "core {core} is not among the cores that this process may use; taskset or the cgroup's cpuset.cpus must allow it \
         (this thread: {permitted})"
    )]
    NotPermitted {
        /// The core asked for.
        core: u32,
        /// What the thread may use.
        permitted: CoreSet,
    },
    /// The core is in the isolated partition, which the thread cannot join.
    #[error(
        "core {core} is in the isolated partition {}, which this thread cannot join: {source}; start it as root, or give the core \
         back with cableway tune restore", folder.display()
    )]
    Partition {
        /// The core asked for.
        core: u32,
        /// The partition.
        folder: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The machine could not be read.
    #[error(transparent)]
    Topology(#[from] TopologyError),
}

/// Pins the calling thread to `core`. From then on it runs nowhere else, and neither do threads that it starts. A core of the
/// isolated partition has only threads that joined it: this one does.
///
/// # Errors
/// The core does not exist, or the process may not use it.
pub fn pin(core: u32) -> Result<(), PinError> {
    let online = topology::online_cores(Path::new("/"))?;
    // core_affinity's set ends at the C library's 1,024 cores; a core beyond is one that we cannot use.
    let addressable = libc::CPU_SETSIZE.unsigned_abs();
    if core >= addressable || !online.contains(core) {
        return Err(PinError::NoSuchCore { core, online });
    }
    partition::join(core).map_err(|(folder, source)| PinError::Partition { core, folder, source })?;
    if core_affinity::set_for_current(CoreId { id: core as usize }) {
        return Ok(());
    }
    Err(PinError::NotPermitted { core, permitted: topology::permitted_cores()? })
}

/// Confines the calling thread, and those that it starts from then on, to `cores`.
///
/// # Errors
/// One of them does not exist, or the process may not use it.
pub fn confine(cores: &CoreSet) -> Result<(), PinError> {
    let online = topology::online_cores(Path::new("/"))?;
    let mut set = nix::sched::CpuSet::new();
    for core in cores.iter() {
        if !online.contains(core) || set.set(core as usize).is_err() {
            return Err(PinError::NoSuchCore { core, online });
        }
    }
    if nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set).is_ok() {
        return Ok(());
    }
    let core = cores.iter().next().unwrap_or_default();
    Err(PinError::NotPermitted { core, permitted: topology::permitted_cores()? })
}

/// The calling thread may not be scheduled as real time.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot schedule a thread as SCHED_FIFO with priority {priority} ({source}); allow it with ulimit -r {priority} \
     (LimitRTPRIO={priority} in the service's unit), or the capability CAP_SYS_NICE"
)]
pub struct RealTimeError {
    priority: u8,
    source: nix::Error,
}

/// Schedules the calling thread as SCHED_FIFO: it runs whenever it can, before every thread of a lower priority (1 to 99),
/// for as long as it likes. Threads that it starts are ordinary again.
///
/// # Errors
/// The process may not.
pub fn run_real_time(priority: u8) -> Result<(), RealTimeError> {
    // SAFETY: all zeros is a valid parameter block.
    let mut parameters: libc::sched_param = unsafe { std::mem::zeroed() };
    parameters.sched_priority = priority.into();
    // SAFETY: the kernel reads the parameters; 0 is the calling thread.
    let result = unsafe {
        libc::sched_setscheduler(0, libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, &raw const parameters)
    };
    nix::Error::result(result).map(drop).map_err(|source| RealTimeError { priority, source })
}

/// Names the calling thread. The kernel keeps 15 bytes; longer names are cut.
pub fn name(name: &str) {
    let bytes: Vec<u8> = name.bytes().filter(|&b| b != 0).collect();
    if let Ok(name) = CString::new(bytes) {
        // A name is only for people to read: nothing depends on it, and setting one cannot fail.
        let _ = nix::sys::prctl::set_name(&name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pinned_thread_may_run_on_its_core_only_and_carries_its_name() {
        std::thread::spawn(|| {
            let core = topology::permitted_cores().unwrap().iter().next().unwrap();
            pin(core).unwrap();
            name("worker-0-of-the-switch");
            assert_eq!(topology::permitted_cores().unwrap(), CoreSet::from_iter([core]));
            let comm = std::fs::read_to_string("/proc/thread-self/comm").unwrap();
            assert_eq!(comm, "worker-0-of-the\n");
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_real_time_thread_says_so_and_what_it_starts_is_ordinary() {
        std::thread::spawn(|| match run_real_time(7) {
            Ok(()) => {
                let policy = |thread: &str| -> i32 {
                    let stat = std::fs::read_to_string(format!("/proc/{thread}/stat")).unwrap();
                    // Field 41 of proc_pid_stat(5); the name in field 2 ends with the last parenthesis.
                    let after = stat.rsplit_once(") ").unwrap().1;
                    after.split(' ').nth(41 - 3).unwrap().parse().unwrap()
                };
                assert_eq!(policy("thread-self"), libc::SCHED_FIFO);
                let child = std::thread::spawn(move || policy("thread-self"));
                assert_eq!(child.join().unwrap(), libc::SCHED_OTHER);
            }
            Err(error) => assert!(error.to_string().contains("ulimit -r 7"), "{error}"),
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_confined_thread_stays_among_its_cores() {
        std::thread::spawn(|| {
            let cores = topology::permitted_cores().unwrap();
            confine(&cores).unwrap();
            assert_eq!(topology::permitted_cores().unwrap(), cores);
            assert!(confine(&CoreSet::from_iter([4095])).unwrap_err().to_string().starts_with("core 4095"));
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_core_that_does_not_exist_is_refused_with_the_cores_that_do() {
        for core in [1023, 1024, u32::MAX] {
            let text = pin(core).unwrap_err().to_string();
            assert!(text.starts_with(&format!("core {core} does not exist")), "{text}");
        }
    }
}
