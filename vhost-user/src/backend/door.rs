//! The door of a session: every message is looked at here, whole, before it goes to the `vhost` crate or is answered by us.
//!
//! The crate reads with blocking calls and gives up on a message that arrives in pieces, so nothing goes to it before all of
//! it is there. It lacks NET_SET_MTU, SEND_RARP, SET_STATUS, GET_STATUS and SET_LOG_FD; it refuses SET_VRING_ENABLE before
//! SET_FEATURES, which is QEMU's order; it always offers REPLY_ACK; and of a queue index in SET_VRING_KICK, CALL and ERR it
//! reads only the lowest byte. What is wrong there is put right here, and nowhere else.
//!
//! Looking is MSG_PEEK without a control buffer (with one, descriptors would be duplicated) and SO_PEEK_OFF, without which a
//! message that arrives in pieces could not be seen past its first piece.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use nix::sys::socket::{MsgFlags, recv};
use vhost::vhost_user::message::{FrontendReq, MAX_MSG_SIZE};

use super::refusal::Refusal;
use super::session::Session;
use crate::wire::{self, HEADER, NEED_REPLY, REPLY, VERSION, VERSION_MASK};

/// What the door sees.
pub(super) enum Sight {
    /// A whole message.
    Message(Message),
    /// Part of one, or nothing.
    NotYet,
    /// The front end closed, after a whole message.
    Closed,
}

/// The header of a message, checked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Message {
    pub(super) code: FrontendReq,
    pub(super) need_reply: bool,
    size: usize,
}

/// What makes a session impossible to go on with.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    #[error("the front end closed in the middle of a message")]
    HalfMessage,
    #[error("the front end left a message unfinished for {} s", .0.as_secs())]
    Unfinished(std::time::Duration),
    #[error("header {0:x?} is no vhost-user message")]
    Header([u32; 3]),
    #[error("{message}: {refusal}")]
    Refused { message: String, refusal: Refusal },
    #[error("{message}: {error}")]
    Malformed { message: String, error: vhost::vhost_user::Error },
    #[error("socket: {0}")]
    Socket(#[from] nix::Error),
}

/// One connection.
pub(super) struct Door {
    socket: Arc<UnixStream>,
    seen: [u8; HEADER + MAX_MSG_SIZE],
    have: usize,
}

impl Door {
    pub(super) fn new(socket: Arc<UnixStream>) -> Result<Self, Broken> {
        let mut door = Self { socket, seen: [0; HEADER + MAX_MSG_SIZE], have: 0 };
        door.next()?;
        Ok(door)
    }

    /// Begins to look at the next message.
    pub(super) fn next(&mut self) -> Result<(), Broken> {
        self.have = 0;
        let (begin, len) = (0_i32, size_of::<i32>() as libc::socklen_t);
        let value = std::ptr::from_ref(&begin).cast();
        // SAFETY: the kernel reads `len` bytes of `begin`.
        let set = unsafe {
            libc::setsockopt(self.socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEEK_OFF, value, len)
        };
        nix::Error::result(set)?;
        Ok(())
    }

    /// Whether part of a message was seen.
    pub(super) fn in_the_middle(&self) -> bool {
        self.have > 0
    }

    fn word(&self, at: usize) -> u32 {
        let bytes = self.seen.get(at..).and_then(|b| b.first_chunk::<4>());
        bytes.map_or(0, |b| u32::from_ne_bytes(*b))
    }

    fn wide(&self, at: usize) -> u64 {
        let bytes = self.seen.get(at..).and_then(|b| b.first_chunk::<8>());
        bytes.map_or(0, |b| u64::from_ne_bytes(*b))
    }

    /// Looks for a whole message, without taking anything from the socket or waiting.
    pub(super) fn look(&mut self) -> Result<Sight, Broken> {
        loop {
            let need = if self.have < HEADER {
                HEADER
            } else {
                let header = [self.word(0), self.word(4), self.word(8)];
                let [code, flags, size] = header;
                let broken = Broken::Header(header);
                let Ok(code) = FrontendReq::try_from(code) else { return Err(broken) };
                let size = size as usize;
                let known = VERSION_MASK | REPLY | NEED_REPLY;
                if flags & !known != 0 || flags & (VERSION_MASK | REPLY) != VERSION || size > MAX_MSG_SIZE {
                    return Err(broken);
                }
                if self.have == HEADER + size {
                    return Ok(Sight::Message(Message { code, need_reply: flags & NEED_REPLY != 0, size }));
                }
                HEADER + size
            };
            let Some(room) = self.seen.get_mut(self.have..need) else { return Ok(Sight::NotYet) };
            match recv(self.socket.as_raw_fd(), room, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
                Ok(0) if self.have == 0 => return Ok(Sight::Closed),
                Ok(0) => return Err(Broken::HalfMessage),
                Ok(n) => self.have += n,
                Err(nix::Error::EAGAIN) => return Ok(Sight::NotYet),
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::ECONNRESET) if self.have == 0 => return Ok(Sight::Closed),
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Handles the message that was seen if it is one of ours; false if it is for the crate.
    pub(super) fn answer(&mut self, message: Message, session: &mut Session) -> Result<bool, Broken> {
        let descriptors = match message.code {
            FrontendReq::SET_LOG_FD => 1,
            FrontendReq::GET_PROTOCOL_FEATURES
            | FrontendReq::SET_VRING_ENABLE
            | FrontendReq::NET_SET_MTU
            | FrontendReq::SEND_RARP
            | FrontendReq::SET_STATUS
            | FrontendReq::GET_STATUS => 0,
            FrontendReq::SET_VRING_KICK | FrontendReq::SET_VRING_CALL | FrontendReq::SET_VRING_ERR => {
                // Bits 0 to 7 are the index, bit 8 says that there is no descriptor.
                let index = self.wide(HEADER) & !0x100;
                if message.size != 8 || index <= 0xff {
                    return Ok(false);
                }
                self.take(message)?;
                let refusal = Refusal::NoSuchQueue { index, queues: session.rings.len() };
                self.acknowledge(message, session, Err(refusal))?;
                return Ok(true);
            }
            _ => return Ok(false),
        };
        let got = self.take(message)?.len();
        if got != descriptors {
            let refusal = Refusal::Descriptors { got, wanted: descriptors };
            return Err(Broken::Refused { message: session.message.clone(), refusal });
        }
        self.perform(message, session)?;
        Ok(true)
    }

    fn perform(&mut self, message: Message, session: &mut Session) -> Result<(), Broken> {
        let payload = |wanted: usize| {
            let refusal = Refusal::Payload { got: message.size, wanted };
            let broken = Broken::Refused { message: format!("{:?}", message.code), refusal };
            if message.size == wanted { Ok(()) } else { Err(broken) }
        };
        let value = self.wide(HEADER);
        match message.code {
            FrontendReq::GET_PROTOCOL_FEATURES => {
                payload(0)?;
                self.reply(message, session.offered_protocol().bits())
            }
            FrontendReq::GET_STATUS => {
                payload(0)?;
                match session.status() {
                    Ok(status) => self.reply(message, status),
                    Err(refusal) => Err(Broken::Refused { message: session.message.clone(), refusal }),
                }
            }
            FrontendReq::SET_VRING_ENABLE => {
                payload(8)?;
                let result = session.set_enabled(self.word(HEADER), self.word(HEADER + 4));
                self.acknowledge(message, session, result)
            }
            code => {
                payload(8)?;
                let result = match code {
                    FrontendReq::NET_SET_MTU => session.set_mtu(value),
                    FrontendReq::SEND_RARP => session.announce(value),
                    FrontendReq::SET_STATUS => session.set_status(value),
                    // SET_LOG_FD: an eventfd that says that the log has news. A front end looks when it wants to; none needs it.
                    _ => Ok(()),
                };
                self.acknowledge(message, session, result)
            }
        }
    }

    /// Answers if the front end wants to know, and otherwise ends the session over a refusal.
    fn acknowledge(
        &mut self,
        message: Message,
        session: &mut Session,
        result: Result<(), Refusal>,
    ) -> Result<(), Broken> {
        let answered = message.need_reply && session.acknowledges();
        if answered {
            self.reply(message, u64::from(result.is_err()))?;
        }
        match result {
            Ok(()) => Ok(()),
            Err(refusal) if answered => {
                session.report(&refusal);
                Ok(())
            }
            Err(refusal) => Err(Broken::Refused { message: session.message.clone(), refusal }),
        }
    }

    /// Takes the message that was seen from the socket, with all its descriptors.
    fn take(&mut self, message: Message) -> Result<Vec<OwnedFd>, Broken> {
        let mut descriptors = Vec::new();
        let mut bytes = [0; HEADER + MAX_MSG_SIZE];
        let mut left = bytes.get_mut(..HEADER + message.size).unwrap_or_default();
        while !left.is_empty() {
            let n = wire::receive(&self.socket, left, &mut descriptors)?;
            if n == 0 {
                return Err(Broken::HalfMessage);
            }
            left = left.get_mut(n..).unwrap_or_default();
        }
        Ok(descriptors)
    }

    fn reply(&mut self, message: Message, value: u64) -> Result<(), Broken> {
        let bytes = wire::encode(message.code.into(), REPLY, &value.to_ne_bytes());
        Ok(wire::send(&self.socket, &bytes, &[])?)
    }
}
