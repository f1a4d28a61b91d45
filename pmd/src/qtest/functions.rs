//! Virtual functions of the modelled device (SR-IOV 1.1, chapter 3): turned on and found, as a kernel would.

use std::sync::Arc;

use super::function::{DEVICE, Function, PORT};
use super::protocol::Width;
use super::{BARS, MachineError, Shared};
use crate::access::config;

/// Where their regions are put: behind those of the device.
const REGIONS: u64 = BARS + (8 << 20);

/// The extended capability of SR-IOV (3.3.1), and fields of it.
const SRIOV: u64 = 0x10;
const CONTROL: u64 = 0x08;
const NUM_VFS: u64 = 0x10;
const OFFSET_AND_STRIDE: u64 = 0x14;
const DEVICE_ID: u64 = 0x18;
const VF_BARS: u64 = 0x24;
/// In [`CONTROL`]: on, their memory answers, functions beyond the eighth.
const VF_ENABLE: u64 = 1 | 1 << 3 | 1 << 4;

/// Turns `count` of them on.
pub(super) fn enable(shared: &Arc<Shared>, count: u16) -> Result<Vec<Arc<Function>>, MachineError> {
    let read = |at: u64| shared.read(at, Width::Long);
    let write = |at: u64, value: u64| shared.write(at, Width::Long, value);
    forward_all_numbers(shared);
    let capability = DEVICE + sriov(shared).ok_or(MachineError::NoFunctions)?;
    shared.write(capability + NUM_VFS, Width::Word, count.into());
    let placing = read(capability + OFFSET_AND_STRIDE);
    let (offset, stride) = (placing & 0xffff, placing >> 16);
    let id = (read(DEVICE) & 0xffff | read(capability + DEVICE_ID) & 0xffff_0000) as u32;

    // A region of each, one behind the other (3.3.14).
    let (mut regions, mut next, mut index) = ([None; 6], REGIONS, 0);
    while let Some(region) = regions.get_mut(index) {
        let at = capability + VF_BARS + 4 * index as u64;
        write(at, 0xffff_ffff);
        let found = read(at);
        index += 1;
        if found & !0xf == 0 {
            continue;
        }
        let size = (!(found & !0xf) + 1) & 0xffff_ffff;
        next = next.next_multiple_of(size);
        write(at, next);
        *region = Some((next, size));
        next += size * u64::from(count);
        if found >> 1 & 3 == 2 {
            write(at + 4, 0);
            index += 1;
        }
    }
    write(capability + CONTROL, VF_ENABLE);
    let function = |number: u16| {
        let bars =
            regions.map(|region| region.map(|(base, size)| (base + size * u64::from(number), size as u32)));
        // Functions are numbered through, from the device's own, which is the first of its bus.
        let at = DEVICE + ((offset + stride * u64::from(number)) << 12);
        // QEMU maps a function's regions by its own command register; the specification by `CONTROL` alone (3.4.1.3).
        write(at + u64::from(config::COMMAND), u64::from(config::COMMAND_MEMORY));
        Arc::new(Function::of(shared, number, at, id, bars))
    };
    Ok((0..count).map(function).collect())
}

/// Where the capability is.
fn sriov(shared: &Shared) -> Option<u64> {
    let mut at = 0x100;
    // The extended space has room for so many headers.
    for _ in 0..960 {
        let header = shared.read(DEVICE + at, Width::Long);
        if header & 0xffff == SRIOV {
            return Some(at);
        }
        at = header >> 20;
        if at < 0x100 {
            break;
        }
    }
    None
}

/// Lets the root port forward to functions of any number (PCI Express 4.0, section 6.13: ARI forwarding).
fn forward_all_numbers(shared: &Shared) {
    let mut at = shared.read(PORT + 0x34, Width::Long) & 0xfc;
    for _ in 0..48 {
        let header = shared.read(PORT + at, Width::Long);
        if header & 0xff == 0x10 {
            let control = shared.read(PORT + at + 0x28, Width::Long);
            shared.write(PORT + at + 0x28, Width::Long, control | 1 << 5);
        }
        at = header >> 8 & 0xfc;
        if at == 0 {
            break;
        }
    }
}
