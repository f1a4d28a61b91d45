//! `cableway nic vf`: what a virtual function may, of whoever has its card: a running switch.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, ValueEnum};
use control::client::{self, ClientError};
use control::{encoded, run_dir_of_client};
use host::pci::{self, Bdf, bind};
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
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OnOff {
    On,
    Off,
}

fn address(text: &str) -> Result<[u8; 6], String> {
    text.parse::<HardwareAddress>().map(|address| address.0)
}

/// Changes it, or shows it.
///
/// # Errors
/// The kernel or the switch does not answer.
pub(super) fn run(root: &Path, args: &VfArgs) -> Result<ExitCode> {
    let Some(function) = pci::find(root, args.bdf) else {
        return Ok(refuse(bind::BindError::Unknown(args.bdf)));
    };
    if function.most_virtuals.is_none() {
        return Ok(refuse(bind::BindError::NoVirtuals(args.bdf)));
    }
    by_switch(args)
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
pub(super) fn line(vf: &VfReport) -> String {
    let on = |on: bool| if on { "on" } else { "off" };
    let mut text = format!("vf {} MAC {}", vf.number, vf.mac);
    if let Some(vlan) = vf.vlan {
        // Writing to a string does not fail.
        let _ = write!(text, ", vlan {vlan}, qos {}", vf.qos);
    }
    let _ = write!(text, ", spoof checking {}, trust {}", on(vf.spoof_check), on(vf.trust));
    if vf.active {
        let _ = write!(text, ", in use ({} requests granted, {} refused)", vf.granted, vf.refused);
    }
    text
}

impl Change {
    /// As the control socket takes it; empty: nothing is to change.
    fn query(&self) -> String {
        let on = |value: OnOff| (value == OnOff::On).to_string();
        let mac = self.mac.map(|mac| mac.map(|byte| format!("{byte:02x}")).join(":"));
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
        let mut change = Change { mac: None, vlan: None, qos: None, trust: None, spoof_check: None };
        assert_eq!(change.query(), "");
        (change.mac, change.vlan, change.trust) = (Some([2, 0, 0, 0, 0, 0xa]), Some(0), Some(OnOff::Off));
        assert_eq!(change.query(), "mac=02:00:00:00:00:0a&vlan=0&trust=false");
    }
}
