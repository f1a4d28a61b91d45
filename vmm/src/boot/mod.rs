//! From a kernel file to a guest whose first instruction is the kernel's.
//!
//! Owns what is put into memory before the start: kernel, initial file system, command line, memory map. Knows the two
//! formats that Linux comes in and which registers each wants; never runs anything. What is wrong with a file is said before
//! the guest has memory wherever that can be seen.

mod bzimage;
mod map;
mod pvh;

use std::fs::File;
use std::io::{self, Seek};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vm_memory::{Bytes, GuestAddress};

use crate::layout;
use crate::memory::{GuestMemory, GuestMemoryError};

/// Why a guest cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be read.
    #[error("the {what} {}: {source}{}", path.display(), way_out(source))]
    File {
        /// Which.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel has a format that is not known.
    #[error(
        "the kernel {} is neither an x86-64 ELF nor a bzImage{hint}; Debian's are /boot/vmlinuz-… (bzImage)",
        path.display()
    )]
    Format {
        /// Its path.
        path: PathBuf,
        /// What it seems to be.
        hint: &'static str,
    },
    /// An ELF without the entry that we start at.
    #[error(
        "the kernel {} has no PVH entry: build it with CONFIG_PVH=y, or take the bzImage of the same build",
        .0.display()
    )]
    NoPvh(PathBuf),
    /// A bzImage that is too old.
    #[error(
        "the kernel {} has boot protocol {}.{:02} and no 64-bit entry; Linux 3.8 or later for x86-64 has it",
        path.display(), version >> 8, version & 0xff
    )]
    No64BitEntry {
        /// Its path.
        path: PathBuf,
        /// Boot protocol.
        version: u16,
    },
    /// The file is damaged, or does not fit the guest's memory.
    #[error("the kernel {} cannot be loaded: {source}; the guest has {} MiB of memory", path.display(), memory >> 20)]
    Load {
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        source: linux_loader::loader::Error,
        /// Bytes.
        memory: u64,
    },
    /// The initial file system does not fit.
    #[error(
        "the initramfs of {} MiB does not fit between the kernel, which ends at {} MiB, and {} MiB; give the guest more \
         `memory`",
        .size >> 20, .from.div_ceil(1 << 20), .to >> 20
    )]
    InitramfsTooLarge {
        /// Bytes.
        size: u64,
        /// End of the kernel.
        from: u64,
        /// End of what may be used.
        to: u64,
    },
    /// Something does not fit the guest's memory.
    #[error(transparent)]
    Memory(#[from] GuestMemoryError),
}

fn way_out(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::NotFound => "; cableway image makes a kernel and an initramfs to boot",
        _ => "",
    }
}

/// What a jump to the reset vector finds: `mov dx, port; mov al, value; out dx, al; hlt`, in 16-bit code. Where ACPI is
/// hardware-reduced and there is no EFI, Linux reboots by this jump and by nothing else (`reboot_init` chooses EFI, which falls
/// back to the BIOS): without it, a guest that reboots spins for ever.
const RESET_CODE: [u8; 7] = [
    0xba,
    layout::RESET_PORT as u8,
    (layout::RESET_PORT >> 8) as u8,
    0xb0,
    crate::acpi::RESET_VALUE,
    0xee,
    0xf4,
];

/// How the first vCPU begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// In 32-bit protected mode without paging, EBX at the start information (Xen,
    /// docs/misc/pvh.pandoc, "x86/HVM direct boot ABI").
    Pvh {
        /// First instruction.
        address: u64,
    },
    /// In 64-bit mode with an identity map, RSI at the zero page (Linux Documentation/arch/x86/boot.rst, 64-bit boot
    /// protocol).
    Linux64 {
        /// First instruction.
        address: u64,
    },
}

/// A kernel file of a known format.
#[derive(Debug)]
pub struct Kernel {
    path: PathBuf,
    file: File,
    format: Format,
}

/// The formats that can be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// An ELF, by its PVH entry.
    Elf,
    /// A bzImage, by its 64-bit entry.
    BzImage,
}

impl Kernel {
    /// Opens a kernel and looks what it is.
    ///
    /// # Errors
    /// It is not there, or of no known format.
    pub fn open(path: &Path) -> Result<Self, BootError> {
        let file = open("kernel", path)?;
        let read = |offset: u64, length: usize| {
            let mut bytes = vec![0; length];
            file.read_exact_at(&mut bytes, offset).map(|()| bytes).unwrap_or_default()
        };
        let format = match read(0, 20).as_slice() {
            // 64 bits, little endian; machine 62 at offset 18 (ELF, System V ABI for AMD64, 4.1).
            [0x7f, b'E', b'L', b'F', 2, 1, .., 62, 0] => Format::Elf,
            _ if read(0x202, 4) == b"HdrS" => Format::BzImage,
            start => {
                let hint = match start {
                    [0x7f, b'E', b'L', b'F', ..] => ": it is an ELF for another processor",
                    [0x1f, 0x8b, ..] | [0x28, 0xb5, 0x2f, 0xfd, ..] | [0xfd, b'7', b'z', ..] => {
                        ": it is compressed, unpack it first"
                    }
                    [] => ": it is too short",
                    _ => "",
                };
                return Err(BootError::Format { path: path.to_owned(), hint });
            }
        };
        Ok(Self { path: path.to_owned(), file, format })
    }

    /// What it is.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Puts everything into `memory` that the kernel needs there.
    ///
    /// # Errors
    /// The kernel is damaged, or does not fit the guest's memory with all that it needs.
    pub fn load(
        &self,
        memory: &GuestMemory,
        initramfs: Option<&Initramfs>,
        cmdline: &str,
    ) -> Result<Entry, BootError> {
        memory.write("command line", layout::COMMAND_LINE, cmdline.as_bytes())?;
        memory.write("command line", layout::COMMAND_LINE + cmdline.len() as u64, &[0])?;
        memory.write("reset vector", layout::RESET_VECTOR, &RESET_CODE)?;
        match self.format {
            Format::Elf => pvh::load(self, memory, initramfs),
            Format::BzImage => bzimage::load(self, memory, initramfs, cmdline.len()),
        }
    }

    /// What went wrong in rust-vmm's loader.
    fn failed(&self, memory: &GuestMemory) -> impl Fn(linux_loader::loader::Error) -> BootError {
        let (path, memory) = (self.path.clone(), memory.len());
        move |source| BootError::Load { path: path.clone(), source, memory }
    }
}

/// An initial file system.
#[derive(Debug)]
pub struct Initramfs {
    path: PathBuf,
    file: File,
    size: u64,
}

impl Initramfs {
    /// Opens it.
    ///
    /// # Errors
    /// It is not there, or no file.
    pub fn open(path: &Path) -> Result<Self, BootError> {
        let file = open("initramfs", path)?;
        let size = file.metadata().map_err(in_file("initramfs", path))?.len();
        Ok(Self { path: path.to_owned(), file, size })
    }

    /// Puts it as high below `limit` as it goes, in whole pages, and returns where it is.
    fn load(&self, memory: &GuestMemory, kernel_end: u64, limit: u64) -> Result<Range<u64>, BootError> {
        let to = memory.low_end().min(limit);
        let too_large = BootError::InitramfsTooLarge { size: self.size, from: kernel_end, to };
        let Some(start) = to.checked_sub(self.size).map(|start| start & !0xfff) else {
            return Err(too_large);
        };
        if start < kernel_end {
            return Err(too_large);
        }
        let length = usize::try_from(self.size).unwrap_or(usize::MAX);
        memory
            .view()
            .read_exact_volatile_from(GuestAddress(start), &mut from_start(&self.file), length)
            .map_err(|error| in_file("initramfs", &self.path)(io::Error::other(error)))?;
        Ok(start..start + self.size)
    }
}

/// The file from its beginning: it may have been read before.
fn from_start(mut file: &File) -> &File {
    // What cannot be read from its beginning is not read to its end either, and said then.
    let _ = file.rewind();
    file
}

fn open(what: &'static str, path: &Path) -> Result<File, BootError> {
    let file = File::open(path).map_err(in_file(what, path))?;
    if file.metadata().is_ok_and(|metadata| metadata.is_dir()) {
        return Err(in_file(what, path)(io::ErrorKind::IsADirectory.into()));
    }
    Ok(file)
}

fn in_file(what: &'static str, path: &Path) -> impl Fn(io::Error) -> BootError {
    let path = path.to_owned();
    move |source| BootError::File { what, path: path.clone(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(content: &[u8]) -> String {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().write_all_at(content, 0).unwrap();
        Kernel::open(file.path()).unwrap_err().to_string()
    }

    #[test]
    fn what_is_no_kernel_is_told_from_what_is_a_compressed_or_foreign_one() {
        assert!(refused(b"").contains("too short"));
        assert!(
            refused(&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
                .contains("unpack it")
        );
        let mut arm = *b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\xb7\0";
        assert!(refused(&arm).contains("another processor"));
        assert!(refused(&[0; 4096]).contains("neither an x86-64 ELF nor a bzImage"));
        arm[18] = 62;
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().write_all_at(&arm, 0).unwrap();
        assert_eq!(Kernel::open(file.path()).unwrap().format(), Format::Elf);
    }

    #[test]
    fn a_missing_kernel_is_named() {
        let text = Kernel::open(Path::new("/nonexistent/vmlinux")).unwrap_err().to_string();
        assert!(text.starts_with("the kernel /nonexistent/vmlinux: "), "{text}");
        let text = Kernel::open(Path::new("/")).unwrap_err().to_string();
        assert!(text.contains("directory"), "{text}");
    }
}
