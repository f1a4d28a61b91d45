//! What a node changes on its host, and how each change is taken back.
//!
//! Owns huge-page pools, tuning and the binding of network cards, as far as a node needs them. Taking back works also for a change
//! that was noted and not yet made, and twice.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use host::pci::{self, Bdf, bind};
use host::tune::{self, Effect};
use host::{huge_pool, topology};
use serde::{Deserialize, Serialize};

use super::config::{Node, Pool, Tuning};
use crate::output;

/// One change, with what was there before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Change {
    /// A pool of huge pages got another size.
    HugePages {
        /// Memory node.
        node: u32,
        /// Bytes of a page.
        page_size: u64,
        /// Pages before.
        before: u64,
    },
    /// A card went to vfio-pci.
    Bound {
        /// Which.
        device: String,
    },
    /// The kernel's knobs were set; what they held is in a file.
    Tuned {
        /// Which.
        saved: PathBuf,
    },
    /// An adapter got virtual functions; it had none.
    Virtuals {
        /// Which.
        device: String,
    },
}

/// Something that is to be done, and the change that it makes.
pub(super) struct Step {
    /// What is written down before it is done.
    pub(super) change: Change,
    /// For a person.
    pub(super) what: String,
    make: Box<dyn Fn() -> Result<()>>,
}

impl Step {
    /// Does it.
    ///
    /// # Errors
    /// What the kernel refused.
    pub(super) fn make(&self) -> Result<()> {
        (self.make)().with_context(|| self.what.clone())
    }
}

/// What has to be done on this host for `node`, in order. What is as it should be already is left alone.
pub(super) fn steps(node: &Node) -> Vec<Step> {
    let root = Path::new("/");
    let pools = topology::huge_pools(root);
    let mut steps: Vec<Step> = Vec::new();
    for Pool { node, page_size, pages, .. } in node.host.pools.iter().cloned() {
        let before =
            pools.iter().find(|p| (p.node, p.page_size) == (node, page_size)).map_or(0, |pool| pool.total);
        if before < pages {
            steps.push(Step {
                change: Change::HugePages { node, page_size, before },
                what: format!(
                    "set aside {pages} huge pages of {} on memory node {node}, {before} so far",
                    output::bytes(page_size)
                ),
                make: Box::new(move || {
                    let got = huge_pool::set(root, node, page_size, pages)?;
                    ensure!(
                        got >= pages,
                        "the kernel found only {got}: memory is in too many pieces; set them aside right after the machine's \
                         start, or on the kernel's command line (hugepagesz=, hugepages=)"
                    );
                    Ok(())
                }),
            });
        }
    }
    steps.extend(node.host.tuning.clone().and_then(tune));
    for nic in &node.nics {
        let (bdf, force, count) = (nic.device, nic.force, nic.vfs);
        let Some(function) = pci::find(root, bdf) else { continue };
        if nic.bind && function.driver.as_deref() != Some(pci::VFIO) {
            let driver = function.driver.clone().unwrap_or_else(|| "no driver".to_owned());
            steps.push(Step {
                change: Change::Bound { device: bdf.to_string() },
                what: format!("bind {bdf} to vfio-pci, now with {driver}"),
                make: Box::new(move || {
                    bind::bind(root, &bind::check(root, bdf, &[bdf], force)?)?;
                    Ok(())
                }),
            });
        }
        // Behind that: functions are whose the card is, and a card with functions does not change hands.
        if let Some(count) = count.filter(|count| function.virtuals.len() != usize::from(*count)) {
            let where_they_are: Vec<Bdf> =
                (0..count).filter_map(|number| function.virtual_at(number)).collect();
            steps.push(Step {
                change: Change::Virtuals { device: bdf.to_string() },
                what: format!("make {count} virtual functions of {bdf}: {}", pci::listed(&where_they_are)),
                make: Box::new(move || Ok(bind::set_virtuals(root, bdf, count)?)),
            });
        }
        // Those of a card that is with vfio-pci are with it from the start.
        if !nic.bind {
            let wanted = node.machines.iter().flat_map(|machine| &machine.pci).map(|passed| passed.device);
            let of_card = |bdf: &Bdf| (0..count.unwrap_or(0)).any(|n| function.virtual_at(n) == Some(*bdf));
            steps.extend(wanted.filter(of_card).filter_map(take_virtual));
        }
    }
    steps
}

/// Binds a virtual function for a machine, which need not be there yet.
fn take_virtual(bdf: Bdf) -> Option<Step> {
    let root = Path::new("/");
    let driver = pci::find(root, bdf).and_then(|function| function.driver);
    (driver.as_deref() != Some(pci::VFIO)).then(|| Step {
        change: Change::Bound { device: bdf.to_string() },
        what: format!("bind {bdf} to vfio-pci, for its machine"),
        make: Box::new(move || {
            bind::bind(root, &bind::check(root, bdf, &[bdf], false)?)?;
            Ok(())
        }),
    })
}

/// Sets knobs, if any has to be.
fn tune(tuning: Tuning) -> Option<Step> {
    let Tuning { name, profile, division, saved } = tuning;
    let root = Path::new("/");
    let lines = tune::check(root, &profile, &division);
    let differ = lines.iter().filter(|line| line.effect == Effect::Differs).count();
    let cores = &division.isolated;
    let what = format!(
        "set {differ} of {} knobs of the kernel as profile {name} says, for cores {cores}",
        lines.len()
    );
    let change = Change::Tuned { saved: saved.clone() };
    let make = move || {
        for line in tune::apply(root, &profile, &division, &saved)? {
            if let Effect::Refused(why) = &line.effect {
                tracing::warn!("the kernel refuses {} in {}: {why}", line.wanted, line.file.display());
            }
        }
        Ok(())
    };
    (differ > 0).then(|| Step { change, what, make: Box::new(make) })
}

impl Change {
    /// Makes it undone.
    ///
    /// # Errors
    /// What the kernel refused.
    pub(super) fn undo(&self) -> Result<()> {
        let root = Path::new("/");
        let bdf = |device: &str| device.parse::<Bdf>().with_context(|| format!("{device}: no PCI address"));
        match self {
            Self::HugePages { node, page_size, before } => {
                huge_pool::set(root, *node, *page_size, *before)?;
            }
            Self::Bound { device } => match bind::unbind(root, bdf(device)?) {
                Err(bind::BindError::NotBound { .. }) => {}
                done => {
                    done?;
                }
            },
            Self::Tuned { saved } => {
                let lines = tune::restore(root, saved)?;
                let stuck = lines.iter().find(|line| matches!(line.effect, Effect::Refused(_)));
                if let Some(line) = stuck {
                    bail!("{} holds {}, and held {}", line.file.display(), line.now, line.wanted);
                }
            }
            Self::Virtuals { device } => bind::set_virtuals(root, bdf(device)?, 0)?,
        }
        Ok(())
    }
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::HugePages { node, page_size, before } => {
                write!(f, "{before} huge pages of {} on memory node {node}", output::bytes(*page_size))
            }
            Self::Bound { device } => write!(f, "{device} to the kernel"),
            Self::Tuned { .. } => f.write_str("the kernel's knobs"),
            Self::Virtuals { device } => write!(f, "no virtual functions of {device}"),
        }
    }
}
