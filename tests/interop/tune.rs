//! `cableway tune` on this machine's own kernel: everything is as it was afterwards, knob by knob.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::switch::binary;

/// The last core is isolated, so that a machine of two has one left.
fn core() -> String {
    host::topology::online_cores(Path::new("/")).unwrap().iter().last().unwrap().to_string()
}

/// A folder for what was there before; gives everything back when dropped, whatever became of the test.
struct Tuning(tempfile::TempDir);

impl Tuning {
    fn command(&self, what: &str) -> Command {
        let mut command = Command::new(binary());
        command.args(["tune", what, "--json"]);
        if what != "restore" {
            command.args(["--profile", "realtime", "--isolate", &core()]);
        }
        if what != "check" {
            command.arg("--state-dir").arg(self.0.path());
        }
        command
    }

    fn run(&self, what: &str) -> Output {
        self.command(what).output().unwrap()
    }

    fn saved(&self) -> PathBuf {
        self.0.path().join("tune.json")
    }
}

impl Drop for Tuning {
    fn drop(&mut self) {
        let _ = self.run("restore");
    }
}

fn lines(output: &Output) -> Vec<Value> {
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"));
    report["knobs"].as_array().unwrap().clone()
}

/// Every file of the profile and all that it holds, and each kernel thread's setting; some of these come and go by themselves.
fn everything(tuning: &Tuning) -> BTreeMap<String, String> {
    let found = lines(&tuning.run("check")).into_iter().filter_map(|line| {
        let file = line["file"].as_str()?.to_owned();
        if line["thread"].is_string() {
            return Some((format!("{file} {}", line["knob"]), line["now"].as_str()?.to_owned()));
        }
        let text = fs::read_to_string(&file).ok()?;
        Some((file, text))
    });
    found.collect()
}

fn assert_same(before: &BTreeMap<String, String>, after: &BTreeMap<String, String>, when: &str) {
    for (place, held) in before {
        match after.get(place) {
            Some(holds) => assert_eq!(holds, held, "{place} {when}"),
            None => assert!(place.starts_with("/proc/") && place.contains(' '), "{place} is gone {when}"),
        }
    }
}

#[test]
#[ignore = "needs root: ./check tune"]
fn apply_and_restore_leave_every_knob_as_it_was() {
    let tuning = Tuning(tempfile::tempdir().unwrap());
    let before = everything(&tuning);
    assert!(before.len() >= 8, "{before:?}");
    assert!(before.keys().any(|place| place.ends_with("\"kernel-threads\"")), "{before:?}");
    let applied = tuning.run("apply");
    assert!(applied.status.success(), "{applied:?}");
    let effects = lines(&applied);
    let changed = effects.iter().filter(|line| line["effect"] == "set").count();
    println!("{changed} of {} knobs were set", effects.len());
    assert!(changed > 0, "{effects:?}");
    assert_ne!(everything(&tuning), before);
    // Applying again changes nothing more.
    let again = lines(&tuning.run("apply"));
    assert!(again.iter().all(|line| line["effect"] != "set"), "{again:?}");
    let restored = tuning.run("restore");
    assert!(restored.status.success(), "{restored:?}");
    assert_same(&before, &everything(&tuning), "after it was given back");
    assert!(!tuning.saved().exists());
}

#[test]
#[ignore = "needs root: ./check tune"]
fn what_was_killed_on_the_way_is_given_back_as_well() {
    for delay_us in [0, 200, 500, 1_000, 2_000, 5_000] {
        let tuning = Tuning(tempfile::tempdir().unwrap());
        let before = everything(&tuning);
        let mut apply = tuning.command("apply").stdout(std::process::Stdio::null()).spawn().unwrap();
        let patience = Instant::now() + Duration::from_secs(60);
        // It may also be through with everything before we look.
        while !tuning.saved().exists() && apply.try_wait().unwrap().is_none() {
            assert!(Instant::now() < patience);
        }
        assert!(tuning.saved().exists());
        std::thread::sleep(Duration::from_micros(delay_us));
        apply.kill().unwrap();
        apply.wait().unwrap();
        let restored = tuning.run("restore");
        assert!(restored.status.success(), "{restored:?}");
        assert_same(&before, &everything(&tuning), &format!("killed after {delay_us} µs"));
    }
}

#[test]
#[ignore = "needs root: ./check tune"]
fn isolating_every_core_and_unknown_profiles_are_refused_and_nothing_is_changed() {
    let tuning = Tuning(tempfile::tempdir().unwrap());
    let before = everything(&tuning);
    let all = host::topology::online_cores(Path::new("/")).unwrap().to_string();
    for (arguments, message) in [
        (["--isolate", &all, "--profile", "nfv"], "leave at least one"),
        (["--isolate", "4000", "--profile", "nfv"], "core 4000 does not exist"),
        (["--isolate", &core(), "--profile", "fast"], "there is no profile `fast`"),
    ] {
        let state = tuning.0.path();
        let output = Command::new(binary())
            .args(["tune", "apply"])
            .args(arguments)
            .arg("--state-dir")
            .arg(state)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(message), "{said}");
    }
    assert_same(&before, &everything(&tuning), "although it was refused");
    assert!(!tuning.saved().exists());
}
