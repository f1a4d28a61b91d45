//! Shared memory: the only module that touches bytes which a guest can rewrite at any time.
//!
//! Owns the table that turns the guest's addresses into ours ([`GuestMemory`]), the dirty log ([`DirtyLog`]), typed views of
//! the ring areas ([`split`], [`packed`]) and the copy routines ([`copy`]). Every range is checked whole; no reference to
//! shared bytes is ever made; every access is volatile, atomic or assembly, so that the compiler reads a byte exactly as
//! often as the code says. Never maps or unmaps: a mapping is kept alive by the [`GuestMemory`] that was built on it.

pub mod copy;
mod log;
pub mod packed;
pub mod split;

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub use log::{DirtyLog, LOG_PAGE};

/// One mapped stretch of a guest's memory.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// Where the guest sees it (guest-physical address).
    pub guest: u64,
    /// Where the front end sees it (its virtual address; ring addresses come in these).
    pub user: u64,
    /// Bytes.
    pub size: u64,
    /// Where we see it.
    pub host: *mut u8,
}

impl Region {
    /// Where `len` bytes at guest-physical `addr` are, if they all lie in this region. Never in an empty one.
    #[inline(always)]
    pub fn translate(&self, addr: u64, len: u32) -> Option<*mut u8> {
        let offset = addr.wrapping_sub(self.guest);
        (offset < self.size && self.size - offset >= u64::from(len))
            .then(|| self.host.wrapping_add(offset as usize))
    }
}

/// Why regions were refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegionError {
    /// Zero bytes, or an address range that wraps.
    #[error("memory region at {guest:#x} of {size:#x} bytes is empty or wraps")]
    Impossible {
        /// Guest-physical start.
        guest: u64,
        /// Bytes.
        size: u64,
    },
    /// Two regions share guest-physical addresses.
    #[error("memory regions at {0:#x} and {1:#x} overlap")]
    Overlap(u64, u64),
}

/// A range of shared memory that was checked whole: `len` bytes at `ptr`, alive as long as the [`GuestMemory`] it came from.
#[derive(Clone, Copy, Debug)]
pub struct HostRange {
    /// First byte, in our address space.
    pub ptr: *mut u8,
    /// Bytes.
    pub len: usize,
    /// Guest-physical address of the first byte, for the dirty log.
    pub guest: u64,
}

// SAFETY: an address and a length; whoever uses them does so by volatile or atomic operations, on any thread.
unsafe impl Send for HostRange {}
// SAFETY: as above.
unsafe impl Sync for HostRange {}

/// A guest's memory: a table of mapped regions. Changing it means building another one.
pub struct GuestMemory {
    regions: Vec<Region>,
    gone: Arc<AtomicBool>,
    _mapping: Box<dyn Any + Send + Sync>,
}

// SAFETY: the pointers are into shared memory that `_mapping` keeps mapped; all access goes through volatile or atomic
// operations, which any thread may do.
unsafe impl Send for GuestMemory {}
// SAFETY: as above; the table itself never changes.
unsafe impl Sync for GuestMemory {}

impl GuestMemory {
    /// Builds the table.
    ///
    /// # Safety
    /// Each region's `size` bytes at `host` stay mapped readable and writable for as long as `mapping` is not dropped, and
    /// no Rust reference to them is made elsewhere.
    ///
    /// # Errors
    /// Regions that are empty, wrap or overlap.
    pub unsafe fn new(
        mut regions: Vec<Region>,
        mapping: Box<dyn Any + Send + Sync>,
    ) -> Result<Self, RegionError> {
        for r in &regions {
            let wraps = r.guest.checked_add(r.size).is_none() || r.user.checked_add(r.size).is_none();
            if r.size == 0 || wraps {
                return Err(RegionError::Impossible { guest: r.guest, size: r.size });
            }
        }
        regions.sort_by_key(|r| r.guest);
        for pair in regions.windows(2) {
            if let [a, b] = pair
                && a.guest + a.size > b.guest
            {
                return Err(RegionError::Overlap(a.guest, b.guest));
            }
        }
        Ok(Self { regions, gone: Arc::default(), _mapping: mapping })
    }

    /// With the flag that a fault handler sets when the owner of the memory took it away.
    pub fn with_gone(mut self, gone: Arc<AtomicBool>) -> Self {
        self.gone = gone;
        self
    }

    /// Whether the owner took the memory away (zeros lie there now): the port that works on it stops.
    #[inline(always)]
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    /// The regions, by guest address.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The region that `hot` remembers, or an empty one: for loops that translate many addresses of the same region.
    #[inline(always)]
    pub fn region_near(&self, hot: usize) -> Region {
        const NONE: Region = Region { guest: 0, user: 0, size: 0, host: std::ptr::null_mut() };
        self.regions.get(hot).copied().unwrap_or(NONE)
    }

    /// Where `len` bytes at guest-physical `addr` are, if they all lie in one region. `hot` remembers the region that
    /// matched last: descriptors of one ring tend to stay in one.
    #[inline(always)]
    pub fn translate(&self, hot: &mut usize, addr: u64, len: u32) -> Option<*mut u8> {
        self.region_near(*hot).translate(addr, len).or_else(|| self.search(hot, addr, len))
    }

    #[cold]
    #[inline(never)]
    fn search(&self, hot: &mut usize, addr: u64, len: u32) -> Option<*mut u8> {
        let (i, at) =
            self.regions.iter().enumerate().find_map(|(i, r)| Some((i, r.translate(addr, len)?)))?;
        *hot = i;
        Some(at)
    }

    /// The range of `len` bytes at the front end's address `user` (ring addresses), if it lies in one region.
    pub fn user_range(&self, user: u64, len: usize) -> Option<HostRange> {
        self.regions.iter().find_map(|r| {
            let offset = user.wrapping_sub(r.user);
            (offset < r.size && r.size - offset >= len as u64).then(|| HostRange {
                ptr: r.host.wrapping_add(offset as usize),
                len,
                guest: r.guest + offset,
            })
        })
    }

    /// The region that holds our address `ptr`, for a fault handler that wants to know whose memory it was.
    pub fn region_of_host(&self, ptr: *const u8) -> Option<&Region> {
        self.regions.iter().find(|r| (ptr as u64).wrapping_sub(r.host as u64) < r.size)
    }
}
