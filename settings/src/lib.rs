//! How every part of Cableway reads its configuration: tables of TOML, key by key, with the place of every problem and what
//! to write instead.
//!
//! Owns the reading and the wording. Never knows a key of anybody, never decides what keys mean together.

mod fill;
mod problem;
pub mod table;
pub mod values;

pub use fill::{Fill, filled};
pub use problem::{ConfigErrors, Problem, Problems, list, suggestion};
pub use serde;
pub use serde_spanned::Spanned;
pub use toml::de::{DeTable, DeValue};

/// The text of a configuration file.
///
/// # Errors
/// It cannot be read, as the problem of the file as a whole.
pub fn read_file(file: &std::path::Path) -> Result<String, ConfigErrors> {
    std::fs::read_to_string(file).map_err(|error| {
        let message = match error.kind() {
            std::io::ErrorKind::NotFound => "there is no such file".to_owned(),
            std::io::ErrorKind::InvalidData => "is not a text file (UTF-8)".to_owned(),
            _ => format!("cannot be read: {error}"),
        };
        ConfigErrors { file: file.to_owned(), problems: vec![Problem { at: None, message }] }
    })
}

/// Parses `text` and hands the document and a collector of problems to `validate`; `file` is what messages call it.
///
/// # Errors
/// Everything that is wrong with it. What a half-understood file means is guesswork: of a file with wrong syntax only that
/// is reported.
pub fn parse<T>(
    text: &str,
    file: &std::path::Path,
    validate: impl FnOnce(&DeTable<'_>, &mut Problems<'_>) -> Option<T>,
) -> Result<T, ConfigErrors> {
    let mut problems = Problems::of(text);
    let (document, errors) = DeTable::parse_recoverable(text);
    if !errors.is_empty() {
        for error in errors {
            problems.add(error.span().unwrap_or(0..0), error.message().to_owned());
        }
        return problems.into_result(file, None);
    }
    let value = validate(document.get_ref(), &mut problems);
    problems.into_result(file, value)
}
