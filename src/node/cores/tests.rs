use super::*;
use host::machine::{Core, Node};

/// Eight cores on two nodes, a card on node 1.
fn planner() -> Planner {
    let core = |number: u32| Core {
        number,
        socket: number / 4,
        node: number / 4,
        threads: [number].into_iter().collect(),
        caches: Vec::new(),
        isolated: false,
    };
    let node = |n: u32| (n, Node { cores: (4 * n..4 * n + 4).collect(), ..Node::default() });
    let card = host::pci::Function {
        bdf: "0000:81:00.0".parse().unwrap(),
        vendor: 0x8086,
        device: 0x10c9,
        class: 0x0002_0000,
        driver: None,
        node: Some(1),
        group: None,
        companions: Vec::new(),
        vfio_device: None,
        interfaces: vec!["ens1".to_owned()],
        physical: None,
        virtuals: Vec::new(),
        most_virtuals: None,
        virtual_distances: None,
    };
    let cores = (0..8).map(|n| (n, core(n))).collect();
    let machine = Machine { cores, nodes: (0..2).map(node).collect(), functions: vec![card] };
    Planner { machine: Ok((machine, (0..8).collect())) }
}

/// What is filled in, or what is wrong.
fn decided(text: &str) -> Result<Vec<(String, String)>, String> {
    let done = settings::parse(text, Path::new("f.toml"), |document, problems| {
        Some(planner().fills(document, problems))
    });
    let shown =
        |fill: Fill| (format!("{}.{}.{}", fill.table, fill.index, fill.key), fill.value.unwrap_or_default());
    Ok(done.map_err(|errors| errors.to_string())?.into_iter().map(shown).collect())
}

#[test]
fn a_plan_fills_what_is_auto_and_what_is_left_out_of_a_node() {
    let text = r#"
        [host]
        cores = { housekeeping = 2, workers = 2 }
        [switch]
        [[port]]
        kind = "nic"
        device = "0000:81:00.0"
        [[vm]]
        name = "fw"
        vcpus = 2
        vcpu_cores = "auto"
        [[vm]]
        name = "loose"
    "#;
    let filled = decided(text).unwrap();
    let filled: Vec<_> = filled.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    assert_eq!(
        filled,
        [
            ("switch.0.workers", "[4, 5]"),
            ("switch.0.housekeeping", "[0, 1]"),
            ("vm.0.vcpu_cores", "[6, 7]"),
            ("vm.0.emulator_cores", "[0, 1]"),
            ("vm.1.emulator_cores", "[0, 1]"),
        ]
    );
}

#[test]
fn without_cores_of_the_host_only_what_is_auto_is_filled_and_lists_stay() {
    assert_eq!(decided("[switch]\nworkers = [1]\n[[vm]]\nname = \"a\"").unwrap(), []);
    let filled = decided("[switch]\nworkers = \"auto\"\nhousekeeping = [3]").unwrap();
    assert_eq!(filled, [("switch.0.workers".to_owned(), "[0]".to_owned())]);
    let packet = "[switch]\nworkers = \"auto\"\n[[port]]\nkind = \"af_packet\"\ndevice = \"ens1\"";
    assert_eq!(decided(packet).unwrap()[0].1, "[4]");
    let around = "[host]\ncores = {}\n[switch]\nworkers = [0]\n[[vm]]\ntopology = { cores = 3 }\nvcpu_cores = \"auto\"";
    let filled = decided(around).unwrap();
    assert!(filled.contains(&("vm.0.vcpu_cores".to_owned(), "[4, 5, 6]".to_owned())), "{filled:?}");
}

#[test]
fn cores_of_disks_threads_are_nobodys_to_poll_on() {
    let text = r#"
        [host]
        cores = {}
        [switch]
        [[vm]]
        name = "fw"
        vcpu_cores = "auto"
        [[vm.disk]]
        path = "a"
        iothread_cores = [1]
        [[vm.disk]]
        path = "b"
        iothread_cores = [2]
    "#;
    let filled = decided(text).unwrap();
    let of = |key: &str| filled.iter().find(|(k, _)| k == key).unwrap().1.as_str();
    // Without cards they are beside each other, from core 0 on, and 1 and 2 are left out.
    assert_eq!(
        [of("switch.0.housekeeping"), of("switch.0.workers"), of("vm.0.vcpu_cores")],
        ["[0]", "[3]", "[4]"]
    );
}

#[test]
fn what_cannot_be_planned_is_told_with_its_line() {
    let too_many = "[switch]\nworkers = \"auto\"\n[[vm]]\nname = \"fw\"\nvcpus = 9\nvcpu_cores = \"auto\"";
    let said = decided(too_many).unwrap_err();
    assert!(
        said.contains("f.toml:6:14: `vcpu_cores`: 9 cores for the vCPUs of fw are wanted, and 6"),
        "{said}"
    );
    let said = decided("[host]\ncores = { workers = 2 }\n[switch]\nworkers = [1]").unwrap_err();
    assert!(said.contains("f.toml:2:21: `cores`: `workers` differs from that of [switch]"), "{said}");
    let said = decided("[host]\ncores = { housekeeping = [1] }\n[switch]\nworkers = [1]").unwrap_err();
    assert!(said.contains("core 1 is given to two"), "{said}");
    for (cores, message) in [
        ("{ workers = 0 }", "wanted how many cores"),
        ("{ workers = [] }", "is empty"),
        ("{ worker = 1 }", "did you mean `workers`?"),
        ("2", "wanted a table like"),
    ] {
        let said = decided(&format!("[host]\ncores = {cores}\n[switch]\nworkers = [1]")).unwrap_err();
        assert!(said.contains("f.toml:2:") && said.contains(message), "{said}");
    }
}
