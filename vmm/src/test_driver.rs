//! A guest's driver for tests: it writes a ring by hand, so that it can write it wrongly.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use virtio::memory::HostRange;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::config::Config;
use crate::memory::GuestMemory;
use crate::virtio_pci::{Activation, QueueSetup};

/// With a card on a back end, so that memory can be shared; nobody looks for that one.
const CONFIG: &str = "[vm]\nkernel = 'k'\nmemory = '4 MiB'\nnet = [{ kind = 'vhost-user', socket = 's' }]";
/// Where things are in the guest.
pub(crate) const DESCRIPTORS: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
/// A MiB and more for the tests' own.
pub(crate) const DATA: u64 = 0x10_0000;
/// Entries of the ring.
pub(crate) const SIZE: u16 = 16;
/// Nothing here takes long, but a busy machine may.
const PATIENCE: Duration = Duration::from_secs(60);

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// The driver of one split queue.
pub(crate) struct Driver {
    memory: Arc<GuestMemory>,
    kick: EventFd,
    avail: u16,
}

impl Driver {
    pub(crate) fn new() -> Self {
        let config = Config::parse(CONFIG, std::path::Path::new("vm.toml")).unwrap();
        // The threads of the tests' devices have the filters of their kinds.
        crate::sandbox::prepare(&config).unwrap();
        let memory = Arc::new(GuestMemory::new(&config).unwrap());
        Self { memory, kick: EventFd::new(libc::EFD_NONBLOCK).unwrap(), avail: 0 }
    }

    pub(crate) fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    pub(crate) fn for_rings(&self) -> Arc<virtio::memory::GuestMemory> {
        self.memory.for_rings().unwrap()
    }

    /// An empty ring, as queue `indices` of a device (the same one for each).
    pub(crate) fn activation(&mut self, indices: &[u16], features: u64) -> Activation {
        self.write(AVAIL, &[0; 6]);
        self.write(USED, &[0; 6]);
        self.avail = 0;
        let range = |guest, len: usize| HostRange {
            ptr: self.memory.host_address(guest, len as u64).unwrap() as *mut u8,
            len,
            guest,
        };
        let queue = |index: &u16| QueueSetup {
            index: *index,
            size: SIZE,
            descriptors: range(DESCRIPTORS, 16 * usize::from(SIZE)),
            driver: range(AVAIL, 6 + 2 * usize::from(SIZE)),
            device: range(USED, 6 + 8 * usize::from(SIZE)),
            kick: self.kick.try_clone().unwrap(),
            call: None,
        };
        Activation { features, queues: indices.iter().map(queue).collect(), changed: None }
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write("test", at, bytes).unwrap();
    }

    pub(crate) fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.view().read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// Writes a descriptor: address, length, flags, next.
    pub(crate) fn descriptor(&self, n: u16, (address, len, flags, next): (u64, u32, u16, u16)) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.write(DESCRIPTORS + 16 * u64::from(n), &bytes);
    }

    /// Makes the chain that begins with descriptor `head` available.
    pub(crate) fn offer(&mut self, head: u16) {
        self.write(AVAIL + 4 + 2 * u64::from(self.avail % SIZE), &head.to_le_bytes());
        self.avail = self.avail.wrapping_add(1);
        self.memory.view().store(self.avail, GuestAddress(AVAIL + 2), Ordering::Release).unwrap();
        self.kick.write(1).unwrap();
    }

    /// Leaves out avail entries.
    pub(crate) fn skip(&mut self, entries: u16) {
        self.avail = self.avail.wrapping_add(entries);
    }

    /// Offers a chain of these pieces: address, length, whether the device writes.
    pub(crate) fn put(&mut self, pieces: &[(u64, u32, bool)]) {
        for (n, (address, len, writes)) in (0..).zip(pieces) {
            let next = if usize::from(n) + 1 < pieces.len() { NEXT } else { 0 };
            self.descriptor(n, (*address, *len, next | if *writes { WRITE } else { 0 }, n + 1));
        }
        self.offer(0);
    }

    /// How many chains came back.
    pub(crate) fn used(&self) -> u16 {
        self.memory.view().load(GuestAddress(USED + 2), Ordering::Acquire).unwrap()
    }

    /// The head of the chain that came back as number `n`.
    pub(crate) fn used_head(&self, n: u16) -> u32 {
        let at = USED + 4 + 8 * u64::from(n % SIZE);
        self.memory.view().load(GuestAddress(at), Ordering::Relaxed).unwrap()
    }

    /// Waits until all chains came back; the last one's length.
    pub(crate) fn wait(&mut self) -> u32 {
        self.until("the request is used", |driver| driver.used() == driver.avail);
        let element = USED + 4 + 8 * u64::from(self.avail.wrapping_sub(1) % SIZE);
        u32::from_le_bytes(self.read(element + 4, 4).try_into().unwrap())
    }

    /// Offers a chain and waits until it came back.
    pub(crate) fn chain(&mut self, pieces: &[(u64, u32, bool)]) -> u32 {
        self.put(pieces);
        self.wait()
    }

    pub(crate) fn until(&self, what: &str, is: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !is(self) {
            assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
