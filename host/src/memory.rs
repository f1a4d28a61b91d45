//! Memory to share with another process: a memory file, huge pages where there are any, bound to a node, all there.
//!
//! Every page is present before [`SharedMemory::new`] returns and the file is sealed against shrinking, so that no later
//! access fails for want of memory (a peer that punches holes into the file remains; [`crate::fault`] is for that). Never
//! hands out a reference to the bytes: the other process may change them.

use std::fmt;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use std::ptr::NonNull;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::topology::{self, HugePool};

/// Bytes that are worth a thread of their own to make present, and the most threads that share the work.
const POPULATE_EACH: usize = 256 << 20;
const POPULATE_THREADS: usize = 16;

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
    #[error("needs {} MiB of memory, {} MiB are available; ask for less, or end something else", .needed >> 20, .available >> 20)]
    Ordinary {
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

        // SAFETY: a new mapping at an address of the kernel's choice; it touches no memory that is in use.
        let start = unsafe {
            mmap(None, len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, &file, 0)
        }
        .map_err(kernel("cannot map shared memory", HUGE_HINT))?;
        // From here on, dropping `memory` unmaps it.
        let memory = Self { file, start: start.cast(), len: len.get(), pages };
        if let Some(node) = node {
            memory.bind(node).map_err(kernel("cannot bind memory to its node", NODE_HINT))?;
        }
        memory.advise(libc::MADV_DONTDUMP).map_err(kernel("cannot keep memory out of core dumps", ""))?;
        if pages == Pages::Ordinary {
            // A kernel without transparent huge pages says no, and nothing is lost.
            let _ = memory.advise(libc::MADV_HUGEPAGE);
        }
        memory.populate().map_err(kernel("cannot fill shared memory", POPULATE_HINT))?;
        Ok(memory)
    }

    /// Makes every page present. Zeroing pages takes about 0.1 s a GiB on one core, so that large memory is shared out.
    fn populate(&self) -> nix::Result<()> {
        let permitted = topology::permitted_cores().map_or(1, |cores| cores.len());
        let threads = permitted.min(self.len / POPULATE_EACH).clamp(1, POPULATE_THREADS);
        let share = (self.len / threads).next_multiple_of(self.pages.size());
        std::thread::scope(|scope| {
            let shares: Vec<_> = (0..self.len)
                .step_by(share)
                .map(|from| {
                    let len = share.min(self.len - from);
                    scope.spawn(move || self.advise_part(from, len, libc::MADV_POPULATE_WRITE))
                })
                .collect();
            shares.into_iter().try_for_each(|thread| thread.join().unwrap_or(Err(nix::Error::EINTR)))
        })
    }

    /// Locks every page in memory: none is swapped out or moved to another place to be compacted.
    ///
    /// # Errors
    /// The process may lock less than this; the message says how to allow it.
    pub fn lock(&self) -> Result<(), MemoryError> {
        // SAFETY: the range is this mapping; locking does not change what it holds.
        let result = unsafe { libc::mlock(self.start.as_ptr().cast(), self.len) };
        nix::Error::result(result).map(drop).map_err(|error| MemoryError::Lock {
            needed: self.len as u64,
            limit: nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_MEMLOCK)
                .map_or(0, |(soft, _)| soft),
            source: error.into(),
        })
    }

    /// Confines the pages to `node` (mbind(2), MPOL_BIND).
    fn bind(&self, node: u32) -> nix::Result<()> {
        let mut mask = [0u64; 16];
        let word = mask.get_mut(node as usize / 64).ok_or(nix::Error::EINVAL)?;
        *word = 1 << (node % 64);
        let bits = mask.len() * 64;
        // SAFETY: the range is this mapping; the kernel reads `bits` bits of the mask.
        let result = unsafe {
            // The kernel reads one bit less than it is told.
            libc::syscall(
                libc::SYS_mbind,
                self.start.as_ptr(),
                self.len,
                libc::MPOL_BIND,
                mask.as_ptr(),
                bits + 1,
                0,
            )
        };
        nix::Error::result(result).map(drop)
    }

    fn advise(&self, advice: libc::c_int) -> nix::Result<()> {
        self.advise_part(0, self.len, advice)
    }

    fn advise_part(&self, from: usize, len: usize, advice: libc::c_int) -> nix::Result<()> {
        debug_assert!(from <= self.len && len <= self.len - from);
        // SAFETY: the range lies in this mapping, and none of the advice used here changes what it holds.
        let result = unsafe { libc::madvise(self.start.as_ptr().add(from).cast(), len, advice) };
        nix::Error::result(result).map(drop)
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
        let available = available_memory();
        return match available {
            Some(available) if available < len => Err(MemoryError::Ordinary { needed: len, available }),
            _ => Ok(()),
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

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::mman::mmap as map_file;

    fn free_2m() -> u64 {
        count_huge(&topology::huge_pools(Path::new("/")), 2 << 20, None).1
    }

    /// Whether all of the mapping is in memory.
    fn present(memory: &SharedMemory) -> bool {
        let mut map = vec![0u8; memory.len() / 4096];
        // SAFETY: the kernel writes a byte for each page of the range to `map`.
        let r = unsafe { libc::mincore(memory.as_ptr().cast(), memory.len(), map.as_mut_ptr()) };
        r == 0 && map.iter().all(|b| b & 1 == 1)
    }

    #[test]
    fn ordinary_memory_is_rounded_up_present_and_shared_through_its_file() {
        let memory = SharedMemory::new(1_000_001, Pages::Ordinary, None).unwrap();
        assert_eq!((memory.len(), memory.pages()), (1_003_520, Pages::Ordinary));
        assert!(present(&memory));
        let len = NonZeroUsize::new(memory.len()).unwrap();
        // SAFETY: a new mapping, used below through raw pointers only.
        let peer =
            unsafe { map_file(None, len, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, memory.file(), 0) };
        let peer = peer.unwrap().cast::<u8>();
        // SAFETY: both mappings have `len` bytes.
        unsafe {
            memory.as_ptr().add(1_000_000).write_volatile(42);
            assert_eq!(peer.add(1_000_000).read_volatile(), 42);
            munmap(peer.cast(), len.get()).unwrap();
        }
    }

    #[test]
    fn a_peer_cannot_shrink_the_file_nor_seal_it_further() {
        let memory = SharedMemory::new(8192, Pages::Ordinary, None).unwrap();
        let peers = File::from(memory.file().try_clone_to_owned().unwrap());
        assert_eq!(peers.set_len(0).unwrap_err().raw_os_error(), Some(libc::EPERM));
        assert!(fcntl(&peers, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_FUTURE_WRITE)).is_err());
    }

    #[test]
    fn memory_that_several_threads_fill_is_all_there_and_can_be_locked() {
        let memory = SharedMemory::new(2 * POPULATE_EACH + 4096, Pages::Ordinary, None).unwrap();
        assert!(present(&memory));
        let locked = || -> u64 {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = status.lines().find_map(|l| l.strip_prefix("VmLck:")).unwrap();
            line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
        };
        match memory.lock() {
            Ok(()) => assert!(locked() >= memory.len() as u64),
            Err(error) => assert!(error.to_string().contains("ulimit -l"), "{error}"),
        }
    }

    #[test]
    fn memory_on_node_0_lies_there() {
        let memory = SharedMemory::new(1 << 20, Pages::Ordinary, Some(0)).unwrap();
        let maps = std::fs::read_to_string("/proc/self/numa_maps").unwrap();
        let address = format!("{:x} ", memory.as_ptr() as usize);
        let line = maps.lines().find(|l| l.starts_with(&address)).expect("the mapping is listed");
        assert!(line.contains("bind:0") && line.contains("N0="), "{line}");
    }

    #[test]
    fn a_node_that_does_not_exist_is_refused() {
        let text = SharedMemory::new(4096, Pages::Ordinary, Some(1023)).unwrap_err().to_string();
        assert!(text.contains("ls -d /sys/devices/system/node/node*"), "{text}");
        assert!(SharedMemory::new(4096, Pages::Ordinary, Some(u32::MAX)).is_err());
    }

    #[test]
    fn auto_takes_huge_pages_where_there_are_free_ones() {
        let before = free_2m();
        let memory = SharedMemory::new(3 << 20, Pages::Auto, None).unwrap();
        if memory.pages() == Pages::Huge2M {
            assert_eq!(memory.len(), 4 << 20);
            let pages = count_huge(&topology::huge_pools(Path::new("/")), 2 << 20, None);
            assert!(pages.0 - pages.1 >= 2, "two are in use: {pages:?}");
        } else {
            assert!(before < 2, "{before} huge pages were free");
            assert_eq!(memory.len(), 3 << 20);
        }
    }

    #[test]
    fn too_few_huge_pages_are_refused_with_figures_and_the_command() {
        let error = SharedMemory::new(1 << 50, Pages::Huge2M, None).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, MemoryError::HugePages { needed: 536_870_912, .. }), "{text}");
        assert_eq!(
            shortage(64, 2 << 20, Some(0), 20, 12),
            "64 huge pages of 2 MiB on node 0, 12 are free: echo 72 > \
             /sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages"
        );
        let auto = SharedMemory::new(1 << 50, Pages::Auto, None).unwrap_err().to_string();
        assert!(auto.starts_with("needs 1073741824 MiB of memory, "), "{auto}");
    }

    #[test]
    fn sizes_that_make_no_sense_are_refused() {
        assert!(matches!(SharedMemory::new(0, Pages::Auto, None), Err(MemoryError::Size(0))));
        assert!(matches!(SharedMemory::new(usize::MAX, Pages::Ordinary, None), Err(MemoryError::Size(_))));
    }
}
