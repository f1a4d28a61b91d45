//! `cableway vm console NAME`: this terminal as a machine's console.
//!
//! Owns the two directions: what is printed is fetched, what is typed is sent until the machine took it. A guest never waits
//! for this; who is slow misses what is older than the last 64 KiB.

use std::io::{self, Read, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, ValueEnum};
use control::Door;
use control::client::{self, ClientError};
use vmm::control::NEXT;
use vmm::control::report::TypedReport;
use vmm::terminal::RawTerminal;

use super::ask::Place;
use crate::output;

/// Ctrl-], as telnet and virsh have it.
const ESCAPE: u8 = 0x1d;
/// How long to wait for a guest whose console is full.
const FULL: Duration = Duration::from_millis(5);

#[derive(Args)]
pub(super) struct ConsoleArgs {
    /// The machine.
    name: String,
    #[command(flatten)]
    place: Place,
    /// Which console [default: the serial port, if it has one].
    #[arg(long, value_enum)]
    port: Option<Which>,
    /// Show what was printed before, as far as it is kept.
    #[arg(long)]
    history: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Which {
    /// The serial port.
    Serial,
    /// The virtio console.
    Virtio,
}

/// Attaches until Ctrl-], or the machine ends.
///
/// # Errors
/// There is no such machine or console.
pub(super) fn run(args: &ConsoleArgs) -> Result<ExitCode> {
    let door = args.place.door(&args.name)?;
    let port = match args.port {
        None => "",
        Some(Which::Serial) => "port=serial&",
        Some(Which::Virtio) => "port=virtio&",
    };
    let (end, _) = client::get_bytes_at(&door, &format!("/v1/console?{port}"), NEXT)?;
    let mut next = if args.history { 0 } else { end };
    let terminal = RawTerminal::new();
    if terminal.is_some() {
        eprint!("attached to {}; Ctrl-] detaches\r\n", args.name);
    }
    let (path, to) = (format!("/v1/console?{port}"), door.clone());
    let (detached, is_detached) = std::sync::mpsc::channel::<()>();
    // It ends with the process: nothing interrupts a read of a terminal.
    std::thread::Builder::new().name("keyboard".to_owned()).spawn(move || {
        if type_in(&to, &path).is_ok() {
            let _ = detached.send(());
        }
    })?;
    // A reader that went away (`| head`) has seen what it wanted, also of a guest that prints no more.
    while is_detached.try_recv().is_err() && !output::has_no_reader() {
        match client::get_bytes_at(&door, &format!("/v1/console?{port}from={next}&wait=1"), NEXT) {
            Ok((then, bytes)) => {
                let first = then.saturating_sub(bytes.len() as u64);
                if first > next {
                    eprint!("\r\n({} bytes came too fast and are gone)\r\n", first - next);
                }
                next = then;
                let mut out = io::stdout().lock();
                match out.write_all(&bytes).and_then(|()| out.flush()) {
                    Err(error) if error.kind() == io::ErrorKind::BrokenPipe => break,
                    other => other?,
                }
            }
            Err(ClientError::NotRunning(_) | ClientError::Broken { .. }) => {
                drop(terminal);
                output::print(&format!("\n{} ended\n", args.name))?;
                return Ok(ExitCode::SUCCESS);
            }
            Err(error) => return Err(error.into()),
        }
    }
    if terminal.is_some() {
        eprintln!();
    }
    drop(terminal);
    Ok(ExitCode::SUCCESS)
}

/// Types what comes in until Ctrl-]. What is no terminal may end before it: then what is printed goes on.
fn type_in(door: &Door, path: &str) -> Result<(), ()> {
    let mut buffer = [0; 1024];
    loop {
        let Ok(length @ 1..) = io::stdin().lock().read(&mut buffer) else { return Err(()) };
        let typed = buffer.get(..length).unwrap_or_default();
        let escape = typed.iter().position(|byte| *byte == ESCAPE);
        let mut left = typed.get(..escape.unwrap_or(length)).unwrap_or_default();
        while !left.is_empty() {
            let Ok(answer) = client::post_bytes::<TypedReport>(door, path, left) else { return Err(()) };
            let taken = answer.value.taken;
            left = left.get(taken..).unwrap_or_default();
            if !left.is_empty() && taken == 0 {
                std::thread::sleep(FULL);
            }
        }
        if escape.is_some() {
            return Ok(());
        }
    }
}
