//! A card's control queue (virtio 1.3, 5.1.6.5), and what of the card may change while its driver uses it.
//!
//! Owns commands: how many pairs of queues are used, the card's address, which frames the driver wants, that it announced itself.
//! Answers at once; whatever a back end has to do for it, its session's thread does, so that one that is late holds no driver.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use virtio::features;

use crate::buffers::{Buffers, Request};
use crate::sandbox::ThreadKind;
use crate::worker::{Serve, Served};

/// Answers.
const OK: u8 = 0;
const ERROR: u8 = 1;
/// Classes of commands, and the commands of each.
const RX: u8 = 0;
const RX_ALLMULTI: u8 = 1;
const MAC: u8 = 1;
const MAC_TABLE: u8 = 0;
const MAC_ADDRESS: u8 = 1;
const ANNOUNCE: u8 = 3;
const ANNOUNCE_ACK: u8 = 0;
const MQ: u8 = 4;
const MQ_PAIRS: u8 = 0;
/// Link status in the configuration (5.1.4).
const LINK_UP: u16 = 1;
const STATUS_ANNOUNCE: u16 = 2;

/// What a card offers because it has a control queue, besides several pairs.
pub(super) const OFFERED: u64 = features::NET_CTRL_VQ
    | features::NET_CTRL_RX
    | features::NET_CTRL_MAC_ADDR
    | features::NET_GUEST_ANNOUNCE;

/// What of a card's configuration changes. Each field has a meaning of its own, so that none waits for another.
#[derive(Debug)]
pub(crate) struct CardState {
    /// The address, its first byte lowest.
    mac: AtomicU64,
    /// There is, or was, a back end.
    link: AtomicBool,
    /// The driver is to announce itself.
    announce: AtomicBool,
    generation: AtomicU8,
}

impl CardState {
    pub(super) fn new(mac: [u8; 6], link: bool) -> Self {
        Self {
            mac: AtomicU64::new(to_number(mac)),
            link: AtomicBool::new(link),
            announce: AtomicBool::new(false),
            generation: AtomicU8::new(0),
        }
    }

    /// The card's address now.
    pub(super) fn mac(&self) -> [u8; 6] {
        let [a, b, c, d, e, f, ..] = self.mac.load(Ordering::Relaxed).to_le_bytes();
        [a, b, c, d, e, f]
    }

    fn set_mac(&self, mac: [u8; 6]) {
        self.mac.store(to_number(mac), Ordering::Relaxed);
        self.changed();
    }

    /// What the configuration says of the link.
    pub(super) fn status(&self) -> u16 {
        let bit = |flag: &AtomicBool, bit| if flag.load(Ordering::Relaxed) { bit } else { 0 };
        bit(&self.link, LINK_UP) | bit(&self.announce, STATUS_ANNOUNCE)
    }

    /// The link is up from now on; whether that is news.
    pub(super) fn link_up(&self) -> bool {
        let news = !self.link.swap(true, Ordering::Relaxed);
        if news {
            self.changed();
        }
        news
    }

    /// Whether the driver is to announce itself.
    pub(super) fn set_announce(&self, announce: bool) {
        self.announce.store(announce, Ordering::Relaxed);
        self.changed();
    }

    fn changed(&self) {
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Another number after each change.
    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }
}

fn to_number([a, b, c, d, e, f]: [u8; 6]) -> u64 {
    u64::from_le_bytes([a, b, c, d, e, f, 0, 0])
}

/// What works on the control queue.
pub(super) struct Control<F> {
    pub(super) state: std::sync::Arc<CardState>,
    /// The most pairs that the driver may use.
    pub(super) pairs: u16,
    /// What was agreed on.
    pub(super) features: u64,
    /// The driver uses so many pairs from now on.
    pub(super) use_pairs: F,
}

/// For tests of any bytes: the control queue of a card with four pairs.
#[cfg(any(test, fuzzing))]
pub(crate) fn any_control() -> impl Serve {
    let state = std::sync::Arc::new(CardState::new([2; 6], true));
    let use_pairs = |pairs| assert!((1..=4).contains(&pairs), "{pairs} of four pairs");
    Control { state, pairs: 4, features: 0, use_pairs }
}

impl<F: FnMut(u16) + Send + 'static> Serve for Control<F> {
    const KIND: ThreadKind = ThreadKind::Queue;

    fn start(&mut self, features: u64) {
        self.features = features;
    }

    fn serve(&mut self, request: Request<'_>) -> Served {
        let Request { readable, mut writable } = request;
        let answer = if self.command(readable).is_some() { OK } else { ERROR };
        Served::Done(writable.write(&[answer]))
    }
}

impl<F: FnMut(u16)> Control<F> {
    /// Does what a command asks for; `None`: it makes no sense, or is about something that was not agreed on.
    fn command(&mut self, mut asked: Buffers<'_>) -> Option<()> {
        let [class, command] = read(&mut asked)?;
        let agreed = |feature| if self.features & feature == 0 { None } else { Some(()) };
        match (class, command) {
            // A back end that filters nothing gives the guest every frame, which all of these allow.
            (RX, ..=RX_ALLMULTI) => {
                agreed(features::NET_CTRL_RX)?;
                let [on] = read(&mut asked)?;
                (on <= 1).then_some(())
            }
            (MAC, MAC_TABLE) => {
                agreed(features::NET_CTRL_RX)?;
                addresses(&mut asked)?;
                addresses(&mut asked)
            }
            (MAC, MAC_ADDRESS) => {
                agreed(features::NET_CTRL_MAC_ADDR)?;
                self.state.set_mac(read(&mut asked)?);
                Some(())
            }
            (ANNOUNCE, ANNOUNCE_ACK) => {
                agreed(features::NET_GUEST_ANNOUNCE)?;
                self.state.set_announce(false);
                Some(())
            }
            (MQ, MQ_PAIRS) => {
                agreed(features::NET_MQ)?;
                let pairs = u16::from_le_bytes(read(&mut asked)?);
                if pairs == 0 || pairs > self.pairs {
                    return None;
                }
                (self.use_pairs)(pairs);
                Some(())
            }
            _ => None,
        }
    }
}

/// The next bytes, if there are as many.
fn read<const N: usize>(from: &mut Buffers<'_>) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    from.read(&mut bytes).then_some(bytes)
}

/// A table of addresses (5.1.6.5.2): their number, and as many of six bytes.
fn addresses(from: &mut Buffers<'_>) -> Option<()> {
    let bytes = u64::from(u32::from_le_bytes(read(from)?)) * 6;
    (from.take(bytes).len() == bytes).then_some(())
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::test_driver::{DATA, Driver};
    use crate::worker::Workers;

    const ALL: u64 = features::VERSION_1 | OFFERED | features::NET_MQ;

    /// The control queue of a card with 4 pairs, and what the driver of it asked for.
    struct World {
        driver: Driver,
        state: Arc<CardState>,
        pairs: Arc<Mutex<Vec<u16>>>,
        _workers: Workers,
    }

    impl World {
        fn with(features: u64) -> Self {
            let mut driver = Driver::new();
            let (state, pairs) = (Arc::new(CardState::new([2; 6], true)), Arc::new(Mutex::new(Vec::new())));
            let seen = pairs.clone();
            let control = Control {
                state: state.clone(),
                pairs: 4,
                features: 0,
                use_pairs: move |n| seen.lock().unwrap().push(n),
            };
            let workers = Workers::new("control", &driver.for_rings(), vec![control]).unwrap();
            workers.activate(driver.activation(&[0], features));
            Self { driver, state, pairs, _workers: workers }
        }

        /// The answer to a command.
        fn command(&mut self, class: u8, command: u8, data: &[u8]) -> u8 {
            self.driver.write(DATA, &[class, command]);
            self.driver.write(DATA + 16, data);
            self.driver.write(DATA + 512, &[0xee]);
            let pieces =
                [(DATA, 2, false), (DATA + 16, data.len().max(1) as u32, false), (DATA + 512, 1, true)];
            assert_eq!(self.driver.chain(&pieces), 1);
            self.driver.read(DATA + 512, 1)[0]
        }
    }

    #[test]
    fn a_driver_sets_pairs_address_and_modes_and_hears_no_of_what_makes_no_sense() {
        let mut world = World::with(ALL);
        for (pairs, answer) in [(1, OK), (4, OK), (0, ERROR), (5, ERROR), (0xffff, ERROR)] {
            assert_eq!(world.command(MQ, MQ_PAIRS, &u16::to_le_bytes(pairs)), answer, "{pairs} pairs");
        }
        assert_eq!(*world.pairs.lock().unwrap(), [1, 4]);
        assert_eq!(world.command(MAC, MAC_ADDRESS, &[2, 0, 0, 0, 0, 7]), OK);
        assert_eq!((world.state.mac(), world.state.generation()), ([2, 0, 0, 0, 0, 7], 1));
        assert_eq!(world.command(MAC, MAC_ADDRESS, &[2, 0, 0, 0, 0]), ERROR, "too short");
        assert_eq!((world.command(RX, 0, &[1]), world.command(RX, 1, &[0])), (OK, OK));
        assert_eq!((world.command(RX, 0, &[2]), world.command(RX, 2, &[1])), (ERROR, ERROR));
        let empty = [0; 8];
        assert_eq!(world.command(MAC, MAC_TABLE, &empty), OK);
        let one_and_none = [1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0];
        assert_eq!(world.command(MAC, MAC_TABLE, &one_and_none), OK);
        let more_than_there_are = [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0];
        assert_eq!(world.command(MAC, MAC_TABLE, &more_than_there_are), ERROR);
        for class in 5..=255 {
            assert_eq!(world.command(class, 0, &[0; 16]), ERROR);
        }
    }

    #[test]
    fn an_announcement_is_wanted_until_it_is_acknowledged() {
        let mut world = World::with(ALL);
        world.state.set_announce(true);
        assert_eq!(world.state.status(), LINK_UP | STATUS_ANNOUNCE);
        assert_eq!(world.command(ANNOUNCE, ANNOUNCE_ACK, &[]), OK);
        assert_eq!(world.state.status(), LINK_UP);
    }

    #[test]
    fn what_was_not_agreed_on_is_refused() {
        let mut world = World::with(features::VERSION_1 | features::NET_CTRL_VQ);
        assert_eq!(world.command(RX, 0, &[1]), ERROR);
        assert_eq!(world.command(MAC, MAC_ADDRESS, &[2, 0, 0, 0, 0, 7]), ERROR);
        assert_eq!(world.command(MQ, MQ_PAIRS, &[2, 0]), ERROR);
        assert_eq!(world.command(ANNOUNCE, ANNOUNCE_ACK, &[]), ERROR);
        assert_eq!((world.state.mac(), world.pairs.lock().unwrap().len()), ([2; 6], 0));
    }

    #[test]
    fn a_command_without_room_for_its_answer_or_without_one_is_used_all_the_same() {
        let mut world = World::with(ALL);
        assert_eq!(world.driver.chain(&[(DATA, 1, false)]), 0);
        assert_eq!(world.driver.chain(&[(DATA, 1, true)]), 1);
        assert_eq!(world.driver.read(DATA, 1), [ERROR]);
    }
}
