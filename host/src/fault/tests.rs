//! Memory files that are really truncated, ordinary and of huge pages, and processes that really die.

use super::*;
use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// A peer's memory file, mapped here.
struct Mapping {
    file: File,
    start: *mut u8,
    len: usize,
}

impl Mapping {
    fn of(flags: MFdFlags, len: usize, mapped: usize) -> nix::Result<Self> {
        let file = File::from(memfd_create(c"peer", flags)?);
        file.set_len(len as u64).map_err(|_| nix::Error::EIO)?;
        let len = NonZeroUsize::new(mapped).unwrap();
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping, used through raw pointers only.
        let start = unsafe { mmap(None, len, prot, MapFlags::MAP_SHARED, &file, 0) }?.cast().as_ptr();
        Ok(Self { file, start, len: mapped })
    }

    fn ordinary(len: usize) -> Self {
        Self::of(MFdFlags::empty(), len, len).unwrap()
    }

    fn watch(&self) -> (Watch, Arc<AtomicBool>) {
        let broken = Arc::new(AtomicBool::new(false));
        // SAFETY: the mapping is this one; tests drop the watch before it.
        let watch = unsafe { watch(self.file.as_fd(), self.start, self.len, broken.clone()) }.unwrap();
        (watch, broken)
    }

    fn read(&self, at: usize) -> u8 {
        // SAFETY: inside the mapping; the page may be missing, which is what is tested.
        unsafe { self.start.add(at).read_volatile() }
    }

    fn write(&self, at: usize, byte: u8) {
        // SAFETY: as in `read`.
        unsafe { self.start.add(at).write_volatile(byte) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nobody uses the addresses any more.
        let _ = unsafe { munmap(std::ptr::NonNull::new(self.start).unwrap().cast(), self.len) };
    }
}

#[test]
fn a_truncated_memory_file_reads_as_zeros_and_sets_its_flag_only() {
    let (gone, other) = (Mapping::ordinary(64 << 10), Mapping::ordinary(64 << 10));
    gone.write(50_000, 7);
    other.write(50_000, 7);
    let (gone_watch, gone_broken) = gone.watch();
    let (other_watch, other_broken) = other.watch();
    gone.file.set_len(4096).unwrap();

    assert_eq!(gone.read(50_000), 0);
    assert!(gone_broken.load(Ordering::Acquire));
    gone.write(50_000, 9);
    assert_eq!(gone.read(50_000), 9, "the zero pages are ours to write");
    assert_eq!((gone.read(0), other.read(50_000)), (0, 7));
    assert!(!other_broken.load(Ordering::Acquire));
    drop((gone_watch, other_watch));
}

#[test]
fn a_truncated_huge_page_file_is_replaced_whole_though_less_of_it_was_mapped() {
    let flags = MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
    // mmap(2) rounds 3 MiB up to two huge pages; replacing 3 MiB would fail.
    let mapping = match Mapping::of(flags, 4 << 20, 3 << 20) {
        Ok(mapping) => mapping,
        Err(e) => {
            println!("skipped: no two free huge pages of 2 MiB ({e}); echo 2 > /proc/sys/vm/nr_hugepages");
            return;
        }
    };
    mapping.write(2_500_000, 7);
    let (watch, broken) = mapping.watch();
    mapping.file.set_len(0).unwrap();
    assert_eq!((mapping.read(2_500_000), mapping.read(0)), (0, 0));
    assert!(broken.load(Ordering::Acquire));
    drop(watch);
}

#[test]
fn a_copy_that_runs_into_the_hole_goes_on_with_zeros() {
    let mapping = Mapping::ordinary(64 << 10);
    (0..64 << 10).for_each(|at| mapping.write(at, 1));
    let (watch, broken) = mapping.watch();
    mapping.file.set_len(32 << 10).unwrap();
    let mut copy = vec![1u8; 64 << 10];
    // SAFETY: both have 64 KiB.
    unsafe { std::ptr::copy_nonoverlapping(mapping.start, copy.as_mut_ptr(), copy.len()) };
    assert!(broken.load(Ordering::Acquire));
    assert!(copy.ends_with(&[0; 32 << 10]));
    drop(watch);
}

#[test]
fn many_threads_that_fall_into_one_hole_all_come_out() {
    for _ in 0..50 {
        let mapping = Mapping::ordinary(64 << 10);
        let (watch, broken) = mapping.watch();
        let start = mapping.start as usize;
        std::thread::scope(|scope| {
            for thread in 0..4usize {
                scope.spawn(move || {
                    for round in 0..200 {
                        let at = start + (thread * 4096 + round * 64) % (64 << 10);
                        // SAFETY: inside the mapping, which outlives the scope.
                        unsafe { (at as *const u8).read_volatile() };
                    }
                });
            }
            mapping.file.set_len(0).unwrap();
        });
        mapping.read(0);
        assert!(broken.load(Ordering::Acquire));
        drop(watch);
    }
}

#[test]
fn watches_that_come_and_go_disturb_no_fault_elsewhere() {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let healthy = Mapping::ordinary(8192);
                    let (watch, broken) = healthy.watch();
                    healthy.write(4096, 5);
                    drop(watch);
                    assert_eq!(healthy.read(4096), 5);
                    assert!(!broken.load(Ordering::Acquire));
                }
            });
        }
        for _ in 0..500 {
            let mapping = Mapping::ordinary(8192);
            let (watch, broken) = mapping.watch();
            mapping.file.set_len(0).unwrap();
            assert_eq!(mapping.read(4096), 0);
            assert!(broken.load(Ordering::Acquire));
            drop(watch);
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn errno_survives_a_fault() {
    let mapping = Mapping::ordinary(8192);
    let (watch, _) = mapping.watch();
    mapping.file.set_len(0).unwrap();
    nix::Error::ENOTTY.set();
    mapping.read(0);
    assert_eq!(nix::Error::last(), nix::Error::ENOTTY);
    drop(watch);
}

#[test]
fn ranges_that_are_no_mapping_are_refused() {
    let mapping = Mapping::ordinary(8192);
    let broken = || Arc::new(AtomicBool::new(false));
    for (start, len) in [(1, 8192), (0, 0), (0, usize::MAX), (4096, usize::MAX - 4096)] {
        // SAFETY: refused before anything is done with the range.
        let result = unsafe { watch(mapping.file.as_fd(), mapping.start.wrapping_add(start), len, broken()) };
        assert!(matches!(result, Err(WatchError::Range { .. })), "{start} {len}");
    }
}

/// Runs the test `name` of this module again in a process of its own, as the victim. Returns the signal that ended it and
/// what it printed.
fn victim(name: &str, role: &str) -> (Option<i32>, String) {
    let program = std::env::current_exe().unwrap();
    let name = format!("fault::tests::{name}");
    let output = Command::new(program)
        .args(["--exact", &name, "--nocapture", "--test-threads=1"])
        .env(ROLE, role)
        .output()
        .unwrap();
    (output.status.signal(), String::from_utf8_lossy(&output.stdout).into_owned())
}

const ROLE: &str = "CABLEWAY_TEST_VICTIM";

/// In a victim: a process that watches one mapping, and leaves no core file when it dies.
fn in_victim(role: &str) -> bool {
    if std::env::var(ROLE).as_deref() != Ok(role) {
        return false;
    }
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0).unwrap();
    true
}

#[test]
fn a_fault_outside_watched_memory_ends_the_process_as_ever() {
    if in_victim("unwatched") {
        let (watched, unwatched) = (Mapping::ordinary(8192), Mapping::ordinary(8192));
        let _watch = watched.watch();
        unwatched.file.set_len(0).unwrap();
        unwatched.read(0);
        println!("survived");
        return;
    }
    let (signal, out) = victim("a_fault_outside_watched_memory_ends_the_process_as_ever", "unwatched");
    assert_eq!(signal, Some(libc::SIGBUS), "{out}");
    assert!(!out.contains("survived"), "{out}");
}

#[test]
fn a_fault_in_memory_no_longer_watched_ends_the_process() {
    if in_victim("dropped") {
        let mapping = Mapping::ordinary(8192);
        drop(mapping.watch());
        mapping.file.set_len(0).unwrap();
        mapping.read(0);
        println!("survived");
        return;
    }
    let (signal, out) = victim("a_fault_in_memory_no_longer_watched_ends_the_process", "dropped");
    assert_eq!(signal, Some(libc::SIGBUS), "{out}");
    assert!(!out.contains("survived"), "{out}");
}

#[test]
fn a_sigbus_that_somebody_sends_ends_the_process() {
    if in_victim("sent") {
        // What Rust's runtime installs would put the default action back and return; here nothing was installed before.
        // SAFETY: the default action for a signal.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
        let mapping = Mapping::ordinary(8192);
        let _watch = mapping.watch();
        nix::sys::signal::raise(nix::sys::signal::Signal::SIGBUS).unwrap();
        println!("survived");
        return;
    }
    let (signal, out) = victim("a_sigbus_that_somebody_sends_ends_the_process", "sent");
    assert_eq!(signal, Some(libc::SIGBUS), "{out}");
    assert!(!out.contains("survived"), "{out}");
}

#[test]
fn a_handler_that_was_there_before_gets_what_is_not_ours() {
    extern "C" fn earlier(_: libc::c_int) {
        // SAFETY: ends the process at once, which is all that a handler may safely do here.
        unsafe { libc::_exit(42) }
    }
    if in_victim("chained") {
        // SAFETY: a handler of one argument that only ends the process.
        unsafe { libc::signal(libc::SIGBUS, earlier as *const () as usize) };
        let (ours, foreign) = (Mapping::ordinary(8192), Mapping::ordinary(8192));
        let (_watch, broken) = ours.watch();
        ours.file.set_len(0).unwrap();
        ours.read(0);
        assert!(broken.load(Ordering::Acquire));
        foreign.file.set_len(0).unwrap();
        foreign.read(0);
        return;
    }
    let program = std::env::current_exe().unwrap();
    let name = "fault::tests::a_handler_that_was_there_before_gets_what_is_not_ours";
    let mut child = Command::new(program).args(["--exact", name]).env(ROLE, "chained").spawn().unwrap();
    let mut status = None;
    for _ in 0..1_200 {
        status = child.try_wait().unwrap();
        if status.is_some() {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let _ = child.kill();
    assert_eq!(status.and_then(|s| s.code()), Some(42));
}
