//! The types of single values: each accepts exactly what is meaningful by itself, and its error says what that is.
//!
//! Knows serde; knows nothing of tables, keys or other values.

use std::fmt;

use serde::Deserialize;
use serde::de::{self, Deserializer, Unexpected, Visitor};

/// A whole number from `MIN` to `MAX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bounded<const MIN: i64, const MAX: i64>(i64);

impl<const MIN: i64, const MAX: i64> Bounded<MIN, MAX> {
    /// In a type that holds `MIN` to `MAX`; saturates if it does not.
    pub fn get<T: TryFrom<i64> + Default>(self) -> T {
        debug_assert!(T::try_from(MAX).is_ok());
        T::try_from(self.0).unwrap_or_default()
    }
}

impl<'de, const MIN: i64, const MAX: i64> Deserialize<'de> for Bounded<MIN, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Number<const MIN: i64, const MAX: i64>;
        impl<const MIN: i64, const MAX: i64> Visitor<'_> for Number<MIN, MAX> {
            type Value = Bounded<MIN, MAX>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a whole number from {MIN} to {MAX}")
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Self::Value, E> {
                if (MIN..=MAX).contains(&value) {
                    return Ok(Bounded(value));
                }
                Err(E::invalid_value(Unexpected::Signed(value), &self))
            }
        }
        deserializer.deserialize_any(Number)
    }
}

/// A core, as the kernel numbers them.
pub type CoreNumber = Bounded<0, 4_095>;

/// A value written as text, parsed by a function whose error is a sentence.
#[macro_export]
macro_rules! text {
    ($($(#[doc = $doc:literal])+ $name:ident($inner:ty), $wanted:literal, $parse:expr;)+) => {
        $($(#[doc = $doc])+
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct $name(
            /// What was written, checked.
            pub $inner,
        );

        impl<'de> $crate::serde::Deserialize<'de> for $name {
            fn deserialize<D: $crate::serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Text;
                impl $crate::serde::de::Visitor<'_> for Text {
                    type Value = $name;

                    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                        f.write_str($wanted)
                    }

                    fn visit_str<E: $crate::serde::de::Error>(self, text: &str) -> Result<Self::Value, E> {
                        let parse: fn(&str) -> Result<$inner, String> = $parse;
                        parse(text).map($name).map_err(E::custom)
                    }
                }
                deserializer.deserialize_any(Text)
            }
        })+
    };
}

text! {
    /// A name, of a port or a virtual machine: safe in a path, a URL, a table and a metric's label.
    Name(String), "a name in quotes", |text| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        match text {
            "" => Err("the name is empty".to_owned()),
            _ if text.len() > 64 => Err(format!("\"{text}\" is {} characters long, wanted at most 64", text.len())),
            _ if !text.starts_with(|c: char| c.is_ascii_alphanumeric()) => {
                Err(format!("{text:?}: a name begins with a letter or a digit"))
            }
            _ => match text.chars().find(|c| !plain(*c)) {
                Some(odd) => Err(format!("{text:?}: {odd:?} is not possible in a name; letters, digits, `.`, `_` and `-` are")),
                None => Ok(text.to_owned()),
            },
        }
    };

    /// Path of a UNIX socket.
    SocketName(String), "a path in quotes", |text| match text {
        "" => Err("the path is empty".to_owned()),
        _ if text.contains('\0') => Err(format!("{text:?}: a path holds no zero byte")),
        _ => Ok(text.to_owned()),
    };

    /// A network interface (Linux, dev_valid_name).
    DeviceName(String), "an interface's name in quotes", |text| {
        let odd = |c: char| c.is_whitespace() || c.is_control() || "/:%".contains(c);
        match text {
            "" => Err("the name is empty".to_owned()),
            "." | ".." => Err(format!("{text:?} is not possible as an interface's name")),
            _ if text.len() > 15 => {
                Err(format!("\"{text}\" is {} bytes long, an interface's name has at most 15", text.len()))
            }
            _ => match text.chars().find(|c| odd(*c)) {
                Some(odd) => Err(format!("{text:?}: {odd:?} is not possible in an interface's name")),
                None => Ok(text.to_owned()),
            },
        }
    };

    /// The token of a virtual function (RFC 9562).
    VfToken(String), "a UUID in quotes", |text| {
        let groups: Vec<usize> = text.split('-').map(str::len).collect();
        let plain = text.chars().all(|c| c == '-' || c.is_ascii_hexdigit());
        if plain && groups == [8, 4, 4, 4, 12] {
            return Ok(text.to_ascii_lowercase());
        }
        Err(format!("{text:?}: wanted a UUID, like \"2ab74924-c335-45f4-9b16-8569e5b08258\" (uuidgen makes one)"))
    };

    /// A unicast Ethernet address.
    HardwareAddress([u8; 6]), "an address like \"02:00:00:00:00:01\"", |text| {
        let wrong = || format!("{text:?}: wanted six hexadecimal bytes, like \"02:00:00:00:00:01\"");
        let mut address = [0; 6];
        let mut bytes = text.split([':', '-']);
        for slot in &mut address {
            let byte = bytes.next().filter(|byte| byte.len() == 2 && !byte.starts_with('+')).ok_or_else(wrong)?;
            *slot = u8::from_str_radix(byte, 16).map_err(|_| wrong())?;
        }
        match (bytes.next(), address) {
            (Some(_), _) => Err(wrong()),
            (None, [0, 0, 0, 0, 0, 0]) => Err(format!("{text:?} is nobody's address")),
            (None, [first, ..]) if first & 1 == 1 => {
                Err(format!("{text:?} is a group address (its first byte is odd); a port has unicast addresses"))
            }
            (None, address) => Ok(address),
        }
    };
}

impl std::str::FromStr for HardwareAddress {
    type Err = String;

    /// As it is written in a file.
    fn from_str(text: &str) -> Result<Self, String> {
        let text = serde::de::value::StrDeserializer::<serde::de::value::Error>::new(text);
        serde::Deserialize::deserialize(text).map_err(|error| error.to_string())
    }
}

/// A value that is one of a few words.
#[macro_export]
macro_rules! words {
    ($($(#[doc = $doc:literal])+ $name:ident { $($(#[doc = $meaning:literal])+ $variant:ident = $word:literal,)+ })+) => {
        $($(#[doc = $doc])+
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($(#[doc = $meaning])+ $variant,)+ }

        impl $name {
            /// All words.
            pub const WORDS: &[&str] = &[$($word,)+];

            /// As it is written.
            pub fn word(self) -> &'static str {
                match self { $($name::$variant => $word,)+ }
            }
        }

        impl<'de> $crate::serde::Deserialize<'de> for $name {
            fn deserialize<D: $crate::serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Word;
                impl $crate::serde::de::Visitor<'_> for Word {
                    type Value = $name;

                    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                        write!(f, "one of {} in quotes", $crate::list($name::WORDS))
                    }

                    fn visit_str<E: $crate::serde::de::Error>(self, text: &str) -> Result<Self::Value, E> {
                        match text {
                            $($word => Ok($name::$variant),)+
                            _ => Err(E::custom(format!("{text:?} is unknown; {}", $crate::suggestion(text, $name::WORDS)))),
                        }
                    }
                }
                deserializer.deserialize_any(Word)
            }
        })+
    };
}

/// An amount of memory in bytes: `"512 MiB"`, `"1 TiB"`, or a whole number of GiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory(
    /// Bytes.
    pub u64,
);

impl<'de> Deserialize<'de> for Memory {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Amount;
        impl Visitor<'_> for Amount {
            type Value = Memory;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an amount like \"512 MiB\", \"64 GiB\" or \"1 TiB\" (a bare number counts GiB)")
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Self::Value, E> {
                let bytes = u64::try_from(value).ok().filter(|n| *n > 0).and_then(|n| n.checked_mul(1 << 30));
                bytes.map(Memory).ok_or_else(|| E::invalid_value(Unexpected::Signed(value), &self))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
                let (number, unit) = text.split_at(end);
                let shift = match unit.trim() {
                    "MiB" => Some(20),
                    "" | "GiB" => Some(30),
                    "TiB" => Some(40),
                    _ => None,
                };
                let number = number.parse::<u64>().ok().filter(|n| *n > 0);
                let bytes = number.zip(shift).and_then(|(n, shift)| n.checked_mul(1_u64 << shift));
                bytes.map(Memory).ok_or_else(|| E::invalid_value(Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_any(Amount)
    }
}
