//! `cableway doctor` as a user meets it: on whatever machine this is, with and without a node's file.

use std::fs;
use std::process::{Command, Output};

use serde_json::Value;

use crate::world::CABLEWAY;

fn doctor(args: &[&str]) -> Output {
    Command::new(CABLEWAY).arg("doctor").args(args).output().unwrap()
}

fn findings(output: &Output) -> Vec<Value> {
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"));
    report["findings"].as_array().unwrap().clone()
}

#[test]
fn the_exit_status_is_that_of_the_worst_finding_and_each_complaint_has_a_fix() {
    let output = doctor(&["--json"]);
    let findings = findings(&output);
    assert!(findings.len() >= 20, "{}", findings.len());
    let is = |state: &str| findings.iter().any(|f| f["state"] == state);
    let worst = if is("error") { 3 } else { i32::from(is("warning")) };
    assert_eq!(output.status.code(), Some(worst));
    for finding in &findings {
        let complains = finding["state"] == "warning" || finding["state"] == "error";
        assert_eq!(finding["fix"].is_string(), complains, "{finding}");
    }
    let shown = doctor(&[]);
    assert_eq!(shown.status.code(), Some(worst));
    let text = String::from_utf8(shown.stdout).unwrap();
    assert!(findings.iter().all(|f| text.contains(f["name"].as_str().unwrap())), "{text}");
}

#[test]
fn a_machine_without_kvm_or_vfio_is_told_so() {
    let findings = findings(&doctor(&["--json"]));
    let state = |name: &str| findings.iter().find(|f| f["name"] == name).unwrap()["state"].clone();
    assert_eq!(state("kvm") == "error", !std::path::Path::new("/dev/kvm").exists());
    let groups = fs::read_dir("/sys/kernel/iommu_groups").map_or(0, Iterator::count);
    assert_eq!(state("iommu") == "error", groups == 0);
}

#[test]
fn with_a_file_only_what_it_needs_is_checked() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("node.toml");
    fs::write(&file, "[switch]\nworkers = [0]\n[[port]]\nname = \"a\"\nkind = \"null\"\n").unwrap();
    let names = |findings: &[Value]| {
        findings.iter().map(|f| f["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let few = names(&findings(&doctor(&[file.to_str().unwrap(), "--json"])));
    assert!(few.iter().all(|name| !["kvm", "iommu", "vfio", "ksm"].contains(&name.as_str())), "{few:?}");
    fs::write(&file, "[switch]\nworkers = [0]\n[[nic]]\ndevice = \"0000:01:00.0\"\n[[vm]]\nname = \"a\"\n")
        .unwrap();
    let all = names(&findings(&doctor(&[file.to_str().unwrap(), "--json"])));
    assert!(all.iter().all(|name| !["rtprio", "preempt-rt"].contains(&name.as_str())), "{all:?}");
    fs::write(&file, "[switch]\nworkers = [0]\n[[vm]]\nname = \"a\"\nvcpu_priority = 1\n").unwrap();
    let real_time = names(&findings(&doctor(&[file.to_str().unwrap(), "--json"])));
    assert!(
        real_time.iter().any(|name| name == "rtprio") && real_time.iter().any(|name| name == "preempt-rt")
    );
    assert!(["kvm", "iommu", "vfio", "ksm"].iter().all(|name| all.iter().any(|n| n == name)), "{all:?}");

    let missing = doctor(&["/nonexistent.toml"]);
    assert_eq!(missing.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&missing.stderr).contains("there is no such file"), "{missing:?}");
}
