//! Which files a running switch may open, make and remove, out of its configuration.
//!
//! Owns the lists of directories and devices, for housekeeping, sessions, the control socket and main. Workers need none: their
//! seccomp filter lets them open nothing. What is in force can never be widened, so a reload has to live within what the start
//! named (`config::machine` says so to the user). Connecting to a socket is not restricted: which VMM a client port connects to may
//! change at any time.

use std::path::{Path, PathBuf};

use host::sandbox::TUN;
use host::sandbox::files::{FileAccess, directory_of};

use super::Devices;
use crate::config::Config;

/// Cores and memory nodes, which placement and reports look up.
const MACHINE: &str = "/sys/devices/system";

/// What is known of network cards, and their groups; huge pages for them; what the IOMMU refused them.
const CARDS: [&str; 4] = ["/sys/devices", "/sys/bus/pci", "/sys/kernel", host::vfio::LOG];

/// What `config` needs. Directories, not files: an editor puts a new file in the old one's place, and rules follow the
/// old one. `None` if the configuration wants no confinement.
pub fn of(config: &Config, run_dir: &Path) -> Option<FileAccess> {
    if !config.switch.confine_files {
        return None;
    }
    let mut read = vec![PathBuf::from(MACHINE)];
    // Where the file is named, and where it lies if that is a symbolic link.
    for file in [std::path::absolute(&config.file), std::fs::canonicalize(&config.file)] {
        read.extend(file.ok().as_deref().and_then(Path::parent).map(Path::to_owned));
    }
    let mut sockets = vec![run_dir.to_owned()];
    let ours = config.ports.iter().filter_map(|port| port.behind.listens_on());
    sockets.extend(ours.filter_map(|socket| Some(directory_of(socket)?.to_owned())));
    let kinds = Devices::of(config);
    let tun = kinds.contains(Devices::TUN).then(|| PathBuf::from(TUN));
    let cards = kinds.contains(Devices::VFIO);
    let vfio = host::vfio::FILES.iter().map(PathBuf::from).filter(|_| cards);
    read.extend(CARDS.iter().map(PathBuf::from).filter(|_| cards));
    let directory = |file: &Path| directory_of(file).map(Path::to_owned);
    read.extend(config.ports.iter().filter_map(|p| directory(p.behind.reads()?)));
    let written = config.ports.iter().flat_map(|port| port.writes());
    let mut write: Vec<_> = written.filter_map(directory).collect();
    for list in [&mut read, &mut sockets, &mut write] {
        list.sort_unstable();
        list.dedup();
    }
    Some(FileAccess { read, sockets, write, devices: tun.into_iter().chain(vfio).collect() })
}
