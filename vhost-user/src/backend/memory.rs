//! The memory table of a session: which parts of which files are the guest's memory.
//!
//! A table is never changed, another is built beside it: a message that is refused leaves everything as it was.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use virtio::memory::{GuestMemory, Region};

use super::refusal::Refusal;
use crate::mapping::Mapping;

/// Regions of a guest. QEMU uses up to 8 unless it may use more, and then as many as it has memory slots; 32 is what the
/// `vhost` crate takes in one message.
pub(crate) const MAX_REGIONS: usize = 32;

/// A region as a message describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) guest: u64,
    pub(crate) size: u64,
    pub(crate) user: u64,
    pub(crate) offset: u64,
}

#[derive(Clone)]
struct Entry {
    wanted: Wanted,
    mapping: Arc<Mapping>,
}

/// The regions of a guest.
#[derive(Clone, Default)]
pub(crate) struct MemoryTable {
    entries: Vec<Entry>,
    gone: Arc<AtomicBool>,
}

impl MemoryTable {
    /// A table of these regions and nothing else.
    pub(crate) fn new<F: AsFd>(
        regions: impl ExactSizeIterator<Item = (Wanted, F)>,
        limit: u64,
    ) -> Result<Self, Refusal> {
        regions.into_iter().try_fold(Self::default(), |table, (wanted, file)| table.with(wanted, file, limit))
    }

    /// This table and one region more.
    pub(crate) fn with(&self, wanted: Wanted, file: impl AsFd, limit: u64) -> Result<Self, Refusal> {
        if self.entries.len() >= MAX_REGIONS {
            return Err(Refusal::TooManyRegions(MAX_REGIONS));
        }
        let total = self.entries.iter().fold(wanted.size, |sum, e| sum.saturating_add(e.wanted.size));
        if total > limit {
            return Err(Refusal::MemoryLimit { total, limit });
        }
        for other in &self.entries {
            let apart = |a: u64, b: u64| a.checked_add(wanted.size).is_some_and(|end| end <= b);
            let before = other.wanted.user.saturating_add(other.wanted.size) <= wanted.user;
            if !before && !apart(wanted.user, other.wanted.user) {
                return Err(Refusal::UserOverlap(other.wanted.user, wanted.user));
            }
        }
        let mapping = Mapping::new(file.as_fd(), wanted.offset, wanted.size, self.gone.clone())
            .map_err(|source| Refusal::Region { guest: wanted.guest, source })?;
        let mut table = self.clone();
        table.entries.push(Entry { wanted, mapping: Arc::new(mapping) });
        Ok(table)
    }

    /// This table without a region.
    pub(crate) fn without(&self, wanted: Wanted) -> Result<Self, Refusal> {
        let key = |w: Wanted| (w.guest, w.size, w.user);
        let at = self.entries.iter().position(|e| key(e.wanted) == key(wanted));
        let at = at.ok_or(Refusal::NoSuchRegion(wanted.guest))?;
        let mut table = self.clone();
        table.entries.remove(at);
        Ok(table)
    }

    /// The memory that a ring works on; nothing for an empty table.
    pub(crate) fn memory(&self) -> Result<Option<Arc<GuestMemory>>, Refusal> {
        if self.entries.is_empty() {
            return Ok(None);
        }
        let regions = self.entries.iter().map(|e| Region {
            guest: e.wanted.guest,
            user: e.wanted.user,
            size: e.wanted.size,
            host: e.mapping.first(),
        });
        let mappings: Vec<_> = self.entries.iter().map(|e| e.mapping.clone()).collect();
        // SAFETY: each mapping has `size` bytes at `first`, readable and writable until the last clone of it is dropped, and
        // nobody makes references to them.
        let memory = unsafe { GuestMemory::new(regions.collect(), Box::new(mappings)) }?;
        Ok(Some(Arc::new(memory.with_gone(self.gone.clone()))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;

    fn file(size: i64) -> OwnedFd {
        let fd = nix::sys::memfd::memfd_create(c"test", nix::sys::memfd::MFdFlags::empty()).unwrap();
        nix::unistd::ftruncate(&fd, size).unwrap();
        fd
    }

    fn region(guest: u64, size: u64, user: u64) -> Wanted {
        Wanted { guest, size, user, offset: 0 }
    }

    #[test]
    fn a_table_grows_and_shrinks_by_regions_and_keeps_the_others_mapped() {
        let fd = file(8192);
        let (a, b) = (region(0, 4096, 0x10000), region(0x8000, 8192, 0x20000));
        let one = MemoryTable::new([(a, &fd)].into_iter(), 1 << 20).unwrap();
        let two = one.with(b, &fd, 1 << 20).unwrap();
        let memory = two.memory().unwrap().unwrap();
        assert_eq!(memory.regions().len(), 2);
        let rest = two.without(a).unwrap();
        assert_eq!(rest.memory().unwrap().unwrap().regions()[0].host, memory.regions()[1].host);
        assert!(rest.without(a).is_err());
        assert!(rest.without(b).unwrap().memory().unwrap().is_none());
    }

    #[test]
    fn regions_that_overlap_in_either_address_space_are_refused() {
        let fd = file(8192);
        let one = MemoryTable::new([(region(0, 8192, 0x10000), &fd)].into_iter(), 1 << 20).unwrap();
        let user = one.with(region(0x10000, 8192, 0x11fff), &fd, 1 << 20);
        assert!(matches!(user, Err(Refusal::UserOverlap(..))));
        let guest = one.with(region(8191, 8192, 0x20000), &fd, 1 << 20).unwrap().memory();
        assert!(matches!(guest, Err(Refusal::Regions(_))));
        let wraps = one.with(region(0x10000, 4096, u64::MAX), &fd, 1 << 20);
        assert!(wraps.is_err() || wraps.unwrap().memory().is_err());
    }

    #[test]
    fn a_sparse_tebibyte_is_refused_by_the_limit() {
        let fd = file(1 << 40);
        let refused = MemoryTable::new([(region(0, 1 << 40, 0), &fd)].into_iter(), 1 << 36);
        assert!(matches!(refused, Err(Refusal::MemoryLimit { .. })));
        let half = (region(0, 1 << 35, 0), &fd);
        let other = (region(1 << 36, (1 << 35) + 1, 1 << 36), &fd);
        assert!(matches!(
            MemoryTable::new([half, other].into_iter(), 1 << 36),
            Err(Refusal::MemoryLimit { .. })
        ));
    }

    #[test]
    fn a_thirty_third_region_is_refused() {
        let fd = file(4096);
        let at = |i: u64| (region(i << 20, 4096, i << 20), &fd);
        let full: Vec<_> = (0..32).map(at).collect();
        let table = MemoryTable::new(full.into_iter(), 1 << 30).unwrap();
        assert!(matches!(table.with(at(32).0, &fd, 1 << 30), Err(Refusal::TooManyRegions(32))));
    }
}
