//! The last decision about a frame from an ingress queue, and what it rested on.
//!
//! A conversation of two stations is one decision over and over. As long as nothing that it rested on has changed - the plan,
//! the second, the entries of both addresses in the learning table - the next frame with the same addresses goes the same
//! way. Whether that is so is a matter of a few loads at known places, which need not wait for the frame to arrive in this
//! core's cache as a look-up by its addresses must: a frame that comes alone is through the bridge 80 cycles earlier.
//!
//! Remembers only plain decisions: from a known station, which need not be refreshed before the next second, to another.

use super::classify::{Clock, IngressState, TAGGED_HEADER};
use super::fdb::{Fdb, Key, Sighting};
use super::lead::Lead;
use super::plan::BridgePlan;
use port::{Burst, TagEdit};

impl BridgePlan {
    /// Where all frames of `burst` go, with which edit, if they are of the conversation that the last burst of the queue was
    /// of. Otherwise [`BridgePlan::classify`] decides.
    #[inline(always)]
    pub fn recall(
        &self,
        ingress: u16,
        burst: &Burst<'_>,
        clock: Clock,
        state: &IngressState,
    ) -> Option<(u16, TagEdit)> {
        let (case, way) = state.recent.way(&self.fdb, ingress, clock.seconds, self.id)?;
        let (mut shortest, mut longest) = (u32::MAX, 0);
        for (head, frame) in burst.heads().iter().zip(burst.frames()) {
            if Lead::of(head).and(case.significant) != case.lead {
                return None;
            }
            shortest = shortest.min(frame.len);
            longest = longest.max(frame.len);
        }
        (shortest >= TAGGED_HEADER && longest <= way.surely_fits).then_some((way.port, way.edit))
    }
}

/// Where the frames of a conversation go.
#[derive(Clone, Copy, Debug)]
pub(super) struct Way {
    /// To this port.
    pub(super) port: u16,
    /// With this edit.
    pub(super) edit: TagEdit,
    /// Frames no longer than this surely fit.
    pub(super) surely_fits: u32,
}

/// What a decision is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Case {
    /// The bytes of the frame that count.
    pub(super) lead: Lead,
    /// The bits of the lead that count on that port.
    pub(super) significant: Lead,
    /// The port that it came in on.
    pub(super) ingress: u16,
    /// When.
    pub(super) second: u32,
    /// The number of the plan in force; no plan has the 0 of the beginning.
    pub(super) plan: u64,
}

#[derive(Clone, Copy, Debug)]
struct Decision {
    way: Way,
    /// The entry of the source, unless the port learns no addresses.
    source: Option<Sighting>,
    destination: Sighting,
}

/// The last case, and its decision if it came up twice.
#[derive(Clone, Debug, Default)]
pub(super) struct Recent {
    case: Case,
    decision: Option<Decision>,
}

impl Recent {
    /// The last case and the way of its frames, if nothing has changed since that was decided.
    #[inline(always)]
    pub(super) fn way(&self, fdb: &Fdb, ingress: u16, second: u32, plan: u64) -> Option<(&Case, &Way)> {
        let (decision, case) = (self.decision.as_ref()?, &self.case);
        let known = decision.source.as_ref().is_none_or(|source| fdb.still(source));
        let same = (case.ingress == ingress) & (case.second == second) & (case.plan == plan);
        (known & same & fdb.still(&decision.destination)).then_some((case, &decision.way))
    }

    /// Notes that the frames of `case` go that `way`, to the station `destination`; from the station `source`, if the port
    /// learns addresses. What happens only once costs no more than the note: the entries are looked for when it happens again.
    #[inline(never)]
    pub(super) fn note(&mut self, fdb: &Fdb, case: Case, way: Way, source: Option<Key>, destination: Key) {
        let again = self.case == case;
        *self = Self { case, decision: None };
        if !again {
            return;
        }
        let fresh = |seen: &Sighting| seen.value().is_fresh_at(case.ingress, case.second);
        let from = source.and_then(|key| fdb.sight(key)).filter(fresh);
        let to = fdb.sight(destination).filter(|seen| seen.value().port() == way.port);
        if let Some(destination) = to
            && from.is_some() == source.is_some()
        {
            self.decision = Some(Decision { way, source: from, destination });
        }
    }
}
