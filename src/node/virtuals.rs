//! Virtual functions of cards: whose they are, also before they are made, and the token by which a machine opens one of a card that
//! the switch owns.
//!
//! Owns the way from a machine's `[[vm.pci]]` to the port of its card. Makes and binds nothing; that is `changes`.

use std::ops::Range;

use host::pci::{Bdf, Function};
use settings::{DeTable, DeValue, Fill, Spanned};

/// The card that `bdf` is a virtual function of, or will be when they are made.
pub(super) fn card_of(functions: &[Function], bdf: Bdf) -> Option<&Function> {
    let there = functions.iter().find(|function| function.bdf == bdf).and_then(|function| function.physical);
    functions.iter().find(|card| match there {
        Some(physical) => card.bdf == physical,
        None => (0..card.most_virtuals.unwrap_or(0)).any(|number| card.virtual_at(number) == Some(bdf)),
    })
}

/// The tokens that `document` leaves out: a machine with a virtual function of a card has the one of that card's port.
pub(super) fn tokens(document: &DeTable<'_>, functions: &[Function]) -> Vec<Fill> {
    let mut fills = Vec::new();
    for (index, (_, machine)) in tables(document, "vm").enumerate() {
        for (number, (at, function)) in tables(machine, "pci").enumerate() {
            let Some(card) = address(function).and_then(|bdf| card_of(functions, bdf)) else { continue };
            let port = tables(document, "port").find(|(_, port)| address(port) == Some(card.bdf));
            let token = port.and_then(|(_, port)| port.get("vf_token")?.get_ref().as_str());
            let Some(token) = token.filter(|_| !function.contains_key("vf_token")) else { continue };
            let value = Some(format!("{token:?}"));
            fills.push(Fill {
                table: "vm",
                index,
                within: Some(("pci", number)),
                key: "vf_token",
                value,
                at,
            });
        }
    }
    fills
}

fn address(table: &DeTable<'_>) -> Option<Bdf> {
    table.get("device")?.get_ref().as_str()?.parse().ok()
}

/// The tables of a list, each with its place. One with something else in it is refused by whoever reads it.
fn tables<'a, 'd>(
    table: &'a DeTable<'d>,
    key: &str,
) -> impl Iterator<Item = (Range<usize>, &'a DeTable<'d>)> + use<'a, 'd> {
    let list = table.get(key).and_then(|list| list.get_ref().as_array()).into_iter().flatten();
    list.map(|one: &Spanned<DeValue<'d>>| (one.span(), one.get_ref().as_table()))
        .filter_map(|(at, table)| Some((at, table?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A card with two virtual functions, of which the second one is not made yet.
    fn functions() -> Vec<Function> {
        let function = |bdf: &str| Function {
            bdf: bdf.parse().unwrap(),
            vendor: 0x8086,
            device: 0x10c9,
            class: 0x0002_0000,
            driver: None,
            node: None,
            group: None,
            companions: Vec::new(),
            vfio_device: None,
            interfaces: Vec::new(),
            physical: None,
            virtuals: Vec::new(),
            most_virtuals: None,
            virtual_distances: None,
        };
        let card = function("0000:01:00.0");
        let first = Function { physical: Some(card.bdf), ..function("0000:01:10.0") };
        let virtuals = vec![first.bdf];
        let card = Function { virtuals, most_virtuals: Some(2), virtual_distances: Some((0x80, 2)), ..card };
        vec![card, first, function("0000:02:00.0")]
    }

    #[test]
    fn a_virtual_functions_card_is_found_before_it_is_made() {
        let functions = functions();
        let of = |bdf: &str| card_of(&functions, bdf.parse().unwrap()).map(|card| card.bdf.to_string());
        assert_eq!(of("0000:01:10.0").as_deref(), Some("0000:01:00.0"));
        assert_eq!(of("0000:01:10.2").as_deref(), Some("0000:01:00.0"));
        assert_eq!([of("0000:01:10.4"), of("0000:02:00.0"), of("0000:01:00.0")], [None, None, None]);
    }

    #[test]
    fn a_machine_has_the_token_of_its_functions_card_unless_it_names_one() {
        let text = r#"
            [[port]]
            name = "wire"
            device = "01:00.0"
            vf_token = "T"
            [[port]]
            name = "other"
            device = "02:00.0"
            [[vm]]
            name = "none"
            [[vm]]
            name = "fw"
            pci = [{ device = "0000:02:00.0" }, { device = "01:10.2" }, { device = "01:10.0", vf_token = "U" }]
        "#;
        let document = DeTable::parse(text).unwrap();
        let fills = tokens(document.get_ref(), &functions());
        let [fill] = fills.as_slice() else { panic!("{fills:?}") };
        assert_eq!((fill.table, fill.index, fill.within, fill.key), ("vm", 1, Some(("pci", 1)), "vf_token"));
        assert_eq!(fill.value.as_deref(), Some("\"T\""));
        assert!(text[fill.at.clone()].contains("01:10.2"));
    }
}
