//! A control socket whose client writes any bytes: usually a request with a path that there is and any query and body, now and
//! then anything.
//!
//! Asserts that an answer is one of HTTP and never "internal server error", and that the next client is answered.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::Input;
use crate::config::Config;
use crate::control::router;
use crate::life::Life;

const METHODS: &[&str] = &["GET", "POST", "DELETE", "PUT", "HEAD", "OPTIONS", "get", ""];
const PATHS: &[&str] = &[
    "/v1/vm",
    "/v1/events",
    "/v1/pause",
    "/v1/resume",
    "/v1/reboot",
    "/v1/shutdown",
    "/v1/kill",
    "/v1/console",
    "/v1/openapi.json",
    "/v1/",
    "/",
    "*",
    "http://vm/v1/vm",
    "/v1/vm/../../etc",
];
const KEYS: &[&str] = &["after", "port", "from", "timeout", "wait=0&after", "%70ort", "", "x"];
const VALUES: &[&str] =
    &["0", "1", "18446744073709551615", "-1", "serial", "virtio", "%ff", "99999999999999999999", ""];

/// A request that is answered, and ends the connection.
const GOOD: &[u8] = b"GET /v1/vm HTTP/1.1\r\nhost: cableway\r\nconnection: close\r\n\r\n";
/// How long to wait for an answer to what may be none, and to a request.
const QUIET: Duration = Duration::from_millis(30);
const PATIENCE: Duration = Duration::from_secs(60);

/// As every program of Rust's does before `main`, which a fuzz target has not: a server that hangs up is no reason to end.
fn ignore_broken_pipes() {
    use nix::sys::signal::{SigHandler, Signal, signal};
    // SAFETY: no handler is installed.
    let _ = unsafe { signal(Signal::SIGPIPE, SigHandler::SigIgn) };
}

/// What one client writes.
pub fn requests(bytes: &[u8]) {
    ignore_broken_pipes();
    let config =
        Config::parse("[vm]\nkernel = 'k'\nconsole = 'file:/dev/null'", Path::new("vm.toml")).unwrap();
    let life = Life::new(&config).unwrap();
    let mut input = Input(bytes);
    let mut written = Vec::new();
    while !input.is_empty() {
        match input.byte() {
            240.. => written.extend(input.bytes(64)),
            _ => request(&mut written, &mut input),
        }
    }
    // A client that is understood until here is answered once more, and let go.
    written.extend(GOOD);
    let answer = ask(&life, &written, QUIET);
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1."), "{}", String::from_utf8_lossy(&answer));
    let wrong = answer.windows(12).any(|line| line == b"HTTP/1.1 500");
    assert!(!wrong, "{}", String::from_utf8_lossy(&answer));
    let good = ask(&life, GOOD, PATIENCE);
    assert!(good.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(&good));
}

fn request(written: &mut Vec<u8>, input: &mut Input<'_>) {
    let mut choose =
        |from: &[&'static str]| from.get(usize::from(input.byte()) % from.len()).copied().unwrap_or("");
    let (method, path) = (choose(METHODS), choose(PATHS));
    let query: Vec<_> = (0..2).map(|_| format!("{}={}", choose(KEYS), choose(VALUES))).collect();
    let form = input.byte();
    // Bodies are short, or longer than is read.
    let length = match input.byte() {
        255 => 5_000,
        byte => usize::from(byte % 16),
    };
    let body = input.bytes(length);
    let query = match form % 4 {
        0 => String::new(),
        1 => format!("?{}", query.join("&")),
        _ => format!("?{}", query.first().map_or("", String::as_str)),
    };
    let length = match form / 4 % 8 {
        0 => "content-length: 99999999999\r\n".to_owned(),
        1 => "transfer-encoding: chunked\r\n".to_owned(),
        2 => "content-length: 3\r\nexpect: 100-continue\r\n".to_owned(),
        3 => String::new(),
        _ => format!("content-length: {}\r\n", body.len()),
    };
    written.extend(format!("{method} {path}{query} HTTP/1.1\r\nhost: cableway\r\n{length}\r\n").bytes());
    written.extend(body);
}

/// What is answered to a client that writes this, until nothing comes for some time.
fn ask(life: &Arc<Life>, written: &[u8], quiet: Duration) -> Vec<u8> {
    let (mut client, server) = UnixStream::pair().unwrap();
    server.set_nonblocking(true).unwrap();
    client.set_read_timeout(Some(quiet)).unwrap();
    let mut writer = client.try_clone().unwrap();
    std::thread::scope(|scope| {
        let answer = scope.spawn(move || {
            let mut answer = Vec::new();
            // A connection that is reset has said what it had to say.
            let _ = client.read_to_end(&mut answer);
            let _ = client.shutdown(Shutdown::Both);
            answer
        });
        scope.spawn(move || writer.write_all(written));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let server = tokio::net::UnixStream::from_std(server).unwrap();
            control::converse(server, router(life.clone())).await;
        });
        answer.join().unwrap()
    })
}
