//! The machine as it will be when the switch starts: cards that the node binds are bound.
//!
//! Owns nothing; whatever a plan does not change is as it is now.

use std::path::Path;

use host::pci::Bdf;
use switch::config::{PortKind, SocketSide, Surroundings, ThisMachine};

/// This machine, and what is going to be different.
pub(super) struct Planned {
    /// As it is.
    pub(super) now: ThisMachine,
    /// Cards that go to vfio-pci, or were found to be none.
    pub(super) cards: Vec<Bdf>,
}

impl Surroundings for Planned {
    fn core(&self, core: u32) -> Result<(), String> {
        self.now.core(core)
    }

    fn group(&self, name: &str) -> Result<u32, String> {
        self.now.group(name)
    }

    fn socket(&self, path: &Path, side: SocketSide) -> Result<(), String> {
        self.now.socket(path, side)
    }

    fn reads(&self, path: &Path) -> Result<(), String> {
        self.now.reads(path)
    }

    fn writes(&self, path: &Path) -> Result<(), String> {
        self.now.writes(path)
    }

    fn memory(&self) -> u64 {
        self.now.memory()
    }

    fn device(&self, name: &str, kind: PortKind) -> Result<(), String> {
        if kind == PortKind::Nic && name.parse().is_ok_and(|bdf| self.cards.contains(&bdf)) {
            return Ok(());
        }
        self.now.device(name, kind)
    }
}
