//! A virtual function that writes anything into its mailbox, against an adapter on a stand-in.

use std::sync::Arc;

use host::memory::Pages;
use proptest::prelude::*;

use super::regs::{
    DTXSWC, MBVFICR, P2VMAILBOX, RAH2, RAL2, VFLRE, VFRE, VFTE, VLVF, VMBMEM, VMOLR, VMVIR, VT_CTL,
};
use super::{Igb, Settings};
use crate::access::{Bar, PciDevice, Register};
use crate::dma::{Arena, ArenaOptions};
use crate::intel::regs::{MRQC, RAH, RAL, STATUS};
use crate::intel::standin::{Identity, Standin};
use crate::nic::{Nic, Opened, Options};

/// Functions that are turned on; the second is hostile, the last pool the adapter's.
const COUNT: u32 = 3;
const HOSTILE: u32 = 1;

struct World {
    card: Arc<Standin>,
    opened: Opened<Igb<Standin>>,
}

impl World {
    fn new() -> Self {
        let space = Arc::new(Identity::default());
        let options = ArenaOptions { rings: 64 << 10, buffers: 400, pages: Pages::Ordinary, node: None };
        let arena = Arena::new(options, space.clone()).unwrap();
        let card = Standin::new(&space, Igb::<Standin>::IDS[0]);
        let shared = STATUS::IOV_MODE.value() | STATUS::NUM_VFS.is(COUNT).value();
        card.stuck.lock().unwrap().push((STATUS.offset(), 0x1f << 14, shared));
        // None is ever reset: the stand-in does not clear what is written as ones.
        card.stuck.lock().unwrap().push((VFLRE.offset(), u32::MAX, 0));
        let options = Options { receive_ring: 64, transmit_ring: 64, spare: 8, ..Options::default() };
        let opened = Igb::open(card.clone(), &arena, options).unwrap();
        Self { card, opened }
    }

    /// Function `vf` asks for `words`; the adapter keeps house.
    fn ask(&mut self, vf: u32, words: &[u32]) -> u32 {
        let bar = self.card.bar(0, 0x20000).unwrap();
        for (i, word) in (16 * vf..).zip(words) {
            bar.write32(VMBMEM(i).offset(), *word);
        }
        bar.write32(MBVFICR.offset(), 1 << vf);
        self.opened.nic.link().unwrap();
        self.card.register(VMBMEM(16 * vf).offset())
    }

    /// What the hostile function must leave alone.
    fn others(&self) -> Vec<u32> {
        let read = |offset: u32| self.card.register(offset);
        let mut all =
            vec![read(MRQC.offset()), read(VT_CTL.offset()), read(RAL(0).offset()), read(RAH(0).offset())];
        for pool in (0..=COUNT).filter(|&pool| pool != HOSTILE) {
            all.extend([VMOLR(pool).offset(), VMVIR(pool).offset()].map(read));
            all.extend([RAL2(pool).offset(), RAH2(pool).offset()].map(read));
            all.extend([VMBMEM(16 * pool).offset(), P2VMAILBOX(pool).offset()].map(read));
        }
        let bit = 1 << HOSTILE;
        all.extend([VFRE.offset(), VFTE.offset()].map(|at| read(at) & !bit));
        all.push(read(DTXSWC.offset()) & !(bit | bit << 8));
        all
    }
}

#[test]
fn a_function_that_keeps_its_mailbox_locked_is_not_waited_for_and_loses_the_lock() {
    let mut world = World::new();
    assert_eq!(world.ask(0, &[1]) >> 31, 1, "granted");
    // The adapter never gets the lock.
    world.card.stuck.lock().unwrap().push((P2VMAILBOX(0).offset(), 8, 0));
    assert_eq!(world.ask(0, &[3]), 3, "not answered");
    assert_eq!(world.card.register(P2VMAILBOX(0).offset()), 1 << 4, "taken from it");
    assert_eq!(world.opened.nic.virtual_functions()[0].refused, 1);
}

#[test]
fn nothing_is_granted_before_a_function_has_begun_and_after_it_was_reset() {
    let mut world = World::new();
    assert_eq!(world.ask(1, &[4 | 1 << 16, 100]), 4 | 1 << 16 | 1 << 30, "refused");
    world.ask(1, &[1]);
    assert_eq!(world.ask(1, &[4 | 1 << 16, 100]), 4 | 1 << 16 | 5 << 29, "granted, and clear to send");
    assert_eq!(world.opened.nic.virtual_functions()[1].vlans, [100]);
    world.opened.nic.set_virtual_function(1, Settings::default()).unwrap();
    assert_eq!(world.ask(1, &[5, 1500]) >> 30, 1, "refused");
    assert!(world.opened.nic.virtual_functions()[1].vlans.is_empty());
}

#[test]
fn what_all_functions_may_changes_as_a_whole_and_those_that_stay_as_they_are_notice_nothing() {
    let mut world = World::new();
    for vf in 0..COUNT {
        world.ask(vf, &[1]);
    }
    let active = |world: &World| -> Vec<bool> {
        world.opened.nic.virtual_functions().iter().map(|f| f.active).collect()
    };
    let with = |last: u8| Settings { mac: Some([2, 0, 0, 0, 0, last]), ..Settings::default() };
    world.opened.nic.set_virtual_functions(&[Settings::default(), with(1)]).unwrap();
    assert_eq!(active(&world), [true, false, true], "only the one that changed begins anew");
    // Two exchange their addresses at once; twice the same one, and one function too many, change nothing.
    world.opened.nic.set_virtual_functions(&[with(2), with(1)]).unwrap();
    world.opened.nic.set_virtual_functions(&[with(1), with(2)]).unwrap();
    let macs = |world: &World| [0, 1].map(|n: usize| world.opened.nic.virtual_functions()[n].mac[5]);
    assert_eq!(macs(&world), [1, 2]);
    for refused in [&[with(3), with(3)][..], &[with(3), Settings { vlan: Some(0), ..with(4) }], &[with(3); 4]]
    {
        assert!(world.opened.nic.set_virtual_functions(refused).is_err());
        assert_eq!(macs(&world), [1, 2]);
    }
    assert!(active(&world)[2], "the third was never touched");
}

#[test]
fn a_card_whose_number_of_functions_changes_under_its_driver_is_stopped_with_the_reason() {
    let mut world = World::new();
    let shared = STATUS::IOV_MODE.value() | STATUS::NUM_VFS.is(COUNT + 1).value();
    world.card.stuck.lock().unwrap().retain(|(offset, ..)| *offset != STATUS.offset());
    world.card.stuck.lock().unwrap().push((STATUS.offset(), 0x1f << 14, shared));
    let error = world.opened.nic.link().unwrap_err().to_string();
    assert!(error.contains("another number of virtual functions"), "{error}");
    assert!(world.opened.nic.link().is_err(), "it stays stopped");
}

#[test]
fn functions_with_a_driver_are_told_when_the_link_goes_and_when_it_comes_back() {
    const TOLD: u32 = 0x2000_0100;
    let mut world = World::new();
    world.ask(0, &[1]);
    world.ask(2, &[1]);
    let bar = world.card.bar(0, 0x20000).unwrap();
    let link = |world: &mut World, up: bool| {
        let mut stuck = world.card.stuck.lock().unwrap();
        stuck.retain(|(offset, bits, _)| (*offset, *bits) != (STATUS.offset(), STATUS::LU.value()));
        if !up {
            stuck.push((STATUS.offset(), STATUS::LU.value(), 0));
        }
        drop(stuck);
        assert_eq!(world.opened.nic.link().unwrap().up, up);
    };
    let words = |world: &World| [0, 1, 2].map(|vf| world.card.register(VMBMEM(16 * vf).offset()));
    for up in [false, true] {
        // The third asks for something meanwhile: that is answered, and it is told when the answer was taken.
        (0..3).for_each(|vf| bar.write32(VMBMEM(16 * vf).offset(), 0));
        bar.write32(VMBMEM(32).offset(), 5);
        bar.write32(MBVFICR.offset(), 1 << 2);
        link(&mut world, up);
        let [first, second, third] = words(&world);
        assert_eq!((first, second, third & 0xffff), (TOLD, 0, 5));
        assert_eq!(world.card.register(P2VMAILBOX(0).offset()), P2VMAILBOX::STS.value());
        bar.write32(MBVFICR.offset(), 0);
        link(&mut world, up);
        assert_eq!(words(&world), [TOLD, 0, TOLD]);
        // Once.
        bar.write32(VMBMEM(0).offset(), 0);
        link(&mut world, up);
        assert_eq!(words(&world)[0], 0);
    }
}

#[test]
fn a_function_has_its_share_of_vlans_and_one_that_it_leaves_makes_room() {
    let mut world = World::new();
    world.ask(1, &[1]);
    let mut granted = |join: u32, vlan: u32| world.ask(1, &[4 | join << 16, vlan]) >> 31 == 1;
    assert_eq!([1, 2, 3, 4, 5, 4].map(|vlan| granted(1, vlan)), [true, true, true, true, false, true]);
    assert!(granted(0, 2) && granted(1, 5) && !granted(1, 6));
    assert!(!granted(1, 0) && !granted(1, 4096));
    let mut vlans = world.opened.nic.virtual_functions()[1].vlans.clone();
    vlans.sort_unstable();
    assert_eq!(vlans, [1, 3, 4, 5]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 100 }))]

    #[test]
    fn whatever_a_function_asks_for_the_others_keep_what_they_have(
        trusted in any::<bool>(),
        requests in proptest::collection::vec((0..10u32, any::<u32>(), any::<[u32; 4]>(), any::<bool>()), 1..100)
    ) {
        let mut world = World::new();
        for vf in [0, 2] {
            world.ask(vf, &[1]);
        }
        let settings = Settings { trusted, ..Settings::default() };
        world.opened.nic.set_virtual_function(HOSTILE, settings).unwrap();
        let before = world.others();
        let taken = [0, 2].map(|n: usize| world.opened.nic.virtual_functions()[n].mac);
        world.ask(HOSTILE, &[1]);
        for (kind, number, [a, b, c, d], plausible) in requests {
            // Mostly kinds that mean something, and VLANs that exist.
            let first = if plausible { kind | number & if kind == 2 { 0 } else { 0x3_0000 } } else { number };
            let a = match (kind, plausible) {
                (2, true) if number & 1 == 0 => u32::from_le_bytes([taken[0][0], 0, 0, 0]),
                (4, true) => a & 0xfff,
                _ => a,
            };
            world.ask(HOSTILE, &[first, a, if kind == 2 { b & (0xffff * (number & 1)) } else { b }, c, d]);
            let function = &world.opened.nic.virtual_functions()[HOSTILE as usize];
            prop_assert!(function.vlans.len() <= 4 && !taken.contains(&function.mac) && function.mac[0] & 1 == 0);
            prop_assert!((68..=9728).contains(&function.longest));
        }
        let heard = &world.opened.nic.virtual_functions()[HOSTILE as usize];
        prop_assert!(heard.granted + heard.refused > 0);
        prop_assert_eq!(world.others(), before);
        // VLANs are its own and the adapter's.
        let vlans = (0..32).map(|i| world.card.register(VLVF(i).offset())).filter(|v| v >> 31 == 1);
        let pools: Vec<u32> = vlans.map(|v| v >> 12 & 0xff).collect();
        prop_assert!(pools.len() <= 4 && pools.iter().all(|&p| p == 1 << HOSTILE | 1 << COUNT), "{pools:?}");
    }
}
