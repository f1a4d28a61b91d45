//! The file or block device behind a disk.
//!
//! Owns its descriptor, its size and its lock. Reads and writes guest memory directly, by system calls; never knows who asks.
//! Every access was checked against the size before it comes here, and one that the host cannot do is an error, no end.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::direct::{self, Alignment};
use crate::buffers::{Buffers, Page};
use crate::config::DiskConfig;
use crate::worker::WorkersError;

/// Bytes of a sector, whatever the disk's blocks are (virtio 1.3, 5.2.4).
pub(crate) const SECTOR: u64 = 512;
/// What is written at once where the host has no better way to write zeros.
static ZEROS: Page = Page([0; Page::LEN]);

/// Why a disk cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The file cannot be opened.
    #[error("`disk`: {}: {source}{hint}", .path.display())]
    Open {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
        /// What may help.
        hint: &'static str,
    },
    /// Neither a file nor a block device.
    #[error("`disk`: {} is neither a file nor a block device; name a raw image", .0.display())]
    Kind(PathBuf),
    /// Smaller than a block.
    #[error("`disk`: {} is smaller than a block of {block} bytes; give it a size: truncate -s 8G {}", .path.display(), .path.display())]
    Empty {
        /// Which.
        path: PathBuf,
        /// Bytes.
        block: u32,
    },
    /// The host's page cache cannot be passed by.
    #[error("`disk`: {}: its file system has no O_DIRECT; leave `direct` out, or put the image on another one (ext4, XFS)", .0.display())]
    NotDirect(PathBuf),
    /// Somebody else has it.
    #[error("`disk`: {} is in use by another machine; two that write to one disk destroy it (`read_only = true` on both shares it)", .0.display())]
    InUse(PathBuf),
    /// No more descriptors.
    #[error("`disk`: {0}")]
    System(#[from] io::Error),
    /// No threads, or not where they are to be.
    #[error("`disk`: {0}")]
    Threads(#[from] WorkersError),
}

/// An open image.
#[derive(Debug)]
pub(crate) struct Image {
    file: File,
    sectors: u64,
    block: u32,
    direct: Option<Alignment>,
}

impl Image {
    /// Opens the image that `config` names, and locks it: one machine writes, or several read.
    ///
    /// # Errors
    /// What is wrong with it, and the way out.
    pub(crate) fn open(config: &DiskConfig) -> Result<Self, DiskError> {
        use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
        let path = || config.path.clone();
        // A named pipe is no image, and is not waited for.
        let file = OpenOptions::new()
            .read(true)
            .write(!config.read_only)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | if config.direct { libc::O_DIRECT } else { 0 })
            .open(&config.path)
            .map_err(|source| match source.raw_os_error() {
                Some(libc::EINVAL) if config.direct => DiskError::NotDirect(path()),
                _ => open_error(&config.path, source),
            })?;
        let metadata = file.metadata().map_err(|source| open_error(&config.path, source))?;
        let sort = metadata.file_type();
        if !sort.is_file() && !sort.is_block_device() {
            return Err(DiskError::Kind(path()));
        }
        // io_uring would refuse what has to be waited for.
        let flags = if config.direct { OFlag::O_DIRECT } else { OFlag::empty() };
        fcntl(&file, FcntlArg::F_SETFL(flags)).map_err(|errno| open_error(&config.path, errno.into()))?;
        let locked = if config.read_only { file.try_lock_shared() } else { file.try_lock() };
        match locked {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(DiskError::InUse(path())),
            Err(TryLockError::Error(source)) => return Err(open_error(&config.path, source)),
        }
        let direct = match config.direct {
            true => Some(Alignment::of(&file)?.ok_or_else(|| DiskError::NotDirect(path()))?),
            false => None,
        };
        let block = direct.map_or(SECTOR as u32, |alignment| alignment.offset);
        // A block device's metadata has no length.
        let bytes = (&file).seek(SeekFrom::End(0)).map_err(|source| open_error(&config.path, source))?;
        if bytes < block.into() {
            return Err(DiskError::Empty { path: path(), block });
        }
        let sectors = bytes / u64::from(block) * (u64::from(block) / SECTOR);
        Ok(Self { file, sectors, block, direct })
    }

    /// Bytes of its blocks: nothing smaller is read or written. A power of two.
    pub(super) fn block(&self) -> u32 {
        self.block
    }

    /// How many sectors it has; what does not fill the last block is left out.
    pub(crate) fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Fills `to` with what begins at byte `at`.
    pub(super) fn read(&self, at: u64, to: Buffers<'_>) -> io::Result<()> {
        if self.takes(&to) {
            self.read_there(to, at)
        } else {
            direct::read(at, to, |to, at| self.read_there(to, at))
        }
    }

    fn read_there(&self, to: Buffers<'_>, at: u64) -> io::Result<()> {
        whole(to, at, |pieces, at| {
            // SAFETY: the pieces lie in guest memory that is mapped while `to` is borrowed, or in memory that it borrows; the
            // kernel writes there.
            unsafe { libc::preadv(self.raw(), pieces.as_ptr(), pieces.len() as libc::c_int, at) }
        })
    }

    /// Writes `from` at byte `at`.
    pub(super) fn write(&self, at: u64, from: Buffers<'_>) -> io::Result<()> {
        match self.takes(&from) {
            true => self.write_there(from, at),
            false => direct::write(at, from, |from, at| self.write_there(from, at)),
        }
    }

    fn write_there(&self, from: Buffers<'_>, at: u64) -> io::Result<()> {
        whole(from, at, |pieces, at| {
            // SAFETY: as in `read_there`; the kernel reads there.
            unsafe { libc::pwritev(self.raw(), pieces.as_ptr(), pieces.len() as libc::c_int, at) }
        })
    }

    /// Whether it passes by the page cache.
    pub(super) fn is_direct(&self) -> bool {
        self.direct.is_some()
    }

    /// Whether the host's kernel takes memory as it is.
    pub(super) fn takes(&self, memory: &Buffers<'_>) -> bool {
        self.direct.is_none_or(|alignment| alignment.suits(memory.pieces()))
    }

    /// What was written before is on the disk from now on.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Frees what holds these bytes; they read as zeros then.
    pub(super) fn discard(&self, at: u64, bytes: u64) -> io::Result<()> {
        self.allocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, at, bytes)
    }

    /// Makes these bytes zeros, and keeps their place unless `free`.
    pub(super) fn zero(&self, at: u64, bytes: u64, free: bool) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        let done = match free {
            true => self.discard(at, bytes),
            false => self.allocate(libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE, at, bytes),
        };
        match done {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
            done => return done,
        }
        let (mut at, end) = (at, at + bytes);
        while at < end {
            let length = (end - at).min(Page::LEN as u64);
            self.file.write_all_at(ZEROS.0.get(..length as usize).unwrap_or_default(), at)?;
            at += length;
        }
        Ok(())
    }

    fn allocate(&self, mode: libc::c_int, at: u64, bytes: u64) -> io::Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: no memory is passed.
        match unsafe { libc::fallocate(self.raw(), mode, at as libc::off_t, bytes as libc::off_t) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn raw(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// A ring of the kernel's goes on holding the file for a while when it is gone, and the lock would last as long.
impl Drop for Image {
    fn drop(&mut self) {
        let _ = self.file.unlock();
    }
}

impl AsRawFd for Image {
    fn as_raw_fd(&self) -> RawFd {
        self.raw()
    }
}

/// Calls until all of `buffers` was moved: a call may do less than it was asked for.
fn whole(
    mut buffers: Buffers<'_>,
    mut at: u64,
    call: impl Fn(&[libc::iovec], libc::off_t) -> isize,
) -> io::Result<()> {
    while buffers.len() > 0 {
        match call(buffers.pieces(), at as libc::off_t) {
            // The file became shorter than it was.
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            moved @ 1.. => {
                at += moved as u64;
                drop(buffers.take(moved as u64));
            }
            _ => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
    Ok(())
}

fn open_error(path: &Path, source: io::Error) -> DiskError {
    let hint = match source.kind() {
        io::ErrorKind::NotFound => "; make one: truncate -s 8G FILE",
        io::ErrorKind::PermissionDenied => "; this user needs to read and, without `read_only`, to write it",
        io::ErrorKind::ReadOnlyFilesystem => "; say `read_only = true`",
        _ => "",
    };
    DiskError::Open { path: path.to_owned(), source, hint }
}
