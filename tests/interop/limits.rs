//! What is promised of the program that users run, and holds for the release build only: how soon it listens, how soon it
//! ends, how much memory it takes, and that its own account of a worker's time is the kernel's.
//!
//! Each limit is the promise itself. A machine that does something else at the moment may exceed one: the best of some
//! attempts counts, for a program that is too slow is so every time.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, SysconfVar, sysconf};
use pmd::virtio_user::{Buffer, Options, VirtioUser};
use serde_json::Value;

use crate::switch::{Switch, binary};

/// From the start of the process until both sockets answer.
const LISTENING: Duration = Duration::from_millis(100);

/// From SIGTERM to the end of the process.
const ENDED: Duration = Duration::from_secs(1);

/// Resident memory of a switch with two ports, without that of its guests.
const RESIDENT_KIB: u64 = 64 * 1024;

/// The worker's own account of its busy time as a share of the kernel's: they differ by what it polls before it falls
/// asleep, and by interrupts.
const ACCOUNTS_AGREE: std::ops::RangeInclusive<f64> = 0.85..=1.15;

/// Most time that the worker may wait for its core, as a share of the time that it had it, for the two to be comparable.
const UNDISTURBED: f64 = 0.1;

const ATTEMPTS: usize = 5;

#[test]
#[ignore = "needs the release build and two cores: ./check limits"]
fn both_sockets_listen_within_100_ms() {
    let fastest = (0..ATTEMPTS).map(|_| time_to_listen()).min().unwrap();
    println!("both sockets listen after {fastest:?}");
    assert!(fastest < LISTENING, "{fastest:?}");
}

#[test]
#[ignore = "needs the release build and two cores: ./check limits"]
fn a_switch_under_load_ends_within_a_second_of_sigterm_and_leaves_no_socket() {
    let fastest = (0..ATTEMPTS).map(|_| time_to_end()).min().unwrap();
    println!("it ended after {fastest:?}");
    assert!(fastest < ENDED, "{fastest:?}");
}

/// Ends a switch that carries frames.
fn time_to_end() -> Duration {
    let mut switch = Switch::of_file("vv.toml", 2);
    let mut load = load(&switch, "30");
    std::thread::sleep(Duration::from_millis(700));
    let asked = Instant::now();
    kill(Pid::from_raw(switch.pid().cast_signed()), Signal::SIGTERM).unwrap();
    let status = switch.wait();
    let took = asked.elapsed();
    let _ = load.kill();
    let _ = load.wait();
    assert!(status.success(), "{status}");
    let left: Vec<_> = fs::read_dir(switch.dir()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["switch.log"]);
    took
}

#[test]
#[ignore = "needs the release build and two cores: ./check limits"]
fn a_switch_of_two_ports_takes_less_than_64_mib_beside_its_guests_memory() {
    let switch = Switch::of_file("vv.toml", 2);
    let alone = resident(switch.pid(), &["VmRSS:"]);
    let mut load = load(&switch, "1");
    let mut loaded = 0;
    while load.try_wait().unwrap().is_none() {
        // Guests' memory is shared: memory files (RssShmem), or huge pages, which no line counts.
        loaded = loaded.max(resident(switch.pid(), &["RssAnon:", "RssFile:"]));
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(load.wait().unwrap().success(), "the load lost frames");
    println!("resident: {alone} KiB without guests, {loaded} KiB under load");
    assert!(alone < RESIDENT_KIB && loaded < RESIDENT_KIB, "{alone} KiB, {loaded} KiB");
}

/// A worker that sleeps between bouts of large frames, in which the copy sets the pace: then everything that the kernel
/// accounts to its thread is work, and must be what the switch says that it was. While another program has the core, the
/// time-stamp counter goes on: of a worker that often waits for its core, the busy time is between both sums.
#[test]
#[ignore = "needs the release build and two cores: ./check limits"]
fn a_sleeping_worker_costs_in_the_kernels_account_what_its_busy_cycles_say() {
    let mut seen = Vec::new();
    for _ in 0..ATTEMPTS {
        let (share, waited) = busy_share();
        if waited <= UNDISTURBED && ACCOUNTS_AGREE.contains(&share) {
            return;
        }
        seen.push((share, waited));
    }
    let (least, most) = (ACCOUNTS_AGREE.start(), ACCOUNTS_AGREE.end());
    let between = |(share, waited): &(f64, f64)| share >= least && *share <= most * (1.0 + waited);
    let disturbed = seen.iter().any(|attempt| attempt.1 > UNDISTURBED && between(attempt));
    assert!(
        disturbed,
        "(busy cycles, waiting for the core) are these shares of the kernel's account: {seen:?}"
    );
}

/// Lets a worker work and sleep for a second. Its busy time, and the time that it waited for its core while another program
/// had it, as shares of the time that the kernel accounts to it.
fn busy_share() -> (f64, f64) {
    let switch = Switch::bridge("idle = \"sleep\"", 2, "");
    let options = Options { buffer_size: 9216, ..Options::default() };
    let mut ends = [0, 1].map(|port| VirtioUser::open(&switch.socket(port), options.clone()).unwrap());
    let thread = worker_thread(switch.pid());
    bout(&mut ends, Duration::from_millis(50));
    let (before, worked, waited) = (Account::read(&switch), on_cpu(&thread), waiting(&thread));
    let begin = Instant::now();
    for _ in 0..20 {
        bout(&mut ends, Duration::from_millis(20));
        std::thread::sleep(Duration::from_millis(30));
    }
    let wall = begin.elapsed().as_secs_f64();
    let after = Account::read(&switch);
    let (kernel, waited) = (on_cpu(&thread) - worked, waiting(&thread) - waited);
    let (frames, busy) = (after.frames - before.frames, after.busy - before.busy);
    println!(
        "{frames} frames in {wall:.3} s: {busy:.3} s of busy cycles, {kernel:.3} s on a core, {waited:.3} s waiting for it"
    );
    assert!(frames > 10_000, "{frames}");
    assert!(kernel < 0.7 * wall, "the worker does not sleep: {kernel} s of {wall} s");
    (busy / kernel, waited / kernel)
}

/// Starts the smallest useful switch and connects as soon as it answers.
fn time_to_listen() -> Duration {
    let dir = tempfile::tempdir().unwrap();
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/vv.toml");
    let start = Instant::now();
    let mut process = Command::new(binary())
        .arg("switch")
        .arg(config)
        .arg("--run-dir")
        .arg(dir.path())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    for name in ["v0.sock", "v1.sock"] {
        while UnixStream::connect(dir.path().join(name)).is_err() {
            assert!(start.elapsed() < Duration::from_secs(60), "{name} does not answer");
            std::thread::sleep(Duration::from_micros(500));
        }
    }
    let took = start.elapsed();
    process.kill().unwrap();
    process.wait().unwrap();
    took
}

/// A closed loop of frames through both ports.
fn load(switch: &Switch, seconds: &str) -> Child {
    let mut command = Command::new(binary());
    command.args(["bench", "vv", "--quick", "--sizes", "64", "--core", "0", "--seconds", seconds]);
    for port in [0, 1] {
        command.arg("--socket").arg(switch.socket(port));
    }
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// The sum of these lines of a process's status, in KiB.
fn resident(pid: u32, lines: &[&str]) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let value = |name: &&str| -> u64 {
        let rest = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        rest.split_whitespace().next().unwrap().parse().unwrap()
    };
    lines.iter().map(value).sum()
}

/// Frames of 9,000 bytes from the first to the second, as fast as the switch takes them.
fn bout(ends: &mut [VirtioUser; 2], time: Duration) {
    let [from, to] = ends;
    let (from, to) = (&mut from.queue_pairs()[0], &mut to.queue_pairs()[0]);
    let head = [2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x88, 0xb5];
    let (mut sending, mut got): (Vec<Buffer>, Vec<Buffer>) = (Vec::new(), Vec::new());
    let end = Instant::now() + time;
    while Instant::now() < end {
        while sending.len() < 32
            && let Some(mut frame) = from.allocate()
        {
            from.write(&mut frame, 0, &head);
            from.set_len(&mut frame, 9000);
            sending.push(frame);
        }
        from.transmit(&mut sending);
        to.receive(&mut got, 32);
        got.drain(..).for_each(|frame| to.free(frame));
    }
    sending.drain(..).for_each(|frame| from.free(frame));
    // What is on its way still arrives.
    let end = Instant::now() + Duration::from_millis(2);
    while Instant::now() < end {
        to.receive(&mut got, 32);
        got.drain(..).for_each(|frame| to.free(frame));
    }
}

/// What the switch says about its worker.
struct Account {
    /// Seconds of busy cycles.
    busy: f64,
    frames: u64,
}

impl Account {
    fn read(switch: &Switch) -> Self {
        let answer = Command::new(binary())
            .args(["switch", "stats", "--json", "--run-dir"])
            .arg(switch.dir())
            .output()
            .unwrap();
        let stats: Value = serde_json::from_slice(&answer.stdout).unwrap();
        let worker = &stats["workers"][0];
        let busy = worker["busy_cycles"].as_f64().unwrap() / stats["tsc_hz"].as_f64().unwrap();
        Self { busy, frames: worker["frames"].as_u64().unwrap() }
    }
}

/// The folder in which the kernel describes the worker's thread.
fn worker_thread(pid: u32) -> PathBuf {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(|task| task.unwrap().path());
    let mut workers =
        tasks.filter(|task| fs::read_to_string(task.join("comm")).unwrap().starts_with("worker-"));
    workers.next().unwrap()
}

/// Seconds that the thread could have run and another one did; 0 where the kernel does not count them.
fn waiting(thread: &Path) -> f64 {
    let counted = fs::read_to_string(thread.join("schedstat")).unwrap_or_default();
    counted.split(' ').nth(1).map_or(0.0, |nanoseconds| nanoseconds.parse::<f64>().unwrap() / 1e9)
}

/// Seconds that the thread was on a core, in user space and in the kernel (fields 14 and 15 of proc(5)'s `stat`).
fn on_cpu(thread: &Path) -> f64 {
    let stat = fs::read_to_string(thread.join("stat")).unwrap();
    let behind_name = stat.rsplit_once(") ").unwrap().1;
    let ticks: u64 = behind_name.split(' ').skip(11).take(2).map(|field| field.parse::<u64>().unwrap()).sum();
    ticks as f64 / sysconf(SysconfVar::CLK_TCK).unwrap().unwrap() as f64
}
