//! How large a packet is at layer 3, for comparison with the MTU of the port that it would leave by.
//!
//! Of a frame that its sender left unsegmented, the packets that it will be cut into count, not the whole. `hdr_len` of the
//! virtio-net header is a hint and not looked at; what cannot be followed counts whole.

use port::{Frame, Gso, HEAD, Head};

/// Destination, source, type.
const ETHERNET: u32 = 14;
const TAG: u32 = 4;
const TAG_TYPES: [[u8; 2]; 2] = [[0x81, 0x00], [0x88, 0xa8]];

/// Bytes of the largest layer-3 packet that `frame` is or will be cut into.
pub(super) fn layer3_size(head: &Head, frame: &Frame) -> u32 {
    let header = ETHERNET + tags(head);
    let whole = frame.len.saturating_sub(header);
    segment_size(head, frame, header).map_or(whole, |segment| whole.min(segment))
}

/// Bytes of VLAN tags, of which at most two are looked at.
fn tags(head: &Head) -> u32 {
    let is_tag =
        |at: usize| head.0.get(at..at + 2).is_some_and(|kind| TAG_TYPES.iter().any(|tag| tag == kind));
    if !is_tag(12) {
        0
    } else if !is_tag(16) {
        TAG
    } else {
        2 * TAG
    }
}

/// Bytes of the packets that an unsegmented frame is cut into; `None` if it is whole or its headers contradict each other.
fn segment_size(head: &Head, frame: &Frame, header: u32) -> Option<u32> {
    let offload = &frame.offload;
    let gso = offload.gso().ok().filter(|gso| *gso != Gso::None)?;
    let at =
        |offset: u32| head.0.get(offset as usize).copied().filter(|_| offset < frame.len.min(HEAD as u32));
    let version = at(header)?;
    // Segmentation implies a checksum, which starts where layer 4 does; only UDP fragmentation may do without.
    let layer3 = match (offload.needs_csum(), version >> 4) {
        (true, _) => u32::from(offload.csum_start()).checked_sub(header)?,
        (false, 4) => u32::from(version & 0xf) * 4,
        (false, 6) => 40,
        _ => return None,
    };
    if layer3 < 20 {
        return None;
    }
    let more = match gso {
        Gso::Tcp4 | Gso::Tcp6 => {
            // Past the head it is not known: then the longest that TCP can have.
            at(header + layer3 + 12).map_or(60, |offset| u32::from(offset >> 4) * 4).max(20)
        }
        Gso::UdpSegment => 8,
        Gso::UdpFragment if version >> 4 == 6 => 8, // the fragment header
        Gso::UdpFragment | Gso::None => 0,
    };
    Some(layer3 + more + u32::from(offload.gso_size()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use port::Offload;
    use proptest::prelude::*;

    fn head(bytes: &[(usize, &[u8])]) -> Head {
        let mut head = Head([0; HEAD]);
        for (at, bytes) in bytes {
            head.0[*at..*at + bytes.len()].copy_from_slice(bytes);
        }
        head
    }

    fn frame(len: u32, offload: Offload) -> Frame {
        Frame { len, offload, ..Frame::EMPTY }
    }

    #[test]
    fn tags_do_not_count() {
        let size = |bytes: &[(usize, &[u8])]| layer3_size(&head(bytes), &frame(1522, Offload::NONE));
        assert_eq!(size(&[(12, &[8, 0])]), 1508);
        assert_eq!(size(&[(12, &[0x81, 0, 0, 10, 8, 0])]), 1504);
        assert_eq!(size(&[(12, &[0x88, 0xa8, 0, 10, 0x81, 0, 0, 20])]), 1500);
        assert_eq!(layer3_size(&head(&[]), &frame(13, Offload::NONE)), 0);
    }

    #[test]
    fn of_an_unsegmented_frame_the_segments_count() {
        // IPv4, TCP with 12 bytes of options, 1448 bytes a segment.
        let head = head(&[(12, &[8, 0, 0x45]), (34 + 12, &[0x80])]);
        let tso = Offload::new(1, 1, 0, 1448, 34, 16);
        assert_eq!(layer3_size(&head, &frame(60_000, tso)), 1500);
        assert_eq!(layer3_size(&head, &frame(600, tso)), 586);
        assert_eq!(layer3_size(&head, &frame(60_000, Offload::new(1, 5, 0, 1472, 34, 6))), 1500);
        assert_eq!(layer3_size(&head, &frame(60_000, Offload::new(0, 3, 0, 1480, 0, 0))), 1500);
        // IPv6 behind a tag.
        let head = self::head(&[(12, &[0x81, 0, 0, 10, 0x86, 0xdd, 0x60])]);
        assert_eq!(layer3_size(&head, &frame(60_000, Offload::new(1, 3, 0, 1448, 58, 6))), 1496);
        // The TCP header's length lies behind the head: the longest that it can be counts.
        assert_eq!(layer3_size(&head, &frame(60_000, Offload::new(1, 4, 0, 1400, 58, 16))), 1500);
    }

    #[test]
    fn headers_that_contradict_each_other_count_whole() {
        let head = head(&[(12, &[8, 0, 0x40])]);
        for offload in [
            Offload::new(1, 1, 0, 100, 13, 16), // layer 4 before layer 3
            Offload::new(1, 1, 0, 100, 33, 16), // a layer-3 header of 19 bytes
            Offload::new(0, 3, 0, 100, 0, 0),   // IPv4 with a header length of 0
            Offload::new(1, 2, 0, 100, 34, 16), // no such segmentation
        ] {
            assert_eq!(layer3_size(&head, &frame(5000, offload)), 4986, "{offload:?}");
        }
    }

    proptest! {
        #[test]
        fn the_size_is_never_more_than_the_whole_for_any_bytes(
            bytes in prop::array::uniform32(any::<u8>()), more in prop::array::uniform32(any::<u8>()),
            len in 0u32..70_000, low in any::<u64>(), csum_offset in any::<u16>(),
        ) {
            let head = head(&[(0, &bytes), (32, &more)]);
            let frame = frame(len, Offload { low, csum_offset });
            prop_assert!(layer3_size(&head, &frame) <= len);
        }
    }
}
