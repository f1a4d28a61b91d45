//! The check of a test frame: sums that see every change of a byte but are the same when the Ethernet addresses are swapped.
//!
//! Each word is multiplied by a constant of its own, so that a sender computes what never changes once. Guards against
//! accidents, not against forgers.

use crate::endpoint::Bytes;

/// Odd, so that a change of one word always changes the sum; otherwise random.
const MIX: [u64; 9] = [
    0x9e37_79b9_7f4a_7c15,
    0xbf58_476d_1ce4_e5b9,
    0x94d0_49bb_1331_11eb,
    0xd6e8_feb8_6659_fd93,
    0xa076_1d64_78bd_642f,
    0xe703_7ed1_a0b4_28db,
    0x8ebc_6af0_9c88_c6e3,
    0x5899_65cc_7537_4cc3,
    0x1d8e_4e27_c47d_124f,
];

/// Bytes 0..44 in a sum that swapping the Ethernet addresses does not change.
#[inline(always)]
pub(super) fn header_sum<S: Words + ?Sized>(s: &S) -> u64 {
    let destination = s.word(0) & ((1 << 48) - 1);
    let source = s.word(4) >> 16;
    sum_of_header(destination.wrapping_add(source), s.word(12), s.word(20), s.word(28), s.word(36))
}

/// The same from its words; `both` is the sum of the two Ethernet addresses.
#[inline(always)]
pub(super) fn sum_of_header(both: u64, at_12: u64, at_20: u64, at_28: u64, at_36: u64) -> u64 {
    both.wrapping_mul(MIX[0])
        .wrapping_add(at_12.wrapping_mul(MIX[1]))
        .wrapping_add(at_20.wrapping_mul(MIX[2]))
        .wrapping_add(at_28.wrapping_mul(MIX[3]))
        .wrapping_add(at_36.wrapping_mul(MIX[4]))
}

/// What the frame's length and filling contribute.
#[inline(always)]
pub(super) fn length_and_filling(size: usize, filling: u64) -> u64 {
    (size as u64).wrapping_mul(MIX[5]).wrapping_add(filling.wrapping_mul(MIX[6]))
}

/// The check itself: all contributions and the words of the payload, in 32 bits.
#[inline(always)]
pub(super) fn fold(base: u64, word: u64, stamp: u64) -> u32 {
    let sum = base.wrapping_add(word.wrapping_mul(MIX[7])).wrapping_add(stamp.wrapping_mul(MIX[8]));
    (sum ^ sum >> 32) as u32
}

/// Position-dependent sum of `len` bytes from `at`: sixteen lanes of a rotating Fletcher's sum, so that it runs at the speed
/// of the cache. (Without the rotation, two bytes that trade places go unseen when their difference times their distance is
/// a multiple of 256.)
#[inline(always)]
pub(super) fn filling_sum<S: Bytes + ?Sized>(s: &S, at: usize, len: usize) -> u64 {
    let (mut a, mut b) = ([0u32; 16], [0u32; 16]);
    let mut add = |block: [u8; 64]| {
        let (words, _) = block.as_chunks::<4>();
        for lane in 0..16 {
            a[lane] = a[lane].rotate_left(9).wrapping_add(u32::from_le_bytes(words[lane]));
            b[lane] = b[lane].wrapping_add(a[lane]);
        }
    };
    for i in 0..len / 64 {
        add(s.load(at + i * 64));
    }
    let rest = len % 64;
    if rest > 0 {
        let mut last = [0; 64];
        for (i, byte) in last[..rest].iter_mut().enumerate() {
            [*byte] = s.load(at + len - rest + i);
        }
        add(last);
    }
    let mut sum = len as u64;
    for lane in 0..16 {
        let both = u64::from(a[lane]) | u64::from(b[lane]) << 32;
        sum = (sum.rotate_left(7) ^ both).wrapping_mul(MIX[8]);
    }
    sum
}

/// Little-endian words of a frame.
pub(super) trait Words: Bytes {
    #[inline(always)]
    fn word(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.load(at))
    }
}

impl<B: Bytes + ?Sized> Words for B {}
