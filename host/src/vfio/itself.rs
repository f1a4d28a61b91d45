//! The newer way: a function's own device, bound to iommufd.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;

use super::iommu::Iommufd;
use super::refusal::{busy, refusal, wants_token};
use super::{VfioError, group, way};
use crate::pci::Function;

/// Opens a function by its own device, and lets it reach what is mapped; nothing where its group is the way.
pub(super) fn open(
    root: &Path,
    iommufd: &Iommufd,
    function: &Function,
    group: u32,
    token: Option<&str>,
) -> Result<Option<File>, VfioError> {
    let bdf = function.bdf;
    let Some(path) = way::device_of(root, function) else { return Ok(None) };
    // Kernels that do not ask by this way for a token are not to be got round.
    if token.is_none()
        && let Some(physical) = wants_token(root, function)
    {
        return Err(VfioError::NoToken { bdf, physical });
    }
    if token.is_none() && way::wants_group(function) {
        return Ok(None);
    }
    let Ok(file) = OpenOptions::new().read(true).write(true).open(&path) else { return Ok(None) };
    let bytes = token.and_then(uuid);
    if token.is_some() != bytes.is_some() {
        return Ok(None);
    }
    match iommufd.bind(&file, bytes) {
        Ok(()) => {}
        // A kernel without tokens here, which has them for groups; or else the group's refusal says what is wrong.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) && bytes.is_some() => return Ok(None),
        Err(error) => return Err(not_bound(error, function, group, token.is_some())),
    }
    let attached = iommufd.attach(&file);
    attached.map_err(|source| VfioError::Kernel {
        what: bdf.to_string(),
        doing: "letting it reach the other devices' memory",
        source,
    })?;
    Ok(Some(file))
}

/// Why a function could not be bound by its own device (drivers/vfio/vfio_main.c, `vfio_df_open`; drivers/iommu/iommufd/device.c,
/// `iommufd_device_bind`).
fn not_bound(error: io::Error, function: &Function, group: u32, with_token: bool) -> VfioError {
    match error.raw_os_error() {
        // Another process has bound it, which keeps the group from being opened too; or something else is wrong.
        Some(libc::EINVAL) => match group::open(function, group) {
            Err(other @ VfioError::Busy { .. }) => other,
            Err(VfioError::Kernel { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                busy(function, group)
            }
            _ => refusal(error, function, group, with_token),
        },
        // Another process has a function of its group, or interrupts are not remapped: only one of these can be.
        Some(libc::EPERM) if !function.companions.is_empty() => busy(function, group),
        Some(libc::EPERM) => VfioError::Interrupts(function.bdf),
        _ => refusal(error, function, group, with_token),
    }
}

/// The sixteen bytes of a token, in the order of its text (RFC 9562, section 4).
fn uuid(text: &str) -> Option<[u8; 16]> {
    let digits: String = text.chars().filter(|c| *c != '-').collect();
    let plain = digits.len() == 32 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    plain.then(|| u128::from_str_radix(&digits, 16).ok()).flatten().map(u128::to_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::{find, tests::Machine};

    #[test]
    fn a_token_is_sixteen_bytes_in_the_order_of_its_text() {
        let token = uuid("2ab74924-c335-45f4-9b16-8569e5b08258").unwrap();
        assert_eq!((token[..4].to_vec(), token[15]), (vec![0x2a, 0xb7, 0x49, 0x24], 0x58));
        for text in
            ["", "secret", "2ab74924-c335-45f4-9b16-8569e5b0825", "+ab74924-c335-45f4-9b16-8569e5b08258"]
        {
            assert_eq!(uuid(text), None, "{text}");
        }
    }

    #[test]
    fn a_device_that_cannot_be_bound_is_told_why() {
        let machine = Machine::new();
        let bdf = machine.card("0000:01:00.0", 0x10d3, Some("vfio-pci"), Some(4_000_000_000));
        let alone = find(machine.root(), bdf).unwrap();
        let said = |code, function: &Function| {
            not_bound(io::Error::from_raw_os_error(code), function, 4_000_000_000, false).to_string()
        };
        // This machine has no such group: a kernel without groups says no more than this of a device that somebody has.
        for code in [libc::EBUSY, libc::EINVAL] {
            let text = said(code, &alone);
            assert!(text.contains("0000:01:00.0 is in use: another process has"), "{text}");
        }
        assert!(said(libc::EPERM, &alone).contains("no interrupt remapping"));
        let accompanied = Function { companions: vec!["0000:01:00.1".parse().unwrap()], ..alone };
        assert!(said(libc::EPERM, &accompanied).contains("is in use"));
    }
}
