//! MSI-X of a function: its table, its pending bits, and the eventfds behind its vectors (PCI 3.0, 6.8.2).
//!
//! Owns a vector's way into KVM: an eventfd that a device, or another process, signals. While a vector is masked its
//! signals stay in the eventfd; KVM finds them there when it is unmasked.

use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::EventFd;

use crate::interrupts::{Interrupts, Message};

/// Bytes of a table entry: address, upper address, data, control.
pub(crate) const ENTRY: usize = 16;
/// The control word's mask bit.
const MASKED: u32 = 1;
/// Message control: enable, and mask of the whole function.
const ENABLE: u16 = 1 << 15;
const FUNCTION_MASK: u16 = 1 << 14;

/// One vector.
struct Vector {
    message: Message,
    masked: bool,
    event: EventFd,
    number: u32,
    connected: bool,
}

/// All vectors of a function.
pub(crate) struct MsiX {
    vectors: Vec<Vector>,
    control: u16,
    interrupts: Arc<Interrupts>,
}

impl MsiX {
    /// `count` vectors, all masked, MSI-X off.
    ///
    /// # Errors
    /// No more eventfds, or interrupts, are to be had.
    pub(crate) fn new(count: u16, interrupts: Arc<Interrupts>) -> std::io::Result<Self> {
        let vector = |_| {
            let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
            let number = interrupts.number().ok_or(std::io::ErrorKind::OutOfMemory)?;
            Ok(Vector { message: Message::default(), masked: true, event, number, connected: false })
        };
        let vectors = (0..count).map(vector).collect::<std::io::Result<_>>()?;
        Ok(Self { vectors, control: 0, interrupts })
    }

    /// How many vectors there are.
    pub(crate) fn count(&self) -> u16 {
        self.vectors.len() as u16
    }

    /// A descriptor that signals this vector, for a device or another process; `None`: there is no such vector.
    pub(crate) fn event(&self, vector: u16) -> Option<EventFd> {
        self.vectors.get(usize::from(vector))?.event.try_clone().ok()
    }

    /// Whether the vector interrupts the guest: it is neither masked nor off.
    pub(crate) fn is_connected(&self, vector: usize) -> bool {
        self.vectors.get(vector).is_some_and(|vector| vector.connected)
    }

    /// The guest wrote the message control word.
    pub(crate) fn set_control(&mut self, control: u16) {
        self.control = control & (ENABLE | FUNCTION_MASK);
        (0..self.vectors.len()).for_each(|n| self.connect(n));
    }

    /// Reads the table; `data` is filled with zeros beyond its end.
    pub(crate) fn read_table(&self, offset: usize, data: &mut [u8]) {
        data.fill(0);
        if let Some(vector) = self.vectors.get(offset / ENTRY) {
            let entry = vector.entry();
            data.iter_mut().zip(entry.iter().skip(offset % ENTRY)).for_each(|(to, from)| *to = *from);
        }
    }

    /// Writes the table, in the double and quad words that software may use (6.8.2); others are ignored.
    pub(crate) fn write_table(&mut self, offset: usize, data: &[u8]) {
        let (n, at) = (offset / ENTRY, offset % ENTRY);
        let Some(vector) = self.vectors.get_mut(n) else { return };
        if !matches!(data.len(), 4 | 8) || !at.is_multiple_of(data.len()) {
            return;
        }
        let mut entry = vector.entry();
        entry.iter_mut().skip(at).zip(data).for_each(|(to, from)| *to = *from);
        let word =
            |at: usize| entry.iter().skip(at).take(4).rev().fold(0, |all, byte| all << 8 | u32::from(*byte));
        vector.message = Message { address: u64::from(word(4)) << 32 | u64::from(word(0)), data: word(8) };
        vector.masked = word(12) & MASKED != 0;
        self.connect(n);
    }

    /// Reads the pending bits: a masked vector whose eventfd was signalled.
    pub(crate) fn read_pending(&self, offset: usize, data: &mut [u8]) {
        for (byte, first) in data.iter_mut().zip((offset * 8..).step_by(8)) {
            let bits = self.vectors.iter().skip(first).take(8).enumerate();
            *byte = bits.fold(0, |bits, (n, vector)| bits | u8::from(vector.is_pending()) << n);
        }
    }

    /// Ties a vector's eventfd to KVM, or unties it, as its state wants it.
    fn connect(&mut self, n: usize) {
        let Some(vector) = self.vectors.get_mut(n) else { return };
        let on = self.control & ENABLE != 0 && self.control & FUNCTION_MASK == 0 && !vector.masked;
        let vm = self.interrupts.vm();
        if on && let Err(error) = self.interrupts.route(vector.number, vector.message) {
            // The guest's own mistake: this vector stays silent.
            tracing::debug!("message {:?} is not one: {error}", vector.message);
            return;
        }
        if on != vector.connected {
            let done = match on {
                true => vm.register_irqfd(&vector.event, vector.number),
                false => vm.unregister_irqfd(&vector.event, vector.number),
            };
            vector.connected = on && done.is_ok() || !on && done.is_err();
        }
    }
}

impl Vector {
    fn entry(&self) -> [u8; ENTRY] {
        let mut entry = [0; ENTRY];
        let address = self.message.address.to_le_bytes().into_iter();
        let rest = self.message.data.to_le_bytes().into_iter().chain(u32::from(self.masked).to_le_bytes());
        entry.iter_mut().zip(address.chain(rest)).for_each(|(to, from)| *to = from);
        entry
    }

    fn is_pending(&self) -> bool {
        use std::os::fd::{AsRawFd, BorrowedFd};
        // SAFETY: the eventfd is open as long as `self` lives.
        let event = unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) };
        let mut fds = [PollFd::new(event, PollFlags::POLLIN)];
        !self.connected && poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }
}
