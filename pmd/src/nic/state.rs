//! Whether frames may move: what queues look at once a burst, and housekeeping decides.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::DeviceError;

/// Frames come in; what is sent is dropped.
const LINK_DOWN: u8 = 0;
/// Frames go both ways.
const UP: u8 = 1;
/// Nothing moves any more: stopped, gone or broken.
const STOPPED: u8 = 2;

/// The state of a card, shared by its handle and its queues. Begins without a link.
#[derive(Debug, Default)]
pub(crate) struct State {
    now: AtomicU8,
    reason: Mutex<Option<DeviceError>>,
    stopped: Mutex<bool>,
}

impl State {
    /// Whether frames may be sent.
    #[inline(always)]
    pub(crate) fn is_up(&self) -> bool {
        self.now.load(Ordering::Relaxed) == UP
    }

    /// Whether frames may come in.
    #[inline(always)]
    pub(crate) fn runs(&self) -> bool {
        self.now.load(Ordering::Relaxed) != STOPPED
    }

    /// The link was looked at.
    ///
    /// # Errors
    /// Nothing moves any more, for the reason that is named; everybody who asks is told.
    pub(crate) fn set_link(&self, up: bool) -> Result<(), DeviceError> {
        if let Some(reason) = self.reason().as_ref().map(ToString::to_string) {
            return Err(DeviceError::Down(reason));
        }
        // A queue may fail the device meanwhile: that stays.
        let _ = self.now.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| {
            (now != STOPPED).then_some(if up { UP } else { LINK_DOWN })
        });
        Ok(())
    }

    /// Nothing moves any more, and `reason` is why. The first one counts.
    #[cold]
    pub(crate) fn fail(&self, reason: DeviceError) {
        self.now.store(STOPPED, Ordering::Relaxed);
        self.reason().get_or_insert(reason);
    }

    /// Nothing moves any more; `stop` is what it takes to stop the device, and runs once. Whoever comes second waits for it.
    pub(crate) fn stop(&self, stop: impl FnOnce()) {
        let mut stopped = self.stopped.lock().unwrap_or_else(PoisonError::into_inner);
        if !std::mem::replace(&mut *stopped, true) {
            self.now.store(STOPPED, Ordering::Relaxed);
            stop();
        }
    }

    fn reason(&self) -> MutexGuard<'_, Option<DeviceError>> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
