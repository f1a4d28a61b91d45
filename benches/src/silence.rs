//! When what is on its way is given up: nothing has come for long enough.
//!
//! Owns the patience of every loop that waits for frames, and knows nothing of frames. Counts only time in which somebody
//! looked: a thread that was kept from its core, or a machine that was paused, has not heard silence.

/// Seconds of silence after which frames are lost that nobody may lose: far beyond what a scheduler keeps a thread waiting
/// on a machine that has other work, and nobody waits for it unless something is lost.
pub const NOTHING_MAY_BE_LOST: f64 = 1.0;

/// Seconds of silence after which frames are lost in a trial that is expected to lose some, so that a search for a rate does
/// not spend its time waiting.
pub const SOME_MAY_BE_LOST: f64 = 0.05;

/// So many looks, at least, find nothing before it is silent.
const LOOKS: u64 = 64;

/// Listens for silence. Times are cycles.
#[derive(Clone, Copy, Debug)]
pub struct Silence {
    limit: u64,
    passed: u64,
    looked: u64,
}

impl Silence {
    /// Begins to listen at `now`; it is silent after `limit` cycles without anything.
    pub fn new(limit: u64, now: u64) -> Self {
        Self { limit, passed: 0, looked: now }
    }

    /// Something came.
    #[inline]
    pub fn heard(&mut self, now: u64) {
        (self.passed, self.looked) = (0, now);
    }

    /// Nothing came. Returns whether it is silent.
    #[inline]
    pub fn listen(&mut self, now: u64) -> bool {
        self.passed += now.saturating_sub(self.looked).min(self.limit / LOOKS + 1);
        self.looked = now;
        self.passed > self.limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_silent_when_nothing_came_for_the_limit() {
        let mut silence = Silence::new(64_000, 0);
        assert!((1..=640).all(|look| !silence.listen(look * 100)));
        assert!(silence.listen(64_100));
    }

    #[test]
    fn what_comes_begins_the_wait_anew() {
        let mut silence = Silence::new(64_000, 0);
        assert!((1..=600).all(|look| !silence.listen(look * 100)));
        silence.heard(60_100);
        assert!((1..=640).all(|look| !silence.listen(60_100 + look * 100)));
        assert!(silence.listen(124_200));
    }

    #[test]
    fn a_pause_of_the_listener_is_not_silence() {
        let mut silence = Silence::new(64_000, 0);
        assert!(!silence.listen(1_000_000_000));
        assert!((1..=62).all(|look| !silence.listen(1_000_000_000 + look * 1_000_000)));
        let mut looks = 0;
        while !silence.listen(2_000_000_000 + looks * 1_000_000) {
            looks += 1;
        }
        assert!(looks < 4, "it ends all the same");
    }
}
