//! What a guest prints, as lines of systemd's journal.
//!
//! Owns their form: whole lines, each with a priority of ours in front. The journal takes `<0>` at the start of a line for its priority
//! (sd-daemon(3)), and a guest must neither cry wolf in it nor hide in a line of somebody else's.

use std::io::{self, Write};

/// The priority of what a guest prints: informational.
const PRIORITY: &[u8] = b"<6>";
/// A longer line is written in parts. The journal makes two of a line of 48 KiB and looks for a priority at the second one's start.
const LONGEST: usize = 8 << 10;

/// Writes lines to the journal; what is not a whole line yet waits until it is.
pub(crate) struct JournalLines<W: Write> {
    journal: W,
    line: Vec<u8>,
}

impl<W: Write> JournalLines<W> {
    pub(crate) fn new(journal: W) -> Self {
        Self { journal, line: PRIORITY.to_vec() }
    }

    /// At once: other threads write lines to the same stream.
    fn end_line(&mut self) -> io::Result<()> {
        self.line.push(b'\n');
        let done = self.journal.write_all(&self.line).and_then(|()| self.journal.flush());
        self.line.truncate(PRIORITY.len());
        done
    }
}

impl<W: Write> Write for JournalLines<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            match byte {
                // The journal ends a line at either.
                b'\n' | 0 => self.end_line()?,
                b'\r' => {}
                byte => {
                    self.line.push(*byte);
                    if self.line.len() >= LONGEST {
                        self.end_line()?;
                    }
                }
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<W: Write> Drop for JournalLines<W> {
    fn drop(&mut self) {
        if self.line.len() > PRIORITY.len() {
            let _ = self.end_line();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_cannot_choose_a_priority_nor_continue_somebody_elses_line() {
        let mut written = Vec::new();
        let mut lines = JournalLines::new(&mut written);
        lines.write_all(b"<0>panic\r\nlog").unwrap();
        assert_eq!(lines.journal.as_slice(), b"<6><0>panic\n", "half a line waits");
        lines.write_all(b"in: \0<1>x\n\n<2>tail").unwrap();
        drop(lines);
        assert_eq!(
            String::from_utf8(written).unwrap(),
            "<6><0>panic\n<6>login: \n<6><1>x\n<6>\n<6><2>tail\n"
        );
    }

    #[test]
    fn a_line_without_end_is_written_in_parts_each_with_our_priority() {
        let mut written = Vec::new();
        let mut lines = JournalLines::new(&mut written);
        lines.write_all(&vec![b'<'; 100_000]).unwrap();
        drop(lines);
        let text = String::from_utf8(written).unwrap();
        assert!(text.lines().all(|line| line.starts_with("<6><") && line.len() <= LONGEST));
        assert_eq!(text.matches('<').count(), 100_000 + text.lines().count());
    }
}
