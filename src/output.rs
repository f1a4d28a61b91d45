//! What all subcommands share in talking to the user: standard output that may be a closed pipe, tables, units.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::process::ExitCode;

use comfy_table::{CellAlignment, Table, presets};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Exit status for arguments or a configuration that are wrong: nothing was started.
pub(crate) const REFUSED: u8 = 2;

/// Says why nothing is started.
pub(crate) fn refuse(why: impl std::fmt::Display) -> ExitCode {
    eprintln!("cableway: {why}");
    ExitCode::from(REFUSED)
}

/// Writes to standard output. A reader that went away (`| head`) has seen what it wanted.
///
/// # Errors
/// The output cannot be written.
pub(crate) fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        other => other,
    }
}

/// Whether standard output is a pipe that nobody reads any more: nothing that is written will be seen.
pub(crate) fn has_no_reader() -> bool {
    let out = io::stdout();
    let mut asked = [PollFd::new(out.as_fd(), PollFlags::empty())];
    let lost = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| events.contains(PollFlags::POLLERR));
    poll(&mut asked, PollTimeout::ZERO).is_ok() && asked.iter().any(lost)
}

/// A table without frames: a header, and columns as wide as they must be. The columns of `numbers` are aligned to the right.
pub(crate) fn table(header: &[&str], numbers: &[usize]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(header);
    for column in numbers {
        if let Some(column) = table.column_mut(*column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// A number with its thousands apart: `1,234,567`.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Bytes in the largest unit that leaves a number of at least one: `1.5 GiB`.
pub(crate) fn bytes(number: u64) -> String {
    scaled(number as f64, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB"])
}

/// A rate in the largest decimal unit that leaves a number of at least one: `12.3 Mpps`.
pub(crate) fn rate(number: f64, unit: &str) -> String {
    format!("{}{unit}", scaled(number, 1000.0, &["", "k", "M", "G", "T"]))
}

fn scaled(mut number: f64, step: f64, units: &[&str]) -> String {
    let mut units = units.iter().peekable();
    while let Some(unit) = units.next() {
        if number < step || units.peek().is_none() {
            let decimals = if number >= 100.0 || number.fract() == 0.0 { 0 } else { 1 };
            return format!("{number:.decimals$} {unit}");
        }
        number /= step;
    }
    String::new()
}

/// Seconds as a person says them: `42 s`, `3 min 5 s`, `2 h 10 min`, `3 d 4 h`.
pub(crate) fn duration(seconds: f64) -> String {
    let seconds = seconds.max(0.0) as u64;
    match (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60, seconds % 60) {
        (0, 0, 0, s) => format!("{s} s"),
        (0, 0, min, s) => format!("{min} min {s} s"),
        (0, h, min, _) => format!("{h} h {min} min"),
        (d, h, _, _) => format!("{d} d {h} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_the_way_people_write_them() {
        assert_eq!([0, 999, 1_000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([0, 1_023, 1_536, 1 << 40].map(bytes), ["0 B", "1023 B", "1.5 KiB", "1 TiB"]);
        assert_eq!(rate(12_345_678.0, "pps"), "12.3 Mpps");
        assert_eq!(
            [5.9, 65.0, 7_800.0, 90_000.0].map(duration),
            ["5 s", "1 min 5 s", "2 h 10 min", "1 d 1 h"]
        );
    }
}
