//! Network namespaces, as separate machines: each with a network stack of its own.
//!
//! Owns the namespaces that a test makes; they are gone, with all that is in them, when the value is dropped.

use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A network namespace.
pub(crate) struct Namespace {
    pub(crate) name: String,
}

impl Namespace {
    /// A new one, for this test process alone.
    pub(crate) fn new(name: &str) -> Self {
        let name = format!("cw-{name}-{}", std::process::id());
        run(&format!("ip netns add {name}"));
        let this = Self { name };
        this.run("ip link set lo up");
        this
    }

    /// Runs a command in it; the test fails if the command does.
    pub(crate) fn run(&self, command: &str) -> String {
        run(&format!("ip netns exec {} {command}", self.name))
    }

    /// Starts a command in it.
    pub(crate) fn start(&self, command: &str) -> Running {
        let mut words = command.split_whitespace();
        let child = Command::new("ip")
            .args(["netns", "exec", &self.name, words.next().unwrap()])
            .args(words)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Running(child)
    }

    /// Takes an interface of this test's own namespace, gives it an address and switches it on.
    pub(crate) fn takes(&self, interface: &str, address: &str) {
        run(&format!("ip link set {interface} netns {}", self.name));
        self.set_up(interface, address);
    }

    /// Gives an interface in it an address and switches it on.
    pub(crate) fn set_up(&self, interface: &str, address: &str) {
        self.run(&format!("ip addr add {address}/24 dev {interface}"));
        self.run(&format!("ip link set {interface} up"));
    }

    /// Whether `address` answers a ping from here within `seconds`.
    pub(crate) fn reaches(&self, address: &str, seconds: u32) -> bool {
        let ping = format!("ip netns exec {} ping -n -q -c 1 -W {seconds} {address}", self.name);
        try_run(&ping).status.success()
    }

    /// Waits until `address` answers.
    pub(crate) fn waits_for(&self, address: &str) {
        let end = Instant::now() + Duration::from_secs(60);
        while !self.reaches(address, 1) {
            assert!(Instant::now() < end, "{address} does not answer {}", self.name);
        }
    }

    /// Starts an iperf3 server for one client, and waits until it listens.
    pub(crate) fn iperf3_server(&self) -> Running {
        let server = self.start("iperf3 --server --one-off");
        let end = Instant::now() + Duration::from_secs(60);
        // The port 5201, in the state of those who listen.
        let listens = |line: &str| {
            let words: Vec<_> = line.split_whitespace().collect();
            words.get(1).is_some_and(|address| address.ends_with(":1451")) && words.get(3) == Some(&"0A")
        };
        while !self.run("cat /proc/net/tcp /proc/net/tcp6").lines().any(listens) {
            assert!(Instant::now() < end, "iperf3 does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    /// TCP to an iperf3 server at `address` for `seconds`, with further `options`: bits a second that arrived.
    pub(crate) fn iperf3(&self, address: &str, seconds: u32, options: &str) -> f64 {
        let report = self.run(&format!("iperf3 --json --client {address} --time {seconds} {options}"));
        let report: serde_json::Value = serde_json::from_str(&report).unwrap();
        report["end"]["sum_received"]["bits_per_second"].as_f64().unwrap()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        try_run(&format!("ip netns del {}", self.name));
    }
}

/// A command that runs until it is dropped.
pub(crate) struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a command (words without spaces); the test fails if the command does.
pub(crate) fn run(command: &str) -> String {
    let output = try_run(command);
    assert!(output.status.success(), "{command}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a command to its end.
pub(crate) fn try_run(command: &str) -> Output {
    let mut words = command.split_whitespace();
    Command::new(words.next().unwrap()).args(words).stdin(Stdio::null()).output().unwrap()
}
