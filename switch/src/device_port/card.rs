//! Network cards: what all of a switch share, how one is opened, and what housekeeping does with it until it is closed.
//!
//! Owns the address space that the cards reach memory by and the arenas in it, one for each memory node, sized for the ports of the
//! configuration: frames between cards of a node are not copied. [`super::rx`] and [`super::tx`] use the queues.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use host::memory::Pages;
use host::pci::{self, Bdf};
use host::vfio::{Faults, Interrupt, VfioError};
use nix::sys::eventfd::{EfdFlags, EventFd};
use pmd::access::Reading;
use pmd::access::vfio::{VfioFunction, VfioSpace};
use pmd::dma::{Arena, ArenaError, ArenaOptions};
use pmd::igb::VirtualFunction;
use pmd::nic::{self, AnyNic, AnyReceive, AnyTransmit, DeviceError, OpenedAny, Options};

use crate::config::{self, Behind, Config, PortConfig};

/// Bytes of rings and what belongs to them, for each queue pair: 16 or 32 a descriptor, and a header for each of virtio's.
const RING_BYTES: usize = 128 << 10;

/// How often the hardware's counters are read at least: those of 32 bits are through with 4 GiB in 34 seconds at 1 Gbit/s.
const COUNTED: Duration = Duration::from_secs(5);

/// Why a card is not open.
#[derive(Debug, thiserror::Error)]
pub enum CardError {
    /// The function cannot be had.
    #[error(transparent)]
    Vfio(#[from] VfioError),
    /// There is no memory for it.
    #[error("card {0}: {1}")]
    Memory(Bdf, ArenaError),
    /// It has fewer virtual functions than the configuration says something of.
    #[error(
        "card {bdf} has {there} virtual functions, and `vfs` says what {wanted} may: cableway nic vfs {bdf} {wanted}"
    )]
    Functions {
        /// The card.
        bdf: Bdf,
        /// In the configuration.
        wanted: usize,
        /// That there are.
        there: usize,
    },
    /// Its driver cannot start it.
    #[error("card {0}: {1}")]
    Driver(Bdf, DeviceError),
}

impl CardError {
    /// Whether another try is worth it.
    pub(crate) fn may_pass(&self) -> bool {
        match self {
            CardError::Vfio(error) => error.may_pass(),
            // A virtual function whose physical one is just being opened.
            CardError::Driver(_, error) => matches!(error, DeviceError::NoAdapter(_)),
            CardError::Memory(..) | CardError::Functions { .. } => false,
        }
    }
}

/// What the cards of a switch share. Empty until the first is opened.
#[derive(Default)]
pub(crate) struct Cards {
    space: Option<VfioSpace>,
    /// What the IOMMU refuses, if we may know.
    faults: Option<Faults>,
    /// By memory node. Gone when the last card of a node is closed.
    arenas: BTreeMap<Option<u32>, Weak<Arena>>,
    /// Queue pairs that the configuration has on each node.
    pairs: BTreeMap<Option<u32>, u32>,
}

/// A card that is open: its handle.
pub(crate) struct Card {
    nic: AnyNic,
    function: Arc<VfioFunction>,
    /// Whether there was a link when it was last looked at.
    pub(crate) link: Option<bool>,
    /// When its counters were read last.
    counted: Instant,
}

/// What opening one gives.
pub(crate) struct OpenedCard {
    pub(crate) card: Card,
    /// Receive, what tells of frames there if anything does, transmit.
    pub(crate) queues: Vec<(AnyReceive, Option<OwnedFd>, AnyTransmit)>,
    pub(crate) node: Option<u32>,
}

/// What becomes readable when frames come in on each of these queues: the card's interrupts, one for each, which come only to queues
/// that were armed.
fn bells(function: &VfioFunction, queues: &[AnyReceive]) -> io::Result<Vec<OwnedFd>> {
    let vectors: Option<Vec<u16>> = queues.iter().map(AnyReceive::vector).collect();
    let vectors = vectors.ok_or_else(|| io::Error::other("the device has none for its queues"))?;
    let most = vectors.iter().max().map_or(0, |vector| vector + 1);
    let there = function.device().interrupts(Interrupt::Msix);
    if there < u32::from(most) {
        return Err(io::Error::other(format!("it has {there} vectors of MSI-X, and {most} are wanted")));
    }
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    let events: Vec<_> = (0..most).map(|_| EventFd::from_flags(flags)).collect::<Result<_, _>>()?;
    let descriptors: Vec<_> = events.iter().map(AsFd::as_fd).collect();
    function.device().signal(Interrupt::Msix, 0, &descriptors)?;
    let of = |vector: &u16| descriptors.get(usize::from(*vector)).map(|fd| fd.try_clone_to_owned());
    vectors.iter().filter_map(of).collect()
}

/// The memory node of a card.
fn node_of(bdf: Bdf) -> Option<u32> {
    pci::find(std::path::Path::new("/"), bdf)?.node
}

/// How a port uses its card.
fn options(config: &PortConfig) -> Options {
    let mtu = config.mtu.map_or(Options::default().mtu, u32::from);
    Options { queues: config.queue_pairs, mtu, ..Options::default() }
}

impl Cards {
    /// The next arenas are made for the cards of this configuration.
    pub(crate) fn expect(&mut self, config: &Config) {
        self.pairs.clear();
        for port in &config.ports {
            if let Behind::Nic { bdf, .. } = &port.behind {
                *self.pairs.entry(node_of(*bdf)).or_default() += u32::from(port.queue_pairs);
            }
        }
    }

    /// Opens the card at `bdf` for a port.
    ///
    /// # Errors
    /// It is not there, or cannot be had.
    pub(crate) fn open(
        &mut self,
        config: &PortConfig,
        bdf: Bdf,
        token: Option<&str>,
    ) -> Result<OpenedCard, CardError> {
        let space = match self.space.take() {
            Some(space) => space,
            None => {
                self.faults = Faults::listen();
                VfioSpace::new()?
            }
        };
        let space = self.space.insert(space);
        let function = space.open(bdf, token)?;
        let (memory, node) = (space.memory(), node_of(bdf));
        let options = options(config);
        let each = options.receive_ring + options.spare + options.transmit_ring;
        let make = |pairs: u32| {
            let arena = ArenaOptions {
                rings: pairs as usize * RING_BYTES,
                buffers: pairs * each,
                pages: Pages::Auto,
                node,
            };
            Arena::new(arena, memory.clone()).map_err(|error| CardError::Memory(bdf, error))
        };
        let own = u32::from(config.queue_pairs);
        let arena = match self.arenas.get(&node).and_then(Weak::upgrade) {
            Some(arena) => arena,
            None => make(own.max(self.pairs.get(&node).copied().unwrap_or(0)))?,
        };
        let opened = match nic::open(function.clone(), &arena, options) {
            // A card that came later: memory of its own. Frames to and from it are copied.
            Err(DeviceError::Arena(ArenaError::Buffers { .. } | ArenaError::Rings { .. })) => {
                nic::open(function.clone(), &make(own)?, options)
            }
            other => other,
        };
        let OpenedAny { nic, receive, transmit } = opened.map_err(|error| CardError::Driver(bdf, error))?;
        self.arenas.insert(node, Arc::downgrade(&arena));
        let bells = bells(&function, &receive).unwrap_or_else(|error| {
            tracing::warn!("card {bdf}: its worker does not sleep, as its interrupts cannot be had: {error}");
            Vec::new()
        });
        let bells = bells.into_iter().map(Some).chain(std::iter::repeat_with(|| None));
        let pairs = receive.into_iter().zip(bells).zip(transmit);
        let queues = pairs.map(|((receive, bell), transmit)| (receive, bell, transmit)).collect();
        let mut card = Card { nic, function, link: None, counted: Instant::now() };
        card.grant(config.behind.functions())?;
        Ok(OpenedCard { card, queues, node })
    }
}

impl Cards {
    /// Cards that reached for memory that is not theirs since this was last asked, with the kernel's words.
    pub(crate) fn faults(&mut self) -> Vec<(Bdf, String)> {
        let heard = self.faults.as_mut().map(Faults::heard).unwrap_or_default();
        heard.into_iter().map(|fault| (fault.bdf, fault.text)).collect()
    }
}

impl Card {
    /// Its virtual functions.
    pub(crate) fn functions(&self) -> &[VirtualFunction] {
        self.nic.virtual_functions()
    }

    /// Changes what its virtual functions may; all or none.
    ///
    /// # Errors
    /// It has fewer, or one may not have its address.
    pub(crate) fn grant(&mut self, functions: &[config::VirtualFunction]) -> Result<(), CardError> {
        let (bdf, wanted, there) = (self.function.bdf(), functions.len(), self.functions().len());
        if wanted > there {
            return Err(CardError::Functions { bdf, wanted, there });
        }
        let settings: Vec<_> = functions.iter().map(super::functions::settings).collect();
        self.nic.set_virtual_functions(&settings).map_err(|error| CardError::Driver(bdf, error))
    }

    /// What the hardware counted since it was opened.
    pub(super) fn counters(&mut self) -> Vec<(&'static str, u64)> {
        self.counted = Instant::now();
        self.nic.statistics()
    }

    /// What its registers read.
    pub(super) fn registers(&self) -> Result<Vec<Reading>, String> {
        nic::registers(&self.function).map_err(|error| error.to_string())
    }

    /// Does one thing for each virtual function that asks for any.
    pub(super) fn answer(&mut self) {
        // What is wrong is told to who looks next.
        let _ = self.nic.link();
    }

    /// Looks at the card: whether its link changed.
    ///
    /// # Errors
    /// It must be closed, and why.
    pub(crate) fn look(&mut self) -> Result<Option<bool>, String> {
        if let Some(why) = self.function.device().must_go() {
            return Err(why.to_owned());
        }
        let link = self.nic.link().map_err(|error| error.to_string())?.up;
        // Some count no further than 2^32, and through zero.
        if self.counted.elapsed() >= COUNTED {
            self.counters();
        }
        let changed = self.link != Some(link);
        self.link = Some(link);
        Ok(changed.then_some(link))
    }
}
