use std::path::Path;
use std::time::Duration;

use super::*;

fn parse(keys: &str) -> Result<Config, ConfigErrors> {
    Config::parse(&format!("[vm]\n{keys}"), Path::new("machines/fw.toml"))
}

/// The one problem of a configuration with a kernel, and its line and column.
fn problem(keys: &str) -> (usize, usize, String) {
    let errors = parse(&format!("kernel = \"k\"\n{keys}")).unwrap_err();
    assert_eq!(errors.problems.len(), 1, "{errors}");
    let (line, column) = errors.problems[0].at.unwrap();
    (line, column, errors.problems[0].message.clone())
}

#[test]
fn a_kernel_is_enough_and_everything_else_has_a_default() {
    let config = parse("kernel = \"vmlinux\"").unwrap();
    assert_eq!((config.name.as_str(), config.kernel.as_path()), ("fw", Path::new("machines/vmlinux")));
    assert_eq!((config.memory, config.pages, config.topology.vcpus()), (512 << 20, PageSize::Ordinary, 1));
    assert_eq!((config.cmdline.as_str(), &config.serial), ("console=ttyS0", &SerialTo::Stdio));
    assert_eq!((config.on_reboot, config.shutdown_timeout), (OnReboot::Restart, Duration::from_secs(30)));
    assert!(config.pmu && !config.hint_dedicated && !config.lock_memory);
}

#[test]
fn a_missing_kernel_and_an_unknown_key_are_found_in_one_pass() {
    let text = parse("kernal = \"x\"\nvcpus = 0").unwrap_err().to_string();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 3, "{text}");
    assert!(lines[0].starts_with("machines/fw.toml:1:2: [vm] needs `kernel`"), "{text}");
    assert_eq!(lines[1], "machines/fw.toml:2:1: unknown key `kernal` in [vm]; did you mean `kernel`?");
    assert!(lines[2].starts_with("machines/fw.toml:3:9: `vcpus`: "), "{text}");
}

#[test]
fn firmware_is_refused_with_the_way_out() {
    for keys in ["firmware = 'OVMF.fd'", "kernel = 'k'\nfirmware = 'OVMF.fd'"] {
        let errors = parse(keys).unwrap_err();
        assert_eq!(errors.problems.len(), 1, "{errors}");
        assert!(errors.problems[0].message.contains("starts a Linux by `kernel`"), "{errors}");
    }
}

#[test]
fn cores_go_with_vcpus_one_to_one_and_have_one_task() {
    assert!(problem("vcpus = 2\nvcpu_cores = [3]").2.contains("1 cores for 2 vCPUs"));
    assert!(problem("vcpus = 2\nvcpu_cores = [3, 3]").2.contains("core 3 is there twice"));
    assert!(problem("vcpu_cores = [1]\nemulator_cores = [0, 1]").2.contains("core 1 is a vCPU's already"));
    assert!(problem("vcpu_priority = 5").2.contains("needs `vcpu_cores`"));
    let config =
        parse("kernel = \"k\"\nvcpus = 2\nvcpu_cores = [2, 3]\nvcpu_priority = 1\nemulator_cores = [0]")
            .unwrap();
    assert_eq!((config.vcpu_cores, config.vcpu_priority), (Some(vec![2, 3]), Some(1)));
}

#[test]
fn the_io_apic_is_where_it_is_said_to_be_also_in_qemus_word() {
    let chip = |word: &str| parse(&format!("kernel = 'k'\nirqchip = '{word}'")).map(|config| config.irqchip);
    assert_eq!((chip("kernel").unwrap(), chip("on").unwrap()), (IrqChip::Kernel, IrqChip::Kernel));
    assert_eq!(chip("split").unwrap(), IrqChip::Split);
    assert!(problem("irqchip = 'off'").2.contains("wanted \"kernel\" or \"split\""));
    assert_eq!(
        Config::from_flags(&[("kernel", "k".into()), ("irqchip", "on".into())]).unwrap().irqchip,
        IrqChip::Kernel
    );
}

#[test]
fn a_topology_agrees_with_the_number_of_vcpus() {
    let config = parse("kernel = \"k\"\ntopology = { sockets = 2, cores = 2, threads = 2 }").unwrap();
    assert_eq!(config.topology.vcpus(), 8);
    let config = parse("kernel = \"k\"\nvcpus = 8\ntopology = { threads = 2 }").unwrap();
    assert_eq!(config.topology, Topology { sockets: 1, cores: 4, threads: 2 });
    assert!(problem("vcpus = 3\ntopology = { threads = 2 }").2.contains("are 2 vCPUs, but `vcpus` is 3"));
    assert!(problem("topology = { sockets = 254, cores = 254 }").2.contains("64516 vCPUs"));
    assert!(problem("topology = { sockets = 3, cores = 65 }").2.contains("powers of two"));
}

#[test]
fn memory_is_a_whole_number_of_pages_and_the_message_says_which() {
    let (line, _, text) = problem("pages = \"1G\"\nmemory = \"1536 MiB\"");
    assert_eq!(
        (line, text.as_str()),
        (4, "`memory`: not a multiple of the page size, 1G: give \"1024 MiB\" or \"2048 MiB\"")
    );
    assert_eq!(parse("kernel = \"k\"\npages = \"1G\"").unwrap().memory, 1 << 30);
    assert!(problem("memory = \"1 MiB\"").2.contains("from 2 MiB"));
}

#[test]
fn flags_mean_what_the_same_keys_mean_in_a_file() {
    let flags = [
        ("kernel", "a \"b\\".to_owned()),
        ("memory", "1GiB".to_owned()),
        ("vcpus", "4".to_owned()),
        ("topology", "cores=2,threads=2".to_owned()),
        ("vcpu_cores", "1, 2,3,4".to_owned()),
        ("disable_exits", "hlt,pause".to_owned()),
        ("pmu", "false".to_owned()),
        ("serial", "off".to_owned()),
    ];
    let config = Config::from_flags(&flags).unwrap();
    assert_eq!((config.name.as_str(), config.kernel.as_path()), ("vm", Path::new("a \"b\\")));
    assert_eq!((config.memory, config.topology.threads), (1 << 30, 2));
    assert_eq!(config.vcpu_cores, Some(vec![1, 2, 3, 4]));
    assert_eq!(config.disable_exits, [DisabledExit::Hlt, DisabledExit::Pause]);
    assert!(!config.pmu);
    let errors = Config::from_flags(&[("kernel", "k".to_owned()), ("vcpus", "many".to_owned())]).unwrap_err();
    let text = errors.to_string();
    assert!(text.starts_with("command line: `vcpus`: string \"many\": wanted a whole number"), "{text}");
}

#[test]
fn cards_are_tables_or_flags_with_a_socket_and_an_address_of_their_own() {
    let config = parse("kernel = 'k'\n[[vm.net]]\nkind = 'vhost-user'\nsocket = 'a'\n[[vm.net]]\nkind = 'vhost-user'\nsocket = '/b'\nmode = 'server'").unwrap();
    let [first, second] = config.net.as_slice() else { panic!("{:?}", config.net) };
    let (NetBack::VhostUser(a), NetBack::VhostUser(b)) = (&first.back, &second.back) else { panic!() };
    assert_eq!((first.name.as_str(), a.socket.as_path()), ("net0", Path::new("machines/a")));
    assert!(a.wait && !a.listen && b.listen && first.mac != second.mac);
    let cards = ["vhost-user,socket=/a,packed=on,mtu=9000", "vhost-user,socket=/b,wait=never"];
    let mut flags = vec![("kernel", "k".to_owned())];
    flags.extend(cards.map(|card| ("net", card.to_owned())));
    let text = Config::from_flags(&flags).unwrap_err().to_string();
    assert!(text.contains("`wait`: string \"never\""), "{text}");
    flags[2].1 = "vhost-user,socket=/b,wait=no".to_owned();
    let config = Config::from_flags(&flags).unwrap();
    let (NetBack::VhostUser(a), NetBack::VhostUser(b)) = (&config.net[0].back, &config.net[1].back) else {
        panic!()
    };
    assert!(a.packed && config.net[0].mtu == Some(9000) && !b.wait);
    assert!(
        problem("net = [{ kind = 'tap', device = 't', socket = 'x' }]").2.contains("`socket` is a key of")
    );
    assert!(problem("net = [{ kind = 'tap' }]").2.contains("needs `device`"));
    let config = parse("kernel = 'k'\nnet = [{ kind = 'tap', device = 'tap0' }]").unwrap();
    assert_eq!(config.net[0].back, NetBack::Tap("tap0".to_owned()));
    assert!(problem("net = [{ kind = 'vhost-user' }]").2.contains("needs `socket`"));
    assert!(
        problem("net = [{ kind = 'vhost-user', socket = 'x', queue_size = 100 }]")
            .2
            .contains("no power of two")
    );
}

#[test]
fn any_flag_gives_a_configuration_or_problems_and_never_a_panic() {
    let values = [
        "",
        "\"",
        "\\",
        "1,,2",
        "=",
        "a=b=c",
        "\n[vm]",
        "-1",
        "+1",
        "007",
        "true",
        "9223372036854775808",
        "é\u{1}",
    ];
    for (_, key) in vocabulary().into_iter().filter(|(table, _)| *table == "vm") {
        for value in values {
            let _ = Config::from_flags(&[(key, value.to_owned())]).map_err(|errors| errors.to_string());
        }
    }
}

#[test]
fn disks_are_tables_or_flags_with_a_format_and_a_path() {
    let config = parse("kernel = 'k'\n[[vm.disk]]\nformat = 'raw'\npath = 'd'\n[[vm.disk]]\nformat = 'raw'\npath = '/e'\nread_only = true").unwrap();
    let [first, second] = config.disk.as_slice() else { panic!("{:?}", config.disk) };
    assert_eq!((first.name.as_str(), first.path.as_path()), ("disk0", Path::new("machines/d")));
    assert!(!first.read_only && first.discard && first.queues == 1 && second.read_only);
    let disk = "raw,path=/a,queues=4,serial=x y,discard=off";
    let config = Config::from_flags(&[("kernel", "k".to_owned()), ("disk", disk.to_owned())]).unwrap();
    let [disk] = config.disk.as_slice() else { panic!("{:?}", config.disk) };
    assert_eq!((disk.queues, disk.serial.as_str(), disk.discard), (4, "x y", false));
    assert!(problem("disk = [{ path = 'x' }]").2.contains("needs `format`"));
    assert!(problem("disk = [{ format = 'raw' }]").2.contains("needs `path`"));
    assert!(
        problem("disk = [{ format = 'raw', path = 'x', serial = '012345678901234567890' }]").2.contains("20")
    );
    assert!(
        problem("disk = [{ format = 'raw', path = 'x', queue_size = 48 }]").2.contains("no power of two")
    );
}

#[test]
fn nodes_have_memory_vcpus_a_place_and_distances() {
    let config = parse(
        "kernel = 'k'\nvcpus = 3\n[[vm.numa]]\nmemory = '1 GiB'\nvcpus = [0, 2]\nnode = 1\n[[vm.numa]]\nmemory = '3 GiB'\nvcpus = [1]\ndevices = true",
    )
    .unwrap();
    let [first, second] = config.nodes.as_slice() else { panic!("{:?}", config.nodes) };
    assert_eq!((config.memory, config.numa, first.host, second.host), (4 << 30, true, Some(1), None));
    assert_eq!((&first.distances[..], &second.distances[..]), (&[10, 20][..], &[20, 10][..]));
    assert!(second.devices && !first.devices);
    assert_eq!((config.host_node_of(2), config.host_node_of(1)), (Some(1), None));
    let flags = ["memory=1GiB,vcpus=0:2,node=1,distances=10:31", "memory=1GiB,vcpus=1,distances=31:10"];
    let mut given = vec![("kernel", "k".to_owned()), ("vcpus", "3".to_owned())];
    given.extend(flags.map(|flag| ("numa", flag.to_owned())));
    let config = Config::from_flags(&given).unwrap();
    assert_eq!((&config.nodes[0].vcpus[..], &config.nodes[1].distances[..]), (&[0, 2][..], &[31, 10][..]));
    given[2].1 = "1GiB,vcpus=0-2".to_owned();
    given.pop();
    assert_eq!(Config::from_flags(&given).unwrap().nodes[0].vcpus, [0, 1, 2]);
    // Without it there is one node, which the guest is not told of.
    let config = parse("kernel = 'k'\nvcpus = 2\nnode = 1").unwrap();
    assert_eq!((config.nodes.len(), config.numa, config.host_node_of(1)), (1, false, Some(1)));
}

#[test]
fn nodes_that_do_not_fit_together_are_refused() {
    let of = |rest: &str| problem(&format!("vcpus = 2\nnuma = [{rest}]")).2;
    assert!(of("{ memory = '1 GiB', vcpus = [0] }").contains("vCPU 1 is near no node"));
    assert!(of("{ memory = '1 GiB', vcpus = [0, 1] }, { memory = '1 GiB', vcpus = [1] }").contains("twice"));
    assert!(of("{ memory = '1 GiB', vcpus = [0, 1, 2] }").contains("there is no vCPU 2; they are 0 to 1"));
    assert!(of("{ vcpus = [0, 1] }").contains("needs `memory`"));
    assert!(
        of("{ memory = '1 GiB', vcpus = [0, 1], distances = [10, 20] }").contains("2 of them for 1 nodes")
    );
    assert!(of("{ memory = '1 GiB', vcpus = [0, 1], distances = [20] }").contains("to itself"));
    assert!(of("").contains("is empty"));
    let pieces = "{ memory = '2 GiB' }, ".repeat(8);
    assert!(of(&format!("{pieces}{{ memory = '1 GiB', vcpus = [0, 1] }}")).contains("10 pieces"));
    let both = "memory = '2 GiB'\nnuma = [{ memory = '1 GiB', vcpus = [0] }]";
    assert!(problem(both).2.contains("2048 MiB, but the nodes of `numa` have 1024 MiB"));
    assert!(problem("node = 0\nnuma = [{ memory = '1 GiB', vcpus = [0] }]").2.contains("has its own"));
}

#[test]
fn memory_that_must_be_there_cannot_be_left_for_later() {
    for keys in ["pages = '2M'", "lock_memory = true", "net = [{ kind = 'vhost-user', socket = 's' }]"] {
        assert!(problem(&format!("prefault = false\n{keys}")).2.contains("from the start, always"), "{keys}");
    }
    assert!(!parse("kernel = 'k'\nprefault = false").unwrap().prefault);
    assert!(parse("kernel = 'k'\nprefault = true").unwrap().prefault);
}

#[test]
fn the_threads_of_a_disk_are_as_many_and_where_they_are_asked_to_be() {
    let disk = |keys: &str| format!("kernel = 'k'\ndisk = [{{ format = 'raw', path = 'd'{keys} }}]");
    let config = parse(&disk(", queues = 4")).unwrap();
    let first = &config.disk[0];
    assert_eq!((first.aio, first.iothreads, &first.iothread_cores), (DiskAio::IoUring, 4, &None));
    let flag = "raw,path=d,aio=threads,queues=4,iothreads=2,iothread_cores=0:5-6";
    let config = Config::from_flags(&[("kernel", "k".to_owned()), ("disk", flag.to_owned())]).unwrap();
    let first = &config.disk[0];
    assert_eq!((first.aio, first.iothreads), (DiskAio::Threads, 2));
    assert_eq!(first.iothread_cores, Some(vec![0, 5, 6]));
    assert!(
        problem(&disk(", iothreads = 2")[13..]).2.contains("`iothreads`: 2, but the disk has 1 queue(s)")
    );
    assert!(
        problem(&format!("vcpu_cores = [3]\n{}", &disk(", iothread_cores = [3]")[13..]))
            .2
            .contains("core 3 is a vCPU's")
    );
}

#[test]
fn two_consoles_do_not_go_to_one_place() {
    assert!(problem("console = \"stdio\"").2.contains("the serial console is there already"));
    assert!(problem("console = \"file:a\"\nserial = \"file:a\"").2.contains("a file of its own"));
    let config = parse("kernel = 'k'\nconsole = 'stdio'\nserial = 'file:a'\nrng = true").unwrap();
    assert_eq!((config.console, config.serial), (SerialTo::Stdio, SerialTo::File("machines/a".into())));
    assert!(config.rng);
    assert_eq!(parse("kernel = 'k'\nserial = 'off'").unwrap().console, SerialTo::Off);
}

#[test]
fn the_documentation_has_every_key() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let text = std::fs::read_to_string(root.join("docs/vm.md")).unwrap();
    for (table, key) in vocabulary() {
        assert!(text.contains(&format!("`{key}`")), "docs/vm.md lacks `{key}` of {table}");
    }
    let example = Config::load(&root.join("configs/vm.toml")).unwrap();
    assert_eq!(example.topology.vcpus(), 2);
}
