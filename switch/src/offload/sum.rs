//! The Internet checksum (RFC 1071).
//!
//! Adds 32-bit words as they lie in memory into 64 bits, which the compiler turns into vector code; the ones'-complement
//! sum does not care about byte order as long as the result is stored as it was added.

/// A ones'-complement sum on its way. Room for 2^32 words, far beyond any frame.
#[derive(Clone, Copy)]
pub(super) struct Sum(u64);

impl Sum {
    /// The sum of `bytes`, which begin at an even position of what is summed; an odd last byte counts as if a zero followed.
    #[inline]
    pub(super) fn of(bytes: &[u8]) -> Self {
        let (words, rest) = bytes.as_chunks::<4>();
        let sum: u64 = words.iter().map(|w| u64::from(u32::from_ne_bytes(*w))).sum();
        let mut last = [0u8; 4];
        last.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
        Self(sum + u64::from(u32::from_ne_bytes(last)))
    }

    /// Adds a 16-bit number, given as its value.
    pub(super) fn and_number(self, number: u16) -> Self {
        Self(self.0 + u64::from(number.to_be()))
    }

    /// Takes away a 16-bit number: in ones' complement, adding its complement.
    pub(super) fn less_number(self, number: u16) -> Self {
        self.and_number(!number)
    }

    fn folded(self) -> u16 {
        let mut sum = (self.0 >> 32) + (self.0 & 0xffff_ffff);
        while sum > 0xffff {
            sum = (sum >> 16) + (sum & 0xffff);
        }
        sum as u16
    }

    /// The checksum as it is stored.
    pub(super) fn checksum(self) -> [u8; 2] {
        (!self.folded()).to_ne_bytes()
    }

    /// The checksum as UDP stores it: a zero would mean "none" (RFC 768).
    pub(super) fn checksum_of_udp(self) -> [u8; 2] {
        match self.checksum() {
            [0, 0] => [0xff, 0xff],
            checksum => checksum,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// RFC 1071, word by word, with an end-around carry after each.
    fn slow(bytes: &[u8]) -> u16 {
        let mut sum: u32 = 0;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    #[test]
    fn the_example_of_rfc_1071_comes_out() {
        let sum = Sum::of(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(sum.checksum(), (!0xddf2u16).to_be_bytes());
    }

    #[test]
    fn a_udp_checksum_of_zero_is_stored_as_all_ones() {
        assert_eq!(Sum::of(&[0xff, 0xff]).checksum(), [0, 0]);
        assert_eq!(Sum::of(&[0xff, 0xff]).checksum_of_udp(), [0xff, 0xff]);
    }

    #[test]
    fn the_longest_frame_of_all_ones_does_not_overflow() {
        let bytes = vec![0xffu8; port::MAX_FRAME as usize];
        assert_eq!(Sum::of(&bytes).checksum(), slow(&bytes).to_be_bytes());
    }

    proptest! {
        #[test]
        fn any_bytes_sum_up_as_in_the_rfc(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert_eq!(Sum::of(&bytes).checksum(), slow(&bytes).to_be_bytes());
        }

        #[test]
        fn a_number_added_and_another_taken_away_is_as_if_it_had_been_the_other(
            bytes in proptest::collection::vec(any::<u8>(), 2..50), old in 1u16.., new in 1u16..,
        ) {
            let with = |n: u16| Sum::of(&bytes).and_number(n);
            prop_assert_eq!(with(old).less_number(old).and_number(new).checksum(), with(new).checksum());
        }
    }
}
