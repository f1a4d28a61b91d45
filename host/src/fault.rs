//! What happens when memory that a peer shares with us goes away under our hands (DESIGN.md, ring rule 3).
//!
//! A guest's front end can truncate its memory file after we mapped it; the next access raises SIGBUS here. The handler
//! maps zero pages over the whole mapping and sets its flag, and the access is repeated: whoever polls that port sees the
//! flag at its next burst and stops it. Addresses that are not ours go to the handler that was there before.
//!
//! The handler is async-signal-safe: it reads a fixed table of atomics and calls mmap(2), nothing else.

use std::cell::UnsafeCell;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Once};

/// Mappings that can be watched at once: 128 ports with 32 each.
const SLOTS: usize = 4096;

/// Why a mapping cannot be watched.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WatchError {
    /// All slots are taken.
    #[error(
        "more than {SLOTS} shared mappings at once; close some ports, or let their front ends share fewer regions"
    )]
    TableFull,
    /// The range is no mapping.
    #[error("{len} bytes at {start:#x} are not a mapping of whole pages")]
    Range {
        /// First address.
        start: usize,
        /// Bytes.
        len: usize,
    },
    /// The kernel does not say what kind of file it is.
    #[error("cannot ask for the page size of a memory file: {0}")]
    File(nix::Error),
    /// The handler could not be installed.
    #[error("cannot handle SIGBUS: {0}")]
    Handler(nix::Error),
}

/// No mapping.
const FREE: u32 = 0;
/// Being filled in by [`watch`].
const CLAIMED: u32 = 1;
/// Watched.
const WATCHED: u32 = 2;
/// A handler is replacing the mapping.
const REPLACING: u32 = 3;
/// Zero pages lie there now.
const REPLACED: u32 = 4;

/// One watched mapping. `start`, `end` and `broken` are only meaningful in the states from `WATCHED` on, and only change
/// before them.
struct Slot {
    state: AtomicU32,
    start: AtomicUsize,
    end: AtomicUsize,
    broken: AtomicPtr<AtomicBool>,
}

impl Slot {
    const fn empty() -> Self {
        Self {
            state: AtomicU32::new(FREE),
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            broken: AtomicPtr::new(null_mut()),
        }
    }

    fn holds(&self, address: usize) -> bool {
        (self.start.load(Ordering::Relaxed)..self.end.load(Ordering::Relaxed)).contains(&address)
    }
}

static TABLE: [Slot; SLOTS] = [const { Slot::empty() }; SLOTS];

/// A mapping that is being watched, until this is dropped. Drop it before the mapping is unmapped.
#[must_use = "a mapping is watched only as long as this lives"]
pub struct Watch {
    slot: &'static Slot,
    /// Keeps alive what the slot points to.
    _broken: Arc<AtomicBool>,
}

/// Watches `len` bytes at `start`, a mapping of `file`: should the file lose pages, `broken` becomes true and zero pages
/// take the place of the whole mapping. The file's page size decides where a mapping of huge pages really ends.
///
/// # Safety
/// `start` and `len` are what mmap(2) returned and was given for a mapping of `file` that is readable and writable, belongs to
/// the caller, and stays until the returned [`Watch`] is dropped. What lies there may turn into zeros at any time: no
/// reference to it exists.
///
/// # Errors
/// No slot is free; the range or the file makes no sense; the kernel refuses the handler.
pub unsafe fn watch(
    file: BorrowedFd<'_>,
    start: *mut u8,
    len: usize,
    broken: Arc<AtomicBool>,
) -> Result<Watch, WatchError> {
    let begin = start as usize;
    let page = page_size(file)?;
    let end = len.checked_next_multiple_of(page).and_then(|len| begin.checked_add(len));
    let end = end.filter(|_| len > 0 && begin > 0 && begin.is_multiple_of(page));
    let end = end.ok_or(WatchError::Range { start: begin, len })?;
    install()?;

    let claim =
        |s: &&Slot| s.state.compare_exchange(FREE, CLAIMED, Ordering::Acquire, Ordering::Relaxed).is_ok();
    let slot = TABLE.iter().find(claim).ok_or(WatchError::TableFull)?;
    slot.start.store(begin, Ordering::Relaxed);
    slot.end.store(end, Ordering::Relaxed);
    slot.broken.store(Arc::as_ptr(&broken).cast_mut(), Ordering::Relaxed);
    slot.state.store(WATCHED, Ordering::Release);
    Ok(Watch { slot, _broken: broken })
}

/// The page size of a mapping of `file`: huge pages on hugetlbfs, else ordinary ones.
fn page_size(file: BorrowedFd<'_>) -> Result<usize, WatchError> {
    let fs = nix::sys::statfs::fstatfs(file).map_err(WatchError::File)?;
    if fs.filesystem_type() == nix::sys::statfs::HUGETLBFS_MAGIC {
        return usize::try_from(fs.block_size())
            .ok()
            .filter(|&s| s > 0)
            .ok_or(WatchError::File(nix::Error::EINVAL));
    }
    Ok(4096)
}

impl Drop for Watch {
    fn drop(&mut self) {
        // A handler that is at work on another thread is waited for: it is one system call away from done, and after us
        // the range may be anybody's.
        loop {
            let state = self.slot.state.load(Ordering::Relaxed);
            let free = || self.slot.state.compare_exchange(state, FREE, Ordering::AcqRel, Ordering::Relaxed);
            if state != REPLACING && free().is_ok() {
                return;
            }
            std::thread::yield_now();
        }
    }
}

/// The handler that was there before ours. Written once, before ours is installed.
struct Previous(UnsafeCell<MaybeUninit<libc::sigaction>>);

// SAFETY: written once under `INSTALL`, before the handler that reads it can run; never again.
unsafe impl Sync for Previous {}

static PREVIOUS: Previous = Previous(UnsafeCell::new(MaybeUninit::uninit()));

fn install() -> Result<(), WatchError> {
    static INSTALL: Once = Once::new();
    static FAILED: AtomicU32 = AtomicU32::new(0);
    INSTALL.call_once(|| {
        // SAFETY: `PREVIOUS` is written here only, and read by the handler only, which does not exist yet. The action is
        // all zeros but for what is set: a handler of the three-argument form, with every signal blocked while it runs,
        // on the alternate stack where a thread has one (Rust's own handler for stack overflows needs it).
        let result = unsafe {
            let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
            action.sa_sigaction = on_sigbus as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
            libc::sigfillset(&mut action.sa_mask);
            match libc::sigaction(libc::SIGBUS, null(), (*PREVIOUS.0.get()).as_mut_ptr()) {
                0 => libc::sigaction(libc::SIGBUS, &action, null_mut()),
                failed => failed,
            }
        };
        if let Err(e) = nix::Error::result(result) {
            FAILED.store(e as u32, Ordering::Relaxed);
        }
    });
    match FAILED.load(Ordering::Relaxed) {
        0 => Ok(()),
        e => Err(WatchError::Handler(nix::Error::from_raw(e.cast_signed()))),
    }
}

/// # Safety
/// Called by the kernel, as the handler of SIGBUS.
unsafe extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: errno is this thread's own; the interrupted code must find it as it was.
    let errno = unsafe { *libc::__errno_location() };
    // SAFETY: the kernel passes a valid siginfo.
    let code = unsafe { (*info).si_code };
    // Only these two say that a page is gone, with its address; anything that a process sent has a code of 0 or less.
    let page_is_gone = code == BUS_ADRERR || code == BUS_MCEERR_AR;
    // SAFETY: for these codes the kernel fills in the address.
    let ours = page_is_gone && replace(unsafe { (*info).si_addr() } as usize, code == BUS_MCEERR_AR);
    if !ours {
        // SAFETY: `install` wrote it before this handler could be called.
        let previous = unsafe { &*(*PREVIOUS.0.get()).as_ptr() };
        // SAFETY: the arguments are the kernel's.
        unsafe { hand_on(previous, signal, info, context, code > 0) };
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// The page does not exist (any more). The libc crate has these two not for every target.
const BUS_ADRERR: libc::c_int = 2;
/// The memory is broken, and this access needed it.
const BUS_MCEERR_AR: libc::c_int = 4;

/// Puts zero pages in place of the watched mapping that holds `address`. False if there is none, or if it failed.
fn replace(address: usize, again: bool) -> bool {
    for slot in &TABLE {
        let state = slot.state.load(Ordering::Acquire);
        if state < WATCHED || !slot.holds(address) {
            continue;
        }
        if state == REPLACING || (state == REPLACED && !again) {
            // Another thread met the same hole first. Repeat the access: by then there is a page, or we come back here.
            return true;
        }
        if slot.state.compare_exchange(state, REPLACING, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            return true; // another thread was quicker: as above
        }
        // The slot cannot be freed now. It may have been freed and filled again since we looked, so look again.
        if !slot.holds(address) {
            slot.state.store(state, Ordering::Release);
            continue;
        }
        let (start, end) = (slot.start.load(Ordering::Relaxed), slot.end.load(Ordering::Relaxed));
        // SAFETY: `watch`'s caller answers for the range being one whole mapping of its own, and it is not given back
        // while the slot is in this state (`Watch::drop`).
        let mapped = unsafe {
            let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            libc::mmap(start as *mut _, end - start, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        let replaced = mapped != libc::MAP_FAILED;
        if replaced {
            // SAFETY: the `Watch` keeps the flag alive, and cannot be dropped in this state.
            unsafe { &*slot.broken.load(Ordering::Relaxed) }.store(true, Ordering::Release);
        }
        slot.state.store(if replaced { REPLACED } else { state }, Ordering::Release);
        return replaced;
    }
    false
}

/// Does what would have happened without us.
///
/// # Safety
/// Called in the handler, with its arguments and the action that was installed before it.
unsafe fn hand_on(
    previous: &libc::sigaction,
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
    from_the_kernel: bool,
) {
    match previous.sa_sigaction {
        libc::SIG_IGN if !from_the_kernel => {}
        // A fault cannot be ignored: the kernel would end the process, and so do we.
        libc::SIG_DFL | libc::SIG_IGN => {
            // SAFETY: the default action is back, and takes effect when the faulting access is repeated after our
            // return; a signal that somebody sent is sent once more.
            unsafe {
                libc::signal(signal, libc::SIG_DFL);
                if !from_the_kernel {
                    libc::raise(signal);
                }
            }
        }
        handler if previous.sa_flags & libc::SA_SIGINFO != 0 => {
            type Handler = unsafe extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
            // SAFETY: the flag says that the address is that of a function of this type.
            unsafe { std::mem::transmute::<usize, Handler>(handler)(signal, info, context) }
        }
        handler => {
            // SAFETY: without the flag it is a function of one argument.
            unsafe { std::mem::transmute::<usize, unsafe extern "C" fn(libc::c_int)>(handler)(signal) }
        }
    }
}

#[cfg(test)]
mod tests;
