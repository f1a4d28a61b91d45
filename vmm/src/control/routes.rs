//! The paths of a machine's control socket, and their description as OpenAPI.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use control::{Failure, described, failure};
use serde::Deserialize;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};
use utoipa::{IntoParams, OpenApi};

use super::report::*;
use crate::life::Life;
use crate::machine::{Done, Remote};

/// The longest that an answer is waited for by a client that asked to.
const WAIT_MAX: u64 = 5;
/// How often is looked for news meanwhile.
const LOOK: Duration = Duration::from_millis(20);
/// A machine that does not say within this time that it did what it was told does not any more.
const OBEY: Duration = Duration::from_secs(12);
/// The header that says where in all that was printed an answer ends.
pub const NEXT: &str = "cableway-next";

type Machine = State<Arc<Life>>;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "cableway vm",
        description = "The control socket of a running machine (vm-NAME.sock in the run directory)"
    ),
    paths(vm, events, pause, resume, reboot, shutdown, kill, console, type_on_console),
    components(schemas(
        ActionReport,
        DeviceReport,
        EventKind,
        EventReport,
        EventsReport,
        Failure,
        MachineInfo,
        MachineState,
        Port,
        QueueReport,
        TypedReport,
        VcpuReport
    ))
)]
struct Description;

/// The description of the control socket (OpenAPI 3.1), as `GET /v1/openapi.json` answers it.
pub fn openapi() -> utoipa::openapi::OpenApi {
    Description::openapi()
}

/// All paths.
pub fn router(life: Arc<Life>) -> Router {
    let paths = Router::new()
        .route("/v1/vm", get(vm))
        .route("/v1/events", get(events))
        .route("/v1/pause", post(pause))
        .route("/v1/resume", post(resume))
        .route("/v1/reboot", post(reboot))
        .route("/v1/shutdown", post(shutdown))
        .route("/v1/kill", post(kill))
        .route("/v1/console", get(console).post(type_on_console));
    described(paths, openapi).with_state(life)
}

/// The machine.
#[utoipa::path(get, path = "/v1/vm", responses((status = 200, body = MachineInfo)))]
async fn vm(State(life): Machine) -> Json<MachineInfo> {
    Json(life.info())
}

/// Which events.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
struct EventsQuery {
    /// Only those with greater numbers; all that are kept unless given.
    after: Option<u64>,
    /// Seconds to wait for one if there is none, 5 at most.
    wait: Option<u64>,
}

/// What happened; the last 1,024 events are kept.
#[utoipa::path(get, path = "/v1/events", params(EventsQuery),
    responses((status = 200, body = EventsReport), (status = 400, description = "An unknown or malformed parameter")))]
async fn events(State(life): Machine, Query(query): Query<EventsQuery>) -> Json<EventsReport> {
    let end = until(query.wait);
    loop {
        let report = life.events().since(query.after.unwrap_or(0));
        if !report.events.is_empty() || Instant::now() >= end {
            return Json(report);
        }
        sleep(LOOK).await;
    }
}

fn until(seconds: Option<u64>) -> Instant {
    Instant::now() + Duration::from_secs(seconds.unwrap_or(0).min(WAIT_MAX))
}

/// Tells the machine something and waits until it did it.
async fn tell(life: &Life, what: impl FnOnce(&Remote) -> oneshot::Receiver<Done>) -> Response {
    let Some(remote) = life.remote() else {
        let state = life.state().word();
        return failure(StatusCode::CONFLICT, format!("the machine is {state}: it has no guest to tell"));
    };
    match timeout(OBEY, what(&remote)).await {
        Ok(Ok(Ok(()))) => Json(ActionReport { state: life.state() }).into_response(),
        Ok(Ok(Err(why))) => failure(StatusCode::CONFLICT, why),
        // It ended before it came to this.
        Ok(Err(_)) => failure(StatusCode::CONFLICT, "the machine ended meanwhile"),
        Err(_) => late(),
    }
}

fn late() -> Response {
    failure(StatusCode::SERVICE_UNAVAILABLE, format!("the machine did not do it within {} s", OBEY.as_secs()))
}

/// Brings vCPUs and devices to rest.
#[utoipa::path(post, path = "/v1/pause",
    responses((status = 200, body = ActionReport), (status = 409, description = "It is paused, or does not come to rest", body = Failure)))]
async fn pause(State(life): Machine) -> Response {
    tell(&life, Remote::pause).await
}

/// Lets a paused machine go on.
#[utoipa::path(post, path = "/v1/resume",
    responses((status = 200, body = ActionReport), (status = 409, description = "It is not paused", body = Failure)))]
async fn resume(State(life): Machine) -> Response {
    tell(&life, Remote::resume).await
}

/// Resets the machine at once, as its guest does when it reboots (`on_reboot` says what follows).
#[utoipa::path(post, path = "/v1/reboot",
    responses((status = 200, body = ActionReport), (status = 409, description = "It has no guest", body = Failure)))]
async fn reboot(State(life): Machine) -> Response {
    tell(&life, Remote::reset).await
}

/// How long a guest may take.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
struct ShutdownQuery {
    /// Seconds until the machine is ended all the same; `shutdown_timeout` unless given.
    timeout: Option<u32>,
}

/// Presses the power button; a paused machine goes on first.
#[utoipa::path(post, path = "/v1/shutdown", params(ShutdownQuery),
    responses((status = 200, body = ActionReport), (status = 409, description = "It has no guest", body = Failure)))]
async fn shutdown(State(life): Machine, Query(query): Query<ShutdownQuery>) -> Response {
    let timeout = query.timeout.map(|seconds| Duration::from_secs(seconds.into()));
    tell(&life, |remote| remote.shutdown_within(timeout)).await
}

/// Ends the machine at once, also between two boots and while it waits for a back end.
#[utoipa::path(post, path = "/v1/kill",
    responses((status = 200, body = ActionReport), (status = 503, description = "It does not hear", body = Failure)))]
async fn kill(State(life): Machine) -> Response {
    // A guest that ended before it came to this does not begin again.
    if let Some(answered) = life.end()
        && timeout(OBEY, answered).await.is_err()
    {
        return late();
    }
    Json(ActionReport { state: MachineState::Ended }).into_response()
}

/// Which console, and from where on.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
struct ConsoleQuery {
    /// `serial` or `virtio`; the serial port unless there is none.
    #[param(inline)]
    port: Option<Port>,
    /// A position in all that was ever printed, as `cableway-next` says it; none unless given: the answer says where to begin.
    from: Option<u64>,
    /// Seconds to wait for something if there is nothing, 5 at most.
    wait: Option<u64>,
}

impl ConsoleQuery {
    /// The console that is meant, if the machine has it.
    fn port(&self, life: &Life) -> Option<Port> {
        Some(self.port.unwrap_or_else(|| life.main_console())).filter(|port| life.has(*port))
    }
}

fn no_console() -> Response {
    failure(
        StatusCode::NOT_FOUND,
        "the machine has no such console: `serial` and `console` in its configuration say which it has",
    )
}

/// What the guest printed; the last 64 KiB are kept, and a client that is slow misses what was before.
#[utoipa::path(get, path = "/v1/console", params(ConsoleQuery),
    responses((status = 200, description = "The bytes; the header cableway-next has the position behind them", content_type = "application/octet-stream"),
        (status = 404, description = "There is no such console", body = Failure)))]
async fn console(State(life): Machine, Query(query): Query<ConsoleQuery>) -> Response {
    let Some(port) = query.port(&life) else { return no_console() };
    let end = until(query.wait);
    loop {
        let printed = life.printed(port);
        let (next, bytes) = printed.since(query.from.unwrap_or(u64::MAX));
        if !bytes.is_empty() || query.from.is_none() || Instant::now() >= end {
            let headers = [(CONTENT_TYPE.as_str(), "application/octet-stream"), (NEXT, &next.to_string())];
            return (headers, bytes).into_response();
        }
        sleep(LOOK).await;
    }
}

/// Types the body's bytes on a console.
#[utoipa::path(post, path = "/v1/console", params(ConsoleQuery), request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 200, body = TypedReport), (status = 404, description = "There is no such console", body = Failure)))]
async fn type_on_console(State(life): Machine, Query(query): Query<ConsoleQuery>, bytes: Bytes) -> Response {
    let Some(port) = query.port(&life) else { return no_console() };
    match life.type_on(port, &bytes) {
        Some(taken) => Json(TypedReport { taken }).into_response(),
        None => no_console(),
    }
}
