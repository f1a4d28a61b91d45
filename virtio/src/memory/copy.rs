//! Copies to and from memory that its owner may rewrite meanwhile.
//!
//! Assembly, because a data race on plain Rust memory is undefined behaviour and a volatile loop is slow: the compiler
//! cannot read a byte twice, or read past the end, in code that it does not see into. Never touches a byte beyond the range
//! that it was given, on either side.

use std::arch::asm;
use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};

/// Starts fetching the cache line at `at`, to read it. Any address will do.
#[inline(always)]
pub fn prefetch_read(at: *const u8) {
    // SAFETY: a prefetch of any address has no architectural effect.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(at as *const i8) }
}

/// Starts fetching the cache line at `at` for ownership, to write it. Any address will do.
#[inline(always)]
pub fn prefetch_write(at: *const u8) {
    // SAFETY: a prefetch of any address has no architectural effect (a no-op on CPUs without PREFETCHW).
    unsafe { asm!("prefetchw [{}]", in(reg) at as usize, options(nostack, preserves_flags, nomem)) }
}

/// Orders every write before against every read after it, as `fence(SeqCst)` does, in a third of the time: a locked operation
/// on the stack, whose line is here already, instead of MFENCE (Intel SDM 3A 9.2.3.9, AMD APM 2 7.1.3).
#[inline(always)]
pub fn full_fence() {
    // SAFETY: or-ing zero into the top of the stack changes nothing.
    unsafe { asm!("lock or dword ptr [rsp], 0", options(nostack)) }
}

/// Copies `len` bytes.
///
/// # Safety
/// `len` bytes at `from` are mapped readable and `len` bytes at `to` writable; the two do not overlap.
#[inline(always)]
pub unsafe fn copy(to: *mut u8, from: *const u8, len: usize) {
    if len >= 256 && wide() {
        // SAFETY: the caller's promise, `len` is at least 64, and the CPU has AVX-512.
        unsafe { copy_wide(to, from, len) }
    } else if len >= 32 {
        // SAFETY: the caller's promise, and `len` is at least 32.
        unsafe { copy_long(to, from, len) }
    } else {
        // SAFETY: the caller's promise, and `len` is below 32.
        unsafe { copy_short(to, from, len) }
    }
}

/// Whether this CPU moves 64 bytes at a time without running slower for it: the first that have VBMI2 are also the first
/// that do (Intel Ice Lake, AMD Zen 4).
#[inline(always)]
fn wide() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vbmi2")
}

/// 64 bytes at a time (1500 B frames, whole switch: 127 -> 113 cycles a frame). Uses registers that code without AVX-512 does
/// not know of, so that nothing has to be saved or cleared.
///
/// # Safety
/// As [`copy`]; `len >= 64`, and the CPU has AVX-512F.
#[inline(always)]
unsafe fn copy_wide(to: *mut u8, from: *const u8, len: usize) {
    // SAFETY: whole steps forward while they fit, then the last 64 bytes, which may overlap what was copied before.
    unsafe {
        asm!(
            "cmp {n}, 256",
            "jb 3f",
            "2:",
            "vmovdqu64 zmm16, [{from}]",
            "vmovdqu64 zmm17, [{from} + 64]",
            "vmovdqu64 zmm18, [{from} + 128]",
            "vmovdqu64 zmm19, [{from} + 192]",
            "vmovdqu64 [{to}], zmm16",
            "vmovdqu64 [{to} + 64], zmm17",
            "vmovdqu64 [{to} + 128], zmm18",
            "vmovdqu64 [{to} + 192], zmm19",
            "add {from}, 256",
            "add {to}, 256",
            "add {n}, -256",
            "cmp {n}, 256",
            "jae 2b",
            "3:",
            "cmp {n}, 64",
            "jb 4f",
            "vmovdqu64 zmm16, [{from}]",
            "vmovdqu64 [{to}], zmm16",
            "add {from}, 64",
            "add {to}, 64",
            "add {n}, -64",
            "jmp 3b",
            "4:",
            "test {n}, {n}",
            "jz 5f",
            "vmovdqu64 zmm16, [{from} + {n} - 64]",
            "vmovdqu64 [{to} + {n} - 64], zmm16",
            "5:",
            from = inout(reg) from => _, to = inout(reg) to => _, n = inout(reg) len => _,
            options(nostack)
        );
    }
}

/// Exactly 64 bytes.
///
/// # Safety
/// As [`copy`], for 64 bytes.
#[inline(always)]
pub unsafe fn copy_64(to: *mut u8, from: *const u8) {
    // SAFETY: 64 bytes at both ends (caller).
    unsafe {
        asm!(
            "vmovdqu {a}, [{from}]",
            "vmovdqu {b}, [{from} + 32]",
            "vmovdqu [{to}], {a}",
            "vmovdqu [{to} + 32], {b}",
            from = in(reg) from, to = in(reg) to, a = out(ymm_reg) _, b = out(ymm_reg) _,
            options(nostack, preserves_flags)
        );
    }
}

/// # Safety
/// As [`copy`], and `len >= 32`.
#[inline(always)]
unsafe fn copy_long(to: *mut u8, from: *const u8, len: usize) {
    // SAFETY: whole blocks of 128 and 32 bytes, then the last 32 bytes, which may overlap what was copied before: every
    // access lies in the caller's ranges because `len >= 32`.
    unsafe {
        asm!(
            "cmp {n}, 128",
            "jb 3f",
            "2:",
            "vmovdqu {a}, [{from}]",
            "vmovdqu {b}, [{from} + 32]",
            "vmovdqu {c}, [{from} + 64]",
            "vmovdqu {d}, [{from} + 96]",
            "vmovdqu [{to}], {a}",
            "vmovdqu [{to} + 32], {b}",
            "vmovdqu [{to} + 64], {c}",
            "vmovdqu [{to} + 96], {d}",
            "sub {from}, -128",
            "sub {to}, -128",
            "add {n}, -128",
            "cmp {n}, 128",
            "jae 2b",
            "3:",
            "cmp {n}, 32",
            "jb 4f",
            "vmovdqu {a}, [{from}]",
            "vmovdqu [{to}], {a}",
            "add {from}, 32",
            "add {to}, 32",
            "add {n}, -32",
            "jmp 3b",
            "4:",
            "test {n}, {n}",
            "jz 5f",
            "vmovdqu {a}, [{from} + {n} - 32]",
            "vmovdqu [{to} + {n} - 32], {a}",
            "5:",
            from = inout(reg) from => _, to = inout(reg) to => _, n = inout(reg) len => _,
            a = out(ymm_reg) _, b = out(ymm_reg) _, c = out(ymm_reg) _, d = out(ymm_reg) _,
            options(nostack)
        );
    }
}

/// # Safety
/// As [`copy`], and `len < 32`.
#[inline(always)]
unsafe fn copy_short(to: *mut u8, from: *const u8, len: usize) {
    // SAFETY: two accesses of the largest power of two that fits, the second ending where the range ends.
    unsafe {
        if len >= 16 {
            asm!("vmovdqu {a}, [{f}]", "vmovdqu {b}, [{f} + {n} - 16]", "vmovdqu [{t}], {a}", "vmovdqu [{t} + {n} - 16], {b}",
                f = in(reg) from, t = in(reg) to, n = in(reg) len, a = out(xmm_reg) _, b = out(xmm_reg) _, options(nostack, preserves_flags));
        } else if len >= 8 {
            asm!("mov {a}, [{f}]", "mov {b}, [{f} + {n} - 8]", "mov [{t}], {a}", "mov [{t} + {n} - 8], {b}",
                f = in(reg) from, t = in(reg) to, n = in(reg) len, a = out(reg) _, b = out(reg) _, options(nostack, preserves_flags));
        } else if len >= 4 {
            asm!("mov {a:e}, [{f}]", "mov {b:e}, [{f} + {n} - 4]", "mov [{t}], {a:e}", "mov [{t} + {n} - 4], {b:e}",
                f = in(reg) from, t = in(reg) to, n = in(reg) len, a = out(reg) _, b = out(reg) _, options(nostack, preserves_flags));
        } else {
            for i in 0..len {
                to.add(i).write_volatile(from.add(i).read_volatile());
            }
        }
    }
}

/// The first `min(len, 64)` bytes at `from`; the rest is zero.
///
/// # Safety
/// `min(len, 64)` bytes at `from` are mapped readable.
#[inline(always)]
pub unsafe fn read_head(head: &mut [u8; 64], from: *const u8, len: usize) {
    if len >= 64 {
        // SAFETY: 64 bytes there (caller), 64 bytes here.
        unsafe { copy_64(head.as_mut_ptr(), from) }
    } else {
        *head = [0; 64];
        // SAFETY: `len` bytes there (caller), fewer than 64 here.
        unsafe { copy(head.as_mut_ptr(), from, len) }
    }
}

/// Reads the 12 (or, with `short`, 10) bytes of a virtio-net header, once: bytes 0..8, and 8..10 (num_buffers is dropped).
///
/// # Safety
/// 10 bytes at `from` are mapped readable.
#[inline(always)]
pub unsafe fn read_net_header(from: *const u8) -> (u64, u16) {
    let (low, high): (u64, u64);
    // SAFETY: 8 and 2 bytes inside the 10 (caller).
    unsafe {
        asm!("mov {l}, [{f}]", "movzx {h:e}, word ptr [{f} + 8]",
            f = in(reg) from, l = out(reg) low, h = out(reg) high, options(nostack, preserves_flags, readonly));
    }
    (low, high as u16)
}

/// Writes a virtio-net header of `len` bytes (10 or 12), but only where it differs from what is there: in a steady state the
/// line is then shared rather than taken from the other core (measured on a recycling generator: 126 -> 104 cycles a frame).
///
/// # Safety
/// `len` bytes at `to` are mapped readable and writable.
#[inline(always)]
pub unsafe fn write_net_header(to: *mut u8, low: u64, csum_offset: u16, buffers: u16, len: usize) {
    let (now_low, now_high): (u64, u64);
    let long = len >= 12;
    let high = u32::from(csum_offset) | u32::from(buffers) << 16;
    // SAFETY: 8 + 2 or 8 + 4 bytes inside `len` (caller).
    unsafe {
        if long {
            asm!("mov {l}, [{t}]", "mov {h:e}, [{t} + 8]",
                t = in(reg) to, l = out(reg) now_low, h = out(reg) now_high, options(nostack, preserves_flags, readonly));
            if now_low != low || now_high as u32 != high {
                asm!("mov [{t}], {l}", "mov [{t} + 8], {h:e}", t = in(reg) to, l = in(reg) low, h = in(reg) high,
                    options(nostack, preserves_flags));
            }
        } else {
            asm!("mov [{t}], {l}", "mov [{t} + 8], {h:x}", t = in(reg) to, l = in(reg) low, h = in(reg) high,
                options(nostack, preserves_flags));
        }
    }
}

/// Rewrites only num_buffers of a header written before.
///
/// # Safety
/// 12 bytes at `header` are mapped writable.
#[inline(always)]
pub unsafe fn write_num_buffers(header: *mut u8, buffers: u16) {
    // SAFETY: bytes 10..12 of the 12 (caller).
    unsafe {
        asm!("mov [{t} + 10], {b:x}", t = in(reg) header, b = in(reg) buffers, options(nostack, preserves_flags))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_is_copied_to_the_last_byte_and_not_one_beyond() {
        let from: Vec<u8> = (0..800u32).map(|i| (i * 7 + 1) as u8).collect();
        for len in 0..700 {
            for shift in [0, 1, 13] {
                let mut to = vec![0xee; 800];
                // SAFETY: both vectors hold `shift + len` bytes.
                unsafe { copy(to.as_mut_ptr().add(shift), from.as_ptr().add(3), len) };
                assert_eq!(to[shift..shift + len], from[3..3 + len], "len {len}");
                assert!(to[..shift].iter().chain(&to[shift + len..]).all(|b| *b == 0xee), "len {len}");
            }
        }
    }

    #[test]
    fn a_short_head_is_padded_with_zeros() {
        let from = [7u8; 100];
        for len in 0..100 {
            let mut head = [0xaa; 64];
            // SAFETY: 100 bytes there.
            unsafe { read_head(&mut head, from.as_ptr(), len) };
            let n = len.min(64);
            assert!(head[..n].iter().all(|b| *b == 7) && head[n..].iter().all(|b| *b == 0), "len {len}");
        }
    }

    #[test]
    fn a_header_of_ten_bytes_leaves_the_eleventh_alone() {
        for len in [10, 12] {
            let mut to = [0xee; 16];
            // SAFETY: 16 bytes there.
            unsafe { write_net_header(to.as_mut_ptr(), 0x0807_0605_0403_0201, 0x0a09, 0x0c0b, len) };
            let want: Vec<u8> = (1..=len as u8).chain(std::iter::repeat_n(0xee, 16 - len)).collect();
            assert_eq!(to[..], want);
            // SAFETY: as above.
            let (low, offset) = unsafe { read_net_header(to.as_ptr()) };
            assert_eq!((low, offset), (0x0807_0605_0403_0201, 0x0a09));
        }
    }
}
