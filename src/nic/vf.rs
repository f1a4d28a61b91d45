//! `cableway nic vf`: what a virtual function may, of whoever has its card: a running switch, or the kernel.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, ValueEnum};
use control::client::{self, ClientError};
use control::{encoded, run_dir_of_client};
use host::pci::vf::{self, Link};
use host::pci::{self, Bdf, Function, bind};
use serde::Serialize;
use settings::values::HardwareAddress;
use switch::control::door;
use switch::control::report::{PortReport, PortsReport, VfReport};

use crate::output::{self, refuse};

#[derive(Args)]
pub(crate) struct VfArgs {
    /// The physical function's PCI address, as in `0000:01:00.0`.
    bdf: Bdf,
    /// The virtual function's number, from 0.
    number: u16,
    #[command(flatten)]
    change: Change,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// The run directory of the switch that has the card [default: /run/cableway, or $XDG_RUNTIME_DIR/cableway when not root].
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
}

/// What is to change; what is left out stays.
#[derive(Args)]
struct Change {
    /// Its address.
    #[arg(long, value_name = "ADDRESS", value_parser = address)]
    mac: Option<[u8; 6]>,
    /// Its VLAN; 0: none.
    #[arg(long, value_parser = clap::value_parser!(u16).range(0..=4094))]
    vlan: Option<u16>,
    /// The priority of what it sends in its VLAN.
    #[arg(long, value_parser = clap::value_parser!(u8).range(0..=7))]
    qos: Option<u8>,
    /// Whether it may change its address and receive all groups.
    #[arg(long)]
    trust: Option<OnOff>,
    /// Whether what it sends must come from its own address.
    #[arg(long)]
    spoof_check: Option<OnOff>,
    /// Whether it sees a link: as the card, always, or never. Only of a card that the kernel drives.
    #[arg(long)]
    link_state: Option<LinkState>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OnOff {
    On,
    Off,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LinkState {
    Auto,
    Enable,
    Disable,
}

/// A function as it is shown, whoever has its card. Names are those of ip-link(8).
#[derive(Serialize)]
pub(super) struct Shown {
    number: u16,
    mac: String,
    vlan: Option<u16>,
    qos: u8,
    trust: bool,
    spoof_check: bool,
    /// Of a card that the kernel drives.
    #[serde(skip_serializing_if = "Option::is_none")]
    link_state: Option<&'static str>,
    /// These, of a card that a switch has: whether a driver has it, and what that asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    active: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    granted: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    refused: Option<u64>,
}

impl From<VfReport> for Shown {
    fn from(vf: VfReport) -> Self {
        Self {
            number: vf.number,
            mac: vf.mac,
            vlan: vf.vlan,
            qos: vf.qos,
            trust: vf.trust,
            spoof_check: vf.spoof_check,
            link_state: None,
            active: Some(vf.active),
            granted: Some(vf.granted),
            refused: Some(vf.refused),
        }
    }
}

impl From<vf::Vf> for Shown {
    fn from(vf: vf::Vf) -> Self {
        Self {
            number: vf.number,
            mac: text_of(vf.mac),
            vlan: vf.vlan.map(|(vlan, _)| vlan),
            qos: vf.vlan.map_or(0, |(_, qos)| qos),
            trust: vf.trust,
            spoof_check: vf.spoof_check,
            link_state: Some(vf.link.word()),
            active: None,
            granted: None,
            refused: None,
        }
    }
}

fn text_of(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn address(text: &str) -> Result<[u8; 6], String> {
    text.parse::<HardwareAddress>().map(|address| address.0)
}

/// Changes it, or shows it.
///
/// # Errors
/// The kernel or the switch does not answer, or the kernel refuses a change.
pub(super) fn run(root: &Path, args: &VfArgs) -> Result<ExitCode> {
    let Some(function) = pci::find(root, args.bdf) else {
        return Ok(refuse(bind::BindError::Unknown(args.bdf)));
    };
    if function.most_virtuals.is_none() {
        return Ok(refuse(bind::BindError::NoVirtuals(args.bdf)));
    }
    match function.driver.as_deref() {
        Some(driver) if driver != pci::VFIO => by_kernel(&function, driver, args),
        _ => by_switch(args),
    }
}

/// One of the kernel's drivers has the card.
fn by_kernel(function: &Function, driver: &str, args: &VfArgs) -> Result<ExitCode> {
    let (bdf, number) = (args.bdf, args.number);
    let Some(interface) = function.interfaces.first() else {
        return Ok(refuse(format!(
            "{bdf} has no interface, by which {driver} could be asked about its virtual functions"
        )));
    };
    let find = || Ok::<_, vf::VfError>(vf::list(interface)?.into_iter().find(|vf| vf.number == number));
    let Some(before) = find()? else {
        let count = function.virtuals.len();
        return Ok(refuse(format!("{bdf} has {count} virtual functions, there is no number {number}")));
    };
    let change = match args.change.of_kernel(&before) {
        Ok(change) => change,
        Err(why) => return Ok(refuse(why)),
    };
    vf::change(interface, number, &change)?;
    show(args, find()?.unwrap_or(before).into())
}

/// The functions of a card, of whoever can be asked about them.
pub(super) fn all(function: &Function, run_dir: &Path) -> Vec<Shown> {
    if function.virtuals.is_empty() {
        return Vec::new();
    }
    if function.driver.as_deref() == Some(pci::VFIO) {
        let port = port_of(run_dir, function.bdf).ok().flatten();
        return port.map_or_else(Vec::new, |port| port.vfs.into_iter().map(Shown::from).collect());
    }
    let listed = function.interfaces.first().and_then(|interface| vf::list(interface).ok());
    listed.unwrap_or_default().into_iter().map(Shown::from).collect()
}

/// The card is a port of a running switch.
fn by_switch(args: &VfArgs) -> Result<ExitCode> {
    let run_dir = run_dir_of_client(args.run_dir.as_deref())?;
    let port = match port_of(&run_dir, args.bdf) {
        Ok(Some(port)) => port,
        Ok(None) => {
            return Ok(refuse(format!(
                "{} is with vfio-pci, and is no port of the switch in {}: --run-dir says where the one is that has it",
                args.bdf,
                run_dir.display()
            )));
        }
        Err(error) => {
            return Ok(refuse(format!("{} is with vfio-pci, so a switch has it: {error}", args.bdf)));
        }
    };
    if args.change.link_state.is_some() {
        return Ok(refuse("--link-state: a function of a card that a switch has sees the card's link"));
    }
    let query = args.change.query();
    let shown = if query.is_empty() {
        let count = port.vfs.len();
        match port.vfs.into_iter().find(|vf| vf.number == args.number) {
            Some(vf) => vf,
            None => {
                let number = args.number;
                return Ok(refuse(format!(
                    "{} has {count} virtual functions, there is no number {number}",
                    args.bdf
                )));
            }
        }
    } else {
        let name = encoded(&port.name);
        match client::post::<VfReport>(
            &door(&run_dir),
            &format!("/v1/ports/{name}/vfs/{}?{query}", args.number),
        ) {
            Err(ClientError::Refused(why)) => return Ok(refuse(why)),
            answer => answer?.value,
        }
    };
    show(args, shown.into())
}

fn show(args: &VfArgs, shown: Shown) -> Result<ExitCode> {
    if args.json {
        output::print(&(serde_json::to_string_pretty(&shown)? + "\n"))?;
    } else {
        output::print(&format!("{} {}\n", args.bdf, line(&shown)))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The port of the switch in `run_dir` that has this card.
///
/// # Errors
/// There is no answer.
pub(super) fn port_of(run_dir: &Path, bdf: Bdf) -> Result<Option<PortReport>, ClientError> {
    let ports = client::get::<PortsReport>(&door(run_dir), "/v1/ports")?.value.ports;
    let bdf = bdf.to_string();
    Ok(ports.into_iter().find(|port| port.kind == "nic" && port.device.as_deref() == Some(&bdf)))
}

/// A function in a line, in the words of ip-link(8).
pub(super) fn line(vf: &Shown) -> String {
    let on = |on: bool| if on { "on" } else { "off" };
    let mut text = format!("vf {} MAC {}", vf.number, vf.mac);
    if let Some(vlan) = vf.vlan {
        // Writing to a string does not fail.
        let _ = write!(text, ", vlan {vlan}, qos {}", vf.qos);
    }
    let _ = write!(text, ", spoof checking {}, trust {}", on(vf.spoof_check), on(vf.trust));
    if let Some(state) = vf.link_state {
        let _ = write!(text, ", link-state {state}");
    }
    if let (Some(true), Some(granted), Some(refused)) = (vf.active, vf.granted, vf.refused) {
        let _ = write!(text, ", in use ({granted} requests granted, {refused} refused)");
    }
    text
}

impl Change {
    /// As the kernel takes it, for a function that is as `now`. VLAN and priority are one setting there.
    fn of_kernel(&self, now: &vf::Vf) -> Result<vf::Change, String> {
        let (vlan, qos) = now.vlan.unwrap_or_default();
        let wanted = (self.vlan.unwrap_or(vlan), self.qos.unwrap_or(qos));
        let vlan = match wanted {
            _ if self.vlan.is_none() && self.qos.is_none() => None,
            (0, _) if self.qos.is_some_and(|qos| qos > 0) => {
                return Err("`--qos` goes with a VLAN: give one".to_owned());
            }
            (0, _) => Some((0, 0)),
            wanted => Some(wanted),
        };
        let on = |value: OnOff| value == OnOff::On;
        let link = self.link_state.map(|state| match state {
            LinkState::Auto => Link::Auto,
            LinkState::Enable => Link::Enable,
            LinkState::Disable => Link::Disable,
        });
        let (trust, spoof_check) = (self.trust.map(on), self.spoof_check.map(on));
        Ok(vf::Change { mac: self.mac, vlan, trust, spoof_check, link })
    }

    /// As the control socket takes it; empty: nothing is to change.
    fn query(&self) -> String {
        let on = |value: OnOff| (value == OnOff::On).to_string();
        let mac = self.mac.map(text_of);
        let pairs = [
            ("mac", mac),
            ("vlan", self.vlan.map(|vlan| vlan.to_string())),
            ("qos", self.qos.map(|qos| qos.to_string())),
            ("trust", self.trust.map(on)),
            ("spoof_check", self.spoof_check.map(on)),
        ];
        let given = pairs.into_iter().filter_map(|(key, value)| Some(format!("{key}={}", value?)));
        given.collect::<Vec<_>>().join("&")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_given_is_changed() {
        let mut change =
            Change { mac: None, vlan: None, qos: None, trust: None, spoof_check: None, link_state: None };
        assert_eq!(change.query(), "");
        (change.mac, change.vlan, change.trust) = (Some([2, 0, 0, 0, 0, 0xa]), Some(0), Some(OnOff::Off));
        assert_eq!(change.query(), "mac=02:00:00:00:00:0a&vlan=0&trust=false");
        let now = vf::Vf {
            number: 0,
            mac: [0; 6],
            vlan: Some((20, 3)),
            trust: true,
            spoof_check: true,
            link: Link::Auto,
        };
        let wanted =
            vf::Change { mac: change.mac, vlan: Some((0, 0)), trust: Some(false), ..vf::Change::default() };
        assert_eq!(change.of_kernel(&now), Ok(wanted));
        (change.vlan, change.qos) = (None, Some(5));
        assert_eq!(change.of_kernel(&now).unwrap().vlan, Some((20, 5)), "the VLAN stays");
        assert!(change.of_kernel(&vf::Vf { vlan: None, ..now }).is_err(), "no VLAN to have a priority in");
    }
}
