//! The control socket as its clients and its neighbours see it.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use control::client::{self, ClientError};
use control::{ControlServer, ControlSocket, run_dir_of_server};

use super::report::*;
use super::*;

/// A virtual function with this.
fn vf(number: u16, change: VfChange) -> VfReport {
    let mac = change.mac.unwrap_or_else(|| "02:00:00:00:00:01".to_owned());
    let (qos, trust, spoof_check) = (0, change.trust.unwrap_or(false), change.spoof_check.unwrap_or(true));
    let (active, granted, refused) = (true, 3, 0);
    VfReport { number, mac, vlan: change.vlan, qos, trust, spoof_check, active, granted, refused }
}

/// A switch with two ports and one address.
struct Still;

impl SwitchState for Still {
    fn info(&self) -> SwitchInfo {
        SwitchInfo {
            version: "1".into(),
            pid: 7,
            uptime_s: 1.5,
            config: "/etc/x.toml".into(),
            run_dir: "/run/x".into(),
            workers: vec![1],
            ports: 2,
            fdb_size: 64,
        }
    }

    fn stats(&self) -> StatsReport {
        let worker = WorkerStats {
            core: 1,
            node: None,
            state: WorkerState::Polling,
            frames: 10,
            bytes: 640,
            dropped: 1,
            bursts: 2,
            busy_cycles: 700,
            idle_cycles: 300,
            cycles_per_frame: Some(70.0),
        };
        let drops = vec![DropCount { reason: "runt".into(), sentence: "Too short.".into(), frames: 1 }];
        let rx = RxStats { received: 10, switched: 9, dropped: 1, drops, ..RxStats::default() };
        let tx = TxStats { offered: 9, sent: 9, ..TxStats::default() };
        let ports = vec![PortStats { name: "a".into(), rx: vec![rx], tx: vec![tx], ..PortStats::default() }];
        let totals = Totals::of(&ports);
        StatsReport { uptime_s: 1.5, tsc_hz: 2_000_000_000, workers: vec![worker], ports, totals }
    }

    fn ports(&self) -> PortsReport {
        let port = |name: &str, state| PortReport {
            name: name.into(),
            kind: "vhost-user".into(),
            socket: Some(format!("/run/x/{name}.sock")),
            device: None,
            mode: Some("server".into()),
            state,
            reason: Some("descriptor 17".into()),
            features: vec!["packed".into()],
            layout: Some("packed".into()),
            rings: vec![RingReport { index: 0, size: 256, enabled: true }],
            memory_bytes: 1 << 30,
            mtu: Some(1500),
            vlan: Some("access 10".into()),
            isolation: Some("red".into()),
            vfs: vec![vf(0, VfChange { vlan: Some(10), ..VfChange::default() })],
        };
        PortsReport { ports: vec![port("a", PortState::Up), port("b", PortState::Stopped)] }
    }

    fn fdb(&self) -> FdbReport {
        let entry = |address: &str, vlan, port: &str| FdbEntry {
            address: address.into(),
            vlan,
            port: port.into(),
            age_s: Some(3),
            is_static: false,
        };
        let entries =
            vec![entry("02:00:00:00:00:01", Some(10), "a"), entry("02:00:00:00:00:02", Some(20), "b")];
        FdbReport { size: 64, used: 2, entries }
    }

    fn capture(&self, port: &str, _: u32, _: Filter) -> Result<CaptureReport, String> {
        Ok(CaptureReport { id: 7, port: port.to_owned(), captured: 0, missed: 0 })
    }

    fn captured(&self, id: u64) -> Option<Vec<u8>> {
        (id == 7).then(|| vec![0x0a, 0xff])
    }

    fn end_capture(&self, id: u64) -> Option<CaptureReport> {
        (id == 7).then(|| CaptureReport { id, port: "a".to_owned(), captured: 2, missed: 1 })
    }

    fn card(&self, port: &str) -> Result<CardReport, String> {
        let field = FieldReport { name: "LU".into(), value: 1 };
        let status =
            RegisterReport { name: "STATUS".into(), index: None, offset: 8, value: 2, fields: vec![field] };
        let sent = DeviceCount { name: "sent".into(), count: 3 };
        let report = CardReport { counters: vec![sent], registers: vec![status] };
        (port == "a").then_some(report).ok_or_else(|| format!("port {port} has no card open"))
    }

    fn set_vf(&self, port: &str, number: u16, change: VfChange) -> Result<VfReport, String> {
        if port != "a" || number > 1 {
            return Err(format!("port {port} has no virtual function {number}"));
        }
        Ok(vf(number, change))
    }

    fn reload(&self) -> Result<ReloadReport, String> {
        Err("x.toml:1:1: wrong".to_owned())
    }
}

fn served() -> (TempDir, ControlServer) {
    let dir = tempfile::tempdir().unwrap();
    let server =
        ControlSocket::bind(&door(dir.path())).unwrap().serve(router(Arc::new(Still)), || {}).unwrap();
    (dir, server)
}

/// What one request on a raw connection is answered with.
fn raw(dir: &TempDir, request: &str) -> String {
    let mut stream = UnixStream::connect(dir.path().join(CONTROL_SOCKET)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    answer
}

#[test]
fn a_client_gets_what_the_switch_says() {
    let (dir, _server) = served();
    assert_eq!(client::get::<SwitchInfo>(&door(dir.path()), "/v1/switch").unwrap().value, Still.info());
    assert_eq!(client::get::<StatsReport>(&door(dir.path()), "/v1/stats").unwrap().value, Still.stats());
    assert_eq!(client::get::<PortsReport>(&door(dir.path()), "/v1/ports").unwrap().value, Still.ports());
    assert_eq!(
        client::get::<PortReport>(&door(dir.path()), "/v1/ports/b").unwrap().value,
        Still.ports().ports[1]
    );
    let card = client::get::<CardReport>(&door(dir.path()), "/v1/ports/a/registers").unwrap().value;
    assert_eq!(Ok(card), Still.card("a"));
    let none = client::get::<CardReport>(&door(dir.path()), "/v1/ports/b/registers");
    assert!(matches!(none, Err(ClientError::Refused(why)) if why.contains("no card open")));
    let fdb = client::get::<FdbReport>(&door(dir.path()), "/v1/fdb?vlan=20").unwrap().value;
    assert_eq!((fdb.used, fdb.entries.len(), fdb.entries[0].port.as_str()), (2, 1, "b"));
}

#[test]
fn a_capture_is_begun_fetched_and_ended() {
    let (dir, _server) = served();
    let begun =
        client::post::<CaptureReport>(&door(dir.path()), "/v1/captures?port=a&filter=tcp%20and%20port%2080")
            .unwrap()
            .value;
    assert_eq!((begun.id, begun.port.as_str()), (7, "a"));
    assert_eq!(&client::get_bytes(&door(dir.path()), "/v1/captures/7").unwrap()[..], [0x0a, 0xff]);
    assert_eq!(
        client::delete::<CaptureReport>(&door(dir.path()), "/v1/captures/7").unwrap().value.captured,
        2
    );
    let gone = client::get_bytes(&door(dir.path()), "/v1/captures/8").unwrap_err().to_string();
    assert!(gone.starts_with("there is no capture 8"), "{gone}");
    let wrong =
        client::post::<CaptureReport>(&door(dir.path()), "/v1/captures?port=a&filter=tpc").map(|_| ());
    assert!(wrong.unwrap_err().to_string().contains("\"tpc\" is unknown"));
}

#[test]
fn a_refusal_says_why() {
    let (dir, _server) = served();
    let refused = |answer: Result<(), ClientError>| match answer {
        Err(ClientError::Refused(why)) => why,
        other => panic!("{other:?}"),
    };
    let unknown = client::get::<PortReport>(&door(dir.path()), "/v1/ports/nobody").map(drop);
    assert!(refused(unknown).contains("there is no port \"nobody\""));
    assert_eq!(
        refused(client::post::<ReloadReport>(&door(dir.path()), "/v1/reload").map(drop)),
        "x.toml:1:1: wrong"
    );
    assert!(
        refused(client::get::<Value>(&door(dir.path()), "/v2/stats").map(drop)).contains("/v1/openapi.json")
    );
    assert!(
        refused(client::post::<Value>(&door(dir.path()), "/v1/stats").map(drop)).contains("another method")
    );
}

#[test]
fn every_answer_has_exactly_the_fields_that_the_description_names() {
    let (dir, _server) = served();
    let description = client::get::<Value>(&door(dir.path()), "/v1/openapi.json").unwrap().value;
    for (path, schema) in
        [("switch", "SwitchInfo"), ("stats", "StatsReport"), ("ports", "PortsReport"), ("fdb", "FdbReport")]
    {
        let answer = client::get::<Value>(&door(dir.path()), &format!("/v1/{path}")).unwrap().value;
        assert!(description["paths"][format!("/v1/{path}")]["get"].is_object(), "{path}");
        let schema = &description["components"]["schemas"][schema];
        check(&description, schema, &answer, path);
    }
}

/// Whether `value` has the form that `schema` describes, all the way down.
fn check(description: &Value, schema: &Value, value: &Value, place: &str) {
    if let Some(name) = schema["$ref"].as_str() {
        let name = name.rsplit('/').next().unwrap();
        return check(description, &description["components"]["schemas"][name], value, place);
    }
    match value {
        Value::Object(fields) => {
            let properties = schema["properties"].as_object().unwrap_or_else(|| panic!("{place}: {schema}"));
            let names = |map: &serde_json::Map<String, Value>| {
                map.keys().cloned().collect::<std::collections::BTreeSet<_>>()
            };
            assert_eq!(names(fields), names(properties), "{place}");
            for (name, field) in fields {
                check(description, &properties[name], field, &format!("{place}.{name}"));
            }
        }
        Value::Array(elements) => {
            for element in elements {
                check(description, &schema["items"], element, place);
            }
        }
        Value::String(text) => {
            if let Some(words) = schema["enum"].as_array() {
                assert!(words.contains(value), "{place}: {text}");
            }
        }
        _ => {}
    }
}

#[test]
fn a_virtual_function_is_changed_by_what_the_query_says_and_a_refusal_is_told() {
    let (dir, _server) = served();
    let set = |path: &str| client::post::<VfReport>(&door(dir.path()), path).map(|answer| answer.value);
    let changed =
        set("/v1/ports/a/vfs/1?mac=02:00:00:00:00:07&vlan=20&trust=true&spoof_check=false").unwrap();
    assert_eq!((changed.number, changed.mac.as_str(), changed.vlan), (1, "02:00:00:00:00:07", Some(20)));
    assert!(changed.trust && !changed.spoof_check);
    assert!(matches!(set("/v1/ports/b/vfs/1"), Err(ClientError::Refused(why)) if why.contains("port b")));
    assert!(set("/v1/ports/a/vfs/1?trusted=true").is_err(), "an unknown word");
    assert!(set("/v1/ports/a/vfs/x").is_err(), "no number");
}

/// The shortest of several tries: a machine that stands still for a moment is no fault of the server.
fn quickest(act: impl Fn() -> Duration) -> Duration {
    (0..5).map(|_| act()).min().unwrap()
}

#[test]
fn clients_that_send_half_a_request_or_read_nothing_delay_nobody() {
    let took = quickest(|| {
        let (dir, _server) = served();
        let socket = dir.path().join(CONTROL_SOCKET);
        let _silent: Vec<_> = (0..10).map(|_| UnixStream::connect(&socket).unwrap()).collect();
        let _halves: Vec<_> = (0..10)
            .map(|_| {
                let mut half = UnixStream::connect(&socket).unwrap();
                half.write_all(b"GET /v1/stats HTTP/1.1\r\nhos").unwrap();
                half
            })
            .collect();
        let start = Instant::now();
        client::get::<StatsReport>(&door(dir.path()), "/v1/stats").unwrap();
        start.elapsed()
    });
    // The server gives each of them five seconds.
    assert!(took < Duration::from_secs(2), "{took:?}");
}

/// Connections to a new server, how many of them it closed, and how long it took until all had been looked at.
fn crowd() -> (TempDir, ControlServer, Vec<UnixStream>, usize, Duration) {
    let (dir, server) = served();
    let start = Instant::now();
    let held: Vec<_> =
        (0..40).map(|_| UnixStream::connect(dir.path().join(CONTROL_SOCKET)).unwrap()).collect();
    let last = held.last().unwrap();
    last.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    // They are accepted in order: when the last one is closed, all have been looked at.
    assert_eq!((&*last).read(&mut [0]).unwrap(), 0);
    held.iter().for_each(|stream| stream.set_nonblocking(true).unwrap());
    let closed = held.iter().filter(|stream| matches!((&mut &**stream).read(&mut [0]), Ok(0))).count();
    (dir, server, held, closed, start.elapsed())
}

#[test]
fn more_connections_than_there_are_slots_for_are_closed_and_served_again_later() {
    // Those that say nothing are closed after five seconds: a try that took as long says nothing.
    let (dir, _server, held, closed, _) =
        (0..10).map(|_| crowd()).find(|(.., took)| *took < Duration::from_secs(4)).unwrap();
    assert_eq!(closed, 8);
    drop(held);
    let end = Instant::now() + Duration::from_secs(60);
    while client::get::<SwitchInfo>(&door(dir.path()), "/v1/switch").is_err() {
        assert!(Instant::now() < end, "not served again");
    }
}

#[test]
fn requests_of_any_size_and_form_are_answered_or_closed() {
    let (dir, _server) = served();
    let long = format!("GET /v1/{} HTTP/1.1\r\nhost: x\r\n\r\n", "s".repeat(100_000));
    let headers = format!("GET /v1/stats HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(100_000));
    let body =
        "POST /v1/reload HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 99999999999\r\n\r\n";
    for request in [
        long.as_str(),
        headers.as_str(),
        body,
        "\0\0\0\0\r\n\r\n",
        "GET /v1/fdb?vlan=x HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    ] {
        let mut stream = UnixStream::connect(dir.path().join(CONTROL_SOCKET)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        // A server that closes early makes the rest of a long write fail: that is an answer, too.
        let _ = stream.write_all(request.as_bytes());
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(!answer.starts_with(b"HTTP/1.1 2"), "{}", String::from_utf8_lossy(&answer));
    }
    assert!(
        raw(&dir, "GET /v1/switch HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            .starts_with("HTTP/1.1 200")
    );
}

#[test]
fn only_owner_and_group_may_ask_and_nothing_is_left_behind() {
    let took = quickest(|| {
        let (dir, server) = served();
        let socket = dir.path().join(CONTROL_SOCKET);
        assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o660);
        let _open = UnixStream::connect(&socket).unwrap();
        let start = Instant::now();
        drop(server);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        start.elapsed()
    });
    assert!(took < Duration::from_millis(500), "an open connection is not waited for: {took:?}");
}

#[test]
fn a_second_switch_is_told_who_runs_and_a_dead_ones_socket_is_replaced() {
    let (dir, server) = served();
    let second = ControlSocket::bind(&door(dir.path())).map(drop).unwrap_err().to_string();
    assert!(second.contains(&format!("already running (pid {})", std::process::id())), "{second}");
    assert!(client::get::<SwitchInfo>(&door(dir.path()), "/v1/switch").is_ok());
    drop(server);
    let socket = dir.path().join(CONTROL_SOCKET);
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    drop(ControlSocket::bind(&door(dir.path())).unwrap());
    std::fs::write(&socket, "notes").unwrap();
    let file = ControlSocket::bind(&door(dir.path())).map(drop).unwrap_err().to_string();
    assert!(file.contains("is not a socket"), "{file}");
    assert_eq!(std::fs::read(&socket).unwrap(), b"notes");
}

#[test]
fn nobody_there_is_said_plainly() {
    let dir = tempfile::tempdir().unwrap();
    let error = client::get::<SwitchInfo>(&door(dir.path()), "/v1/switch").map(drop).unwrap_err();
    assert!(error.to_string().contains("no switch is running in"), "{error}");
}

#[test]
fn a_run_directory_that_cannot_be_used_is_refused_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |path: &std::path::Path| run_dir_of_server(Some(path)).unwrap_err().to_string();
    assert!(refused(&dir.path().join("nowhere")).contains("does not exist: mkdir -p"));
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    assert!(refused(&file).contains("is not a directory"));
    let deep = dir.path().join("d".repeat(100));
    std::fs::create_dir(&deep).unwrap();
    assert!(refused(&deep).contains("too long"));
    assert_eq!(run_dir_of_server(Some(dir.path())).unwrap(), dir.path());
}
