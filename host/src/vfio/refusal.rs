//! What the kernel means by not opening a function, however it is opened.

use std::io;

use super::{VfioError, way};
use crate::pci::{Bdf, Function, VFIO, find};
use std::path::Path;

/// Why `function`, of `group`, was not opened: vfio_pci_validate_vf_token says which is which.
pub(super) fn refusal(source: io::Error, function: &Function, group: u32, with_token: bool) -> VfioError {
    let bdf = function.bdf;
    match (source.raw_os_error(), function.physical, with_token) {
        (Some(libc::EACCES), Some(physical), false) => VfioError::NoToken { bdf, physical },
        (Some(libc::EACCES), Some(physical), true) => VfioError::WrongToken { bdf, physical },
        (Some(libc::EACCES), None, _) => VfioError::PhysicalToken(bdf),
        (Some(libc::EINVAL), _, true) => VfioError::TokenUnwanted(bdf),
        (Some(libc::EBUSY), ..) => busy(function, group),
        _ => VfioError::Kernel { what: bdf.to_string(), doing: "opening it", source },
    }
}

/// Another process has it, by the one file or the other.
pub(super) fn busy(function: &Function, group: u32) -> VfioError {
    VfioError::Busy { bdf: function.bdf, files: files(function, group) }
}

/// This process may open neither of them.
pub(super) fn forbidden(function: &Function, group: u32) -> VfioError {
    VfioError::Forbidden { bdf: function.bdf, files: files(function, group) }
}

/// The files that a function is opened by.
fn files(function: &Function, group: u32) -> Vec<String> {
    let device = way::device_of(Path::new("/"), function);
    let files = std::iter::once(way::group_file(group)).chain(device);
    files.map(|file| file.display().to_string()).collect()
}

/// The physical function of a virtual one, where that is with vfio-pci as well: then a token is needed.
pub(super) fn wants_token(root: &Path, function: &Function) -> Option<Bdf> {
    let physical = find(root, function.physical?)?;
    (physical.driver.as_deref() == Some(VFIO)).then_some(physical.bdf)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::tests::Machine;

    #[test]
    fn a_function_that_is_not_opened_is_told_why_and_what_to_do() {
        let machine = Machine::new();
        let card = machine.card("0000:01:00.0", 0x10c9, Some("vfio-pci"), Some(6));
        let function = machine.card("0000:01:10.0", 0x10ca, Some("vfio-pci"), Some(7));
        machine.link("sys/bus/pci/devices/0000:01:10.0/physfn", "../0000:01:00.0");
        let (card, function) = (find(machine.root(), card).unwrap(), find(machine.root(), function).unwrap());
        assert_eq!(wants_token(machine.root(), &function), Some(card.bdf));
        assert_eq!(wants_token(machine.root(), &card), None);
        let said = |code, of, token| refusal(io::Error::from_raw_os_error(code), of, 7, token).to_string();
        for (text, wanted) in [
            (
                said(libc::EACCES, &function, false),
                "0000:01:10.0 is a virtual function of 0000:01:00.0, which is with vfio-pci: give the token",
            ),
            (
                said(libc::EACCES, &function, true),
                "give both the same `vf_token`, and start the user of 0000:01:00.0",
            ),
            (said(libc::EACCES, &card, true), "end their users first"),
            (said(libc::EINVAL, &card, true), "take `vf_token` out"),
            (
                said(libc::EBUSY, &card, false),
                "another process has /dev/vfio/7 (fuser /dev/vfio/7 shows which)",
            ),
            (said(libc::ENODEV, &card, false), "0000:01:00.0: opening it: No such device"),
        ] {
            assert!(text.contains(wanted), "{text}");
        }
    }
}
