//! The client of a control socket, for the commands that ask a running process.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::{HeaderMap, Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::{Door, Failure};

/// A question is answered at once, and what takes longer (a reload, a machine that comes to rest) within this time; otherwise
/// the process hangs.
const ANSWER_TIME: Duration = Duration::from_secs(15);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("{0}")]
    NotRunning(String),
    /// We may not ask.
    #[error("{} is not permitted to this user: its owner and group may ask", .0.display())]
    NotPermitted(PathBuf),
    /// It said no, and why.
    #[error("{0}")]
    Refused(String),
    /// The conversation failed.
    #[error("asking the {what} at {}: {reason}", socket.display())]
    Broken {
        /// What it is.
        what: String,
        /// Its socket.
        socket: PathBuf,
        /// What went wrong.
        reason: String,
    },
}

/// What was answered.
pub struct Answer<T> {
    /// Its JSON, as it came.
    pub json: String,
    /// The same, understood.
    pub value: T,
}

/// Asks for `path` (`/v1/stats`).
///
/// # Errors
/// There is no answer, or it is no.
pub fn get<T: DeserializeOwned>(door: &Door, path: &str) -> Result<Answer<T>, ClientError> {
    ask(door, Method::GET, path, Bytes::new(), ANSWER_TIME)
}

/// Asks for `path`, and waits so long and no longer: for who asks many, of which one may hang.
///
/// # Errors
/// There is no answer in time, or it is no.
pub fn get_within<T: DeserializeOwned>(
    door: &Door,
    path: &str,
    patience: Duration,
) -> Result<Answer<T>, ClientError> {
    ask(door, Method::GET, path, Bytes::new(), patience)
}

/// Tells it to do `path` (`/v1/reload`).
///
/// # Errors
/// There is no answer, or it is no.
pub fn post<T: DeserializeOwned>(door: &Door, path: &str) -> Result<Answer<T>, ClientError> {
    ask(door, Method::POST, path, Bytes::new(), ANSWER_TIME)
}

/// Gives `path` these bytes.
///
/// # Errors
/// There is no answer, or it is no.
pub fn post_bytes<T: DeserializeOwned>(
    door: &Door,
    path: &str,
    bytes: &[u8],
) -> Result<Answer<T>, ClientError> {
    ask(door, Method::POST, path, Bytes::copy_from_slice(bytes), ANSWER_TIME)
}

/// Tells it to end `path` (`/v1/captures/7`).
///
/// # Errors
/// There is no answer, or it is no.
pub fn delete<T: DeserializeOwned>(door: &Door, path: &str) -> Result<Answer<T>, ClientError> {
    ask(door, Method::DELETE, path, Bytes::new(), ANSWER_TIME)
}

/// Asks for `path` where the answer is no text (`/v1/captures/7`).
///
/// # Errors
/// There is no answer, or it is no.
pub fn get_bytes(door: &Door, path: &str) -> Result<Bytes, ClientError> {
    Ok(answer(door, Method::GET, path, Bytes::new(), ANSWER_TIME)?.1)
}

/// The same, with the number that the header `name` of the answer has.
///
/// # Errors
/// There is no answer, or it is no, or has no such header.
pub fn get_bytes_at(door: &Door, path: &str, name: &str) -> Result<(u64, Bytes), ClientError> {
    let (headers, body) = answer(door, Method::GET, path, Bytes::new(), ANSWER_TIME)?;
    let number = headers.get(name).and_then(|value| value.to_str().ok()?.parse().ok());
    let number = number.ok_or_else(|| broken(door, format!("the answer has no {name}")))?;
    Ok((number, body))
}

fn broken(door: &Door, reason: String) -> ClientError {
    ClientError::Broken { what: door.what.clone(), socket: door.socket.clone(), reason }
}

fn ask<T: DeserializeOwned>(
    door: &Door,
    method: Method,
    path: &str,
    bytes: Bytes,
    patience: Duration,
) -> Result<Answer<T>, ClientError> {
    let (_, body) = answer(door, method, path, bytes, patience)?;
    let json =
        String::from_utf8(body.into()).map_err(|_| broken(door, "the answer is not text".to_owned()))?;
    let value = serde_json::from_str(&json)
        .map_err(|error| broken(door, format!("not understood ({error}); is it another version?")))?;
    Ok(Answer { json, value })
}

/// Headers and body of an answer that is a success.
fn answer(
    door: &Door,
    method: Method,
    path: &str,
    bytes: Bytes,
    patience: Duration,
) -> Result<(HeaderMap, Bytes), ClientError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| broken(door, error.to_string()))?;
    let conversation =
        async { tokio::time::timeout(patience, converse(&door.socket, method, path, bytes)).await };
    let (status, headers, body) = match runtime.block_on(conversation) {
        Err(_) => return Err(broken(door, format!("no answer within {} s", patience.as_secs()))),
        Ok(Err(Failed::Connect(error))) => {
            return Err(match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    ClientError::NotRunning(door.absent.clone())
                }
                io::ErrorKind::PermissionDenied => ClientError::NotPermitted(door.socket.clone()),
                _ => broken(door, error.to_string()),
            });
        }
        Ok(Err(Failed::Http(reason))) => return Err(broken(door, reason)),
        Ok(Ok(answer)) => answer,
    };
    if status.is_success() {
        return Ok((headers, body));
    }
    let failure = serde_json::from_slice::<Failure>(&body);
    let otherwise = |_| broken(door, format!("{status}: {}", String::from_utf8_lossy(&body)));
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

async fn converse(
    socket: &Path,
    method: Method,
    path: &str,
    bytes: Bytes,
) -> Result<(StatusCode, HeaderMap, Bytes), Failed> {
    let stream = UnixStream::connect(socket).await.map_err(Failed::Connect)?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request =
        Request::builder().method(method).uri(path).header("host", "cableway").body(Full::new(bytes))?;
    let answer = sender.send_request(request).await?;
    let (status, headers) = (answer.status(), answer.headers().clone());
    Ok((status, headers, answer.into_body().collect().await?.to_bytes()))
}
