//! Plans on machines laid out as files.

use super::*;
use crate::machine::tests::Tree;
use proptest::prelude::*;

fn request(housekeeping: u32, workers: u32) -> Request {
    Request {
        housekeeping: Wanted::Count(housekeeping),
        workers: Wanted::Count(workers),
        near: Vec::new(),
        guests: Vec::new(),
        held: CoreSet::default(),
    }
}

fn near(node: u32) -> Near {
    Near { name: format!("card{node}"), node }
}

fn guest(name: &str, vcpus: u32) -> Guest {
    Guest { name: name.to_owned(), vcpus, threads: 1, node: None, cores: None }
}

fn planned(machine: &Machine, request: &Request) -> Result<Plan, Vec<PlanError>> {
    plan(machine, &machine.cores.keys().copied().collect(), request)
}

fn refused(machine: &Machine, request: &Request) -> String {
    let errors = planned(machine, request).unwrap_err();
    errors.iter().map(|error| format!("{:?}: {error}\n", error.part)).collect()
}

#[test]
fn two_for_housekeeping_two_workers_beside_the_card_and_the_rest_for_vcpus() {
    let machine = Tree::new(2, 4, 1).machine();
    let request =
        Request { near: vec![near(1)], guests: vec![guest("fw", 2), guest("nat", 2)], ..request(2, 2) };
    let plan = planned(&machine, &request).unwrap();
    assert_eq!((&plan.housekeeping, &plan.workers), (&vec![0, 1], &vec![4, 5]));
    // The first machine beside the workers, the second where there is room for all of it.
    assert_eq!(plan.guests, [[6, 7], [2, 3]]);
    assert_eq!(plan.why[&4], "node 1, beside card1");
    assert_eq!(plan.why[&6], "node 1, the workers'");
    assert_eq!(plan.why[&2], "node 0: node 1 of the workers has too few cores left");
    assert_eq!(planned(&machine, &request).unwrap(), plan, "the same again");
}

#[test]
fn nobody_shares_a_physical_core_with_a_poller() {
    // Threads of cores 0 to 3 are 4 to 7.
    let machine = Tree::new(1, 4, 2).machine();
    let plan = planned(&machine, &Request { guests: vec![guest("fw", 2)], ..request(2, 1) }).unwrap();
    assert_eq!((&plan.housekeeping, &plan.workers), (&vec![0, 4], &vec![1]));
    assert_eq!(plan.guests, [[2, 3]]);
    assert_eq!(plan.why[&5], "left idle: the other thread of core 1");
    let three = Request { guests: vec![guest("fw", 3)], ..request(2, 1) };
    let said = refused(&machine, &three);
    assert!(said.contains("Guest(0): 3 cores for the vCPUs of fw are wanted, and 2 can be had"), "{said}");
    // A guest that is to see threads gets both of each core.
    let four = Request { guests: vec![Guest { threads: 2, ..guest("fw", 4) }], ..request(2, 1) };
    assert_eq!(planned(&machine, &four).unwrap().guests, [[2, 6, 3, 7]]);
    // One of housekeeping leaves the thread beside it to nobody who polls.
    let one = planned(&machine, &Request { guests: vec![guest("fw", 2)], ..request(1, 1) }).unwrap();
    assert_eq!((one.housekeeping, one.workers, one.guests), (vec![0], vec![1], vec![vec![2, 3]]));
}

#[test]
fn four_sockets_with_cards_on_two_of_them_each_get_a_worker_first() {
    let machine = Tree::new(4, 4, 2).machine();
    let request = Request { near: vec![near(3), near(3), near(1)], ..request(2, 3) };
    let plan = planned(&machine, &request).unwrap();
    assert_eq!((plan.housekeeping, plan.workers), (vec![0, 16], vec![12, 4, 13]));
    assert_eq!(plan.why[&12], "node 3, beside card3, card3");
}

#[test]
fn vcpus_are_beside_their_memory_and_workers_without_a_card_beside_them() {
    let machine = Tree::new(2, 4, 1).machine();
    let request = Request { guests: vec![Guest { node: Some(1), ..guest("fw", 2) }], ..request(1, 1) };
    let plan = planned(&machine, &request).unwrap();
    assert_eq!((plan.workers, plan.guests), (vec![4], vec![vec![5, 6]]));
    assert_eq!(plan.why[&5], "node 1, its memory's");
}

#[test]
fn a_card_on_a_node_without_cores_is_served_from_the_nearest_one() {
    let tree = Tree::new(3, 2, 1);
    tree.node(7, 1 << 20);
    tree.file("sys/devices/system/node/node2/distance", "21 21 10 12");
    tree.file("sys/devices/system/node/node0/distance", "10 21 21 40");
    tree.file("sys/devices/system/node/node1/distance", "21 10 21 40");
    let plan = planned(&tree.machine(), &Request { near: vec![near(7)], ..request(1, 1) }).unwrap();
    assert_eq!(plan.workers, [4]);
    assert_eq!(plan.why[&4], "node 2: node 7 of card7 has no core left");
}

#[test]
fn lists_of_the_file_win_and_the_rest_is_chosen_around_them() {
    let machine = Tree::new(1, 8, 1).machine();
    let request = Request {
        housekeeping: Wanted::These(vec![7]),
        guests: vec![guest("auto", 2), Guest { cores: Some(vec![0]), ..guest("named", 1) }],
        held: [1].into_iter().collect(),
        ..request(0, 2)
    };
    let plan = planned(&machine, &request).unwrap();
    assert_eq!((plan.housekeeping, plan.workers), (vec![7], vec![2, 3]));
    assert_eq!(plan.guests, [vec![4, 5], vec![0]]);
    assert_eq!(plan.why[&0], "named in the file");
}

#[test]
fn conflicts_and_cores_that_are_not_there_are_all_told() {
    let tree = Tree::new(1, 4, 1);
    tree.file("sys/devices/system/cpu/online", "0-2");
    let request = Request {
        housekeeping: Wanted::These(vec![0, 3]),
        workers: Wanted::These(vec![0]),
        guests: vec![Guest { cores: Some(vec![9]), ..guest("fw", 1) }, guest("nat", 4)],
        ..request(0, 0)
    };
    let said = refused(&tree.machine(), &request);
    for words in [
        "Housekeeping: core 3 does not exist or is offline; this machine has 0-2",
        "Workers: core 0 is given to two",
        "Guest(0): core 9 does not exist",
        "Guest(1): 4 cores for the vCPUs of nat are wanted, and 2 can be had",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
}

#[test]
fn what_the_process_may_not_use_is_nobodys() {
    let machine = Tree::new(1, 4, 2).machine();
    let permitted: CoreSet = "0-2,4-5".parse().unwrap();
    let chosen = plan(&machine, &permitted, &request(1, 1)).unwrap();
    // The other thread of core 2 is somebody else's.
    assert_eq!((chosen.housekeeping, chosen.workers), (vec![0], vec![1]));
    let errors = plan(&machine, &permitted, &request(1, 2)).unwrap_err();
    assert!(
        errors[0].message.contains("1 can be had") && errors[0].message.contains("0-2,4-5 permitted"),
        "{errors:?}"
    );
}

#[test]
fn cores_that_the_kernel_isolated_are_for_pollers_and_not_for_the_rest() {
    let tree = Tree::new(1, 8, 1);
    tree.file("sys/devices/system/cpu/isolated", "0,5-6");
    let plan = planned(&tree.machine(), &Request { guests: vec![guest("fw", 1)], ..request(2, 2) }).unwrap();
    assert_eq!((plan.housekeeping, plan.workers, plan.guests), (vec![1, 2], vec![0, 5], vec![vec![6]]));
}

#[test]
fn a_machine_stays_near_the_cache_of_its_workers() {
    let tree = Tree::new(1, 8, 1);
    for core in 0..8 {
        tree.cache(core, if core < 4 { "0-3" } else { "4-7" });
    }
    let request = Request { workers: Wanted::These(vec![4]), guests: vec![guest("fw", 2)], ..request(1, 0) };
    assert_eq!(planned(&tree.machine(), &request).unwrap().guests, [[5, 6]]);
}

#[test]
fn one_core_is_not_enough_for_a_poller_and_says_so() {
    let said = refused(&Tree::new(1, 1, 2).machine(), &request(1, 1));
    assert!(said.contains("Workers: 1 cores for workers are wanted, and 0 can be had: this machine has 2, of which a poller takes both threads"), "{said}");
}

#[test]
fn memory_without_cores_and_nodes_with_gaps_in_their_numbers_are_served_from_where_it_is_nearest() {
    // Node 2 is memory only, node 5 cores only; there is no node 1, 3 or 4.
    let tree = Tree::new(1, 4, 1);
    tree.node(2, 1 << 20);
    tree.node(5, 0);
    tree.file("sys/devices/system/cpu/online", "0-7");
    (4..8).for_each(|cpu| tree.cpu(cpu, 5, &cpu.to_string()));
    tree.file("sys/devices/system/node/node0/distance", "10 40 21");
    tree.file("sys/devices/system/node/node2/distance", "40 10 17");
    tree.file("sys/devices/system/node/node5/distance", "21 17 10");
    let request = Request {
        near: vec![near(5)],
        guests: vec![Guest { node: Some(2), ..guest("fw", 2) }],
        ..request(1, 1)
    };
    let plan = planned(&tree.machine(), &request).unwrap();
    assert_eq!((plan.housekeeping, plan.workers), (vec![0], vec![4]));
    assert_eq!(plan.guests, [[5, 6]]);
}

#[test]
fn a_core_whose_other_thread_is_switched_off_is_whole() {
    let tree = Tree::new(1, 4, 2);
    tree.file("sys/devices/system/cpu/online", "0-4,6");
    let plan = planned(&tree.machine(), &Request { guests: vec![guest("fw", 1)], ..request(2, 1) }).unwrap();
    assert_eq!((plan.housekeeping, plan.workers, plan.guests), (vec![0, 4], vec![1], vec![vec![2]]));
    assert_eq!(plan.why[&6], "left idle: the other thread of core 2");
    assert!(!plan.why.contains_key(&5), "{:?}", plan.why);
}

#[test]
fn threads_that_are_numbered_side_by_side_and_cores_without_any_are_told_apart() {
    // 0 to 3 are two cores of two threads, 4 to 7 four cores of one, as on hybrid processors.
    let tree = Tree::new(1, 8, 1);
    for (cpu, threads) in [(0, "0-1"), (1, "0-1"), (2, "2-3"), (3, "2-3")] {
        tree.cpu(cpu, 0, threads);
    }
    let plan = planned(&tree.machine(), &Request { guests: vec![guest("fw", 3)], ..request(2, 2) }).unwrap();
    assert_eq!((&plan.housekeeping, &plan.workers), (&vec![0, 1], &vec![2, 4]));
    assert_eq!(plan.guests, [[5, 6, 7]]);
    assert_eq!(plan.why[&3], "left idle: the other thread of core 2");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Whatever the machine looks like: nobody has two tasks, nobody is where nobody can run, and no poller shares its physical core
    /// with anybody else's task.
    #[test]
    fn no_plan_gives_a_core_twice_or_a_pollers_other_thread_away(
        (nodes, cores, threads) in (1u32..5, 1u32..5, 1u32..3),
        offline in proptest::collection::btree_set(1u32..32, 0..8),
        isolated in proptest::collection::btree_set(0u32..32, 0..16),
        (housekeeping, workers) in (1u32..4, 1u32..5),
        vcpus in proptest::collection::vec((1u32..5, proptest::option::of(0u32..5)), 0..4),
        cards in proptest::collection::vec(0u32..6, 0..3),
    ) {
        let tree = Tree::new(nodes, cores, threads);
        let online: CoreSet = (0..nodes * cores * threads).filter(|core| !offline.contains(core)).collect();
        tree.file("sys/devices/system/cpu/online", &online.to_string());
        tree.file("sys/devices/system/cpu/isolated", &CoreSet::from_iter(isolated).to_string());
        let machine = tree.machine();
        let guests = vcpus.iter().map(|(vcpus, node)| Guest { node: *node, ..guest("g", *vcpus) }).collect();
        let request = Request { near: cards.into_iter().map(near).collect(), guests, ..request(housekeeping, workers) };
        if let Ok(plan) = planned(&machine, &request) {
            prop_assert_eq!((plan.housekeeping.len(), plan.workers.len()), (housekeeping as usize, workers as usize));
            let pollers: Vec<u32> = plan.workers.iter().chain(plan.guests.iter().flatten()).copied().collect();
            let all: Vec<u32> = plan.housekeeping.iter().chain(&pollers).copied().collect();
            let different: CoreSet = all.iter().copied().collect();
            prop_assert_eq!(different.len(), all.len(), "{:?}", plan);
            prop_assert!(all.iter().all(|core| online.contains(*core)), "{:?}", plan);
            for poller in &pollers {
                let threads = &machine.cores[poller].threads;
                prop_assert!(threads.iter().all(|other| other == *poller || !different.contains(other)), "{:?}", plan);
            }
            prop_assert_eq!(planned(&machine, &request).unwrap(), plan);
        }
    }
}
