//! The virtual functions of a port's card: what they may, and the thread that answers what they ask.
//!
//! Owns that thread, on a housekeeping core: it answers one request of each function a turn, so that one that asks without end gets
//! what the others get, and delays neither them nor housekeeping.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{RecvTimeoutError, Sender, bounded};
use pmd::igb::Settings;

use super::card::Card;
use crate::config::VirtualFunction;

/// How often requests are looked for. Intel's drivers of functions wait for an answer half a second and more.
const TURN: Duration = Duration::from_millis(20);

/// A card between its opening and its end, for housekeeping and the thread that answers.
pub(super) type SharedCard = Arc<Mutex<Option<Card>>>;

/// What the configuration says, in the driver's terms.
pub(super) fn settings(function: &VirtualFunction) -> Settings {
    let VirtualFunction { mac, vlan, qos, trust, spoof_check } = *function;
    let vlan = vlan.map(|vlan| u16::from(qos) << 13 | vlan);
    Settings { mac, vlan, trusted: trust, spoof_check }
}

/// The thread that answers. Ends when dropped.
pub(super) struct Answering {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Answering {
    /// Answers the functions of `card` while it is open.
    ///
    /// # Errors
    /// The process may have no more threads.
    pub(super) fn start(card: SharedCard) -> std::io::Result<Self> {
        let (stop, stopped) = bounded::<()>(0);
        let answer = move || {
            while stopped.recv_timeout(TURN) == Err(RecvTimeoutError::Timeout) {
                if let Some(card) = card.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
                    card.answer();
                }
            }
        };
        let thread = std::thread::Builder::new().name("card".into()).spawn(answer)?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
