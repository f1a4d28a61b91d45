//! Values that somebody else decides: put into a document in place of what is written there, before it is read.
//!
//! Owns the putting. Who decides, and on what grounds, is the caller's business.

use std::ops::Range;

use serde_spanned::Spanned;
use toml::de::{DeTable, DeValue};

/// A value for a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fill {
    /// The table: `switch`, or `vm` for one of a list.
    pub table: &'static str,
    /// Which of the list.
    pub index: usize,
    /// Of a list in that table: its key, and which of it.
    pub within: Option<(&'static str, usize)>,
    /// The key.
    pub key: &'static str,
    /// The value, as TOML; `None`: the key is left out.
    pub value: Option<String>,
    /// The place that problems with it are shown at.
    pub at: Range<usize>,
}

/// `document` with these values.
pub fn filled<'t>(document: &DeTable<'t>, fills: &'t [Fill]) -> DeTable<'t> {
    let mut document = document.clone();
    for fill in fills {
        let inner = |table| match fill.within {
            Some((key, index)) => one_of(table, key, index),
            None => Some(table),
        };
        let Some(table) = one_of(&mut document, fill.table, fill.index).and_then(inner) else { continue };
        let key = table.keys().find(|key| key.get_ref() == fill.key).cloned();
        let key = key.unwrap_or_else(|| Spanned::new(fill.at.clone(), fill.key.into()));
        match fill.value.as_deref().and_then(|value| DeValue::parse(value).ok()) {
            Some(value) => table.insert(key, placed(value.into_inner(), &fill.at)),
            None => table.remove(&key),
        };
    }
    document
}

/// The table below `key`, or the one number `index` if a list is there.
fn one_of<'d, 't>(table: &'d mut DeTable<'t>, key: &str, index: usize) -> Option<&'d mut DeTable<'t>> {
    match table.get_mut(key)?.get_mut() {
        DeValue::Table(table) => Some(table),
        DeValue::Array(list) => match list.get_mut(index)?.get_mut() {
            DeValue::Table(table) => Some(table),
            _ => None,
        },
        _ => None,
    }
}

/// A value all of whose parts are where `at` says.
fn placed<'t>(value: DeValue<'t>, at: &Range<usize>) -> Spanned<DeValue<'t>> {
    let value = match value {
        DeValue::Array(list) => {
            DeValue::Array(list.into_iter().map(|element| placed(element.into_inner(), at)).collect())
        }
        other => other,
    };
    Spanned::new(at.clone(), value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_put_where_they_are_missing_and_in_place_of_others_and_problems_shown_there() {
        let text = "[a]\nx = \"auto\"\n[[vm]]\n[[vm]]\ny = 1\nz = 3\npci = [{}, { a = 1 }]\n";
        let fill = |table, index, key, value: Option<&str>, at| Fill {
            table,
            index,
            within: None,
            key,
            value: value.map(str::to_owned),
            at,
        };
        let fills = [
            fill("a", 0, "x", Some("[1, 2]"), 8..14),
            fill("vm", 0, "y", Some("7"), 15..19),
            fill("vm", 1, "y", None, 0..0),
            fill("nothing", 0, "y", Some("1"), 0..0),
            fill("vm", 5, "y", Some("1"), 0..0),
            Fill { within: Some(("pci", 1)), ..fill("vm", 1, "y", Some("\"t\""), 0..0) },
            Fill { within: Some(("pci", 2)), ..fill("vm", 1, "y", Some("1"), 0..0) },
        ];
        let document = DeTable::parse(text).unwrap();
        let document = filled(document.get_ref(), &fills);
        let x = &document["a"].get_ref()["x"];
        assert_eq!((x.span(), x.get_ref()[1].span()), (8..14, 8..14));
        assert_eq!(x.get_ref()[1].get_ref().as_integer().unwrap().to_string(), "2");
        let machines = document["vm"].get_ref();
        assert_eq!(machines[0].get_ref()["y"].get_ref().as_integer().unwrap().to_string(), "7");
        assert!(machines[1].get_ref().get("y").is_none() && machines[1].get_ref().get("z").is_some());
        let functions = machines[1].get_ref()["pci"].get_ref();
        assert_eq!(functions[1].get_ref()["y"].get_ref().as_str(), Some("t"));
        assert!(functions[0].get_ref().get("y").is_none());
    }
}
