//! Every command that README, CONTRIBUTING and docs/ show, as it is written there: with other paths, and shorter where it
//! would take minutes.
//!
//! Reads the commands out of the documents, so that one that is new or changed is tried or complained about. Never judges
//! what a command prints beyond its exit status: other tests do.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::switch::{Switch, binary};
use crate::testpmd::Testpmd;

/// What other steps and tests run, by how it begins.
const ELSEWHERE: &[(&str, &str)] = &[
    ("./check", "whoever runs this"),
    ("cargo build --release", "./check release"),
    ("cargo bench -p cableway-benches", "./check unit, in its test mode"),
    ("cargo bench -p cableway-switch --bench classify", "./check unit, in its test mode"),
    ("lab/image", "./check qemu"),
    ("lab/run -v ", "./check lab, without the serial line"),
    ("lab/run vm-", "./check lab"),
    ("lab/run nic-", "./check lab"),
    ("cableway nic ", "./check lab, nic-bind"),
    ("cableway tune ", "./check tune"),
    ("cableway doctor", "./check unit, whose status is that of what it finds"),
    ("cableway status", "./check lab, crash"),
    ("cableway down", "./check lab, crash"),
    ("CABLEWAY=$PWD/target/release/cableway cargo test --test interop", "./check qemu and others"),
    ("benches/peers/compare.py --sizes 64,1500 testpmd ovs cableway", "./check peers"),
    ("dpdk-testpmd", "the_testpmd_command_of_the_readme_exchanges_frames"),
    ("qemu-system-x86_64", "the_qemu_arguments_of_the_readme_bring_a_port_up"),
];

#[test]
#[ignore = "needs the release build and two cores: ./check documented"]
fn every_command_of_the_documents_does_what_it_is_shown_for() {
    let mut tried = 0;
    for document in documents() {
        let mut world = World::new();
        for command in commands(&document) {
            if ELSEWHERE.iter().any(|(begin, _)| command.starts_with(begin)) {
                continue;
            }
            println!("{}: {command}", document.file_name().unwrap().display());
            world.run(&command);
            tried += 1;
        }
    }
    assert!(tried >= 20, "only {tried} commands were found");
}

#[test]
#[ignore = "needs DPDK, huge pages and two cores: ./check testpmd"]
fn the_testpmd_command_of_the_readme_exchanges_frames() {
    let switch = Switch::of_file("vv.toml", 2);
    let command = one_of_the_readme("dpdk-testpmd ");
    let command = command.replace("/tmp/cableway", switch.dir().to_str().unwrap());
    let mut testpmd = Testpmd::with_arguments(command.split_whitespace().skip(1));
    for line in ["start tx_first 2", "show port stats all"] {
        assert!(readme().contains(&format!("`{line}`")), "the README no longer says {line}");
    }
    testpmd.say("start tx_first 2");
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        std::thread::sleep(Duration::from_millis(500));
        let received = testpmd.received();
        assert_eq!(received.len(), 2);
        if received.iter().all(|frames| *frames > 10_000) {
            break;
        }
        assert!(Instant::now() < end, "{received:?}");
    }
}

#[test]
#[ignore = "needs QEMU and the guest image: ./check qemu"]
fn the_qemu_arguments_of_the_readme_bring_a_port_up() {
    let switch = Switch::for_guests(2);
    let command = one_of_the_readme("qemu-system-x86_64 ");
    let command = command.replace("/tmp/cableway", switch.dir().to_str().unwrap());
    let image = Path::new(env!("CARGO_MANIFEST_DIR")).join("lab/cache");
    assert!(image.join("vmlinux").exists(), "no guest image: run lab/image (or ./check qemu)");
    let mut qemu = Command::new("qemu-system-x86_64");
    // The guest that stands for the dots.
    qemu.args(["-accel", "tcg", "-display", "none", "-nodefaults", "-no-reboot", "-cpu", "max"]);
    qemu.arg("-kernel").arg(image.join("vmlinux")).arg("-initrd").arg(image.join("initrd.cpio"));
    qemu.args(["-append", "console=ttyS0 quiet panic=-1"]);
    qemu.args(command.split_whitespace().skip(1).filter(|word| *word != "…"));
    let _qemu = Ended(qemu.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap());
    let end = Instant::now() + Duration::from_secs(60);
    while state(switch.dir(), "v0") != "up" {
        assert!(Instant::now() < end, "the guest's card is {}", state(switch.dir(), "v0"));
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// What the commands of a document find: a directory, and the switch that one of them started, in the mode of its ports.
struct World {
    dir: tempfile::TempDir,
    switch: Option<(Ended, &'static str)>,
}

/// A process that ends with the value.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl World {
    fn new() -> Self {
        let world = Self { dir: tempfile::tempdir().unwrap(), switch: None };
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        fs::copy(root.join("configs/vv.toml"), world.path("FILE.toml")).unwrap();
        let machine = fs::read_to_string(root.join("configs/vm.toml")).unwrap();
        fs::write(world.path("vm.toml"), machine.replace("/boot/vmlinuz", "vmlinuz")).unwrap();
        for name in ["node.toml", "demo.toml"] {
            let node = fs::read_to_string(root.join("configs").join(name)).unwrap();
            let node = node.replace("/var/lib/cableway/image/initramfs.cpio", "initrd.cpio");
            fs::write(world.path(name), node.replace("/var/lib/cableway/image/kernel", "vmlinux")).unwrap();
        }
        for image in ["vmlinux", "vmlinuz", "initrd.cpio"] {
            symlink(root.join("lab/cache").join(image), world.path(image)).unwrap();
        }
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&mut self, command: &str) {
        let words = self.words(command);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let has = |word: &str| words.contains(&word);
        match words.as_slice() {
            ["mkdir", ..] => succeeds(Command::new("mkdir").args(&words[1..]), command),
            ["lab/run", "--list"] => {
                let root = env!("CARGO_MANIFEST_DIR");
                succeeds(Command::new("lab/run").arg("--list").current_dir(root), command);
            }
            ["curl", "--unix-socket", socket, ..]
                if socket.contains("/vm-") || socket.ends_with("/node.sock") =>
            {
                let asked = Command::new("curl").args(&words[1..]).output().unwrap();
                assert_eq!(asked.status.code(), Some(7), "{command}: nobody is there to connect to");
            }
            ["curl", ..] => {
                self.serve("server");
                succeeds(Command::new("curl").arg("--fail").args(&words[1..]), command);
            }
            ["cableway", "switch", "stats", ..] if has("--watch") => {
                self.serve("server");
                let shown = self.cableway(&words[1..]).stdout(Stdio::piped()).spawn().unwrap();
                let mut shown = Ended(shown);
                let lines = BufReader::new(shown.0.stdout.take().unwrap()).lines();
                assert_eq!(lines.take(3).filter(Result::is_ok).count(), 3, "{command}");
            }
            ["cableway", "switch", "stats" | "ports" | "fdb" | "reload", ..] => {
                self.serve("server");
                succeeds(&mut self.cableway(&words[1..]), command);
            }
            ["cableway", "switch", file, ..] if !has("--check") => {
                assert!(Path::new(file).exists(), "{command}");
                self.switch = None;
                let switch = self.cableway(&words[1..]).stderr(Stdio::null()).spawn().unwrap();
                self.switch = Some((Ended(switch), "server"));
                self.wait_for_sockets();
            }
            ["cableway", "bench", "vv", ..] if has("--socket") => {
                self.serve(if has("--listen") { "client" } else { "server" });
                succeeds(&mut self.cableway(&words[1..]), command);
            }
            ["cableway", "vm", "list", ..] => succeeds(&mut self.cableway(&words[1..]), command),
            // vmm/tests/tiny has machines to ask; here the words are right, and nobody is there.
            [
                "cableway",
                "vm",
                "info" | "pause" | "resume" | "console" | "events" | "reboot" | "shutdown" | "kill",
                ..,
            ] => {
                let run_dir = self.dir.path().to_str().unwrap();
                let asked = self.cableway(&words[1..]).args(["--run-dir", run_dir]).output().unwrap();
                let said = String::from_utf8_lossy(&asked.stderr);
                assert!(said.contains("no machine `fw1` is running"), "{command}: {said}");
            }
            // Booting them is for ./check lab, on a machine with a KVM that is fast enough.
            ["cableway", "vm", ..] => {
                let image = self.path("vmlinux");
                assert!(image.exists(), "no guest image: run lab/image (or ./check documented)");
                let check = if has("--check") { None } else { Some("--check") };
                succeeds(self.cableway(&words[1..]).args(check), command);
            }
            // Debian's kernel is downloaded by hand only; the lab's is here already.
            ["cableway", "image", ..] => {
                let modules = self.path("modules");
                fs::create_dir_all(&modules).unwrap();
                let unpacked = Command::new("busybox")
                    .args(["cpio", "-id", "lib/modules/*.ko"])
                    .stdin(fs::File::open(self.path("initrd.cpio")).unwrap())
                    .current_dir(&modules)
                    .output()
                    .unwrap();
                assert!(unpacked.status.success(), "{unpacked:?}");
                let mut image = self.cableway(&["image"]);
                image.arg("--output").arg(self.path("image")).arg("--kernel").arg(self.path("vmlinux"));
                succeeds(image.arg("--modules").arg(modules), command);
            }
            ["cableway", "top", ..] => {
                self.serve("server");
                let dir = self.dir.path().to_str().unwrap().to_owned();
                let once = if has("--once") { None } else { Some("--once") };
                succeeds(self.cableway(&words[1..]).args(["--run-dir", &dir]).args(once), command);
            }
            // As with machines: for ./check lab.
            ["cableway", "up", file, ..] => {
                assert!(
                    self.path("vmlinux").exists(),
                    "no guest image: run lab/image (or ./check documented)"
                );
                let run_dir = self.dir.path().to_str().unwrap();
                succeeds(&mut self.cableway(&["up", file, "--plan", "--run-dir", run_dir]), command);
            }
            ["cableway", "switch" | "bench" | "demo" | "latency", ..] => {
                // These bring the switch they need, if any, which wants the core for itself; or measure cores.
                self.switch = None;
                succeeds(&mut self.cableway(&words[1..]), command);
            }
            _ => panic!("no test knows this command: {command}"),
        }
        if has("--report") {
            let page = if has("latency") { "report/latency.html" } else { "report/report.html" };
            assert!(self.path(page).exists(), "{command}");
        }
    }

    /// The words of a command, with paths of this world, and short.
    fn words(&self, command: &str) -> Vec<String> {
        let dir = self.dir.path().to_str().unwrap();
        let mut command = command
            .replace("cargo run --release --", "cableway")
            .replace("target/release/cableway", "cableway")
            .replace("A.sock", &format!("{dir}/v0.sock"))
            .replace("B.sock", &format!("{dir}/v1.sock"));
        for (written, here) in [
            ("/run/a.sock", "/v0.sock"),
            ("/run/b.sock", "/v1.sock"),
            ("/tmp/report", "/report"),
            ("/tmp/cableway", ""),
            ("/run/cableway", ""),
            ("FILE", "/FILE.toml"),
            ("configs/vm.toml", "/vm.toml"),
            ("configs/node.toml", "/node.toml"),
            ("configs/demo.toml", "/demo.toml"),
            (" vmlinux", "/vmlinux"),
            (" initrd.cpio", "/initrd.cpio"),
        ] {
            let space = if written.starts_with(' ') { " " } else { "" };
            command = command.replace(written, &format!("{space}{dir}{here}"));
        }
        for (long, short) in [("--seconds 10", "--seconds 1"), ("--seconds 5", "--seconds 0.05")] {
            command = command.replace(long, short);
        }
        let measures = command.starts_with("cableway bench");
        for (begin, option) in [
            ("cableway demo", " --seconds 1"),
            ("cableway bench", " --seconds 0.05"),
            ("cableway bench", " --sizes 64,1500"),
        ] {
            let name = option.split_whitespace().next().unwrap();
            if command.starts_with(begin) && !command.contains(name) {
                command += option;
            }
        }
        if command.starts_with("cableway switch") && !command.contains("--run-dir") && !measures {
            command += &format!(" --run-dir {dir}");
        }
        // What stands in double quotes is one word.
        let words = |(i, part): (usize, &str)| match i % 2 {
            0 => part.split_whitespace().map(str::to_owned).collect(),
            _ => vec![part.to_owned()],
        };
        command.split('"').enumerate().flat_map(words).collect()
    }

    fn cableway(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command.args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).stdin(Stdio::null());
        command.stdout(Stdio::null());
        command
    }

    /// A switch that listens on this world's sockets, or connects to them, whatever ran before.
    fn serve(&mut self, mode: &'static str) {
        if self.switch.as_ref().is_some_and(|(_, running)| *running == mode) {
            return;
        }
        self.switch = None;
        let file = self.path(&format!("{mode}.toml"));
        let text = fs::read_to_string(self.path("FILE.toml")).unwrap();
        fs::write(&file, text.replace("kind =", &format!("mode = \"{mode}\"\nkind ="))).unwrap();
        let dir = self.dir.path().to_str().unwrap();
        let mut switch = self.cableway(&["switch", file.to_str().unwrap(), "--run-dir", dir]);
        self.switch = Some((Ended(switch.stderr(Stdio::null()).spawn().unwrap()), mode));
        self.wait_for_sockets();
    }

    fn wait_for_sockets(&self) {
        let end = Instant::now() + Duration::from_secs(60);
        while state(self.dir.path(), "v1") == "absent" {
            assert!(Instant::now() < end, "the switch does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn succeeds(command: &mut Command, written: &str) {
    let ran = command.output().unwrap_or_else(|why| panic!("{written}: {why} (./check install)"));
    assert!(ran.status.success(), "{written}: {}\n{}", ran.status, String::from_utf8_lossy(&ran.stderr));
}

/// The state of a port of the switch that runs in `dir`; `absent` where none answers.
fn state(dir: &Path, port: &str) -> String {
    let ran =
        Command::new(binary()).args(["switch", "ports", "--json", "--run-dir"]).arg(dir).output().unwrap();
    let Ok(told) = serde_json::from_slice::<Value>(&ran.stdout) else { return "absent".to_owned() };
    let port = told["ports"].as_array().unwrap().iter().find(|found| found["name"] == port).unwrap();
    port["state"].as_str().unwrap().to_owned()
}

fn documents() -> BTreeSet<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let docs = fs::read_dir(root.join("docs")).unwrap().map(|entry| entry.unwrap().path());
    docs.filter(|path| path.extension().is_some_and(|e| e == "md"))
        .chain(["README.md", "CONTRIBUTING.md"].map(|name| root.join(name)))
        .collect()
}

/// What a document tells its reader to type: lines of blocks without a language that begin with a program that we know of,
/// and programs with options in running text.
fn commands(document: &Path) -> Vec<String> {
    const PROGRAMS: &[&str] = &[
        "./check",
        "CABLEWAY=",
        "benches/",
        "cableway ",
        "cargo ",
        "curl ",
        "dpdk-testpmd ",
        "lab/",
        "mkdir ",
        "qemu-system",
        "target/release/",
    ];
    let begins = |line: &str| PROGRAMS.iter().any(|program| line.starts_with(program));
    let text = fs::read_to_string(document).unwrap().replace("\\\n", " ");
    let mut found = Vec::new();
    for (i, block) in text.split("```").enumerate() {
        if i % 2 == 0 {
            let spans = block.split('`').skip(1).step_by(2);
            found.extend(spans.filter(|span| begins(span) && span.contains(" --")).map(str::to_owned));
        } else if block.starts_with('\n') {
            for line in block.lines().filter(|line| begins(line)) {
                let command = line.split(" #").next().unwrap();
                // Where commands are listed with what they do, that stands behind a gap.
                let listed = command.starts_with("cableway ");
                let command = if listed { command.split("  ").next().unwrap() } else { command };
                found.push(command.trim().to_owned());
            }
        }
    }
    found
}

fn readme() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap()
}

fn one_of_the_readme(begin: &str) -> String {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    commands(&readme).into_iter().find(|command| command.starts_with(begin)).unwrap()
}
