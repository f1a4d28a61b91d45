//! Which addresses devices know memory by: a row of free ranges, out of what the IOMMU can translate.

use std::ops::RangeInclusive;

use vfio_bindings::bindings::vfio::{VFIO_IOMMU_INFO_CAPS, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE};

/// Below this, machines have holes (interrupts at 0xfee00000 among them) and other users; above it there is room.
const FIRST: u64 = 1 << 32;

/// Where mappings begin: huge pages must not be cut.
const ALIGNMENT: u64 = 1 << 30;

/// What is left.
#[derive(Debug, Default)]
pub(super) struct Addresses {
    free: Vec<RangeInclusive<u64>>,
}

impl Addresses {
    /// All of these ranges from [`FIRST`] on; a kernel that does not tell them translates 39 bits at least (Intel VT-d 4.1,
    /// section 10.4.2: the narrowest width there is).
    pub(super) fn new(ranges: Vec<RangeInclusive<u64>>) -> Self {
        let ranges = if ranges.is_empty() { vec![0..=(1 << 39) - 1] } else { ranges };
        let above = ranges.into_iter().map(|range| FIRST.max(*range.start())..=*range.end());
        Self { free: above.filter(|range| !range.is_empty()).collect() }
    }

    /// Takes the first `len` addresses that are free.
    pub(super) fn take(&mut self, len: u64) -> Option<u64> {
        let fits = |range: &RangeInclusive<u64>| {
            let start = range.start().checked_next_multiple_of(ALIGNMENT)?;
            let end = start.checked_add(len.checked_sub(1)?)?;
            (end <= *range.end()).then_some((start, end))
        };
        let (at, (start, end)) =
            self.free.iter().enumerate().find_map(|(at, range)| Some((at, fits(range)?)))?;
        let range = self.free.remove(at);
        let rest = [
            (start > *range.start()).then(|| *range.start()..=start - 1),
            (end < *range.end()).then(|| end + 1..=*range.end()),
        ];
        self.free.splice(at..at, rest.into_iter().flatten());
        Some(start)
    }

    /// Gives back what [`Addresses::take`] gave.
    pub(super) fn give(&mut self, start: u64, len: u64) {
        let Some(end) = len.checked_sub(1).and_then(|last| start.checked_add(last)) else { return };
        self.free.push(start..=end);
        self.free.sort_unstable_by_key(|range| *range.start());
        let mut joined: Vec<RangeInclusive<u64>> = Vec::new();
        for range in self.free.drain(..) {
            match joined.last_mut() {
                Some(last) if last.end().checked_add(1) == Some(*range.start()) => {
                    *last = *last.start()..=*range.end()
                }
                _ => joined.push(range),
            }
        }
        self.free = joined;
    }
}

/// The ranges that the kernel lists behind its answer to IOMMU_GET_INFO (`info`, the whole answer): a chain of capabilities, each
/// with identifier (16 bits), version (16) and the offset of the next (32). Nothing where it lists none.
pub(super) fn ranges(info: &[u8]) -> Vec<RangeInclusive<u64>> {
    let word = |at: usize| Some(u32::from_ne_bytes(info.get(at..at + 4)?.try_into().ok()?));
    let long = |at: usize| Some(u64::from_ne_bytes(info.get(at..at + 8)?.try_into().ok()?));
    // Flags behind the size; the first capability's offset behind the page sizes.
    if word(4).unwrap_or(0) & VFIO_IOMMU_INFO_CAPS == 0 {
        return Vec::new();
    }
    let mut at = word(16).unwrap_or(0) as usize;
    // A chain that does not end is none.
    for _ in 0..16 {
        let (Some(header), Some(next)) = (word(at), word(at + 4)) else { break };
        if at == 0 {
            break;
        }
        if header & 0xffff == VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE {
            let count = word(at + 8).unwrap_or(0) as usize;
            let range = |n: usize| Some(long(at + 16 + 16 * n)?..=long(at + 24 + 16 * n)?);
            return (0..count).map_while(range).collect();
        }
        at = next as usize;
    }
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_given_once_above_4_gib_and_can_be_given_again() {
        let mut addresses = Addresses::new(vec![0..=0xfedf_ffff, 0xfef0_0000..=(16 << 30) - 1]);
        let (a, b) = (addresses.take(3 << 20).unwrap(), addresses.take(1 << 30).unwrap());
        assert_eq!((a, b), (4 << 30, 5 << 30), "each begins at a huge page");
        assert_eq!(addresses.take(11 << 30), None);
        assert_eq!(addresses.take(10 << 30), Some(6 << 30));
        addresses.give(b, 1 << 30);
        addresses.give(6 << 30, 10 << 30);
        addresses.give(a, 3 << 20);
        assert_eq!(addresses.take(12 << 30), Some(4 << 30), "all of it is one piece again");
        assert_eq!((addresses.take(0), addresses.take(u64::MAX)), (None, None));
    }

    #[test]
    fn the_kernels_ranges_are_found_in_the_chain_and_nothing_is_read_beyond_it() {
        let mut info = Vec::new();
        for word in [112u32, 3, 0x1000, 0, 24, 0] {
            info.extend(word.to_ne_bytes());
        }
        // A capability of another kind, then the ranges: two of them, in order.
        for word in [3u32 | 1 << 16, 40, 0, 0] {
            info.extend(word.to_ne_bytes());
        }
        for word in [1u32 | 1 << 16, 0, 2, 0] {
            info.extend(word.to_ne_bytes());
        }
        for long in [0u64, 0xfedf_ffff, 0xfef0_0000, (1 << 39) - 1] {
            info.extend(long.to_ne_bytes());
        }
        assert_eq!(ranges(&info), [0..=0xfedf_ffff, 0xfef0_0000..=(1 << 39) - 1]);
        for len in 0..info.len() {
            assert!(ranges(&info[..len]).len() < 2, "{len}");
        }
        // A chain that leads to itself.
        info[28..32].copy_from_slice(&24u32.to_ne_bytes());
        assert!(ranges(&info).is_empty());
        assert!(Addresses::new(Vec::new()).take(1 << 30).is_some());
    }
}
