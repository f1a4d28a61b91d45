//! The running program: its own code in memory, and whether what it prints goes to the journal.
//!
//! Owns how pages of code are given back that only a program's start needed. Touches nothing but code, which is read only and comes
//! back from its file when it is run again.

use std::fs;
use std::io;
use std::os::fd::AsFd;

use nix::sys::mman::{MmapAdvise, madvise};

/// Gives back the code that is in memory: what is run from now on is fetched again, from the host's page cache. Code that is locked in
/// memory stays.
///
/// For a program with much to do before it begins and little after: of 5,300 KiB of code that are in memory when a machine has
/// started, its life needs 700.
///
/// # Errors
/// The kernel does not say where the code is.
pub fn forget_code() -> io::Result<()> {
    for code in code()? {
        // What is locked, or a kernel that does not do it, leaves everything as it was.
        // SAFETY: these are mappings of executable code from files, private and not writable: nobody holds data there that its file
        // does not have, and the kernel fetches each page again when it is touched.
        let _ = unsafe { madvise(code.start, code.len, MmapAdvise::MADV_DONTNEED) };
    }
    Ok(())
}

/// Whether `stream` is systemd's journal, which takes `<N>` at the start of a line for its priority: systemd says by device and inode
/// which stream is (systemd.exec(5), `$JOURNAL_STREAM`), as whoever started us may have redirected it.
pub fn is_journal(stream: impl AsFd) -> bool {
    let Ok(said) = std::env::var("JOURNAL_STREAM") else { return false };
    nix::sys::stat::fstat(stream).is_ok_and(|found| said == format!("{}:{}", found.st_dev, found.st_ino))
}

/// A mapping of code.
struct Code {
    start: std::ptr::NonNull<std::ffi::c_void>,
    len: usize,
}

/// All code of this process that came from files (proc(5), /proc/pid/maps).
fn code() -> io::Result<Vec<Code>> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    Ok(maps.lines().filter_map(of_file).collect())
}

/// `start-end r-xp offset device inode /path`, if the line says that.
fn of_file(line: &str) -> Option<Code> {
    let mut words = line.split_ascii_whitespace();
    let (range, permissions) = (words.next()?, words.next()?);
    if permissions != "r-xp" || !words.nth(3)?.starts_with('/') {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    let number = |text| usize::from_str_radix(text, 16).ok();
    let (start, end) = (number(start)?, number(end)?);
    Some(Code { start: std::ptr::NonNull::new(start as *mut _)?, len: end.checked_sub(start)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// KiB of code in memory.
    fn resident() -> u64 {
        let maps = fs::read_to_string("/proc/self/smaps").unwrap();
        let (mut counts, mut sum) = (false, 0);
        for line in maps.lines() {
            match line.strip_prefix("Rss:") {
                Some(rest) if counts => sum += rest.trim().trim_end_matches(" kB").parse::<u64>().unwrap(),
                Some(_) => {}
                None if line.contains(" r-xp ") => counts = line.contains('/'),
                None if line.contains('-') && line.contains(" r") => counts = false,
                None => {}
            }
        }
        sum
    }

    #[test]
    fn code_that_was_given_back_is_run_again() {
        let sorted = || {
            let mut numbers: Vec<u32> = (0..1000_u32).map(|n| n.wrapping_mul(2_654_435_761)).collect();
            numbers.sort_unstable();
            numbers
        };
        let (before, expected) = (resident(), sorted());
        forget_code().unwrap();
        let after = resident();
        assert!(after < before, "{before} KiB before, {after} KiB after");
        assert_eq!(sorted(), expected);
    }

    #[test]
    fn only_code_of_files_is_meant() {
        let taken = "55d0c4a00000-55d0c4b00000 r-xp 00001000 08:01 1234 /usr/bin/x";
        assert_eq!(of_file(taken).map(|code| code.len), Some(0x10_0000));
        for line in [
            "55d0c4a00000-55d0c4b00000 r--p 00001000 08:01 1234 /usr/bin/x",
            "55d0c4a00000-55d0c4b00000 rwxp 00001000 08:01 1234 /usr/bin/x",
            "7ffd1000-7ffd2000 r-xp 00000000 00:00 0 [vdso]",
            "7ffd1000-7ffd2000 r-xp 00000000 00:00 0",
            "",
        ] {
            assert!(of_file(line).is_none(), "{line}");
        }
    }
}
