//! `cableway vm FILE`: the machine itself, from its configuration to the end of its guest.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use control::{ControlServer, ControlSocket};
use host::sandbox::files::Held;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use vmm::config::{Config, OnReboot, Seccomp};
use vmm::control::{door, router};
use vmm::life::Life;
use vmm::machine::{Ended, Machine, become_emulator};
use vmm::preflight::Preflight;
use vmm::sandbox::{self, Confined, SandboxError, ThreadKind};

use crate::log;
use crate::output::refuse;

/// Exit status when the guest's kernel panicked, when it met a triple fault, when KVM could not go on.
const PANICKED: u8 = 3;
const TRIPLE_FAULT: u8 = 4;
const FAILED: u8 = 5;

/// Runs the machine until its guest ends, again and again where the guest reboots.
///
/// # Errors
/// What the system refused. Whatever the user can set right is said, and the status is 2.
pub(super) fn run(config: &Config, run_dir: Option<&Path>, filter: Option<&str>) -> Result<ExitCode> {
    if let Err(error) = log::start(filter) {
        return Ok(refuse(error));
    }
    let preflight = match Preflight::new(config) {
        Ok(preflight) => preflight,
        Err(error) => return Ok(refuse(error)),
    };
    let socket = match socket(config, run_dir) {
        Ok(socket) => socket,
        Err(error) if run_dir.is_some() => return Ok(refuse(format!("{error:#}"))),
        // Nobody said that it is to be asked.
        Err(error) => {
            tracing::warn!("{} has no control socket: {error:#}", config.name);
            None
        }
    };
    if let Err(error) = become_emulator(config) {
        return Ok(refuse(error));
    }
    // A card has four descriptors a queue, and up to 257 queues. 1,024, the usual limit, is for the sake of select(2).
    if let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, most, most);
    }
    let life = match Life::new(config) {
        Ok(life) => life,
        Err(error) => return Ok(refuse(error)),
    };
    // From here on nothing is opened that the machine does not open anew when its guest reboots.
    let _confined = match confine(config, socket.as_ref().map(|(_, run_dir)| run_dir.as_path())) {
        Ok(confined) => confined,
        Err(error) => return Ok(refuse(error)),
    };
    obey_signals(life.clone())?;
    let _server: Option<ControlServer> = socket
        .map(|(socket, _)| socket.serve(router(life.clone()), || confine_thread(ThreadKind::Control)))
        .transpose()?;
    loop {
        let began = Instant::now();
        let mut machine = match Machine::start(config, &preflight, &life) {
            Ok(machine) => machine,
            Err(error) if life.is_ending() => {
                tracing::debug!("{error}");
                tracing::info!("{} was ended", config.name);
                life.ended();
                return Ok(ExitCode::SUCCESS);
            }
            Err(error) => return Ok(refuse(error)),
        };
        crate::ready::tell();
        tracing::info!("{} started in {:.1} ms", config.name, began.elapsed().as_secs_f64() * 1e3);
        // Where every microsecond of a vCPU counts, nothing is fetched later.
        if !config.lock_memory && config.vcpu_priority.is_none() {
            host::program::forget_code().context("looking for this program's code")?;
        }
        let ended = machine.wait();
        let exits: Vec<_> =
            machine.exits().iter().map(|(reason, count)| format!("{} {count}", reason.name())).collect();
        tracing::info!(
            "{} ran {:.1} s; exits: {}",
            config.name,
            began.elapsed().as_secs_f64(),
            exits.join(", ")
        );
        drop(machine);
        let name = &config.name;
        let status = match ended {
            Ended::Reset if config.on_reboot == OnReboot::Restart => {
                tracing::info!("{name} restarts");
                if let Err(error) = preflight.again(config) {
                    return Ok(refuse(error));
                }
                continue;
            }
            Ended::Reset => {
                tracing::info!("{name} wants to restart, and `on_reboot` says to end");
                ExitCode::SUCCESS
            }
            Ended::PowerOff => {
                tracing::info!("{name} turned itself off");
                ExitCode::SUCCESS
            }
            Ended::Stopped => {
                tracing::info!("{name} was ended");
                ExitCode::SUCCESS
            }
            Ended::Panicked => {
                tracing::error!("{name}: the guest's kernel panicked; its console says why");
                ExitCode::from(PANICKED)
            }
            Ended::TripleFault { vcpu } => {
                tracing::error!(
                    "{name}: vCPU {vcpu} met a triple fault: the guest's kernel destroyed its own tables"
                );
                ExitCode::from(TRIPLE_FAULT)
            }
            Ended::Failed { vcpu, what } => {
                tracing::error!("{name}: vCPU {vcpu}: {what}; dmesg may say more");
                ExitCode::from(FAILED)
            }
        };
        return Ok(status);
    }
}

/// The socket that the machine is asked on, before it is served: a second machine of this name ends here. And where it is.
fn socket(config: &Config, run_dir: Option<&Path>) -> Result<Option<(ControlSocket, PathBuf)>> {
    let run_dir = control::run_dir_of_server(run_dir)?;
    Ok(Some((ControlSocket::bind(&door(&run_dir, &config.name))?, run_dir)))
}

/// Confines the process, and says what of it the kernel or the user does not want.
fn confine(config: &Config, run_dir: Option<&Path>) -> Result<Confined, SandboxError> {
    let confined = sandbox::begin(config, run_dir)?;
    match (confined.files, config.confine_files) {
        (Held::NotAtAll, true) => {
            tracing::warn!(
                "this kernel has no Landlock: the machine's process can open whatever its user can"
            );
        }
        (Held::NotAtAll, false) => {
            tracing::info!("`confine_files` is off: the machine's process can open whatever its user can");
        }
        (Held::Partly, _) => {
            tracing::info!(
                "this kernel's Landlock is an older one: the machine's process is held to its files in part"
            );
        }
        (Held::Fully, _) => {}
    }
    match config.seccomp {
        Seccomp::Kill => {}
        Seccomp::Log => {
            tracing::warn!(
                "`seccomp` is \"log\": system calls that should end the machine are only logged (dmesg)"
            );
        }
        Seccomp::Off => {
            tracing::warn!("`seccomp` is \"off\": the machine's process can call the kernel for anything")
        }
    }
    Ok(confined)
}

/// Confines a thread of the process's own.
fn confine_thread(kind: ThreadKind) {
    if let Err(error) = sandbox::apply(kind) {
        tracing::error!("{error}");
        std::process::exit(1);
    }
}

/// SIGTERM presses the power button, once; SIGINT, a second SIGTERM, or one that no guest can hear, ends the machine.
fn obey_signals(life: Arc<Life>) -> Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT]).context("waiting for signals")?;
    let watch = move || {
        confine_thread(ThreadKind::Signals);
        let mut asked = false;
        for signal in signals.forever() {
            if signal == SIGTERM && !asked && life.shutdown() {
                asked = true;
                continue;
            }
            // A start hears of it between two steps, of which one may fill a terabyte of memory: nothing of it outlives the process.
            if life.is_ending() && life.is_starting() {
                std::process::exit(0);
            }
            life.kill();
            asked = true;
        }
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(watch).context("starting a thread")?;
    Ok(())
}
