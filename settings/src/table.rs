//! Reading tables key by key, so that one wrong value hides no other.
//!
//! Owns how a vocabulary is written down (`keys!`) and how its values are found; never what a key or a combination of keys
//! means.

use std::ops::Range;

use serde::de::DeserializeOwned;
use serde_spanned::Spanned;
use toml::de::{DeValue, ValueDeserializer};

use crate::problem::Problems;
use crate::values::{Bounded, DeviceName, HardwareAddress, Memory, Name, SocketName, VfToken};

/// A value that can be read from one place in the file; `None` when it is wrong, and the problem was noted.
pub trait Read: Sized {
    /// Reads it. `place` names the key for messages: "`burst`".
    fn read(place: &str, value: &Spanned<DeValue<'_>>, problems: &mut Problems<'_>) -> Option<Self>;
}

/// Reads one value with its serde type.
pub fn plain<T: DeserializeOwned>(
    place: &str,
    value: &Spanned<DeValue<'_>>,
    problems: &mut Problems<'_>,
) -> Option<T> {
    match T::deserialize(ValueDeserializer::from(value.clone())) {
        Ok(read) => Some(read),
        Err(error) => {
            let what =
                error.message().trim_start_matches("invalid type: ").trim_start_matches("invalid value: ");
            let message = format!("{place}: {}", what.replacen(", expected ", ": wanted ", 1));
            problems.add(error.span().unwrap_or_else(|| value.span()), message);
            None
        }
    }
}

/// Makes types that serde can read readable as values.
#[macro_export]
macro_rules! plain {
    ($($type:ty),+ $(,)?) => {
        $(impl $crate::table::Read for $type {
            fn read(
                place: &str,
                value: &$crate::Spanned<$crate::DeValue<'_>>,
                problems: &mut $crate::Problems<'_>,
            ) -> Option<Self> {
                $crate::table::plain(place, value, problems)
            }
        })+
    };
}

plain!(bool, DeviceName, HardwareAddress, Memory, Name, SocketName, String, VfToken);

impl<const MIN: i64, const MAX: i64> Read for Bounded<MIN, MAX> {
    fn read(place: &str, value: &Spanned<DeValue<'_>>, problems: &mut Problems<'_>) -> Option<Self> {
        plain(place, value, problems)
    }
}

/// A list whose elements are read one by one.
impl<T: Read> Read for Vec<Spanned<T>> {
    fn read(place: &str, value: &Spanned<DeValue<'_>>, problems: &mut Problems<'_>) -> Option<Self> {
        let Some(elements) = value.get_ref().as_array() else {
            let kind = value.get_ref().type_str();
            problems.add(value.span(), format!("{place}: {kind}: wanted a list, in square brackets"));
            return None;
        };
        let mut read =
            |element| Some(Spanned::new(Spanned::span(element), T::read(place, element, problems)?));
        let read: Vec<_> = elements.iter().map(&mut read).collect();
        read.into_iter().collect()
    }
}

/// The keys of a table that are there, but wrong: their problem was noted.
#[derive(Debug, Default)]
pub struct Wrong {
    /// The table, for messages.
    inside: &'static str,
    keys: Vec<&'static str>,
}

impl Wrong {
    /// None so far, in the table that messages call `inside`.
    pub fn none(inside: &'static str) -> Self {
        Self { inside, keys: Vec::new() }
    }

    /// This key is there, but wrong.
    pub fn add(&mut self, key: &'static str) {
        self.keys.push(key);
    }

    /// Whether there are any.
    pub fn any(&self) -> bool {
        !self.keys.is_empty()
    }

    /// Notes that a key is missing, unless it was there and wrong. `example` shows how to write it.
    pub fn or_missing(&self, key: &str, at: Range<usize>, example: &str, problems: &mut Problems<'_>) {
        if !self.keys.contains(&key) {
            problems.add(at, format!("{} needs `{key}`: {example}", self.inside));
        }
    }
}

/// Defines a table: a struct with an optional, placed value for each key, and the function that reads it.
#[macro_export]
macro_rules! keys {
    ($(#[doc = $about:literal])+ $name:ident in $inside:literal { $($(#[doc = $doc:literal])+ $key:ident: $type:ty,)+ }) => {
        $(#[doc = $about])+
        #[derive(Debug, Default)]
        pub(super) struct $name {
            $($(#[doc = $doc])+ pub(super) $key: Option<$crate::Spanned<$type>>,)+
            /// Keys that are there, but wrong.
            pub(super) wrong: $crate::table::Wrong,
        }

        impl $name {
            /// The names of all keys.
            pub(super) const KEYS: &[&str] = &[$(stringify!($key),)+];

            /// Reads a table. `place` is what messages begin with; wrong and unknown keys are noted and left out.
            pub(super) fn table(
                place: &str,
                table: &$crate::DeTable<'_>,
                problems: &mut $crate::Problems<'_>,
            ) -> Self {
                let mut keys = Self { wrong: $crate::table::Wrong::none($inside), ..Self::default() };
                for (key, value) in table {
                    match key.get_ref().as_ref() {
                        $(name @ stringify!($key) => {
                            let place = format!("{place}`{name}`");
                            keys.$key = <$type as $crate::table::Read>::read(&place, value, problems)
                                .map(|read| $crate::Spanned::new(value.span(), read));
                            if keys.$key.is_none() {
                                keys.wrong.add(stringify!($key));
                            }
                        })+
                        unknown => {
                            let hint = $crate::suggestion(unknown, Self::KEYS);
                            problems.add(key.span(), format!("{place}unknown key `{unknown}` in {}; {hint}", $inside));
                        }
                    }
                }
                keys
            }
        }
    };
}

/// Makes an inline table readable as a value.
#[macro_export]
macro_rules! nested {
    ($($name:ident),+) => {
        $(impl $crate::table::Read for $name {
            fn read(
                place: &str,
                value: &$crate::Spanned<$crate::DeValue<'_>>,
                problems: &mut $crate::Problems<'_>,
            ) -> Option<Self> {
                let Some(table) = value.get_ref().as_table() else {
                    let kind = value.get_ref().type_str();
                    let example = format!("a table like {{ {} = … }}", Self::KEYS.join(" = …, "));
                    problems.add(value.span(), format!("{place}: {kind}: wanted {example}"));
                    return None;
                };
                Some(Self::table(&format!("{place}: "), table, problems))
            }
        })+
    };
}
