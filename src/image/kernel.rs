//! The kernel of an image: the ELF inside a bzImage, and which version a bzImage is.

use std::io::Read;

/// Where a bzImage says what is in it (Linux, Documentation/arch/x86/boot.rst).
const SETUP_SECTORS: usize = 0x1f1;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x20e;
const PAYLOAD: usize = 0x248;
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// What starts faster: the ELF inside a bzImage that is packed with zstd. `None`: it is an ELF already, or packed otherwise, and is
/// started as it is.
pub(super) fn elf_inside(kernel: &[u8]) -> Option<Vec<u8>> {
    if !is_bzimage(kernel) {
        return None;
    }
    let sectors = usize::from(*kernel.get(SETUP_SECTORS)?);
    let sectors = if sectors == 0 { 4 } else { sectors };
    let word = |at: usize| {
        let bytes = kernel.get(at..at + 4)?;
        usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()
    };
    let start = (sectors + 1) * 512 + word(PAYLOAD)?;
    // Its last four bytes are the unpacked size.
    let end = start.checked_add(word(PAYLOAD + 4)?.checked_sub(4)?)?;
    let payload = kernel.get(start..end)?;
    if !payload.starts_with(&ZSTD) {
        return None;
    }
    let mut elf = Vec::new();
    ruzstd::decoding::StreamingDecoder::new(payload).ok()?.read_to_end(&mut elf).ok()?;
    elf.starts_with(b"\x7fELF").then_some(elf)
}

/// The version of a bzImage, as `uname -r` will say it.
pub(super) fn version(kernel: &[u8]) -> Option<String> {
    if !is_bzimage(kernel) {
        return None;
    }
    let at = kernel.get(VERSION..VERSION + 2)?;
    let at = usize::from(u16::from_le_bytes(at.try_into().ok()?)) + 512;
    let text = kernel.get(at..)?.split(|byte| *byte == 0 || *byte == b' ').next()?;
    String::from_utf8(text.to_vec()).ok().filter(|text| !text.is_empty() && text.len() < 128)
}

/// Whether it is a kernel at all: an ELF or a bzImage.
pub(super) fn is_kernel(kernel: &[u8]) -> bool {
    kernel.starts_with(b"\x7fELF") || is_bzimage(kernel)
}

fn is_bzimage(kernel: &[u8]) -> bool {
    kernel.get(MAGIC..MAGIC + 4) == Some(b"HdrS")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bzImage of `payload`.
    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[SETUP_SECTORS] = 1;
        image[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
        image[VERSION..VERSION + 2].copy_from_slice(&0x100u16.to_le_bytes());
        image[0x300..0x314].copy_from_slice(b"6.12.1-cloud (x) #1\0");
        image[PAYLOAD..PAYLOAD + 4].copy_from_slice(&0u32.to_le_bytes());
        let length = payload.len() as u32 + 4;
        image[PAYLOAD + 4..PAYLOAD + 8].copy_from_slice(&length.to_le_bytes());
        image.extend(payload);
        image.extend(20u32.to_le_bytes());
        image
    }

    #[test]
    fn the_elf_inside_a_bzimage_comes_out_and_the_version_with_it() {
        let elf = [b"\x7fELF".as_slice(), &[7; 3000]].concat();
        let packed = ruzstd::encoding::compress_to_vec(
            elf.as_slice(),
            ruzstd::encoding::CompressionLevel::Uncompressed,
        );
        let image = bzimage(&packed);
        assert_eq!(elf_inside(&image), Some(elf));
        assert_eq!(version(&image).as_deref(), Some("6.12.1-cloud"));
    }

    #[test]
    fn a_damaged_bzimage_is_taken_as_it_is() {
        for damage in [SETUP_SECTORS, PAYLOAD + 1, PAYLOAD + 5, 1030] {
            let mut image = bzimage(&[ZSTD.as_slice(), &[0xff; 40]].concat());
            image[damage] = 0xff;
            assert_eq!(elf_inside(&image), None);
        }
        for length in 0..1024 {
            let image = &bzimage(&[])[..length];
            assert_eq!(elf_inside(image), None);
            let _ = version(image);
        }
    }
}
