//! What is shown of network cards: a table, a page on one of them, JSON.

use std::fmt::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use control::run_dir_of_client;
use host::pci::{self, Bdf, Function, bind};
use host::vfio::Way;
use serde::Serialize;
use switch::control::report::CardReport;

use super::vf::{self, Shown};
use super::{InfoArgs, ListArgs, look};
use crate::output::{self, refuse};

/// A card as JSON has it.
#[derive(Serialize)]
struct Card {
    bdf: String,
    vendor: String,
    device: String,
    /// Cableway's driver for it.
    card: Option<&'static str>,
    driver: Option<String>,
    former_driver: Option<String>,
    node: Option<u32>,
    iommu_group: Option<u32>,
    group_companions: Vec<String>,
    /// By which of VFIO's ways it is opened, while vfio-pci has it.
    vfio: Option<Vfio>,
    interfaces: Vec<Interface>,
    physical_function: Option<String>,
    virtual_functions: Vec<String>,
    most_virtual_functions: Option<u16>,
    /// What these may, as far as who has the card says.
    vfs: Vec<Shown>,
    /// Whether a port can open it now.
    drivable: bool,
    /// What is to be done before.
    obstacle: Option<String>,
}

/// One of VFIO's two ways, and the file that is opened.
#[derive(Serialize)]
struct Vfio {
    way: &'static str,
    file: String,
}

impl From<Way> for Vfio {
    fn from(way: Way) -> Self {
        let (way, file) = match way {
            Way::Device(file) => ("iommufd", file),
            Way::Group(file) => ("group", file),
        };
        Self { way, file: file.display().to_string() }
    }
}

/// All that is known of a card, as JSON has it.
#[derive(Serialize)]
struct Page {
    #[serde(flatten)]
    card: Card,
    #[serde(flatten)]
    looked: CardReport,
    /// Why there are no registers.
    registers_unread: Option<String>,
}

/// An interface of the kernel on a card.
#[derive(Serialize)]
struct Interface {
    name: String,
    /// Whether it has a link; unknown of one that is switched off.
    link: Option<bool>,
    /// What would be missed if the card were taken.
    uses: Vec<String>,
}

impl Card {
    fn new(root: &Path, function: &Function, run_dir: &Path) -> Self {
        let texts = |list: &[Bdf]| list.iter().map(Bdf::to_string).collect();
        let obstacle = obstacle(root, function);
        let interface = |name: &String| Interface {
            name: name.clone(),
            link: pci::has_link(root, name),
            uses: bind::uses(root, name, &bind::addresses(name)),
        };
        Self {
            bdf: function.bdf.to_string(),
            vendor: format!("{:04x}", function.vendor),
            device: format!("{:04x}", function.device),
            card: pmd::nic::driver_for(function.id()),
            driver: function.driver.clone(),
            former_driver: bind::former_driver(root, function.bdf),
            node: function.node,
            iommu_group: function.group,
            group_companions: texts(&function.companions),
            vfio: Way::of(root, function).map(Vfio::from),
            interfaces: function.interfaces.iter().map(interface).collect(),
            physical_function: function.physical.map(|bdf| bdf.to_string()),
            virtual_functions: texts(&function.virtuals),
            most_virtual_functions: function.most_virtuals,
            vfs: vf::all(function, run_dir),
            drivable: obstacle.is_none(),
            obstacle,
        }
    }

    /// What is to be done before it can be opened, or how it will be.
    fn readiness(&self) -> String {
        let way = self.vfio.as_ref().filter(|vfio| vfio.way == "iommufd");
        let ready = || if way.is_some() { "ready (iommufd)" } else { "ready" }.to_owned();
        self.obstacle.clone().unwrap_or_else(ready)
    }

    fn interfaces(&self) -> String {
        let shown = self.interfaces.iter().map(|interface| {
            let link = interface.link.map_or("", |up| if up { " (link up)" } else { " (no link)" });
            format!("{}{link}", interface.name)
        });
        shown.collect::<Vec<_>>().join(", ")
    }
}

/// What keeps a port from opening a card, and what to do about it; none: nothing.
pub(super) fn obstacle(root: &Path, function: &Function) -> Option<String> {
    let Function { bdf, vendor, device, .. } = function;
    if pmd::nic::driver_for(function.id()).is_none() {
        return Some(format!("no driver for {vendor:04x}:{device:04x}"));
    }
    let Some(group) = function.group else {
        return Some("no IOMMU: switch it on in the firmware, boot with intel_iommu=on".to_owned());
    };
    let others = function.in_the_way(root);
    if !others.is_empty() {
        return Some(format!("group {group}: bind also {}", pci::listed(&others)));
    }
    if function.driver.as_deref() != Some(pci::VFIO) {
        return Some(format!("cableway nic bind {bdf}"));
    }
    None
}

fn or_dash(text: Option<impl ToString>) -> String {
    text.map_or_else(|| "-".to_owned(), |text| text.to_string())
}

/// All network cards.
///
/// # Errors
/// The list cannot be written.
pub(super) fn list(root: &Path, args: &ListArgs) -> Result<ExitCode> {
    let functions = pci::list(root);
    let run_dir = run_dir_of_client(args.run_dir.as_deref())?;
    let cards = functions.iter().filter(|f| f.is_network()).map(|f| Card::new(root, f, &run_dir));
    let cards: Vec<Card> = cards.collect();
    if args.json {
        output::print(&(serde_json::to_string_pretty(&cards)? + "\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    if cards.is_empty() {
        output::print("This machine has no network cards on PCI.\n")?;
        return Ok(ExitCode::SUCCESS);
    }
    let header = ["address", "device", "driver", "group", "node", "interface", "VFs", "for Cableway"];
    let mut table = output::table(&header, &[3, 4, 6]);
    for card in &cards {
        let vfs = card.most_virtual_functions.map(|most| format!("{}/{most}", card.virtual_functions.len()));
        let mut device = format!("{}:{}", card.vendor, card.device);
        if let Some(name) = card.card {
            write!(device, " ({name})")?;
        }
        table.add_row([
            card.bdf.clone(),
            device,
            or_dash(card.driver.as_ref()),
            or_dash(card.iommu_group),
            or_dash(card.node),
            if card.interfaces.is_empty() { "-".to_owned() } else { card.interfaces() },
            or_dash(vfs),
            card.readiness(),
        ]);
    }
    let mut text = format!("{table}\n");
    for card in &cards {
        for shown in &card.vfs {
            writeln!(text, " {} {}", card.bdf, vf::line(shown))?;
        }
    }
    output::print(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// One function, a network card or not.
///
/// # Errors
/// The page cannot be written.
pub(super) fn info(root: &Path, args: &InfoArgs) -> Result<ExitCode> {
    let bdf = args.bdf;
    let Some(function) = pci::find(root, bdf) else {
        return Ok(refuse(bind::BindError::Unknown(bdf)));
    };
    let run_dir = run_dir_of_client(args.run_dir.as_deref())?;
    let card = Card::new(root, &function, &run_dir);
    let looked = look::look(root, &function, &run_dir, args.vf_token.as_deref());
    if args.json {
        let page = Page { card, looked: looked.card, registers_unread: looked.unread };
        output::print(&(serde_json::to_string_pretty(&page)? + "\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut text = format!("{bdf}\n");
    let mut line = |name: &str, value: String| writeln!(text, "  {name:<18} {value}");
    line(
        "device",
        format!("{}:{} {}", card.vendor, card.device, card.card.unwrap_or("(no driver in Cableway)")),
    )?;
    line("driver", or_dash(card.driver.as_ref()))?;
    if let Some(former) = &card.former_driver {
        line("before that", former.clone())?;
    }
    line("memory node", or_dash(card.node))?;
    let companions = match &*card.group_companions {
        [] => "alone".to_owned(),
        others => format!("with {}", others.join(" ")),
    };
    line("IOMMU group", card.iommu_group.map_or("-".to_owned(), |group| format!("{group}, {companions}")))?;
    for interface in &card.interfaces {
        let link = interface.link.map_or("", |up| if up { ", link up" } else { ", no link" });
        let uses = interface.uses.iter().map(|u| format!(", {u}")).collect::<String>();
        line("interface", format!("{}{link}{uses}", interface.name))?;
    }
    if let Some(physical) = &card.physical_function {
        line("virtual of", physical.clone())?;
    }
    if let Some(most) = card.most_virtual_functions {
        let now = card.virtual_functions.len();
        line("virtual functions", format!("{now} of {most} {}", card.virtual_functions.join(" ")))?;
    }
    for shown in &card.vfs {
        line("", vf::line(shown))?;
    }
    if let Some(Vfio { way, file }) = &card.vfio {
        line("VFIO", format!("{file} ({way})"))?;
    }
    line("for Cableway", card.readiness())?;
    if let Some(unread) = &looked.unread {
        line("registers", unread.clone())?;
    }
    text += &details(&looked.card);
    output::print(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// Counters and registers in tables; of arrays of registers those that are not zero.
fn details(card: &CardReport) -> String {
    let mut text = String::new();
    if !card.counters.is_empty() {
        let mut table = output::table(&["counter", ""], &[1]);
        for counter in &card.counters {
            table.add_row([counter.name.clone(), output::grouped(counter.count)]);
        }
        text += &format!("\n{table}\n");
    }
    let shown = card.registers.iter().filter(|register| register.index.is_none() || register.value != 0);
    let mut table = output::table(&["register", "at", "value", "fields"], &[]);
    for register in shown {
        let index = register.index.map_or(String::new(), |index| format!("[{index}]"));
        let fields = register.fields.iter().filter(|field| field.value != 0);
        let fields: Vec<_> = fields.map(|field| format!("{}={:#x}", field.name, field.value)).collect();
        table.add_row([
            format!("{}{index}", register.name),
            format!("{:#07x}", register.offset),
            format!("{:#010x}", register.value),
            fields.join(" "),
        ]);
    }
    if !card.registers.is_empty() {
        text += &format!("\n{table}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_keeps_a_card_from_being_driven_is_said_with_the_way_out() {
        let root = tempfile::tempdir().unwrap();
        let mut card = Function {
            bdf: "0000:01:00.0".parse().unwrap(),
            vendor: 0x8086,
            device: 0x1234,
            class: 0x02_0000,
            driver: None,
            node: None,
            group: None,
            companions: Vec::new(),
            vfio_device: None,
            interfaces: Vec::new(),
            physical: None,
            virtuals: Vec::new(),
            most_virtuals: None,
            virtual_distances: None,
        };
        let say = |card: &Function| obstacle(root.path(), card);
        assert_eq!(say(&card).unwrap(), "no driver for 8086:1234");
        card.device = 0x10d3;
        assert!(say(&card).unwrap().starts_with("no IOMMU"));
        card.group = Some(4);
        assert_eq!(say(&card).unwrap(), "cableway nic bind 0000:01:00.0");
        card.driver = Some("vfio-pci".to_owned());
        assert_eq!(say(&card), None);
    }
}
