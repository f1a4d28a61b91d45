//! What a card counts and what its registers read, asked of whoever has it: the kernel, a running switch, or nobody.

use std::fs;
use std::path::Path;

use control::{client, encoded};
use host::pci::{self, Function};
use pmd::access::vfio::VfioSpace;
use switch::control::door;
use switch::control::report::{CardReport, DeviceCount, RegisterReport};

use super::vf::port_of;

/// What was to be seen.
#[derive(Default)]
pub(super) struct Looked {
    pub(super) card: CardReport,
    /// Why registers are not among it.
    pub(super) unread: Option<String>,
}

impl Looked {
    fn without(unread: String) -> Self {
        Self { unread: Some(unread), ..Self::default() }
    }
}

/// Looks at a card. One that nobody has is opened for it, which resets it; `token`: what a virtual function needs whose physical one
/// is with vfio-pci.
pub(super) fn look(root: &Path, function: &Function, run_dir: &Path, token: Option<&str>) -> Looked {
    let bdf = function.bdf;
    if let Some(driver) = function.driver.as_deref().filter(|driver| *driver != pci::VFIO) {
        let ask = function.interfaces.first().map(|name| format!(" (ethtool -d {name})")).unwrap_or_default();
        let unread = Some(format!("not while {driver} drives it{ask}"));
        return Looked {
            card: CardReport { counters: of_interfaces(root, function), registers: Vec::new() },
            unread,
        };
    }
    if let Ok(Some(port)) = port_of(run_dir, bdf) {
        let path = format!("/v1/ports/{}/registers", encoded(&port.name));
        return match client::get::<CardReport>(&door(run_dir), &path) {
            Ok(answer) => Looked { card: answer.value, unread: None },
            Err(error) => Looked::without(format!("port {} of the switch: {error}", port.name)),
        };
    }
    if let Some(obstacle) = super::show::obstacle(root, function) {
        return Looked::without(format!("not yet: {obstacle}"));
    }
    if !function.virtuals.is_empty() {
        return Looked::without("not while nobody has it who serves its virtual functions".to_owned());
    }
    let opened = VfioSpace::new().and_then(|space| space.open(bdf, token));
    let read = opened.map_err(|error| error.to_string()).and_then(|card| {
        // What it counts begins at zero, as it was reset just now.
        pmd::nic::registers(&card).map_err(|error| error.to_string())
    });
    match read {
        Ok(readings) => {
            let registers = readings.into_iter().map(RegisterReport::from).collect();
            Looked { card: CardReport { counters: Vec::new(), registers }, unread: None }
        }
        Err(why) => Looked::without(why),
    }
}

/// What the kernel counts of the interfaces on a card.
fn of_interfaces(root: &Path, function: &Function) -> Vec<DeviceCount> {
    let mut all = Vec::new();
    for interface in &function.interfaces {
        let folder = root.join("sys/class/net").join(interface).join("statistics");
        let mut names: Vec<String> = fs::read_dir(&folder)
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .collect();
        names.sort_unstable();
        for name in names {
            let count = fs::read_to_string(folder.join(&name)).ok().and_then(|text| text.trim().parse().ok());
            let name = if function.interfaces.len() > 1 { format!("{interface} {name}") } else { name };
            all.extend(count.map(|count| DeviceCount { name, count }));
        }
    }
    all
}
