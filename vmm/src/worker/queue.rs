//! One queue of a device of our own, between DRIVER_OK and reset.
//!
//! Owns its ring and what is under way of it: fetches requests, hands them to a [`Serve`], and gives them back used, those that
//! were under way in the order in which they are done. Never waits, but for what is under way when the queue comes to rest.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use virtio::device::{DeviceRing, Direction, Layout, Ring, RingError, RingSetup, Taken};
use virtio::memory::GuestMemory;
use virtio::{features, with_ring};

use super::{Counters, PACKED_START, Serve, Served};
use crate::buffers::Request;
use crate::virtio_pci::QueueSetup;

/// Requests that begin at a time: what was done before is told to the driver in between.
const BURST: usize = 32;

/// A queue and what works on it.
pub(crate) struct Queue<S> {
    pub(crate) name: String,
    pub(crate) serve: S,
    pub(crate) counters: Arc<Counters>,
    running: Option<Running>,
}

/// A queue that is worked on.
struct Running {
    /// `None`: it made no sense.
    ring: Option<DeviceRing>,
    setup: QueueSetup,
    /// The driver was asked to say when there is something to do.
    asked: bool,
    /// A request is kept until there is something for it.
    starved: bool,
    /// What is under way: the chain, and how many bytes of it are read; by the number that its [`Serve`] gave it.
    under_way: Vec<Option<(Taken, u64)>>,
}

impl<S: Serve> Queue<S> {
    pub(crate) fn new(name: String, serve: S) -> Self {
        Self { name, serve, counters: Arc::default(), running: None }
    }

    /// Begins with the ring that the driver set up.
    ///
    /// # Errors
    /// It makes no sense.
    pub(crate) fn start(
        &mut self,
        features: u64,
        setup: QueueSetup,
        memory: &Arc<GuestMemory>,
    ) -> Result<(), RingError> {
        self.serve.start(features);
        let packed = features & features::RING_PACKED != 0;
        let ring = DeviceRing::start(RingSetup {
            layout: if packed { Layout::Packed } else { Layout::Split },
            direction: Direction::Both,
            size: setup.size,
            descriptors: setup.descriptors,
            driver: setup.driver,
            device: setup.device,
            base: Some(if packed { PACKED_START } else { 0 }),
            features,
            memory: memory.clone(),
            log: None,
            log_used: None,
            inflight: None,
        });
        let (ring, started) = match ring {
            Ok(ring) => (Some(ring), Ok(())),
            Err(error) => (None, Err(error)),
        };
        self.running = Some(Running { ring, setup, asked: true, starved: false, under_way: Vec::new() });
        started
    }

    /// Lets go of the ring, when nothing is under way any more. Whether there was one.
    pub(crate) fn stop(&mut self) -> bool {
        self.forget();
        self.running.take().is_some()
    }

    /// The ring made no sense: it is not touched any more.
    pub(crate) fn give_up(&mut self) {
        self.forget();
        if let Some(running) = &mut self.running {
            running.ring = None;
        }
    }

    /// Waits for what is under way; nobody is told of it.
    fn forget(&mut self) {
        self.serve.settle();
        while self.serve.finished().is_some() {}
    }

    /// Waits for what is under way, and tells the driver: nothing is then, until the next turn.
    pub(crate) fn rest(&mut self) {
        self.serve.settle();
        self.collect();
        self.publish();
    }

    /// Serves what is there. False if there is nothing to do for now, and one of [`Queue::sources`] says when there is.
    ///
    /// # Errors
    /// The ring makes no sense.
    pub(crate) fn turn(&mut self) -> Result<bool, RingError> {
        let mut empty = false;
        let mut worked = false;
        for _ in 0..BURST {
            let Some(Running { ring: Some(ring), asked, starved, under_way, .. }) = &mut self.running else {
                return Ok(false);
            };
            if with_ring!(ring, r => r.fetch(1))? == 0 {
                empty = true;
                break;
            }
            if std::mem::replace(asked, false) {
                ring.set_notify(false);
            }
            with_ring!(ring, r => {
                let request = Request::oldest(r.stock());
                let read = request.readable.len();
                let served = self.serve.serve(request);
                *starved = matches!(served, Served::Kept);
                match served {
                    Served::Kept => break,
                    Served::Done(written) => {
                        r.use_written(written);
                        self.counters.count(read + u64::from(written));
                        worked = true;
                        // Whoever waits for it goes on at once.
                        break;
                    }
                    Served::UnderWay(number) => {
                        let place = usize::from(number);
                        if under_way.len() <= place {
                            under_way.resize_with(place + 1, || None);
                        }
                        if let (Some(slot), Some(chain)) = (under_way.get_mut(place), r.take()) {
                            *slot = Some((chain, read));
                        }
                        worked = true;
                    }
                }
            });
        }
        let began = self.serve.begin();
        worked |= self.collect() || !began;
        self.publish();
        let Some(Running { ring: Some(ring), asked, .. }) = &mut self.running else { return Ok(false) };
        if worked || !empty {
            return Ok(worked);
        }
        // Asked first, looked at again then: nothing is missed in between.
        if !std::mem::replace(asked, true) {
            ring.set_notify(true);
        }
        Ok(ring.has_work())
    }

    /// Uses what was under way and is done. Whether there was anything.
    fn collect(&mut self) -> bool {
        let mut any = false;
        let Some(Running { ring: Some(ring), under_way, .. }) = &mut self.running else { return false };
        while let Some((number, written)) = self.serve.finished() {
            let place = under_way.get_mut(usize::from(number));
            if let Some((chain, read)) = place.and_then(Option::take) {
                with_ring!(ring, r => r.use_taken(chain, written));
                self.counters.count(read + u64::from(written));
            }
            any = true;
        }
        any
    }

    /// Tells the driver what was used.
    fn publish(&mut self) {
        let Some(Running { ring: Some(ring), setup, .. }) = &mut self.running else { return };
        let interrupt = with_ring!(ring, r => r.publish());
        if let Some(call) = setup.call.as_ref().filter(|_| interrupt) {
            host::signal::signal(descriptor(call));
            self.counters.interrupt();
        }
    }

    /// What says that there is something to do: the driver's descriptor, which is to be read then, and others.
    pub(crate) fn sources(&self) -> (Option<BorrowedFd<'_>>, Option<BorrowedFd<'_>>) {
        let Some(Running { ring: Some(_), setup, starved, .. }) = &self.running else { return (None, None) };
        let kick = (!starved).then(|| descriptor(&setup.kick));
        (kick, self.serve.source().filter(|_| *starved || self.serve.is_under_way()))
    }

    /// Forgets that the driver said something: it is looked for now.
    pub(crate) fn heard(&self) {
        if let Some(running) = &self.running {
            let _ = running.setup.kick.read();
        }
    }
}

fn descriptor(event: &vmm_sys_util::eventfd::EventFd) -> BorrowedFd<'_> {
    // SAFETY: it is open as long as `event` is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
