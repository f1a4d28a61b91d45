//! Which worker polls which queue.
//!
//! Pinned queues stay where the user put them; the others go to the worker that has least to do, measured by what came in
//! lately, on the memory's NUMA node where there is a choice. Pure: knows numbers, no threads.

/// A queue that wants a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Queue {
    /// The worker that the user named.
    pub(super) pinned: Option<usize>,
    /// Where it is now.
    pub(super) current: Option<usize>,
    /// NUMA node of its guest's memory.
    pub(super) node: Option<u32>,
    /// What it costs: see [`load`].
    pub(super) load: u64,
}

/// A move must take at least this share (in percent) of the difference between two workers to be worth a cold cache.
const WORTH_MOVING_PERCENT: u64 = 25;

/// What a queue costs a worker: about the cycles of `frames` frames with `bytes` bytes together.
pub(super) fn load(frames: u64, bytes: u64) -> u64 {
    frames * 90 + bytes / 12
}

/// The worker of each queue, given the node of each worker. Queues that have a place keep it.
pub(super) fn place(queues: &[Queue], workers: &[Option<u32>]) -> Vec<usize> {
    let count = workers.len().max(1);
    let mut loads = vec![(0u64, 0usize); count];
    let mut placed: Vec<Option<usize>> = Vec::with_capacity(queues.len());
    for q in queues {
        let fixed = q.pinned.or(q.current).filter(|w| *w < count);
        if let Some((load, n)) = fixed.and_then(|w| loads.get_mut(w)) {
            (*load, *n) = (*load + q.load, *n + 1);
        }
        placed.push(fixed);
    }
    for (q, place) in queues.iter().zip(&mut placed) {
        if place.is_some() {
            continue;
        }
        let near = |w: usize| q.node.is_none() || workers.get(w).copied().flatten() == q.node;
        let best = (0..count).min_by_key(|w| (!near(*w), loads.get(*w).copied().unwrap_or_default()));
        let best = best.unwrap_or(0);
        if let Some((load, n)) = loads.get_mut(best) {
            (*load, *n) = (*load + q.load, *n + 1);
        }
        *place = Some(best);
    }
    placed.into_iter().map(|p| p.unwrap_or(0)).collect()
}

/// One queue to move, and where to, if that evens out the load; the user's pins are left alone, and no queue leaves its
/// memory's node.
pub(super) fn rebalance(queues: &[Queue], workers: &[Option<u32>]) -> Option<(usize, usize)> {
    let mut loads = vec![0u64; workers.len()];
    for q in queues {
        if let Some(load) = q.current.and_then(|w| loads.get_mut(w)) {
            *load += q.load;
        }
    }
    let (busiest, most) = loads.iter().copied().enumerate().max_by_key(|(_, l)| *l)?;
    let mut best = None;
    for (i, q) in queues.iter().enumerate().filter(|(_, q)| q.current == Some(busiest) && q.pinned.is_none())
    {
        for (w, least) in loads.iter().copied().enumerate().filter(|(w, _)| *w != busiest) {
            if q.node.is_some() && workers.get(w).copied().flatten() != q.node {
                continue;
            }
            // Behind the move the busier of the two has less than before.
            let after = (most - q.load).max(least + q.load);
            let gain = most.saturating_sub(after);
            if gain * 100 >= most * WORTH_MOVING_PERCENT && best.is_none_or(|(g, _, _)| gain > g) {
                best = Some((gain, i, w));
            }
        }
    }
    best.map(|(_, i, w)| (i, w))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(load: u64) -> Queue {
        Queue { pinned: None, current: None, node: None, load }
    }

    #[test]
    fn queues_spread_evenly_and_pins_are_kept() {
        let mut queues = vec![queue(0); 4];
        queues[0].pinned = Some(1);
        assert_eq!(place(&queues, &[None, None]), [1, 0, 0, 1]);
    }

    #[test]
    fn a_new_queue_goes_to_the_idler_worker_on_its_memorys_node() {
        let busy = Queue { current: Some(0), ..queue(1_000) };
        assert_eq!(place(&[busy, queue(0)], &[None, None]), [0, 1]);
        let far = Queue { node: Some(0), ..queue(0) };
        assert_eq!(place(&[busy, far], &[Some(0), Some(1)]), [0, 0]);
    }

    #[test]
    fn a_queue_moves_only_where_it_evens_out_the_load() {
        let on = |w, load| Queue { current: Some(w), ..queue(load) };
        assert_eq!(rebalance(&[on(0, 500), on(0, 500), on(1, 0)], &[None, None]), Some((0, 1)));
        assert_eq!(
            rebalance(&[on(0, 1_000), on(1, 0)], &[None, None]),
            None,
            "one queue is as heavy there as here"
        );
        assert_eq!(
            rebalance(&[on(0, 100), on(0, 10), on(1, 90)], &[None, None]),
            None,
            "not worth a cold cache"
        );
        let pinned = Queue { pinned: Some(0), ..on(0, 500) };
        assert_eq!(rebalance(&[pinned, pinned], &[None, None]), None);
    }

    #[test]
    fn a_worker_that_is_gone_places_nothing() {
        assert_eq!(place(&[Queue { current: Some(7), ..queue(0) }], &[None]), [0]);
    }
}
