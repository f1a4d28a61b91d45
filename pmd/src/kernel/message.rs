//! A frame as the kernel takes it in one system call: its virtio-net header and its pieces, as a list of `iovec`s.
//!
//! Owns the ten bytes of the header (virtio 1.3, section 5.1.6, without `num_buffers`) in both directions.

use port::{MAX_FRAME, Offload, PutError, Segment};
use virtio::memory::copy::copy;

/// Bytes of the header.
pub(in crate::kernel) const HEADER: usize = 10;

/// Pieces that are handed to the kernel as they lie, the header among them; what is beyond is gathered into one.
const PIECES: usize = 64;

/// Room for the pieces of one frame at a time.
pub(super) struct Message {
    header: [u8; HEADER],
    list: Box<[libc::iovec; PIECES]>,
    used: usize,
    /// Where the pieces beyond are gathered.
    room: Box<[u8]>,
}

// SAFETY: the pointers in `list` are only meaningful between `fill` and the system call that follows it, on one thread.
unsafe impl Send for Message {}

impl Message {
    pub(super) fn new() -> Self {
        let none = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        Self {
            header: [0; HEADER],
            list: Box::new([none; PIECES]),
            used: 0,
            room: vec![0; MAX_FRAME as usize].into(),
        }
    }

    /// The header that says `offload`, then the frame. What is returned points to the pieces, and into `self`.
    pub(super) fn fill(
        &mut self,
        offload: Offload,
        pieces: impl Iterator<Item = Segment>,
    ) -> Result<&[libc::iovec], PutError> {
        let (low, high) = self.header.split_at_mut(8);
        low.copy_from_slice(&offload.low.to_le_bytes());
        high.copy_from_slice(&offload.csum_offset.to_le_bytes());
        self.used = 0;
        self.push(self.header.as_ptr(), HEADER);
        let mut gathered = 0;
        for piece in pieces {
            if self.used < PIECES - 1 {
                self.push(piece.ptr, piece.len as usize);
                continue;
            }
            let at = gathered;
            gathered += piece.len as usize;
            let to = self.room.get_mut(at..gathered).ok_or(PutError::Refused)?;
            // SAFETY: the caller's piece is `len` bytes at `ptr`, and `to` has as many.
            unsafe { copy(to.as_mut_ptr(), piece.ptr, to.len()) };
        }
        if gathered > 0 {
            self.push(self.room.as_ptr(), gathered);
        }
        Ok(self.list.get(..self.used).unwrap_or_default())
    }

    fn push(&mut self, ptr: *const u8, len: usize) {
        if let Some(entry) = self.list.get_mut(self.used) {
            *entry = libc::iovec { iov_base: ptr.cast_mut().cast(), iov_len: len };
            self.used += 1;
        }
    }
}

/// The header of a received frame. Little-endian: so it is on this machine, whatever the device was told.
pub(in crate::kernel) fn read_header(bytes: &[u8]) -> Offload {
    match *bytes {
        [b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, ..] => Offload {
            low: u64::from_le_bytes([b0, b1, b2, b3, b4, b5, b6, b7]),
            csum_offset: u16::from_le_bytes([b8, b9]),
        },
        _ => Offload::NONE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_of_very_many_pieces_keeps_all_its_bytes_in_order() {
        let bytes: Vec<u8> = (0..2_000u32).map(|i| i as u8).collect();
        let pieces = bytes.chunks(7).map(|c| Segment { ptr: c.as_ptr(), len: c.len() as u32 });
        let mut message = Message::new();
        let offload = Offload::new(1, 1, 54, 1448, 34, 16);
        let list = message.fill(offload, pieces).unwrap();
        assert_eq!(list.len(), PIECES);
        let mut whole = Vec::new();
        for entry in list {
            // SAFETY: each entry is a piece of `bytes` or of `message`, both alive.
            whole.extend_from_slice(unsafe {
                std::slice::from_raw_parts(entry.iov_base.cast_const().cast::<u8>(), entry.iov_len)
            });
        }
        let (header, frame) = whole.split_at(HEADER);
        assert_eq!((read_header(header), frame), (offload, &bytes[..]));
    }

    #[test]
    fn pieces_beyond_the_longest_frame_are_refused() {
        let piece = [0u8; 4_096];
        let pieces = std::iter::repeat_n(Segment { ptr: piece.as_ptr(), len: 4_096 }, PIECES + 20);
        assert!(matches!(Message::new().fill(Offload::NONE, pieces), Err(PutError::Refused)));
    }
}
