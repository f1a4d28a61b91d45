//! Which parts of a device's regions are the guest's memory, and which are trapped.
//!
//! Owns the arithmetic of pages: the pages of the MSI-X table and of its pending bits are trapped, a region that is smaller than
//! a page is, and what the kernel does not let anybody map. Places regions in the guest's windows at the start; from then on
//! the guest moves them.

use std::ops::Range;

/// Bytes of a page: what KVM maps.
pub(super) const PAGE: u64 = 4096;

/// The parts of a region of `len` bytes that a guest reaches without leaving for us.
pub(super) fn parts(len: u64, mappable: &[Range<u64>], trapped: &[Range<u64>]) -> Vec<Range<u64>> {
    if len < PAGE {
        return Vec::new();
    }
    let inward = |area: &Range<u64>| {
        let start = area.start.checked_next_multiple_of(PAGE)?;
        let end = area.end.min(len) / PAGE * PAGE;
        (start < end).then_some(start..end)
    };
    let mut parts: Vec<Range<u64>> = mappable.iter().filter_map(inward).collect();
    for hole in trapped.iter().filter(|hole| !hole.is_empty()) {
        let hole = hole.start / PAGE * PAGE..hole.end.next_multiple_of(PAGE);
        let around = |part: Range<u64>| {
            let (before, after) = (part.start..part.end.min(hole.start), part.start.max(hole.end)..part.end);
            [before, after].into_iter().filter(|part| !part.is_empty())
        };
        parts = parts.into_iter().flat_map(around).collect();
    }
    parts
}

/// Free addresses for regions: the windows below and above 4 GiB.
#[derive(Clone, Debug)]
pub(crate) struct Windows {
    small: Range<u64>,
    large: Range<u64>,
}

impl Windows {
    pub(crate) fn new(small: Range<u64>, large: Range<u64>) -> Self {
        Self { small, large }
    }

    /// A place for a region, at a multiple of its length; `wide`: it may lie above 4 GiB, and does if there is room.
    pub(super) fn take(&mut self, len: u64, wide: bool) -> Option<u64> {
        // Pages are not shared, so that a small region can be told from its neighbours.
        let step = len.max(PAGE);
        let from = |window: &mut Range<u64>| {
            let start = window.start.checked_next_multiple_of(step)?;
            let end = start.checked_add(step)?;
            (end <= window.end).then(|| {
                window.start = end;
                start
            })
        };
        let large = if wide { from(&mut self.large) } else { None };
        large.or_else(|| from(&mut self.small))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(parts: &[Range<u64>]) -> Vec<(u64, u64)> {
        parts.iter().map(|part| (part.start, part.end)).collect()
    }

    #[test]
    fn pages_of_vectors_are_trapped_and_the_others_are_the_guests() {
        let whole = |len: u64| std::iter::once(0..len).collect::<Vec<_>>();
        assert_eq!(pairs(&parts(0x2_0000, &whole(0x2_0000), &[])), [(0, 0x2_0000)]);
        // The 82576: table on page 0, pending bits on page 2.
        let trapped = [0..0xa0, 0x2000..0x2008];
        assert_eq!(pairs(&parts(0x4000, &whole(0x4000), &trapped)), [(0x1000, 0x2000), (0x3000, 0x4000)]);
        // A table that crosses pages.
        assert_eq!(pairs(&parts(0x8000, &whole(0x8000), &[0xff8..0x2008, 0..0])), [(0x3000, 0x8000)]);
        assert!(parts(0x4000, &[], &[]).is_empty(), "the kernel lets nobody map it");
        for len in [16, 256, 2048] {
            assert!(parts(len, &whole(len), &[]).is_empty());
        }
    }

    #[test]
    fn whatever_is_mappable_and_trapped_no_part_touches_a_trapped_page_or_leaves_the_region() {
        let mut random = super::super::tests::Random::new();
        for _ in 0..20_000 {
            let len = 1 << (4 + random.below(16));
            let mut areas = || -> Vec<Range<u64>> {
                let area = |random: &mut super::super::tests::Random| {
                    let start = random.below(2 * len);
                    start..start + random.below(len)
                };
                (0..random.below(4)).map(|_| area(&mut random)).collect()
            };
            let (mappable, trapped) = (areas(), areas());
            for part in parts(len, &mappable, &trapped) {
                assert!(part.start < part.end && part.end <= len);
                assert!(part.start.is_multiple_of(PAGE) && part.end.is_multiple_of(PAGE));
                assert!(mappable.iter().any(|area| area.start <= part.start && part.end <= area.end));
                for hole in trapped.iter().filter(|hole| !hole.is_empty()) {
                    let pages = hole.start / PAGE * PAGE..hole.end.next_multiple_of(PAGE);
                    assert!(part.end <= pages.start || pages.end <= part.start, "{part:x?} {hole:x?}");
                }
            }
        }
    }

    #[test]
    fn regions_are_placed_side_by_side_at_multiples_of_their_length_until_there_is_no_room() {
        let mut windows = Windows::new(0xc000_8000..0xc100_0000, 0x1_4000_0000..0x1_8000_0000);
        assert_eq!(windows.take(0x2_0000, false), Some(0xc002_0000));
        assert_eq!(windows.take(16, false), Some(0xc004_0000));
        assert_eq!(windows.take(0x4000, true), Some(0x1_4000_0000));
        assert_eq!(windows.take(16, false), Some(0xc004_1000), "a page for each");
        assert_eq!(windows.take(1 << 30, true), None);
        assert_eq!(windows.take(1 << 24, false), None);
        assert_eq!(windows.take(1 << 23, true), Some(0x1_4080_0000));
    }
}
