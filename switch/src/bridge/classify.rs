//! The main path: a burst comes in on a port, and each frame gets its outputs or its drop reason.
//!
//! Frames of a burst are usually alike: the same two stations talk. So the first look is whether they all are; then
//! one decision serves the burst. Otherwise the addresses of the whole burst are prefetched and looked up without branches, and
//! only what is not plain (unknown, new, a group, refused) is decided one by one.

#[cfg(test)]
mod tests;

use super::fdb::{Home, Key, Learn, Value};
use super::lead::Lead;
use super::mtu::layer3_size;
use super::outputs::Outputs;
use super::plan::{BridgePlan, BridgePort};
use super::portset::MAX_PORTS;
use super::recent::{Case, Recent, Way};
use super::storm::Flood;
use super::vlan::Class;
use crate::counters::AddressCounters;
use port::{Burst, DropReason, Frame, FrameSet, Head, MAX_BURST};
use std::sync::Arc;

/// Bytes of an Ethernet header; shorter frames are runts.
const ETHERNET_HEADER: u32 = 14;
/// From this length on, a frame's length changes nothing about how its header is read.
pub(super) const TAGGED_HEADER: u32 = 18;
/// 01:80:c2:00:00:0x as a little-endian load finds it, and the bits that count.
const RESERVED: u64 = 0x0000_00c2_8001;
const RESERVED_MASK: u64 = 0xf0ff_ffff_ffff;
const BROADCAST: u64 = 0xffff_ffff_ffff;

/// The time of a burst.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// Time stamp counter, for storm limits.
    pub cycles: u64,
    /// Seconds since some fixed moment, for the age of addresses.
    pub seconds: u32,
}

/// What became of the frames of a burst. Those that were not switched are counted under one drop reason each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Classified {
    /// Frames that go to at least one port.
    pub switched: u32,
    /// Copies to be sent: one for each frame and port.
    pub replicas: u32,
}

/// What an ingress queue knows of the addresses that came in on it. Owned by the worker that polls the queue.
#[derive(Clone, Debug, Default)]
pub struct IngressState {
    /// What became of them, for whoever reports it.
    pub addresses: Arc<AddressCounters>,
    pub(super) recent: Recent,
}

impl IngressState {
    /// Of a queue that counts in `addresses`.
    pub fn new(addresses: Arc<AddressCounters>) -> Self {
        Self { addresses, recent: Recent::default() }
    }
}

/// Decided for a frame, and for all that are alike.
#[derive(Clone, Copy)]
enum Verdict {
    Refuse(DropReason),
    Send(u16, Class),
    Flood(Flood, Class),
}

/// A burst while it is being judged.
struct Bench<'a> {
    plan: &'a BridgePlan,
    ingress: u16,
    port: &'a BridgePort,
    clock: Clock,
    heads: &'a [Head],
    frames: &'a [Frame],
    /// The bits of [`Lead`] that a decision depends on.
    significant: Lead,
    /// Length of the longest frame.
    longest: u32,
    state: &'a mut IngressState,
    out: &'a mut Outputs,
    /// Frames to be flooded, by kind.
    floods: [FrameSet; 3],
}

impl BridgePlan {
    /// Decides where the frames of `burst`, which came in on port `ingress`, go. What goes nowhere is counted as dropped;
    /// everything else is in `out`, which is emptied first.
    pub fn classify(
        &self,
        ingress: u16,
        burst: &mut Burst<'_>,
        clock: Clock,
        state: &mut IngressState,
        out: &mut Outputs,
    ) -> Classified {
        out.begin();
        let all = burst.all();
        match self.port(ingress) {
            Some(port) => {
                let (heads, frames) = (burst.heads(), burst.frames());
                // An unaware port's frames are judged by their addresses alone.
                let significant = Lead(u64::MAX, if port.aware { u64::MAX } else { 0xffff_ffff });
                let mut bench = Bench {
                    plan: self,
                    ingress,
                    port,
                    clock,
                    heads,
                    frames,
                    significant,
                    longest: 0,
                    state,
                    out,
                    floods: [FrameSet::EMPTY; 3],
                };
                bench.judge_all(all);
            }
            None => out.refuse(all, DropReason::NoOutput), // the port left the configuration with frames in its ring
        }
        out.drain_refused(|set, reason| burst.drop_frames(set, reason));
        Classified { switched: out.switched.len() as u32, replicas: out.replicas }
    }
}

impl Bench<'_> {
    #[inline(always)]
    fn judge_all(&mut self, all: FrameSet) {
        let Some(first) = self.heads.first().map(Lead::of) else { return };
        let mut differ = Lead(0, 0);
        let mut shortest = u32::MAX;
        for (head, frame) in self.heads.iter().zip(self.frames) {
            let lead = Lead::of(head);
            differ = Lead(differ.0 | lead.0 ^ first.0, differ.1 | lead.1 ^ first.1);
            self.longest = self.longest.max(frame.len);
            shortest = shortest.min(frame.len);
        }
        let alike = differ.0 & self.significant.0 | differ.1 & self.significant.1 == 0;
        if alike && (shortest >= TAGGED_HEADER || shortest == self.longest) {
            self.judge_alike(first, shortest, all);
        } else if self.port.plan.sources.is_none() && shortest >= ETHERNET_HEADER {
            let odd = if self.port.aware { self.sort_plain::<true>() } else { self.sort_plain::<false>() };
            self.judge_each(odd);
        } else {
            self.judge_each(all);
        }
        if self.floods != [FrameSet::EMPTY; 3] {
            self.flood_all();
        }
    }

    /// One decision for all.
    fn judge_alike(&mut self, first: Lead, shortest: u32, all: FrameSet) {
        let (significant, fdb) = (self.significant, &*self.plan.fdb);
        let verdict = self.judge(first, shortest);
        self.carry_out(verdict, all);
        if let Verdict::Send(port, class) = verdict
            && shortest >= TAGGED_HEADER
            && let Some(output) = self.plan.port(port)
        {
            let (ingress, second, plan) = (self.ingress, self.clock.seconds, self.plan.id);
            let case = Case { lead: first.and(significant), significant, ingress, second, plan };
            let way = Way { port, edit: output.plan.vlan.edit(class), surely_fits: output.surely_fits };
            let source = self.port.plan.learn.then(|| Key::from_wire(first.source(), class.vid));
            let destination = Key::from_wire(first.destination(), class.vid);
            self.state.recent.note(fdb, case, way, source, destination);
        }
    }

    /// Sends on what is plain: from and to known stations. Returns the rest. No frame is a runt.
    fn sort_plain<const AWARE: bool>(&mut self) -> FrameSet {
        let fdb = &*self.plan.fdb;
        let mut homes = [[Home::default(); 2]; MAX_BURST];
        let mut odd = FrameSet::EMPTY;
        let frames = self.heads.iter().zip(self.frames).zip(self.out.classes.iter_mut());
        for (i, (((head, frame), class), homes)) in frames.zip(&mut homes).enumerate() {
            let lead = Lead::of(head);
            let mut vid = 0;
            if AWARE {
                let classified = self.port.plan.vlan.classify(lead.kind(), lead.tci(), frame.len);
                odd.0 |= u64::from(classified.is_err()) << i;
                *class = classified.unwrap_or(Class::UNAWARE);
                vid = class.vid;
            }
            *homes = [
                fdb.home(Key::from_wire(lead.destination(), vid)),
                fdb.home(Key::from_wire(lead.source(), vid)),
            ];
            fdb.prefetch(homes[0]);
            fdb.prefetch(homes[1]);
        }
        let mut to = PortOf([0; MAX_BURST]);
        let (learn, now, allowed) = (self.port.plan.learn, self.clock.seconds, &self.port.untagged);
        let frames = self.heads.iter().zip(&homes).zip(self.out.classes.iter());
        for (i, (((head, homes), class), to)) in frames.zip(&mut to.0).enumerate() {
            let lead = Lead::of(head);
            let source = lead.source();
            let vid = if AWARE { class.vid } else { 0 };
            // Groups and zero are never in the table: such frames turn out odd by themselves.
            let source_is_plain = if learn {
                fdb.at_home(Key::from_wire(source, vid), homes[1]).is_fresh_at(self.ingress, now)
            } else {
                (source & 1 == 0) & (source != 0)
            };
            let output = fdb.at_home(Key::from_wire(lead.destination(), vid), homes[0]).port();
            let is_allowed = if AWARE {
                self.plan.members.of(vid).contains(output) & self.port.reachable.contains(output)
            } else {
                allowed.contains(output)
            };
            *to = output as u8; // only looked at if it is allowed, and then below MAX_PORTS
            odd.0 |= u64::from(!(source_is_plain & is_allowed)) << i;
        }
        let mut plain = FrameSet::first(self.heads.len()).without(odd);
        while let Some(i) = { plain }.next() {
            let port = to.0[i % MAX_BURST];
            let set = to.with(port).and(plain);
            plain = plain.without(set);
            if AWARE {
                self.send_each(u16::from(port), set)
            } else {
                self.send(u16::from(port), Class::UNAWARE, set)
            }
        }
        odd
    }

    /// To one port, frames of several classes.
    fn send_each(&mut self, port: u16, set: FrameSet) {
        let mut run = FrameSet::EMPTY;
        let mut last = Class::UNAWARE;
        for i in set {
            let class = self.out.classes[i % MAX_BURST];
            if class != last && !run.is_empty() {
                self.send(port, last, std::mem::take(&mut run));
            }
            last = class;
            run.insert(i);
        }
        self.send(port, last, run);
    }

    /// Judges the frames of `set` one by one; a frame like the one before it goes the same way.
    fn judge_each(&mut self, set: FrameSet) {
        let mut last = None;
        let mut run = FrameSet::EMPTY;
        for i in set {
            let (Some(head), Some(frame)) = (self.heads.get(i), self.frames.get(i)) else { break };
            let Lead(low, high) = Lead::of(head);
            let lead = Lead(low & self.significant.0, high & self.significant.1);
            let like = (lead, frame.len.min(TAGGED_HEADER));
            match last {
                Some((like_last, _)) if like_last == like => run.insert(i),
                _ => {
                    if let Some((_, verdict)) = last {
                        self.carry_out(verdict, run);
                    }
                    last = Some((like, self.judge(lead, frame.len)));
                    run = FrameSet(1 << i);
                }
            }
        }
        if let Some((_, verdict)) = last {
            self.carry_out(verdict, run);
        }
    }

    /// Decides about one frame, and learns its source.
    #[inline]
    fn judge(&mut self, lead: Lead, len: u32) -> Verdict {
        if len < ETHERNET_HEADER {
            return Verdict::Refuse(DropReason::Runt);
        }
        let (destination, source) = (lead.destination(), lead.source());
        if destination & RESERVED_MASK == RESERVED && !self.plan.forward_reserved {
            return Verdict::Refuse(DropReason::Reserved);
        }
        if source & 1 == 1 || source == 0 {
            return Verdict::Refuse(DropReason::SourceRefused);
        }
        let class = match self.port.plan.vlan.classify(lead.kind(), lead.tci(), len) {
            Ok(class) => class,
            Err(reason) => return Verdict::Refuse(reason),
        };
        let from = Key::from_wire(source, class.vid);
        if let Some(sources) = &self.port.plan.sources
            && sources.binary_search(&from).is_err()
        {
            return Verdict::Refuse(DropReason::SourceRefused);
        }
        self.learn(from);
        if destination & 1 == 1 {
            let kind = if destination == BROADCAST { Flood::Broadcast } else { Flood::Multicast };
            return Verdict::Flood(kind, class);
        }
        let to = Key::from_wire(destination, class.vid);
        match self.plan.fdb.lookup(to, self.plan.fdb.home(to)).map(Value::port) {
            None => Verdict::Flood(Flood::Unknown, class),
            Some(port) => self.unicast(port, class),
        }
    }

    #[inline(always)]
    fn learn(&mut self, from: Key) {
        let (fdb, plan) = (&*self.plan.fdb, &self.port.plan);
        if !plan.learn {
            return;
        }
        match fdb.learn(from, fdb.home(from), self.ingress, plan.learn_limit, self.clock.seconds) {
            Learn::Known | Learn::Pinned | Learn::Busy => {}
            Learn::Learnt => self.state.addresses.learnt.add(1),
            Learn::Moved => self.state.addresses.moved.add(1),
            Learn::LimitReached => self.state.addresses.limit_reached.add(1),
            Learn::Full => self.state.addresses.table_full.add(1),
        }
    }

    /// To `port`, if the frames of this port may go there.
    #[inline(always)]
    fn unicast(&self, port: u16, class: Class) -> Verdict {
        let is_member = self.plan.members.of(class.vid).contains(port);
        if is_member && self.port.reachable.contains(port) {
            Verdict::Send(port, class)
        } else if port == self.ingress {
            Verdict::Refuse(DropReason::Hairpin)
        } else if is_member {
            Verdict::Refuse(DropReason::Isolated)
        } else {
            // The port left the VLAN or the configuration, and its addresses are still being flushed.
            Verdict::Refuse(DropReason::NoOutput)
        }
    }

    #[inline(always)]
    fn carry_out(&mut self, verdict: Verdict, set: FrameSet) {
        match verdict {
            Verdict::Refuse(reason) => self.out.refuse(set, reason),
            Verdict::Send(port, class) => self.send(port, class, set),
            Verdict::Flood(kind, class) => {
                let flood = &mut self.floods[kind as usize];
                *flood = FrameSet(flood.0 | set.0);
                if self.port.aware {
                    set.for_each(|i| self.out.classes[i % MAX_BURST] = class);
                }
            }
        }
    }

    /// To one port.
    #[inline(always)]
    fn send(&mut self, port: u16, class: Class, set: FrameSet) {
        let Some(output) = self.plan.port(port) else { return self.out.refuse(set, DropReason::NoOutput) };
        let fitting = self.fitting(output, set);
        self.out.refuse(set.without(fitting), DropReason::MtuExceeded);
        if !fitting.is_empty() {
            self.out.add(port, output.plan.vlan.edit(class), fitting);
        }
    }

    /// The frames of `set` that are not too long for `output`.
    #[inline(always)]
    fn fitting(&self, output: &BridgePort, set: FrameSet) -> FrameSet {
        if self.longest <= output.surely_fits { set } else { self.fitting_one_by_one(output, set) }
    }

    #[cold]
    fn fitting_one_by_one(&self, output: &BridgePort, set: FrameSet) -> FrameSet {
        let mtu = output.plan.mtu.unwrap_or(u32::MAX);
        let mut fitting = set;
        for i in set {
            if let (Some(head), Some(frame)) = (self.heads.get(i), self.frames.get(i))
                && frame.len > output.surely_fits
                && layer3_size(head, frame) > mtu
            {
                fitting.remove(i);
            }
        }
        fitting
    }

    /// To all ports of the frames' VLANs, within the port's limits.
    fn flood_all(&mut self) {
        let kinds = [
            (Flood::Broadcast, DropReason::StormBroadcast),
            (Flood::Multicast, DropReason::StormMulticast),
            (Flood::Unknown, DropReason::StormUnknown),
        ];
        let mut passed = FrameSet::EMPTY;
        for (kind, reason) in kinds {
            let set = self.floods[kind as usize];
            if set.is_empty() {
                continue;
            }
            let admitted = first_of(set, self.port.plan.storm.admit(kind, set.len(), self.clock.cycles));
            self.out.refuse(set.without(admitted), reason);
            passed.0 |= admitted.0;
        }
        if !self.port.aware {
            return self.flood(Class::UNAWARE, passed);
        }
        while let Some(i) = { passed }.next() {
            let class = self.out.classes[i % MAX_BURST];
            let mut alike = FrameSet::EMPTY;
            { passed }.filter(|&j| self.out.classes[j % MAX_BURST] == class).for_each(|j| alike.insert(j));
            passed = passed.without(alike);
            self.flood(class, alike);
        }
    }

    /// To every port of the VLAN that may be reached. A frame that is too long for some goes to the others.
    fn flood(&mut self, class: Class, set: FrameSet) {
        let members = self.plan.members.of(class.vid);
        let mut sent = FrameSet::EMPTY;
        let mut too_long = FrameSet::EMPTY;
        for port in members.and(&self.port.reachable).iter() {
            let Some(output) = self.plan.port(port) else { continue };
            let fitting = self.fitting(output, set);
            too_long = FrameSet(too_long.0 | set.without(fitting).0);
            sent.0 |= fitting.0;
            if !fitting.is_empty() {
                self.out.add(port, output.plan.vlan.edit(class), fitting);
            }
        }
        let nowhere = set.without(sent);
        self.out.refuse(nowhere.and(too_long), DropReason::MtuExceeded);
        let alone = members.iter().all(|port| port == self.ingress);
        let reason = if alone { DropReason::NoOutput } else { DropReason::Isolated };
        self.out.refuse(nowhere.without(too_long), reason);
    }
}

/// The first `n` frames of a set.
fn first_of(set: FrameSet, n: usize) -> FrameSet {
    if n >= set.len() {
        return set;
    }
    let mut first = FrameSet::EMPTY;
    set.take(n).for_each(|i| first.insert(i));
    first
}

/// The output port of each frame of a burst.
#[repr(align(64))]
struct PortOf([u8; MAX_BURST]);

const _: () = assert!(MAX_PORTS == 256 && MAX_BURST == 64);

impl PortOf {
    /// The frames that go to `port`.
    #[inline(always)]
    fn with(&self, port: u8) -> FrameSet {
        use std::arch::x86_64::{
            _mm256_cmpeq_epi8, _mm256_load_si256, _mm256_movemask_epi8, _mm256_set1_epi8,
        };
        let half = |at: usize| {
            // SAFETY: AVX2 is in x86-64-v3, which this is compiled for and `cableway` checks at start. The array is 64 bytes,
            // aligned to 64, so both halves are aligned to 32 and inside it.
            unsafe {
                let bytes = _mm256_load_si256(self.0.as_ptr().add(at * 32).cast());
                _mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, _mm256_set1_epi8(port as i8))) as u32
            }
        };
        FrameSet(u64::from(half(0)) | u64::from(half(1)) << 32)
    }
}
