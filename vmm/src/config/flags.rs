//! Flags as configuration: `--vcpu-cores 2,3` is `vcpu_cores = [2, 3]`.
//!
//! Owns the translation, one line of TOML a flag, so that both are read and judged by the same code. Never knows what a key
//! means.

use std::fmt::Write;
use std::path::Path;

use super::{Config, ConfigErrors};

/// What messages call the flags.
const COMMAND_LINE: &str = "command line";

/// Keys whose value is always text, whatever it looks like.
const TEXTS: &[&str] = &[
    "name",
    "kernel",
    "firmware",
    "initramfs",
    "cmdline",
    "memory",
    "pages",
    "serial",
    "console",
    "on_reboot",
    "irqchip",
    "seccomp",
];
/// Keys with several values, apart by commas.
const LISTS: &[&str] = &["vcpu_cores", "emulator_cores", "disable_exits"];
/// Keys with named values: `sockets=1,cores=2`.
const TABLES: &[&str] = &["topology"];

/// Keys that may be given again and again: lists of tables, and the key that their first part is the value of.
const LISTED: &[(&str, &str)] = &[("net", "kind"), ("disk", "format"), ("numa", "memory"), ("pci", "device")];
/// Parts of those that have several numbers, apart by colons: `vcpus=0:2-3`.
const NUMBERS: &[&str] = &["vcpus", "distances", "iothread_cores"];

/// Reads `flags`: keys of `[vm]` with their values.
pub(super) fn parse(flags: &[(&str, String)]) -> Result<Config, ConfigErrors> {
    let mut text = "[vm]\n".to_owned();
    let pair = |part: &str| match part.split_once('=') {
        Some((name, value)) if NUMBERS.contains(&name.trim()) => {
            let each = value.split(':').filter(|part| !part.trim().is_empty()).flat_map(numbers);
            format!("{} = [{}]", quoted(name.trim()), each.collect::<Vec<_>>().join(", "))
        }
        Some((name, value)) => format!("{} = {}", quoted(name.trim()), plain(value)),
        None => format!("{} = \"\"", quoted(part.trim())),
    };
    for (key, first) in LISTED {
        let of_key = flags.iter().filter(|(name, _)| name == key);
        let tables: Vec<_> = of_key
            .map(|(_, value)| {
                let mut parts = value.split(',').filter(|part| !part.trim().is_empty());
                let begin = parts.next().map(|part| match part.contains('=') {
                    true => pair(part),
                    false => format!("{first} = {}", quoted(part.trim())),
                });
                format!("{{ {} }}", begin.into_iter().chain(parts.map(pair)).collect::<Vec<_>>().join(", "))
            })
            .collect();
        if !tables.is_empty() {
            let _ = writeln!(text, "{key} = [{}]", tables.join(", "));
        }
    }
    for (key, value) in flags.iter().filter(|(key, _)| LISTED.iter().all(|(listed, _)| listed != key)) {
        let parts = || value.split(',').filter(|part| !part.trim().is_empty());
        let value = if TEXTS.contains(key) {
            quoted(value)
        } else if LISTS.contains(key) {
            format!("[{}]", parts().map(plain).collect::<Vec<_>>().join(", "))
        } else if TABLES.contains(key) {
            format!("{{ {} }}", parts().map(pair).collect::<Vec<_>>().join(", "))
        } else {
            plain(value)
        };
        let _ = writeln!(text, "{key} = {value}");
    }
    Config::parse(&text, Path::new(COMMAND_LINE)).map_err(|mut errors| {
        // Lines of a text that the user never saw help nobody: the message names the key.
        for problem in &mut errors.problems {
            problem.at = None;
        }
        errors
    })
}

/// One number, or all from the first to the last of a range; what is neither stays as it is, for a message to name it.
fn numbers(part: &str) -> Vec<String> {
    let range = part.split_once('-').and_then(|(from, to)| {
        let (from, to): (u16, u16) = (from.trim().parse().ok()?, to.trim().parse().ok()?);
        (from <= to).then_some(from..=to)
    });
    range.map_or_else(|| vec![plain(part)], |range| range.map(|n| n.to_string()).collect())
}

/// A number or a truth value (`true`, `on`, `yes`) as it is, anything else in quotes.
fn plain(value: &str) -> String {
    let value = match value.trim() {
        "on" | "yes" => "true",
        "off" | "no" => "false",
        other => other,
    };
    match value.parse::<i64>().is_ok() && !value.starts_with('+') || matches!(value, "true" | "false") {
        true => value.parse::<i64>().map_or_else(|_| value.to_owned(), |number| number.to_string()),
        false => quoted(value),
    }
}

/// A TOML string.
fn quoted(value: &str) -> String {
    let mut text = String::from('"');
    for c in value.chars() {
        match c {
            '"' | '\\' => text.extend(['\\', c]),
            c if c.is_control() => {
                let _ = write!(text, "\\u{:04x}", u32::from(c));
            }
            c => text.push(c),
        }
    }
    text + "\""
}
