//! Regions of a function: where they are in its file, how long, and which parts of them can be mapped.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;

use vfio_bindings::bindings::vfio::{
    VFIO_REGION_INFO_CAP_SPARSE_MMAP, VFIO_REGION_INFO_FLAG_CAPS, VFIO_REGION_INFO_FLAG_MMAP,
    vfio_region_info,
};

use super::sys;

/// The most that is read of what the kernel says of a region.
const INFO: usize = 4096;

/// A region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    /// Where it begins in the function's file.
    pub(super) at: u64,
    /// Bytes.
    pub len: u64,
    /// What can be mapped of it.
    pub mappable: Vec<Range<u64>>,
}

/// Asks the kernel.
pub(super) fn info(file: &File, index: u32) -> io::Result<RegionInfo> {
    let mut words = [0u64; INFO / 8];
    let argsz = INFO as u64;
    // The size in the low half of the first long, the region's number in the low half of the second.
    let [first, second, ..] = &mut words;
    (*first, *second) = (argsz, index.into());
    // SAFETY: the structure of this request begins with its size, and the kernel writes no more than that.
    unsafe { sys::with_bytes(file.as_fd(), sys::DEVICE_GET_REGION_INFO, &mut words) }?;
    let bytes: Vec<u8> = words.iter().flat_map(|long| long.to_ne_bytes()).collect();
    parse(&bytes).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Reads `struct vfio_region_info` (size, flags, index, offset of the first capability: a word each; length and place: a long each) and the chain of
/// capabilities behind it.
fn parse(info: &[u8]) -> Option<RegionInfo> {
    let word = |at: usize| Some(u32::from_ne_bytes(info.get(at..at.checked_add(4)?)?.try_into().ok()?));
    let long = |at: usize| Some(u64::from_ne_bytes(info.get(at..at.checked_add(8)?)?.try_into().ok()?));
    const { assert!(size_of::<vfio_region_info>() == 32) };
    let (flags, len, at) = (word(4)?, long(16)?, long(24)?);
    let whole: Vec<Range<u64>> = std::iter::once(0..len).collect();
    let mut mappable = if flags & VFIO_REGION_INFO_FLAG_MMAP == 0 { Vec::new() } else { whole };
    let mut next = if flags & VFIO_REGION_INFO_FLAG_CAPS == 0 { 0 } else { word(12)? as usize };
    // A chain that does not end is none.
    for _ in 0..16 {
        if next == 0 {
            break;
        }
        let (Some(header), Some(following)) = (word(next), word(next + 4)) else { break };
        if header & 0xffff == VFIO_REGION_INFO_CAP_SPARSE_MMAP && !mappable.is_empty() {
            // How many, a word that is not used, and place and length of each.
            let count = word(next + 8).unwrap_or(0) as usize;
            let area = |n: usize| {
                let (start, bytes) = (long(next + 16 + 16 * n)?, long(next + 24 + 16 * n)?);
                Some(start..start.checked_add(bytes)?.min(len))
            };
            mappable = (0..count).map_while(area).filter(|area| !area.is_empty()).collect();
        }
        next = following as usize;
    }
    Some(RegionInfo { at, len, mappable })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(flags: u32, first: u32, capabilities: &[u32]) -> Vec<u8> {
        let mut words = vec![4096, flags, 3, first, 0x4000, 0, 0, 0x30];
        words.extend(capabilities);
        words.into_iter().flat_map(u32::to_ne_bytes).collect()
    }

    fn parts(region: &RegionInfo) -> Vec<(u64, u64)> {
        region.mappable.iter().map(|part| (part.start, part.end)).collect()
    }

    #[test]
    fn a_region_is_mappable_whole_in_parts_or_not_at_all() {
        let read = |bytes: &[u8]| parse(bytes).unwrap();
        let region = read(&said(7, 0, &[]));
        assert_eq!((region.at, region.len), (0x30_0000_0000, 0x4000));
        assert_eq!(parts(&region), [(0, 0x4000)]);
        assert!(read(&said(3, 0, &[])).mappable.is_empty());
        // A capability that is not ours, then the parts: one, and one that ends beyond the region.
        let sparse = [3 | 1 << 16, 40, 1 | 1 << 16, 0, 2, 0, 0x1000, 0, 0x1000, 0, 0x3000, 0, 0x9000, 0];
        assert_eq!(parts(&read(&said(15, 32, &sparse))), [(0x1000, 0x2000), (0x3000, 0x4000)]);
    }

    #[test]
    fn chains_without_end_and_answers_cut_short_are_survived() {
        let looping = said(15, 32, &[3, 32]);
        assert_eq!(parts(&parse(&looping).unwrap()), [(0, 0x4000)]);
        for first in [1, 31, 0xffff_fff0, u32::MAX] {
            assert!(parse(&said(15, first, &[1, 2, 3])).is_some());
        }
        let whole = said(15, 32, &[1, 0, 1, 0, 0x1000, 0, 0x1000, 0]);
        for len in 0..whole.len() {
            assert_eq!(parse(&whole[..len]).is_some(), len >= 32, "{len}");
        }
    }
}
