//! A guest that sends over vhost-user: in poll mode its frames leave the guest, it does not; a kick takes no exit to us either,
//! wherever the guest put the card.
//!
//! Owns a driver of some thirty instructions and a back end that reads its ring with the same code as a switch.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use vhost_user::backend::{self, Endpoint, Options, SessionHandle};
use vhost_user::{Device, Mode, QueueStart};
use virtio::device::{DeviceRing, Ring, RingError};
use virtio::memory::{DirtyLog, GuestMemory};
use virtio::{features, with_ring};
use vmm::ExitReason;
use vmm::machine::Ended;

use crate::guest::{Code, Guest, no_kvm};
use crate::{BAR, CARD_CONFIG, enable};

const FRAMES: u32 = 100_000;
/// The transmit ring's areas, and a frame.
const DESCRIPTORS: u32 = 0x18_0000;
const AVAIL: u32 = 0x18_1000;
const USED: u32 = 0x18_2000;
const FRAME: u32 = 0x18_4000;

/// Reads transmit ring 0 and counts what it reads.
#[derive(Default)]
struct Sink {
    /// It looks only when it was kicked.
    sleeps: bool,
    frames: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<u32>>,
}

impl Device for Sink {
    fn features(&self) -> u64 {
        features::VERSION_1
    }
    fn max_queue_pairs(&self) -> u16 {
        1
    }
    fn connected(&mut self) {}
    fn negotiated(&mut self, _: u64) {}
    fn memory(&mut self, _: Option<Arc<GuestMemory>>) {}
    fn start_queue(&mut self, index: u16, start: QueueStart) -> Result<(), RingError> {
        assert_eq!(index, 1, "only the transmit ring was set up");
        let mut ring = DeviceRing::start(start.ring)?;
        ring.set_notify(self.sleeps);
        let mut kick = start.kick.filter(|_| self.sleeps).map(std::fs::File::from);
        self.stop.store(false, Ordering::Release);
        let (frames, stop) = (self.frames.clone(), self.stop.clone());
        self.thread = Some(std::thread::spawn(move || {
            while !stop.load(Ordering::Acquire) {
                // It does not block; what it counts, or that it counts nothing, does not matter.
                let kicked = kick.as_mut().is_none_or(|kick| kick.read_exact(&mut [0; 8]).is_ok());
                if !kicked {
                    std::thread::sleep(Duration::from_millis(1));
                    continue;
                }
                let read = with_ring!(&mut ring, r => {
                    let n = r.fetch(32).unwrap();
                    r.use_read(n);
                    r.publish();
                    n
                });
                frames.fetch_add(read as u64, Ordering::Relaxed);
                if read == 0 {
                    std::thread::yield_now();
                }
            }
            ring.base()
        }));
        Ok(())
    }
    fn stop_queue(&mut self, _: u16) -> Option<u32> {
        self.stop.store(true, Ordering::Release);
        self.thread.take()?.join().ok()
    }
    fn enable_queue(&mut self, _: u16, _: bool) {}
    fn set_call(&mut self, _: u16, _: Option<OwnedFd>) {}
    fn set_log(&mut self, _: u16, _: Option<Arc<DirtyLog>>, _: Option<u64>) {}
    fn set_mtu(&mut self, _: u16) -> Result<(), String> {
        Ok(())
    }
    fn announce(&mut self, _: [u8; 6]) {}
    fn set_status(&mut self, _: u8) {}
    fn disconnected(&mut self, _: &str) {
        self.stop_queue(1);
    }
}

fn serve(socket: &Path, sink: Sink) -> SessionHandle {
    let endpoint = Endpoint { path: socket.to_owned(), mode: Mode::Server { mode: 0o600, group: None } };
    backend::serve(endpoint, Options::new("sink"), Box::new(sink)).unwrap()
}

/// The card's queue 1 with one frame in every place of its ring.
pub(crate) fn transmit_ring(code: Code, bar: u32) -> Code {
    let code = code.eax(FRAME).store(DESCRIPTORS).eax(72).store(DESCRIPTORS + 8);
    let code = code.store_byte(bar + 0x14, 3).eax(1).store(bar + 8).eax(1).store(bar + 12);
    let code = code.store_byte(bar + 0x14, 11).store_word(bar + 0x16, 1);
    let areas = [(0x20, DESCRIPTORS), (0x28, AVAIL), (0x30, USED)];
    let code = areas.into_iter().fold(code, |code, (at, area)| code.eax(area).store(bar + at));
    code.store_word(bar + 0x1c, 1).store_byte(bar + 0x14, 15)
}

/// Makes `FRAMES` frames available, as many at a time as fit the ring, and waits until all were used; never kicks.
fn send(code: Code) -> Code {
    let at = |opcode: &[u8], address: u32| [opcode, &address.to_le_bytes()].concat();
    let used = at(&[0x66, 0xa1], USED + 2); // mov ax, [used index]
    code.raw(&at(&[0xbb], FRAMES)) // mov ebx, FRAMES
        .raw(&used)
        .raw(&at(&[0x66, 0x8b, 0x0d], AVAIL + 2)) // mov cx, [avail index]
        .raw(&[0x66, 0x89, 0xca, 0x66, 0x29, 0xc2]) // mov dx, cx; sub dx, ax
        .raw(&[0x66, 0x81, 0xfa, 0, 1, 0x73, 0xe6]) // cmp dx, 256; jae to the load of the used index
        .raw(&[0x66, 0x41]) // inc cx
        .raw(&at(&[0x66, 0x89, 0x0d], AVAIL + 2)) // mov [avail index], cx
        .raw(&[0x4b, 0x75, 0xda]) // dec ebx; jnz to the same place
        .raw(&used)
        .raw(&[0x66, 0x39, 0xc8, 0x75, 0xf5]) // cmp ax, cx; jne back
}

pub(crate) fn keys(socket: &Path) -> String {
    let socket = socket.display();
    format!("memory = '2 MiB'\n[[vm.net]]\nkind = 'vhost-user'\nsocket = '{socket}'\nqueue_size = 256")
}

#[test]
fn a_guest_that_polls_sends_100_000_frames_without_an_exit_for_any() {
    if no_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let sink = Sink::default();
    let frames = sink.frames.clone();
    let _served = serve(&socket, sink);
    let code = send(transmit_ring(enable(Code::default()), BAR)).print("sent").power_off();
    let (ended, printed, exits) = Guest::start_with(&code.elf(), &keys(&socket)).end();
    assert_eq!((ended, printed.as_slice()), (Ended::PowerOff, b"sent".as_slice()));
    assert_eq!(frames.load(Ordering::Relaxed), u64::from(FRAMES));
    let all: u64 = ExitReason::ALL.iter().map(|reason| exits.of(*reason)).sum();
    // Setting the card up takes some twenty.
    assert!(all < 100, "{all} exits");
}

#[test]
fn notifications_follow_a_card_whose_bar_the_guest_moves_and_never_leave_to_us() {
    if no_kvm() {
        return;
    }
    const MOVED: u32 = 0xd123_0000;
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let sink = Sink { sleeps: true, ..Sink::default() };
    let frames = sink.frames.clone();
    let _served = serve(&socket, sink);
    let wait = [0x66, 0xa1, 0x02, 0x20, 0x18, 0, 0x66, 0x85, 0xc0, 0x74, 0xf5]; // mov ax, [used index]; test ax, ax; jz back
    let code = |kicks: u16| {
        let code = enable(Code::default()).eax(MOVED).store(CARD_CONFIG + 0x10);
        // Where it was nothing is; where it is the device's status is.
        let code = code.load(BAR + 0x14).print_eax();
        let code = transmit_ring(code, MOVED).store_word(AVAIL + 2, 1);
        (0..kicks)
            .fold(code, |code, _| code.store_word(MOVED + 0x3004, 1))
            .raw(&wait)
            .print("used")
            .power_off()
    };
    let run = |kicks| Guest::start_with(&code(kicks).elf(), &keys(&socket)).end();
    let (ended, printed, exits) = run(1);
    assert_eq!((ended, printed.as_slice()), (Ended::PowerOff, b"\xff\xff\xff\xffused".as_slice()));
    assert_eq!(frames.load(Ordering::Relaxed), 1);
    let (_, _, more) = run(1000);
    assert_eq!(more.of(ExitReason::MmioWrite), exits.of(ExitReason::MmioWrite));
}
