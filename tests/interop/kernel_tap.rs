//! Taps: the kernel's network stack on both sides of the switch, in namespaces of their own.

use std::time::Duration;

use serde_json::Value;

use super::namespaces::{Namespace, run, try_run};
use super::switch::{Switch, conserved, sum};

/// Two namespaces with a tap each, and the switch between them.
struct Pair {
    a: Namespace,
    b: Namespace,
    switch: Switch,
    taps: [String; 2],
}

const A: &str = "198.51.100.1";
const B: &str = "198.51.100.2";

/// Names that only this test process uses.
fn tap(which: &str) -> String {
    format!("cwt{which}{}", std::process::id() % 1_000_000)
}

fn port(name: &str, device: &str, keys: &str) -> String {
    format!("[[port]]\nname = \"{name}\"\nkind = \"tap\"\ndevice = \"{device}\"\n{keys}\n")
}

impl Pair {
    fn with(switch: &str, [key_a, key_b]: [&str; 2]) -> Self {
        let taps = [tap("a"), tap("b")];
        let ports = port("a", &taps[0], key_a) + &port("b", &taps[1], key_b);
        let switch = Switch::of_text(&format!("[switch]\nworkers = [1]\n{switch}\n{ports}"));
        let (a, b) = (Namespace::new("a"), Namespace::new("b"));
        a.takes(&taps[0], A);
        b.takes(&taps[1], B);
        a.waits_for(B);
        Self { a, b, switch, taps }
    }

    /// TCP from a to b, while an iperf3 server runs there; bits a second.
    fn tcp(&self, options: &str) -> f64 {
        let _server = self.b.iperf3_server();
        self.a.iperf3(B, 2, options)
    }

    fn stats(&self) -> Value {
        self.switch.settled()
    }
}

#[test]
#[ignore = "needs root, namespaces, iperf3: ./check kernel"]
fn tcp_crosses_two_taps_in_large_frames_both_ways() {
    for idle in ["poll", "sleep"] {
        let pair = Pair::with(&format!("idle = \"{idle}\""), ["", ""]);
        let (there, back) = (pair.tcp(""), pair.tcp("--reverse"));
        println!("idle = {idle}: {:.2} Gbit/s there, {:.2} Gbit/s back", there / 1e9, back / 1e9);
        let stats = pair.stats();
        conserved(&stats);
        for name in ["a", "b"] {
            let (frames, bytes) = (sum(&stats, name, "rx", "received"), sum(&stats, name, "rx", "bytes"));
            println!("port {name}: {frames} frames, {bytes} bytes in");
            assert_eq!(sum(&stats, name, "tx", "segments"), 0, "nothing is cut for a tap");
        }
        let average = sum(&stats, "a", "rx", "bytes") / sum(&stats, "a", "rx", "received");
        assert!(average > 1_600, "{average} bytes a frame: no segmentation is left undone");
    }
}

#[test]
#[ignore = "needs root, namespaces, iperf3: ./check kernel"]
fn a_tap_without_offloads_gets_finished_frames_of_one_that_leaves_them_undone() {
    let pair = Pair::with("idle = \"sleep\"", ["", "disable = [\"offloads\"]"]);
    let rate = pair.tcp("");
    let stats = pair.stats();
    conserved(&stats);
    println!("{:.2} Gbit/s, {} segments cut", rate / 1e9, sum(&stats, "b", "tx", "segments"));
    assert!(sum(&stats, "b", "tx", "segments") > 100, "{stats}");
    // Nothing goes past the kernel's check of the sums.
    let errors = pair.b.run("nstat -asz TcpInCsumErrors");
    assert!(errors.lines().any(|l| l.split_whitespace().take(2).eq(["TcpInCsumErrors", "0"])), "{errors}");
}

#[test]
#[ignore = "needs root, namespaces, iperf3: ./check kernel"]
fn several_queues_of_a_tap_share_its_flows() {
    let pair = Pair::with("idle = \"sleep\"", ["queue_pairs = 2", "queue_pairs = 2"]);
    let rate = pair.tcp("--parallel 8");
    let stats = pair.stats();
    conserved(&stats);
    println!("{:.2} Gbit/s over two queues", rate / 1e9);
    let port = &stats["ports"][1];
    let queues: Vec<_> = port["tx"].as_array().unwrap().iter().map(|q| q["sent"].as_u64().unwrap()).collect();
    assert!(queues.len() == 2 && queues.iter().all(|sent| *sent > 0), "{queues:?}");
}

#[test]
#[ignore = "needs root, namespaces, iperf3: ./check kernel"]
fn vlans_and_mtu_hold_for_taps() {
    let taps = ["a", "b", "c"].map(tap);
    let access = |vlan: u16, more: &str| format!("vlan = {{ access = {vlan} }}\n{more}");
    let keys = [access(10, ""), access(10, "mtu = 1400"), access(20, "")];
    let ports = ["a", "b", "c"].iter().zip(&taps).zip(&keys).map(|((name, tap), keys)| port(name, tap, keys));
    let ports: String = ports.collect();
    let switch = Switch::of_text(&format!("[switch]\nworkers = [1]\nidle = \"sleep\"\n{ports}"));
    let (a, b, c) = (Namespace::new("a"), Namespace::new("b"), Namespace::new("c"));
    a.takes(&taps[0], A);
    b.takes(&taps[1], B);
    c.takes(&taps[2], "198.51.100.3");
    a.waits_for(B);
    assert!(!a.reaches("198.51.100.3", 1), "VLAN 20 is not VLAN 10");
    let large = try_run(&format!("ip netns exec {} ping -q -c 1 -W 1 -M do -s 1400 {B}", a.name));
    assert!(!large.status.success());
    let stats = switch.settled();
    conserved(&stats);
    assert!(stats.to_string().contains("mtu_exceeded"), "{stats}");
}

#[test]
#[ignore = "needs root, namespaces, iperf3: ./check kernel"]
fn a_tap_removed_under_traffic_stops_its_port_and_is_taken_again_when_it_is_back() {
    let mut pair = Pair::with("idle = \"sleep\"", ["", ""]);
    let flood = pair.a.start(&format!("ping -q -f {B}"));
    std::thread::sleep(Duration::from_millis(300));
    pair.b.run(&format!("ip link del {}", pair.taps[1]));
    pair.switch.waits_for_state("b", "stopped", &pair.taps[1]);
    pair.switch.waits_for_state("b", "stopped", "ip tuntap add");
    // The other port is as it was.
    assert_eq!(pair.switch.json("ports")["ports"][0]["state"], "up");
    run(&format!("ip tuntap add {} mode tap", pair.taps[1]));
    pair.switch.waits_for_state("b", "up", "");
    pair.b.takes(&pair.taps[1], B);
    drop(flood);
    // The new interface has another address, which the old one's neighbours do not know.
    pair.a.run("ip neigh flush all");
    pair.a.waits_for(B);
    conserved(&pair.stats());
    assert!(pair.switch.is_running());
}

#[test]
#[ignore = "needs root, namespaces, iperf3: ./check kernel"]
fn a_reload_adds_and_removes_taps_and_touches_no_other() {
    let pair = Pair::with("idle = \"sleep\"", ["", ""]);
    let third = tap("c");
    let text = std::fs::read_to_string(pair.switch.dir().join("switch.toml")).unwrap();
    pair.switch.write(&(text.clone() + &port("c", &third, "")));
    pair.switch.reload();
    let c = Namespace::new("c");
    c.takes(&third, "198.51.100.9");
    pair.a.waits_for("198.51.100.9");
    conserved(&pair.stats());
    pair.switch.write(&text);
    pair.switch.reload();
    assert!(
        !try_run(&format!("ip netns exec {} ip link show {third}", c.name)).status.success(),
        "made for the port, gone with it"
    );
    assert!(pair.a.reaches(B, 1));
}
