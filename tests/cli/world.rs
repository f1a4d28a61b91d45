//! What these tests are made of: a place for a switch, a switch that runs there, a VMM that connects.

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

pub(crate) const CABLEWAY: &str = env!("CARGO_BIN_EXE_cableway");

/// A core that these tests may use; the last one, as the first has most to do.
pub(crate) fn core() -> u32 {
    host::topology::permitted_cores().unwrap().iter().last().unwrap()
}

/// A directory with a configuration and an empty run directory.
pub(crate) struct Place(pub(crate) TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("run")).unwrap();
        Self(dir)
    }

    pub(crate) fn run_dir(&self) -> PathBuf {
        self.0.path().join("run")
    }

    pub(crate) fn file(&self) -> PathBuf {
        self.0.path().join("switch.toml")
    }

    /// Writes the configuration: `[switch]` on two lines, then `rest` from line 4 on.
    pub(crate) fn write(&self, rest: &str) {
        let text = format!("[switch]\nworkers = [{}]\nidle = \"sleep\"\n{rest}", core());
        fs::write(self.file(), text).unwrap();
    }

    pub(crate) fn socket(&self, name: &str) -> PathBuf {
        self.run_dir().join(format!("{name}.sock"))
    }

    /// What is in the run directory.
    pub(crate) fn left_behind(&self) -> Vec<String> {
        let names = fs::read_dir(self.run_dir()).unwrap().map(|entry| entry.unwrap().file_name());
        names.map(|name| name.into_string().unwrap()).collect()
    }

    /// `cableway switch ARGS --run-dir …`, to its end.
    pub(crate) fn ask(&self, args: &[&str]) -> Output {
        Command::new(CABLEWAY).arg("switch").args(args).arg("--run-dir").arg(self.run_dir()).output().unwrap()
    }

    /// The JSON that `cableway switch ARGS --json` prints.
    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let output = self.ask(&[args, &["--json"]].concat());
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// The state of a port.
    pub(crate) fn state(&self, port: &str) -> String {
        let ports = self.json(&["ports"]);
        let found = ports["ports"].as_array().unwrap().iter().find(|found| found["name"] == port);
        found.unwrap()["state"].as_str().unwrap().to_owned()
    }
}

/// Keys of a port that listens on its own name.
pub(crate) fn port(name: &str) -> String {
    format!("[[port]]\nname = \"{name}\"\nkind = \"vhost-user\"\nsocket = \"{name}.sock\"\n")
}

/// A running switch; killed when dropped.
pub(crate) struct Running {
    pub(crate) process: Child,
    pub(crate) log: PathBuf,
}

impl Running {
    pub(crate) fn start(place: &Place) -> Self {
        Self::start_file(place, &place.file())
    }

    /// Starts the switch of `file` and waits until it says that it is ready.
    pub(crate) fn start_file(place: &Place, file: &Path) -> Self {
        let mut command = Command::new(CABLEWAY);
        Self::start_command(place, command.arg("switch").arg(file).arg("--run-dir").arg(place.run_dir()))
    }

    /// Starts a switch by a command of the test's own.
    pub(crate) fn start_command(place: &Place, command: &mut Command) -> Self {
        let log = place.0.path().join("log");
        let out = fs::File::create(&log).unwrap();
        let process = command.stderr(out).stdin(Stdio::null()).spawn().unwrap();
        let mut running = Self { process, log };
        running.wait_for_log("ready in");
        running
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    pub(crate) fn wait_for_log(&mut self, text: &str) {
        let end = Instant::now() + Duration::from_secs(60);
        while !self.log().contains(text) {
            assert!(self.process.try_wait().unwrap().is_none(), "ended: {}", self.log());
            assert!(Instant::now() < end, "{text:?} is not in {}", self.log());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(self.process.id().try_into().unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    /// Waits for its end; how long it took, and its exit status.
    pub(crate) fn end(&mut self) -> (Duration, Option<i32>) {
        let start = Instant::now();
        let status = self.process.wait().unwrap();
        (start.elapsed(), status.code())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A connection to a port, as a VMM makes it.
pub(crate) fn connect(place: &Place, port: &str) -> UnixStream {
    let stream = UnixStream::connect(place.socket(port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream
}

pub(crate) fn is_closed(mut stream: &UnixStream) -> bool {
    stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    matches!(stream.read(&mut [0]), Ok(0))
}

/// A limit of time that is promised: one of several tries keeps it. A machine that does much else stands still in the others.
#[track_caller]
pub(crate) fn keeps_within(limit: Duration, mut act: impl FnMut() -> Duration) {
    let mut all = Vec::new();
    while all.len() < 10 {
        let took = act();
        if took < limit {
            return;
        }
        all.push(took);
    }
    panic!("never within {limit:?}: {all:?}");
}

/// Within a minute: a machine that does much else is slow.
pub(crate) fn eventually(what: &str, mut happens: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !happens() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
