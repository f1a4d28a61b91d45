//! The receive ring of a packet socket, TPACKET_V3: blocks of memory shared with the kernel, which fills one after the other
//! with as many frames as fit (Linux, Documentation/networking/packet_mmap.rst and include/uapi/linux/if_packet.h).
//!
//! Owns the mapping and the place in it. A block is ours from the moment its status says so until we give it back. Looks at no
//! offset that leads out of its block.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use libc::{tpacket_block_desc, tpacket3_hdr};
use port::{Frame, Offload};

use crate::kernel::message::{HEADER, read_header};

/// Bytes of a block: room for three frames of 64 KiB, and less than the bytes that a burst may have to finish.
const BLOCK: usize = 1 << 18;

/// Blocks: what may come in while the worker is elsewhere.
const BLOCKS: usize = 16;

/// After how many milliseconds a block that is not full is handed over; the least that the kernel takes.
const HAND_OVER_MILLISECONDS: u32 = 1;

/// A VLAN tag's bytes, and where it sits: behind the two addresses.
const TAG: usize = 4;
const TAG_AT: usize = 12;

/// The ring.
pub(super) struct Ring {
    start: NonNull<u8>,
    /// The block that is next, or at hand.
    block: usize,
    /// Frames of the block at hand that were not lent yet; `None`: the next one is not ours yet.
    left: Option<u32>,
    /// Where in the block the next of them is described.
    at: usize,
}

// SAFETY: the mapping belongs to this value alone.
unsafe impl Send for Ring {}

impl Ring {
    /// Gives the socket its ring. The socket must have its version and header set, and must not be bound yet.
    pub(super) fn new(socket: BorrowedFd<'_>) -> io::Result<Self> {
        const FRAME: usize = 2048; // means nothing in this version but must divide the block
        let request = libc::tpacket_req3 {
            tp_block_size: BLOCK as u32,
            tp_block_nr: BLOCKS as u32,
            tp_frame_size: FRAME as u32,
            tp_frame_nr: (BLOCK / FRAME * BLOCKS) as u32,
            tp_retire_blk_tov: HAND_OVER_MILLISECONDS,
            tp_sizeof_priv: 0,
            tp_feature_req_word: 0,
        };
        super::set_option(socket, libc::PACKET_RX_RING, &request)?;
        let (read_write, shared) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_POPULATE);
        // SAFETY: a new mapping of the whole ring, whose length is the one asked for above.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), BLOCK * BLOCKS, read_write, shared, socket.as_raw_fd(), 0)
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, block: 0, left: None, at: 0 })
    }

    /// How many frames of one block are here.
    pub(super) fn ready(&mut self) -> usize {
        if self.left.is_none() && self.status().load(Ordering::Acquire) & libc::TP_STATUS_USER != 0 {
            // SAFETY: the block is ours, and begins with its description, of plain numbers.
            let header = unsafe { (*self.base().cast::<tpacket_block_desc>()).hdr.bh1 };
            (self.left, self.at) = (Some(header.num_pkts), header.offset_to_first_pkt as usize);
            if header.num_pkts == 0 {
                self.give_back();
            }
        }
        self.left.map_or(0, |left| left as usize)
    }

    /// Describes the next frame of the block at hand.
    pub(super) fn next(&mut self) -> Option<Frame> {
        let left = self.left.filter(|left| *left > 0)?;
        let found = self.frame();
        // A description that makes no sense leads nowhere: the rest of the block is left.
        self.left = Some(if found.is_some() { left - 1 } else { 0 });
        let (frame, next) = found?;
        self.at += next;
        Some(frame)
    }

    /// The frame that is described here, and how far from here the next one is.
    fn frame(&mut self) -> Option<(Frame, usize)> {
        if !self.at.is_multiple_of(align_of::<tpacket3_hdr>()) || self.at + size_of::<tpacket3_hdr>() > BLOCK
        {
            return None;
        }
        // SAFETY: the description lies in the block (just checked), which is ours; it is of plain numbers.
        let header = unsafe { self.base().add(self.at).cast::<tpacket3_hdr>().read() };
        let (begin, len) = (self.at + usize::from(header.tp_mac), header.tp_snaplen as usize);
        if begin + len > BLOCK || begin < self.at + size_of::<tpacket3_hdr>() + HEADER {
            return None;
        }
        // SAFETY: `begin` is within the block, and HEADER bytes before it too (just checked).
        let offload = unsafe {
            let net_header = std::slice::from_raw_parts(self.base().add(begin - HEADER), HEADER);
            read_header(net_header)
        };
        // SAFETY: as above.
        let ptr = unsafe { self.base().add(begin) };
        let next = header.tp_next_offset as usize;
        if header.tp_status & libc::TP_STATUS_VLAN_VALID == 0 || len < TAG_AT {
            return Some((whole(ptr, len, offload), next));
        }
        // The kernel keeps a VLAN tag beside the frame. Its place is made by moving the addresses over the header's end.
        let known = header.tp_status & libc::TP_STATUS_VLAN_TPID_VALID != 0;
        let kind = if known { header.hv1.tp_vlan_tpid } else { 0x8100 };
        let tci = header.hv1.tp_vlan_tci as u16;
        // SAFETY: TAG bytes before `ptr` are in the block (TAG is less than HEADER, checked above), TAG_AT behind it too.
        let ptr = unsafe {
            let moved = ptr.sub(TAG);
            std::ptr::copy(ptr, moved, TAG_AT);
            moved.add(TAG_AT).cast::<[u8; 2]>().write(kind.to_be_bytes());
            moved.add(TAG_AT + 2).cast::<[u8; 2]>().write(tci.to_be_bytes());
            moved
        };
        // A checksum that does not fit behind the tag is refused with the frame: it then asks for the impossible.
        let impossible = Offload::new(Offload::NEEDS_CSUM, 0, 0, 0, 0, 0);
        Some((whole(ptr, len + TAG, offload.moved(TAG as i16).unwrap_or(impossible)), next))
    }

    /// The frames lent last are not looked at any more: a block of which all were lent goes back.
    pub(super) fn take_back(&mut self) {
        if self.left == Some(0) {
            self.give_back();
        }
    }

    fn give_back(&mut self) {
        self.status().store(libc::TP_STATUS_KERNEL, Ordering::Release);
        self.left = None;
        self.block = (self.block + 1) % BLOCKS;
    }

    fn base(&self) -> *mut u8 {
        // SAFETY: `block` is less than BLOCKS.
        unsafe { self.start.as_ptr().add(self.block * BLOCK) }
    }

    fn status(&self) -> &AtomicU32 {
        // SAFETY: a block's description lies at its start, aligned; its status is a number that both sides access atomically.
        unsafe {
            let description = self.base().cast::<tpacket_block_desc>();
            AtomicU32::from_ptr(&raw mut (*description).hdr.bh1.block_status)
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`, to which nothing points any more: frames are lent under a borrow of the queue.
        unsafe { libc::munmap(self.start.as_ptr().cast(), BLOCK * BLOCKS) };
    }
}

fn whole(ptr: *const u8, len: usize, offload: Offload) -> Frame {
    Frame { ptr, first_len: len as u32, len: len as u32, offload, ..Frame::EMPTY }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A ring in ordinary memory.
    fn ring() -> Ring {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), BLOCK * BLOCKS, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        Ring { start: NonNull::new(start.cast()).unwrap(), block: 0, left: None, at: 0 }
    }

    /// Does what the kernel does: hands over the current block with one frame, described as `change` wants it.
    fn fill(ring: &Ring, frame: &[u8], change: impl FnOnce(&mut tpacket3_hdr)) {
        // SAFETY: plain numbers, for which zeros are valid.
        let mut header: tpacket3_hdr = unsafe { std::mem::zeroed() };
        (header.tp_mac, header.tp_snaplen) = (96, frame.len() as u32);
        change(&mut header);
        // SAFETY: all in the first block of the test's own mapping.
        unsafe {
            let description = ring.base().cast::<tpacket_block_desc>();
            (*description).hdr.bh1.num_pkts = 1;
            (*description).hdr.bh1.offset_to_first_pkt = 64;
            ring.base().add(64).cast::<tpacket3_hdr>().write(header);
            let net_header = Offload::new(1, 0, 0, 0, 34, 6);
            ring.base().add(64 + 96 - HEADER).cast::<[u8; 8]>().write(net_header.low.to_le_bytes());
            ring.base().add(64 + 96 - 2).cast::<[u8; 2]>().write(net_header.csum_offset.to_le_bytes());
            std::ptr::copy_nonoverlapping(frame.as_ptr(), ring.base().add(64 + 96), frame.len());
        }
        ring.status().store(libc::TP_STATUS_USER, Ordering::Release);
    }

    fn bytes(frame: &Frame) -> Vec<u8> {
        // SAFETY: the frame lies in the test's ring.
        unsafe { std::slice::from_raw_parts(frame.ptr, frame.len as usize).to_vec() }
    }

    #[test]
    fn a_block_goes_back_when_its_last_frame_was_lent_and_taken_back() {
        let mut ring = ring();
        assert_eq!(ring.ready(), 0);
        let sent: Vec<u8> = (0..100).collect();
        fill(&ring, &sent, |_| {});
        assert_eq!(ring.ready(), 1);
        let frame = ring.next().unwrap();
        assert_eq!((bytes(&frame), frame.offload), (sent, Offload::new(1, 0, 0, 0, 34, 6)));
        assert!(ring.next().is_none());
        let status = ring.base();
        ring.take_back();
        assert_eq!((ring.block, ring.ready()), (1, 0));
        // SAFETY: the first block's description.
        let status = unsafe { (*status.cast::<tpacket_block_desc>()).hdr.bh1.block_status };
        assert_eq!(status, libc::TP_STATUS_KERNEL);
    }

    #[test]
    fn a_tag_that_the_kernel_kept_beside_the_frame_is_put_back_and_the_checksum_moves_with_it() {
        let mut ring = ring();
        let sent: Vec<u8> = (0..100).collect();
        fill(&ring, &sent, |header| {
            header.tp_status = libc::TP_STATUS_VLAN_VALID;
            header.hv1.tp_vlan_tci = 0x6014;
        });
        ring.ready();
        let frame = ring.next().unwrap();
        let tagged = [&sent[..12], &[0x81, 0x00, 0x60, 0x14], &sent[12..]].concat();
        assert_eq!((bytes(&frame), frame.offload.csum_start()), (tagged, 38));
    }

    #[test]
    fn a_description_that_leads_out_of_its_block_ends_the_block() {
        let changes: [fn(&mut tpacket3_hdr); 3] =
            [|h| h.tp_snaplen = BLOCK as u32, |h| h.tp_mac = 8, |h| h.tp_snaplen = u32::MAX];
        for change in changes {
            let mut ring = ring();
            fill(&ring, &[0; 60], change);
            assert_eq!((ring.ready(), ring.next().is_none()), (1, true));
            ring.take_back();
            assert_eq!((ring.block, ring.ready()), (1, 0));
        }
    }
}
