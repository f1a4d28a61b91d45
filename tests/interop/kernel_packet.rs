//! Packet sockets: the switch on the near ends of two veth pairs, whose far ends are in namespaces of their own.

use std::time::Duration;

use super::cables::{B, Cable, Pair};
use super::namespaces::run;
use super::switch::{conserved, sum};

#[test]
#[ignore = "needs root, namespaces, iperf3: ./check kernel"]
fn tcp_crosses_two_packet_sockets_in_large_frames_both_ways() {
    for idle in ["poll", "sleep"] {
        let pair = Pair::with(&format!("idle = \"{idle}\""), "af_packet", "", Cable::Plain);
        let (there, back) = (pair.tcp(""), pair.tcp("--reverse"));
        println!("idle = {idle}: {:.2} Gbit/s there, {:.2} Gbit/s back", there / 1e9, back / 1e9);
        let stats = pair.switch.settled();
        conserved(&stats);
        assert_eq!(sum(&stats, "b", "tx", "segments"), 0, "nothing is cut for the kernel");
        let average = sum(&stats, "a", "rx", "bytes") / sum(&stats, "a", "rx", "received");
        assert!(average > 1_600, "{average} bytes a frame: no segmentation is left undone");
        let errors = pair.b.run("nstat -asz TcpInCsumErrors");
        assert!(
            errors.lines().any(|l| l.split_whitespace().take(2).eq(["TcpInCsumErrors", "0"])),
            "{errors}"
        );
    }
}

#[test]
#[ignore = "needs root, namespaces, iperf3: ./check kernel"]
fn an_interface_that_goes_down_or_away_stops_its_port_until_it_is_back() {
    let mut pair = Pair::with("idle = \"sleep\"", "af_packet", "", Cable::Plain);
    let flood = pair.a.start(&format!("ping -q -f {B}"));
    std::thread::sleep(Duration::from_millis(200));
    run(&format!("ip link set {} down", pair.ends[1]));
    pair.switch.waits_for_state("b", "stopped", &format!("ip link set {} up", pair.ends[1]));
    run(&format!("ip link set {} up", pair.ends[1]));
    pair.switch.waits_for_state("b", "up", "");
    pair.a.waits_for(B);
    run(&format!("ip link del {}", pair.ends[1]));
    pair.switch.waits_for_state("b", "stopped", "there is no interface");
    assert_eq!(pair.switch.json("ports")["ports"][0]["state"], "up");
    assert_eq!(Cable::Plain.lay("b", &pair.b, B), pair.ends[1]);
    pair.switch.waits_for_state("b", "up", "");
    drop(flood);
    pair.a.run("ip neigh flush all");
    pair.a.waits_for(B);
    conserved(&pair.switch.settled());
    assert!(pair.switch.is_running());
}
