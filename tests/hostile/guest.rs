//! A guest without a driver: a memory file and rings in it that a test writes as it likes.
//!
//! Ring `q` is at `q * RING`; buffers are the test's to place from `BUFFERS` on. Keeps the positions of a driver that plays by
//! the rules, so that a test need only break the one that it is about.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::eventfd::EventFd;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use vhost::vhost_user::message::FrontendReq as M;
use virtio::features;

use crate::raw::*;

/// Guest memory.
pub(crate) const SIZE: u64 = 8 << 20;
/// Bytes of guest memory for each ring: 16 KiB of descriptors, then avail and used rings.
pub(crate) const RING: u64 = 0x2_0000;
pub(crate) const AVAIL: u64 = 0x8000;
pub(crate) const USED: u64 = 0xc000;
/// The first address that is no ring's.
pub(crate) const BUFFERS: u64 = 0x10_0000;

/// Descriptor flags (virtio 1.3, 2.7.5 and 2.8.13).
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// Bytes of the virtio-net header.
pub(crate) const HEADER: usize = 12;

/// What most tests negotiate.
pub(crate) const FEATURES: u64 =
    features::VERSION_1 | features::RING_INDIRECT_DESC | features::NET_CSUM | features::NET_HOST_TSO4;
/// Both layouts.
pub(crate) const LAYOUTS: [u64; 2] = [FEATURES, FEATURES | features::RING_PACKED];

/// A descriptor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Desc {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
}

impl Desc {
    pub(crate) fn read(addr: u64, len: u32) -> Self {
        Self { addr, len, flags: 0 }
    }

    pub(crate) fn write(addr: u64, len: u32) -> Self {
        Self { addr, len, flags: WRITE }
    }

    pub(crate) fn next(self) -> Self {
        Self { flags: self.flags | NEXT, ..self }
    }

    pub(crate) fn indirect(addr: u64, len: u32) -> Self {
        Self { addr, len, flags: INDIRECT }
    }

    /// As a split ring (or a table of one) has it.
    pub(crate) fn split(self, next: u16) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        bytes
    }

    fn packed(self, id: u16, flags: u16) -> [u8; 16] {
        // The id is where a split ring has the flags, and the flags are where it has the next descriptor.
        Self { flags: id, ..self }.split(flags | self.flags)
    }
}

/// The guest's memory, mapped here. Shared with threads that scribble over it.
pub(crate) struct Memory {
    pub(crate) file: OwnedFd,
    start: NonNull<u8>,
}

// SAFETY: the mapping lives as long as the value, and is only accessed by volatile operations.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    fn new() -> Self {
        let file = memfd(SIZE);
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let len = std::num::NonZeroUsize::new(SIZE as usize).unwrap();
        // SAFETY: a new mapping.
        let start = unsafe { mmap(None, len, protection, MapFlags::MAP_SHARED, &file, 0) };
        Self { file, start: start.unwrap().cast() }
    }

    pub(crate) fn write(&self, addr: u64, bytes: &[u8]) {
        assert!(addr + bytes.len() as u64 <= SIZE);
        for (i, byte) in bytes.iter().enumerate() {
            // SAFETY: inside the mapping.
            unsafe { self.start.as_ptr().add(addr as usize + i).write_volatile(*byte) };
        }
    }

    pub(crate) fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        assert!(addr + len as u64 <= SIZE);
        // SAFETY: inside the mapping.
        (0..len).map(|i| unsafe { self.start.as_ptr().add(addr as usize + i).read_volatile() }).collect()
    }

    /// Two bytes at an even address, at once.
    pub(crate) fn set16(&self, addr: u64, value: u16) {
        assert!(addr.is_multiple_of(2) && addr + 2 <= SIZE);
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        // SAFETY: inside the mapping, and aligned.
        unsafe { self.start.as_ptr().add(addr as usize).cast::<u16>().write_volatile(value) };
    }

    pub(crate) fn get16(&self, addr: u64) -> u16 {
        assert!(addr.is_multiple_of(2) && addr + 2 <= SIZE);
        // SAFETY: inside the mapping, and aligned.
        unsafe { self.start.as_ptr().add(addr as usize).cast::<u16>().read_volatile() }
    }

    /// Four bytes at an address that is a multiple of 4, at once.
    pub(crate) fn set32(&self, addr: u64, value: u32) {
        assert!(addr.is_multiple_of(4) && addr + 4 <= SIZE);
        // SAFETY: inside the mapping, and aligned.
        unsafe { self.start.as_ptr().add(addr as usize).cast::<u32>().write_volatile(value) };
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`.
        unsafe { munmap(self.start.cast(), SIZE as usize) }.unwrap();
    }
}

/// One ring, from the driver's side.
struct Ring {
    size: u16,
    /// Next descriptor of the table (split: never reused within a test of fewer than `size`), or position.
    at: u16,
    /// Packed: the wrap counter that goes with it.
    wrap: bool,
    /// Split: avail index.
    offered: u16,
    /// Packed: where the last chain began, and its wrap counter.
    last: (u16, bool),
    kick: EventFd,
    _call: EventFd,
}

/// A front end with memory and rings.
pub(crate) struct Guest {
    pub(crate) raw: Raw,
    pub(crate) memory: Arc<Memory>,
    packed: bool,
    rings: Vec<Option<Ring>>,
    /// Where the next buffer of [`Guest::place`] goes.
    free: u64,
}

impl Guest {
    /// Connects and lends its memory: one region of [`SIZE`] at guest address 0, at [`USER`] for ring addresses.
    pub(crate) fn connect(socket: &Path, features: u64) -> Self {
        let mut raw = connected(socket);
        raw.negotiate(features);
        let memory = Arc::new(Memory::new());
        let rings = (0..256).map(|_| None).collect();
        let packed = features & features::RING_PACKED != 0;
        let mut guest = Self { raw, memory, packed, rings, free: BUFFERS };
        guest.lend(&[(0, SIZE, 0)]);
        guest
    }

    /// Lends parts of the memory file: guest address, bytes, offset.
    pub(crate) fn lend(&mut self, regions: &[(u64, u64, u64)]) {
        let files = vec![self.memory.file.as_fd(); regions.len()];
        let list =
            regions.iter().flat_map(|(guest, size, offset)| wide(&[*guest, *size, USER + guest, *offset]));
        let payload = [words(&[regions.len() as u32, 0]), list.collect()].concat();
        self.raw.must(M::SET_MEM_TABLE, &payload, &files);
    }

    /// Starts ring `q` with `size` descriptors, and enables it.
    pub(crate) fn start(&mut self, q: u32, size: u16) {
        self.set_up(q, size);
        let kick = self.rings[q as usize].as_ref().unwrap().kick.as_fd().try_clone_to_owned().unwrap();
        self.raw.must(M::SET_VRING_KICK, &wide(&[q.into()]), &[kick.as_fd()]);
        self.raw.must(M::SET_VRING_ENABLE, &words(&[q, 1]), &[]);
    }

    /// All that comes before the kick.
    pub(crate) fn set_up(&mut self, q: u32, size: u16) {
        let (call, kick) = (event(), event());
        let base = if self.packed { 0x8000_8000 } else { 0 };
        self.raw.must(M::SET_VRING_NUM, &words(&[q, size.into()]), &[]);
        self.raw.must(M::SET_VRING_BASE, &words(&[q, base]), &[]);
        self.raw.must(M::SET_VRING_ADDR, &Self::addresses(q), &[]);
        self.raw.must(M::SET_VRING_CALL, &wide(&[q.into()]), &[call.as_fd()]);
        self.rings[q as usize] =
            Some(Ring { size, at: 0, wrap: true, offered: 0, last: (0, true), kick, _call: call });
    }

    /// SET_VRING_ADDR of ring `q`.
    pub(crate) fn addresses(q: u32) -> Vec<u8> {
        let at = USER + u64::from(q) * RING;
        [words(&[q, 0]), wide(&[at, at + USED, at + AVAIL, 0])].concat()
    }

    /// Both rings of pair 0, with 256 descriptors.
    pub(crate) fn up(socket: &Path, features: u64) -> Self {
        let mut guest = Self::connect(socket, features);
        guest.start(0, 256);
        guest.start(1, 256);
        guest
    }

    /// Puts bytes into fresh memory (with room between it and the next) and returns where.
    pub(crate) fn place(&mut self, bytes: &[u8]) -> u64 {
        let addr = self.free;
        self.memory.write(addr, bytes);
        self.free += (bytes.len() as u64 + 64).next_multiple_of(64);
        addr
    }

    /// Puts a frame, behind an empty header, into fresh memory.
    pub(crate) fn place_frame(&mut self, frame: &[u8]) -> Desc {
        self.place_bytes(&[&[0; HEADER][..], frame].concat())
    }

    /// Puts a header and a frame into fresh memory.
    pub(crate) fn place_bytes(&mut self, bytes: &[u8]) -> Desc {
        Desc::read(self.place(bytes), bytes.len() as u32)
    }

    /// Writes a chain to ring `q` and makes it available.
    pub(crate) fn offer(&mut self, q: u32, chain: &[Desc]) {
        let base = u64::from(q) * RING;
        let memory = self.memory.clone();
        let ring = self.rings[q as usize].as_mut().unwrap();
        if !self.packed {
            let head = ring.at;
            for (i, desc) in chain.iter().enumerate() {
                let next = (ring.at + 1) % ring.size;
                let flags = if i + 1 < chain.len() { desc.flags | NEXT } else { desc.flags };
                memory.write(base + u64::from(ring.at) * 16, &Desc { flags, ..*desc }.split(next));
                ring.at = next;
            }
            self.avail(q, head);
            return;
        }
        let (first, first_wrap) = (ring.at, ring.wrap);
        ring.last = (first, first_wrap);
        let id = ring.at;
        for (i, desc) in chain.iter().enumerate() {
            let at = base + u64::from(ring.at) * 16;
            let flags = if i + 1 < chain.len() { desc.flags | NEXT } else { desc.flags };
            let desc = Desc { flags, ..*desc };
            let available = if ring.wrap { 1 << 7 } else { 1 << 15 };
            if i == 0 {
                // Everything but the flags, which say that it is there.
                memory.write(at, &desc.packed(id, 0)[..14]);
            } else {
                memory.write(at, &desc.packed(id, available));
            }
            ring.at += 1;
            if ring.at == ring.size {
                (ring.at, ring.wrap) = (0, !ring.wrap);
            }
        }
        let available = if first_wrap { 1 << 7 } else { 1 << 15 };
        let flags = chain[0].flags | if chain.len() > 1 { NEXT } else { 0 };
        memory.set16(base + u64::from(first) * 16 + 14, flags | available);
        self.kick(q);
    }

    /// Split: puts a head into the avail ring.
    pub(crate) fn avail(&mut self, q: u32, head: u16) {
        let ring = self.rings[q as usize].as_mut().unwrap();
        let slot = u64::from(ring.offered % ring.size);
        self.memory.set16(u64::from(q) * RING + AVAIL + 4 + 2 * slot, head);
        ring.offered = ring.offered.wrapping_add(1);
        let offered = ring.offered;
        self.set_avail_index(q, offered);
    }

    /// Split: writes the avail index.
    pub(crate) fn set_avail_index(&mut self, q: u32, index: u16) {
        self.memory.set16(u64::from(q) * RING + AVAIL + 2, index);
        self.kick(q);
    }

    pub(crate) fn kick(&self, q: u32) {
        self.rings[q as usize].as_ref().unwrap().kick.write(1).unwrap();
    }

    /// Chains that the device has used (packed: at most one round of the ring; each chain's first descriptor is looked at).
    pub(crate) fn used(&self, q: u32) -> u16 {
        let base = u64::from(q) * RING;
        if !self.packed {
            return self.memory.get16(base + USED + 2);
        }
        let size = self.rings[q as usize].as_ref().unwrap().size;
        let flags = |i: u16| self.memory.get16(base + u64::from(i) * 16 + 14);
        (0..size).filter(|i| flags(*i) & (1 << 15 | 1 << 7) == 1 << 15 | 1 << 7).count() as u16
    }

    /// Whether the device has used the last chain that was offered, however often the ring went round.
    pub(crate) fn is_taken(&self, q: u32) -> bool {
        let base = u64::from(q) * RING;
        let ring = self.rings[q as usize].as_ref().unwrap();
        if !self.packed {
            return self.memory.get16(base + USED + 2) == ring.offered;
        }
        let flags = self.memory.get16(base + u64::from(ring.last.0) * 16 + 14);
        flags & (1 << 15 | 1 << 7) == if ring.last.1 { 1 << 15 | 1 << 7 } else { 0 }
    }

    /// Waits until it has.
    #[track_caller]
    pub(crate) fn wait_taken(&self, q: u32, what: &str) {
        let start = Instant::now();
        while !self.is_taken(q) {
            assert!(start.elapsed() < Duration::from_secs(60), "not used: {what}");
            std::hint::spin_loop();
        }
    }

    /// Waits until the device has used `count` chains.
    #[track_caller]
    pub(crate) fn wait_used(&self, q: u32, count: u16) {
        let start = Instant::now();
        while self.used(q) < count {
            assert!(start.elapsed() < Duration::from_secs(60), "{} of {count} used", self.used(q));
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Sends a frame and waits until it was taken. At most a ring's worth in one test.
    #[track_caller]
    pub(crate) fn send(&mut self, frame: &[u8]) {
        let desc = self.place_frame(frame);
        let before = self.used(1);
        self.offer(1, &[desc]);
        self.wait_used(1, before + 1);
    }

    /// Offers `count` receive buffers of `len` bytes; returns where they are.
    pub(crate) fn post(&mut self, count: usize, len: u32) -> Vec<u64> {
        let post = |_| {
            let addr = self.place(&vec![0xee; len as usize]);
            self.offer(0, &[Desc::write(addr, len)]);
            addr
        };
        (0..count).map(post).collect()
    }
}

/// Connects; while the session before is still being closed, again.
pub(crate) fn connected(socket: &Path) -> Raw {
    let start = Instant::now();
    loop {
        let mut raw = Raw::new(std::os::unix::net::UnixStream::connect(socket).unwrap());
        if raw.send(M::GET_FEATURES, 1, &[], &[]) && raw.answer(M::GET_FEATURES).is_some() {
            return raw;
        }
        assert!(start.elapsed() < Duration::from_secs(60), "always turned away");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A frame from the attacker's first port, to an address that nobody has, of `len` bytes.
pub(crate) fn frame(len: usize) -> Vec<u8> {
    let mut frame = vec![0x5a; len];
    for (to, from) in frame.iter_mut().zip([2, 0, 0, 0, 0, 0x77, 2, 0, 0, 0, 0, 0x66, 0x88, 0xb6]) {
        *to = from;
    }
    frame
}
