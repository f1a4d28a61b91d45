//! `cableway switch FILE`: the switch itself, from its configuration to its last signal.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use control::ControlSocket;
use host::sandbox::files::Held;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use switch::config::{Config, ThisMachine};
use switch::control::{SwitchState, door, router};
use switch::runtime::Switch;
use switch::sandbox::files;

use super::Place;
use crate::log;
use crate::node::cores::Planner;
use crate::output::refuse;

/// Runs a switch until SIGTERM or SIGINT.
///
/// # Errors
/// What the system refused. Whatever the user can set right is said, and the status is 2.
pub(super) fn run(file: &Path, place: &Place, filter: Option<&str>) -> Result<ExitCode> {
    let began = Instant::now();
    if let Err(error) = log::start(filter) {
        return Ok(refuse(error));
    }
    // Before any thread is pinned: a pinned thread sees only its own core.
    let machine = ThisMachine::now().deciding(Planner::for_switch());
    let run_dir = match control::run_dir_of_server(place.run_dir.as_deref()) {
        Ok(run_dir) => run_dir,
        Err(error) => return Ok(refuse(error)),
    };
    // First of all the control socket: a second switch in one directory ends here, before it touches anything.
    let control = match ControlSocket::bind(&door(&run_dir)) {
        Ok(control) => control,
        Err(error) => return Ok(refuse(error)),
    };
    let config = match Config::load(file, &run_dir, &machine) {
        Ok(config) => config,
        Err(errors) => {
            eprintln!("{errors}");
            return Ok(ExitCode::from(crate::output::REFUSED));
        }
    };
    allow_descriptors(&config);
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).context("waiting for signals")?;
    let ports = config.ports.len();
    let switch = match Switch::start(config.clone(), run_dir.clone(), machine) {
        Ok(switch) => Arc::new(switch),
        Err(error) => return Ok(refuse(error)),
    };
    // Ports and control socket are there; from the next line on this process may not open a socket of its own.
    crate::ready::tell();
    // The workers run on their cores; from here on, nothing else does. The control thread inherits core and confinement.
    let files = files::of(&config, &run_dir);
    let held = switch::runtime::become_housekeeping(&config, files.as_ref())?;
    let server = control.serve(router(switch.clone()), || {})?;
    let milliseconds = began.elapsed().as_millis();
    tracing::info!("{ports} ports in {}, ready in {milliseconds} ms", run_dir.display());
    match (held, &files) {
        (Held::Fully | Held::Partly, _) => {}
        (Held::NotAtAll, Some(_)) => {
            tracing::warn!("this kernel has no Landlock: the switch can open whatever its user can");
        }
        (Held::NotAtAll, None) => {
            tracing::info!("`confine_files` is off: the switch can open whatever its user can")
        }
    }

    for signal in signals.forever() {
        if signal == SIGHUP {
            reload(&switch);
        } else {
            tracing::info!("ending on {}", signal_hook::low_level::signal_name(signal).unwrap_or("a signal"));
            break;
        }
    }
    drop(server);
    Ok(ExitCode::SUCCESS)
}

/// Descriptors that the switch has beside those of its guests' rings.
const OWN_DESCRIPTORS: u64 = 256;

/// Raises the limit of open descriptors as far as it goes: a guest brings up to three eventfds for each of its rings, of which
/// the session and the ring have one each, and no guest may use up what another one needs. Tells if it does not go far enough.
fn allow_descriptors(config: &Config) {
    let guests = config.ports.iter().filter(|port| port.behind.socket().is_some());
    let needed = OWN_DESCRIPTORS + guests.map(|port| 64 + 12 * u64::from(port.queue_pairs)).sum::<u64>();
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
    if soft < hard && setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_err() || hard < needed {
        tracing::warn!(
            "guests may bring {needed} descriptors and this process may have {hard}: queues beyond that will not start; \
             raise the limit (ulimit -Hn, systemd's LimitNOFILE)"
        );
    }
}

/// Applies the changed file, and logs what came of it.
fn reload(switch: &Switch) {
    match switch.reload() {
        Ok(done) => tracing::info!(
            "configuration applied: {} added, {} removed, {} changed ({} disconnected to renegotiate), {} untouched",
            done.added.len(),
            done.removed.len(),
            done.changed.len(),
            done.reconnected.len(),
            done.unchanged
        ),
        Err(error) => tracing::error!("configuration not applied, everything is as it was: {error}"),
    }
}
