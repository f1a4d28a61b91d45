//! Memory to share with another process: a memory file, huge pages where there are any, bound to a node, all there.
//!
//! Every page is present before [`SharedMemory::new`] returns and the file is sealed against shrinking, so that no later
//! access fails for want of memory (a peer that punches holes into the file remains; [`crate::fault`] is for that). Never
//! hands out a reference to the bytes: the other process may change them.

mod own;

use std::fmt;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use std::ptr::NonNull;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use crate::topology::{self, HugePool};
pub use own::OwnMemory;

/// Bytes that are worth a thread of their own to make present (some 6 ms of work), and the most threads that share it.
const POPULATE_EACH: usize = 64 << 20;
const POPULATE_THREADS: usize = 16;
/// What the kernel joins ordinary pages to, where it can.
const JOINED: usize = 2 << 20;

/// Which pages memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// Asked for: pages of 2 MiB where enough are free, else ordinary ones. Never what one gets.
    Auto,
    /// Huge pages of 2 MiB.
    Huge2M,
    /// Huge pages of 1 GiB.
    Huge1G,
    /// Pages of 4 KiB, which the kernel may join behind the scenes.
    Ordinary,
}

impl Pages {
    /// Bytes of a page; `Auto` counts as ordinary.
    pub fn size(self) -> usize {
        match self {
            Pages::Auto | Pages::Ordinary => 4 << 10,
            Pages::Huge2M => 2 << 20,
            Pages::Huge1G => 1 << 30,
        }
    }
}

impl fmt::Display for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Pages::Auto => "2 MiB huge pages or ordinary pages",
            Pages::Huge2M => "2 MiB huge pages",
            Pages::Huge1G => "1 GiB huge pages",
            Pages::Ordinary => "ordinary 4 KiB pages",
        })
    }
}

/// Why memory could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Zero bytes, or more than there are addresses.
    #[error("cannot share {0} bytes of memory")]
    Size(usize),
    /// Fewer huge pages are free than needed.
    #[error("needs {}", shortage(*needed, *page_size, *node, *total, *free))]
    HugePages {
        /// Pages needed.
        needed: u64,
        /// Bytes of a page.
        page_size: u64,
        /// On which node, if that mattered.
        node: Option<u32>,
        /// Pages set aside there.
        total: u64,
        /// Of these, free.
        free: u64,
    },
    /// Less ordinary memory is available than needed.
    #[error(
        "needs {} MiB of memory{}, {} MiB are available; ask for less, or end something else",
        .needed >> 20, .node.map_or_else(String::new, |node| format!(" on node {node}")), .available >> 20
    )]
    Ordinary {
        /// On which node, if that mattered.
        node: Option<u32>,
        /// Bytes needed.
        needed: u64,
        /// Bytes that the kernel says can be had without swapping.
        available: u64,
    },
    /// The process may not lock that much.
    #[error(
        "cannot lock {} MiB of memory ({source}); the limit is {} MiB: ulimit -l unlimited, or LimitMEMLOCK=infinity in the \
         service's unit",
        .needed >> 20, .limit >> 20
    )]
    Lock {
        /// Bytes to lock.
        needed: u64,
        /// RLIMIT_MEMLOCK, bytes.
        limit: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel refused a step.
    #[error("{doing} ({size} bytes): {source}{hint}")]
    Kernel {
        /// What was being done.
        doing: &'static str,
        /// Bytes.
        size: usize,
        /// What the kernel said.
        source: io::Error,
        /// What may help, beginning with "; ", or nothing.
        hint: &'static str,
    },
}

fn shortage(needed: u64, page_size: u64, node: Option<u32>, total: u64, free: u64) -> String {
    let kib = page_size / 1024;
    let (place, file) = match node {
        Some(n) => (
            format!(" on node {n}"),
            format!("/sys/devices/system/node/node{n}/hugepages/hugepages-{kib}kB/nr_hugepages"),
        ),
        None => (String::new(), format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages")),
    };
    let more = total.saturating_add(needed.saturating_sub(free));
    let mib = page_size >> 20;
    format!("{needed} huge pages of {mib} MiB{place}, {free} are free: echo {more} > {file}")
}

/// Shared memory of this process, unmapped when dropped.
pub struct SharedMemory {
    file: File,
    start: NonNull<u8>,
    len: usize,
    pages: Pages,
}

// SAFETY: the mapping belongs to no thread; access to it is through raw pointers, whose users answer for it.
unsafe impl Send for SharedMemory {}
// SAFETY: as above; `&SharedMemory` gives nothing but addresses and the file.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// At least `size` bytes (rounded up to whole pages), all zero and all present, on memory node `node` if one is given.
    ///
    /// # Errors
    /// There is too little memory of that kind, with figures; or the kernel refuses a step.
    pub fn new(size: usize, pages: Pages, node: Option<u32>) -> Result<Self, MemoryError> {
        match pages {
            Pages::Auto => {
                // Another process may take the pages between the count and the mapping: then it is ordinary ones.
                Self::with_pages(size, Pages::Huge2M, node)
                    .or_else(|_| Self::with_pages(size, Pages::Ordinary, node))
            }
            _ => Self::with_pages(size, pages, node),
        }
    }

    fn with_pages(size: usize, pages: Pages, node: Option<u32>) -> Result<Self, MemoryError> {
        let len = size.checked_next_multiple_of(pages.size()).filter(|&len| isize::try_from(len).is_ok());
        let len = len.and_then(NonZeroUsize::new).ok_or(MemoryError::Size(size))?;
        check_available(len.get(), pages, node)?;

        let kernel = |doing, hint| {
            move |e: nix::Error| MemoryError::Kernel { doing, size: len.get(), source: e.into(), hint }
        };
        let huge = match pages {
            Pages::Huge2M => MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB,
            Pages::Huge1G => MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_1GB,
            Pages::Ordinary | Pages::Auto => MFdFlags::empty(),
        };
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING | huge;
        let file = memfd_create(c"cableway", flags).map_err(kernel("cannot create a memory file", ""))?;
        let file = File::from(file);
        file.set_len(len.get() as u64).map_err(|source| MemoryError::Kernel {
            doing: "cannot size a memory file",
            size: len.get(),
            source,
            hint: "",
        })?;
        // The peer gets this file too, and must not be able to take the memory away from under us.
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL))
            .map_err(kernel("cannot seal a memory file", ""))?;

        let start = map(Some(&file), len, pages).map_err(kernel("cannot map shared memory", HUGE_HINT))?;
        // From here on, dropping `memory` unmaps it.
        let memory = Self { file, start, len: len.get(), pages };
        if let Some(node) = node {
            bind(memory.start, memory.len, node)
                .map_err(kernel("cannot bind memory to its node", NODE_HINT))?;
        }
        memory.advise(libc::MADV_DONTDUMP).map_err(kernel("cannot keep memory out of core dumps", ""))?;
        if pages == Pages::Ordinary {
            // A kernel without transparent huge pages says no, and nothing is lost.
            let _ = memory.advise(libc::MADV_HUGEPAGE);
        }
        memory.populate().map_err(kernel("cannot fill shared memory", POPULATE_HINT))?;
        Ok(memory)
    }

    /// Makes every page present.
    fn populate(&self) -> nix::Result<()> {
        in_shares(self.len, self.pages.size(), |from, to| {
            let from = if self.pages == Pages::Ordinary { self.join(from, to)? } else { from };
            if from == to { Ok(()) } else { self.advise_part(from, to - from, libc::MADV_POPULATE_WRITE) }
        })
    }

    /// Makes memory present in joined pages, also where the kernel is not set to join those of files by itself (it is not by
    /// default). A virtual machine enters each page for itself at its first access, which is one exit then instead of 512. Returns
    /// how far it came: where one cannot be had, others are not asked for, which could take long.
    fn join(&self, from: usize, to: usize) -> nix::Result<usize> {
        for at in (from..to).step_by(JOINED) {
            if to - at < JOINED {
                return Ok(at);
            }
            // The kernel joins what has a page at least, and fills the rest with zeros.
            self.advise_part(at, self.pages.size(), libc::MADV_POPULATE_WRITE)?;
            if self.advise_part(at, JOINED, libc::MADV_COLLAPSE).is_err() {
                return Ok(at);
            }
        }
        Ok(to)
    }

    /// Locks every page in memory: none is swapped out or moved to another place to be compacted.
    ///
    /// # Errors
    /// The process may lock less than this; the message says how to allow it.
    pub fn lock(&self) -> Result<(), MemoryError> {
        lock(self.start, self.len)
    }

    fn advise(&self, advice: libc::c_int) -> nix::Result<()> {
        self.advise_part(0, self.len, advice)
    }

    fn advise_part(&self, from: usize, len: usize, advice: libc::c_int) -> nix::Result<()> {
        debug_assert!(from <= self.len && len <= self.len - from);
        advise(self.start, from, len, advice)
    }

    /// The first byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Bytes mapped: what was asked for, rounded up to whole pages.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never: memory of no bytes is refused.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Which pages it got; never [`Pages::Auto`].
    pub fn pages(&self) -> Pages {
        self.pages
    }

    /// The file to pass to the peer, who maps [`Self::len`] bytes from offset 0.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `new` made; whoever uses its addresses keeps `self` alive.
        // It cannot fail for a whole mapping of our own, and there is nothing that could be done if it did.
        let _ = unsafe { munmap(self.start.cast(), self.len) };
    }
}

impl fmt::Debug for SharedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes of {} at {:p} (file {})", self.len, self.pages, self.start, self.file.as_raw_fd())
    }
}

/// Confines the pages of a mapping to `node` (mbind(2), MPOL_BIND).
fn bind(start: NonNull<u8>, len: usize, node: u32) -> nix::Result<()> {
    let mut mask = [0u64; 16];
    let word = mask.get_mut(node as usize / 64).ok_or(nix::Error::EINVAL)?;
    *word = 1 << (node % 64);
    let bits = mask.len() * 64;
    // SAFETY: a mapping of the caller; where its pages lie does not change what they hold. The kernel reads `bits` bits of the
    // mask, one less than it is told.
    let result = unsafe {
        libc::syscall(libc::SYS_mbind, start.as_ptr(), len, libc::MPOL_BIND, mask.as_ptr(), bits + 1, 0)
    };
    nix::Error::result(result).map(drop)
}

/// Locks a mapping in memory.
fn lock(start: NonNull<u8>, len: usize) -> Result<(), MemoryError> {
    // SAFETY: the range is a mapping of the caller; locking does not change what it holds.
    let result = unsafe { libc::mlock(start.as_ptr().cast(), len) };
    nix::Error::result(result).map(drop).map_err(|error| MemoryError::Lock {
        needed: len as u64,
        limit: nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_MEMLOCK)
            .map_or(0, |(soft, _)| soft),
        source: error.into(),
    })
}

/// Advises the kernel of a part of a mapping.
fn advise(start: NonNull<u8>, from: usize, len: usize, advice: libc::c_int) -> nix::Result<()> {
    // SAFETY: the range lies in a mapping of the caller, and none of the advice used here changes what it holds.
    let result = unsafe { libc::madvise(start.as_ptr().add(from).cast(), len, advice) };
    nix::Error::result(result).map(drop)
}

/// Has `len` bytes made present by several threads, each from and to where it is told. Zeroing pages takes about 0.1 s a GiB on one
/// core, so that large memory is shared out.
fn in_shares(
    len: usize,
    page: usize,
    make_present: impl Fn(usize, usize) -> nix::Result<()> + Sync,
) -> nix::Result<()> {
    let permitted = topology::permitted_cores().map_or(1, |cores| cores.len());
    let threads = permitted.min(len / POPULATE_EACH).clamp(1, POPULATE_THREADS);
    let share = (len / threads).next_multiple_of(page.max(JOINED));
    let make_present = &make_present;
    std::thread::scope(|scope| {
        let shares: Vec<_> = (0..len)
            .step_by(share)
            .map(|from| scope.spawn(move || make_present(from, len.min(from + share))))
            .collect();
        shares.into_iter().try_for_each(|thread| thread.join().unwrap_or(Err(nix::Error::EINTR)))
    })
}

/// Maps `len` bytes of `file`, or of none; where ordinary pages are to be joined, at a multiple of what they become.
fn map(file: Option<&File>, len: NonZeroUsize, pages: Pages) -> nix::Result<NonNull<u8>> {
    let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: at an address of the kernel's choice it touches no memory that is in use; the only other one is in the mapping of
    // addresses that is made below and that nobody knows.
    let at = |address: Option<NonZeroUsize>| unsafe {
        let fixed = if address.is_some() { MapFlags::MAP_FIXED } else { MapFlags::empty() };
        match file {
            Some(file) => mmap(address, len, access, MapFlags::MAP_SHARED | fixed, file, 0),
            None => mmap_anonymous(address, len, access, MapFlags::MAP_PRIVATE | fixed),
        }
    };
    let joins = pages == Pages::Ordinary && len.get() >= JOINED;
    let room = len.checked_add(JOINED).filter(|_| joins);
    let Some(room) = room else {
        return Ok(at(None)?.cast());
    };
    // SAFETY: a new mapping; these are addresses only.
    let whole = unsafe {
        mmap_anonymous(None, room, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE)
    }?;
    let before = whole.as_ptr().align_offset(JOINED);
    let start = whole.map_addr(|address| address.saturating_add(before));
    let mapped = at(Some(start.addr()));
    let parts = match mapped {
        Ok(_) => [
            (whole, before),
            (start.map_addr(|at| at.saturating_add(len.get())), room.get() - before - len.get()),
        ],
        Err(_) => [(whole, room.get()), (whole, 0)],
    };
    for (part, size) in parts.into_iter().filter(|(_, size)| *size > 0) {
        // SAFETY: what is left of that mapping, in whole pages.
        let _ = unsafe { munmap(part, size) };
    }
    mapped.map(NonNull::cast)
}

const HUGE_HINT: &str = "; huge pages may be reserved by other processes (HugePages_Rsvd in /proc/meminfo)";
const NODE_HINT: &str = "; the nodes of this machine: ls -d /sys/devices/system/node/node*";
const POPULATE_HINT: &str = "; the memory ran out meanwhile, or a cgroup limit (memory.max, hugetlb.*.max) is too low; \
                             Invalid argument means a kernel older than 5.14";

/// Refuses what cannot be had, with figures, before the kernel ends a process over it.
///
/// # Errors
/// There is too little memory of that kind; [`Pages::Auto`] counts as ordinary pages here.
pub fn check_available(len: usize, pages: Pages, node: Option<u32>) -> Result<(), MemoryError> {
    let (len, page_size) = (len as u64, pages.size() as u64);
    if matches!(pages, Pages::Ordinary | Pages::Auto) {
        let on_node = node.and_then(available_on).map(|available| (node, available));
        let all = available_memory().map(|available| (None, available));
        let short = all.into_iter().chain(on_node).find(|(_, available)| *available < len);
        return match short {
            Some((node, available)) => Err(MemoryError::Ordinary { node, needed: len, available }),
            None => Ok(()),
        };
    }
    let needed = len / page_size;
    let (total, free) = count_huge(&topology::huge_pools(Path::new("/")), page_size, node);
    if free < needed {
        return Err(MemoryError::HugePages { needed, page_size, node, total, free });
    }
    Ok(())
}

/// Pages of `page_size` bytes, in all and free, on `node` or anywhere.
fn count_huge(pools: &[HugePool], page_size: u64, node: Option<u32>) -> (u64, u64) {
    let fits = |p: &&HugePool| p.page_size == page_size && node.is_none_or(|n| n == p.node);
    pools.iter().filter(fits).fold((0, 0), |(total, free), p| (total + p.total, free + p.free))
}

/// Bytes that can be had without swapping (`MemAvailable`), where the kernel says so.
fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Bytes that can be had on a memory node: free, or held by files and by what the kernel can give up.
fn available_on(node: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/sys/devices/system/node/node{node}/meminfo")).ok()?;
    available_of_node(&text)
}

/// The same from that file's text.
fn available_of_node(text: &str) -> Option<u64> {
    // Lines like `Node 0 MemFree:  1024 kB`.
    let figure = |name: &str| {
        let value = text.lines().find_map(|line| line.split_once(name))?.1;
        value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    };
    let more = ["Active(file):", " Inactive(file):", "SReclaimable:"];
    let more: u64 = more.into_iter().filter_map(figure).sum();
    figure("MemFree:")?.checked_add(more)
}

#[cfg(test)]
mod tests;
