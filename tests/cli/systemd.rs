//! What is shipped for systemd, and what is logged to its journal.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::world::{CABLEWAY, Place, core, port};

#[test]
fn systemd_understands_the_units_that_are_shipped_and_the_docs_show_them() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let docs = fs::read_to_string(root.join("docs/node.md")).unwrap();
    // It looks for the program, which is somewhere else here.
    let dir = tempfile::tempdir().unwrap();
    let units = ["cableway.service", "cableway.socket"].map(|name| {
        let unit = fs::read_to_string(root.join("packaging/systemd").join(name)).unwrap();
        assert!(docs.contains(&format!("packaging/systemd/{name}")), "{name}");
        let path = dir.path().join(name);
        fs::write(&path, unit.replace("/usr/local/bin/cableway", CABLEWAY)).unwrap();
        path
    });
    let Ok(found) = Command::new("systemd-analyze").arg("--version").output() else {
        println!("SKIPPED no systemd-analyze: apt-get install systemd");
        return;
    };
    assert!(found.status.success());
    let verified = Command::new("systemd-analyze").arg("verify").args(&units).output().unwrap();
    let said = String::from_utf8_lossy(&verified.stderr).into_owned();
    let about_it: Vec<&str> = said.lines().filter(|line| line.contains("cableway")).collect();
    assert!(verified.status.success() && about_it.is_empty(), "{said}");
}

/// A place for a node whose control socket somebody else made.
struct Handed {
    place: Place,
    listener: UnixListener,
}

impl Handed {
    fn new(socket: &str) -> Self {
        let place = Place::new();
        place.write(&port("a"));
        let listener = UnixListener::bind(place.socket(socket)).unwrap();
        Self { place, listener }
    }

    /// `cableway up`, with the socket and its environment as systemd hands them over; its standard error goes to the file `log`.
    fn up(&self) -> Child {
        let script = "exec 3<&0 0</dev/null; export LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=cableway.socket; exec \"$@\"";
        let log = fs::File::create(self.place.0.path().join("log")).unwrap();
        Command::new("sh")
            .args(["-c", script, "sh", CABLEWAY, "up"])
            .args([self.place.file().as_os_str(), "--run-dir".as_ref(), self.place.run_dir().as_os_str()])
            .stdin(OwnedFd::from(self.listener.try_clone().unwrap()))
            .stderr(log)
            .spawn()
            .unwrap()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.place.0.path().join("log")).unwrap()
    }

    /// `cableway status --json`, `down`.
    fn ask(&self, command: &[&str]) -> Output {
        let run_dir = self.place.run_dir();
        Command::new(CABLEWAY).args(command).arg("--run-dir").arg(run_dir).output().unwrap()
    }
}

impl Drop for Handed {
    fn drop(&mut self) {
        self.ask(&["down"]);
    }
}

#[test]
fn a_question_waits_at_a_socket_of_systemd_which_outlives_the_node() {
    let handed = Handed::new("node");
    // Nobody accepts yet.
    let mut question = UnixStream::connect(handed.place.socket("node")).unwrap();
    question.write_all(b"GET /v1/node HTTP/1.1\r\nhost: node\r\nconnection: close\r\n\r\n").unwrap();
    let mut supervisor = handed.up();
    let mut answer = String::new();
    question.read_to_string(&mut answer).unwrap();
    assert!(answer.contains(&format!("\"supervisor\":{}", supervisor.id())), "{answer}\n{}", handed.log());
    let end = Instant::now() + Duration::from_secs(60);
    while !handed.ask(&["status", "--json"]).status.success() {
        assert!(Instant::now() < end, "{}", handed.log());
        std::thread::sleep(Duration::from_millis(20));
    }
    // What was the supervisor's is nobody else's.
    let switch: Value = serde_json::from_slice(&handed.ask(&["status", "--json"]).stdout).unwrap();
    let switch = &switch["children"][0]["pid"];
    let environment = fs::read(format!("/proc/{switch}/environ")).unwrap();
    assert!(!String::from_utf8_lossy(&environment).contains("LISTEN_"), "{environment:?}");
    let theirs = fs::metadata(handed.place.socket("node")).unwrap().ino();

    let down = handed.ask(&["down"]);
    assert!(down.status.success(), "{down:?}");
    assert!(supervisor.wait().unwrap().success(), "{}", handed.log());
    assert_eq!(fs::metadata(handed.place.socket("node")).unwrap().ino(), theirs);
}

#[test]
fn a_socket_elsewhere_is_refused_and_so_are_questions_to_a_node_that_is_refused() {
    let handed = Handed::new("other");
    assert_eq!(handed.up().wait().unwrap().code(), Some(2));
    let said = handed.log();
    assert!(said.contains("other.sock: ListenStream=") && said.contains("node.sock in its unit"), "{said}");

    let handed = Handed::new("node");
    handed.place.write("[[port]]\n");
    let mut waiting = UnixStream::connect(handed.place.socket("node")).unwrap();
    assert_eq!(handed.up().wait().unwrap().code(), Some(2));
    // systemd would start it again for whoever waits.
    assert_eq!(waiting.read(&mut [0]).unwrap(), 0);
    handed.listener.set_nonblocking(true).unwrap();
    assert!(handed.listener.accept().is_err());
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
