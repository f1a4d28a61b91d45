//! What is wrong with a configuration: every problem with its place in the file and what to write instead.
//!
//! Owns the collecting of problems, so that one pass finds all of them; never decides what a problem is.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// One problem in a configuration file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Line and column, both counted from 1 (the column in characters); `None` when it concerns the whole file.
    pub at: Option<(usize, usize)>,
    /// What is wrong, and what to do about it.
    pub message: String,
}

/// Everything that is wrong with a configuration file, in the order of its lines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors {
    /// The file, as the user named it.
    pub file: PathBuf,
    /// At least one.
    pub problems: Vec<Problem>,
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.problems.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            write!(f, "{}", self.file.display())?;
            if let Some((line, column)) = problem.at {
                write!(f, ":{line}:{column}")?;
            }
            write!(f, ": {}", problem.message)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

/// Collects the problems of one file while it is read.
pub struct Problems<'t> {
    text: &'t str,
    found: Vec<(Option<usize>, String)>,
}

impl<'t> Problems<'t> {
    /// For the file with this text.
    pub fn of(text: &'t str) -> Self {
        Self { text, found: Vec::new() }
    }

    /// Something is wrong at this span of bytes.
    pub fn add(&mut self, span: Range<usize>, message: impl Into<String>) {
        self.found.push((Some(span.start), message.into()));
    }

    /// Something is wrong with the file as a whole.
    pub fn add_general(&mut self, message: impl Into<String>) {
        self.found.push((None, message.into()));
    }

    /// The line of a span, to refer to it.
    pub fn line(&self, span: &Range<usize>) -> usize {
        line_and_column(self.text, span.start).0
    }

    /// `value` if nothing is wrong, else all problems in the order of lines.
    pub fn into_result<T>(mut self, file: &Path, value: Option<T>) -> Result<T, ConfigErrors> {
        match value {
            Some(value) if self.found.is_empty() => Ok(value),
            _ => {
                self.found.sort_by_key(|(start, _)| *start);
                self.found.dedup();
                let place = |start| line_and_column(self.text, start);
                let problem =
                    |(start, message): (Option<usize>, String)| Problem { at: start.map(place), message };
                let problems = self.found.into_iter().map(problem).collect();
                Err(ConfigErrors { file: file.to_owned(), problems })
            }
        }
    }
}

/// The line and column of a byte offset, as editors count them.
fn line_and_column(text: &str, start: usize) -> (usize, usize) {
    let before = text.get(..start).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (before.matches('\n').count() + 1, before.get(line_start..).unwrap_or_default().chars().count() + 1)
}

/// " did you mean …?" if one of `known` is close to what was written; else what exists.
pub fn suggestion(written: &str, known: &[&str]) -> String {
    let distance = |word: &&&str| strsim::damerau_levenshtein(&written.to_lowercase(), word);
    match known.iter().min_by_key(distance) {
        Some(word) if distance(&word) <= 1 + word.len() / 4 => format!("did you mean `{word}`?"),
        _ => format!("there {} {}", if known.len() == 1 { "is only" } else { "are" }, list(known)),
    }
}

/// "`a`, `b` and `c`".
pub fn list(words: &[&str]) -> String {
    match words {
        [] => "none".to_owned(),
        [only] => format!("`{only}`"),
        [first @ .., last] => {
            let first: Vec<_> = first.iter().map(|word| format!("`{word}`")).collect();
            format!("{} and `{last}`", first.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_counted_in_lines_and_characters_from_one() {
        let text = "ä = 1\nöö = 2\n";
        assert_eq!(line_and_column(text, 0), (1, 1));
        assert_eq!(line_and_column(text, text.find('=').unwrap()), (1, 3));
        assert_eq!(line_and_column(text, text.rfind('2').unwrap()), (2, 6));
        assert_eq!(line_and_column(text, 1_000), (3, 1));
    }

    #[test]
    fn a_near_miss_is_suggested_and_nonsense_gets_the_list() {
        assert_eq!(suggestion("sokcet", &["socket", "mode"]), "did you mean `socket`?");
        assert_eq!(suggestion("zzz", &["socket", "mode"]), "there are `socket` and `mode`");
        assert_eq!(suggestion("dpdk", &["vhost-user"]), "there is only `vhost-user`");
    }
}
