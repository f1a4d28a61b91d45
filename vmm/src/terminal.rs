//! The terminal that a console is attached to.
//!
//! Owns its mode, and gives it back.

use std::io;

/// A terminal that passes every key on, until this is dropped.
pub struct RawTerminal(nix::sys::termios::Termios);

impl RawTerminal {
    /// `None` if standard input is no terminal.
    pub fn new() -> Option<Self> {
        use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
        let before = tcgetattr(io::stdin()).ok()?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        // What the VMM itself logs begins at the left all the same.
        raw.output_flags = before.output_flags;
        tcsetattr(io::stdin(), SetArg::TCSANOW, &raw).ok()?;
        Some(Self(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = nix::sys::termios::tcsetattr(io::stdin(), nix::sys::termios::SetArg::TCSANOW, &self.0);
    }
}
