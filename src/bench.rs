//! `cableway bench`: measures a switch by what comes out of it.
//!
//! Composes ports, a campaign and its report; owns the switch that it starts for a configuration file, and the progress
//! line.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use benches::campaign::{Campaign, Plan, SizeResult, Work};
use benches::clock::Clock;
use benches::frame::{LARGEST, MOST_ADDRESSES, SMALLEST, Verify};
use benches::machine::Machine;
use benches::report::{self, Report};
use benches::trial::Rig;
use benches::virtio_user::{self, PortOptions, Ring};
use control::client;
use switch::config::{Config, ConfigErrors, ThisMachine};
use switch::control::report::StatsReport;

use crate::node::cores::Planner;
use crate::output;

/// How long a switch that we start may take until its sockets are there.
const START_TIME: Duration = Duration::from_secs(10);

/// What is measured.
#[derive(clap::Subcommand, Debug)]
pub(crate) enum BenchCommand {
    /// Two vhost-user ports of a switch, traffic between them (VV: guest to guest).
    ///
    /// Closed loop, no-drop and partial-drop rate, longest burst, and latency at parts of the no-drop rate, for each frame
    /// size. The switch is ours with a configuration FILE, or any other behind two sockets.
    Vv(VvArgs),
}

/// Arguments of `bench vv`.
#[derive(clap::Args, Debug)]
pub(crate) struct VvArgs {
    /// Starts our switch with this configuration and measures its first two ports in server mode.
    #[arg(conflicts_with = "socket")]
    file: Option<PathBuf>,
    /// The socket of a port of any switch that runs already; give it twice.
    #[arg(long, num_args = 1, value_name = "PATH")]
    socket: Vec<PathBuf>,
    /// We open the sockets and the switch connects (OVS: dpdkvhostuserclient).
    #[arg(long, requires = "socket")]
    listen: bool,
    /// Frame sizes in bytes, without FCS.
    #[arg(long, value_delimiter = ',', default_value = "64,128,256,512,1024,1280,1518")]
    sizes: Vec<usize>,
    /// Ring layout: split or packed.
    #[arg(long, default_value_t = Ring::Split)]
    ring: Ring,
    /// Entries of each ring.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u16).range(32..=32_768))]
    queue_size: u16,
    /// Seconds of each trial.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Frames in flight in the closed loop [default: half a ring].
    #[arg(long)]
    in_flight: Option<u16>,
    /// Addresses behind each port, traffic to all of them.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(MOST_ADDRESSES)))]
    addresses: u32,
    /// Only the closed loop: seconds instead of minutes.
    #[arg(long)]
    quick: bool,
    /// Also latency at 10, 50 and 90 % of the no-drop rate.
    #[arg(long)]
    latency: bool,
    /// Reads every byte of one frame in 64 only (and the first 64 of each), so that the generator is faster.
    #[arg(long)]
    sample: bool,
    /// The generator's core [default: the first permitted one that is no worker's].
    #[arg(long)]
    core: Option<u32>,
    /// Writes DIR/report.json and DIR/report.html.
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    /// Prints the result as JSON instead of a table.
    #[arg(long)]
    json: bool,
}

/// Runs it. Exit status 1 when frames were lost in the closed loop, or damaged at all.
///
/// # Errors
/// Whatever keeps it from measuring.
pub(crate) fn run(command: BenchCommand) -> anyhow::Result<ExitCode> {
    let BenchCommand::Vv(args) = &command;
    if let Err(wrong) = args.check() {
        eprintln!("cableway: {wrong}");
        return Ok(ExitCode::from(output::REFUSED));
    }
    let stop = crate::interrupt::flag()?;
    let run_dir =
        tempfile::Builder::new().prefix("cableway-bench-").tempdir().context("making a run directory")?;
    // Pinned threads may run nowhere else, and so may their children: the switch is started first.
    let permitted: Vec<u32> = host::topology::permitted_cores()?.iter().collect();
    let subject = match Subject::new(args, run_dir.path()) {
        Err(error) if error.is::<ConfigErrors>() => {
            eprintln!("{error}");
            return Ok(ExitCode::from(output::REFUSED));
        }
        other => other?,
    };
    let polite = seat(args, &subject, &permitted)?;
    let report = measure(args, &subject, &stop, polite)?;
    drop(subject);
    publish(args, &report)?;
    let lost: u64 = report.results.iter().map(|r| r.closed_loop.lost + r.closed_loop.corrupt).sum();
    Ok(if lost == 0 && !report.results.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl VvArgs {
    fn check(&self) -> anyhow::Result<()> {
        if self.file.is_none() && self.socket.len() != 2 {
            bail!(
                "give the configuration FILE of a switch to start, or --socket twice: a measurement needs two ports"
            );
        }
        if let Some(size) = self.sizes.iter().find(|s| !(SMALLEST..=LARGEST).contains(*s)) {
            bail!("frames of {size} bytes: sizes are without FCS, {SMALLEST} to {LARGEST}");
        }
        if !(0.01..=86_400.0).contains(&self.seconds) {
            bail!("trials of {} s: give 0.01 to 86400", self.seconds);
        }
        Ok(())
    }

    fn plan(&self) -> Plan {
        Plan {
            sizes: self.sizes.clone(),
            seconds: self.seconds,
            in_flight: self.in_flight.unwrap_or(self.queue_size / 2).into(),
            addresses: self.addresses,
            verify: if self.sample { Verify::Sampled } else { Verify::Whole },
            search: !self.quick,
            latency: self.latency,
        }
    }
}

/// The switch at hand.
struct Subject {
    name: String,
    sockets: [PathBuf; 2],
    listen: bool,
    /// Cores that the switch polls on, if we know them.
    workers: Vec<u32>,
    /// Where its control socket is, if it is ours.
    run_dir: Option<PathBuf>,
    _switch: Option<Started>,
}

impl Subject {
    fn new(args: &VvArgs, run_dir: &Path) -> anyhow::Result<Self> {
        match (&args.file, args.socket.as_slice()) {
            (Some(file), _) => Self::start(file, run_dir),
            (None, [a, b]) => Ok(Self {
                name: format!("{} and {}", a.display(), b.display()),
                sockets: [a.clone(), b.clone()],
                listen: args.listen,
                workers: Vec::new(),
                run_dir: None,
                _switch: None,
            }),
            _ => bail!("give a configuration file or two sockets"),
        }
    }

    /// Starts our switch in a process of its own, as a user would.
    fn start(file: &Path, run_dir: &Path) -> anyhow::Result<Self> {
        let config = Config::load(file, run_dir, &ThisMachine::now().deciding(Planner::for_switch()))?;
        let servers: Vec<&Path> = config.ports.iter().filter_map(|p| p.behind.listens_on()).collect();
        let [first, second, ..] = servers.as_slice() else {
            bail!("{}: needs two ports with mode = \"server\" to measure between", file.display());
        };
        let sockets = [first.to_path_buf(), second.to_path_buf()];
        let switch = Started::new(file, run_dir, &sockets)?;
        Ok(Self {
            name: file.display().to_string(),
            sockets,
            listen: false,
            workers: config.switch.workers.clone(),
            run_dir: Some(run_dir.to_owned()),
            _switch: Some(switch),
        })
    }

    /// The work of the switch's data threads, if it is ours.
    fn work(&self) -> Option<Work> {
        let stats = client::get::<StatsReport>(&switch::control::door(self.run_dir.as_deref()?), "/v1/stats")
            .ok()?
            .value;
        let sum = |of: fn(&switch::control::report::WorkerStats) -> u64| stats.workers.iter().map(of).sum();
        Some(Work { busy_cycles: sum(|w| w.busy_cycles), frames: sum(|w| w.frames) })
    }
}

/// A switch that we started; ended when dropped.
struct Started(Child);

impl Started {
    fn new(file: &Path, run_dir: &Path, sockets: &[PathBuf; 2]) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("finding this program")?;
        let child = Command::new(program)
            .arg("switch")
            .arg(file)
            .arg("--run-dir")
            .arg(run_dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("starting the switch")?;
        let mut started = Self(child);
        let end = Instant::now() + START_TIME;
        while !sockets.iter().all(|s| s.exists()) {
            if let Some(status) = started.0.try_wait()? {
                bail!("the switch ended before its sockets were there ({status})");
            }
            if Instant::now() > end {
                bail!("the switch has no socket {} after {START_TIME:?}", sockets[0].display());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(started)
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.0.id().cast_signed());
        // It may have ended by itself: then there is nothing to do.
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let end = Instant::now() + Duration::from_secs(3);
        while Instant::now() < end {
            if !matches!(self.0.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Puts this thread, which becomes the generator, on its core. Returns whether it must share it.
fn seat(args: &VvArgs, subject: &Subject, permitted: &[u32]) -> anyhow::Result<bool> {
    let free = permitted.iter().copied().find(|core| !subject.workers.contains(core));
    let Some(core) = args.core.or(free).or(permitted.first().copied()) else { bail!("no core to run on") };
    host::thread::pin(core)?;
    let shared = subject.workers.contains(&core);
    if shared {
        eprintln!("The generator shares core {core} with a worker of the switch: the figures mean nothing.");
    }
    Ok(shared)
}

fn measure(args: &VvArgs, subject: &Subject, stop: &AtomicBool, polite: bool) -> anyhow::Result<Report> {
    let plan = args.plan();
    let options = PortOptions {
        listen: subject.listen,
        ring: args.ring,
        queue_size: args.queue_size,
        largest: plan.sizes.iter().copied().max().unwrap_or(SMALLEST),
        timeout: Duration::from_secs(if subject.listen { 30 } else { 5 }),
    };
    let [a, b] = &subject.sockets;
    let (mut first, mut second) = (virtio_user::open(a, 0, options)?, virtio_user::open(b, 1, options)?);
    let ports = virtio_user::describe(options, &first);
    let (Some(pair_a), Some(pair_b)) = (first.queue_pairs().first_mut(), second.queue_pairs().first_mut())
    else {
        bail!("a port without queues");
    };
    let mut rig = Rig::new([pair_a, pair_b], Clock::of_this_machine(), stop, polite);
    let mut results: Vec<SizeResult> = Vec::new();
    let terminal = std::io::stderr().is_terminal();
    let mut progress = |step: &str| {
        let end = if terminal { "\x1b[K\r" } else { "\n" };
        eprint!("{step}{end}");
        // Progress that cannot be shown changes nothing.
        let _ = std::io::stderr().flush();
    };
    let mut work = || subject.work();
    let outcome = Campaign::new(&mut rig, &plan, &mut progress, &mut work).run(&mut results);
    if terminal {
        eprint!("\x1b[K");
    }
    Ok(Report {
        subject: subject.name.clone(),
        ports,
        plan,
        machine: Machine::read(Path::new("/")),
        results,
        ended: outcome.err().map(|why| why.to_string()),
    })
}

fn publish(args: &VvArgs, report: &Report) -> anyhow::Result<()> {
    let text = if args.json { report.json() + "\n" } else { report::tables(report) };
    output::print(&text)?;
    if let Some(dir) = &args.report {
        std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        for (name, text) in [("report.json", report.json()), ("report.html", report::page(report))] {
            let path = dir.join(name);
            std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
            eprintln!("{}", path.display());
        }
    }
    Ok(())
}
