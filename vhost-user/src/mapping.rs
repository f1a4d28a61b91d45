//! A part of the other side's memory file, mapped here: guest memory, the dirty log, the inflight region.
//!
//! Owns the mapping and the watch over it: should the file lose pages, zeros take their place and a flag says so. Never
//! touches the bytes.

use std::num::NonZeroUsize;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use host::fault::{Watch, WatchError, watch};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::descriptor::{DescriptorError, memory_file};

/// Page tables are filled at once for a mapping of at most this many pages that are all there (1 GiB of ordinary pages, 512
/// GiB of 2 MiB ones): beyond that, it takes the front end's patience more time than first touches take from the frames.
const FILL_PAGES: u64 = 1 << 18;

/// Why something could not be mapped.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MappingError {
    /// Nothing to map, or more than there are addresses.
    #[error("{size:#x} bytes at offset {offset:#x} cannot be mapped")]
    Impossible {
        /// Offset into the file.
        offset: u64,
        /// Bytes.
        size: u64,
    },
    /// Beyond the end of the file.
    #[error("{size:#x} bytes at offset {offset:#x} lie beyond the end of a file of {file:#x} bytes")]
    BeyondFile {
        /// Offset into the file.
        offset: u64,
        /// Bytes.
        size: u64,
        /// Bytes of the file.
        file: u64,
    },
    /// The wrong kind of file.
    #[error(transparent)]
    Descriptor(#[from] DescriptorError),
    /// The kernel said no.
    #[error("cannot map {size:#x} bytes at offset {offset:#x}: {source}")]
    Map {
        /// Offset into the file.
        offset: u64,
        /// Bytes.
        size: u64,
        /// What the kernel said.
        source: nix::Error,
    },
    /// It could not be guarded against truncation.
    #[error(transparent)]
    Watch(#[from] WatchError),
}

/// A mapping; unmapped when dropped.
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: usize,
    first: *mut u8,
    size: usize,
    watch: Option<Watch>,
}

// SAFETY: the mapping belongs to no thread, and nothing here touches its bytes.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `size` bytes of `file` from `offset` on, whatever their alignment. `gone` becomes true if the file loses pages.
    ///
    /// # Errors
    /// The file is not memory, too short, or the kernel refuses.
    pub(crate) fn new(
        file: BorrowedFd<'_>,
        offset: u64,
        size: u64,
        gone: Arc<AtomicBool>,
    ) -> Result<Self, MappingError> {
        let impossible = MappingError::Impossible { offset, size };
        let end = offset.checked_add(size).filter(|_| size > 0);
        let Some(end) = end.filter(|&end| i64::try_from(end).is_ok()) else { return Err(impossible) };
        let kind = memory_file(file)?;
        if end > kind.size {
            return Err(MappingError::BeyondFile { offset, size, file: kind.size });
        }
        // Whole pages around what was asked for: regions need not begin on a huge page.
        let begin = offset - offset % kind.page;
        let whole = end.checked_next_multiple_of(kind.page).map(|end| end - begin);
        let len = whole.and_then(|len| usize::try_from(len).ok()).and_then(NonZeroUsize::new);
        let (Some(len), Ok(at), Ok(size_here)) = (len, i64::try_from(begin), usize::try_from(size)) else {
            return Err(impossible);
        };
        // Huge pages are reserved now rather than missed later; ordinary ones are whatever the owner made them.
        let reserve = if kind.huge { MapFlags::empty() } else { MapFlags::MAP_NORESERVE };
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; it touches no memory that is in use.
        let start = unsafe { mmap(None, len, protection, MapFlags::MAP_SHARED | reserve, file, at) }
            .map_err(|source| MappingError::Map { offset, size, source })?
            .cast::<u8>();
        // `end > offset >= begin`, so the distance is less than `len`.
        let first = start.as_ptr().wrapping_add((offset - begin) as usize);
        // From here on, dropping `mapping` unmaps it.
        let mut mapping = Self { start, len: len.get(), first, size: size_here, watch: None };
        mapping.advise(libc::MADV_DONTDUMP);
        // SAFETY: this is what mmap returned and was given; `drop` gives up the watch before it unmaps; nobody makes
        // references to shared memory (`virtio::memory`).
        mapping.watch = Some(unsafe { watch(file, start.as_ptr(), len.get(), gone) }?);
        if kind.full && len.get() as u64 / kind.page <= FILL_PAGES {
            mapping.advise(libc::MADV_POPULATE_WRITE);
        }
        Ok(mapping)
    }

    /// Gives advice that may be refused without harm.
    fn advise(&self, advice: libc::c_int) {
        // SAFETY: the range is this mapping, and none of the advice used here changes what it holds.
        let _ = unsafe { libc::madvise(self.start.as_ptr().cast(), self.len, advice) };
    }

    /// The first byte that was asked for.
    pub(crate) fn first(&self) -> *mut u8 {
        self.first
    }

    /// How many were asked for.
    pub(crate) fn size(&self) -> usize {
        self.size
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        drop(self.watch.take());
        // SAFETY: this is the mapping that `new` made; whoever uses its addresses keeps `self` alive. It cannot fail for a
        // whole mapping of our own, and there is nothing that could be done if it did.
        let _ = unsafe { munmap(self.start.cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsFd, OwnedFd};

    fn file(size: i64) -> OwnedFd {
        let fd = nix::sys::memfd::memfd_create(c"test", nix::sys::memfd::MFdFlags::empty()).unwrap();
        nix::unistd::ftruncate(&fd, size).unwrap();
        fd
    }

    fn map(file: &OwnedFd, offset: u64, size: u64) -> Result<Mapping, MappingError> {
        Mapping::new(file.as_fd(), offset, size, Arc::default())
    }

    #[test]
    fn an_offset_that_is_no_multiple_of_a_page_is_counted_once() {
        let fd = file(16384);
        nix::sys::uio::pwrite(&fd, b"here", 5000).unwrap();
        let m = map(&fd, 5000, 8192).unwrap();
        // SAFETY: 8192 bytes are mapped at `first`.
        let bytes: [u8; 4] = std::array::from_fn(|i| unsafe { m.first().add(i).read_volatile() });
        assert_eq!((&bytes, m.size()), (b"here", 8192));
    }

    #[test]
    fn sizes_that_are_zero_wrap_or_exceed_the_file_are_refused() {
        let fd = file(8192);
        for (offset, size) in [(0, 0), (u64::MAX, 1), (1, u64::MAX), (0, 1 << 63), (u64::MAX - 4095, 4096)] {
            let refused = map(&fd, offset, size);
            assert!(matches!(refused, Err(MappingError::Impossible { .. })), "{offset:#x} {size:#x}");
        }
        for (offset, size) in [(0, 8193), (8192, 1), (4096, 4097), (1 << 40, 4096)] {
            let refused = map(&fd, offset, size);
            assert!(matches!(refused, Err(MappingError::BeyondFile { .. })), "{offset:#x} {size:#x}");
        }
        assert!(map(&fd, 0, 8192).is_ok());
    }

    #[test]
    fn a_file_that_is_truncated_after_it_was_mapped_reads_as_zeros_and_raises_the_flag() {
        let (fd, gone) = (file(8192), Arc::new(AtomicBool::new(false)));
        let m = Mapping::new(fd.as_fd(), 0, 8192, gone.clone()).unwrap();
        nix::unistd::ftruncate(&fd, 0).unwrap();
        // SAFETY: mapped; the fault handler puts zeros where the file ended.
        assert_eq!(unsafe { m.first().add(4096).read_volatile() }, 0);
        assert!(gone.load(std::sync::atomic::Ordering::Relaxed));
    }
}
