use super::*;
use crate::bridge::{Fdb, Mac, PortPlan, StaticEntry, StormGuard, StormRate, VlanMode, VlanSet};
use port::{BurstBuffer, HEAD, Offload, Release, TagEdit};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::Arc;

const HZ: u64 = 1_000_000_000;
const ALL: u64 = 0xffff_ffff_ffff;

/// A frame to be judged: addresses by number (station `n`), an optional tag, a length.
#[derive(Clone, Copy, Debug)]
struct Sketch {
    to: u64,
    from: u64,
    tci: Option<u16>,
    len: u32,
    offload: Offload,
}

fn station(n: u64) -> u64 {
    0x02 | n << 16
}

fn frame(from: u64, to: u64) -> Sketch {
    Sketch { to: station(to), from: station(from), tci: None, len: 64, offload: Offload::NONE }
}

fn tagged(from: u64, to: u64, tci: u16) -> Sketch {
    Sketch { tci: Some(tci), ..frame(from, to) }
}

fn broadcast(from: u64) -> Sketch {
    Sketch { to: ALL, ..frame(from, 0) }
}

impl Sketch {
    fn bytes(&self) -> [u8; HEAD] {
        let mut bytes = [0; HEAD];
        bytes[..6].copy_from_slice(&self.to.to_le_bytes()[..6]);
        bytes[6..12].copy_from_slice(&self.from.to_le_bytes()[..6]);
        match self.tci {
            None => bytes[12..15].copy_from_slice(&[8, 0, 0x45]),
            Some(tci) => {
                bytes[12..14].copy_from_slice(&[0x81, 0]);
                bytes[14..16].copy_from_slice(&tci.to_be_bytes());
                bytes[16..19].copy_from_slice(&[8, 0, 0x45]);
            }
        }
        bytes
    }
}

#[derive(Default)]
struct Dropped(Vec<(FrameSet, DropReason)>);

impl Release for Dropped {
    fn release(&mut self) {}
    fn dropped(&mut self, set: FrameSet, reason: DropReason) {
        self.0.push((set, reason));
    }
}

/// What became of a burst: for each frame, the ports and edits, or the reason.
#[derive(Debug)]
struct Outcome {
    sent: Vec<Vec<(u16, TagEdit)>>,
    dropped: Vec<Option<DropReason>>,
    classified: Classified,
}

impl Outcome {
    fn ports(&self, frame: usize) -> Vec<u16> {
        let mut ports: Vec<u16> = self.sent[frame].iter().map(|(port, _)| *port).collect();
        ports.sort_unstable();
        ports
    }

    /// Every frame has outputs or one reason, and the counts say so.
    fn check(&self) {
        for (sent, dropped) in self.sent.iter().zip(&self.dropped) {
            assert_ne!(sent.is_empty(), dropped.is_none(), "{self:?}");
        }
        let switched = self.sent.iter().filter(|sent| !sent.is_empty()).count();
        let replicas: usize = self.sent.iter().map(Vec::len).sum();
        assert_eq!(self.classified, Classified { switched: switched as u32, replicas: replicas as u32 });
    }
}

/// A bridge and what a worker keeps for it.
struct Lan {
    plan: BridgePlan,
    state: IngressState,
    out: Outputs,
    now: Clock,
    /// Bursts whose way was known from the one before.
    recalled: usize,
}

impl Lan {
    fn of(ports: Vec<PortPlan>) -> Self {
        Self::with(ports, false)
    }

    fn plain(ports: usize) -> Self {
        Self::of(vec![PortPlan::default(); ports])
    }

    fn with(ports: Vec<PortPlan>, forward_reserved: bool) -> Self {
        let fdb = Arc::new(Fdb::new(1024).unwrap());
        let plan = BridgePlan::new(ports.into_iter().map(Some).collect(), fdb, forward_reserved).unwrap();
        let now = Clock { cycles: HZ, seconds: 1 };
        Self { plan, state: IngressState::default(), out: Outputs::default(), now, recalled: 0 }
    }

    fn put(&mut self, ingress: u16, frames: &[Sketch]) -> Outcome {
        let raw: Vec<_> = frames.iter().map(|frame| (frame.bytes(), frame.len, frame.offload)).collect();
        self.put_raw(ingress, &raw)
    }

    fn put_raw(&mut self, ingress: u16, frames: &[([u8; HEAD], u32, Offload)]) -> Outcome {
        let mut buffer = BurstBuffer::default();
        for (i, (bytes, len, offload)) in frames.iter().enumerate() {
            buffer.frames[i] = Frame { len: *len, first_len: *len, offload: *offload, ..Frame::EMPTY };
            let seen = (*len as usize).min(HEAD);
            buffer.heads[i].0[..seen].copy_from_slice(&bytes[..seen]);
        }
        let mut queue = Dropped::default();
        let mut burst = Burst::new(&mut queue, &buffer, frames.len());
        let mut sent = vec![vec![]; frames.len()];
        let classified = match self.plan.recall(ingress, &burst, self.now, &self.state) {
            Some(way) => {
                self.recalled += 1;
                sent.iter_mut().for_each(|ways| ways.push(way));
                Classified { switched: frames.len() as u32, replicas: frames.len() as u32 }
            }
            None => self.plan.classify(ingress, &mut burst, self.now, &mut self.state, &mut self.out),
        };
        burst.release();
        for (port, set, edit) in self.out.drain() {
            set.for_each(|i| sent[i].push((port, edit)));
        }
        let mut dropped = vec![None; frames.len()];
        for (set, reason) in queue.0 {
            set.for_each(|i| assert_eq!(dropped[i].replace(reason), None, "two reasons for one frame"));
        }
        let outcome = Outcome { sent, dropped, classified };
        outcome.check();
        outcome
    }

    /// The ports of a single frame, or its reason.
    fn one(&mut self, ingress: u16, frame: Sketch) -> Result<Vec<u16>, DropReason> {
        let outcome = self.put(ingress, &[frame]);
        outcome.dropped[0].map_or_else(|| Ok(outcome.ports(0)), Err)
    }
}

fn trunk(vlans: &[u16], native: Option<u16>) -> PortPlan {
    let vlans: VlanSet = vlans.iter().copied().collect();
    PortPlan { vlan: VlanMode::Trunk { vlans, native }, ..PortPlan::default() }
}

fn access(vid: u16) -> PortPlan {
    PortPlan { vlan: VlanMode::Access(vid), ..PortPlan::default() }
}

fn isolated(group: u16) -> PortPlan {
    PortPlan { isolation: Some(group), ..PortPlan::default() }
}

#[test]
fn what_is_unknown_is_flooded_and_what_was_learnt_goes_to_one_port() {
    let mut lan = Lan::plain(3);
    assert_eq!(lan.one(0, frame(1, 2)), Ok(vec![1, 2]));
    assert_eq!(lan.one(2, frame(2, 1)), Ok(vec![0]));
    assert_eq!(lan.one(0, frame(1, 2)), Ok(vec![2]));
    assert_eq!((lan.state.addresses.learnt.get(), lan.state.addresses.moved.get()), (2, 0));
}

#[test]
fn the_third_burst_of_a_conversation_goes_the_way_of_the_second_without_a_look_up() {
    let mut lan = Lan::plain(3);
    lan.one(2, frame(2, 1)).unwrap();
    for burst in 0..5 {
        assert_eq!(lan.one(0, frame(1, 2)), Ok(vec![2]));
        assert_eq!(lan.recalled, usize::saturating_sub(burst, 1));
    }
    // Another second, in which the source has to be refreshed; then a frame for somebody else.
    lan.now.seconds += 1;
    (0..3).for_each(|_| assert_eq!(lan.one(0, frame(1, 2)), Ok(vec![2])));
    assert_eq!(lan.recalled, 4);
    assert_eq!(lan.put(0, &[frame(1, 2), frame(1, 3)]).ports(1), [1, 2]);
    assert_eq!(lan.recalled, 4);
}

#[test]
fn a_burst_of_one_flow_and_a_burst_of_many_are_sorted_alike() {
    let mut lan = Lan::plain(4);
    for n in 0..30 {
        lan.one((n % 3) as u16 + 1, frame(n, 99)).unwrap();
    }
    lan.one(0, frame(50, 99)).unwrap();
    let many: Vec<_> = (0..64).map(|n| frame(50, n % 30)).collect();
    let outcome = lan.put(0, &many);
    (0..64).for_each(|n| assert_eq!(outcome.sent[n], [((n % 30 % 3) as u16 + 1, TagEdit::Keep)]));
    let outcome = lan.put(0, &[many[7]; 33]);
    (0..33).for_each(|n| assert_eq!(outcome.sent[n], [(2, TagEdit::Keep)]));
}

#[test]
fn an_address_behind_the_port_the_frame_came_from_gets_nothing() {
    let mut lan = Lan::plain(2);
    lan.one(0, frame(1, 9)).unwrap();
    assert_eq!(lan.one(0, frame(2, 1)), Err(DropReason::Hairpin));
}

#[test]
fn the_only_port_of_a_bridge_has_nowhere_to_send_to() {
    assert_eq!(Lan::plain(1).one(0, broadcast(1)), Err(DropReason::NoOutput));
    assert_eq!(Lan::plain(1).one(7, broadcast(1)), Err(DropReason::NoOutput));
}

#[test]
fn a_station_that_moves_is_followed_and_its_old_port_gets_nothing_more() {
    let mut lan = Lan::plain(3);
    lan.one(0, frame(1, 9)).unwrap();
    lan.one(2, frame(1, 9)).unwrap();
    assert_eq!(lan.one(1, frame(3, 1)), Ok(vec![2]));
    assert_eq!(lan.state.addresses.moved.get(), 1);
}

#[test]
fn reserved_addresses_go_nowhere_unless_asked() {
    for last in 0..=15u64 {
        let reserved = Sketch { to: 0x00c2_8001 | last << 40, ..frame(1, 0) };
        assert_eq!(Lan::plain(2).one(0, reserved), Err(DropReason::Reserved));
        assert_eq!(Lan::with(vec![PortPlan::default(); 2], true).one(0, reserved), Ok(vec![1]));
    }
    let next = Sketch { to: 0x1000_00c2_8001, ..frame(1, 0) };
    assert_eq!(Lan::plain(2).one(0, next), Ok(vec![1]));
}

#[test]
fn a_source_that_is_no_station_is_refused_and_not_learnt() {
    let mut lan = Lan::plain(2);
    for from in [0, ALL, 0x01] {
        assert_eq!(lan.one(0, Sketch { from, ..frame(1, 2) }), Err(DropReason::SourceRefused));
    }
    // In a burst of different frames too, which takes another way.
    let many: Vec<_> =
        (0..9).map(|n| Sketch { from: if n == 4 { ALL } else { station(n) }, ..frame(1, 20) }).collect();
    assert_eq!(lan.put(0, &many).dropped.iter().flatten().collect::<Vec<_>>(), [&DropReason::SourceRefused]);
    assert_eq!(lan.plan.fdb().entries().count(), 8);
}

#[test]
fn with_a_list_of_sources_nothing_else_gets_in_or_is_learnt() {
    let own = Key::new(Mac::from_wire(station(1)), 0);
    let mut lan =
        Lan::of(vec![PortPlan { sources: Some(vec![own]), ..PortPlan::default() }, PortPlan::default()]);
    assert_eq!(lan.one(0, frame(1, 2)), Ok(vec![1]));
    assert_eq!(lan.one(0, frame(2, 1)), Err(DropReason::SourceRefused));
    let outcome = lan.put(0, &[frame(1, 5), frame(3, 5), frame(1, 6)]);
    assert_eq!(outcome.dropped, [None, Some(DropReason::SourceRefused), None]);
    assert_eq!(lan.plan.fdb().entries().count(), 1);
}

#[test]
fn runts_are_counted_whatever_surrounds_them() {
    let mut lan = Lan::plain(2);
    for len in 0..14 {
        assert_eq!(lan.one(0, Sketch { len, ..frame(1, 2) }), Err(DropReason::Runt));
        let outcome = lan.put(0, &[frame(1, 2), Sketch { len, ..frame(1, 2) }, frame(3, 2)]);
        assert_eq!(outcome.dropped, [None, Some(DropReason::Runt), None]);
    }
    assert_eq!(lan.one(0, Sketch { len: 14, ..frame(1, 2) }), Ok(vec![1]));
}

#[test]
fn isolated_ports_reach_others_but_not_each_other() {
    let mut lan = Lan::of(vec![isolated(1), isolated(1), isolated(2), PortPlan::default()]);
    assert_eq!(lan.one(0, broadcast(1)), Ok(vec![2, 3]));
    assert_eq!(lan.one(1, frame(2, 1)), Err(DropReason::Isolated));
    assert_eq!(lan.one(3, frame(3, 1)), Ok(vec![0]));
    let mut alone = Lan::of(vec![isolated(1), isolated(1)]);
    assert_eq!(alone.one(0, broadcast(1)), Err(DropReason::Isolated));
}

#[test]
fn a_vlan_reaches_its_members_with_the_tag_that_each_wants() {
    let mut lan =
        Lan::of(vec![access(10), access(10), access(20), trunk(&[10, 20], None), trunk(&[20], Some(10))]);
    let outcome = lan.put(0, &[broadcast(1)]);
    assert_eq!(outcome.sent[0], [(1, TagEdit::Keep), (3, TagEdit::Push(10)), (4, TagEdit::Keep)]);
    let outcome = lan.put(3, &[Sketch { tci: Some(0x6014), ..broadcast(2) }]);
    assert_eq!(outcome.sent[0], [(2, TagEdit::Pop), (4, TagEdit::Keep)]);
    assert_eq!(lan.one(3, broadcast(2)), Err(DropReason::VlanRefused));
    assert_eq!(lan.one(0, tagged(1, 2, 10)), Err(DropReason::VlanRefused));
    // Learnt in VLAN 10 on port 0: VLAN 20 does not know it.
    assert_eq!(lan.one(3, tagged(3, 1, 10)), Ok(vec![0]));
    assert_eq!(lan.one(3, tagged(3, 1, 20)), Ok(vec![2, 4]));
}

#[test]
fn one_burst_of_a_trunk_may_need_every_edit_for_one_port() {
    let mut lan = Lan::of(vec![trunk(&[20, 30], Some(10)), trunk(&[10, 20], Some(30))]);
    let outcome = lan.put(
        0,
        &[
            broadcast(1),
            Sketch { tci: Some(0xe000), ..broadcast(1) },
            Sketch { tci: Some(20), ..broadcast(1) },
            Sketch { tci: Some(30), ..broadcast(1) },
            Sketch { tci: Some(10), ..broadcast(1) },
        ],
    );
    let edits: Vec<_> = outcome.sent.iter().map(|sent| sent[0].1).collect();
    assert_eq!(edits, [TagEdit::Push(10), TagEdit::SetVid(10), TagEdit::Keep, TagEdit::Pop, TagEdit::Keep]);
}

#[test]
fn ports_without_vlan_form_a_bridge_of_their_own() {
    let mut lan = Lan::of(vec![PortPlan::default(), PortPlan::default(), access(10), trunk(&[10], None)]);
    assert_eq!(lan.one(0, broadcast(1)), Ok(vec![1]));
    assert_eq!(lan.one(0, Sketch { tci: Some(10), ..broadcast(1) }), Ok(vec![1]));
    assert_eq!(lan.one(2, broadcast(1)), Ok(vec![3]));
}

#[test]
fn a_static_address_stays_where_it_was_put_whoever_claims_it() {
    let mut lan = Lan::plain(3);
    let at_1 = StaticEntry { mac: Mac::from_wire(station(7)), vid: 0, port: 1 };
    lan.plan.fdb().set_static(&[at_1]).unwrap();
    assert_eq!(lan.one(2, frame(7, 9)), Ok(vec![0, 1]));
    assert_eq!(lan.one(0, frame(1, 7)), Ok(vec![1]));
}

#[test]
fn a_port_that_does_not_learn_sends_but_is_never_known() {
    let mut lan = Lan::of(vec![
        PortPlan { learn: false, ..PortPlan::default() },
        PortPlan::default(),
        PortPlan::default(),
    ]);
    lan.one(1, frame(5, 9)).unwrap();
    let outcome = lan.put(0, &[frame(1, 5), frame(2, 5), Sketch { from: 0, ..frame(1, 5) }]);
    assert_eq!(outcome.dropped, [None, None, Some(DropReason::SourceRefused)]);
    assert_eq!((outcome.ports(0), outcome.ports(1)), (vec![1], vec![1]));
    assert_eq!(lan.plan.fdb().entries().count(), 1);
}

#[test]
fn a_guest_over_its_limit_of_addresses_is_still_forwarded() {
    let mut lan = Lan::of(vec![PortPlan { learn_limit: 5, ..PortPlan::default() }, PortPlan::default()]);
    lan.one(1, frame(100, 200)).unwrap();
    for n in 0..50 {
        assert_eq!(lan.one(0, frame(n, 100)), Ok(vec![1]));
    }
    let counted = &lan.state.addresses;
    assert_eq!((lan.plan.fdb().learnt_on(0), counted.learnt.get(), counted.limit_reached.get()), (5, 6, 45));
}

#[test]
fn each_kind_of_flood_has_its_own_limit_and_the_rest_passes() {
    let rate = |burst| Some(StormRate { frames: 10, burst });
    let storm = Arc::new(StormGuard::new(rate(3), rate(2), rate(1), HZ));
    let mut lan = Lan::of(vec![PortPlan { storm, ..PortPlan::default() }, PortPlan::default()]);
    lan.one(1, frame(50, 99)).unwrap();
    let mut frames = vec![];
    for n in 0..5 {
        let multicast = Sketch { to: 0x5e_0001, ..frame(n, 0) };
        frames.extend([broadcast(n), multicast, frame(n, 77), frame(n, 50)]);
    }
    let outcome = lan.put(0, &frames);
    let count = |reason| outcome.dropped.iter().filter(|dropped| **dropped == Some(reason)).count();
    assert_eq!(count(DropReason::StormBroadcast), 2);
    assert_eq!(count(DropReason::StormMulticast), 3);
    assert_eq!(count(DropReason::StormUnknown), 4);
    assert_eq!(outcome.classified.switched, 11);
    // The first of each kind pass, not any.
    assert_eq!(&outcome.dropped[..3], &[None; 3]);
    lan.now.cycles += HZ;
    assert_eq!(lan.one(0, broadcast(1)), Ok(vec![1]));
}

#[test]
fn what_is_longer_than_the_mtu_of_the_way_out_is_dropped_and_floods_reach_the_others() {
    let small = PortPlan { mtu: Some(1500), ..PortPlan::default() };
    let mut lan = Lan::of(vec![PortPlan::default(), small.clone(), PortPlan::default()]);
    lan.one(1, frame(1, 9)).unwrap();
    let long = Sketch { len: 1515, ..frame(5, 1) };
    assert_eq!(lan.one(0, long), Err(DropReason::MtuExceeded));
    assert_eq!(lan.one(0, Sketch { len: 1514, ..long }), Ok(vec![1]));
    assert_eq!(lan.one(0, Sketch { len: 1518, tci: Some(10), ..long }), Ok(vec![1]));
    assert_eq!(
        lan.put(0, &[long, frame(5, 1), long]).dropped,
        [Some(DropReason::MtuExceeded), None, Some(DropReason::MtuExceeded),]
    );
    assert_eq!(lan.one(0, Sketch { to: ALL, ..long }), Ok(vec![2]));
    let tso = Sketch { len: 30_000, offload: Offload::new(1, 1, 0, 1460, 34, 16), ..long };
    assert_eq!(lan.one(0, tso), Ok(vec![1]), "its segments fit");
    let mut all_small = Lan::of(vec![small.clone(), small]);
    assert_eq!(all_small.one(0, Sketch { to: ALL, ..long }), Err(DropReason::MtuExceeded));
}

#[test]
fn cve_2016_10377_a_frame_truncated_at_every_byte_is_judged_by_what_it_has() {
    let whole = tagged(1, 2, 10).bytes();
    for len in 0..=HEAD as u32 {
        let raw = [(whole, len, Offload::NONE)];
        let expected = if len < 14 { Some(DropReason::Runt) } else { None };
        assert_eq!(Lan::plain(2).put_raw(0, &raw).dropped, [expected], "unaware, {len}");
        let expected = expected.or((len < 18).then_some(DropReason::VlanRefused));
        let outcome = Lan::of(vec![trunk(&[10], Some(1)), access(10), access(1)]).put_raw(0, &raw);
        assert_eq!(outcome.dropped, [expected], "trunk, {len}");
        assert!(outcome.sent[0].is_empty() || outcome.sent[0] == [(1, TagEdit::Pop)]);
    }
}

#[test]
fn nested_vlan_tags_beyond_the_outermost_change_nothing() {
    let mut lan = Lan::of(vec![trunk(&[10, 20], None), access(10), access(20)]);
    for inner in [20u16, 0, 10, 4095] {
        let mut bytes = Sketch { tci: Some(10), ..broadcast(1) }.bytes();
        for at in (16..60).step_by(4) {
            bytes[at..at + 2].copy_from_slice(&[0x81, 0]);
            bytes[at + 2..at + 4].copy_from_slice(&inner.to_be_bytes());
        }
        let outcome = lan.put_raw(0, &[(bytes, 64, Offload::NONE)]);
        assert_eq!(outcome.sent[0], [(1, TagEdit::Pop)]);
    }
    // Two tags sent into an access port do not hop into the inner VLAN.
    assert_eq!(lan.one(1, tagged(1, 2, 10)), Err(DropReason::VlanRefused));
}

#[test]
fn cve_2020_35498_bytes_beyond_the_header_never_change_where_a_frame_goes() {
    let mut lan = Lan::plain(3);
    lan.one(2, frame(9, 8)).unwrap();
    for fill in [0x00, 0x45, 0x81, 0xff] {
        let mut bytes = [fill; HEAD];
        bytes[..12].copy_from_slice(&frame(1, 9).bytes()[..12]);
        for len in [14, 15, 60, 64, 9216] {
            assert_eq!(lan.put_raw(0, &[(bytes, len, Offload::NONE)]).ports(0), [2]);
        }
    }
}

/// Ports of every sort, so that any traffic meets isolation, VLANs, limits and MTUs.
fn mixed() -> Vec<PortPlan> {
    let rate = |frames| Some(StormRate { frames, burst: 5 });
    vec![
        isolated(1),
        isolated(1),
        PortPlan { isolation: Some(2), learn_limit: 3, ..PortPlan::default() },
        PortPlan {
            storm: Arc::new(StormGuard::new(rate(10), rate(10), rate(10), HZ)),
            ..PortPlan::default()
        },
        access(10),
        PortPlan { isolation: Some(1), ..access(10) },
        PortPlan { isolation: Some(1), ..access(10) },
        PortPlan { mtu: Some(1000), ..access(20) },
        trunk(&[20, 30], Some(10)),
        PortPlan { learn: false, ..trunk(&[10, 20], None) },
        PortPlan { vlan: VlanMode::Trunk { vlans: VlanSet::all(), native: Some(30) }, ..PortPlan::default() },
    ]
}

fn any_frame() -> impl Strategy<Value = Sketch> {
    let address = prop_oneof![8 => (0u64..24).prop_map(station), 1 => Just(ALL), 1 => Just(0x5e_0001u64), 1 => Just(0u64)];
    let tci = prop_oneof![
        3 => Just(None),
        3 => prop::sample::select(vec![0u16, 0xe000, 10, 20, 30, 40, 4095, 0x600a]).prop_map(Some),
    ];
    let len = prop_oneof![4 => 60u32..1518, 1 => 0u32..20];
    (address.clone(), address, tci, len).prop_map(|(to, from, tci, len)| Sketch {
        to,
        from,
        tci,
        len,
        offload: Offload::NONE,
    })
}

/// The VLAN that a frame is in when it leaves, as whoever receives it would say.
fn vlan_seen(mode: &VlanMode, frame: &Sketch, edit: TagEdit) -> Option<u16> {
    let untagged = match mode {
        VlanMode::Unaware => return Some(0),
        VlanMode::Access(vid) => Some(*vid),
        VlanMode::Trunk { native, .. } => *native,
    };
    match (edit, frame.tci) {
        (TagEdit::Push(vid) | TagEdit::SetVid(vid), _) => Some(vid),
        (TagEdit::Pop, Some(_)) | (TagEdit::Keep, None) => untagged,
        (TagEdit::Keep, Some(tci)) => Some(tci & 0xfff),
        (TagEdit::Pop, None) => panic!("no tag to take off"),
    }
}

/// What happens to a bridge.
#[derive(Clone, Debug)]
enum Happening {
    Burst {
        ingress: u16,
        frame: Sketch,
        frames: usize,
    },
    Flush(u16),
    Pin {
        station: u64,
        vid: u16,
        port: u16,
    },
    Second,
    /// A new plan, in which the first port has this MTU.
    Plan(Option<u32>),
}

fn happening() -> impl Strategy<Value = Happening> {
    let frame =
        (0u64..4, 0u64..4, prop::option::of(0u16..4), prop::sample::select(vec![17u32, 18, 64, 1514, 9000]));
    prop_oneof![
        20 => (0u16..3, frame, 1usize..4).prop_map(|(ingress, (from, to, tci, len), frames)| {
            let frame = Sketch { from: station(from), to: station(to), tci, len, offload: Offload::NONE };
            Happening::Burst { ingress, frame, frames }
        }),
        1 => (0u16..3).prop_map(Happening::Flush),
        1 => (0u64..4, 0u16..3, 0u16..3).prop_map(|(station, vid, port)| Happening::Pin { station, vid, port }),
        1 => Just(Happening::Second),
        2 => prop::option::of(46u32..54).prop_map(Happening::Plan),
    ]
}

proptest! {
    #[test]
    fn a_bridge_that_remembers_its_last_decision_decides_as_one_that_does_not(
        aware in any::<bool>(),
        happenings in prop::collection::vec((happening(), 1usize..5), 1..60),
    ) {
        let port = if aware { trunk(&[1, 2], Some(3)) } else { PortPlan::default() };
        let ports = vec![port.clone(), PortPlan { mtu: Some(1500), ..port.clone() }, PortPlan { learn: false, ..port }];
        let mut states: [IngressState; 3] = Default::default();
        let (mut remembers, mut forgets) = (Lan::of(ports.clone()), Lan::of(ports.clone()));
        for (happening, times) in happenings {
            for _ in 0..times {
                for lan in [&mut remembers, &mut forgets] {
                    match happening {
                        Happening::Burst { .. } => {}
                        Happening::Flush(port) => drop(lan.plan.fdb().flush_port(port)),
                        Happening::Pin { station: n, vid, port } => {
                            let mac = Mac::from_wire(station(n));
                            lan.plan.fdb().set_static(&[StaticEntry { mac, vid, port }]).unwrap();
                        }
                        Happening::Second => lan.now.seconds += 1,
                        Happening::Plan(mtu) => {
                            let mut ports: Vec<_> = ports.iter().cloned().map(Some).collect();
                            ports[0].as_mut().unwrap().mtu = mtu;
                            lan.plan = BridgePlan::new(ports, lan.plan.fdb.clone(), false).unwrap();
                        }
                    }
                }
                if let Happening::Burst { ingress, frame, frames } = happening {
                    let frames = vec![frame; frames];
                    forgets.state = IngressState::default();
                    // Each port has its queue.
                    remembers.state = std::mem::take(&mut states[usize::from(ingress)]);
                    let (one, other) = (remembers.put(ingress, &frames), forgets.put(ingress, &frames));
                    states[usize::from(ingress)] = std::mem::take(&mut remembers.state);
                    prop_assert_eq!(one.sent, other.sent);
                    prop_assert_eq!(one.dropped, other.dropped);
                    let entries = |lan: &Lan| {
                        let mut all: Vec<_> = lan.plan.fdb().entries().map(|e| format!("{e:?}")).collect();
                        all.sort_unstable();
                        all
                    };
                    prop_assert_eq!(entries(&remembers), entries(&forgets));
                }
            }
        }
        prop_assert_eq!(forgets.recalled, 0);
    }

    #[test]
    fn no_frame_is_lost_leaks_or_goes_back_for_any_traffic(
        bursts in prop::collection::vec((0u16..11, prop::collection::vec(any_frame(), 1..64), any::<bool>()), 1..40),
    ) {
        let ports = mixed();
        let mut lan = Lan::of(ports.clone());
        let fixed = StaticEntry { mac: Mac::from_wire(station(7)), vid: 0, port: 3 };
        lan.plan.fdb().set_static(&[fixed]).unwrap();
        for (ingress, mut frames, alike) in bursts {
            if alike {
                frames = vec![frames[0]; frames.len()];
            }
            let outcome = lan.put(ingress, &frames); // which checks that each frame has outputs or one reason
            let from = &ports[usize::from(ingress)];
            for (frame, sent) in frames.iter().zip(&outcome.sent) {
                let vid = match (&from.vlan, frame.tci.map(|tci| tci & 0xfff)) {
                    (VlanMode::Unaware, _) => Some(0),
                    (VlanMode::Access(vid), _) => Some(*vid),
                    (VlanMode::Trunk { native, .. }, None | Some(0)) => *native,
                    (VlanMode::Trunk { .. }, vid) => vid,
                };
                let mut ports_met = std::collections::BTreeSet::new();
                for &(port, edit) in sent {
                    prop_assert!(ports_met.insert(port), "twice to port {}", port);
                    let to = &ports[usize::from(port)];
                    prop_assert_ne!(port, ingress);
                    prop_assert!(from.isolation.is_none() || from.isolation != to.isolation, "isolation leaks");
                    prop_assert!(to.vlan.is_member(vid.unwrap_or(u16::MAX)), "VLAN {:?} leaks to port {}", vid, port);
                    prop_assert_eq!(vlan_seen(&to.vlan, frame, edit), vid, "VLAN changed on the way to {}", port);
                    prop_assert!(edit != TagEdit::Pop || frame.len >= 18);
                    prop_assert!(to.mtu.is_none_or(|mtu| frame.len <= mtu + 18));
                }
            }
            let known = lan.plan.fdb().lookup(fixed_key(), lan.plan.fdb().home(fixed_key())).unwrap();
            prop_assert_eq!(known.port(), 3, "a static entry moved");
            prop_assert!(lan.plan.fdb().learnt_on(2) <= 3, "a limit was passed");
            prop_assert_eq!(lan.plan.fdb().learnt_on(9), 0);
            lan.now.cycles += HZ / 20;
            lan.now.seconds += u32::from(ingress == 0);
        }
    }

    #[test]
    fn sorting_a_burst_at_once_and_frame_by_frame_comes_to_the_same(
        history in prop::collection::vec((0u16..11, any_frame()), 0..80),
        ingress in 0u16..11,
        burst in prop::collection::vec(any_frame(), 1..64),
    ) {
        let at_once = {
            let mut lan = Lan::of(mixed());
            history.iter().for_each(|(port, frame)| drop(lan.put(*port, &[*frame])));
            let outcome = lan.put(ingress, &burst);
            (outcome.sent, outcome.dropped, lan.plan.fdb().entries().map(|e| ((e.mac, e.vid), e.port)).collect::<BTreeMap<_, _>>())
        };
        let one_by_one = {
            let mut lan = Lan::of(mixed());
            history.iter().for_each(|(port, frame)| drop(lan.put(*port, &[*frame])));
            let (mut sent, mut dropped) = (vec![], vec![]);
            for frame in &burst {
                let mut outcome = lan.put(ingress, &[*frame]);
                sent.append(&mut outcome.sent);
                dropped.append(&mut outcome.dropped);
            }
            (sent, dropped, lan.plan.fdb().entries().map(|e| ((e.mac, e.vid), e.port)).collect::<BTreeMap<_, _>>())
        };
        // Within a burst, known stations are sorted before new ones are learnt: a frame to an address that the same burst
        // introduces may still be flooded. What is learnt is the same, and so is every frame that both know.
        prop_assert_eq!(&at_once.2, &one_by_one.2);
        for i in 0..burst.len() {
            if at_once.1[i] == one_by_one.1[i] && at_once.0[i].len() == 1 && one_by_one.0[i].len() == 1 {
                prop_assert_eq!(&at_once.0[i], &one_by_one.0[i]);
            }
        }
    }
}

fn fixed_key() -> Key {
    Key::new(Mac::from_wire(station(7)), 0)
}
