//! The rings that an AF_XDP socket shares with the kernel (Linux, Documentation/networking/af_xdp.rst).
//!
//! Owns their mappings and our place in each. One side puts in and moves the producer's index, the other takes out and moves the
//! consumer's. What the kernel writes is read once; an index that leads further than the ring is long ends the port.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use libc::xdp_ring_offset;

/// The kernel wrote what it must not.
#[cold]
pub(super) fn broken(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// One ring, mapped.
pub(super) struct Ring<T> {
    start: NonNull<u8>,
    bytes: usize,
    producer: usize,
    consumer: usize,
    flags: usize,
    entries: usize,
    size: u32,
    of: PhantomData<T>,
}

// SAFETY: the mapping belongs to this value alone; its indices are accessed atomically.
unsafe impl<T> Send for Ring<T> {}

impl<T: Copy> Ring<T> {
    /// The ring of `size` entries (a power of two) that `socket` has at `page`.
    pub(super) fn map(
        socket: BorrowedFd<'_>,
        page: libc::off_t,
        at: &xdp_ring_offset,
        size: u32,
    ) -> io::Result<Self> {
        let offset = |offset: u64, align: usize| {
            usize::try_from(offset).ok().filter(|at| at.is_multiple_of(align) && *at < 1 << 20)
        };
        let places = [(at.producer, 4), (at.consumer, 4), (at.flags, 4), (at.desc, align_of::<T>())];
        let [Some(producer), Some(consumer), Some(flags), Some(entries)] =
            places.map(|(at, align)| offset(at, align))
        else {
            return Err(broken("the kernel describes a ring that cannot be"));
        };
        let bytes = entries + size as usize * size_of::<T>();
        // All within `bytes`: the kernel places the indices before the entries.
        if [producer, consumer, flags].iter().any(|index| index + 4 > bytes) {
            return Err(broken("the kernel describes a ring that cannot be"));
        }
        let (read_write, shared) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_POPULATE);
        // SAFETY: a new mapping.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), bytes, read_write, shared, socket.as_raw_fd(), page) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, bytes, producer, consumer, flags, entries, size, of: PhantomData })
    }

    #[inline(always)]
    fn index(&self, at: usize) -> &AtomicU32 {
        // SAFETY: a number within the mapping, aligned (checked by `map`), which both sides access atomically.
        unsafe { AtomicU32::from_ptr(self.start.as_ptr().add(at).cast()) }
    }

    #[inline(always)]
    fn entry(&self, index: u32) -> *mut T {
        let slot = (index & (self.size - 1)) as usize;
        // SAFETY: `slot` is less than `size`, and so many entries lie at `entries`.
        unsafe { self.start.as_ptr().add(self.entries).cast::<T>().add(slot) }
    }

    /// Whether the kernel wants to be called.
    #[inline(always)]
    fn needs_wakeup(&self) -> bool {
        self.index(self.flags).load(Ordering::Relaxed) & libc::XDP_RING_NEED_WAKEUP != 0
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping of `map`, to which nothing points any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

/// A ring that we put into.
pub(super) struct Producer<T> {
    ring: Ring<T>,
    /// What we put in so far.
    next: u32,
}

impl<T: Copy> Producer<T> {
    /// Puts into `ring`, which is empty.
    pub(super) fn of(ring: Ring<T>) -> Self {
        Self { ring, next: 0 }
    }

    /// Entries that the kernel did not take yet.
    #[inline(always)]
    pub(super) fn waiting(&self) -> io::Result<u32> {
        let waiting = self.next.wrapping_sub(self.ring.index(self.ring.consumer).load(Ordering::Acquire));
        if waiting > self.ring.size {
            return Err(broken("the kernel took more than it was given"));
        }
        Ok(waiting)
    }

    /// Puts one in. To be published. The caller never has more entries out than the ring has room for.
    #[inline(always)]
    pub(super) fn put(&mut self, value: T) {
        // SAFETY: the entry is ours: the kernel has taken what was in it, or it would be one too many (see above).
        unsafe { self.ring.entry(self.next).write_volatile(value) };
        self.next = self.next.wrapping_add(1);
    }

    /// Shows the kernel what was put in.
    #[inline(always)]
    pub(super) fn publish(&self) {
        self.ring.index(self.ring.producer).store(self.next, Ordering::Release);
    }

    /// Whether the kernel wants to be called about that.
    #[inline(always)]
    pub(super) fn needs_wakeup(&self) -> bool {
        self.ring.needs_wakeup()
    }
}

/// A ring that we take out of.
pub(super) struct Consumer<T> {
    ring: Ring<T>,
    /// What we took out so far.
    next: u32,
}

impl<T: Copy> Consumer<T> {
    /// Takes out of `ring`, which is empty.
    pub(super) fn of(ring: Ring<T>) -> Self {
        Self { ring, next: 0 }
    }

    /// Entries that are there.
    #[inline(always)]
    pub(super) fn ready(&self) -> io::Result<u32> {
        let ready = self.ring.index(self.ring.producer).load(Ordering::Acquire).wrapping_sub(self.next);
        if ready > self.ring.size {
            return Err(broken("the kernel gave more than its ring holds"));
        }
        Ok(ready)
    }

    /// Takes the next one; only as many as were ready.
    #[inline(always)]
    pub(super) fn take(&mut self) -> T {
        // SAFETY: an entry of the ring; the kernel wrote it before it moved its index, which was read with acquire.
        let value = unsafe { self.ring.entry(self.next).read_volatile() };
        self.next = self.next.wrapping_add(1);
        value
    }

    /// Gives the kernel the places of what was taken.
    #[inline(always)]
    pub(super) fn publish(&self) {
        self.ring.index(self.ring.consumer).store(self.next, Ordering::Release);
    }
}

/// The kernel's side of rings, for tests: in ordinary memory.
#[cfg(test)]
pub(super) mod kernel {
    use super::*;

    const HEAD: usize = 64;

    fn ring<T: Copy>(size: u32) -> Ring<T> {
        let bytes = HEAD + size as usize * size_of::<T>();
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        let start = NonNull::new(start.cast()).unwrap();
        Ring { start, bytes, producer: 0, consumer: 8, flags: 16, entries: HEAD, size, of: PhantomData }
    }

    pub(in super::super) fn producer<T: Copy>(size: u32) -> Producer<T> {
        Producer { ring: ring(size), next: 0 }
    }

    pub(in super::super) fn consumer<T: Copy>(size: u32) -> Consumer<T> {
        Consumer { ring: ring(size), next: 0 }
    }

    impl<T: Copy> Producer<T> {
        /// The kernel takes the oldest entry.
        pub(in super::super) fn taken(&self) -> Option<T> {
            let consumer = self.ring.index(self.ring.consumer);
            let at = consumer.load(Ordering::Relaxed);
            if at == self.ring.index(self.ring.producer).load(Ordering::Relaxed) {
                return None;
            }
            consumer.store(at.wrapping_add(1), Ordering::Relaxed);
            // SAFETY: an entry of the test's ring.
            Some(unsafe { self.ring.entry(at).read() })
        }

        pub(in super::super) fn set_consumer(&self, to: u32) {
            self.ring.index(self.ring.consumer).store(to, Ordering::Relaxed);
        }
    }

    impl<T: Copy> Consumer<T> {
        /// The kernel gives one.
        pub(in super::super) fn give(&self, value: T) {
            let producer = self.ring.index(self.ring.producer);
            let at = producer.load(Ordering::Relaxed);
            // SAFETY: an entry of the test's ring.
            unsafe { self.ring.entry(at).write(value) };
            producer.store(at.wrapping_add(1), Ordering::Relaxed);
        }

        pub(in super::super) fn set_producer(&self, to: u32) {
            self.ring.index(self.ring.producer).store(to, Ordering::Relaxed);
        }
    }
}
