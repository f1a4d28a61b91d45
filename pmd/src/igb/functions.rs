//! The virtual functions of an 82576, as its adapter administers them: each has a pool of the device, an address, VLANs, and a mailbox.
//!
//! Owns what each may and what it wants, and the registers that say so. A function is not trusted: whatever it writes into its
//! mailbox changes its own pool at most, one request is answered at a time, and nothing waits for it.
//!
//! Pools are numbered as functions are; the adapter's own is the first behind them.

use super::I82576;
use super::mailbox;
use super::message::{self, ACK, CLEAR_TO_SEND, CONTROL, KIND, MOST_GROUPS, NACK};
use super::regs::{
    CTRL_EXT, DTXSWC, MBVFICR, QDE, RAH2, RAL2, RLPML, RPLOLR, VFLRE, VFRE, VFTA, VFTE, VLVF, VMOLR, VMVIR,
    VT_CTL,
};
use crate::access::{Bar, Bits, GONE, PciDevice, Regs};
use crate::intel::regs::{MRQC, RAH, RAL, RCTL, STATUS};
use crate::intel::{self, Adapter, Groups, Physical};
use crate::nic::{DeviceError, Mac, Options};

/// Pools of the device. One is the adapter's.
const POOLS: u32 = 8;

/// MRQC.ENABLE: frames go to pools, by address and VLAN (datasheet 8.10).
const MRQC_POOLS: u32 = 3;

/// VLANs that the device tells apart, shared out evenly: none can take those of others.
const VLANS: usize = 32;
const VLANS_EACH: usize = VLANS / POOLS as usize;

/// Longest frame of all, with FCS (datasheet 8.10, RLPML).
const LONGEST: u32 = 9728;
/// Longest frame without jumbo, with FCS and a tag.
const ORDINARY: u32 = 1522;

/// What the owner of the adapter grants a virtual function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Its address. One that the adapter made up, if none.
    pub mac: Option<Mac>,
    /// Its VLAN, with priority (the tag's sixteen bits): what it sends is tagged, what it receives is of this VLAN, without tag.
    pub vlan: Option<u16>,
    /// It may change its address and take all groups.
    pub trusted: bool,
    /// What it sends must have its own address as source (and be of its VLAN, if it has one).
    pub spoof_check: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self { mac: None, vlan: None, trusted: false, spoof_check: true }
    }
}

/// A virtual function, as its adapter knows it.
#[derive(Clone, Debug)]
pub struct VirtualFunction {
    /// Its address.
    pub mac: Mac,
    /// What it may.
    pub settings: Settings,
    /// A driver has it.
    pub active: bool,
    /// VLANs that it asked for.
    pub vlans: Vec<u16>,
    /// Its longest frame in bytes, with FCS.
    pub longest: u32,
    /// Requests that were granted.
    pub granted: u64,
    /// Requests that were refused, or made no sense.
    pub refused: u64,
    /// Hashes of the groups that it takes.
    groups: Vec<u16>,
    all_groups: bool,
}

impl VirtualFunction {
    fn new(settings: Settings, made_up: Mac) -> Self {
        Self {
            mac: settings.mac.unwrap_or(made_up),
            settings,
            active: false,
            vlans: Vec::new(),
            longest: ORDINARY,
            granted: 0,
            refused: 0,
            groups: Vec::new(),
            all_groups: false,
        }
    }

    /// As after a reset: nothing that it asked for is left, but its address.
    fn forget(&mut self) {
        self.active = false;
        self.vlans.clear();
        self.groups.clear();
        self.all_groups = false;
        self.longest = ORDINARY;
    }

    /// VLANs that it is in, of which there are [`VLANS_EACH`] at most.
    fn is_in(&self, vlan: u16) -> bool {
        match self.settings.vlan {
            Some(tag) => tag & 0xfff == vlan,
            None => self.vlans.contains(&vlan),
        }
    }
}

/// What the adapter of an 82576 does for its virtual functions, if any are turned on.
#[derive(Default)]
pub struct Functions {
    each: Vec<VirtualFunction>,
    /// The adapter's own: longest frame with FCS, tags taken off, address.
    longest: u32,
    strips_tags: bool,
    mac: Mac,
    groups_changed: bool,
    /// Whether there was a link when it was last looked at; functions that are still to be told that this changed, a bit each.
    link: bool,
    untold: u32,
}

impl Functions {
    /// `count` functions, and the device shared out among them (datasheet 4.6.11.1, 7.10.3).
    pub(super) fn prepare<B: Bar>(
        regs: &Regs<B>,
        count: u32,
        options: &Options,
    ) -> Result<Self, DeviceError> {
        if options.queues > 1 {
            let card = "an 82576 with virtual functions";
            return Err(DeviceError::Queues { card, wanted: options.queues, most: 1 });
        }
        if count >= POOLS {
            let what = "8 virtual functions beside a driver of its own: turn on at most 7";
            return Err(DeviceError::Unsupported { card: <I82576 as intel::Card>::NAME, what });
        }
        let [low, high] = [regs.read(RAL(0)), regs.read(RAH(0))];
        let mac = message::mac_of([low, high]);
        let each = (0..count).map(|n| VirtualFunction::new(Settings::default(), made_up(mac, n)));
        let each = each.collect();
        let functions = Self {
            each,
            longest: options.longest() + 4,
            strips_tags: options.strip_tags,
            mac,
            groups_changed: false,
            link: false,
            untold: 0,
        };
        let own = functions.own();
        regs.write(MRQC, MRQC::ENABLE.is(MRQC_POOLS));
        // What is for nobody else is for the adapter.
        regs.write(VT_CTL, VT_CTL::DEFAULT_POOL.is(own) | VT_CTL::REPLICATE);
        // The adapter's limit is its pool's; this one is everybody's.
        regs.write_number(RLPML, LONGEST);
        regs.write(RPLOLR, RPLOLR::STRCRC);
        // A function that does not take its frames must not hold up others: queues n and n + 8 are pool n's.
        regs.write_number(QDE, 0xffff);
        regs.write_number(VFRE, 1 << own);
        regs.write_number(VFTE, 1 << own);
        for number in 0..count {
            functions.apply(regs, number);
        }
        functions.apply_vlans(regs);
        Ok(functions)
    }

    /// The adapter's own pool, and its queue.
    fn own(&self) -> u32 {
        self.each.len() as u32
    }

    /// Writes what pool `number` may and wants.
    fn apply<B: Bar>(&self, regs: &Regs<B>, number: u32) {
        let Some(function) = self.each.get(number as usize) else { return };
        let bit = 1 << number;
        let set = |on: bool, value: u32, bit: u32| if on { value | bit } else { value & !bit };
        regs.write_number(RAH2(number), 0);
        if function.active {
            let [low, high] = message::words_of(function.mac);
            regs.write_number(RAL2(number), low);
            regs.write(RAH2(number), RAH2::AV | RAH2::POOL.is(bit) | RAH2::HIGH.is(high));
        }
        let when = |on: bool, bits: Bits<VMOLR>| if on { bits } else { Bits::new(0) };
        let tagged = function.settings.vlan.is_some();
        regs.write(
            VMOLR(number),
            VMOLR::STRCRC
                | VMOLR::BAM
                | VMOLR::RLPML.is(function.longest)
                | when(function.longest > ORDINARY, VMOLR::LPE)
                | when(!tagged, VMOLR::AUPE)
                | when(tagged, VMOLR::STRVLAN)
                | when(!function.groups.is_empty() || function.all_groups, VMOLR::ROMPE)
                | when(function.all_groups, VMOLR::MPME),
        );
        let tag =
            function.settings.vlan.map_or(Bits::new(0), |tag| VMVIR::ALWAYS | VMVIR::TAG.is(tag.into()));
        regs.write(VMVIR(number), tag);
        let checks = regs.read(DTXSWC);
        let spoof = function.settings.spoof_check;
        let checks = set(spoof && tagged, set(spoof, checks, bit), bit << 8);
        regs.write(DTXSWC, Bits::<DTXSWC>::new(checks) | DTXSWC::LOOPBACK);
        regs.write_number(VFRE, set(function.active, regs.read(VFRE), bit));
        regs.write_number(VFTE, set(function.active, regs.read(VFTE), bit));
    }

    /// Writes which VLANs are whose. The adapter is in all of them.
    fn apply_vlans<B: Bar>(&self, regs: &Regs<B>) {
        let mut vlans: Vec<u16> = self.each.iter().flat_map(|f| f.vlans.iter().copied()).collect();
        vlans.extend(self.each.iter().filter_map(|f| f.settings.vlan).map(|tag| tag & 0xfff));
        vlans.sort_unstable();
        vlans.dedup();
        // Frames of a VLAN that no function is in go by the default pool's rule.
        for word in 0..128 {
            regs.write_number(VFTA(word), u32::MAX);
        }
        for entry in 0..VLANS {
            let bits = vlans.get(entry).map_or(Bits::new(0), |&vlan| {
                let members = self.each.iter().enumerate().filter(|(_, f)| f.is_in(vlan));
                let pools = members.fold(1 << self.own(), |pools, (n, _)| pools | 1 << n);
                VLVF::VALID | VLVF::POOLS.is(pools) | VLVF::VLAN.is(vlan.into())
            });
            regs.write(VLVF(entry as u32), bits);
        }
        if vlans.is_empty() { regs.clear(RCTL, RCTL::VFE) } else { regs.set(RCTL, RCTL::VFE) }
    }

    /// Function `number` was reset: whatever it did is undone.
    fn forget<B: Bar>(&mut self, regs: &Regs<B>, number: u32) {
        let Some(function) = self.each.get_mut(number as usize) else { return };
        let had_vlans = !function.vlans.is_empty();
        let had_groups = !function.groups.is_empty() || function.all_groups;
        function.forget();
        self.apply(regs, number);
        self.groups_changed |= had_groups;
        if had_vlans {
            self.apply_vlans(regs);
        }
    }

    /// Tells functions that have a driver that the link changed, as Intel's drivers do: those of functions look at it when they hear
    /// anything, and not before. One whose mailbox is in use is told at the next turn.
    fn tell_of_link<B: Bar>(&mut self, regs: &Regs<B>) {
        if self.untold == 0 {
            return;
        }
        // What these ask for would be overwritten.
        let asking = MBVFICR::VFREQ.of(regs.read(MBVFICR));
        for number in 0..self.own() {
            let bit = 1 << number;
            let active = self.each.get(number as usize).is_some_and(|f| f.active);
            let told = |regs| asking & bit == 0 && mailbox::tell(regs, number, CONTROL | CLEAR_TO_SEND);
            if self.untold & bit != 0 && (!active || told(regs)) {
                self.untold &= !bit;
            }
        }
    }

    /// Answers the request in the mailbox of function `number`.
    fn answer<B: Bar>(&mut self, regs: &Regs<B>, number: u32) {
        let request = mailbox::take(regs, number);
        let Some(function) = self.each.get_mut(number as usize) else { return };
        let Some(request) = request else {
            function.refused += 1;
            return;
        };
        let [first, ..] = request;
        let kind = first & KIND;
        if first & (ACK | NACK) != 0 {
            // An answer to what was told to it: nothing to say.
            mailbox::done(regs, number);
            return;
        }
        if kind == message::RESET {
            self.forget(regs, number);
            if let Some(function) = self.each.get_mut(number as usize) {
                function.active = true;
                function.granted += 1;
                let [low, high] = message::words_of(function.mac);
                self.apply(regs, number);
                mailbox::reply(regs, number, &[message::RESET | ACK, low, high]);
            }
            return;
        }
        let granted =
            self.each.get(number as usize).is_some_and(|f| f.active) && self.grant(regs, number, &request);
        let Some(function) = self.each.get_mut(number as usize) else { return };
        *if granted { &mut function.granted } else { &mut function.refused } += 1;
        let may_go_on = if function.active { CLEAR_TO_SEND } else { 0 };
        mailbox::reply(regs, number, &[first | if granted { ACK } else { NACK } | may_go_on]);
    }

    /// Does what function `number` asks for, if it may.
    fn grant<B: Bar>(&mut self, regs: &Regs<B>, number: u32, request: &mailbox::Message) -> bool {
        let &[first, a, b, ..] = request;
        let taken = |mac: Mac| {
            let others = self.each.iter().enumerate().filter(|&(n, _)| n != number as usize);
            mac == self.mac || others.map(|(_, f)| f.mac).any(|other| other == mac)
        };
        let mac = message::mac_of([a, b]);
        let is_taken = taken(mac);
        let Some(function) = self.each.get_mut(number as usize) else { return false };
        match first & KIND {
            message::SET_MAC => {
                let [first_byte, ..] = mac;
                let allowed = function.settings.trusted && first_byte & 1 == 0 && mac != [0; 6] && !is_taken;
                if mac != function.mac && !allowed || message::number(first) != 0 {
                    return false;
                }
                function.mac = mac;
            }
            message::SET_GROUPS => {
                let count = message::number(first) as usize;
                if count > MOST_GROUPS {
                    return false;
                }
                let hashes = request.iter().skip(1).flat_map(|word| [*word as u16, (word >> 16) as u16]);
                function.groups = hashes.take(count).map(|hash| hash & 0xfff).collect();
                self.groups_changed = true;
            }
            message::SET_VLAN => {
                let vlan = a as u16 & 0xfff;
                if function.settings.vlan.is_some() || a > 0xfff || vlan == 0 {
                    return false;
                }
                function.vlans.retain(|&other| other != vlan);
                if message::number(first) & 1 != 0 {
                    if function.vlans.len() >= VLANS_EACH {
                        // It was none of its: it would have been taken out.
                        return false;
                    }
                    function.vlans.push(vlan);
                }
                self.apply_vlans(regs);
            }
            message::SET_LONGEST => {
                if !(68..=LONGEST).contains(&a) {
                    return false;
                }
                function.longest = a;
            }
            message::SET_PROMISCUOUS => {
                let wanted = first & !KIND;
                if wanted & !message::ALL_GROUPS != 0 || wanted != 0 && !function.settings.trusted {
                    return false;
                }
                function.all_groups = wanted != 0;
                self.groups_changed = true;
            }
            _ => return false,
        }
        self.apply(regs, number);
        true
    }
}

/// An address for function `number` that is local to this machine, and differs from the adapter's in its first byte only.
fn made_up([_, b, c, d, e, f]: Mac, number: u32) -> Mac {
    [(number as u8 + 1) << 4 | 0x06, b, c, d, e, f]
}

impl intel::Functions for Functions {
    fn first_queue(&self) -> u32 {
        self.own()
    }

    fn pools(&self) -> u32 {
        if self.each.is_empty() { 0 } else { 1 << self.own() }
    }

    fn are_those_of(&self, status: u32) -> bool {
        let there = if STATUS::IOV_MODE.are_in(status) { STATUS::NUM_VFS.of(status) } else { 0 };
        there == self.own()
    }

    fn begin<B: Bar>(&mut self, regs: &Regs<B>) {
        if self.each.is_empty() {
            return;
        }
        regs.set(RCTL, RCTL::LPE);
        regs.write_number(VFLRE, u32::MAX);
        regs.write_number(MBVFICR, u32::MAX);
        regs.set(CTRL_EXT, CTRL_EXT::PFRSTD);
    }

    fn serve<B: Bar>(&mut self, regs: &Regs<B>, link: bool) -> bool {
        if self.each.is_empty() {
            return false;
        }
        let (reset, causes) = (regs.read(VFLRE), regs.read(MBVFICR));
        if reset == GONE || causes == GONE {
            return false;
        }
        regs.write_number(VFLRE, reset);
        // Before the mailboxes are looked into: what is asked from now on is a request anew.
        regs.write_number(MBVFICR, causes);
        for number in 0..self.own() {
            if reset >> number & 1 != 0 {
                self.forget(regs, number);
            }
            if MBVFICR::VFREQ.of(causes) >> number & 1 != 0 {
                self.answer(regs, number);
            }
        }
        if std::mem::replace(&mut self.link, link) != link {
            self.untold = (1 << self.own()) - 1;
        }
        self.tell_of_link(regs);
        std::mem::take(&mut self.groups_changed)
    }

    fn groups<B: Bar>(&self, regs: &Regs<B>, all: bool, table: &mut Groups) {
        if self.each.is_empty() {
            return;
        }
        let takes_all = all || self.each.iter().any(|f| f.all_groups);
        for hash in self.each.iter().flat_map(|f| &f.groups) {
            if let Some(word) = table.get_mut(usize::from(hash >> 5)) {
                *word |= 1 << (hash & 31);
            }
        }
        if takes_all {
            *table = [u32::MAX; 128];
        }
        let when = |on: bool, bits: Bits<VMOLR>| if on { bits } else { Bits::new(0) };
        regs.write(
            VMOLR(self.own()),
            VMOLR::STRCRC
                | VMOLR::BAM
                | VMOLR::AUPE
                | VMOLR::ROMPE
                | VMOLR::LPE
                | VMOLR::RLPML.is(self.longest)
                | when(all, VMOLR::MPME)
                | when(self.strips_tags, VMOLR::STRVLAN),
        );
    }
}

impl<D: PciDevice> Adapter<D, I82576> {
    /// The virtual functions that were turned on when the adapter was opened.
    pub fn virtual_functions(&self) -> &[VirtualFunction] {
        &self.functions.each
    }

    /// Changes what virtual function `number` may. Its driver has to begin anew, and is told.
    ///
    /// # Errors
    /// There is none of that number; another one, or the adapter, has the address; or it is no address.
    pub fn set_virtual_function(&mut self, number: u32, settings: Settings) -> Result<(), DeviceError> {
        self.grant(&[(number, settings)])
    }

    /// Changes what all virtual functions may, those beyond the end of `settings` to the default; all or none. Drivers of those that
    /// are as they were notice nothing.
    ///
    /// # Errors
    /// There are fewer; or as for [`Adapter::set_virtual_function`].
    pub fn set_virtual_functions(&mut self, settings: &[Settings]) -> Result<(), DeviceError> {
        let count = self.functions.each.len().max(settings.len());
        let wanted = (0..count).map(|n| settings.get(n).copied().unwrap_or_default());
        let is = |n: usize| self.functions.each.get(n).map(|f| f.settings);
        let changes: Vec<_> = (0..).zip(wanted).filter(|&(n, s)| is(n as usize) != Some(s)).collect();
        self.grant(&changes)
    }

    fn grant(&mut self, changes: &[(u32, Settings)]) -> Result<(), DeviceError> {
        let refused = |what| DeviceError::Unsupported { card: <I82576 as intel::Card>::NAME, what };
        let functions = &mut self.functions;
        let mut macs: Vec<Mac> = functions.each.iter().map(|f| f.mac).collect();
        for (number, settings) in changes {
            let mac = macs.get_mut(*number as usize);
            let mac = mac.ok_or_else(|| {
                refused("a virtual function of that number: turn on more before it is opened")
            })?;
            *mac = settings.mac.unwrap_or(made_up(functions.mac, *number));
            if settings.vlan.is_some_and(|tag| !(1..4095).contains(&(tag & 0xfff))) {
                return Err(refused("a VLAN but 1 to 4094"));
            }
        }
        for (number, _) in changes {
            let Some(&mac) = macs.get(*number as usize) else { continue };
            let [first, ..] = mac;
            let twice = macs.iter().filter(|other| **other == mac).count() > 1;
            if first & 1 != 0 || mac == [0; 6] || mac == functions.mac || twice {
                return Err(refused("an address that another function has, or a group's"));
            }
        }
        let regs = self.core.regs();
        for &(number, settings) in changes {
            functions.forget(regs, number);
            if let (Some(function), Some(mac)) =
                (functions.each.get_mut(number as usize), macs.get(number as usize))
            {
                (function.mac, function.settings) = (*mac, settings);
            }
            functions.apply(regs, number);
        }
        functions.apply_vlans(regs);
        for &(number, _) in changes {
            mailbox::tell(regs, number, CONTROL);
        }
        Ok(())
    }
}

/// What an adapter without functions has, and one with them begins with.
pub(super) fn find<B: Bar>(regs: &Regs<B>, options: &Options) -> Result<Functions, DeviceError> {
    let status = regs.read(STATUS);
    if STATUS::IOV_MODE.are_in(status) {
        Functions::prepare(regs, STATUS::NUM_VFS.of(status), options)
    } else {
        Ok(Functions::default())
    }
}

const _: () = assert!(<I82576 as Physical>::EXACT == 16, "the upper eight addresses are the functions'");
