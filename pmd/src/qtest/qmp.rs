//! QEMU's machine protocol (QEMU's docs/interop/qmp-spec): a JSON object a line.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::{Value, json};

use super::{MachineError, PATIENCE};

/// A connection to QEMU's monitor.
pub(super) struct Qmp {
    socket: BufReader<UnixStream>,
    /// Events that came while an answer was waited for.
    events: Vec<String>,
}

impl Qmp {
    pub(super) fn connect(path: &Path) -> io::Result<Self> {
        let socket = UnixStream::connect(path)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let mut qmp = Self { socket: BufReader::new(socket), events: Vec::new() };
        qmp.next()?; // the greeting
        qmp.run("qmp_capabilities", &json!({})).map_err(io::Error::other)?;
        Ok(qmp)
    }

    /// Runs a command.
    pub(super) fn run(&mut self, command: &str, arguments: &Value) -> Result<Value, MachineError> {
        let line = json!({ "execute": command, "arguments": arguments }).to_string() + "\n";
        let broken = |_| MachineError::Broken("it was told something");
        self.socket.get_ref().write_all(line.as_bytes()).map_err(broken)?;
        loop {
            let answer = self.next().map_err(broken)?;
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
            if let Some(error) = answer.get("error") {
                let reason =
                    error.get("desc").and_then(Value::as_str).unwrap_or("no reason given").to_owned();
                return Err(MachineError::Refused { command: command.to_owned(), reason });
            }
            self.note(&answer);
        }
    }

    /// Waits for an event, or remembers that it came.
    pub(super) fn wait_for(&mut self, event: &str) -> Result<(), MachineError> {
        while !self.events.iter().any(|e| e == event) {
            let answer = self.next().map_err(|_| MachineError::Broken("an event was waited for"))?;
            self.note(&answer);
        }
        self.events.retain(|e| e != event);
        Ok(())
    }

    fn note(&mut self, answer: &Value) {
        if let Some(event) = answer.get("event").and_then(Value::as_str) {
            self.events.push(event.to_owned());
        }
    }

    fn next(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        match self.socket.read_line(&mut line)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => serde_json::from_str(&line).map_err(io::Error::other),
        }
    }
}
