//! What is shipped for systemd, and what is logged to its journal.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::world::{CABLEWAY, core, port};

#[test]
fn systemd_understands_the_unit_that_is_shipped_and_the_docs_show_it() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let unit = fs::read_to_string(root.join("packaging/systemd/cableway.service")).unwrap();
    let docs = fs::read_to_string(root.join("docs/node.md")).unwrap();
    assert!(docs.contains("packaging/systemd/cableway.service"));
    let Ok(found) = Command::new("systemd-analyze").arg("--version").output() else {
        println!("SKIPPED no systemd-analyze: apt-get install systemd");
        return;
    };
    assert!(found.status.success());
    // It looks for the program, which is somewhere else here.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cableway.service");
    fs::write(&path, unit.replace("/usr/local/bin/cableway", CABLEWAY)).unwrap();
    let verified = Command::new("systemd-analyze").arg("verify").arg(&path).output().unwrap();
    let said = String::from_utf8_lossy(&verified.stderr).into_owned();
    let about_it: Vec<&str> = said.lines().filter(|line| line.contains("cableway")).collect();
    assert!(verified.status.success() && about_it.is_empty(), "{said}");
}

#[test]
fn lines_for_the_journal_carry_their_priority_and_those_for_others_do_not() {
    for journal in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("switch.toml");
        fs::write(&file, format!("[switch]\nworkers = [{}]\nidle = \"sleep\"\n{}", core(), port("a")))
            .unwrap();
        let log = fs::File::create(dir.path().join("log")).unwrap();
        let found = log.metadata().unwrap();
        // Of another stream: whoever started it has redirected it.
        let inode = if journal { found.ino() } else { found.ino() + 1 };
        let mut switch = Command::new(CABLEWAY)
            .args(["switch".as_ref(), file.as_os_str(), "--run-dir".as_ref(), dir.path().as_os_str()])
            .env("JOURNAL_STREAM", format!("{}:{inode}", found.dev()))
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let text = || fs::read_to_string(dir.path().join("log")).unwrap();
        let end = Instant::now() + Duration::from_secs(60);
        while !text().contains("ready in") {
            assert!(Instant::now() < end, "{}", text());
            std::thread::sleep(Duration::from_millis(10));
        }
        kill(Pid::from_raw(switch.id() as i32), Signal::SIGTERM).unwrap();
        assert!(switch.wait().unwrap().success());
        let said = text();
        assert!(said.lines().all(|line| line.starts_with("<6>") == journal), "{said}");
    }
}
