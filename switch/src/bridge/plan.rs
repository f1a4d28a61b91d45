//! What the bridge is configured to do, worked out ahead so that a frame costs little.
//!
//! One immutable value: a change of the configuration builds another and swaps it in. Only the learning table and the storm
//! limits change while it is in use, and those are shared with the plan before and after.

use super::fdb::{Fdb, Key};
use super::portset::{MAX_PORTS, PortSet};
use super::storm::StormGuard;
use super::vlan::{Members, VlanMode};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Destination, source, type.
const ETHERNET_HEADER: u32 = 14;

/// What one port may do.
#[derive(Clone)]
pub struct PortPlan {
    /// VLANs.
    pub vlan: VlanMode,
    /// Ports of the same group do not talk to each other.
    pub isolation: Option<u16>,
    /// The largest layer-3 packet that leaves by this port, in bytes.
    pub mtu: Option<u32>,
    /// Whether source addresses are learnt.
    pub learn: bool,
    /// How many of them at most.
    pub learn_limit: u32,
    /// The addresses that frames may come from, each in its VLAN (0 on a port that is unaware of them); `None`: any station's.
    pub sources: Option<Vec<Key>>,
    /// Limits on what comes in and has to be flooded.
    pub storm: Arc<StormGuard>,
}

impl Default for PortPlan {
    fn default() -> Self {
        Self {
            vlan: VlanMode::Unaware,
            isolation: None,
            mtu: None,
            learn: true,
            learn_limit: u32::MAX,
            sources: None,
            storm: Arc::default(),
        }
    }
}

/// Why a plan cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// More ports than there are numbers.
    #[error("{0} ports: a switch has at most {MAX_PORTS}; start a second one for the others")]
    TooManyPorts(usize),
}

/// What all workers do with frames, until the next one is swapped in.
pub struct BridgePlan {
    /// Another for every plan of this process, from 1.
    pub(super) id: u64,
    ports: Box<[Option<BridgePort>]>,
    pub(super) fdb: Arc<Fdb>,
    pub(super) members: Members,
    pub(super) forward_reserved: bool,
}

/// A port's plan and what follows from it and the others'.
pub(super) struct BridgePort {
    /// Ports that it may talk to, whatever the VLAN: not itself, nobody of its isolation group.
    pub(super) reachable: PortSet,
    /// Those of them that it may talk to without regard to VLANs, if it has none.
    pub(super) untagged: PortSet,
    /// Frames no longer than this need no closer look at the MTU of this port.
    pub(super) surely_fits: u32,
    /// Whether it knows VLANs.
    pub(super) aware: bool,
    pub(super) plan: PortPlan,
}

impl BridgePlan {
    /// A bridge of `ports`, whose numbers are their places (holes are numbers that no port has).
    ///
    /// # Errors
    /// [`PlanError::TooManyPorts`].
    pub fn new(
        ports: Vec<Option<PortPlan>>,
        fdb: Arc<Fdb>,
        forward_reserved: bool,
    ) -> Result<Self, PlanError> {
        if ports.len() > MAX_PORTS {
            return Err(PlanError::TooManyPorts(ports.len()));
        }
        let present = || (0u16..).zip(&ports).filter_map(|(number, port)| Some((number, port.as_ref()?)));
        let members = Members::new(present().map(|(number, port)| (number, &port.vlan)));
        let reachable = |number: u16, own: Option<u16>| -> PortSet {
            let apart = |other: &PortPlan| own.is_some() && other.isolation == own;
            present()
                .filter(|(other, plan)| *other != number && !apart(plan))
                .map(|(other, _)| other)
                .collect()
        };
        let reachable: Vec<PortSet> = (0u16..)
            .zip(&ports)
            .map(|(number, port)| reachable(number, port.as_ref().and_then(|port| port.isolation)))
            .collect();
        let ports = ports
            .into_iter()
            .zip(reachable)
            .map(|(plan, reachable)| plan.map(|plan| BridgePort::new(plan, reachable, &members)))
            .collect();
        static LAST: AtomicU64 = AtomicU64::new(0);
        let id = LAST.fetch_add(1, Ordering::Relaxed) + 1;
        Ok(Self { id, ports, fdb, members, forward_reserved })
    }

    /// The learning table.
    pub fn fdb(&self) -> &Arc<Fdb> {
        &self.fdb
    }

    #[inline(always)]
    pub(super) fn port(&self, number: u16) -> Option<&BridgePort> {
        self.ports.get(usize::from(number))?.as_ref()
    }
}

impl BridgePort {
    fn new(mut plan: PortPlan, reachable: PortSet, members: &Members) -> Self {
        if let Some(sources) = &mut plan.sources {
            sources.sort_unstable();
        }
        Self {
            reachable,
            untagged: reachable.and(members.of(0)),
            surely_fits: plan.mtu.map_or(u32::MAX, |mtu| mtu.saturating_add(ETHERNET_HEADER)),
            aware: plan.vlan.is_aware(),
            plan,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(ports: Vec<Option<PortPlan>>) -> Result<BridgePlan, PlanError> {
        BridgePlan::new(ports, Arc::new(Fdb::new(1024).unwrap()), false)
    }

    #[test]
    fn a_port_reaches_all_others_but_those_of_its_isolation_group() {
        let group = |isolation| Some(PortPlan { isolation, ..PortPlan::default() });
        let plan = plan(vec![group(None), group(Some(1)), None, group(Some(1)), group(Some(2))]).unwrap();
        let reach = |port| plan.port(port).unwrap().reachable.iter().collect::<Vec<_>>();
        assert_eq!(
            (reach(0), reach(1), reach(3), reach(4)),
            (vec![1, 3, 4], vec![0, 4], vec![0, 4], vec![0, 1, 3])
        );
        assert!(plan.port(2).is_none() && plan.port(5).is_none());
    }

    #[test]
    fn more_ports_than_numbers_are_refused() {
        assert_eq!(plan(vec![None; MAX_PORTS + 1]).err(), Some(PlanError::TooManyPorts(257)));
        assert!(plan(vec![Some(PortPlan::default()); MAX_PORTS]).is_ok());
    }
}
