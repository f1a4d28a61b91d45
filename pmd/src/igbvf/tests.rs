//! The driver of a virtual function against an adapter that does not answer, and queues that do not start.

use std::sync::atomic::Ordering;

use super::*;
use crate::intel::standin::{COMMAND, MAILBOX, MAILBOX_MEMORY, MASTER, Standin};
use crate::intel::tests::{options, space_and_arena};

/// How opening ends when registers read like this, beside what an adapter that grants everything has in them.
fn refused(stuck: &[(u32, u32, u32)]) -> String {
    let (space, arena) = space_and_arena();
    let card = Standin::new(&space, I82576Vf::IDS[0]);
    card.adapter_that_grants();
    card.stuck.lock().unwrap().extend(stuck);
    let error = Igbvf::open(card.clone(), &arena, options()).err().unwrap();
    assert_eq!(card.config[COMMAND].load(Ordering::Relaxed) & MASTER, 0, "bus mastering is off");
    assert!(Pool::new(&arena, crate::intel::tests::BUFFERS).is_ok(), "all buffers are home");
    error.to_string()
}

#[test]
fn each_wait_of_the_start_ends_with_register_wanted_and_got() {
    const RSTI: u32 = 1 << 6;
    const VFU: u32 = 1 << 2;
    const PFSTS: u32 = 1 << 4;
    const ENABLE: u32 = 1 << 25;
    // An adapter that does not let it begin, one that takes and answers no message, and one that answers something else without end.
    for (stuck, waited) in [
        ((MAILBOX, RSTI, RSTI), "V2PMAILBOX.RSTI: wanted 0x0, read 0x40 for 300ms"),
        ((MAILBOX, VFU, 0), "V2PMAILBOX.VFU: wanted 0x4, read 0x0 for 2s"),
        ((MAILBOX, PFSTS, 0), "V2PMAILBOX.PFSTS: wanted 0x10, read 0x0 for 2s"),
        ((MAILBOX_MEMORY, u32::MAX, 0x8000_0007), "VMBMEM[0]: wanted 0x80000001, read 0x80000007 for 2s"),
    ] {
        let told = refused(&[stuck]);
        assert!(told.starts_with(&format!("{waited}; nobody drives")), "{told}");
    }
    assert_eq!(refused(&[(0x3828, ENABLE, 0)]), "TXDCTL[0].ENABLE: wanted 0x2000000, read 0x0 for 100ms");
    assert_eq!(refused(&[(0x2828, ENABLE, 0)]), "RXDCTL[0].ENABLE: wanted 0x2000000, read 0x0 for 100ms");
}

#[test]
fn queues_that_do_not_end_are_told_and_the_function_is_kept_from_memory_all_the_same() {
    for (register, name) in [(0x3828, "TXDCTL"), (0x2828, "RXDCTL")] {
        let (space, arena) = space_and_arena();
        let card = Standin::new(&space, I82576Vf::IDS[0]);
        card.adapter_that_grants();
        let opened = Igbvf::open(card.clone(), &arena, options()).unwrap();
        card.stuck.lock().unwrap().push((register, 1 << 25, 1 << 25));
        let error = I82576Vf::quiet(opened.nic.core.regs()).unwrap_err();
        assert_eq!(error.to_string(), format!("{name}[0].ENABLE: wanted 0x0, read 0x2000000 for 100ms"));
        drop(opened);
        assert_eq!(card.config[COMMAND].load(Ordering::Relaxed) & MASTER, 0);
    }
}

#[test]
fn a_link_that_never_comes_is_waited_for_no_longer_than_was_said() {
    let (space, arena) = space_and_arena();
    let card = Standin::new(&space, I82576Vf::IDS[0]);
    card.adapter_that_grants();
    let mut opened = Igbvf::open(card.clone(), &arena, options()).unwrap();
    card.stuck.lock().unwrap().push((0x0008, 2, 0));
    let error = opened.nic.wait_for_link(Duration::from_secs(3)).unwrap_err();
    assert_eq!(error.to_string(), "STATUS.LU: wanted 0x2, read 0x0 for 3s");
}
