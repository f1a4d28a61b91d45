//! The test frame: Ethernet, IPv4, UDP, and a payload by which the receiver knows exactly what happened to it.
//!
//! ```text
//!  0  destination, source            12  0x0800    14  IPv4, 20 bytes    34  UDP, 8 bytes
//! 42  magic (2)   44  check (4)      48  stream (2) and sequence number (6)     56  time stamp (8)
//! 64  filling, up to the frame's length
//! ```
//!
//! The check covers every byte of the frame but itself, in a way that does not change when the two Ethernet addresses are
//! swapped: a reflector sends it back as it is. The smallest frame is therefore 64 bytes (without FCS). A [`Template`]
//! holds what never changes; a frame costs a copy of it and a few stores. All numbers in the payload are little-endian.

mod check;

use crate::endpoint::{Bytes, FrameBuffer};
use check::{Words, filling_sum, fold, header_sum, length_and_filling, sum_of_header};

/// The smallest test frame, in bytes without FCS.
pub const SMALLEST: usize = 64;
/// The largest test frame, in bytes without FCS.
pub const LARGEST: usize = 9216;
/// The most addresses behind one port.
pub const MOST_ADDRESSES: u32 = 1 << 22;

const MAGIC: u16 = 0xcab1;
const MAC_PREFIX: u16 = u16::from_le_bytes([0x02, 0xca]);
const PORT: u16 = 0xcab1;
const CHECK_AT: usize = 44;
const SEQUENCE_AT: usize = 48;
const STAMP_AT: usize = 56;
const SEQUENCE_BITS: u32 = 48;

/// How much of each received frame is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verify {
    /// Every byte.
    Whole,
    /// The first 64 bytes of every frame, every byte of each 64th.
    Sampled,
}

/// What a received frame turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// A test frame, intact.
    Intact {
        /// The stream that it belongs to.
        stream: u16,
        /// Its number in the stream.
        sequence: u64,
        /// The time that its sender wrote into it, in cycles.
        stamp: u64,
    },
    /// A test frame whose bytes or length changed on the way.
    Corrupt,
    /// Not a test frame: somebody else's ARP, neighbour discovery, …
    Foreign,
}

/// Who is behind the two ports of one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// The sending side (0 or 1), part of its addresses.
    pub from: u8,
    /// The receiving side.
    pub to: u8,
    /// Addresses behind each side, 1 to [`MOST_ADDRESSES`].
    pub count: u32,
}

/// The Ethernet address of `index` behind `side`: locally administered, unicast.
pub fn mac(side: u8, index: u32) -> [u8; 6] {
    let [x, y] = MAC_PREFIX.to_le_bytes();
    let [_, a, b, c] = index.to_be_bytes();
    [x, y, side, a, b, c]
}

/// What never changes in the frames of one stream, and what it contributes to their check.
pub struct Template {
    head: [u8; SMALLEST],
    filling: Vec<u8>,
    stream: u16,
    count: u32,
    constant: Constant,
    source: u32,
    destination: u32,
    stride: u32,
    /// The check without what depends on addresses, sequence number or time stamp.
    rest: u64,
    /// The check without sequence number and time stamp, of the pair of addresses in `head`.
    base: u64,
}

impl Template {
    /// A template for frames of `size` bytes (cut to [`SMALLEST`]..=[`LARGEST`]) of `stream`.
    pub fn new(stream: u16, size: usize, addresses: Addresses) -> Self {
        let size = size.clamp(SMALLEST, LARGEST);
        let addresses = Addresses { count: addresses.count.clamp(1, MOST_ADDRESSES), ..addresses };
        let filling = filling(size);
        let head = head(&addresses, size);
        let rest = length_and_filling(size, filling_sum(filling.as_slice(), 0, filling.len()));
        let base = header_sum(head.as_slice()).wrapping_add(rest);
        let rest = rest.wrapping_add(sum_of_header(0, head.word(12), 0, 0, head.word(36)));
        let (count, stride) = (addresses.count, stride(addresses.count));
        let constant = Constant::new(&addresses, &head);
        Self { head, filling, stream, count, constant, source: 0, destination: 0, stride, rest, base }
    }

    /// Bytes of each frame, without FCS.
    pub fn size(&self) -> usize {
        SMALLEST + self.filling.len()
    }

    /// Writes the frame number `sequence`, sent or due at `stamp`, between the next two addresses.
    #[inline(always)]
    pub fn write(&mut self, mut buffer: impl FrameBuffer, sequence: u64, stamp: u64) {
        buffer.set_len(self.size());
        self.write_filling(&mut buffer);
        self.rewrite(buffer, sequence, stamp);
    }

    /// Writes all but the filling: for a buffer that holds an intact frame of this template.
    #[inline(always)]
    pub fn rewrite(&mut self, mut buffer: impl FrameBuffer, sequence: u64, stamp: u64) {
        buffer.store::<32>(0, self.head.as_slice().load(0));
        buffer.store::<16>(28, self.head.as_slice().load(28));
        let base = if self.count == 1 { self.base } else { self.write_addresses(&mut buffer) };
        let word = u64::from(self.stream) << SEQUENCE_BITS | (sequence & ((1 << SEQUENCE_BITS) - 1));
        buffer.store::<4>(CHECK_AT, fold(base, word, stamp).to_le_bytes());
        buffer.store::<8>(SEQUENCE_AT, word.to_le_bytes());
        buffer.store::<8>(STAMP_AT, stamp.to_le_bytes());
    }

    #[inline(always)]
    fn write_filling<B: FrameBuffer>(&self, buffer: &mut B) {
        let (blocks, rest) = self.filling.as_chunks::<64>();
        let mut at = SMALLEST;
        for block in blocks {
            buffer.store::<64>(at, *block);
            at += 64;
        }
        for &byte in rest {
            buffer.store::<1>(at, [byte]);
            at += 1;
        }
    }

    /// Moves on to the next pair of addresses: all sources in turn, the destinations in an order that no cache or
    /// prefetcher knows. Returns the check of what it wrote, without sequence number and time stamp.
    #[inline(always)]
    fn write_addresses<B: FrameBuffer>(&mut self, buffer: &mut B) -> u64 {
        self.source = if self.source + 1 == self.count { 0 } else { self.source + 1 };
        self.destination += self.stride;
        if self.destination >= self.count {
            self.destination -= self.count;
        }
        let words = self.constant.words(self.source, self.destination);
        buffer.store::<8>(0, words.at_0.to_le_bytes());
        buffer.store::<8>(8, words.at_8.to_le_bytes());
        buffer.store::<8>(20, words.at_20.to_le_bytes());
        buffer.store::<8>(28, words.at_28.to_le_bytes());
        sum_of_header(words.both, 0, words.at_20, words.at_28, 0).wrapping_add(self.rest)
    }
}

/// The words of the header that change with the addresses, little-endian as they lie in the frame.
struct AddressWords {
    at_0: u64,
    at_8: u64,
    at_20: u64,
    at_28: u64,
    /// Both Ethernet addresses, added.
    both: u64,
}

/// What those words have in common, whatever the addresses: worked out once, so that a frame between two of many costs
/// its sender little more than one between the only two.
struct Constant {
    /// Ethernet addresses of index 0: destination, source.
    macs: [u64; 2],
    /// IPv4 addresses of index 0: destination, source.
    ips: [u32; 2],
    at_8: u64,
    at_20: u64,
    at_28: u64,
    /// The sum of the IPv4 header without checksum and addresses.
    sum: u32,
}

impl Constant {
    /// Of frames between `addresses` with this head; its checksum is not looked at.
    fn new(addresses: &Addresses, head: &[u8]) -> Self {
        let mac = |side: u8| u64::from(side) << 16 | u64::from(MAC_PREFIX);
        // Addresses in 10.0.0.0/8.
        let ip = |side: u8| 10 << 24 | u32::from(side & 3) << 22;
        let (before, id_to_ttl) = (head.word(14), head.word(20) & 0xffff_ffff);
        // The one's complement sum is the same in any byte order (RFC 1071).
        let halves = |word: u64| (0..4).map(|i| (word >> (16 * i)) as u32 & 0xffff).sum::<u32>();
        Self {
            macs: [mac(addresses.to), mac(addresses.from)],
            ips: [ip(addresses.to), ip(addresses.from)],
            at_8: head.word(8) & !0xffff_ffff,
            at_20: id_to_ttl,
            at_28: head.word(28) & 0xffff << 48,
            // Bytes 14 to 21, and 22 and 23 of the frame: what comes before the checksum.
            sum: halves(before) + (id_to_ttl >> 16) as u32,
        }
    }

    #[inline(always)]
    fn words(&self, source: u32, destination: u32) -> AddressWords {
        let mac = |base: u64, index: u32| u64::from(index.to_be() >> 8) << 24 | base;
        let ip = |base: u32, index: u32| (base | index & 0x3f_ffff).to_be();
        let ([to, from], [dst, src]) = (self.macs, self.ips);
        let (to, from) = (mac(to, destination), mac(from, source));
        let (src, dst) = (ip(src, source), ip(dst, destination));
        let sum = self.sum + (src & 0xffff) + (src >> 16) + (dst & 0xffff) + (dst >> 16);
        let sum = (sum & 0xffff) + (sum >> 16);
        let checksum = u64::from(!((sum & 0xffff) + (sum >> 16)) as u16);
        AddressWords {
            at_0: to | from << 48,
            at_8: from >> 16 | self.at_8,
            at_20: self.at_20 | checksum << 32 | u64::from(src) << 48,
            at_28: u64::from(src >> 16) | u64::from(dst) << 16 | self.at_28,
            both: to.wrapping_add(from),
        }
    }
}

/// What to expect of the frames that arrive: how to judge them.
pub struct Checker {
    size: usize,
    filling_sum: u64,
    verify: Verify,
    seen: u32,
}

impl Checker {
    /// Judges frames of `size` bytes.
    pub fn new(size: usize, verify: Verify) -> Self {
        let filling = filling(size.clamp(SMALLEST, LARGEST));
        let filling_sum = filling_sum(filling.as_slice(), 0, filling.len());
        Self { size: SMALLEST + filling.len(), filling_sum, verify, seen: 0 }
    }

    /// Judges one frame.
    #[inline(always)]
    pub fn judge(&mut self, frame: impl Bytes) -> Verdict {
        let bytes = frame.load::<SMALLEST>(0);
        let head = bytes.as_slice();
        let ours = head.load::<2>(36) == PORT.to_be_bytes() || head.load::<2>(42) == MAGIC.to_le_bytes();
        if !ours {
            return Verdict::Foreign;
        }
        if frame.len() != self.size {
            return Verdict::Corrupt;
        }
        self.seen = self.seen.wrapping_add(1);
        let whole = self.size > SMALLEST && (self.verify == Verify::Whole || self.seen.is_multiple_of(64));
        let filling =
            if whole { filling_sum(&frame, SMALLEST, self.size - SMALLEST) } else { self.filling_sum };
        let word = head.word(SEQUENCE_AT);
        let stamp = head.word(STAMP_AT);
        let base = header_sum(head).wrapping_add(length_and_filling(self.size, filling));
        if fold(base, word, stamp).to_le_bytes() != head.load::<4>(CHECK_AT) {
            return Verdict::Corrupt;
        }
        let sequence = word & ((1 << SEQUENCE_BITS) - 1);
        Verdict::Intact { stream: (word >> SEQUENCE_BITS) as u16, sequence, stamp }
    }
}

/// Swaps the Ethernet addresses: the frame goes back to where it came from, its check still right.
#[inline(always)]
pub fn swap_addresses(mut frame: impl FrameBuffer) {
    let mut both = frame.load::<12>(0);
    both.rotate_left(6);
    frame.store(0, both);
}

/// The first 64 bytes for the first pair of addresses; sequence number, time stamp and check are zero.
fn head(addresses: &Addresses, size: usize) -> [u8; SMALLEST] {
    let ip_len = (size - 14) as u16;
    let mut h = [0; SMALLEST];
    h[12..14].copy_from_slice(&[0x08, 0x00]);
    // IPv4, RFC 791: version and length, total length, TTL 64, UDP.
    h[14..16].copy_from_slice(&[0x45, 0]);
    h[16..18].copy_from_slice(&ip_len.to_be_bytes());
    h[22..24].copy_from_slice(&[64, 17]);
    // UDP, RFC 768: no checksum (zero), which IPv4 allows; the payload has its own.
    h[34..36].copy_from_slice(&PORT.to_be_bytes());
    h[36..38].copy_from_slice(&PORT.to_be_bytes());
    h[38..40].copy_from_slice(&(ip_len - 20).to_be_bytes());
    h[42..44].copy_from_slice(&MAGIC.to_le_bytes());
    let words = Constant::new(addresses, &h).words(0, 0);
    h[0..8].copy_from_slice(&words.at_0.to_le_bytes());
    h[8..16].copy_from_slice(&words.at_8.to_le_bytes());
    h[20..28].copy_from_slice(&words.at_20.to_le_bytes());
    h[28..36].copy_from_slice(&words.at_28.to_le_bytes());
    h
}

/// The bytes behind the first 64: the same for every frame of a size, different at every place.
fn filling(size: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    (SMALLEST..size)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

/// A step through `count` addresses that meets each once and is far from the last.
fn stride(count: u32) -> u32 {
    let gcd = |mut a: u32, mut b: u32| {
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    // Near the golden section: neighbours in time are far apart.
    let mut step = (f64::from(count) * 0.618_034) as u32;
    step = step.max(1);
    while gcd(step, count) != 1 {
        step += 1;
    }
    step % count.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::tests::VecBuffer;
    use proptest::prelude::*;

    const PAIR: Addresses = Addresses { from: 0, to: 1, count: 1 };

    fn frame(template: &mut Template, sequence: u64, stamp: u64) -> VecBuffer {
        let mut buffer = VecBuffer::with_capacity(LARGEST);
        template.write(&mut buffer, sequence, stamp);
        buffer
    }

    fn ip_checksum_is_right(bytes: &[u8]) -> bool {
        let sum: u32 = bytes[14..34].chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum();
        (sum & 0xffff) + (sum >> 16) == 0xffff
    }

    #[test]
    fn a_frame_is_well_formed_and_goes_between_the_addresses_of_its_sides() {
        let mut t = Template::new(7, 128, PAIR);
        let f = frame(&mut t, 3, 9);
        assert_eq!(f.bytes.len(), 128);
        assert_eq!(f.bytes[0..6], mac(1, 0));
        assert_eq!(f.bytes[6..12], mac(0, 0));
        assert_eq!(f.bytes[12..14], [8, 0]);
        assert_eq!(f.bytes[16..18], 114u16.to_be_bytes());
        assert_eq!(f.bytes[38..40], 94u16.to_be_bytes());
        assert!(ip_checksum_is_right(&f.bytes));
    }

    #[test]
    fn every_address_is_used_once_on_each_side_before_any_repeats() {
        for count in [2, 3, 64, 1000, 4099] {
            let mut t = Template::new(0, 64, Addresses { count, ..PAIR });
            let mut checker = Checker::new(64, Verify::Whole);
            let (mut sources, mut destinations) =
                (std::collections::HashSet::new(), std::collections::HashSet::new());
            for sequence in 0..u64::from(count) {
                let f = frame(&mut t, sequence, 1);
                assert!(ip_checksum_is_right(&f.bytes));
                assert_eq!(checker.judge(&f), Verdict::Intact { stream: 0, sequence, stamp: 1 });
                assert!(destinations.insert(f.bytes[0..6].to_vec()));
                assert!(sources.insert(f.bytes[6..12].to_vec()));
                assert_eq!(f.bytes[2], 1);
                assert_eq!(f.bytes[8], 0);
            }
        }
    }

    #[test]
    fn a_reflected_frame_is_still_intact() {
        for size in [64, 65, 127, 128, 1500, 9000] {
            let mut f = frame(&mut Template::new(1, size, PAIR), 5, 6);
            swap_addresses(&mut f);
            assert_eq!(f.bytes[0..6], mac(0, 0));
            let verdict = Checker::new(size, Verify::Whole).judge(&f);
            assert_eq!(verdict, Verdict::Intact { stream: 1, sequence: 5, stamp: 6 });
        }
    }

    #[test]
    fn any_single_changed_byte_is_seen() {
        for size in [64, 200, 257] {
            let good = frame(&mut Template::new(1, size, PAIR), 0x0102_0304, 0x0506_0708);
            for at in 0..size {
                for flip in [1, 0x80, 0xff] {
                    let mut bad = good.clone();
                    bad.bytes[at] ^= flip;
                    let verdict = Checker::new(size, Verify::Whole).judge(&bad);
                    assert_eq!(verdict, Verdict::Corrupt, "byte {at} ^ {flip:#x} of {size}");
                }
            }
        }
    }

    #[test]
    fn a_frame_cut_short_is_corrupt_and_somebody_elses_is_foreign() {
        let mut checker = Checker::new(256, Verify::Whole);
        let mut short = frame(&mut Template::new(1, 256, PAIR), 0, 0);
        short.bytes.truncate(255);
        assert_eq!(checker.judge(&short), Verdict::Corrupt);
        short.bytes.truncate(60);
        assert_eq!(checker.judge(&short), Verdict::Corrupt);
        let mut arp = VecBuffer::with_capacity(64);
        arp.set_len(60);
        arp.store(0, [0xff; 6]);
        arp.store(12, [0x08, 0x06]);
        assert_eq!(checker.judge(&arp), Verdict::Foreign);
    }

    #[test]
    fn sampling_still_reads_all_of_every_64th_frame() {
        let mut bad = frame(&mut Template::new(1, 1500, PAIR), 0, 0);
        bad.bytes[1400] ^= 1;
        let mut checker = Checker::new(1500, Verify::Sampled);
        let corrupt = (0..640).filter(|_| checker.judge(&bad) == Verdict::Corrupt).count();
        assert_eq!(corrupt, 10);
    }

    proptest! {
        #[test]
        fn bytes_that_trade_places_in_the_filling_are_seen(a in 64usize..1500, b in 64usize..1500) {
            let mut f = frame(&mut Template::new(1, 1500, PAIR), 1, 2);
            prop_assume!(f.bytes[a] != f.bytes[b]);
            f.bytes.swap(a, b);
            prop_assert_eq!(Checker::new(1500, Verify::Whole).judge(&f), Verdict::Corrupt);
        }

        #[test]
        fn what_is_written_comes_back(stream: u16, sequence in 0u64..1 << 48, stamp: u64, size in 64usize..=9216) {
            let f = frame(&mut Template::new(stream, size, PAIR), sequence, stamp);
            let verdict = Checker::new(size, Verify::Whole).judge(&f);
            prop_assert_eq!(verdict, Verdict::Intact { stream, sequence, stamp });
        }
    }
}
