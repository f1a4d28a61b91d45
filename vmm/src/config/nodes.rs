//! The guest's memory nodes: what of memory and vCPUs is near which, and where on the host that is.
//!
//! Owns the rules of `numa`. A machine without it has one node that its guest is not told of, so that nobody else has to tell the two
//! apart.

use std::ops::Range;

use settings::{Problems, Spanned};

use super::keys::NumaKeys;
use super::validate::{bytes, checked_memory};
use super::{GuestNode, PageSize};
use crate::layout;

/// Regions that every vhost-user back end takes (VHOST_MEMORY_BASELINE_NREGIONS).
const MOST_REGIONS: usize = 8;
/// Distance to itself, to others by default, and what is not reachable (ACPI 6.5, 5.2.17).
const LOCAL: u8 = 10;
const REMOTE: u8 = 20;

/// What other keys say that concerns them.
pub(super) struct Given {
    /// `memory` and where it is.
    pub(super) memory: Option<(u64, Range<usize>)>,
    /// Where `node` is.
    pub(super) node: Option<Range<usize>>,
    pub(super) pages: PageSize,
    pub(super) vcpus: u32,
}

/// The nodes that `list` asks for, and what is wrong with them.
pub(super) fn nodes(
    list: Vec<Spanned<NumaKeys>>,
    given: &Given,
    problems: &mut Problems<'_>,
) -> Vec<GuestNode> {
    let count = list.len();
    let mut nodes: Vec<GuestNode> = Vec::new();
    let mut devices = None;
    let mut last = 0..0;
    for (n, keys) in list.into_iter().enumerate() {
        let span = keys.span();
        last = span.clone();
        let keys = keys.into_inner();
        if keys.memory.is_none() {
            keys.wrong.or_missing("memory", span.clone(), "as in `memory = \"1 GiB\"`", problems);
        }
        let memory = match &keys.memory {
            Some(amount) => checked_memory(&amount.span(), amount.get_ref().0, given.pages, problems),
            None => bytes(given.pages),
        };
        let mut vcpus = Vec::new();
        for vcpu in keys.vcpus.into_iter().flat_map(Spanned::into_inner) {
            let number: u32 = vcpu.get_ref().get();
            if number >= given.vcpus {
                let most = given.vcpus - 1;
                problems.add(vcpu.span(), format!("`numa`: there is no vCPU {number}; they are 0 to {most}"));
            } else if vcpus.contains(&number) || nodes.iter().any(|node| node.vcpus.contains(&number)) {
                problems
                    .add(vcpu.span(), format!("`numa`: vCPU {number} is there twice; it is near one node"));
            }
            vcpus.push(number);
        }
        if keys.devices.is_some_and(Spanned::into_inner) && devices.replace(n).is_some() {
            problems
                .add(span.clone(), "`numa`: `devices` is true of another node already; they are near one");
        }
        let distances = match keys.distances {
            Some(list) => distances(list, n, count, problems),
            None => (0..count).map(|other| if other == n { LOCAL } else { REMOTE }).collect(),
        };
        nodes.push(GuestNode {
            memory,
            vcpus,
            host: keys.node.map(|node| node.get_ref().get()),
            distances,
            devices: false,
        });
    }
    if let Some(node) = nodes.get_mut(devices.unwrap_or(0)) {
        node.devices = true;
    }
    together(&nodes, given, &last, problems);
    nodes
}

/// What the nodes mean together.
fn together(nodes: &[GuestNode], given: &Given, at: &Range<usize>, problems: &mut Problems<'_>) {
    if nodes.is_empty() {
        return;
    }
    let homeless = (0..given.vcpus).find(|vcpu| nodes.iter().all(|node| !node.vcpus.contains(vcpu)));
    if let Some(vcpu) = homeless {
        let fix = format!("as in `vcpus = [{vcpu}]`");
        problems.add(at.clone(), format!("`numa`: vCPU {vcpu} is near no node; name it with one, {fix}"));
    }
    let all: u64 = nodes.iter().map(|node| node.memory).sum();
    if let Some((memory, span)) = given.memory.as_ref().filter(|(memory, _)| *memory != all) {
        let mib = |bytes: u64| bytes >> 20;
        problems.add(
            span.clone(),
            format!(
                "`memory`: {} MiB, but the nodes of `numa` have {} MiB; leave it out",
                mib(*memory),
                mib(all)
            ),
        );
    }
    if let Some(span) = &given.node {
        problems.add(span.clone(), "`node`: with `numa` each node of the guest has its own");
    }
    let parts: Vec<u64> = nodes.iter().map(|node| node.memory).collect();
    let regions = layout::ram_in_parts(&parts).len();
    if regions > MOST_REGIONS {
        problems.add(
            at.clone(),
            format!(
                "`numa`: {regions} pieces of memory (a node on both sides of the hole at 3 GiB counts twice), and back ends take \
                 {MOST_REGIONS}; have fewer nodes, or one end at 3 GiB"
            ),
        );
    }
}

/// A node's distances, one to each node.
fn distances(
    list: Spanned<Vec<Spanned<super::keys::Distance>>>,
    own: usize,
    count: usize,
    problems: &mut Problems<'_>,
) -> Vec<u8> {
    let span = list.span();
    let distances: Vec<u8> = list.into_inner().iter().map(|distance| distance.get_ref().get()).collect();
    if distances.len() != count {
        let given = distances.len();
        problems.add(span, format!("`distances`: {given} of them for {count} nodes; give one for each"));
    } else if distances.iter().enumerate().any(|(n, distance)| (n == own) != (*distance == LOCAL)) {
        problems.add(
            span,
            format!("`distances`: to itself, the {own}th in the list, it is {LOCAL}, to others more"),
        );
    }
    distances
}
