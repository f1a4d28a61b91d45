//! The front end against our own back end, and against one that answers nonsense or nothing.

use std::io::Read;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use super::*;
use crate::backend::{self, Endpoint, Options, SUPPORTED, SessionHandle};
use crate::{Device, Mode, QueueStart};
use nix::sys::eventfd::{EfdFlags, EventFd};
use virtio::device::{DeviceRing, Layout, RingError};
use virtio::memory::{DirtyLog, GuestMemory};

/// For what comes at once, unless the machine stands still.
const PATIENCE: Duration = Duration::from_secs(60);
/// For what does not come.
const SHORT: Duration = Duration::from_millis(20);
const SIZE: u64 = 1 << 20;
const USER: u64 = 0x7f00_0000_0000;

/// A device with real rings, that forwards nothing.
#[derive(Default)]
struct Rings {
    running: Vec<(u16, DeviceRing)>,
    enabled: Vec<u16>,
    logged: Option<u64>,
    status: u8,
}

#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Rings>>);

impl Device for Shared {
    fn features(&self) -> u64 {
        features::VERSION_1 | features::RING_PACKED | features::NET_MRG_RXBUF
    }

    fn max_queue_pairs(&self) -> u16 {
        2
    }

    fn connected(&mut self) {}

    fn negotiated(&mut self, _: u64) {}

    fn memory(&mut self, _: Option<Arc<GuestMemory>>) {}

    fn start_queue(&mut self, index: u16, start: QueueStart) -> std::result::Result<(), RingError> {
        self.0.lock().unwrap().running.push((index, DeviceRing::start(start.ring)?));
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Option<u32> {
        let mut rings = self.0.lock().unwrap();
        let at = rings.running.iter().position(|(i, _)| *i == index)?;
        Some(rings.running.remove(at).1.base())
    }

    fn enable_queue(&mut self, index: u16, _: bool) {
        self.0.lock().unwrap().enabled.push(index);
    }

    fn set_call(&mut self, _: u16, _: Option<OwnedFd>) {}

    fn set_log(&mut self, _: u16, log: Option<Arc<DirtyLog>>, used: Option<u64>) {
        self.0.lock().unwrap().logged = log.and(used);
    }

    fn set_mtu(&mut self, mtu: u16) -> std::result::Result<(), String> {
        if mtu > 9_000 { Err("too much".into()) } else { Ok(()) }
    }

    fn announce(&mut self, _: [u8; 6]) {}

    fn set_status(&mut self, status: u8) {
        self.0.lock().unwrap().status = status;
    }

    fn disconnected(&mut self, _: &str) {}
}

struct World {
    device: Shared,
    path: PathBuf,
    memory: OwnedFd,
    handle: Option<SessionHandle>,
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let memory = nix::sys::memfd::memfd_create(c"m", nix::sys::memfd::MFdFlags::empty()).unwrap();
        nix::unistd::ftruncate(&memory, SIZE as i64).unwrap();
        let mut world = Self { device: Shared::default(), path, memory, handle: None, dir };
        world.serve(Mode::server());
        world
    }

    fn serve(&mut self, mode: Mode) {
        self.handle = None;
        let endpoint = Endpoint { path: self.path.clone(), mode };
        let served = backend::serve(endpoint, Options::new("p"), Box::new(self.device.clone()));
        self.handle = Some(served.unwrap());
    }

    fn ready(&self, wanted: u64) -> FrontEnd {
        let mut front = FrontEnd::connect(&self.path, PATIENCE).unwrap();
        self.prepare(&mut front, wanted);
        front
    }

    fn prepare(&self, front: &mut FrontEnd, wanted: u64) {
        let agreed = front.negotiate(wanted, SUPPORTED).unwrap();
        assert_eq!(agreed, Agreement { features: wanted, protocol: SUPPORTED });
        let region = MemoryRegion { file: self.memory.as_fd(), size: SIZE, guest: 0, user: USER, offset: 0 };
        front.set_memory(&[region]).unwrap();
    }
}

fn queue(base: Option<u32>) -> QueueConfig<'static> {
    QueueConfig {
        size: 256,
        descriptors: USER,
        driver: USER + 0x1000,
        device: USER + 0x2000,
        base,
        log: None,
        call: None,
        kick: None,
        err: None,
    }
}

#[test]
fn both_layouts_start_stop_and_say_where_they_were() {
    for (wanted, layout, base) in [
        (features::VERSION_1, Layout::Split, 0),
        (features::VERSION_1 | features::RING_PACKED, Layout::Packed, 0x8000_8000),
    ] {
        let world = World::new();
        let mut front = world.ready(wanted);
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
        let fd = Some(event.as_fd());
        front.start_queue(1, &QueueConfig { call: fd, kick: fd, err: fd, ..queue(Some(base)) }).unwrap();
        front.enable_queue(1, true).unwrap();
        let mut rings = world.device.0.lock().unwrap();
        assert_eq!(rings.running[0].1.setup_mut().layout, layout);
        assert_eq!(rings.enabled, [1]);
        drop(rings);
        assert_eq!(front.stop_queue(1).unwrap(), base);
        assert!(world.device.0.lock().unwrap().running.is_empty());
        front.start_queue(1, &queue(Some(base))).unwrap();
    }
}

#[test]
fn a_refusal_names_the_message_and_leaves_the_session_alive() {
    let world = World::new();
    let mut front = world.ready(features::VERSION_1);
    let refused = front.start_queue(4, &queue(Some(0))).unwrap_err();
    assert_eq!(refused.to_string(), "the back end refused SET_VRING_CALL (status 1); its log may say why");
    assert!(matches!(
        front.set_mtu(9_001),
        Err(FrontEndError::Refused { message: "NET_SET_MTU", status: 1 })
    ));
    assert_eq!(front.queue_pairs().unwrap(), 2);
    front.set_mtu(1_500).unwrap();
    front.set_status(7).unwrap();
    assert_eq!(world.device.0.lock().unwrap().status, 7);
}

#[test]
fn a_packed_queue_survives_the_back_end_through_its_inflight_region() {
    let mut world = World::new();
    let packed = features::VERSION_1 | features::RING_PACKED;
    let mut front = world.ready(packed);
    let region = front.get_inflight(4, 256).unwrap();
    front.set_inflight(&region).unwrap();
    front.start_queue(1, &queue(Some(0x8005_8005))).unwrap();
    assert!(!front.is_closed());

    world.serve(Mode::server());
    assert!(front.is_closed());
    assert!(matches!(front.queue_pairs(), Err(FrontEndError::Closed { message: "GET_QUEUE_NUM" })));
    let mut front = world.ready(packed);
    front.set_inflight(&region).unwrap();
    front.start_queue(1, &queue(None)).unwrap();
    assert_eq!(front.stop_queue(1).unwrap(), 0x8005_8005);
}

#[test]
fn a_dirty_log_is_switched_on_and_off() {
    let world = World::new();
    let mut front = world.ready(features::VERSION_1);
    front.start_queue(0, &queue(Some(0))).unwrap();
    let log = nix::sys::memfd::memfd_create(c"l", nix::sys::memfd::MFdFlags::empty()).unwrap();
    nix::unistd::ftruncate(&log, 4096).unwrap();
    front.set_log(log.as_fd(), 0, 4096).unwrap();
    let own = features::VERSION_1 | features::VHOST_USER_PROTOCOL_FEATURES;
    front.set_features(own | features::VHOST_LOG_ALL).unwrap();
    front.set_addresses(0, &QueueConfig { log: Some(0x2000), ..queue(None) }).unwrap();
    assert_eq!(world.device.0.lock().unwrap().logged, Some(0x2000));
    front.set_features(own).unwrap();
    assert_eq!(world.device.0.lock().unwrap().logged, None);
}

#[test]
fn a_front_end_that_listens_accepts_one_back_end_after_another() {
    let mut world = World::new();
    world.handle = None;
    world.path = world.dir.path().join("front");
    let listener = FrontEndListener::bind(&world.path).unwrap();
    let nobody = listener.accept(Duration::from_millis(5)).unwrap_err();
    assert!(nobody.to_string().starts_with("no back end connected to "), "{nobody}");
    for _ in 0..2 {
        world.serve(Mode::Client { retry: Duration::from_millis(1) });
        let mut front = listener.accept(PATIENCE).unwrap();
        world.prepare(&mut front, features::VERSION_1);
        front.start_queue(0, &queue(Some(0))).unwrap();
    }
}

#[test]
fn nobody_there_silence_nonsense_and_hanging_up_are_told_apart() {
    let nobody = FrontEnd::connect(Path::new("/nowhere.sock"), PATIENCE).unwrap_err().to_string();
    assert!(nobody.starts_with("cannot connect to /nowhere.sock"), "{nobody}");

    let against = |answer: &[u8], hang_up: bool, patience: Duration| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        wire::send(&theirs, answer, &[]).unwrap();
        if hang_up {
            theirs.shutdown(std::net::Shutdown::Write).unwrap();
        }
        let mut front = FrontEnd::from_stream(ours, patience).unwrap();
        front.negotiate(0, ProtocolFeatures::empty()).unwrap_err().to_string()
    };
    let silent = against(&[], false, SHORT);
    assert!(silent.starts_with("the back end did not answer GET_FEATURES within 0.02"), "{silent}");
    let half = against(&wire::encode(1, REPLY, &[0; 8])[..15], false, SHORT);
    assert!(half.starts_with("the back end did not answer GET_FEATURES"), "{half}");
    let gone = against(&[], true, PATIENCE);
    assert!(gone.starts_with("the back end closed the connection at GET_FEATURES"), "{gone}");
    for (bytes, why) in [
        (wire::encode(15, REPLY, &[0; 8]), "it answers something else"),
        (wire::encode(1, 0, &[0; 8]), "it answers something else"),
        (wire::encode(1, REPLY, &[0; 4]), "it is too short"),
        (wire::encode(1, REPLY, &[0; 5_000]), "its header is malformed"),
    ] {
        let error = against(&bytes, false, PATIENCE);
        assert!(error.ends_with(why), "{error}");
    }
}

#[test]
fn a_back_end_that_is_just_not_too_late_each_time_is_given_up_all_the_same() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let late = std::thread::spawn(move || {
        let features = features::VHOST_USER_PROTOCOL_FEATURES.to_ne_bytes();
        for answer in [wire::encode(1, REPLY, &features), wire::encode(15, REPLY, &[0; 8])] {
            // Late from the question on: the two together always take longer than what is granted.
            let _ = (&theirs).read(&mut [0; 64]);
            std::thread::sleep(Duration::from_millis(300));
            // Nobody may be there any more.
            let _ = wire::send(&theirs, &answer, &[]);
        }
    });
    let mut front = FrontEnd::from_stream(ours, PATIENCE).unwrap();
    front.within(Duration::from_millis(400));
    let text = front.negotiate(0, SUPPORTED).unwrap_err().to_string();
    assert!(text.starts_with("the back end was not done within 0.4 s"), "{text}");
    drop(front);
    late.join().unwrap();
}

#[test]
fn a_socket_whose_connections_nobody_accepts_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let _listener = UnixListener::bind(&path).unwrap();
    let full = (0..10_000).find_map(|_| match FrontEnd::connect(&path, PATIENCE) {
        Ok(front) => {
            // It stays in the queue though it is closed here.
            drop(front);
            None
        }
        Err(error) => Some(error.to_string()),
    });
    let text = full.unwrap();
    assert!(text.contains("it has not accepted the connections that it has"), "{text}");
}

#[test]
fn without_protocol_features_nothing_is_acknowledged_and_rings_run_at_once() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut front = FrontEnd::from_stream(ours, PATIENCE).unwrap();
    let offer = wire::encode(1, REPLY, &features::VERSION_1.to_ne_bytes());
    wire::send(&theirs, &offer, &[]).unwrap();
    let agreed = front.negotiate(features::VERSION_1, SUPPORTED).unwrap();
    assert_eq!(agreed.protocol, ProtocolFeatures::empty());
    front.start_queue(0, &queue(Some(0))).unwrap();
    assert!(matches!(front.set_mtu(1_500), Err(FrontEndError::NotNegotiated(_))));
}
