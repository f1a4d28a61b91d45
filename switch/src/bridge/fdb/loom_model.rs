//! The races of the learning table under the model checker, which tries every interleaving and every value that a load may
//! see: `./check loom` runs it.
//!
//! Buckets have one slot here (see [`SLOTS`]), so that addresses meet in it. Who changes most runs on the main thread: the checker
//! looks for other orders where a load follows another thread's store, and not where a store follows a load that its
//! own thread repeated meanwhile.

use super::*;
use loom::sync::Arc;
use loom::thread;

fn key(n: u64) -> Key {
    Key::new(Mac::from_wire(n << 8 | 2), 0)
}

fn learn(fdb: &Fdb, n: u64, port: u16) -> Learn {
    fdb.learn(key(n), fdb.home(key(n)), port, 8, 0)
}

fn port_of(fdb: &Fdb, n: u64) -> Option<u16> {
    fdb.lookup(key(n), fdb.home(key(n))).map(Value::port)
}

/// A table of `buckets` slots, which does not outlive one run of the model.
fn table(buckets: usize) -> Arc<Fdb> {
    Arc::new(Fdb::with(buckets, 3, [1, 0x9e37_79b9_7f4a_7c15]))
}

/// Looks `wanted` up while its slot goes from address 1 (on port 1) to address 2 (on port 2) and back.
fn look_up_while_the_slot_changes_hands(wanted: u64) {
    loom::model(move || {
        let fdb = table(1);
        learn(&fdb, 1, 1);
        let other = fdb.clone();
        let reader = thread::spawn(move || port_of(&other, wanted));
        fdb.flush_port(1);
        learn(&fdb, 2, 2);
        fdb.flush_port(2);
        learn(&fdb, 1, 1);
        let seen = reader.join().unwrap();
        assert!(seen.is_none() || seen == Some(wanted as u16), "address {wanted} on port {seen:?}");
    });
}

#[test]
fn a_lookup_never_returns_the_port_of_an_address_that_had_the_slot_in_between() {
    look_up_while_the_slot_changes_hands(1);
}

#[test]
fn a_lookup_never_returns_the_port_of_an_address_that_has_the_slot_before_and_after() {
    look_up_while_the_slot_changes_hands(2);
}

#[test]
fn two_workers_that_learn_one_address_leave_it_in_the_table_once_and_counted_once() {
    loom::model(|| {
        let fdb = table(2);
        let other = fdb.clone();
        let worker = thread::spawn(move || learn(&other, 1, 1));
        let here = learn(&fdb, 1, 2);
        let there = worker.join().unwrap();
        assert!(here == Learn::Learnt || there == Learn::Learnt, "{here:?}, {there:?}");
        let entries: Vec<_> = fdb.entries().collect();
        assert_eq!(entries.len(), 1);
        assert_eq!(
            (fdb.learnt_on(1), fdb.learnt_on(2)),
            (u32::from(entries[0].port == 1), u32::from(entries[0].port == 2))
        );
    });
}

#[test]
fn two_addresses_that_want_one_slot_do_not_overwrite_each_other() {
    loom::model(|| {
        let fdb = table(2);
        let other = fdb.clone();
        let worker = thread::spawn(move || learn(&other, 1, 1));
        let here = learn(&fdb, 2, 2);
        let there = worker.join().unwrap();
        assert_eq!(port_of(&fdb, 2), (here == Learn::Learnt).then_some(2));
        assert_eq!(port_of(&fdb, 1), (there == Learn::Learnt).then_some(1));
        assert!(here == Learn::Learnt || there == Learn::Learnt);
        assert_eq!(fdb.learnt_on(1) + fdb.learnt_on(2), fdb.entries().count() as u32);
    });
}

#[test]
fn a_refresh_never_brings_back_what_was_removed_or_touches_its_successor() {
    loom::model(|| {
        let fdb = table(1);
        learn(&fdb, 1, 1);
        let other = fdb.clone();
        let worker = thread::spawn(move || other.learn(key(1), other.home(key(1)), 1, 8, 7));
        fdb.flush_port(1);
        let here = learn(&fdb, 2, 2);
        worker.join().unwrap();
        let entries: Vec<_> = fdb.entries().collect();
        assert!(entries.len() <= 1);
        if here == Learn::Learnt {
            assert_eq!((entries[0].mac, entries[0].port, entries[0].seen), (key(2).mac(), 2, 0));
        }
        assert_eq!(fdb.learnt_on(1) + fdb.learnt_on(2), entries.len() as u32);
    });
}
