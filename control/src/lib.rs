//! How a process of the appliance is asked and told: HTTP and JSON on a UNIX socket in the run directory.
//!
//! Owns the run directory, the server of a control socket (one thread, everything about a connection bounded), its client, and
//! the form of a refusal. Knows neither switches nor machines: whoever serves brings its paths, whoever asks its types.

pub mod client;
mod run_dir;
mod server;

use std::path::{Path, PathBuf};

use axum::Json;
use axum::extract::DefaultBodyLimit;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use run_dir::{RunDirError, run_dir_of_client, run_dir_of_server};
pub use server::{ControlError, ControlServer, ControlSocket, HEAD_MAX, converse};

/// No request has a longer body that is worth reading: what is typed on a console is short, and there is nothing else.
const BODY_MAX: usize = 4_096;

/// The longest path that the address of a UNIX socket holds (`sun_path`, less its terminating zero byte).
pub const SOCKET_PATH_MAX: usize = 107;

/// Where a process is asked, and what users call it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Door {
    /// Its control socket.
    pub socket: PathBuf,
    /// What it is: `switch`, `` machine `fw1` ``.
    pub what: String,
    /// What to say when nobody is there.
    pub absent: String,
    /// What to do when somebody else is.
    pub taken: &'static str,
}

impl Door {
    /// The directory of the socket.
    pub fn run_dir(&self) -> &Path {
        self.socket.parent().unwrap_or(Path::new(""))
    }
}

/// Any answer that is not a success.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Failure {
    /// What went wrong, and what to do about it; for a configuration, one problem a line.
    pub error: String,
}

/// The answer that is no success.
pub fn failure(status: StatusCode, error: impl Into<String>) -> Response {
    (status, Json(Failure { error: error.into() })).into_response()
}

/// The paths of a control socket whole: what they mean as OpenAPI, answers where there is nothing to ask or not in this way,
/// bodies that are short.
pub fn described<S: Clone + Send + Sync + 'static>(
    router: axum::Router<S>,
    description: fn() -> utoipa::openapi::OpenApi,
) -> axum::Router<S> {
    router
        .route("/v1/openapi.json", get(async move || Json(description())))
        .fallback(async || {
            failure(StatusCode::NOT_FOUND, "there is nothing at this path; see /v1/openapi.json")
        })
        .method_not_allowed_fallback(async || {
            failure(StatusCode::METHOD_NOT_ALLOWED, "this path has another method; see /v1/openapi.json")
        })
        .layer(DefaultBodyLimit::max(BODY_MAX))
}

/// Text as a part of a path, or as a value in its query.
pub fn encoded(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    text.bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}
