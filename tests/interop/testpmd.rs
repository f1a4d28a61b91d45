//! DPDK's virtio-user driver as client: closed loops of frames through the switch, one test a ring variant.
//!
//! testpmd drives both ports from one core. A fixed number of frames circulates both ways, so that no ring overflows and
//! every missing frame was lost by the switch. Together the tests move more than 10^8 frames.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::switch::{Switch, tail};

/// Frames that each test wants to see received before it looks for lost ones.
const FRAMES: u64 = 10_000_000;

/// Bursts of 32 frames that start circulating on every queue of a port; well below the ring's 256 entries.
const BURSTS: u64 = 2;

#[test]
#[ignore = "needs DPDK, huge pages and two cores: ./check testpmd"]
fn split_rings_lose_nothing() {
    closed_loop("mrg_rxbuf=1,in_order=1", 1);
}

#[test]
#[ignore = "needs DPDK, huge pages and two cores: ./check testpmd"]
fn split_rings_without_in_order_lose_nothing() {
    closed_loop("mrg_rxbuf=1,in_order=0", 1);
}

#[test]
#[ignore = "needs DPDK, huge pages and two cores: ./check testpmd"]
fn split_rings_without_mergeable_buffers_lose_nothing() {
    closed_loop("mrg_rxbuf=0,in_order=1", 1);
}

#[test]
#[ignore = "needs DPDK, huge pages and two cores: ./check testpmd"]
fn split_rings_without_either_lose_nothing() {
    closed_loop("mrg_rxbuf=0,in_order=0", 1);
}

#[test]
#[ignore = "needs DPDK, huge pages and two cores: ./check testpmd"]
fn split_rings_of_the_vectorized_driver_lose_nothing() {
    closed_loop("mrg_rxbuf=0,in_order=0,vectorized=1", 1);
}

#[test]
#[ignore = "needs DPDK, huge pages and two cores: ./check testpmd"]
fn packed_rings_lose_nothing() {
    closed_loop("packed_vq=1,mrg_rxbuf=1,in_order=1", 1);
}

#[test]
#[ignore = "needs DPDK, huge pages and two cores: ./check testpmd"]
fn packed_rings_without_in_order_lose_nothing() {
    closed_loop("packed_vq=1,mrg_rxbuf=1,in_order=0", 1);
}

#[test]
#[ignore = "needs DPDK, huge pages and two cores: ./check testpmd"]
fn packed_rings_without_mergeable_buffers_lose_nothing() {
    closed_loop("packed_vq=1,mrg_rxbuf=0,in_order=1", 1);
}

#[test]
#[ignore = "needs DPDK, huge pages and two cores: ./check testpmd"]
fn packed_rings_without_either_lose_nothing() {
    closed_loop("packed_vq=1,mrg_rxbuf=0,in_order=0", 1);
}

#[test]
#[ignore = "needs DPDK, huge pages and two cores: ./check testpmd"]
fn packed_rings_of_the_vectorized_driver_lose_nothing() {
    closed_loop("packed_vq=1,mrg_rxbuf=0,in_order=1,vectorized=1", 1);
}

#[test]
#[ignore = "needs DPDK, huge pages and two cores: ./check testpmd"]
fn two_queue_pairs_of_split_rings_lose_nothing_and_share_the_flows() {
    closed_loop("mrg_rxbuf=1,in_order=1", 2);
}

#[test]
#[ignore = "needs DPDK, huge pages and two cores: ./check testpmd"]
fn two_queue_pairs_of_packed_rings_lose_nothing_and_share_the_flows() {
    closed_loop("packed_vq=1,mrg_rxbuf=1,in_order=1", 2);
}

/// Lets frames circulate between two ports with these virtio-user options until enough were received, drains the rings and
/// asserts that none is missing.
fn closed_loop(options: &str, queue_pairs: u64) {
    let switch = match queue_pairs {
        1 => Switch::of_file("vv.toml", 2),
        pairs => Switch::bridge("", 2, &format!("queue_pairs = {pairs}")),
    };
    let mut testpmd = Testpmd::start(&switch, options, queue_pairs);
    testpmd.say(&format!("start tx_first {BURSTS}"));
    let (begin, end) = (Instant::now(), Instant::now() + Duration::from_secs(60));
    loop {
        std::thread::sleep(Duration::from_millis(250));
        let received: u64 = testpmd.counters().values().map(|port| port.received).sum();
        if received >= FRAMES {
            break;
        }
        assert!(Instant::now() < end, "{received} frames in 60 s\n{}", testpmd.log());
    }
    let streams = testpmd.say("stop");
    let took = begin.elapsed();
    // What the rings still hold comes in now.
    testpmd.say("set fwd rxonly");
    testpmd.say("start");
    std::thread::sleep(Duration::from_millis(300));
    testpmd.say("stop");
    let counters = testpmd.counters();
    let sent: u64 = counters.values().map(|port| port.sent).sum();
    let received: u64 = counters.values().map(|port| port.received).sum();
    let rate = received as f64 / took.as_secs_f64() / 1e6;
    println!("testpmd {options}, {queue_pairs} queue pairs: {received} of {sent} frames, {rate:.1} Mpps");
    assert_eq!(received, sent, "frames lost\n{}", testpmd.log());
    assert!(
        !numbers(&streams, "TX-dropped:").any(|dropped| dropped > 0),
        "testpmd had no room to send:\n{streams}"
    );
    for (port, counters) in &counters {
        assert!(counters.received > FRAMES / 4, "port {port} received only {}", counters.received);
    }
    if queue_pairs > 1 {
        // One paragraph a queue of each port ("Forward Stats for RX Port= 0/Queue= 1 -> …").
        let queues = streams
            .split("Forward Stats for")
            .skip(1)
            .filter_map(|queue| numbers(queue, "RX-packets:").next());
        assert_eq!(
            queues.filter(|received| *received > 0).count() as u64,
            2 * queue_pairs,
            "an idle queue:\n{streams}"
        );
    }
}

/// Frames of one port, as testpmd counts them.
#[derive(Debug)]
struct Counters {
    received: u64,
    sent: u64,
}

/// The numbers that stand behind `name` in what testpmd printed.
fn numbers(text: &str, name: &str) -> impl Iterator<Item = u64> {
    text.split(name).skip(1).map(|rest| rest.split_whitespace().next().unwrap().parse().unwrap())
}

/// An interactive testpmd, driven over its prompt.
pub(crate) struct Testpmd {
    process: Child,
    input: ChildStdin,
    output: Arc<Mutex<String>>,
}

impl Testpmd {
    /// With two virtio-user ports on the sockets of `switch`.
    fn start(switch: &Switch, options: &str, queue_pairs: u64) -> Self {
        let device = |port| {
            let socket = switch.socket(port);
            let path = socket.display();
            format!(
                "net_virtio_user{port},path={path},queues={queue_pairs},queue_size=256,mac=02:00:00:00:00:0{port},{options}"
            )
        };
        let peers = ["--eth-peer=0,02:00:00:00:00:01", "--eth-peer=1,02:00:00:00:00:00"];
        let more = ["--forward-mode=mac", "--txonly-multi-flow", peers[0], peers[1]];
        Self::with_devices([device(0), device(1)], "0@0,1@0", queue_pairs, &more)
    }

    /// With these devices as ports; `lcores` are the cores of its prompt (0) and its forwarding (1).
    pub(crate) fn with_devices(devices: [String; 2], lcores: &str, queue_pairs: u64, more: &[&str]) -> Self {
        let [first, second] = &devices;
        let queues = [format!("--rxq={queue_pairs}"), format!("--txq={queue_pairs}")];
        let mut arguments = vec!["--lcores", lcores, "--no-pci", "--in-memory", "-m", "512"];
        arguments.extend(["--single-file-segments", "--file-prefix", "interop"]);
        arguments.extend(["--vdev", first, "--vdev", second]);
        arguments.extend(["--", "-i", "--nb-cores=1", "--no-flush-rx"]);
        arguments.extend(["--rxd=256", "--txd=256", "--total-num-mbufs=16384", &queues[0], &queues[1]]);
        arguments.extend(more);
        Self::with_arguments(arguments)
    }

    /// With these arguments, which make it interactive.
    pub(crate) fn with_arguments<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Self {
        let mut command = Command::new("stdbuf");
        command.args(["-oL", "dpdk-testpmd"]).args(arguments);
        let (mut from, to) = std::io::pipe().unwrap();
        let mut process = command
            .stdin(Stdio::piped())
            .stdout(to.try_clone().unwrap())
            .stderr(to)
            .spawn()
            .expect("testpmd starts (./check install)");
        drop(command); // and with it our end of the pipe
        let output = Arc::new(Mutex::new(String::new()));
        let collected = Arc::clone(&output);
        std::thread::spawn(move || {
            let mut buffer = [0; 65536];
            while let Ok(length @ 1..) = from.read(&mut buffer) {
                collected.lock().unwrap().push_str(&String::from_utf8_lossy(&buffer[..length]));
            }
        });
        let input = process.stdin.take().unwrap();
        let mut testpmd = Self { process, input, output };
        testpmd.prompt(0, Duration::from_secs(60));
        testpmd
    }

    /// Types a line and returns what testpmd says until its next prompt.
    pub(crate) fn say(&mut self, line: &str) -> String {
        let from = self.output.lock().unwrap().len();
        writeln!(self.input, "{line}").unwrap();
        self.prompt(from, Duration::from_secs(60))
    }

    /// Frames that each port received.
    pub(crate) fn received(&mut self) -> Vec<u64> {
        self.counters().values().map(|port| port.received).collect()
    }

    fn counters(&mut self) -> BTreeMap<u64, Counters> {
        let answer = self.say("show port stats all");
        let ports = answer.split("NIC statistics for port ").skip(1);
        let port = |text: &str| {
            let name = text.split_whitespace().next()?.parse().ok();
            let count = |name| numbers(text, name).next();
            Some((name?, Counters { received: count("RX-packets:")?, sent: count("TX-packets:")? }))
        };
        ports.map(|text| port(text).unwrap_or_else(|| panic!("not counters: {text}"))).collect()
    }

    fn prompt(&mut self, from: usize, patience: Duration) -> String {
        let end = Instant::now() + patience;
        loop {
            let answer = self.output.lock().unwrap()[from..].to_owned();
            if answer.trim_end().ends_with("testpmd>") {
                return answer;
            }
            let gone = self.process.try_wait().unwrap().is_some();
            assert!(!gone && Instant::now() < end, "no prompt from testpmd:\n{}", tail(&answer, 40));
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn log(&self) -> String {
        tail(&self.output.lock().unwrap(), 60)
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        let _ = self.input.write_all(b"quit\n");
        let end = Instant::now() + Duration::from_secs(5);
        while Instant::now() < end && matches!(self.process.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
