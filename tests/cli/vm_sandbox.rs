//! What a machine's process may do: each of its threads has a filter, it lives through everything that a user does to it, and it needs
//! no more than the right to open /dev/kvm.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::vm::elf;
use crate::world::{CABLEWAY, Place, Running, eventually};

/// Whether KVM can be used; says so if not.
pub(crate) fn no_kvm() -> bool {
    let missing = fs::File::options().read(true).write(true).open("/dev/kvm").err();
    if let Some(error) = &missing {
        println!("SKIPPED /dev/kvm: {error}");
    }
    missing.is_some()
}

/// Prints a dot at its start; then looks for a key again and again, and resets the machine for it.
fn guest(dir: &Path) -> PathBuf {
    let code = [
        0x66, 0xba, 0xf8, 3, 0xb0, b'.', 0xee, // mov dx, 0x3f8; mov al, '.'; out dx, al
        0x66, 0xba, 0xfd, 3, 0xec, 0xa8, 1, 0x74,
        0xfb, // mov dx, 0x3fd; in al, dx; test al, 1; jz back to the in
        0x66, 0xba, 2, 6, 0xb0, 1, 0xee, 0xeb, 0xfe, // mov dx, 0x602; mov al, 1; out dx, al; for ever
    ];
    let path = dir.join("kernel");
    fs::write(&path, elf(&code)).unwrap();
    path
}

/// A machine that runs.
fn start(place: &Place, command: &mut Command) -> Running {
    let log = place.0.path().join("log");
    let out = fs::File::create(&log).unwrap();
    let process = command.stderr(out).stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    let mut running = Running { process, log };
    running.wait_for_log("started in");
    running
}

fn ask(place: &Place, words: &[&str]) -> String {
    let output =
        Command::new(CABLEWAY).arg("vm").args(words).arg("--run-dir").arg(place.run_dir()).output().unwrap();
    assert!(output.status.success(), "{words:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// A machine of one of each device that needs no root, with its files in the place.
fn everything(place: &Place) -> Vec<String> {
    let at = |name: &str| place.0.path().join(name).display().to_string();
    fs::write(at("disk"), [0; 8192]).unwrap();
    let (run_dir, back) = (at("run"), place.socket("back"));
    let words = [
        "vm",
        "--kernel",
        &guest(place.0.path()).display().to_string(),
        "--run-dir",
        &run_dir,
        "--memory",
        "4MiB",
        "--name",
        "all",
        "--serial",
        &format!("file:{}", at("serial")),
        "--console",
        &format!("file:{}", at("console")),
        "--rng",
        "true",
        "--disk",
        &format!("raw,path={},queues=2", at("disk")),
        "--net",
        &format!("vhost-user,socket={},wait=no", at("nobody.sock")),
        "--net",
        &format!("vhost-user,socket={},mode=server,wait=no", back.display()),
    ];
    words.iter().map(|word| (*word).to_owned()).collect()
}

#[test]
fn every_thread_of_a_machine_has_its_filter_and_the_machine_lives_through_what_is_done_to_it() {
    if no_kvm() {
        return;
    }
    let place = Place::new();
    let mut machine = start(&place, Command::new(CABLEWAY).args(everything(&place)));
    let mut names = Vec::new();
    let mut of_main = 0;
    for task in fs::read_dir(format!("/proc/{}/task", machine.process.id())).unwrap() {
        let path = task.unwrap().path();
        let name = fs::read_to_string(path.join("comm")).unwrap().trim().to_owned();
        // KVM's own, which runs nothing of ours.
        if name.starts_with("kvm-") {
            continue;
        }
        let status = fs::read_to_string(path.join("status")).unwrap();
        let value = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)).map(str::trim);
        assert_eq!((value("NoNewPrivs:"), value("Seccomp:")), (Some("1"), Some("2")), "{name}");
        // How many (Linux 5.9): all but the main thread have more than that one.
        let filters = value("Seccomp_filters:").and_then(|text| text.parse::<u32>().ok()).unwrap_or(0);
        if name == "cableway" {
            of_main = filters;
        } else {
            names.push((name, filters));
        }
    }
    let few: Vec<_> = names.iter().filter(|(_, filters)| of_main > 0 && *filters <= of_main).collect();
    assert!(few.is_empty(), "{few:?} have no filter beside the main thread's {of_main}");
    let mut names: Vec<_> = names.into_iter().map(|(name, _)| name).collect();
    names.sort_unstable();
    let expected = [
        "console",
        "console",
        "console.0",
        "console.1",
        "control",
        "disk0.0",
        "disk0.1",
        "net net0",
        "net net1",
        "net0 ctl.0",
        "net1 ctl.0",
        "rng.0",
        "signals",
        "vcpu0",
    ];
    assert_eq!(names, expected);

    let serial = place.0.path().join("serial");
    for boots in 1..=3 {
        eventually("it prints", || fs::read(&serial).unwrap() == b".");
        let info: serde_json::Value = serde_json::from_str(&ask(&place, &["info", "all", "--json"])).unwrap();
        assert_eq!(info["boots"], boots);
        assert!(place.socket("back").exists());
        ask(&place, &["pause", "all"]);
        ask(&place, &["resume", "all"]);
        // What was put in the kernel's place meanwhile is another machine's business.
        if boots == 1 {
            fs::rename(place.0.path().join("kernel"), place.0.path().join("old")).unwrap();
            fs::write(place.0.path().join("kernel"), "no kernel").unwrap();
        }
        if boots < 3 {
            ask(&place, &["reboot", "all"]);
            eventually("it starts again", || machine.log().matches("started in").count() > boots);
        }
    }
    // The handler of a signal that comes while another is handled may not run where it is forbidden.
    for _ in 0..20 {
        machine.signal(nix::sys::signal::Signal::SIGTERM);
    }
    machine.signal(nix::sys::signal::Signal::SIGINT);
    let (_, status) = machine.end();
    assert_eq!(status, Some(0), "{}", machine.log());
    assert_eq!(place.left_behind(), [""; 0]);
}

#[test]
fn a_user_who_may_open_kvm_runs_a_machine_and_is_told_what_it_may_not() {
    const NOBODY: u32 = 65_534;
    if no_kvm() {
        return;
    }
    let place = Place::new();
    let words = everything(&place);
    let root = nix::unistd::geteuid().is_root();
    // The group that may open it, and no other; as whoever runs this if that is not root.
    let group = fs::metadata("/dev/kvm").unwrap().gid();
    if root {
        for path in [place.0.path().to_owned(), place.run_dir(), place.0.path().join("disk")] {
            std::os::unix::fs::chown(path, Some(NOBODY), Some(group)).unwrap();
        }
        fs::set_permissions(place.0.path().join("kernel"), fs::Permissions::from_mode(0o644)).unwrap();
    }
    let as_user = |words: &[String], locked: u64| {
        let mut command = Command::new("prlimit");
        command.args([format!("--memlock={locked}"), "--rtprio=0".to_owned()]).arg(CABLEWAY).args(words);
        if root {
            command.uid(NOBODY).gid(group);
        }
        command
    };
    let mut machine = start(&place, &mut as_user(&words, 0));
    eventually("it prints", || fs::read(place.0.path().join("serial")).unwrap() == b".");
    let status = fs::read_to_string(format!("/proc/{}/status", machine.process.id())).unwrap();
    if root {
        assert!(status.contains("CapEff:\t0000000000000000"), "{status}");
    }
    machine.signal(nix::sys::signal::Signal::SIGINT);
    assert_eq!(machine.end().1, Some(0), "{}", machine.log());

    // What was asked for and is not permitted is refused, with the way out.
    let core = crate::world::core().to_string();
    for (more, message) in [
        (&["--lock-memory", "true"][..], "ulimit -l"),
        (&["--vcpu-cores", &core, "--vcpu-priority", "5"], "ulimit -r 5"),
    ] {
        let more: Vec<String> = more.iter().map(|word| (*word).to_owned()).collect();
        let refused = as_user(&[words.clone(), more.clone()].concat(), 0).output().unwrap();
        let said = String::from_utf8(refused.stderr).unwrap();
        assert_eq!(refused.status.code(), Some(2), "{more:?}: {said}");
        assert!(said.contains(message), "{more:?}: {said}");
        assert_eq!(place.left_behind(), [""; 0], "{more:?}");
    }
}

#[test]
fn a_machine_says_what_of_its_sandbox_is_off_or_not_to_be_had_and_a_check_what_it_would_be_held_to() {
    if no_kvm() {
        return;
    }
    let place = Place::new();
    let words = everything(&place);
    let with = |more: &[&str]| -> Vec<String> {
        words.iter().cloned().chain(more.iter().map(|word| (*word).to_owned())).collect()
    };
    let mut machine =
        start(&place, Command::new(CABLEWAY).args(with(&["--seccomp", "false", "--confine-files", "false"])));
    assert!(machine.log().contains("`seccomp` is \"off\""), "{}", machine.log());
    assert!(machine.log().contains("`confine_files` is off"), "{}", machine.log());
    let status = fs::read_to_string(format!("/proc/{}/status", machine.process.id())).unwrap();
    assert!(status.contains("NoNewPrivs:\t1\nSeccomp:\t0"), "{status}");
    machine.signal(nix::sys::signal::Signal::SIGINT);
    assert_eq!(machine.end().1, Some(0), "{}", machine.log());

    for (more, line) in [
        (&[][..], "end at once when a thread calls the kernel for what its kind has no use for"),
        (&["--seccomp", "log"], "log it when a thread calls the kernel for what its kind has no use for"),
        (&["--seccomp", "off"], "let every thread call the kernel for anything: `seccomp` is \"off\""),
        (&["--confine-files", "false"], "open whatever files its user can: `confine_files` is off"),
    ] {
        let checked = Command::new(CABLEWAY).args(with(&[more, &["--check"]].concat())).output().unwrap();
        let printed = String::from_utf8(checked.stdout).unwrap();
        assert_eq!(checked.status.code(), Some(0), "{printed}");
        assert!(printed.contains(line), "{line}: {printed}");
    }
}

/// Has sector 0 of the machine's disk read or written, and prints the first byte of it and the answer; then off.
fn disk_guest(writes: bool) -> Vec<u8> {
    const BAR: u32 = 0xc000_0000;
    const CONFIG: u32 = 0xe000_8000;
    const DESCRIPTORS: u32 = 0x18_0000;
    const HEADER: u32 = 0x18_4000;
    const DATA: u32 = 0x18_5000;
    const STATUS: u32 = 0x18_6000;
    let mut code = Vec::new();
    let mut put = |parts: &[&[u8]]| parts.iter().for_each(|part| code.extend_from_slice(part));
    // mov eax, value, and to memory: a double word, a word, a byte.
    let long = |at: u32, value: u32| [&[0xb8], &value.to_le_bytes()[..], &[0xa3], &at.to_le_bytes()].concat();
    let word =
        |at: u32, value: u32| [&[0xb8], &value.to_le_bytes()[..], &[0x66, 0xa3], &at.to_le_bytes()].concat();
    let byte = |at: u32, value: u8| [&[0xb0, value, 0xa2], &at.to_le_bytes()[..]].concat();
    put(&[&word(CONFIG + 4, 6)]);
    let data = if writes { 1 } else { 3 };
    for (n, (at, len, flags)) in (0..).zip([(HEADER, 16, 1), (DATA, 512, data), (STATUS, 1, 2)]) {
        let descriptor = DESCRIPTORS + 16 * n;
        put(&[
            &long(descriptor, at),
            &long(descriptor + 8, len),
            &long(descriptor + 12, flags | (n + 1) << 16),
        ]);
    }
    put(&[&long(HEADER, writes.into())]);
    if writes {
        put(&[&byte(DATA, b'w')]);
    }
    // Status, features (VERSION_1), the queue's areas, enabled; then one chain, and a kick.
    put(&[
        &byte(BAR + 0x14, 3),
        &long(BAR + 8, 1),
        &long(BAR + 12, 1),
        &byte(BAR + 0x14, 11),
        &word(BAR + 0x16, 0),
    ]);
    for (register, area) in [(0x20, DESCRIPTORS), (0x28, 0x18_1000), (0x30, 0x18_2000)] {
        put(&[&long(BAR + register, area)]);
    }
    put(&[&word(BAR + 0x1c, 1), &byte(BAR + 0x14, 15), &word(0x18_1002, 1), &word(BAR + 0x3000, 0)]);
    // mov ax, [used index]; test ax, ax; jz back. mov dx, 0x3f8; mov al, [data]; out dx, al; mov al, [status]; add al, '0'; out dx, al.
    put(&[&[0x66, 0xa1, 2, 0x20, 0x18, 0, 0x66, 0x85, 0xc0, 0x74, 0xf5], &[0x66, 0xba, 0xf8, 3, 0xa0]]);
    put(&[&DATA.to_le_bytes(), &[0xee, 0xa0], &STATUS.to_le_bytes(), &[4, b'0', 0xee]]);
    put(&[&[0x66, 0xba, 0, 6, 0xb0, 0x34, 0xee, 0xeb, 0xfe]]);
    elf(&code)
}

#[test]
fn a_guests_disk_is_read_and_written_under_the_filters_in_every_way_that_there_is() {
    if no_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("disk"), [b'r'; 65_536]).unwrap();
    for (writes, aio) in [(false, "io_uring"), (false, "threads"), (true, "io_uring"), (true, "threads")] {
        fs::write(at("kernel"), disk_guest(writes)).unwrap();
        let ended = Command::new(CABLEWAY)
            .args(["vm", "--memory", "4MiB", "--kernel"])
            .arg(at("kernel"))
            .arg(format!("--disk=raw,path={},aio={aio}", at("disk").display()))
            .arg(format!("--run-dir={}", dir.path().display()))
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let printed = if writes { "w0" } else { "r0" };
        let what = format!("{aio} {printed}: {ended:?}");
        assert_eq!(
            (ended.status.code(), String::from_utf8_lossy(&ended.stdout).as_ref()),
            (Some(0), printed),
            "{what}"
        );
    }
    assert_eq!(fs::read(at("disk")).unwrap()[0], b'w');
}
