//! `cableway nic test`: a card that nobody uses finds out about itself.

use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use host::memory::Pages;
use host::pci::{self, Bdf, bind};
use host::vfio::Interrupt;
use nix::sys::eventfd::{EfdFlags, EventFd};
use pmd::access::vfio::VfioSpace;
use pmd::dma::{Arena, ArenaOptions};
use pmd::nic::selftest::{self, Line, Outcome};
use serde::Serialize;

use crate::output::{self, refuse};

/// Bytes of rings, more than the small ones of a test take.
const RING_BYTES: usize = 64 << 10;

#[derive(Args)]
pub(crate) struct TestArgs {
    /// Its PCI address, as in `0000:01:00.0`.
    bdf: Bdf,
    /// Of a virtual function whose physical one is with vfio-pci as well: the token that its owner set.
    #[arg(long, value_name = "UUID")]
    vf_token: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// A test as JSON has it.
#[derive(Serialize)]
struct Tested<'a> {
    name: &'a str,
    /// `ok`, `failed` or `not supported`.
    result: &'static str,
    /// What was seen, or what is wrong.
    detail: Option<&'a str>,
}

impl<'a> Tested<'a> {
    fn new(line: &'a Line) -> Self {
        let (result, detail) = match &line.outcome {
            Outcome::Ok(seen) => ("ok", Some(seen.as_str())),
            Outcome::Failed(why) => ("failed", Some(why.as_str())),
            Outcome::NotSupported => ("not supported", None),
        };
        Self { name: line.name, result, detail }
    }
}

/// Tests it. The status is 1 where a test failed.
///
/// # Errors
/// The report cannot be written, or there is no memory for the test.
pub(super) fn run(root: &Path, args: &TestArgs) -> Result<ExitCode> {
    let bdf = args.bdf;
    let Some(function) = pci::find(root, bdf) else {
        return Ok(refuse(bind::BindError::Unknown(bdf)));
    };
    let Some(name) = pmd::nic::driver_for(function.id()) else {
        let (vendor, device) = (function.vendor, function.device);
        return Ok(refuse(format!(
            "{bdf} is {vendor:04x}:{device:04x}, and Cableway has no driver for that"
        )));
    };
    if !function.virtuals.is_empty() {
        return Ok(refuse(bind::BindError::HasVirtuals { bdf, count: function.virtuals.len() }));
    }
    if let Err(why) = host::vfio::check(root, bdf) {
        return Ok(refuse(why));
    }
    let space = match VfioSpace::new() {
        Ok(space) => space,
        Err(why) => return Ok(refuse(why)),
    };
    let card = match space.open(bdf, args.vf_token.as_deref()) {
        Ok(card) => card,
        Err(why) => return Ok(refuse(why)),
    };
    let options = selftest::options();
    let buffers = options.receive_ring + options.spare + options.transmit_ring;
    let arena = ArenaOptions { rings: RING_BYTES, buffers, pages: Pages::Auto, node: function.node };
    let arena = Arena::new(arena, space.memory()).with_context(|| format!("{bdf}: memory for the test"))?;
    let events = (0..card.device().interrupts(Interrupt::Msix))
        .map(|_| EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK))
        .collect::<Result<Vec<_>, _>>()?;
    let all: Vec<_> = events.iter().map(AsFd::as_fd).collect();
    if !all.is_empty() {
        let tied = card.device().signal(Interrupt::Msix, 0, &all);
        tied.with_context(|| format!("{bdf}: its interrupts cannot be listened to"))?;
    }
    let mut raised =
        |vector: u16| events.get(usize::from(vector)).is_some_and(|event: &EventFd| event.read().is_ok());
    let lines = pmd::nic::self_test(&card, &arena, &mut raised)?;
    let failed = lines.iter().any(|line| matches!(line.outcome, Outcome::Failed(_)));
    let tested: Vec<Tested<'_>> = lines.iter().map(Tested::new).collect();
    if args.json {
        let report =
            serde_json::json!({ "bdf": bdf.to_string(), "card": name, "passed": !failed, "tests": tested });
        output::print(&(serde_json::to_string_pretty(&report)? + "\n"))?;
    } else {
        let mut table = output::table(&["test", "result", "seen"], &[]);
        for test in tested {
            table.add_row([test.name, test.result, test.detail.unwrap_or("-")]);
        }
        output::print(&format!("{bdf}, {name}\n{table}\n"))?;
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
