//! Signals an eventfd that somebody else holds too, without ever waiting.
//!
//! write(2) on an eventfd waits while its counter is full, unless O_NONBLOCK is set; and that flag belongs to everybody who
//! holds the eventfd. A guest that fills the counter and clears the flag, again and again, would hold whoever signals it, and
//! no check beforehand helps. The kernel itself adds to a counter without waiting (`eventfd_signal`), for one when an
//! asynchronous request completes (io_submit(2), IOCB_FLAG_RESFD): so a request that completes at once is submitted, a poll of
//! an eventfd of ours that is always readable.

use std::cell::RefCell;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::LazyLock;

use nix::sys::eventfd::{EfdFlags, EventFd};

/// Asks whether a file is ready (linux/aio_abi.h).
const IOCB_CMD_POLL: u16 = 5;
/// On completion, signal `aio_resfd`.
const IOCB_FLAG_RESFD: u32 = 1;
/// Completions that fit in the queue, and after how many they are taken out of it.
const QUEUE: usize = 128;
const REAP: u32 = 64;

/// A completed request (linux/aio_abi.h, `struct io_event`).
#[repr(C)]
#[derive(Clone, Copy)]
struct IoEvent {
    data: u64,
    obj: u64,
    res: i64,
    res2: i64,
}

/// Always readable: nobody else holds it, and nobody reads it.
static READY: LazyLock<nix::Result<EventFd>> =
    LazyLock::new(|| EventFd::from_value_and_flags(1, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK));

/// One thread's queue of requests.
struct Queue {
    context: libc::c_ulong,
    completed: u32,
}

impl Queue {
    fn new() -> nix::Result<Self> {
        let mut context: libc::c_ulong = 0;
        // SAFETY: the kernel writes the context's name to `context`.
        nix::Error::result(unsafe { libc::syscall(libc::SYS_io_setup, QUEUE, &raw mut context) })?;
        Ok(Self { context, completed: 0 })
    }

    fn signal(&mut self, fd: BorrowedFd<'_>) -> nix::Result<()> {
        if self.completed >= REAP {
            self.reap();
        }
        let ready = READY.as_ref().map_err(|e| *e)?;
        // SAFETY: all zeros is a valid request.
        let mut request: libc::iocb = unsafe { std::mem::zeroed() };
        request.aio_lio_opcode = IOCB_CMD_POLL;
        request.aio_fildes = ready.as_raw_fd().cast_unsigned();
        request.aio_buf = libc::POLLIN as u64;
        request.aio_flags = IOCB_FLAG_RESFD;
        request.aio_resfd = fd.as_raw_fd().cast_unsigned();
        let list = [&raw mut request];
        // SAFETY: one request, which the kernel copies.
        let submitted = unsafe { libc::syscall(libc::SYS_io_submit, self.context, 1_i64, list.as_ptr()) };
        nix::Error::result(submitted)?;
        self.completed += 1;
        Ok(())
    }

    fn reap(&mut self) {
        let mut events = [IoEvent { data: 0, obj: 0, res: 0, res2: 0 }; QUEUE];
        let (none, all) = (0_i64, events.len() as i64);
        let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the kernel writes at most `QUEUE` events, and does not wait for any.
        unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.context,
                none,
                all,
                events.as_mut_ptr(),
                &raw const now,
            )
        };
        self.completed = 0;
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: the context is ours; nothing is under way in it.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}

thread_local! {
    static QUEUE_OF_THREAD: RefCell<Option<Queue>> = RefCell::new(Queue::new().ok());
}

/// Adds 1 to the counter of the eventfd `fd`. Never waits, whatever its other holders do: where the kernel has no
/// asynchronous requests, it relies on O_NONBLOCK.
pub fn signal(fd: BorrowedFd<'_>) {
    let signalled = QUEUE_OF_THREAD.try_with(|queue| match queue.try_borrow_mut() {
        Ok(mut queue) => queue.as_mut().is_some_and(|q| q.signal(fd).is_ok()),
        Err(_) => false,
    });
    if signalled != Ok(true) {
        // A full counter has signalled already.
        let _ = nix::unistd::write(fd, &1_u64.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::time::{Duration, Instant};

    fn counter(event: &EventFd) -> u64 {
        event.read().unwrap()
    }

    #[test]
    fn every_signal_is_counted() {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
        assert!(QUEUE_OF_THREAD.with_borrow(Option::is_some), "this kernel has asynchronous requests");
        for n in [1, 2, 63, 64, 65, 1_000] {
            (0..n).for_each(|_| signal(event.as_fd()));
            assert_eq!(counter(&event), n);
        }
    }

    #[test]
    fn a_full_counter_that_blocks_holds_nobody() {
        let event = EventFd::from_flags(EfdFlags::empty()).unwrap();
        event.write(u64::MAX - 1).unwrap();
        let start = Instant::now();
        (0..1_000).for_each(|_| signal(event.as_fd()));
        assert!(start.elapsed() < Duration::from_secs(60));
    }

    #[test]
    fn threads_come_and_go_without_a_trace() {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..50 {
                scope.spawn(|| signal(event.as_fd())).join().unwrap();
            }
        });
        assert_eq!(counter(&event), 50);
    }

    #[test]
    #[ignore = "a measurement: cargo test --release -p cableway-host what_a_signal_costs -- --ignored --nocapture"]
    fn what_a_signal_costs() {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
        let write = |fd: BorrowedFd<'_>| {
            let _ = nix::unistd::write(fd, &1_u64.to_ne_bytes());
        };
        for (name, how) in [("signal", signal as fn(BorrowedFd<'_>)), ("write", write)] {
            let start = Instant::now();
            (0..200_000).for_each(|_| how(event.as_fd()));
            println!("{name}: {:?}", start.elapsed() / 200_000);
        }
    }
}
