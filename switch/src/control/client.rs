//! The client of the control socket, for the commands that ask a running switch.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::CONTROL_SOCKET;
use super::report::Failure;

/// A switch answers a question at once, and a reload within this time; otherwise it hangs.
const ANSWER_TIME: Duration = Duration::from_secs(10);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("no switch is running in {}: start one with `cableway switch FILE`, or say where it runs with --run-dir", .0.display())]
    NotRunning(PathBuf),
    /// We may not ask.
    #[error("{} is not permitted to this user: its owner and group may ask", .0.display())]
    NotPermitted(PathBuf),
    /// The switch said no, and why.
    #[error("{0}")]
    Refused(String),
    /// The conversation failed.
    #[error("asking the switch at {}: {reason}", socket.display())]
    Broken {
        /// Its socket.
        socket: PathBuf,
        /// What went wrong.
        reason: String,
    },
}

/// What the switch answered.
pub struct Answer<T> {
    /// Its JSON, as it came.
    pub json: String,
    /// The same, understood.
    pub value: T,
}

/// Asks the switch of a run directory for `path` (`/v1/stats`).
///
/// # Errors
/// There is no answer, or it is no.
pub fn get<T: DeserializeOwned>(run_dir: &Path, path: &str) -> Result<Answer<T>, ClientError> {
    ask(run_dir, Method::GET, path)
}

/// Tells the switch of a run directory to do `path` (`/v1/reload`).
///
/// # Errors
/// There is no answer, or it is no.
pub fn post<T: DeserializeOwned>(run_dir: &Path, path: &str) -> Result<Answer<T>, ClientError> {
    ask(run_dir, Method::POST, path)
}

/// Tells the switch of a run directory to end `path` (`/v1/captures/7`).
///
/// # Errors
/// There is no answer, or it is no.
pub fn delete<T: DeserializeOwned>(run_dir: &Path, path: &str) -> Result<Answer<T>, ClientError> {
    ask(run_dir, Method::DELETE, path)
}

/// Asks for `path` where the answer is no text (`/v1/captures/7`).
///
/// # Errors
/// There is no answer, or it is no.
pub fn get_bytes(run_dir: &Path, path: &str) -> Result<Bytes, ClientError> {
    answer(run_dir, Method::GET, path)
}

fn ask<T: DeserializeOwned>(run_dir: &Path, method: Method, path: &str) -> Result<Answer<T>, ClientError> {
    let broken = |reason: String| ClientError::Broken { socket: run_dir.join(CONTROL_SOCKET), reason };
    let body = answer(run_dir, method, path)?;
    let json = String::from_utf8(body.into()).map_err(|_| broken("the answer is not text".to_owned()))?;
    let value = serde_json::from_str(&json)
        .map_err(|error| broken(format!("not understood ({error}); is it another version?")))?;
    Ok(Answer { json, value })
}

/// The body of an answer that is a success.
fn answer(run_dir: &Path, method: Method, path: &str) -> Result<Bytes, ClientError> {
    let socket = run_dir.join(CONTROL_SOCKET);
    let broken = |reason: String| ClientError::Broken { socket: socket.clone(), reason };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| broken(error.to_string()))?;
    let conversation = async { tokio::time::timeout(ANSWER_TIME, converse(&socket, method, path)).await };
    let (status, body) = match runtime.block_on(conversation) {
        Err(_) => return Err(broken(format!("no answer within {} s", ANSWER_TIME.as_secs()))),
        Ok(Err(Failed::Connect(error))) => {
            return Err(match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    ClientError::NotRunning(run_dir.to_owned())
                }
                io::ErrorKind::PermissionDenied => ClientError::NotPermitted(socket),
                _ => broken(error.to_string()),
            });
        }
        Ok(Err(Failed::Http(reason))) => return Err(broken(reason)),
        Ok(Ok(answer)) => answer,
    };
    if status.is_success() {
        return Ok(body);
    }
    let failure = serde_json::from_slice::<Failure>(&body);
    let otherwise = |_| broken(format!("{status}: {}", String::from_utf8_lossy(&body)));
    Err(failure.map_or_else(otherwise, |f| ClientError::Refused(f.error)))
}

enum Failed {
    Connect(io::Error),
    Http(String),
}

impl<E: std::error::Error> From<E> for Failed {
    fn from(error: E) -> Self {
        Failed::Http(error.to_string())
    }
}

async fn converse(socket: &Path, method: Method, path: &str) -> Result<(StatusCode, Bytes), Failed> {
    let stream = UnixStream::connect(socket).await.map_err(Failed::Connect)?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request =
        Request::builder().method(method).uri(path).header("host", "cableway").body(Empty::<Bytes>::new())?;
    let answer = sender.send_request(request).await?;
    let status = answer.status();
    Ok((status, answer.into_body().collect().await?.to_bytes()))
}
