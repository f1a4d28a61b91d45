//! QEMU's qtest protocol (QEMU's docs/devel/testing/qtest and system/qtest.c): a line out, a line back.
//!
//! Writes are not waited for: their answers are read before the next read is asked, or when many have gathered.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::PATIENCE;

/// Answers that may be outstanding: more would fill the socket's buffer, and both sides would wait.
const OUTSTANDING: u32 = 256;

/// Bytes of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Width {
    /// 1.
    Byte,
    /// 2.
    Word,
    /// 4.
    Long,
}

impl Width {
    fn letter(self) -> char {
        match self {
            Width::Byte => 'b',
            Width::Word => 'w',
            Width::Long => 'l',
        }
    }

    /// What is read where nobody answers.
    fn ones(self) -> u64 {
        match self {
            Width::Byte => 0xff,
            Width::Word => 0xffff,
            Width::Long => 0xffff_ffff,
        }
    }
}

/// A connection to QEMU. When it breaks, everything reads as ones: as it does on a machine whose device is gone.
pub(super) struct Qtest {
    socket: BufReader<UnixStream>,
    outstanding: u32,
    broken: bool,
    line: String,
}

impl Qtest {
    pub(super) fn connect(path: &Path) -> io::Result<Self> {
        let socket = UnixStream::connect(path)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { socket: BufReader::new(socket), outstanding: 0, broken: false, line: String::new() })
    }

    /// Reads memory of the machine: RAM, BARs, configuration space.
    pub(super) fn read(&mut self, address: u64, width: Width) -> u64 {
        self.ask(&format!("read{} {address:#x}\n", width.letter())).unwrap_or(width.ones())
    }

    pub(super) fn write(&mut self, address: u64, width: Width, value: u64) {
        self.tell(&format!("write{} {address:#x} {value:#x}\n", width.letter()));
    }

    /// Writes to an I/O port.
    pub(super) fn port_write(&mut self, port: u16, value: u32) {
        self.tell(&format!("outl {port:#x} {value:#x}\n"));
    }

    fn tell(&mut self, command: &str) {
        // Before, not after: the answer to what is asked now is its asker's to read.
        if self.outstanding >= OUTSTANDING {
            self.catch_up();
        }
        if self.broken {
            return;
        }
        self.broken = self.socket.get_ref().write_all(command.as_bytes()).is_err();
        self.outstanding += 1;
    }

    fn ask(&mut self, command: &str) -> Option<u64> {
        self.tell(command);
        let answer = self.catch_up()?;
        let number = answer.trim().strip_prefix("0x")?;
        u64::from_str_radix(number, 16).ok()
    }

    /// Reads all answers; the last one without its "OK".
    fn catch_up(&mut self) -> Option<String> {
        let mut last = None;
        while self.outstanding > 0 && !self.broken {
            self.line.clear();
            match self.socket.read_line(&mut self.line) {
                Ok(n) if n > 0 => {}
                _ => self.broken = true,
            }
            if self.line.starts_with("IRQ ") {
                continue;
            }
            self.outstanding -= 1;
            last = self.line.strip_prefix("OK").map(str::to_owned);
        }
        if self.broken { None } else { last }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_is_answered_however_many_writes_went_before_it() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let machine = std::thread::spawn(move || {
            let mut commands = BufReader::new(theirs.try_clone().unwrap()).lines();
            while let Some(Ok(command)) = commands.next() {
                let answer = if command.starts_with("read") { "OK 0x2a\n" } else { "OK\n" };
                (&theirs).write_all(answer.as_bytes()).unwrap();
            }
        });
        let mut qtest =
            Qtest { socket: BufReader::new(ours), outstanding: 0, broken: false, line: String::new() };
        for writes in OUTSTANDING - 2..OUTSTANDING + 3 {
            (0..writes).for_each(|_| qtest.write(0, Width::Long, 0));
            assert_eq!(qtest.read(0, Width::Long), 0x2a, "after {writes} writes");
        }
        drop(qtest);
        machine.join().unwrap();
    }
}
