//! Cards that are polled from another memory node than theirs: what a configuration cannot help, or got wrong.
//!
//! Their rings and buffers are on their node, and so are queues that nobody pinned, where a worker is: see [`crate::runtime`].

use std::path::Path;

use host::pci;
use host::topology::{self, CoreSet};

use super::{Behind, Config};

/// A sentence for each port whose card is polled from afar, on the machine below `root`.
pub fn far_cards(config: &Config, root: &Path) -> Vec<String> {
    let node_of = |core: &u32| topology::node_of_core(root, *core);
    let far = config.ports.iter().filter_map(|port| {
        let Behind::Nic { bdf, .. } = &port.behind else { return None };
        let near = pci::find(root, *bdf)?.node?;
        let workers = &config.switch.workers;
        let cores: Vec<u32> = match &port.queue_workers {
            Some(pinned) => pinned.iter().copied().filter(|core| node_of(core) != Some(near)).collect(),
            None if workers.iter().any(|core| node_of(core) == Some(near)) => Vec::new(),
            None => workers.clone(),
        };
        let first = cores.first()?;
        let from = node_of(first).map_or_else(String::new, |node| format!(" on node {node}"));
        let there: CoreSet = topology::online_cores(root)
            .iter()
            .flat_map(CoreSet::iter)
            .filter(|core| node_of(core) == Some(near))
            .collect();
        let cores: CoreSet = cores.into_iter().collect();
        let remedy = match (&port.queue_workers, there.is_empty()) {
            (_, true) => "put it into another slot".to_owned(),
            (Some(_), false) => format!("leave `queue_workers` out, or name cores of {there}"),
            (None, false) => format!("give `workers` one of the cores {there}"),
        };
        Some(format!(
            "port {}: card {bdf} and its memory are on memory node {near}, and core {cores}{from} polls it: every descriptor and frame \
             crosses over; {remedy}",
            port.name
        ))
    });
    far.collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::Lab;
    use super::*;

    /// A machine of two nodes with two cores each; a card on node 1, another one of which nobody knows.
    fn machine() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let write = |path: String, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("sys/devices/system/cpu/online".into(), "0-3\n");
        for core in 0..4 {
            write(format!("sys/devices/system/cpu/cpu{core}/node{}/cpulist", core / 2), "");
        }
        for (bdf, node) in [("0000:81:00.0", "1\n"), ("0000:82:00.0", "-1\n")] {
            for (file, text) in
                [("vendor", "0x8086\n"), ("device", "0x10c9\n"), ("class", "0x020000\n"), ("numa_node", node)]
            {
                write(format!("sys/bus/pci/devices/{bdf}/{file}"), text);
            }
        }
        root
    }

    #[test]
    fn a_card_that_is_polled_from_afar_is_told_with_the_cores_that_are_near() {
        let root = machine();
        let said = |workers: &str, pinned: &str| {
            let text = format!(
                "[switch]\nworkers = {workers}\n[[port]]\nname = \"w\"\nkind = \"nic\"\ndevice = \"0000:81:00.0\"\n{pinned}\n\
                 [[port]]\nname = \"x\"\nkind = \"nic\"\ndevice = \"0000:82:00.0\"\n"
            );
            let config = Config::parse(&text, Path::new("x.toml"), Path::new("/run/x"), &Lab).unwrap();
            far_cards(&config, root.path())
        };
        let far = "port w: card 0000:81:00.0 and its memory are on memory node 1, and core";
        assert_eq!(
            said("[0, 1]", ""),
            [format!(
                "{far} 0-1 on node 0 polls it: every descriptor and frame crosses over; give `workers` one of the cores 2-3"
            )]
        );
        assert_eq!(said("[0, 2]", ""), [""; 0], "the near one polls it");
        let [pinned] = &said("[0, 2]", "queue_workers = [0]")[..] else { panic!("one sentence") };
        assert!(pinned.starts_with(&format!("{far} 0 on node 0 polls it")), "{pinned}");
        assert!(pinned.ends_with("leave `queue_workers` out, or name cores of 2-3"), "{pinned}");
    }
}
