use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use vhost_user::backend::{self, Endpoint, Options, SessionHandle};
use vhost_user::{Device, Mode, QueueStart};
use virtio::device::RingError;
use virtio::memory::DirtyLog;
use vmm_sys_util::eventfd::EventFd as Event;

use super::*;
use crate::config::{Config, NetBack};
use crate::test_driver::{DATA, Driver};

/// What a back end with three pairs was told: its queues, and whether each is enabled. It forwards nothing.
#[derive(Clone, Default)]
struct BackEnd(Arc<Mutex<BTreeMap<u16, bool>>>);

impl Device for BackEnd {
    fn features(&self) -> u64 {
        features::VERSION_1 | features::NET_MQ | features::NET_CSUM
    }
    fn max_queue_pairs(&self) -> u16 {
        3
    }
    fn connected(&mut self) {}
    fn negotiated(&mut self, _: u64) {}
    fn memory(&mut self, _: Option<Arc<virtio::memory::GuestMemory>>) {}
    fn start_queue(&mut self, index: u16, start: QueueStart) -> Result<(), RingError> {
        self.0.lock().unwrap().insert(index, start.enabled);
        Ok(())
    }
    fn stop_queue(&mut self, index: u16) -> Option<u32> {
        self.0.lock().unwrap().remove(&index).map(|_| 0)
    }
    fn enable_queue(&mut self, index: u16, enabled: bool) {
        self.0.lock().unwrap().insert(index, enabled);
    }
    fn set_call(&mut self, _: u16, _: Option<OwnedFd>) {}
    fn set_log(&mut self, _: u16, _: Option<Arc<DirtyLog>>, _: Option<u64>) {}
    fn set_mtu(&mut self, _: u16) -> Result<(), String> {
        Ok(())
    }
    fn announce(&mut self, _: [u8; 6]) {}
    fn set_status(&mut self, _: u8) {}
    fn disconnected(&mut self, _: &str) {}
}

impl BackEnd {
    fn serve(&self, socket: &Path) -> SessionHandle {
        let mode = Mode::Server { mode: 0o600, group: None };
        let endpoint = Endpoint { path: socket.to_owned(), mode };
        backend::serve(endpoint, Options::new("test"), Box::new(self.clone())).unwrap()
    }

    /// The queues that run and are enabled.
    fn enabled(&self) -> Vec<u16> {
        self.0.lock().unwrap().iter().filter(|(_, enabled)| **enabled).map(|(index, _)| *index).collect()
    }
}

fn until(what: &str, mut is: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !is() {
        assert!(Instant::now() < end, "not within a minute: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A card that asks for `queues` pairs at `socket`.
fn card(socket: &Path, queues: u16, wait: bool, memory: &Arc<GuestMemory>) -> Net {
    let text = format!(
        "[vm]\nkernel = 'k'\n[[vm.net]]\nkind = 'vhost-user'\nsocket = '{}'\nqueues = {queues}\nwait = {wait}",
        socket.display()
    );
    let config = Config::parse(&text, Path::new("vm.toml")).unwrap();
    let NetBack::VhostUser(back) = &config.net[0].back else { panic!("not a socket") };
    Net::new(&config.net[0], back, memory.clone(), crate::life::Events::new(), Ending::default()).unwrap()
}

/// What the configuration says of link and pairs.
fn status_and_pairs(card: &Net) -> (u16, u16) {
    let config = card.config();
    (u16::from_le_bytes([config[6], config[7]]), u16::from_le_bytes([config[8], config[9]]))
}

const AGREED: u64 =
    features::VERSION_1 | features::NET_CTRL_VQ | features::NET_MQ | features::NET_GUEST_ANNOUNCE;

#[test]
fn a_card_has_the_pairs_that_its_back_end_has_and_the_driver_enables_them() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let back = BackEnd::default();
    let _served = back.serve(&socket);
    let mut driver = Driver::new();
    let mut card = card(&socket, 4, true, driver.memory());
    assert_eq!((status_and_pairs(&card), card.queue_sizes().len()), ((1, 3), 7));
    assert!(
        card.features() & features::NET_MQ != 0 && card.features() & control::OFFERED == control::OFFERED
    );
    // All of these share one ring; the back end only notes them, and only the last one, for commands, is worked on.
    card.activate(driver.activation(&[0, 1, 2, 3, 4, 5, 6], AGREED));
    until("the first pair is enabled", || back.enabled() == [0, 1]);
    assert_eq!(back.0.lock().unwrap().len(), 6, "the control queue is none of the back end's");
    let mut pairs = |n: u8| {
        driver.write(DATA, &[4, 0, n, 0]);
        driver.chain(&[(DATA, 4, false), (DATA + 16, 1, true)]);
        driver.read(DATA + 16, 1)[0]
    };
    assert_eq!((pairs(4), pairs(3)), (1, 0));
    until("all are enabled", || back.enabled() == [0, 1, 2, 3, 4, 5]);
    assert_eq!(pairs(2), 0);
    until("the third is disabled", || back.enabled() == [0, 1, 2, 3]);
    card.reset();
    until("the card let go", || card.is_reset());
    assert!(back.0.lock().unwrap().is_empty());
    // A driver that knows of one pair has its commands behind that.
    card.activate(driver.activation(&[0, 1, 2], AGREED & !features::NET_MQ));
    until("the pair is enabled", || back.enabled() == [0, 1]);
    driver.write(DATA, &[3, 0]);
    assert_eq!(driver.chain(&[(DATA, 2, false), (DATA + 16, 1, true)]), 1);
}

#[test]
fn the_driver_is_to_announce_itself_to_the_next_back_end_whose_queues_are_as_it_wants_them() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let (first, second) = (BackEnd::default(), BackEnd::default());
    let served = first.serve(&socket);
    let mut driver = Driver::new();
    let mut card = card(&socket, 2, true, driver.memory());
    let changed = Event::new(libc::EFD_NONBLOCK).unwrap();
    let activation = driver.activation(&[0, 1, 2, 3, 4], AGREED);
    card.activate(Activation { changed: Some(changed.try_clone().unwrap()), ..activation });
    until("the first pair is enabled", || first.enabled() == [0, 1]);
    driver.write(DATA, &[4, 0, 2, 0]);
    driver.chain(&[(DATA, 4, false), (DATA + 16, 1, true)]);
    until("both are enabled", || first.enabled() == [0, 1, 2, 3]);
    let before = card.generation();
    assert_eq!((status_and_pairs(&card), changed.read().is_err()), ((1, 2), true));
    served.stop();
    let _served = second.serve(&socket);
    until("the next one has the same queues", || second.enabled() == [0, 1, 2, 3]);
    until("the driver is told", || changed.read().is_ok());
    assert_eq!(status_and_pairs(&card), (3, 2));
    assert_ne!(card.generation(), before);
    driver.write(DATA, &[3, 0]);
    driver.chain(&[(DATA, 2, false), (DATA + 16, 1, true)]);
    assert_eq!(status_and_pairs(&card), (1, 2));
}

#[test]
fn the_link_is_down_until_a_back_end_was_there() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let mut driver = Driver::new();
    let mut card = card(&socket, 2, false, driver.memory());
    assert_eq!((status_and_pairs(&card), card.features() & features::NET_MQ), ((0, 1), 0));
    let changed = Event::new(libc::EFD_NONBLOCK).unwrap();
    let activation = driver.activation(&[0, 1], features::VERSION_1);
    card.activate(Activation { changed: Some(changed.try_clone().unwrap()), ..activation });
    let back = BackEnd::default();
    let served = back.serve(&socket);
    until("the queues run", || back.enabled() == [0, 1]);
    until("the driver is told", || changed.read().is_ok());
    assert_eq!(status_and_pairs(&card), (1, 1));
    served.stop();
    assert_eq!(status_and_pairs(&card), (1, 1), "it may come back");
}

#[test]
fn a_machine_that_does_not_wait_is_not_held_by_a_back_end_that_never_answers() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let mut driver = Driver::new();
    // Accepted by the kernel, and by nobody else.
    let silent = UnixListener::bind(&socket).unwrap();
    // This machine's cores may stall for as long as an answer is waited for otherwise; not each time.
    let made = (0..5).find_map(|_| {
        let start = Instant::now();
        let card = card(&socket, 2, false, driver.memory());
        (start.elapsed() < Duration::from_secs(2)).then_some(card)
    });
    let mut card = made.unwrap();
    assert_eq!((status_and_pairs(&card), card.features() & features::NET_MQ), ((0, 1), 0));
    let changed = Event::new(libc::EFD_NONBLOCK).unwrap();
    let activation = driver.activation(&[0, 1], features::VERSION_1);
    card.activate(Activation { changed: Some(changed.try_clone().unwrap()), ..activation });
    drop(silent);
    std::fs::remove_file(&socket).unwrap();
    let back = BackEnd::default();
    let _served = back.serve(&socket);
    until("the queues run", || back.enabled() == [0, 1]);
    until("the driver is told", || changed.read().is_ok());
    assert_eq!(status_and_pairs(&card), (1, 1));
}

#[test]
fn a_card_that_was_reset_before_it_was_started_holds_its_queues_until_the_reset_after() {
    let dir = tempfile::tempdir().unwrap();
    let mut card = card(&dir.path().join("nobody"), 1, false, Driver::new().memory());
    // A driver resets a card that it finds (virtio 1.3, 3.1.1).
    card.reset();
    assert!(card.is_reset(), "there is nothing to let go of");
    card.activate(Activation { features: features::VERSION_1, queues: Vec::new(), changed: None });
    // Longer than the thread takes to hear of both.
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(25));
        assert!(!card.is_reset(), "nobody asked for it");
    }
    card.reset();
    until("it lets go of its queues", || card.is_reset());
}

#[test]
fn a_machine_at_rest_takes_the_rings_back_and_its_back_end_gets_them_again() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let back = BackEnd::default();
    let _served = back.serve(&socket);
    let mut driver = Driver::new();
    let mut card = card(&socket, 1, true, driver.memory());
    card.activate(driver.activation(&[0, 1, 2], AGREED & !features::NET_MQ));
    until("it runs", || back.enabled() == [0, 1]);
    for _ in 0..3 {
        card.lifecycle().pause();
        until("it rests", || card.lifecycle().is_paused());
        assert_eq!(back.0.lock().unwrap().len(), 0, "the back end has rings yet");
        card.lifecycle().resume();
        until("it goes on", || back.enabled() == [0, 1]);
    }
    assert_eq!(card.back_end(), Some(true));
}
