//! A switch process under attack, and what must hold of it whatever happens.
//!
//! Ports `g0` and `g1` belong to the well-behaved pair, `h0` and `h1` (in VLANs of their own, tagged or not) to the attacker.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::guest::{FEATURES, Guest, frame};
use crate::pair::Pair;

const CONFIG: &str = r#"
[switch]
workers = [1]
idle = "sleep"

[[port]]
name = "g0"
kind = "vhost-user"
socket = "g0.sock"
vlan = { access = 10 }

[[port]]
name = "g1"
kind = "vhost-user"
socket = "g1.sock"
vlan = { access = 10 }

[[port]]
name = "h0"
kind = "vhost-user"
socket = "h0.sock"
vlan = { trunk = ["60-70"], native = 66 }
queue_pairs = 128
learn_limit = 64
max_memory = "64 GiB"

[[port]]
name = "h1"
kind = "vhost-user"
socket = "h1.sock"
vlan = { trunk = ["60-70"], native = 66 }
queue_pairs = 2
"#;

/// How long anything may take that should happen at once, on a busy machine.
pub(crate) const SOON: Duration = Duration::from_secs(60);

/// What the switch may grow by while it is attacked: allocators keep some.
const SLACK: usize = 1 << 20;

/// A switch, its well-behaved pair, and how large it was when they began.
pub(crate) struct World {
    process: Child,
    pair: Option<Pair>,
    dir: TempDir,
    before: Size,
    begun: Instant,
    _alone: MutexGuard<'static, ()>,
}

#[derive(Clone, Copy, Debug)]
struct Size {
    descriptors: usize,
    resident: usize,
    threads: usize,
}

impl World {
    /// Starts a switch; one at a time.
    pub(crate) fn new() -> Self {
        static ONE: Mutex<()> = Mutex::new(());
        let alone = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("switch.toml");
        std::fs::write(&file, CONFIG).unwrap();
        let log = File::create(dir.path().join("switch.log")).unwrap();
        let process = Command::new(binary())
            .args(["switch".as_ref(), file.as_os_str(), "--run-dir".as_ref(), dir.path().as_os_str()])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let nothing = Size { descriptors: 0, resident: 0, threads: 0 };
        let mut world =
            Self { process, pair: None, dir, before: nothing, begun: Instant::now(), _alone: alone };
        for port in ["g0", "g1", "h0", "h1"] {
            world.wait("the switch has sockets", |w| w.socket(port).exists());
        }
        world.pair = Some(Pair::start(&world.socket("g0"), &world.socket("g1")));
        world.wait("the pair forwards", |w| w.forwarded() > 100);
        // One guest that is signalled: what the switch makes once and keeps is there.
        let mut guest = Guest::up(&world.socket("h0"), FEATURES);
        guest.send(&frame(60));
        drop(guest);
        world.wait_for_state("h0", "listening");
        world.before = world.size();
        world
    }

    pub(crate) fn socket(&self, port: &str) -> PathBuf {
        self.dir.path().join(format!("{port}.sock"))
    }

    /// The switch's process.
    pub(crate) fn process(&self) -> u32 {
        self.process.id()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("switch.log")).unwrap_or_default()
    }

    /// Waits until something is so.
    #[track_caller]
    pub(crate) fn wait(&mut self, what: &str, so: impl Fn(&Self) -> bool) {
        let end = Instant::now() + SOON;
        while !so(self) {
            if let Some(status) = self.process.try_wait().unwrap() {
                panic!("the switch ended with {status} before {what}");
            }
            assert!(Instant::now() < end, "not after {} s: {what}", SOON.as_secs());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// What `cableway switch QUESTION --json` says.
    pub(crate) fn ask(&self, question: &str) -> Value {
        let mut command = Command::new(binary());
        command.args(["switch", question, "--json", "--run-dir"]).arg(self.dir.path());
        let output = command.output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "cableway switch {question}: {error}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// What `cableway switch ports` says of one port.
    pub(crate) fn port(&self, name: &str) -> Value {
        let report = self.ask("ports");
        report["ports"].as_array().unwrap().iter().find(|p| p["name"] == name).unwrap().clone()
    }

    /// Waits until a port is in `state`.
    #[track_caller]
    pub(crate) fn wait_for_state(&mut self, port: &str, state: &str) {
        let start = Instant::now();
        loop {
            let report = self.port(port);
            if report["state"] == state {
                return;
            }
            assert!(start.elapsed() < SOON, "{port} never was {state}: {report}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until a port gives a reason that contains `reason`: it stopped, or refused something.
    #[track_caller]
    pub(crate) fn wait_for_reason(&mut self, port: &str, reason: &str) {
        let start = Instant::now();
        loop {
            let report = self.port(port);
            if report["reason"].as_str().is_some_and(|r| r.contains(reason)) {
                return;
            }
            assert!(start.elapsed() < SOON, "no {reason:?} in {report}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until a port stopped for a reason that contains `reason`.
    #[track_caller]
    pub(crate) fn wait_for_stop(&mut self, port: &str, reason: &str) {
        self.wait_for_state(port, "stopped");
        self.wait_for_reason(port, reason);
    }

    /// Frames that a port received from its guest.
    pub(crate) fn received(&self, port: &str) -> u64 {
        let stats = self.ask("stats");
        let port = stats["ports"].as_array().unwrap().iter().find(|p| p["name"] == port).unwrap();
        port["rx"].as_array().unwrap().iter().map(|q| q["received"].as_u64().unwrap()).sum()
    }

    /// Frames that a port received and dropped for `reason`, in either direction.
    pub(crate) fn drops(&self, port: &str, reason: &str) -> u64 {
        let stats = self.ask("stats");
        let port = stats["ports"].as_array().unwrap().iter().find(|p| p["name"] == port).unwrap();
        let queues = port["rx"].as_array().unwrap().iter().chain(port["tx"].as_array().unwrap());
        let drops = queues.flat_map(|q| q["drops"].as_array().unwrap());
        drops.filter(|d| d["reason"] == reason).map(|d| d["frames"].as_u64().unwrap()).sum()
    }

    /// Waits until a port dropped `frames` frames for `reason`.
    #[track_caller]
    pub(crate) fn wait_for_drops(&mut self, port: &str, reason: &str, frames: u64) {
        let start = Instant::now();
        while self.drops(port, reason) < frames {
            assert!(
                start.elapsed() < SOON,
                "{} of {frames} {reason} at {port}: {}",
                self.drops(port, reason),
                self.ask("stats")
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Frames that the pair has forwarded.
    pub(crate) fn forwarded(&self) -> u64 {
        self.pair.as_ref().unwrap().forwarded()
    }

    fn size(&self) -> Size {
        let proc = PathBuf::from(format!("/proc/{}", self.process.id()));
        let status = std::fs::read_to_string(proc.join("status")).unwrap();
        let number = |key: &str| {
            let line = status.lines().find_map(|l| l.strip_prefix(key)).unwrap();
            line.trim().trim_end_matches(" kB").parse::<usize>().unwrap()
        };
        Size {
            descriptors: std::fs::read_dir(proc.join("fd")).unwrap().count(),
            resident: number("RssAnon:") << 10,
            threads: number("Threads:"),
        }
    }

    /// Begins to count the switch's size from here: after a first round that made it allocate what it keeps.
    pub(crate) fn warmed_up(&mut self) {
        self.before = self.size();
    }

    /// The attacker let go of the switch: it holds no more than before, its frames are accounted for, and its pair
    /// neither lost a frame nor waited for one.
    #[track_caller]
    pub(crate) fn unharmed(mut self) {
        let forwarded = self.forwarded();
        self.wait("the pair goes on", |w| w.forwarded() > forwarded + 100);
        let before = self.before;
        let fits = |now: Size| {
            now.descriptors <= before.descriptors
                && now.resident <= before.resident + SLACK
                && now.threads <= before.threads
        };
        let start = Instant::now();
        while !fits(self.size()) {
            assert!(start.elapsed() < SOON, "the switch grew: {before:?}, now {:?}", self.size());
            std::thread::sleep(Duration::from_millis(10));
        }
        self.pair.take().unwrap().end();
        let totals = self.ask("stats")["totals"].clone();
        let total = |key: &str| totals[key].as_u64().unwrap();
        let (came, went) = (total("received") + total("replicas"), total("sent") + total("dropped"));
        assert_eq!(came, went, "{totals}");
        assert!(!self.log().contains("panicked"), "{}", self.log());
        // Each of two ports: eight lines at once and one a second, of what was wrong and of who came and went; and each stop.
        let (lines, most) = (self.log().lines().count() as u64, 100 + 10 * self.begun.elapsed().as_secs());
        assert!(lines <= most, "{lines} lines in the log, not {most}:\n{}", self.log());
        assert_eq!(self.process.try_wait().unwrap(), None);
    }
}

impl Drop for World {
    fn drop(&mut self) {
        drop(self.pair.take());
        let _ = self.process.kill();
        let _ = self.process.wait();
        if std::thread::panicking() {
            eprintln!("--- the switch's log:\n{}", self.log());
        }
    }
}

/// The binary under test.
fn binary() -> PathBuf {
    std::env::var_os("CABLEWAY").map_or_else(|| env!("CARGO_BIN_EXE_cableway").into(), PathBuf::from)
}
