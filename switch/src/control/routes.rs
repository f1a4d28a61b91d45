//! The paths of the control socket, and their description as OpenAPI.

use std::sync::Arc;

use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use control::{Failure, described, failure};
use serde::Deserialize;
use utoipa::{IntoParams, OpenApi};

use super::report::{
    AddressStats, CaptureReport, CardReport, DropCount, FdbEntry, FdbReport, FieldReport, PortReport,
    PortState, PortStats, PortsReport, RegisterReport, ReloadReport, RingReport, RxStats, StatsReport,
    SwitchInfo, Totals, TxStats, VfReport, WorkerState, WorkerStats,
};
use super::{SwitchState, VfChange};
use crate::capture::Filter;

/// What answers.
type Answers = Arc<dyn SwitchState>;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "cableway switch",
        description = "The control socket of a running switch (switch.sock in its run directory)"
    ),
    paths(switch, stats, ports, port, registers, set_vf, fdb, capture, captured, end_capture, reload),
    components(schemas(
        AddressStats,
        CaptureReport,
        CardReport,
        DropCount,
        Failure,
        FieldReport,
        FdbEntry,
        FdbReport,
        PortReport,
        PortState,
        PortStats,
        PortsReport,
        RegisterReport,
        ReloadReport,
        RingReport,
        RxStats,
        StatsReport,
        SwitchInfo,
        Totals,
        TxStats,
        VfReport,
        WorkerState,
        WorkerStats
    ))
)]
struct Description;

/// The description of the control socket (OpenAPI 3.1), as `GET /v1/openapi.json` answers it.
pub fn openapi() -> utoipa::openapi::OpenApi {
    Description::openapi()
}

/// All paths.
pub fn router(answers: Arc<dyn SwitchState>) -> Router {
    let paths = Router::new()
        .route("/v1/switch", get(switch))
        .route("/v1/stats", get(stats))
        .route("/v1/ports", get(ports))
        .route("/v1/ports/{name}", get(port))
        .route("/v1/ports/{name}/registers", get(registers))
        .route("/v1/ports/{name}/vfs/{number}", post(set_vf))
        .route("/v1/fdb", get(fdb))
        .route("/v1/captures", post(capture))
        .route("/v1/captures/{id}", get(captured).delete(end_capture))
        .route("/v1/reload", post(reload));
    described(paths, openapi).with_state(answers)
}

/// Which switch this is.
#[utoipa::path(get, path = "/v1/switch", responses((status = 200, body = SwitchInfo)))]
async fn switch(State(answers): State<Answers>) -> Json<SwitchInfo> {
    Json(answers.info())
}

/// All counters.
#[utoipa::path(get, path = "/v1/stats", responses((status = 200, body = StatsReport)))]
async fn stats(State(answers): State<Answers>) -> Json<StatsReport> {
    Json(answers.stats())
}

/// All ports.
#[utoipa::path(get, path = "/v1/ports", responses((status = 200, body = PortsReport)))]
async fn ports(State(answers): State<Answers>) -> Json<PortsReport> {
    Json(answers.ports())
}

/// One port.
#[utoipa::path(get, path = "/v1/ports/{name}", params(("name" = String, Path, description = "The port's name")),
    responses((status = 200, body = PortReport), (status = 404, body = Failure)))]
async fn port(State(answers): State<Answers>, Path(name): Path<String>) -> Response {
    match answers.ports().ports.into_iter().find(|port| port.name == name) {
        Some(port) => Json(port).into_response(),
        None => failure(StatusCode::NOT_FOUND, format!("there is no port {name:?}; see /v1/ports")),
    }
}

/// Which entries of the learning table.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
struct FdbQuery {
    /// Only those at this port.
    port: Option<String>,
    /// Only those of this VLAN.
    vlan: Option<u16>,
}

/// The learning table.
#[utoipa::path(get, path = "/v1/fdb", params(FdbQuery),
    responses((status = 200, body = FdbReport), (status = 400, description = "An unknown or malformed parameter")))]
async fn fdb(State(answers): State<Answers>, Query(query): Query<FdbQuery>) -> Json<FdbReport> {
    let mut report = answers.fdb();
    report.entries.retain(|entry| {
        query.port.as_ref().is_none_or(|port| *port == entry.port)
            && query.vlan.is_none_or(|vlan| Some(vlan) == entry.vlan)
    });
    Json(report)
}

/// What to capture.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
struct CaptureQuery {
    /// The port.
    port: String,
    /// Bytes of each frame that are kept at most; 65557 (all) unless given.
    longest: Option<u32>,
    /// Which frames, in a part of the language of pcap-filter(7); all unless given.
    filter: Option<String>,
}

/// Begins a capture, which ends with its port, and when nothing is fetched for 5 s.
#[utoipa::path(post, path = "/v1/captures", params(CaptureQuery),
    responses((status = 200, body = CaptureReport), (status = 400, description = "A filter that is not understood", body = Failure),
        (status = 409, description = "No such port, or too many captures", body = Failure)))]
async fn capture(State(answers): State<Answers>, Query(query): Query<CaptureQuery>) -> Response {
    let filter = match Filter::parse(&query.filter.unwrap_or_default()) {
        Ok(filter) => filter,
        Err(why) => return failure(StatusCode::BAD_REQUEST, why),
    };
    match answers.capture(&query.port, query.longest.unwrap_or(::port::MAX_FRAME), filter) {
        Ok(report) => Json(report).into_response(),
        Err(why) => failure(StatusCode::CONFLICT, why),
    }
}

fn no_capture(id: u64) -> Response {
    failure(
        StatusCode::NOT_FOUND,
        format!("there is no capture {id}; it ends with its port, and when nothing is fetched for 5 s"),
    )
}

/// The frames of a capture since the last request; all answers together are one pcapng file.
#[utoipa::path(get, path = "/v1/captures/{id}", params(("id" = u64, Path, description = "The capture's number")),
    responses((status = 200, description = "Blocks of a pcapng file", content_type = "application/x-pcapng"),
        (status = 404, body = Failure)))]
async fn captured(State(answers): State<Answers>, Path(id): Path<u64>) -> Response {
    match answers.captured(id) {
        Some(blocks) => ([(CONTENT_TYPE, "application/x-pcapng")], blocks).into_response(),
        None => no_capture(id),
    }
}

/// Ends a capture.
#[utoipa::path(delete, path = "/v1/captures/{id}", params(("id" = u64, Path, description = "The capture's number")),
    responses((status = 200, body = CaptureReport), (status = 404, body = Failure)))]
async fn end_capture(State(answers): State<Answers>, Path(id): Path<u64>) -> Response {
    answers.end_capture(id).map_or_else(|| no_capture(id), |report| Json(report).into_response())
}

/// What a port's card counts, and what its registers read.
#[utoipa::path(get, path = "/v1/ports/{name}/registers", params(("name" = String, Path, description = "The port's name")),
    responses((status = 200, body = CardReport), (status = 409, description = "No such port, or no card is open", body = Failure)))]
async fn registers(State(answers): State<Answers>, Path(name): Path<String>) -> Response {
    match answers.card(&name) {
        Ok(report) => Json(report).into_response(),
        Err(why) => failure(StatusCode::CONFLICT, why),
    }
}

/// Changes what a virtual function of a port's card may, until the next reload. Its driver begins anew.
#[utoipa::path(post, path = "/v1/ports/{name}/vfs/{number}",
    params(("name" = String, Path, description = "The port's name"), ("number" = u16, Path, description = "The function's number"), VfChange),
    responses((status = 200, body = VfReport), (status = 400, description = "An unknown or malformed parameter"),
        (status = 409, description = "Refused; everything is as it was", body = Failure)))]
async fn set_vf(
    State(answers): State<Answers>,
    Path((name, number)): Path<(String, u16)>,
    Query(change): Query<VfChange>,
) -> Response {
    match answers.set_vf(&name, number, change) {
        Ok(report) => Json(report).into_response(),
        Err(error) => failure(StatusCode::CONFLICT, error),
    }
}

/// Reads the configuration file again and applies it as one transaction.
#[utoipa::path(post, path = "/v1/reload",
    responses((status = 200, body = ReloadReport), (status = 409, description = "Refused; everything is as it was", body = Failure)))]
async fn reload(State(answers): State<Answers>) -> Response {
    match answers.reload() {
        Ok(report) => Json(report).into_response(),
        Err(error) => failure(StatusCode::CONFLICT, error),
    }
}
