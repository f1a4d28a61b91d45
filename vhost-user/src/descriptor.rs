//! What kind of thing a descriptor from the other side is. Only eventfds may signal, only memory files may be mapped:
//! anything else could block a worker or end it.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};

/// Why a descriptor was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DescriptorError {
    /// Not an eventfd.
    #[error("the descriptor is {0}, and only an eventfd will do")]
    NotEventfd(String),
    /// Not memory.
    #[error(
        "the descriptor is {0}, and only memory will do (memfd, /dev/shm or hugetlbfs, with share=on in QEMU's terms)"
    )]
    NotMemory(String),
    /// The kernel said no.
    #[error("cannot inspect the descriptor: {0}")]
    Kernel(#[from] nix::Error),
}

/// The name that the kernel gives to what `fd` refers to.
fn name(fd: BorrowedFd<'_>) -> String {
    match std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())) {
        Ok(target) => target.to_string_lossy().into_owned(),
        Err(e) => format!("unknown ({e})"),
    }
}

/// Accepts an eventfd and makes it non-blocking. The front end shares the flag and can clear it again, so whoever signals
/// must not rely on it alone.
pub(crate) fn eventfd(fd: OwnedFd) -> Result<OwnedFd, DescriptorError> {
    let name = name(fd.as_fd());
    if name != "anon_inode:[eventfd]" {
        return Err(DescriptorError::NotEventfd(name));
    }
    let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
    if !flags.contains(OFlag::O_NONBLOCK) {
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    }
    Ok(fd)
}

/// A file of plain memory: what it holds and how its pages are made.
pub(crate) struct MemoryFile {
    /// Bytes.
    pub(crate) size: u64,
    /// Bytes of a page.
    pub(crate) page: u64,
    /// Whether these are huge pages that the file has set aside.
    pub(crate) huge: bool,
    /// Whether every page is there.
    pub(crate) full: bool,
}

/// Inspects `fd`, which must be a regular file on tmpfs (memfds are) or hugetlbfs. A file on FUSE or a disk would let its
/// server decide how long a worker waits.
pub(crate) fn memory_file(fd: BorrowedFd<'_>) -> Result<MemoryFile, DescriptorError> {
    // A FUSE file's server decides how long the questions below take. Only tmpfs and hugetlbfs know seals, and the kernel says
    // so of itself.
    if fcntl(fd, FcntlArg::F_GET_SEALS).is_err() {
        return Err(DescriptorError::NotMemory(name(fd)));
    }
    let fs = fstatfs(fd)?;
    let stat = nix::sys::stat::fstat(fd)?;
    let huge = fs.filesystem_type() == HUGETLBFS_MAGIC;
    let memory = huge || fs.filesystem_type() == TMPFS_MAGIC;
    if !memory || stat.st_mode & libc::S_IFMT != libc::S_IFREG {
        return Err(DescriptorError::NotMemory(name(fd)));
    }
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    let present = u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512);
    let page = if huge { u64::try_from(fs.block_size()).unwrap_or(0) } else { 4096 };
    Ok(MemoryFile { size, page: page.max(4096), huge, full: present >= size })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::eventfd::{EfdFlags, EventFd};
    use nix::sys::memfd::{MFdFlags, memfd_create};

    #[test]
    fn an_eventfd_is_accepted_and_becomes_non_blocking() {
        let event = EventFd::from_flags(EfdFlags::empty()).unwrap();
        let fd = eventfd(event.as_fd().try_clone_to_owned().unwrap()).unwrap();
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL).unwrap());
        assert!(flags.contains(OFlag::O_NONBLOCK));
    }

    #[test]
    fn pipes_sockets_files_and_devices_are_no_eventfds() {
        let (pipe, _other) = nix::unistd::pipe().unwrap();
        assert!(matches!(eventfd(pipe), Err(DescriptorError::NotEventfd(n)) if n.starts_with("pipe:")));
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(eventfd(socket.into()).is_err());
        for path in ["/dev/null", "/proc/self/exe"] {
            assert!(eventfd(std::fs::File::open(path).unwrap().into()).is_err(), "{path}");
        }
    }

    #[test]
    fn a_memfd_is_memory_and_says_how_much_of_it_there_is() {
        let fd = memfd_create(c"test", MFdFlags::empty()).unwrap();
        nix::unistd::ftruncate(&fd, 1 << 20).unwrap();
        let file = memory_file(fd.as_fd()).unwrap();
        assert_eq!((file.size, file.page, file.huge, file.full), (1 << 20, 4096, false, false));
    }

    #[test]
    fn disks_devices_pipes_and_directories_are_no_memory() {
        let exe = std::fs::File::open("/proc/self/exe").unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        let directory = std::fs::File::open("/dev/shm").unwrap();
        let (pipe, _other) = nix::unistd::pipe().unwrap();
        for fd in [exe.as_fd(), null.as_fd(), directory.as_fd(), pipe.as_fd()] {
            assert!(matches!(memory_file(fd), Err(DescriptorError::NotMemory(_))), "{fd:?}");
        }
    }
}
