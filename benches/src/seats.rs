//! Who sits on which core: the switch's worker alone if at all possible, then the network functions.

use std::path::Path;

use host::topology::smt_siblings;
use serde::Serialize;

/// Cores for one worker and two network functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Seats {
    /// The switch's worker.
    pub worker: u32,
    /// The function that offers frames.
    pub offering: u32,
    /// The function that reflects them; on `offering`'s core they share a thread.
    pub reflecting: u32,
}

/// How much the figures of a seating are worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Worth {
    /// The worker has a core of its own.
    Sound,
    /// The worker shares the execution units of its core with another thread.
    Siblings,
    /// Everything takes turns on one core.
    Nothing,
}

impl Seats {
    /// Chooses among `cores` (of one machine, in ascending order, at least one), preferring cores that are no SMT siblings
    /// of the worker's (`siblings` gives all threads of a core's physical core).
    pub fn among(cores: &[u32], siblings: impl Fn(u32) -> Vec<u32>) -> Option<(Self, Worth)> {
        let (&worker, others) = cores.split_last()?;
        let beside = siblings(worker);
        let apart: Vec<u32> = others.iter().copied().filter(|c| !beside.contains(c)).collect();
        let (seats, worth) = match (apart.as_slice(), others) {
            ([first, second, ..], _) => ([*first, *second], Worth::Sound),
            ([only], _) => ([*only, *only], Worth::Sound),
            ([], [first, ..]) => ([*first, *first], Worth::Siblings),
            ([], []) => ([worker, worker], Worth::Nothing),
        };
        let [offering, reflecting] = seats;
        Some((Self { worker, offering, reflecting }, worth))
    }

    /// Chooses among the cores that this process may use.
    pub fn on_this_machine() -> Option<(Self, Worth)> {
        let cores: Vec<u32> = host::topology::permitted_cores().ok()?.iter().collect();
        Self::among(&cores, |core| {
            smt_siblings(Path::new("/"), core).map(|s| s.iter().collect()).unwrap_or_default()
        })
    }

    /// Whether both functions run in one thread.
    pub fn functions_share(&self) -> bool {
        self.offering == self.reflecting
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alone(core: u32) -> Vec<u32> {
        vec![core]
    }

    #[test]
    fn on_two_cores_the_worker_has_its_own_and_the_functions_share() {
        let (seats, worth) = Seats::among(&[0, 1], alone).unwrap();
        assert_eq!((seats, worth), (Seats { worker: 1, offering: 0, reflecting: 0 }, Worth::Sound));
        assert!(seats.functions_share());
    }

    #[test]
    fn with_more_cores_everyone_has_one() {
        let (seats, worth) = Seats::among(&[2, 5, 9, 11], alone).unwrap();
        assert_eq!((seats, worth), (Seats { worker: 11, offering: 2, reflecting: 5 }, Worth::Sound));
    }

    #[test]
    fn nobody_sits_beside_the_worker_while_there_is_another_core() {
        // Four threads of two cores: 0 and 2, 1 and 3.
        let (seats, worth) = Seats::among(&[0, 1, 2, 3], |c| vec![c % 2, c % 2 + 2]).unwrap();
        assert_eq!((seats, worth), (Seats { worker: 3, offering: 0, reflecting: 2 }, Worth::Sound));
        let (seats, worth) = Seats::among(&[1, 3], |c| vec![c % 2, c % 2 + 2]).unwrap();
        assert_eq!((seats, worth), (Seats { worker: 3, offering: 1, reflecting: 1 }, Worth::Siblings));
    }

    #[test]
    fn one_core_is_enough_to_run_and_not_to_measure() {
        let (seats, worth) = Seats::among(&[7], alone).unwrap();
        assert_eq!((seats, worth), (Seats { worker: 7, offering: 7, reflecting: 7 }, Worth::Nothing));
        assert_eq!(Seats::among(&[], alone), None);
    }
}
