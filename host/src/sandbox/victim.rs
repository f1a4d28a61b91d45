//! For tests of sandboxes: a process that does something confined, and may be killed for it.
//!
//! Owns how a test runs again in a process of its own and tells what became of it. Part of the tests of each program that has a sandbox.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use libc::c_long;

const ROLE: &str = "CABLEWAY_TEST_CONFINED";

/// How a process ended: the signal, or what the confined code said.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    Signal(i32),
    Said(String),
}

pub(super) const KILLED: End = End::Signal(libc::SIGSYS);

/// Runs `act` on a thread, in a process of its own that runs only the test `name` (with its module).
pub(super) fn run(name: &str, role: &str, act: impl FnOnce() -> String + Send + 'static) -> End {
    if std::env::var(ROLE).as_deref() == Ok(role) {
        nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0).unwrap();
        println!("<{}>", std::thread::spawn(act).join().unwrap());
        std::process::exit(0);
    }
    if std::env::var(ROLE).is_ok() {
        return End::Said("another role's turn".into());
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1", "--include-ignored"])
        .env(ROLE, role)
        .output()
        .unwrap();
    match output.status.signal() {
        Some(signal) => End::Signal(signal),
        None => {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let said = text.split_once('<').and_then(|(_, rest)| rest.split_once('>'));
            End::Said(said.map_or_else(|| format!("nothing: {output:?}"), |(said, _)| said.to_owned()))
        }
    }
}

pub(super) fn said(text: &str) -> End {
    End::Said(text.to_owned())
}

/// What became of a call, as a name.
pub(super) fn outcome<T>(result: io::Result<T>) -> String {
    match result {
        Ok(_) => "allowed".into(),
        Err(e) => nix::Error::from_raw(e.raw_os_error().unwrap_or(0)).to_string(),
    }
}

/// A system call with up to three numbers for arguments.
pub(super) fn call(number: c_long, a: i64, b: i64, c: i64) -> io::Result<c_long> {
    // SAFETY: the callers pass arguments that are harmless wherever the call is allowed.
    let result = unsafe { libc::syscall(number, a, b, c, -1, 0, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// In a victim, whether it is there for another role: then this assertion is not its business.
pub(super) fn check(actual: End, expected: End, what: &str) {
    if std::env::var(ROLE).is_err() {
        assert_eq!(actual, expected, "{what}");
    }
}
