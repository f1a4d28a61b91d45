//! `cableway bench vv` against a switch that we did not write: testpmd between two `net_vhost` ports, which listen, or
//! connect to us. The whole measurement, with table and report; OVS-DPDK is measured by `./check peers`.

use std::fs;
use std::process::Command;

use serde_json::Value;

use crate::switch::binary;
use crate::testpmd_back_end::{back_end, sockets};

#[test]
#[ignore = "needs DPDK, huge pages and two cores: ./check testpmd"]
fn a_switch_that_listens_is_measured_and_reported() {
    let folder = tempfile::tempdir().unwrap();
    let _testpmd = back_end(folder.path(), "", 1);
    measure(folder.path(), &[]);
}

#[test]
#[ignore = "needs DPDK, huge pages and two cores: ./check testpmd"]
fn a_switch_that_connects_is_measured_and_reported() {
    let folder = tempfile::tempdir().unwrap();
    // testpmd's prompt comes when its ports are there, its connections when we listen.
    let _testpmd = back_end(folder.path(), ",client=1", 1);
    measure(folder.path(), &["--listen"]);
}

/// A short measurement of everything; the table and both files must tell the same.
fn measure(folder: &std::path::Path, more: &[&str]) {
    let report = folder.join("report");
    let mut bench = Command::new(binary());
    bench.args(["bench", "vv", "--sizes", "64,1500", "--seconds", "0.05", "--latency", "--core", "0"]);
    bench.args(more).arg("--report").arg(&report);
    for socket in sockets(folder) {
        bench.arg("--socket").arg(socket);
    }
    let ran = bench.output().unwrap();
    let (table, said) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    println!("{table}");
    assert!(ran.status.success(), "{}\n{table}{said}", ran.status);
    let told: Value = serde_json::from_slice(&fs::read(report.join("report.json")).unwrap()).unwrap();
    assert_eq!(told["ended"], Value::Null, "{table}");
    let results = told["results"].as_array().unwrap();
    assert_eq!(results.iter().map(|r| r["size"].as_u64().unwrap()).collect::<Vec<_>>(), [64, 1500]);
    for result in results {
        let closed_loop = &result["closed_loop"];
        assert_eq!((&closed_loop["lost"], &closed_loop["corrupt"]), (&0.into(), &0.into()), "{result}");
        let mpps = closed_loop["rate"]["mpps"].as_f64().unwrap();
        assert!(mpps > 0.01, "{result}");
        // Only our switch tells its cycles: "-".
        assert_eq!(closed_loop["worker_cycles"], Value::Null, "{result}");
        let row = table.lines().find(|line| line.contains(&format!("{} B", result["size"]))).unwrap();
        assert!(row.contains(&format!("{mpps:.2} Mpps")) && row.contains(" - "), "{row}");
    }
    let page = fs::read_to_string(report.join("report.html")).unwrap();
    assert!(page.contains("<svg") && page.contains("1500"));
}
