//! Whole files: what is promised to whoever writes one.

use std::path::Path;

use super::*;

/// A machine with cores 0 to 7, of which 6 and 7 are not ours, the group `kvm`, and a socket that answers.
pub(super) struct Lab;

impl Surroundings for Lab {
    fn core(&self, core: u32) -> Result<(), String> {
        match core {
            0..=5 => Ok(()),
            6 | 7 => Err(format!("core {core} is not permitted")),
            _ => Err(format!("there is no core {core}")),
        }
    }

    fn group(&self, name: &str) -> Result<u32, String> {
        if name == "kvm" { Ok(36) } else { Err(format!("there is no group {name:?}")) }
    }

    fn socket(&self, path: &Path, _: SocketSide) -> Result<(), String> {
        if path.ends_with("busy.sock") { Err("is in use".to_owned()) } else { Ok(()) }
    }

    fn reads(&self, path: &Path) -> Result<(), String> {
        if path.ends_with("gone.pcap") { Err("is not there".to_owned()) } else { Ok(()) }
    }

    fn writes(&self, path: &Path) -> Result<(), String> {
        if path.ends_with("locked.pcap") { Err("is not permitted".to_owned()) } else { Ok(()) }
    }

    fn memory(&self) -> u64 {
        7 << 30
    }

    fn device(&self, name: &str, _: PortKind) -> Result<(), String> {
        if name == "tap7" { Err("there are no taps here".to_owned()) } else { Ok(()) }
    }
}

fn parse(text: &str) -> Result<Config, ConfigErrors> {
    Config::parse(text, Path::new("test.toml"), Path::new("/run/cableway"), &Lab)
}

/// The problems of a file, one a line, as the user sees them.
fn problems(text: &str) -> String {
    parse(text).unwrap_err().to_string()
}

/// A valid `[switch]` and the `[[port]]` keys given, on line 3.
fn port(keys: &str) -> Result<Config, ConfigErrors> {
    parse(&format!(
        "switch = {{ workers = [1, 2] }}\n[[port]]\n{keys}\nname = 'a'\nkind = 'vhost-user'\nsocket = 'a.sock'\n"
    ))
}

fn port_problem(keys: &str) -> String {
    port(keys).unwrap_err().to_string()
}

fn one(keys: &str) -> PortConfig {
    port(keys).unwrap().ports.remove(0)
}

/// Which end of its socket a guest's port is.
fn side(port: PortConfig) -> Side {
    match port.behind {
        Behind::VhostUser { side, .. } => side,
        other => panic!("{other:?}"),
    }
}

const CONFIGS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs");

#[test]
fn every_file_that_a_user_may_copy_is_valid() {
    let files: Vec<_> = std::fs::read_dir(CONFIGS).unwrap().map(|entry| entry.unwrap().path()).collect();
    // The others are of virtual machines and tuning profiles, whose own tests read them; of a node's, this is the switch's part. Cores
    // that a plan chooses ("auto") are the command's to fill in, and its tests plan such files.
    let is_ours = |file: &std::path::PathBuf| {
        let text = if file.is_file() { std::fs::read_to_string(file).unwrap() } else { String::new() };
        text.contains("\n[switch]") && !text.contains("workers = \"auto\"")
    };
    let files: Vec<_> = files.into_iter().filter(is_ours).collect();
    assert!(files.len() >= 3, "{files:?}");
    for file in files {
        if let Err(errors) = Config::load(&file, Path::new("/run/cableway"), &Lab) {
            panic!("{errors}");
        }
    }
}

#[test]
fn the_example_explains_every_key_and_every_feature() {
    let text = std::fs::read_to_string(format!("{CONFIGS}/example.toml")).unwrap();
    // A key counts as shown when a line sets it, or a comment shows how to: `# key = …`, or inside `{ key = …`.
    let shown = |key: &str| text.contains(&format!("\n{key} = ")) || text.contains(&format!("\n# {key} = "));
    let nested = |key: &str| text.contains(&format!("{{ {key} = ")) || text.contains(&format!(", {key} = "));
    for (table, key) in vocabulary() {
        assert!(if matches!(table, "switch" | "port") { shown(key) } else { nested(key) }, "{table}: {key}");
    }
    for feature in Feature::ALL {
        assert!(text.contains(&format!("#   {:<20}", feature.name())), "{}", feature.name());
    }
}

#[test]
fn a_port_with_nothing_but_its_socket_gets_the_documented_defaults() {
    let config = port("").unwrap();
    assert_eq!(
        config.switch,
        SwitchConfig {
            workers: vec![1, 2],
            housekeeping: None,
            idle: Idle::Poll,
            burst: 64,
            fdb_size: 65_536,
            fdb_age: Duration::from_secs(300),
            forward_reserved: false,
            confine_files: true,
        }
    );
    assert_eq!(
        config.ports,
        [PortConfig {
            name: "a".into(),
            behind: Behind::VhostUser {
                socket: "/run/cableway/a.sock".into(),
                side: Side::Server { mode: 0o660, group: None },
            },
            queue_pairs: 1,
            queue_workers: None,
            vlan: Vlan::Unaware,
            isolation: None,
            mtu: None,
            storm: Storm::default(),
            addresses: vec![],
            learn: true,
            learn_limit: 4_096,
            source_check: false,
            disable: FeatureSet::default(),
            max_memory: 7 << 30,
            inject: None,
            trace: None,
        }]
    );
}

#[test]
fn values_mean_what_they_say() {
    let pinned = one("queue_pairs = 2\nqueue_workers = [2, 1]\nsocket_mode = '0600'\nsocket_group = 'kvm'");
    assert_eq!(pinned.queue_workers, Some(vec![2, 1]));
    assert_eq!(side(pinned), Side::Server { mode: 0o600, group: Some(36) });
    assert_eq!(one("queue_pairs = 3\nworker = 2").queue_workers, Some(vec![2, 2, 2]));
    let client = one("mode = 'client'\nreconnect_ms = 250");
    assert_eq!(side(client), Side::Client { reconnect: Duration::from_millis(250) });
    let trunk = one("vlan = { trunk = [30, '10-19', 20, '15-25'], native = 1 }");
    assert_eq!(trunk.vlan, Vlan::Trunk { allowed: vec![10..=25, 30..=30], native: Some(1) });
    assert_eq!(trunk.vlan.to_string(), "trunk 10-25,30, native 1");
    for (written, bytes) in
        [("2", 2 << 30), ("'512 MiB'", 512 << 20), ("'3GiB'", 3 << 30), ("'1 TiB'", 1 << 40)]
    {
        assert_eq!(one(&format!("max_memory = {written}")).max_memory, bytes);
    }
    let off = one("disable = ['packed', 'log']").disable;
    assert_eq!(off.iter().collect::<Vec<_>>(), [Feature::Packed, Feature::Log]);
    let size = parse("[switch]\nworkers = [0]\nfdb_size = 100000").unwrap().switch.fdb_size;
    assert_eq!(size, 131_072);
}

#[test]
fn faults_are_written_in_percent_and_a_port_traces_to_a_file_of_its_own() {
    let port = one(
        "inject = { seed = 7, drop = 1, corrupt = 0.0001, reorder = 12.5, delay_us = 1000, direction = 'in' }",
    );
    let inject = port.inject.unwrap();
    let share = Share::of_millionths;
    assert_eq!((inject.drop, inject.corrupt, inject.reorder), (share(10_000), share(1), share(125_000)));
    assert_eq!((inject.duplicate, inject.delay), (share(0), Duration::from_millis(1)));
    let written = "seed = 7, drop = 1, corrupt = 0.0001, reorder = 12.5, delay_us = 1000, direction = \"in\"";
    assert_eq!(inject.to_string(), written);
    assert_eq!(
        one("inject = { duplicate = 100.0 }").inject.unwrap().to_string(),
        "seed = 1, duplicate = 100"
    );
    assert_eq!(one("trace = 'a.pcapng'").trace, Some("/run/cableway/a.pcapng".into()));
    for (keys, wanted) in [
        ("inject = { drop = 101 }", "`drop`: integer `101`: wanted a share in percent, from 0 to 100"),
        ("inject = { drop = -0.5 }", "wanted a share in percent"),
        ("inject = { drop = nan }", "wanted a share in percent"),
        ("inject = { drop = 0.00001 }", "in steps of 0.0001"),
        ("inject = { drop = '1 %' }", "`drop`: string \"1 %\": wanted a share in percent"),
        ("inject = { delay_us = 1000001 }", "wanted a whole number from 1 to 1000000"),
        ("inject = { seed = 3 }", "test.toml:3:10: port `a`: `inject` says nothing that should happen"),
        ("inject = { drop = 0 }", "`inject` says nothing that should happen"),
        ("inject = { drop = 1, direction = 'up' }", "\"up\" is unknown; there are `in`, `out` and `both`"),
        ("inject = { drop = 1, loss = 1 }", "unknown key `loss` in `inject`"),
        ("inject = 5", "`inject`: integer: wanted a table like { seed = …"),
        ("trace = 'locked.pcap'", "test.toml:3:9: port `a`: `trace`: is not permitted"),
    ] {
        let seen = port_problem(keys);
        assert!(seen.contains(wanted) && seen.lines().count() == 1, "{keys}: {seen}");
    }
    let two = |first: &str, second: &str| {
        let port = |name: &str, keys: &str| format!("[[port]]\nname = '{name}'\n{keys}\n");
        let file = "[switch]\nworkers = [1]\n".to_owned() + &port("a", first) + &port("b", second);
        parse(&file).unwrap_err().to_string()
    };
    let file = "/run/cableway/f is written by port `a` on line";
    assert!(two("kind = 'null'\ntrace = 'f'", "kind = 'null'\ntrace = 'f'").contains(file));
    assert!(two("kind = 'pcap'\nrecord = 'f'", "kind = 'null'\ntrace = 'f'").contains(file));
    assert!(
        two("kind = 'pcap'\nreplay = 'f'", "kind = 'null'\ntrace = 'f'")
            .contains("this would empty the file")
    );
}

#[test]
fn a_static_address_belongs_to_a_vlan_of_its_port() {
    let at = |vlan: &str, address: &str| {
        port(&format!("vlan = {vlan}\naddresses = [{address}]"))
            .map(|mut config| config.ports.remove(0).addresses[0].vlan)
    };
    let plain = "'02:00:00:00:00:01'";
    let in_20 = "{ address = '02:00:00:00:00:01', vlan = 20 }";
    assert_eq!(one(&format!("addresses = [{plain}]")).addresses[0].vlan, None);
    assert_eq!(at("{ access = 10 }", plain), Ok(Some(10)));
    assert_eq!(at("{ trunk = [20], native = 1 }", plain), Ok(Some(1)));
    assert_eq!(at("{ trunk = [20], native = 1 }", in_20), Ok(Some(20)));
    assert!(at("{ trunk = [20] }", plain).unwrap_err().to_string().contains("which VLAN"));
    assert!(
        at("{ access = 10 }", in_20).unwrap_err().to_string().contains("VLAN 20 is not one of the port's")
    );
}

#[test]
fn all_problems_are_found_in_one_pass_in_the_order_of_lines() {
    let text = "\
[swich]
[switch]
workers = [1, 1, 6, 99]
burst = 900
idle = \"sleeping\"
[[port]]
name = \"a\"
kind = \"vhost-usr\"
sokcet = \"a.sock\"
queue_pairs = \"two\"
[[port]]
name = \"a\"
kind = \"vhost-user\"
socket = \"busy.sock\"
worker = 3
vlan = { access = 5000 }
";
    let expected = "\
test.toml:1:2: unknown key `swich` outside of `[switch]` and `[[port]]`; did you mean `switch`?
test.toml:3:15: `workers`: core 1 is used already, in `workers` on line 3; a core has one task
test.toml:3:18: `workers`: core 6 is not permitted
test.toml:3:21: `workers`: there is no core 99
test.toml:4:9: `burst`: integer `900`: wanted a whole number from 1 to 64
test.toml:5:8: `idle`: \"sleeping\" is unknown; there are `poll` and `sleep`
test.toml:6:1: [[port]] needs `socket`: where a VMM finds it, as in `socket = \"vnf1.sock\"`
test.toml:8:8: port `a`: `kind`: \"vhost-usr\" is unknown; did you mean `vhost-user`?
test.toml:9:1: port `a`: unknown key `sokcet` in [[port]]; did you mean `socket`?
test.toml:10:15: port `a`: `queue_pairs`: string \"two\": wanted a whole number from 1 to 128
test.toml:12:8: port `a` is there already, on line 7: give this one another name
test.toml:14:10: port `a`: `socket`: is in use
test.toml:15:10: port `a`: core 3 is not one of `workers` [1, 1, 6, 99] in `[switch]`: add it there, or choose one of them
test.toml:16:19: port `a`: `vlan`: `access`: integer `5000`: wanted a whole number from 1 to 4094";
    assert_eq!(problems(text), expected);
}

#[test]
fn a_file_with_broken_syntax_is_reported_for_that_alone() {
    let text = "[switch]\nworkers = [1\nfdb_size = \n[[port]]\nname = a\n";
    let seen = problems(text);
    assert!(seen.starts_with("test.toml:") && !seen.contains("needs"), "{seen}");
    assert!(problems("[switch]\nworkers = [1]\nworkers = [2]\n").contains("test.toml:3:1: duplicate key"));
}

#[test]
fn a_wrong_value_says_what_is_wanted() {
    for (keys, wanted) in [
        ("kind2 = 1", "unknown key `kind2` in [[port]]; did you mean `kind`?"),
        ("mtu = 9500", "`mtu`: integer `9500`: wanted a whole number from 68 to 9202"),
        ("socket_mode = '0999'", "permissions, octal, like \"0660\""),
        ("socket_mode = 660", "`socket_mode`: integer `660`: wanted permissions in quotes, octal"),
        ("socket_group = 'nobodies'", "there is no group \"nobodies\""),
        ("mode = 'listen'", "there are `server` and `client`"),
        ("reconnect_ms = 100", "`reconnect_ms` works only with `mode = \"client\"`"),
        ("mode = 'client'\nsocket_mode = '0600'", "`socket_mode` works only with `mode = \"server\"`"),
        ("worker = 1\nqueue_workers = [1]", "both say where the queues go"),
        ("queue_pairs = 2\nqueue_workers = [1]", "1 workers for 2 queue pairs"),
        ("vlan = { access = 1, trunk = [2] }", "either `access` or `trunk`"),
        ("vlan = { native = 1 }", "wanted `{ access = 10 }` or"),
        ("vlan = 10", "`vlan`: integer: wanted a table"),
        ("vlan = { trunk = ['200-100'] }", "a VLAN from 1 to 4094, or a range"),
        ("addresses = ['03:00:00:00:00:01']", "is a group address"),
        ("addresses = ['02:00:00:00:00']", "wanted six hexadecimal bytes"),
        (
            "addresses = ['02:00:00:00:00:01', '02-00-00-00-00-01']",
            "this address is at port `a` already, on line 3",
        ),
        ("source_check = true", "there are none"),
        ("storm = { broadcast = 0 }", "`storm`: `broadcast`: integer `0`: wanted a whole number from 1"),
        ("disable = ['mrg_rxbuff']", "\"mrg_rxbuff\" is no feature; did you mean `mrg_rxbuf`?"),
        ("max_memory = '1 TB'", "`max_memory`: string \"1 TB\": wanted an amount like"),
        ("max_memory = -1", "wanted an amount like"),
        ("isolation = ''", "the name is empty"),
        ("learn = 1", "`learn`: integer `1`: wanted a boolean"),
    ] {
        let seen = port_problem(keys);
        assert!(
            seen.starts_with("test.toml:") && seen.contains(wanted) && seen.lines().count() == 1,
            "{keys}: {seen}"
        );
    }
}

#[test]
fn a_name_or_socket_that_cannot_work_is_refused() {
    let with = |name: &str, socket: &str| {
        let port = format!("[[port]]\nname = '{name}'\nkind = 'vhost-user'\nsocket = '{socket}'\n");
        problems(&format!("[switch]\nworkers = [1]\n{port}"))
    };
    assert!(with("a/b", "a.sock").contains("'/' is not possible in a name"));
    assert!(with(&"n".repeat(65), "a.sock").contains("65 characters long"));
    assert!(with("a", &"s".repeat(120)).contains("is 134 bytes long, the kernel takes at most 107"));
    assert!(with("a", "switch.sock").contains("control socket"));
    let twice = "[switch]\nworkers = [1]\n[[port]]\nname = 'a'\nkind = 'vhost-user'\nsocket = 'x'\n[[port]]\nname = 'b'\n\
                 kind = 'vhost-user'\nsocket = '/run/cableway/x'\n";
    assert!(problems(twice).contains(
        "test.toml:10:10: port `b`: `socket`: /run/cableway/x is the socket of port `a` on line 6"
    ));
}

#[test]
fn each_kind_of_port_has_keys_of_its_own() {
    let with = |keys: &str| parse(&format!("[switch]\nworkers = [1]\n[[port]]\nname = 'a'\n{keys}\n"));
    let tap = with("kind = 'tap'\ndevice = 'tap0'\nqueue_pairs = 2\ndisable = ['tso6']").unwrap();
    assert_eq!(tap.ports[0].behind, Behind::Tap { device: "tap0".into() });
    let xdp = with("kind = 'af_xdp'\ndevice = 'eth1'\nqueue_pairs = 2").unwrap();
    assert_eq!(xdp.ports[0].behind, Behind::Xdp { device: "eth1".into() });
    assert_eq!(with("kind = 'null'").unwrap().ports[0].behind, Behind::Null);
    for (keys, wanted) in [
        ("kind = 'tap'", "test.toml:3:1: [[port]] needs `device`: the interface, as in `device = \"tap0\"`"),
        (
            "kind = 'tap'\ndevice = 'tap0'\nsocket = 's'",
            "test.toml:7:10: port `a`: `socket` works only with `kind = \"vhost-user\"`, not with \"tap\": take it out",
        ),
        (
            "kind = 'vhost-user'\nsocket = 's'\ndevice = 'tap0'",
            "test.toml:7:10: port `a`: `device` works only with `kind = \"tap\"` or `kind = \"af_packet\"` or `kind = \"af_xdp\"` or `kind = \"nic\"`, not with \"vhost-user\": take it out",
        ),
        (
            "kind = 'pcap'",
            "test.toml:3:1: [[port]] needs `replay`: a file to read, as in `replay = \"/tmp/in.pcap\"`",
        ),
        (
            "kind = 'pcap'\nrecord = 'o'\nrate = 5",
            "test.toml:7:8: port `a`: `rate` and `repeat` say how to `replay`",
        ),
        ("kind = 'pcap'\nreplay = 'gone.pcap'", "test.toml:6:10: port `a`: `replay`: is not there"),
        ("kind = 'pcap'\nrecord = 'locked.pcap'", "test.toml:6:10: port `a`: `record`: is not permitted"),
        ("kind = 'pcap'\nreplay = 'f'\nrecord = 'f'", "`record`: this would empty the file to replay"),
        (
            "kind = 'pcap'\nrecord = 'f'\n[[port]]\nname = 'b'\nkind = 'pcap'\nrecord = 'f'",
            "`record`: /run/cableway/f is written by port `a` on line 6 already",
        ),
        (
            "kind = 'pcap'\nreplay = 'f'\n[[port]]\nname = 'b'\nkind = 'pcap'\nrecord = './f'",
            "test.toml:10:10: port `b`: `record`: this would empty the file that port `a` replays (line 6)",
        ),
        (
            "kind = 'pcap'\nrecord = 'f'\n[[port]]\nname = 'b'\nkind = 'pcap'\nreplay = 'f'",
            "test.toml:10:10: port `b`: `replay`: port `a` on line 6 empties /run/cableway/f and writes it: replay a copy",
        ),
        (
            "kind = 'null'\nqueue_pairs = 2",
            "with `kind = \"vhost-user\"` or `kind = \"tap\"` or `kind = \"af_xdp\"` or `kind = \"nic\"`, not with \"null\"",
        ),
        ("kind = 'tap'\ndevice = 'tap7'", "test.toml:6:10: port `a`: `device`: there are no taps here"),
        ("kind = 'tap'\ndevice = 'a/b'", "'/' is not possible in an interface's name"),
        ("kind = 'tap'\ndevice = 'sixteen-letters-'", "is 16 bytes long, an interface's name has at most 15"),
        (
            "kind = 'tap'\ndevice = 't'\ndisable = ['csum', 'version_1']",
            "test.toml:7:20: port `a`: `disable`: a tap has no `version_1`; only offloads can be withheld from it",
        ),
        (
            "kind = 'tap'\ndevice = 't'\n[[port]]\nname = 'b'\nkind = 'tap'\ndevice = 't'",
            "test.toml:10:10: port `b`: `device`: t is the device of port `a` on line 6: each port has its own",
        ),
        (
            "kind = 'nic'\ndevice = 'eth1'",
            "test.toml:6:10: port `a`: `device`: \"eth1\" is no PCI address such as 0000:01:00.0",
        ),
        ("kind = 'nic'\ndevice = '0000:01:00.9'", "\"0000:01:00.9\" is no PCI address"),
        ("kind = 'nic'", "the card, as in `device = \"0000:01:00.0\"`"),
        (
            "kind = 'tap'\ndevice = '01:00.0'",
            "test.toml:6:10: port `a`: `device`: 0000:01:00.0 is the address of a card, for `kind = \"nic\"`, and no interface",
        ),
        (
            "kind = 'nic'\ndevice = '01:00.0'\n[[port]]\nname = 'b'\nkind = 'nic'\ndevice = '0000:01:00.0'",
            "test.toml:10:10: port `b`: `device`: 0000:01:00.0 is the device of port `a` on line 6: each port has its own",
        ),
        (
            "kind = 'nic'\ndevice = '01:00.0'\nvf_token = 'secret'",
            "test.toml:7:12: port `a`: `vf_token`: \"secret\": wanted a UUID",
        ),
        (
            "kind = 'tap'\ndevice = 't'\nvf_token = '2ab74924-c335-45f4-9b16-8569e5b08258'",
            "`vf_token` works only with `kind = \"nic\"`",
        ),
        ("kind = 'null'\nvfs = []", "`vfs` works only with `kind = \"nic\"`, not with \"null\""),
        (
            "kind = 'nic'\ndevice = '01:00.0'\nvfs = [{ vlan = 10 }]",
            "test.toml:7:7: [[port]] needs `vf_token`: `vfs` needs it",
        ),
        (
            "kind = 'nic'\ndevice = '01:00.0'\nvf_token = '2ab74924-c335-45f4-9b16-8569e5b08258'\nvfs = [{ trusted = true }, { qos = 3 }]",
            "port `a`: `vfs`: unknown key `trusted` in one of `vfs`; did you mean `trust`?",
        ),
        (
            "kind = 'nic'\ndevice = '01:00.0'\nvf_token = '2ab74924-c335-45f4-9b16-8569e5b08258'\nvfs = [{ qos = 3 }]",
            "test.toml:8:8: port `a`: `vfs`: `qos` goes with a `vlan`: give both",
        ),
        (
            "kind = 'nic'\ndevice = '01:00.0'\nvf_token = '2ab74924-c335-45f4-9b16-8569e5b08258'\nvfs = [{ mac = '02:00:00:00:00:01' }, { mac = '02:00:00:00:00:01' }]",
            "port `a`: `vfs`: two functions have the same `mac`",
        ),
        ("kind = 'tab'\ndevice = 't'", "\"tab\" is unknown; did you mean `tap`?"),
    ] {
        let seen = with(keys).unwrap_err().to_string();
        assert!(seen.lines().any(|line| line.contains(wanted)), "{keys}: {seen}");
    }
}

#[test]
fn a_switch_needs_its_workers_and_keeps_them_apart_from_housekeeping() {
    assert!(problems("").contains("test.toml: `[switch]` is missing"));
    assert!(problems("[switch]\nburst = 1\n").contains("test.toml:1:2: [switch] needs `workers`"));
    assert!(problems("[switch]\nworkers = []\n").contains("is empty"));
    let shared = problems("[switch]\nworkers = [1]\nhousekeeping = [0, 1]\n");
    assert!(
        shared.contains("test.toml:3:20: `housekeeping`: core 1 is used already, in `workers` on line 2")
    );
    assert!(problems("[switch]\nworkers = [1]\n[port]\nname = 'a'\n").contains("write `[[port]]`"));
    assert!(
        problems("[switch]\nworkers = 1\n")
            .ends_with("`workers`: integer: wanted a list, in square brackets")
    );
}

#[test]
fn more_ports_than_a_switch_has_are_refused_at_the_first_that_is_too_many() {
    let ports = |count: usize| {
        let port = |n| format!("[[port]]\nname = 'p{n}'\nkind = 'vhost-user'\nsocket = 'p{n}.sock'\n");
        parse(&format!("[switch]\nworkers = [1]\n{}", (0..count).map(port).collect::<String>()))
    };
    assert_eq!(ports(256).unwrap().ports.len(), 256);
    let line = 3 + 256 * 4;
    let expected =
        format!("test.toml:{line}:1: 257 ports: a switch has at most 256; start a second one for the others");
    assert_eq!(ports(257).unwrap_err().to_string(), expected);
}

#[test]
fn the_documentation_has_every_key_feature_and_drop_reason() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/switch-configuration.md");
    let page = std::fs::read_to_string(page).unwrap();
    for (table, key) in vocabulary() {
        assert!(
            page.contains(&format!("\n| `{key}` |")) || page.contains(&format!("{key} = ")),
            "{table}: {key}"
        );
    }
    let config = port("").unwrap();
    let (switch, plain) = (&config.switch, &config.ports[0]);
    for (key, default) in [
        ("burst", switch.burst.to_string()),
        ("fdb_size", switch.fdb_size.to_string()),
        ("fdb_age", switch.fdb_age.as_secs().to_string()),
        ("idle", format!("`\"{}\"`", switch.idle.word())),
        ("queue_pairs", plain.queue_pairs.to_string()),
        ("learn_limit", plain.learn_limit.to_string()),
        ("max_memory", "the machine's".to_owned()),
    ] {
        assert!(page.contains(&format!("\n| `{key}` | {default} |")), "{key} is {default} by default");
    }
    for feature in Feature::ALL {
        let line = format!("\n| `{}` | {} |", feature.name(), feature.sentence());
        assert!(page.contains(&line), "missing:{line}");
    }
    for reason in port::DropReason::ALL {
        let line = format!("\n| `{}` | {} |", reason.key(), reason.sentence());
        assert!(page.contains(&line), "missing:{line}");
    }
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let error = Config::load(Path::new("/nowhere/x.toml"), Path::new("/run"), &Lab).unwrap_err();
    assert_eq!(error.to_string(), "/nowhere/x.toml: there is no such file");
}

proptest::proptest! {
    #[test]
    fn any_text_gives_a_configuration_or_problems_and_never_a_panic(text in "\\PC{0,200}", keys in "[a-z_]{1,14} = [\\[\\]{}0-9a-z\"', =]{0,20}") {
        let _ = parse(&text);
        let _ = port(&keys);
    }
}
