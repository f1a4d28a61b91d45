//! The back end: serves a port's socket and drives its [`Device`].
//!
//! One thread per port does everything: it accepts or connects, waits, and handles one message after the other. A front end
//! that sends half a message, or reads no answers, delays nobody but itself. A second front end on a socket in use is turned
//! away at once.

mod door;
mod handler;
mod memory;
mod refusal;
mod rings;
mod session;

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use vhost::vhost_user::BackendReqHandler;
use vhost::vhost_user::message::FrontendReq;

use crate::ProtocolFeatures;
use crate::device::Device;
use crate::socket::{ListeningSocket, Mode, SocketError, check_path};
use door::{Broken, Door, Message, Sight};
use session::Session;

/// Protocol features that a back end can offer. No IOTLB: front ends that need one are not served yet.
pub const SUPPORTED: ProtocolFeatures = ProtocolFeatures::MQ
    .union(ProtocolFeatures::LOG_SHMFD)
    .union(ProtocolFeatures::RARP)
    .union(ProtocolFeatures::REPLY_ACK)
    .union(ProtocolFeatures::MTU)
    .union(ProtocolFeatures::INFLIGHT_SHMFD)
    .union(ProtocolFeatures::RESET_DEVICE)
    .union(ProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(ProtocolFeatures::STATUS);

/// How long a front end may leave a message unfinished.
const HALF_MESSAGE: Duration = Duration::from_secs(5);

/// How a port is served.
#[derive(Clone, Debug)]
pub struct Options {
    /// The port's name, for logs.
    pub name: String,
    /// Protocol features on offer: a part of [`SUPPORTED`].
    pub protocol_features: ProtocolFeatures,
    /// Most bytes of guest memory that a front end may have mapped here.
    pub memory_limit: u64,
}

impl Options {
    /// Everything on offer, and no more guest memory than the machine has.
    pub fn new(name: &str) -> Self {
        let machine = nix::sys::sysinfo::sysinfo().map_or(1 << 36, |s| s.ram_total());
        Self { name: name.to_owned(), protocol_features: SUPPORTED, memory_limit: machine }
    }
}

/// Where a port meets its front end.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// The socket file.
    pub path: PathBuf,
    /// Who listens.
    pub mode: Mode,
}

/// A port that is being served, until this is stopped or dropped.
#[derive(Debug)]
pub struct SessionHandle {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

impl SessionHandle {
    /// Closes the connection, ends the thread and removes the socket file. When this returns, the device was told that its
    /// front end is gone, and was dropped.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for SessionHandle {
    fn drop(&mut self) {
        self.stop.now();
        if let Some(thread) = self.thread.take() {
            // A panic there was reported when it happened.
            let _ = thread.join();
        }
    }
}

/// Serves `device` at `endpoint`. A server's socket listens when this returns.
///
/// # Errors
/// The socket cannot be opened; a front end that is not there yet is no error.
pub fn serve(
    endpoint: Endpoint,
    options: Options,
    device: Box<dyn Device>,
) -> Result<SessionHandle, SocketError> {
    let listener = match &endpoint.mode {
        Mode::Server { mode, group } => Some(ListeningSocket::new(&endpoint.path, *mode, *group)?),
        Mode::Client { .. } => {
            check_path(&endpoint.path)?;
            None
        }
    };
    let stop = Arc::new(Stop::new().map_err(|e| SocketError::Thread(e.into()))?);
    // The kernel keeps 15 bytes of a thread's name.
    let name: String = format!("vhu-{}", options.name).chars().take(15).collect();
    let server = Server {
        endpoint,
        port: options.name.clone(),
        listener,
        session: Arc::new(Mutex::new(Session::new(options, device))),
        stop: stop.clone(),
    };
    let thread = std::thread::Builder::new()
        .name(name)
        .stack_size(256 << 10)
        .spawn(move || server.run())
        .map_err(SocketError::Thread)?;
    Ok(SessionHandle { stop, thread: Some(thread) })
}

/// Ends the thread wherever it waits.
#[derive(Debug)]
struct Stop {
    asked: AtomicBool,
    event: EventFd,
    /// The connection, to be shut down under a blocked read or write.
    connection: Mutex<Option<Arc<UnixStream>>>,
}

impl Stop {
    fn new() -> nix::Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self { asked: AtomicBool::new(false), event, connection: Mutex::new(None) })
    }

    fn now(&self) {
        self.asked.store(true, Ordering::SeqCst);
        // The counter cannot overflow: it is written once.
        let _ = self.event.write(1);
        if let Some(socket) = &*lock(&self.connection) {
            // It may be closed already.
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    }

    fn asked(&self) -> bool {
        self.asked.load(Ordering::SeqCst)
    }

    /// Remembers the connection; false if the thread was asked to end meanwhile.
    fn hold(&self, socket: Option<Arc<UnixStream>>) -> bool {
        *lock(&self.connection) = socket;
        !self.asked()
    }
}

/// Nothing here is left half-done by a panic: a poisoned lock is as good as another.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a connection is waiting for.
enum Event {
    Stop,
    Readable,
    TimedOut,
}

struct Server {
    endpoint: Endpoint,
    port: String,
    listener: Option<ListeningSocket>,
    session: Arc<Mutex<Session>>,
    stop: Arc<Stop>,
}

impl Server {
    fn run(self) {
        let mut absent = false;
        while !self.stop.asked() {
            let Some(stream) = self.meet(&mut absent) else { continue };
            absent = false;
            let socket = match stream.try_clone() {
                Ok(clone) => Arc::new(clone),
                Err(e) => {
                    lock(&self.session).complain(&format!("cannot keep a connection: {e}"));
                    continue;
                }
            };
            {
                let mut session = lock(&self.session);
                session.visit("front end connected");
                session.connected();
            }
            let reason = if self.stop.hold(Some(socket.clone())) {
                self.converse(stream, socket).unwrap_or_else(|broken| {
                    let reason = broken.to_string();
                    let mut session = lock(&self.session);
                    session.complain(&format!("session ended: {reason}"));
                    session.device.refused(&reason);
                    reason
                })
            } else {
                "the switch closed the port".to_owned()
            };
            self.stop.hold(None);
            let mut session = lock(&self.session);
            session.disconnected(&reason);
            session.visit(&format!("front end disconnected: {reason}"));
        }
    }

    /// Waits for a front end.
    fn meet(&self, absent: &mut bool) -> Option<UnixStream> {
        let Some(listener) = &self.listener else { return self.connect(absent) };
        match self.wait(&[listener.listener.as_fd()], None) {
            Event::Readable => listener.accept().unwrap_or_else(|e| {
                lock(&self.session).complain(&format!("cannot accept a connection: {e}"));
                // Out of descriptors, most likely: the connection still waits, and so do we.
                self.wait(&[], Some(Duration::from_millis(100)));
                None
            }),
            Event::Stop | Event::TimedOut => None,
        }
    }

    fn connect(&self, absent: &mut bool) -> Option<UnixStream> {
        match UnixStream::connect(&self.endpoint.path) {
            Ok(stream) => Some(stream),
            Err(e) => {
                if !std::mem::replace(absent, true) {
                    let path = self.endpoint.path.display();
                    tracing::info!("port {}: waiting for a front end at {path} ({e})", self.port);
                }
                let Mode::Client { retry } = self.endpoint.mode else { return None };
                self.wait(&[], Some(retry));
                None
            }
        }
    }

    /// Handles messages until the front end goes or breaks the protocol. Says why it ended.
    fn converse(&self, stream: UnixStream, socket: Arc<UnixStream>) -> Result<String, Broken> {
        let mut handler = BackendReqHandler::from_stream(stream, self.session.clone());
        let mut door = Door::new(socket.clone())?;
        let mut pause = Duration::from_millis(1);
        let mut since = Instant::now();
        loop {
            match door.look()? {
                Sight::Closed if self.stop.asked() => return Ok("the switch closed the port".to_owned()),
                Sight::Closed => return Ok("the front end closed the connection".to_owned()),
                Sight::Message(message) => {
                    self.handle(message, &mut door, &mut handler)?;
                    door.next()?;
                    pause = Duration::from_millis(1);
                    // One message, one look at who else knocks: a flood of messages does not keep them waiting.
                    self.turn_away();
                    if self.stop.asked() {
                        return Ok("the switch closed the port".to_owned());
                    }
                }
                // The rest of a message makes the socket no more readable than its beginning did: look again later.
                Sight::NotYet if door.in_the_middle() => {
                    if pause == Duration::from_millis(1) {
                        since = Instant::now();
                    }
                    if since.elapsed() > HALF_MESSAGE {
                        return Err(Broken::Unfinished(HALF_MESSAGE));
                    }
                    self.turn_away();
                    self.wait(&[], Some(pause));
                    pause = (pause * 2).min(Duration::from_millis(50));
                }
                Sight::NotYet => {
                    pause = Duration::from_millis(1);
                    let listener = self.listener.as_ref().map(|l| l.listener.as_fd());
                    let both = [Some(socket.as_fd()), listener];
                    self.wait(&both.into_iter().flatten().collect::<Vec<_>>(), None);
                    self.turn_away();
                }
            }
        }
    }

    fn handle(
        &self,
        message: Message,
        door: &mut Door,
        handler: &mut BackendReqHandler<Mutex<Session>>,
    ) -> Result<(), Broken> {
        let name = format!("{:?}", message.code);
        {
            let mut session = lock(&self.session);
            session.message.clone_from(&name);
            session.refused = None;
            if door.answer(message, &mut session)? {
                return Ok(());
            }
        }
        let result = handler.handle_request();
        let mut session = lock(&self.session);
        let answered = message.need_reply && session.acknowledges() && has_acknowledgement(message.code);
        match (result, session.refused.take()) {
            (Ok(()), None) => Ok(()),
            (Ok(()), Some(refusal)) => {
                session.report(&refusal);
                Ok(())
            }
            (Err(_), Some(refusal)) if answered || refusal.is_about_a_ring_alone() => {
                session.report(&refusal);
                Ok(())
            }
            (Err(_), Some(refusal)) => Err(Broken::Refused { message: name, refusal }),
            (Err(error), None) => Err(Broken::Malformed { message: name, error }),
        }
    }

    /// Closes connections that came while one is served.
    fn turn_away(&self) {
        let Some(listener) = &self.listener else { return };
        for _ in 0..16 {
            match listener.accept() {
                Ok(Some(_closed)) => {
                    lock(&self.session).complain("turned away a second front end: one is connected");
                }
                Ok(None) | Err(_) => return,
            }
        }
    }

    /// Waits until one of `fds` is readable, the thread is asked to end or the time is up.
    fn wait(&self, fds: &[BorrowedFd<'_>], time: Option<Duration>) -> Event {
        let stop = [self.stop.event.as_fd()];
        let all = stop.iter().chain(fds);
        let mut fds: Vec<_> = all.map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
        let timeout =
            time.map_or(PollTimeout::NONE, |t| PollTimeout::try_from(t).unwrap_or(PollTimeout::MAX));
        match poll(&mut fds, timeout) {
            Ok(0) => Event::TimedOut,
            _ if self.stop.asked() => Event::Stop,
            _ => Event::Readable,
        }
    }
}

/// Whether a front end that wants one gets a plain acknowledgement, by which it learns of a refusal. The others are answered
/// with what they ask for, and there is no way to say no.
fn has_acknowledgement(code: FrontendReq) -> bool {
    !matches!(
        code,
        FrontendReq::GET_FEATURES
            | FrontendReq::GET_QUEUE_NUM
            | FrontendReq::GET_VRING_BASE
            | FrontendReq::GET_INFLIGHT_FD
            | FrontendReq::GET_MAX_MEM_SLOTS
            | FrontendReq::SET_LOG_BASE
    )
}

/// The mode and place of a socket, as a user reads it.
impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let who = match self.mode {
            Mode::Server { .. } => "server",
            Mode::Client { .. } => "client",
        };
        write!(f, "{} ({who})", Path::display(&self.path))
    }
}
