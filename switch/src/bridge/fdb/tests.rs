use super::*;
use proptest::prelude::*;

const NO_LIMIT: u32 = u32::MAX;

fn table() -> Fdb {
    Fdb::new(1024).unwrap()
}

fn mac(n: u64) -> Mac {
    Mac::from_wire(n << 8 | 0x02)
}

fn key(n: u64) -> Key {
    Key::new(mac(n), 0)
}

fn learn(fdb: &Fdb, n: u64, port: u16, limit: u32, now: u32) -> Learn {
    fdb.learn(key(n), fdb.home(key(n)), port, limit, now)
}

fn port_of(fdb: &Fdb, key: Key) -> Option<u16> {
    let port = fdb.lookup(key, fdb.home(key)).map(Value::port);
    if let Some(port) = port {
        let at_home = fdb.at_home(key, fdb.home(key));
        assert!(at_home == Value::ABSENT || at_home.port() == port);
    }
    port
}

#[test]
fn an_address_is_found_on_the_port_it_was_learnt_on_and_only_in_its_vlan() {
    let fdb = table();
    let (ten, twenty) = (Key::new(mac(1), 10), Key::new(mac(1), 20));
    assert_eq!(fdb.learn(ten, fdb.home(ten), 3, NO_LIMIT, 5), Learn::Learnt);
    assert_eq!((port_of(&fdb, ten), port_of(&fdb, twenty), port_of(&fdb, key(1))), (Some(3), None, None));
    assert_eq!(fdb.learn(twenty, fdb.home(twenty), 4, NO_LIMIT, 5), Learn::Learnt);
    assert_eq!((port_of(&fdb, ten), port_of(&fdb, twenty)), (Some(3), Some(4)));
}

#[test]
fn an_address_moves_with_its_station() {
    let fdb = table();
    assert_eq!(learn(&fdb, 1, 3, NO_LIMIT, 0), Learn::Learnt);
    assert_eq!(learn(&fdb, 1, 3, NO_LIMIT, 0), Learn::Known);
    assert_eq!(learn(&fdb, 1, 4, NO_LIMIT, 1), Learn::Moved);
    assert_eq!(port_of(&fdb, key(1)), Some(4));
    assert_eq!((fdb.learnt_on(3), fdb.learnt_on(4)), (0, 1));
}

#[test]
fn the_time_is_written_only_in_another_second() {
    let fdb = table();
    learn(&fdb, 1, 3, NO_LIMIT, 7);
    let home = fdb.home(key(1));
    let value = || fdb.lookup(key(1), home).unwrap();
    assert!(value().is_fresh_at(3, 7));
    assert!(!value().is_fresh_at(3, 8) && !value().is_fresh_at(4, 7));
    learn(&fdb, 1, 3, NO_LIMIT, 8);
    assert!(value().is_fresh_at(3, 8));
}

#[test]
fn a_static_entry_never_moves_and_never_ages() {
    let fdb = table();
    learn(&fdb, 1, 3, NO_LIMIT, 0);
    fdb.set_static(&[StaticEntry { mac: mac(1), vid: 0, port: 9 }]).unwrap();
    assert_eq!((port_of(&fdb, key(1)), fdb.learnt_on(3), fdb.learnt_on(9)), (Some(9), 0, 0));
    assert_eq!(learn(&fdb, 1, 3, NO_LIMIT, 1), Learn::Pinned);
    assert_eq!(fdb.age(0, fdb.buckets(), 1_000_000, 300).removed, 0);
    assert_eq!((fdb.flush(), fdb.flush_port(9)), (0, 0));
    assert_eq!(port_of(&fdb, key(1)), Some(9));
    fdb.set_static(&[]).unwrap();
    assert_eq!(port_of(&fdb, key(1)), None);
}

#[test]
fn static_entries_for_groups_and_zero_are_refused_and_change_nothing() {
    let fdb = table();
    let good = StaticEntry { mac: mac(1), vid: 0, port: 1 };
    fdb.set_static(&[good]).unwrap();
    for wrong in ["ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01", "00:00:00:00:00:00"] {
        let wrong = StaticEntry { mac: wrong.parse().unwrap(), ..good };
        assert_eq!(fdb.set_static(&[wrong]), Err(FdbError::NotAStation(wrong.mac)));
    }
    assert_eq!(port_of(&fdb, key(1)), Some(1));
}

#[test]
fn what_is_not_seen_for_the_maximum_age_is_forgotten() {
    let fdb = table();
    learn(&fdb, 1, 3, NO_LIMIT, 100);
    learn(&fdb, 2, 3, NO_LIMIT, 200);
    learn(&fdb, 3, 3, NO_LIMIT, 401); // a worker's clock may be a little ahead
    assert_eq!(fdb.age(0, fdb.buckets(), 400, 300).removed, 0);
    assert_eq!(fdb.age(0, fdb.buckets(), 401, 300).removed, 1);
    assert_eq!((port_of(&fdb, key(1)), port_of(&fdb, key(2)), fdb.learnt_on(3)), (None, Some(3), 2));
}

#[test]
fn ageing_looks_at_no_more_buckets_than_it_was_asked_to_and_comes_to_the_end() {
    let fdb = table();
    (0..200).for_each(|n| {
        learn(&fdb, n, 1, NO_LIMIT, 0);
    });
    let (mut from, mut passes, mut removed) = (Some(0), 0, 0);
    while let Some(at) = from {
        let pass = fdb.age(at, 16, 1000, 300);
        assert!(pass.next.is_none_or(|next| next == at + 16));
        assert!(pass.removed <= 16 * SLOTS);
        (from, passes, removed) = (pass.next, passes + 1, removed + pass.removed);
    }
    assert_eq!((passes, removed, fdb.learnt_on(1)), (fdb.buckets() / 16, 200, 0));
    assert_eq!(fdb.age(usize::MAX, 1, 0, 0), Pass { next: None, removed: 0 });
}

#[test]
fn a_flushed_port_keeps_no_address_and_others_keep_theirs() {
    let fdb = table();
    (0..100).for_each(|n| {
        learn(&fdb, n, (n % 3) as u16, NO_LIMIT, 0);
    });
    assert_eq!(fdb.flush_port(1), 33);
    assert!((0..100).all(|n| port_of(&fdb, key(n)) == (n % 3 != 1).then_some((n % 3) as u16)));
    assert_eq!((fdb.learnt_on(0), fdb.learnt_on(1), fdb.learnt_on(2)), (34, 0, 33));
}

#[test]
fn a_guest_that_floods_source_addresses_uses_up_its_own_limit_and_evicts_nobody() {
    let fdb = table();
    (0..100).for_each(|n| assert_eq!(learn(&fdb, n, 1, 100, 0), Learn::Learnt));
    for n in 1000..100_000 {
        assert!(matches!(learn(&fdb, n, 2, 50, 0), Learn::Learnt | Learn::LimitReached));
    }
    assert_eq!((fdb.learnt_on(1), fdb.learnt_on(2)), (100, 50));
    assert!((0..100).all(|n| port_of(&fdb, key(n)) == Some(1)));
    // Nor can it take over others' addresses once its limit is reached.
    assert_eq!(learn(&fdb, 5, 2, 50, 0), Learn::LimitReached);
    assert_eq!(port_of(&fdb, key(5)), Some(1));
}

#[test]
fn a_full_table_learns_nothing_more_and_forgets_nothing() {
    let fdb = table();
    let learnt: Vec<u64> =
        (0..10_000).filter(|&n| learn(&fdb, n, (n % 7) as u16, NO_LIMIT, 0) == Learn::Learnt).collect();
    assert!(learnt.len() > fdb.capacity() * 99 / 100, "{} of {}", learnt.len(), fdb.capacity());
    assert!(learnt.iter().all(|&n| port_of(&fdb, key(n)) == Some((n % 7) as u16)));
    assert_eq!(fdb.entries().count(), learnt.len());
    let counted: u32 = (0..7).map(|port| fdb.learnt_on(port)).sum();
    assert_eq!(counted as usize, learnt.len());
}

#[test]
fn a_table_three_quarters_full_has_learnt_every_address() {
    let fdb = Fdb::new(DEFAULT_ENTRIES).unwrap();
    assert!((0..49_152).all(|n| learn(&fdb, n, 1, NO_LIMIT, 0) == Learn::Learnt));
    assert!((0..49_152).all(|n| port_of(&fdb, key(n)) == Some(1)));
}

#[test]
fn addresses_that_crc32_sends_to_one_value_share_no_bucket() {
    // Every multiple of the CRC-32C polynomial (33 bits) has the same CRC, whatever the start value.
    let poly = 0x1_1edc_6f41_u64;
    let fdb = Fdb::new(DEFAULT_ENTRIES).unwrap();
    let colliding = (0..1u64 << 15).map(|n| {
        let product = (0..15).filter(|bit| n >> bit & 1 == 1).fold(0, |sum, bit| sum ^ poly << bit);
        Key::new(Mac::from_wire(product), 0)
    });
    let mut load = vec![0; fdb.buckets()];
    colliding.for_each(|key| load[fdb.home(key).0 as usize % fdb.buckets()] += 1);
    assert!(load.iter().max().unwrap() < &32, "32,768 addresses in 16,384 buckets: {:?}", load.iter().max());
}

#[test]
fn a_size_that_is_no_power_of_two_or_out_of_range_is_refused() {
    for size in [0, 1, 512, 1000, 65_535, 1 << 25] {
        assert_eq!(Fdb::new(size).err(), Some(FdbError::Size(size)));
    }
}

#[test]
fn a_port_number_beyond_all_ports_learns_nothing() {
    let fdb = table();
    assert_eq!(learn(&fdb, 1, u16::MAX, NO_LIMIT, 0), Learn::LimitReached);
    assert_eq!((port_of(&fdb, key(1)), fdb.learnt_on(u16::MAX)), (None, 0));
}

/// Every port has its own addresses, except a few roaming ones; workers learn and look up, housekeeping flushes and ages.
#[test]
fn a_lookup_never_returns_the_port_of_another_address_under_concurrent_change() {
    let fdb = Fdb::with(16, 8, [0x1234_5678_9abc_def1, 0x9e37_79b9_7f4a_7c15]);
    let stop = std::sync::atomic::AtomicBool::new(false);
    let stopped = || stop.load(std::sync::atomic::Ordering::Relaxed);
    std::thread::scope(|scope| {
        for worker in 0..3u16 {
            let (fdb, stopped) = (&fdb, &stopped);
            scope.spawn(move || {
                let mut n = u64::from(worker);
                while !stopped() {
                    n = n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let who = n >> 33 & 0x7f;
                    // 0x60 and above roam between the ports; the others belong to port `who % 8`.
                    let port = if who >= 0x60 { (n >> 50 & 7) as u16 } else { (who % 8) as u16 };
                    learn(fdb, who, port, 24, (n >> 60) as u32);
                    let other = n >> 20 & 0x7f;
                    if let Some(found) = fdb.lookup(key(other), fdb.home(key(other))).map(Value::port) {
                        assert!(found < 8 && (other >= 0x60 || u64::from(found) == other % 8), "{other}");
                    }
                }
            });
        }
        for round in 0..4_000u32 {
            fdb.flush_port((round % 8) as u16);
            fdb.age(0, 16, round % 16, 2);
            assert!(fdb.entries().all(|entry| entry.port < 8));
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    // Quiet again: nothing is there twice, and the counts are those of the entries.
    let mut entries: Vec<_> = fdb.entries().collect();
    for port in 0..8 {
        let count = entries.iter().filter(|entry| entry.port == port).count();
        assert_eq!((count as u32, count <= 24), (fdb.learnt_on(port), true), "port {port}");
    }
    let all = entries.len();
    entries.sort_by_key(|entry| entry.mac);
    entries.dedup_by_key(|entry| entry.mac);
    assert_eq!(entries.len(), all);
}

proptest! {
    #[test]
    fn the_table_agrees_with_a_map_for_any_sequence_of_frames_and_flushes(
        steps in prop::collection::vec((0u64..60, 0u16..4, 0u8..20), 1..400),
    ) {
        let fdb = table();
        let mut model = std::collections::BTreeMap::new();
        for (n, port, what) in steps {
            match what {
                0 => {
                    fdb.flush_port(port);
                    model.retain(|_, p| *p != port);
                }
                _ => {
                    let count = model.values().filter(|p| **p == port).count();
                    let expected = match model.get(&n) {
                        Some(p) if *p == port => Learn::Known,
                        _ if count >= 10 => Learn::LimitReached,
                        Some(_) => Learn::Moved,
                        None => Learn::Learnt,
                    };
                    prop_assert_eq!(learn(&fdb, n, port, 10, 0), expected);
                    if matches!(expected, Learn::Moved | Learn::Learnt) {
                        model.insert(n, port);
                    }
                }
            }
            for port in 0..4 {
                let count = model.values().filter(|p| **p == port).count();
                prop_assert_eq!(fdb.learnt_on(port) as usize, count);
            }
        }
        for n in 0..60 {
            prop_assert_eq!(port_of(&fdb, key(n)), model.get(&n).copied());
        }
    }
}
