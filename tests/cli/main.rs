//! `cableway switch` (and, in `vm`, `cableway vm`) as a user meets it: what it refuses and how, what it leaves behind, what signals do, what it answers.
//!
//! The worker of these switches sleeps when nothing comes in, and nothing does: the machine stays free for other tests.

#![allow(clippy::unwrap_used, reason = "helpers of tests may panic, too")]

mod capture;
mod confinement;
mod crash;
mod doctor;
mod files;
mod front_end;
mod image;
mod inject;
mod node;
#[allow(dead_code, clippy::expect_used)] // the session tests of `vhost-user` need the rest
#[path = "../../vhost-user/tests/session/raw.rs"]
mod raw;
mod systemd;
mod top;
mod vm;
mod vm_end;
mod vm_sandbox;
mod world;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use switch::control::report::{RxStats, StatsReport};
use world::{CABLEWAY, Place, Running, connect, core, eventually, is_closed, keeps_within, port};

#[test]
fn every_mistake_in_a_file_is_one_message_with_its_line_and_starts_nothing() {
    let core = core();
    let long = "s".repeat(120);
    let answering = tempfile::tempdir().unwrap();
    let busy = answering.path().join("busy.sock");
    let _listener = UnixListener::bind(&busy).unwrap();
    let with_socket = |socket: &str| port("a").replace("a.sock", socket);
    for (rest, line, message) in [
        (
            port("a") + "sokcet = 'x'\n",
            8,
            "unknown key `sokcet` in [[port]]; did you mean `socket`?".to_owned(),
        ),
        (
            port("a") + "queue_pairs = 'two'\n",
            8,
            "`queue_pairs`: string \"two\": wanted a whole number from 1 to 128".into(),
        ),
        (
            port("a") + &port("a").replace("a.sock", "b.sock"),
            9,
            "port `a` is there already, on line 5".into(),
        ),
        (
            port("a") + &port("b").replace("b.sock", "a.sock"),
            11,
            "is the socket of port `a` on line 7".into(),
        ),
        ("housekeeping = [4000]\n".into(), 4, "there is no core 4000".into()),
        (
            format!("housekeeping = [{core}]\n"),
            4,
            format!("core {core} is used already, in `workers` on line 2"),
        ),
        (port("a") + "worker = 4000\n", 8, format!("core 4000 is not one of `workers` [{core}]")),
        (
            port("a") + "vlan = { access = 4095 }\n",
            8,
            "`access`: integer `4095`: wanted a whole number from 1 to 4094".into(),
        ),
        (with_socket(&long), 7, "the kernel takes at most 107".into()),
        (with_socket("/nowhere/at/all.sock"), 7, "directory /nowhere/at does not exist".into()),
        (with_socket(busy.to_str().unwrap()), 7, "is in use, another process answers there".into()),
        (with_socket(answering.path().to_str().unwrap()), 7, "is not a socket".into()),
        (
            "burst = 0\n[[prot]]\n".into(),
            4,
            "`burst`: integer `0`: wanted a whole number from 1 to 64".into(),
        ),
    ] {
        let place = Place::new();
        place.write(&rest);
        let file = place.file().display().to_string();
        for check in [&["--check"][..], &[]] {
            let refused = place.ask(&[&[file.as_str()], check].concat());
            let said = String::from_utf8(refused.stderr).unwrap();
            assert_eq!(refused.status.code(), Some(2), "{rest}: {said}");
            let found = said
                .lines()
                .any(|said| said.starts_with(&format!("{file}:{line}:")) && said.contains(&message));
            assert!(found, "wanted line {line}, {message:?}, got: {said}");
            assert!(refused.stdout.is_empty());
            assert_eq!(place.left_behind(), [""; 0], "{rest}");
        }
    }
    assert!(UnixStream::connect(&busy).is_ok(), "the other process's socket was touched");
}

#[test]
fn a_run_directory_or_file_that_is_not_there_is_named_with_what_to_do() {
    let place = Place::new();
    place.write(&port("a"));
    let file = place.file().display().to_string();
    let run = |run_dir: &Path, file: &str| {
        let refused =
            Command::new(CABLEWAY).args(["switch", file, "--run-dir"]).arg(run_dir).output().unwrap();
        assert_eq!(refused.status.code(), Some(2), "{refused:?}");
        String::from_utf8(refused.stderr).unwrap()
    };
    assert!(run(&place.run_dir().join("deeper"), &file).contains("does not exist: mkdir -p"));
    assert!(run(&place.file(), &file).contains("is not a directory"));
    assert!(run(&place.run_dir(), "missing.toml").contains("missing.toml: there is no such file"));
    assert_eq!(place.left_behind(), [""; 0]);
}

#[test]
fn arguments_that_make_no_sense_are_refused_with_status_2() {
    for args in [
        &["switch"][..],
        &["swich", "x"],
        &["switch", "x", "--log", "a=b=c"],
        &["switch", "stats", "--watch", "0"],
    ] {
        let refused = Command::new(CABLEWAY).args(args).output().unwrap();
        assert_eq!(refused.status.code(), Some(2), "{args:?}: {refused:?}");
    }
}

#[test]
fn asking_where_no_switch_runs_says_so_with_status_1() {
    let place = Place::new();
    for question in ["stats", "ports", "fdb", "reload"] {
        let nobody = place.ask(&[question]);
        assert_eq!(nobody.status.code(), Some(1));
        assert!(String::from_utf8(nobody.stderr).unwrap().contains("no switch is running in"));
    }
}

#[test]
fn the_bridge_of_two_ports_listens_at_once_and_ends_without_a_trace() {
    if !host::topology::permitted_cores().unwrap().contains(1) {
        eprintln!("skipped: configs/vv.toml wants core 1, which this process may not use");
        return;
    }
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/vv.toml");
    let limit = Duration::from_millis(if cfg!(debug_assertions) { 1_000 } else { 100 });
    keeps_within(limit, || {
        let place = Place::new();
        let start = Instant::now();
        let mut switch = Running::start_file(&place, &file);
        let took = start.elapsed();
        for name in ["v0", "v1"] {
            assert_eq!(fs::metadata(place.socket(name)).unwrap().permissions().mode() & 0o777, 0o660);
            assert_eq!(place.state(name), "listening");
        }
        switch.signal(nix::sys::signal::Signal::SIGTERM);
        assert_eq!((switch.end().1, place.left_behind()), (Some(0), vec![]));
        took
    });
}

#[test]
fn a_switch_with_connected_vmms_ends_within_a_second_on_either_signal() {
    for signal in [nix::sys::signal::Signal::SIGTERM, nix::sys::signal::Signal::SIGINT] {
        keeps_within(Duration::from_secs(1), || {
            let place = Place::new();
            place.write(&(port("a") + &port("b")));
            let mut switch = Running::start(&place);
            let vmm = connect(&place, "a");
            eventually("a is connected", || place.state("a") == "connected");
            switch.signal(signal);
            let (took, status) = switch.end();
            assert_eq!((status, place.left_behind()), (Some(0), vec![]));
            assert!(is_closed(&vmm));
            took
        });
    }
}

#[test]
fn every_thread_is_confined_and_off_the_workers_core_unless_it_is_the_worker() {
    let place = Place::new();
    place.write(&port("a"));
    let switch = Running::start(&place);
    let permitted = host::topology::permitted_cores().unwrap().len();
    let mut threads = Vec::new();
    for task in fs::read_dir(format!("/proc/{}/task", switch.process.id())).unwrap() {
        let path = task.unwrap().path();
        let name = fs::read_to_string(path.join("comm")).unwrap().trim().to_owned();
        let status = fs::read_to_string(path.join("status")).unwrap();
        let value =
            |key: &str| status.lines().find_map(|line| line.strip_prefix(key)).unwrap().trim().to_owned();
        assert_eq!((value("NoNewPrivs:"), value("Seccomp:")), ("1".into(), "2".into()), "{name}");
        let cores: host::topology::CoreSet = value("Cpus_allowed_list:").parse().unwrap();
        let is_worker = name.starts_with("worker-");
        // On a machine with one core everything shares it.
        assert!(cores.contains(core()) == is_worker || permitted == 1, "{name}: {cores}");
        threads.push(name);
    }
    for name in ["cableway", "control", "housekeeping", "vhu-a"] {
        assert!(threads.iter().any(|thread| thread == name), "{name} is not in {threads:?}");
    }
}

#[test]
fn a_reload_touches_only_what_changed() {
    let place = Place::new();
    place.write(&(port("stays") + &port("goes")));
    let mut switch = Running::start(&place);
    let (stays, goes) = (connect(&place, "stays"), connect(&place, "goes"));
    eventually("both are connected", || {
        ["stays", "goes"].iter().all(|name| place.state(name) == "connected")
    });
    let inode = fs::metadata(place.socket("stays")).unwrap().ino();

    place.write(&(port("stays") + &port("comes")));
    switch.signal(nix::sys::signal::Signal::SIGHUP);
    switch.wait_for_log("configuration applied: 1 added, 1 removed, 0 changed");
    assert!(is_closed(&goes) && !place.socket("goes").exists());
    assert!(!is_closed(&stays));
    assert_eq!((place.state("stays"), place.state("comes")), ("connected".into(), "listening".into()));
    assert_eq!(fs::metadata(place.socket("stays")).unwrap().ino(), inode);
    drop(connect(&place, "comes"));

    place.write(&(port("stays") + &port("comes") + &port("third")));
    let report = place.json(&["reload"]);
    assert_eq!(
        (&report["added"], &report["unchanged"]),
        (&serde_json::json!(["third"]), &serde_json::json!(2))
    );
    assert!(!is_closed(&stays));
}

#[test]
fn a_reload_that_is_refused_changes_nothing() {
    let place = Place::new();
    place.write(&port("a"));
    let mut switch = Running::start(&place);
    let vmm = connect(&place, "a");
    eventually("a is connected", || place.state("a") == "connected");
    let before = place.json(&["ports"]);

    place.write(&(port("b") + "brust = 1\n"));
    let refused = place.ask(&["reload"]);
    let said = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        said.contains(&format!("{}:8:1: port `b`: unknown key `brust`", place.file().display())),
        "{said}"
    );
    switch.signal(nix::sys::signal::Signal::SIGHUP);
    switch.wait_for_log("not applied, everything is as it was");

    // A socket that cannot be opened although the file is right: another process was faster.
    let taken = UnixListener::bind(place.socket("b")).unwrap();
    place.write(&(port("c") + &port("b")));
    assert_eq!(place.ask(&["reload"]).status.code(), Some(1));
    assert_eq!(place.json(&["ports"]), before);
    assert!(!is_closed(&vmm) && !place.socket("c").exists());
    drop(taken);
}

#[test]
fn sockets_of_a_switch_that_was_killed_are_replaced_and_of_one_that_runs_are_not() {
    let place = Place::new();
    place.write(&port("a"));
    let mut first = Running::start(&place);
    let second = place.ask(&[place.file().to_str().unwrap()]);
    let said = String::from_utf8(second.stderr).unwrap();
    assert_eq!(second.status.code(), Some(2));
    assert!(said.contains(&format!("already running (pid {})", first.process.id())), "{said}");
    assert_eq!(place.state("a"), "listening");

    first.process.kill().unwrap();
    first.end();
    assert_eq!(place.left_behind().len(), 2);
    let _again = Running::start(&place);
    assert_eq!(place.state("a"), "listening");
    drop(connect(&place, "a"));
}

#[test]
fn answers_have_the_fields_that_the_description_names_and_tables_show_them() {
    let place = Place::new();
    place.write(&(port("a") + &port("b") + "addresses = ['02:00:00:00:00:0b']\nmtu = 1500\n"));
    let _switch = Running::start(&place);
    let description = serde_json::to_value(switch::control::openapi()).unwrap();
    let named = |schema: &str| {
        let properties = description["components"]["schemas"][schema]["properties"].as_object().unwrap();
        properties.keys().cloned().collect::<std::collections::BTreeSet<_>>()
    };
    let fields =
        |value: &Value| value.as_object().unwrap().keys().cloned().collect::<std::collections::BTreeSet<_>>();
    let stats = place.json(&["stats"]);
    assert_eq!(fields(&stats), named("StatsReport"));
    assert_eq!(fields(&stats["workers"][0]), named("WorkerStats"));
    assert_eq!(fields(&stats["ports"][1]), named("PortStats"));
    assert_eq!(fields(&stats["ports"][1]["rx"][0]), named("RxStats"));
    assert_eq!(fields(&stats["ports"][1]["rx"][0]["addresses"]), named("AddressStats"));
    assert_eq!(fields(&stats["ports"][1]["tx"][0]), named("TxStats"));
    assert_eq!(fields(&place.json(&["ports"])["ports"][0]), named("PortReport"));
    let fdb = place.json(&["fdb", "--port", "b"]);
    assert_eq!(fields(&fdb["entries"][0]), named("FdbEntry"));
    assert_eq!(place.json(&["fdb", "--port", "a"])["entries"], serde_json::json!([]));

    let shown = |question: &str| String::from_utf8(place.ask(&[question]).stdout).unwrap();
    assert!(shown("stats").contains("0 received + 0 copies for flooding = 0 sent + 0 dropped"));
    assert!(shown("ports").contains("1500"));
    assert!(shown("fdb").contains("02:00:00:00:00:0b") && shown("fdb").contains("static"));
}

#[test]
fn counters_account_for_every_frame_and_every_cycle() {
    let permitted = host::topology::permitted_cores().unwrap();
    if permitted.len() < 2 {
        eprintln!("skipped: the worker and the generator need a core each, and there is one");
        return;
    }
    let place = Place::new();
    place.write(&(port("a") + &port("b")));
    let _switch = Running::start(&place);
    let mut generator = Command::new(CABLEWAY);
    generator.args(["bench", "vv", "--quick", "--sizes", "64", "--seconds", "0.5"]);
    generator.arg("--core").arg(permitted.iter().next().unwrap().to_string());
    for name in ["a", "b"] {
        generator.arg("--socket").arg(place.socket(name));
    }
    let ran = generator.output().unwrap();
    assert!(ran.status.success(), "{ran:?}");

    let ask = || serde_json::from_value::<StatsReport>(place.json(&["stats"])).unwrap();
    let counted = |stats: &StatsReport| {
        let worker = &stats.workers[0];
        (worker.busy_cycles + worker.idle_cycles) as f64 / stats.tsc_hz as f64
    };
    // A worker that stands still has frames in its hands, and a sleep that is not counted yet.
    let mut stats = ask();
    eventually("all that happened is counted", || {
        stats = ask();
        let went = stats.totals.sent + stats.totals.dropped;
        stats.totals.received + stats.totals.replicas == went && counted(&stats) > stats.uptime_s * 0.98 - 0.3
    });
    let (worker, totals) = (&stats.workers[0], &stats.totals);
    assert!(totals.received > 0);
    assert_eq!(totals.received + totals.replicas, totals.sent + totals.dropped);
    for queue in stats.ports.iter().flat_map(|port| &port.rx) {
        assert_eq!(queue.received, queue.switched + queue.dropped);
    }
    for queue in stats.ports.iter().flat_map(|port| &port.tx) {
        assert_eq!(queue.offered, queue.sent + queue.dropped);
    }
    assert_eq!(worker.frames, totals.received);
    let all = |of: fn(&RxStats) -> u64| stats.ports.iter().flat_map(|port| &port.rx).map(of).sum::<u64>();
    assert_eq!(
        (worker.bursts, worker.bytes, worker.dropped),
        (all(|queue| queue.bursts), all(|queue| queue.bytes), all(|queue| queue.dropped))
    );
    // A worker's busy time is its queues' but for the ends of turns.
    let of_queues = all(|queue| queue.busy_cycles);
    assert!(
        of_queues <= worker.busy_cycles && of_queues > worker.busy_cycles / 2,
        "{of_queues} of {worker:?}"
    );
    // Awake or asleep, each cycle since the start is busy or idle; the last sleep, of at most 200 ms, is not counted yet.
    assert!(counted(&stats) < stats.uptime_s * 1.02, "{} of {}", counted(&stats), stats.uptime_s);
}

#[test]
fn a_user_without_privileges_can_run_one() {
    const NOBODY: u32 = 65_534;
    let place = Place::new();
    place.write(&port("a"));
    let root = nix::unistd::geteuid().is_root();
    let binary = place.0.path().join("cableway");
    if root {
        // Where the build directory lies, another user may not be able to go. Another process copies: a child that a test beside
        // this one starts at that moment would inherit our open file, and keep the program from starting.
        assert!(Command::new("cp").arg(CABLEWAY).arg(&binary).status().unwrap().success());
        fs::set_permissions(place.0.path(), fs::Permissions::from_mode(0o755)).unwrap();
    }
    let program = if root { binary.as_path() } else { Path::new(CABLEWAY) };
    let as_user = |args: &[&str]| {
        let mut command = Command::new(program);
        command.arg("switch").args(args).env("XDG_RUNTIME_DIR", place.run_dir()).stdin(Stdio::null());
        if root {
            command.uid(NOBODY).gid(NOBODY);
        }
        command
    };
    let file = place.file();
    let file = file.to_str().unwrap();
    if root {
        // A directory of somebody else: refused before anything happens.
        let refused = as_user(&[file, "--run-dir", place.run_dir().to_str().unwrap()]).output().unwrap();
        let said = String::from_utf8(refused.stderr).unwrap();
        assert_eq!(refused.status.code(), Some(2), "{said}");
        assert!(said.contains("is not permitted to user 65534"), "{said}");
        std::os::unix::fs::chown(place.run_dir(), Some(NOBODY), Some(NOBODY)).unwrap();
    }
    let log = place.0.path().join("log");
    let process = as_user(&[file]).stderr(fs::File::create(&log).unwrap()).spawn().unwrap();
    let mut switch = Running { process, log };
    switch.wait_for_log("ready in");
    assert!(place.run_dir().join("cableway/a.sock").exists());
    let answer = as_user(&["ports", "--json"]).output().unwrap();
    assert!(String::from_utf8(answer.stdout).unwrap().contains("\"listening\""));
    switch.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(switch.end().1, Some(0));
    assert_eq!(fs::read_dir(place.run_dir().join("cableway")).unwrap().count(), 0);
}
