//! The one trait of whatever in a machine runs by itself: vCPUs, and the threads or back ends of devices.
//!
//! Owns the order of coming to rest: all parts are told first, then all are waited for, and not for long. Pausing a machine is
//! its first use. A part at rest touches no guest memory and has nothing under way: what is left of it is its state, which
//! snapshot and migration will ask for here.

use std::time::{Duration, Instant};

/// How often parts are asked whether they rest.
const LOOK: Duration = Duration::from_micros(500);

/// A part of a machine that can come to rest and go on. Nothing is lost in between: what comes meanwhile is found afterwards.
pub(crate) trait Lifecycle {
    /// What users call it.
    fn name(&self) -> String;
    /// Begins to come to rest; does not wait.
    fn pause(&self);
    /// Whether it rests.
    fn is_paused(&self) -> bool;
    /// Goes on; a part that runs goes on running.
    fn resume(&self);
}

/// Brings all `parts` to rest.
///
/// # Errors
/// The name of one that does not rest within `patience`; all were told to go on again then.
pub(crate) fn rest(parts: &[&dyn Lifecycle], patience: Duration) -> Result<(), String> {
    let end = Instant::now() + patience;
    parts.iter().for_each(|part| part.pause());
    for part in parts {
        while !part.is_paused() {
            if Instant::now() >= end {
                parts.iter().for_each(|part| part.resume());
                return Err(part.name());
            }
            std::thread::sleep(LOOK);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    struct Part {
        told: Cell<bool>,
        obeys: bool,
    }

    impl Lifecycle for Part {
        fn name(&self) -> String {
            if self.obeys { "good" } else { "bad" }.to_owned()
        }
        fn pause(&self) {
            self.told.set(true);
        }
        fn is_paused(&self) -> bool {
            self.told.get() && self.obeys
        }
        fn resume(&self) {
            self.told.set(false);
        }
    }

    #[test]
    fn one_part_that_does_not_rest_is_named_and_all_go_on() {
        let part = |obeys| Part { told: Cell::new(false), obeys };
        let (good, bad) = (part(true), part(false));
        assert_eq!(rest(&[&good], Duration::from_secs(10)), Ok(()));
        assert!(good.told.get());
        assert_eq!(rest(&[&good, &bad], Duration::from_millis(5)), Err("bad".to_owned()));
        assert!(!good.told.get() && !bad.told.get());
    }
}
