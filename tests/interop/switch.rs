//! A `cableway switch` process under test, with a run directory of its own.
//!
//! Owns the process and its directory: both are gone when the value is dropped. Prints the log of a switch whose test
//! failed.

use std::fmt::Write as _;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// The switch.
pub(crate) struct Switch {
    process: Child,
    config: PathBuf,
    ports: Vec<String>,
    dir: TempDir,
}

impl Switch {
    /// A learning bridge for `ports` guests, as [`Self::bridge`]. Its worker sleeps when nothing comes in: the guests need the
    /// core more.
    pub(crate) fn for_guests(ports: usize) -> Self {
        Self::bridge("idle = \"sleep\"", ports, "")
    }

    /// A learning bridge of `ports` vhost-user ports that listen on `v0.sock`, `v1.sock` and so on, with more keys for the
    /// switch and for each port.
    pub(crate) fn bridge(switch: &str, ports: usize, port: &str) -> Self {
        let mut config = format!("[switch]\nworkers = [1]\n{switch}\n");
        for number in 0..ports {
            let name = format!("name = \"v{number}\"\nkind = \"vhost-user\"\nsocket = \"v{number}.sock\"");
            write!(config, "\n[[port]]\n{name}\n{port}\n").unwrap();
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("switch.toml");
        std::fs::write(&file, config).unwrap();
        Self::start(dir, file, ports)
    }

    /// The switch that a file of `configs/` describes; it has `ports` ports.
    pub(crate) fn of_file(name: &str, ports: usize) -> Self {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs").join(name);
        Self::start(tempfile::tempdir().unwrap(), file, ports)
    }

    /// The switch that `config` describes.
    pub(crate) fn of_text(config: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("switch.toml");
        std::fs::write(&file, config).unwrap();
        let mut switch = Self::start(dir, file, 0);
        let end = Instant::now() + Duration::from_secs(60);
        while !switch.log().contains("ready in") {
            assert!(
                switch.is_running() && Instant::now() < end,
                "the switch does not start:\n{}",
                switch.log()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        switch
    }

    /// Changes its file.
    pub(crate) fn write(&self, config: &str) {
        std::fs::write(&self.config, config).unwrap();
    }

    /// Makes it read its file again.
    pub(crate) fn reload(&self) {
        let output = self.ask("reload");
        assert!(output.status.success(), "{output:?}");
    }

    /// What it answers to a question, as JSON.
    pub(crate) fn json(&self, question: &str) -> Value {
        serde_json::from_slice(&self.ask(question).stdout).unwrap()
    }

    /// What it counted, once every frame that came in was sent or dropped, or after a minute.
    pub(crate) fn settled(&self) -> Value {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let stats = self.json("stats");
            let (came, went) = balance(&stats);
            if came == went || Instant::now() > end {
                return stats;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn ask(&self, question: &str) -> Output {
        let mut command = Command::new(binary());
        command.args(["switch", question, "--json", "--run-dir"]).arg(self.dir()).output().unwrap()
    }

    /// Waits until a port is in this state, with a reason that contains `reason`.
    pub(crate) fn waits_for_state(&self, name: &str, state: &str, reason: &str) {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let ports = self.json("ports");
            let port = ports["ports"].as_array().unwrap().iter().find(|p| p["name"] == name).unwrap();
            if port["state"] == state && port["reason"].as_str().unwrap_or_default().contains(reason) {
                return;
            }
            assert!(Instant::now() < end, "port {name} is not {state} ({reason}): {port}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Whether it still runs.
    pub(crate) fn is_running(&mut self) -> bool {
        self.process.try_wait().unwrap().is_none()
    }

    fn start(dir: TempDir, config: PathBuf, ports: usize) -> Self {
        let process = spawn(&config, dir.path());
        let ports = (0..ports).map(|port| format!("v{port}")).collect();
        let switch = Self { process, config, ports, dir };
        switch.wait_for_sockets();
        switch
    }

    /// The run directory.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The process.
    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        self.process.wait().unwrap()
    }

    /// The socket of port `port`.
    pub(crate) fn socket(&self, port: usize) -> PathBuf {
        self.dir().join(format!("v{port}.sock"))
    }

    /// Ends the switch without warning, as `kill -9` does, and starts it again.
    pub(crate) fn crash_and_restart(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        self.process = spawn(&self.config, self.dir.path());
        self.wait_for_sockets();
    }

    /// Everything the switch has logged.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.dir().join("switch.log")).unwrap_or_default()
    }

    fn wait_for_sockets(&self) {
        let end = Instant::now() + Duration::from_secs(60);
        let listening = |port: &String| {
            let socket = self.dir().join(format!("{port}.sock"));
            socket.exists() && std::fs::metadata(&socket).is_ok()
        };
        while !self.ports.iter().all(listening) {
            assert!(Instant::now() < end, "the switch has no sockets after a minute:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if std::thread::panicking() {
            eprintln!("--- the switch's log:\n{}", tail(&self.log(), 40));
        }
    }
}

fn spawn(config: &Path, dir: &Path) -> Child {
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        // What a killed switch left behind is its own to replace; but waiting for sockets must not see the old ones.
        if entry.file_name().to_string_lossy().ends_with(".sock") {
            let _ = std::fs::rename(entry.path(), entry.path().with_extension("stale"));
        }
    }
    let log = File::options().create(true).append(true).open(dir.join("switch.log")).unwrap();
    Command::new(binary())
        .arg("switch")
        .arg(config)
        .arg("--run-dir")
        .arg(dir)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .expect("cableway starts")
}

/// Every frame that came in was sent or dropped under a reason; how many came in and were dropped.
pub(crate) fn conserved(stats: &Value) -> (u64, u64) {
    let (came, went) = balance(stats);
    let totals = &stats["totals"];
    assert_eq!(came, went, "{totals}");
    let of = |key: &str| totals[key].as_u64().unwrap();
    (of("received"), of("dropped"))
}

/// Frames that came in or were made, and those that went out or were dropped.
fn balance(stats: &Value) -> (u64, u64) {
    let of = |key: &str| stats["totals"][key].as_u64().unwrap();
    (of("received") + of("replicas"), of("sent") + of("dropped"))
}

/// A counter of a port, over all its queues of one direction.
pub(crate) fn sum(stats: &Value, port: &str, direction: &str, key: &str) -> u64 {
    let port = stats["ports"].as_array().unwrap().iter().find(|p| p["name"] == port).unwrap();
    port[direction].as_array().unwrap().iter().map(|queue| queue[key].as_u64().unwrap()).sum()
}

/// The binary under test.
pub(crate) fn binary() -> PathBuf {
    std::env::var_os("CABLEWAY").map_or_else(|| env!("CARGO_BIN_EXE_cableway").into(), PathBuf::from)
}

/// The last `lines` lines of `text`.
pub(crate) fn tail(text: &str, lines: usize) -> String {
    let all: Vec<_> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
