//! A Linux guest of QEMU with its network card on one of our sockets, and a shell in it that the test drives.
//!
//! Owns the QEMU process, the guest's serial lines and QEMU's monitor (QMP). The guest is what `lab/image` built: Debian's
//! cloud kernel and a busybox; under software emulation it boots in about 2 s. Never configures the guest by itself: a test
//! says every address.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::switch::tail;

/// Ends each answer of the guest's shell, before the exit status (see lab/guest/init).
const END_OF_ANSWER: u8 = 0o36;

/// How long a guest may take to boot while the machine is busy with others.
const BOOT: Duration = Duration::from_secs(60);

/// A guest.
pub(crate) struct Guest {
    name: String,
    qemu: Child,
    shell: UnixStream,
    monitor: BufReader<UnixStream>,
    console: PathBuf,
}

/// How a guest is started.
pub(crate) struct GuestOptions<'a> {
    /// Names its files in the run directory.
    pub(crate) name: &'a str,
    /// The switch's socket for its network card.
    pub(crate) socket: &'a Path,
    /// The network card's address, the last byte.
    pub(crate) mac: u8,
    /// More properties of `virtio-net-pci`, such as `packed=on`.
    pub(crate) card: &'a str,
    /// Where to wait for a guest that migrates here, instead of booting one.
    pub(crate) incoming: Option<&'a Path>,
}

impl Guest {
    /// Boots a guest and waits for its shell.
    pub(crate) fn boot(dir: &Path, options: &GuestOptions<'_>) -> Self {
        let mut guest = Self::start(dir, options);
        let (_, status) = guest.answer(BOOT);
        assert_eq!(status, "0", "{} did not boot", guest.name);
        guest
    }

    /// Starts QEMU; with `incoming` its guest arrives later.
    pub(crate) fn start(dir: &Path, options: &GuestOptions<'_>) -> Self {
        let image = Path::new(env!("CARGO_MANIFEST_DIR")).join("lab/cache");
        assert!(image.join("vmlinux").exists(), "no guest image: run lab/image (or ./check qemu)");
        let file = |what: &str| dir.join(format!("{}.{what}", options.name));
        // QEMU connects to us, so nothing that the guest says early is lost.
        let shell = UnixListener::bind(file("shell")).unwrap();
        let monitor = UnixListener::bind(file("qmp")).unwrap();
        let path = |what: &str| file(what).display().to_string();
        let console = file("console");
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-cpu",
            "max",
            "-smp",
            "1",
        ]);
        qemu.args(["-M", "q35,memory-backend=mem", "-accel", "tcg", "-m", "192M"]);
        qemu.args(["-object", "memory-backend-memfd,id=mem,size=192M,share=on"]);
        qemu.arg("-kernel").arg(image.join("vmlinux")).arg("-initrd").arg(image.join("initrd.cpio"));
        qemu.args(["-append", "console=ttyS0 quiet panic=-1"]);
        qemu.arg("-serial").arg(format!("file:{}", console.display()));
        qemu.arg("-chardev")
            .arg(format!("socket,id=shell,path={}", path("shell")))
            .args(["-serial", "chardev:shell"]);
        qemu.arg("-chardev")
            .arg(format!("socket,id=qmp,path={}", path("qmp")))
            .args(["-mon", "chardev=qmp,mode=control"]);
        qemu.arg("-chardev")
            .arg(format!("socket,id=port,path={},reconnect-ms=200", options.socket.display()));
        qemu.args(["-netdev", "vhost-user,id=net,chardev=port"]);
        let comma = if options.card.is_empty() { "" } else { "," };
        let card = format!(
            "virtio-net-pci,netdev=net,mac=52:54:00:00:00:{:02x}{comma}{}",
            options.mac, options.card
        );
        qemu.args(["-device", &card]);
        if let Some(socket) = options.incoming {
            qemu.arg("-incoming").arg(format!("unix:{}", socket.display()));
        }
        let log = std::fs::File::create(file("qemu")).unwrap();
        let mut qemu = qemu
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("QEMU starts");
        let mut accept = |listener: &UnixListener| accept(listener, &mut qemu, &file("qemu"));
        let shell = accept(&shell);
        let monitor = BufReader::new(accept(&monitor));
        let mut guest = Self { name: options.name.to_owned(), qemu, shell, monitor, console };
        guest.read_message(); // QMP's greeting
        guest.qmp("qmp_capabilities", json!({}));
        guest
    }

    /// Runs a shell command in the guest and returns what it printed; anything but status 0 fails the test.
    pub(crate) fn run(&mut self, command: &str) -> String {
        let (output, status) = self.attempt(command, Duration::from_secs(60));
        assert_eq!(status, 0, "{}: {command}: status {status}\n{output}", self.name);
        output
    }

    /// Runs a shell command in the guest: what it printed, and its exit status.
    pub(crate) fn attempt(&mut self, command: &str, patience: Duration) -> (String, i32) {
        assert!(!command.contains('\n'), "one line, or the guest's shell answers twice: {command}");
        // More line ends than the serial port loses at once, or the guest would wait for the end of this line.
        let line = format!("{} {command}{}", command.len(), "\n".repeat(16));
        for _ in 0..5 {
            self.shell.write_all(line.as_bytes()).unwrap();
            let (output, status) = self.answer(patience);
            match status.parse() {
                Ok(status) => return (output, status),
                Err(_) => assert_eq!(status, "again", "{}: {command}", self.name),
            }
        }
        panic!("{}: the serial port loses bytes each time: {command}", self.name);
    }

    /// Repeats a command until it succeeds.
    pub(crate) fn eventually(&mut self, command: &str, patience: Duration) -> String {
        let end = Instant::now() + patience;
        loop {
            let (output, status) = self.attempt(command, patience);
            if status == 0 {
                return output;
            }
            assert!(Instant::now() < end, "{}: {command}: still status {status}\n{output}", self.name);
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Executes a QMP command and returns its answer; events that come before it are skipped.
    pub(crate) fn qmp(&mut self, command: &str, arguments: Value) -> Value {
        let line = json!({ "execute": command, "arguments": arguments }).to_string();
        self.monitor.get_mut().write_all(line.as_bytes()).unwrap();
        loop {
            let mut message = self.read_message();
            if let Some(answer) = message.get_mut("return") {
                return answer.take();
            }
            assert!(message.get("error").is_none(), "{}: {command}: {message}", self.name);
        }
    }

    /// Ends QEMU; its guest has left by migration.
    pub(crate) fn ends(mut self) {
        self.qmp("quit", json!({}));
        self.qemu.wait().unwrap();
    }

    fn read_message(&mut self) -> Value {
        let mut line = String::new();
        self.monitor.read_line(&mut line).expect("QMP answers");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{}: QMP: {error}: {line:?}", self.name))
    }

    /// Reads up to the end of an answer: the text, and the exit status or `again`.
    fn answer(&mut self, patience: Duration) -> (String, String) {
        let end = Instant::now() + patience;
        let mut answer = Vec::new();
        loop {
            let left = end.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            self.shell.set_read_timeout(Some(left)).unwrap();
            let mut buffer = [0; 4096];
            match self.shell.read(&mut buffer) {
                Ok(length @ 1..) => answer.extend_from_slice(&buffer[..length]),
                other => {
                    panic!("{}: no answer within {patience:?} ({other:?}): {}", self.name, text(&answer))
                }
            }
            if let Some(at) = answer.iter().position(|byte| *byte == END_OF_ANSWER)
                && answer.ends_with(b"\n")
            {
                return (text(&answer[..at]), text(&answer[at + 1..]).trim().to_owned());
            }
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        if std::thread::panicking() {
            let console = std::fs::read(&self.console).unwrap_or_default();
            eprintln!("--- console of {}:\n{}", self.name, tail(&text(&console), 30));
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn accept(listener: &UnixListener, qemu: &mut Child, log: &Path) -> UnixStream {
    listener.set_nonblocking(true).unwrap();
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        if let Ok((stream, _)) = listener.accept() {
            stream.set_nonblocking(false).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            return stream;
        }
        let ended = qemu.try_wait().unwrap().is_some();
        let log = || std::fs::read_to_string(log).unwrap_or_default();
        assert!(!ended && Instant::now() < end, "QEMU does not start:\n{}", log());
        std::thread::sleep(Duration::from_millis(20));
    }
}
