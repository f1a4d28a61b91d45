//! What a file asks of reads and writes that pass by the host's page cache (O_DIRECT), and how they are done all the same.
//!
//! Owns the alignment and the buffers in between for memory that is not aligned: Linux guests' is, but the driver decides.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;

use super::image::SECTOR;
use crate::buffers::{Buffers, Page};

/// Of a kernel or file system that does not say: a page, and the block of almost any disk.
const USUAL: u32 = 4096;
/// Pages that a buffer in between has at most.
const BETWEEN: usize = 64;

/// Powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alignment {
    /// Of addresses in memory and of the lengths of pieces.
    pub(super) memory: u32,
    /// Of places in the file and of whole lengths.
    pub(super) offset: u32,
}

impl Alignment {
    /// What `file` asks for, `None` if it can be had with the page cache only (statx(2), STATX_DIOALIGN; Linux 6.1).
    pub(super) fn of(file: &File) -> io::Result<Option<Self>> {
        let mut answer = MaybeUninit::<libc::statx>::zeroed();
        // SAFETY: the path is an empty string, the kernel writes one `statx`, and both outlive the call.
        let asked = unsafe {
            libc::statx(
                file.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_EMPTY_PATH,
                libc::STATX_DIOALIGN,
                answer.as_mut_ptr(),
            )
        };
        if asked != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: it is plain data, for which the zeros that it began as are valid too.
        let answer = unsafe { answer.assume_init() };
        if answer.stx_mask & libc::STATX_DIOALIGN == 0 {
            return Ok(Some(Self { memory: USUAL, offset: USUAL }));
        }
        let (memory, offset) = (answer.stx_dio_mem_align, answer.stx_dio_offset_align);
        let possible = memory.is_power_of_two() && offset.is_power_of_two();
        // A driver knows nothing of blocks below a sector (virtio 1.3, 5.2.4).
        Ok(possible.then_some(Self { memory, offset: offset.max(SECTOR as u32) }))
    }

    /// Whether the kernel takes these pieces as they are.
    pub(super) fn suits(self, pieces: &[libc::iovec]) -> bool {
        let (memory, offset) = (self.memory as usize, self.offset as usize);
        // A piece's length is one of places in the file for the next.
        let suits =
            |p: &libc::iovec| p.iov_base.addr().is_multiple_of(memory) && p.iov_len.is_multiple_of(offset);
        pieces.iter().all(suits)
    }
}

/// Reads at byte `at` into memory as it comes, by way of our own; `read` reads from there into memory that is aligned.
pub(super) fn read(
    mut at: u64,
    mut to: Buffers<'_>,
    mut read: impl FnMut(Buffers<'_>, u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut pages = between(to.len());
    while to.len() > 0 {
        let mut part = to.take((pages.len() * Page::LEN) as u64);
        let length = part.len();
        read(Buffers::of_pages(&mut pages, length), at)?;
        // The last page may be longer than what is left to fill.
        for page in &pages {
            part.write(&page.0);
        }
        at += length;
    }
    Ok(())
}

/// As `read`, the other way round.
pub(super) fn write(
    mut at: u64,
    mut from: Buffers<'_>,
    mut write: impl FnMut(Buffers<'_>, u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut pages = between(from.len());
    while from.len() > 0 {
        let mut part = from.take((pages.len() * Page::LEN) as u64);
        let length = part.len();
        for page in &mut pages {
            let left = part.len().min(Page::LEN as u64) as usize;
            part.read(page.0.get_mut(..left).unwrap_or_default());
        }
        write(Buffers::of_pages(&mut pages, length), at)?;
        at += length;
    }
    Ok(())
}

/// Pages for a request of `length` bytes, or for a part of it.
fn between(length: u64) -> Vec<Page> {
    let pages = length.div_ceil(Page::LEN as u64).min(BETWEEN as u64);
    vec![Page([0; Page::LEN]); pages as usize]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_by_way_of_aligned_memory_comes_out_as_it_went_in() {
        const PAGES: usize = 2 * BETWEEN + 3;
        let aligned = Alignment { memory: 512, offset: 512 };
        let mut guest = vec![Page([0; Page::LEN]); PAGES];
        let bytes = guest.iter_mut().flat_map(|page| &mut page.0);
        bytes.enumerate().for_each(|(n, byte)| *byte = (n % 251) as u8);
        let length = (PAGES - 1) * Page::LEN;
        let mut disk = vec![0; 512 + length];

        let mut from = Buffers::of_pages(&mut guest, (PAGES * Page::LEN) as u64);
        from.take(100);
        let from = from.take(length as u64);
        assert!(!aligned.suits(from.pieces()));
        write(512, from, |mut from, at| {
            assert!(aligned.suits(from.pieces()));
            let to = &mut disk[at as usize..][..from.len() as usize];
            assert!(from.read(to));
            Ok(())
        })
        .unwrap();
        assert!(disk.iter().skip(512).enumerate().all(|(n, byte)| *byte == ((n + 100) % 251) as u8));

        let mut other = vec![Page([0xee; Page::LEN]); PAGES];
        let mut to = Buffers::of_pages(&mut other, (PAGES * Page::LEN) as u64);
        to.take(7);
        let to = to.take(length as u64 - 512);
        read(1024, to, |mut to, at| {
            let from = &disk[at as usize..][..to.len() as usize];
            assert!(aligned.suits(to.pieces()));
            assert_eq!(to.write(from) as usize, from.len());
            Ok(())
        })
        .unwrap();
        let got: Vec<u8> = other.iter().flat_map(|page| page.0).collect();
        assert!(got[7..7 + length - 512] == disk[1024..], "not what is on the disk");
        assert!(got[..7].iter().chain(&got[7 + length - 512..]).all(|byte| *byte == 0xee), "beyond its ends");
    }
}
