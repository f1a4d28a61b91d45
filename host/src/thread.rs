//! The calling thread: which core it runs on, and the name that `top -H` shows.

use std::ffi::CString;
use std::path::Path;

use core_affinity::CoreId;

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
    /// The machine could not be read.
    #[error(transparent)]
    Topology(#[from] TopologyError),
}

/// Pins the calling thread to `core`. From then on it runs nowhere else, and neither do threads that it starts.
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
    if core_affinity::set_for_current(CoreId { id: core as usize }) {
        return Ok(());
    }
    Err(PinError::NotPermitted { core, permitted: topology::permitted_cores()? })
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
    fn a_core_that_does_not_exist_is_refused_with_the_cores_that_do() {
        for core in [1023, 1024, u32::MAX] {
            let text = pin(core).unwrap_err().to_string();
            assert!(text.starts_with(&format!("core {core} does not exist")), "{text}");
        }
    }
}
