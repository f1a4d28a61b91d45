//! What a node tells: the answer of its control socket, and what `cableway status` shows.
//!
//! Owns the socket's name, its path and the types behind it. Everything comes from the node's state, which is on disk as well: who
//! finds nobody to ask reads that.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use axum::extract::State as Shared;
use axum::routing::get;
use axum::{Json, Router};
use control::{Door, Failure, described};
use serde::{Deserialize, Serialize};
use utoipa::{OpenApi, ToSchema};

use super::state::{Kind, State, now};

/// Where it is asked.
pub(super) const PATH: &str = "/v1/node";

/// Where the supervisor of the node in `run_dir` is asked.
pub(super) fn door(run_dir: &Path) -> Door {
    Door {
        socket: run_dir.join("node.sock"),
        what: "node".to_owned(),
        absent: format!("nobody supervises a node in {}", run_dir.display()),
        taken: "cableway status shows it, cableway down ends it; if it is systemd who listens there, for cableway.service, \
                systemctl start cableway starts that, and systemctl stop cableway.socket ends it",
    }
}

/// What a supervisor is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum Phase {
    /// It brings the node up, or takes it over.
    Starting,
    /// It keeps everything running.
    Up,
    /// It brings the node down.
    Ending,
}

/// `GET /v1/node`: the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(super) struct NodeReport {
    /// Its configuration.
    pub(super) file: String,
    /// Where its state, sockets and logs are.
    pub(super) run_dir: String,
    /// The supervisor's process, if it runs.
    pub(super) supervisor: Option<i32>,
    /// What the supervisor is about, if it runs.
    pub(super) phase: Option<Phase>,
    /// The switch, then the machines in the order of the file.
    pub(super) children: Vec<ChildReport>,
}

/// One process of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub(super) struct ChildReport {
    /// `switch`, or the machine's name.
    pub(super) name: String,
    /// What it is.
    pub(super) kind: Kind,
    /// `running`, `starting` (the switch), `waiting` (a machine, for its back ends), `down`.
    pub(super) state: String,
    /// The process, if it runs.
    pub(super) pid: Option<i32>,
    /// Seconds since its state changed.
    pub(super) since_s: u64,
    /// How often it was started again.
    pub(super) restarts: u64,
    /// How it ended the last time.
    pub(super) last_end: Option<String>,
}

impl NodeReport {
    /// What a state means at this moment. `phase`: what the supervisor says, if it was asked.
    pub(super) fn of(state: &State, run_dir: &Path, phase: Option<Phase>) -> Self {
        let child = |child: &super::state::ChildState| ChildReport {
            name: child.name.clone(),
            kind: child.kind,
            state: child.word().to_owned(),
            pid: child.process.filter(|process| process.is_alive()).map(|process| process.pid),
            since_s: now().saturating_sub(child.since),
            restarts: child.restarts,
            last_end: child.last_end.clone(),
        };
        Self {
            file: state.file.display().to_string(),
            run_dir: run_dir.display().to_string(),
            supervisor: state.supervisor.is_alive().then_some(state.supervisor.pid),
            phase,
            children: state.children.iter().map(child).collect(),
        }
    }

    /// Whether it is supervised, and everything runs.
    pub(super) fn is_well(&self) -> bool {
        self.supervisor.is_some() && self.children.iter().all(|child| child.state == "running")
    }

    /// The same in a line, for `systemctl status`.
    pub(super) fn sentence(&self) -> String {
        let (well, other): (Vec<_>, Vec<_>) =
            self.children.iter().partition(|child| child.state == "running");
        let names: Vec<_> = well.iter().map(|child| child.name.as_str()).collect();
        let mut parts: Vec<String> = match self.phase {
            Some(Phase::Starting) => vec!["being brought up".to_owned()],
            Some(Phase::Ending) => vec!["being brought down".to_owned()],
            Some(Phase::Up) | None => {
                other.iter().map(|child| format!("{} is {}", child.name, child.state)).collect()
            }
        };
        if !names.is_empty() {
            parts.push(format!("running: {}", names.join(", ")));
        }
        parts.join("; ")
    }
}

/// What the supervisor shows to those who ask: its state, as it was written down last.
#[derive(Clone)]
pub(super) struct Shown(Arc<Mutex<(State, Phase)>>, Arc<Path>);

impl Shown {
    /// Shows a node in `run_dir`.
    pub(super) fn new(state: State, run_dir: &Path) -> Self {
        Self(Arc::new(Mutex::new((state, Phase::Starting))), run_dir.into())
    }

    /// Shows something else from now on.
    pub(super) fn set(&self, state: &State, phase: Phase) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = (state.clone(), phase);
    }

    /// What is shown at this moment.
    pub(super) fn report(&self) -> NodeReport {
        let (state, phase) = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        NodeReport::of(&state, &self.1, Some(phase))
    }

    /// All paths of the control socket.
    pub(super) fn router(self) -> Router {
        described(Router::new().route(PATH, get(node)), Description::openapi).with_state(self)
    }
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "cableway up",
        description = "The control socket of a supervised node (node.sock in the run directory)"
    ),
    paths(node),
    components(schemas(ChildReport, Failure, Kind, NodeReport, Phase))
)]
struct Description;

/// The node.
#[utoipa::path(get, path = "/v1/node", responses((status = 200, body = NodeReport)))]
async fn node(Shared(shown): Shared<Shown>) -> Json<NodeReport> {
    Json(shown.report())
}
