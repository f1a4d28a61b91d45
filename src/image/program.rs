//! This very program, for a guest: only what is loaded of it, and the libraries that it is linked to.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

/// This program without what a debugger reads.
///
/// # Errors
/// It cannot be read.
pub(super) fn own() -> Result<Vec<u8>> {
    let program = fs::read("/proc/self/exe").context("reading this program")?;
    Ok(loaded_part(&program).unwrap_or(program))
}

/// The libraries that it is linked to, where its loader looks for them; none if it is linked statically.
///
/// # Errors
/// Its loader does not tell.
pub(super) fn libraries() -> Result<Vec<PathBuf>> {
    // What ldd does. A static program has no loader that would hear this, and prints its version.
    let told = Command::new("/proc/self/exe").arg("--version").env("LD_TRACE_LOADED_OBJECTS", "1").output();
    let told = told.context("asking for the libraries of this program")?;
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    let path = |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from);
    Ok(told.lines().filter_map(path).collect())
}

/// The beginning of an ELF file up to the end of what is loaded, without its table of sections.
fn loaded_part(elf: &[u8]) -> Option<Vec<u8>> {
    let eight = |at: usize| Some(u64::from_le_bytes(elf.get(at..at + 8)?.try_into().ok()?));
    let two = |at: usize| Some(u16::from_le_bytes(elf.get(at..at + 2)?.try_into().ok()?));
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    // e_phoff, e_phentsize, e_phnum; of each: p_offset, p_filesz.
    let (table, size, count) = (usize::try_from(eight(32)?).ok()?, two(54)?, two(56)?);
    let mut end = table.checked_add(usize::from(size) * usize::from(count))?;
    for i in 0..usize::from(count) {
        let header = table + i * usize::from(size);
        let segment_end = eight(header + 8)?.checked_add(eight(header + 32)?)?;
        end = end.max(usize::try_from(segment_end).ok()?);
    }
    let mut part = elf.get(..end)?.to_vec();
    // e_shoff; e_shnum, e_shstrndx.
    part.get_mut(40..48)?.fill(0);
    part.get_mut(60..64)?.fill(0);
    Some(part)
}

/// A busybox that needs no libraries.
///
/// # Errors
/// It cannot be read.
pub(super) fn is_static(path: &Path) -> io::Result<bool> {
    let program = fs::read(path)?;
    let head = program.get(..4096).unwrap_or(&program);
    Ok(!head.windows(8).any(|window| window == b"ld-linux"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_is_left_of_a_program_is_smaller_and_runs() {
        let whole = fs::read("/proc/self/exe").unwrap();
        let part = loaded_part(&whole).unwrap();
        assert!(part.len() < whole.len(), "{} of {}", part.len(), whole.len());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("program");
        fs::write(&path, part).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let ran = Command::new(&path).args(["--list", "no_test_is_called_this"]).output().unwrap();
        assert!(ran.status.success(), "{ran:?}");
        for length in 0..64 {
            assert!(loaded_part(&whole[..length]).is_none());
        }
    }

    #[test]
    fn the_libraries_of_this_program_are_files() {
        let libraries = libraries().unwrap();
        assert!(libraries.iter().any(|path| path.to_string_lossy().contains("libc")), "{libraries:?}");
        assert!(libraries.iter().all(|path| path.is_file()), "{libraries:?}");
    }
}
