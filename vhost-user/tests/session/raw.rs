//! A front end that sends exactly the bytes and descriptors that a test wants.

use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use vhost::vhost_user::message::FrontendReq;

use vhost_user::ProtocolFeatures;
use vhost_user::backend::SUPPORTED;
use virtio::features;

/// The user address at which [`Raw::memory`] says that the front end sees guest address 0.
pub(crate) const USER: u64 = 0x10_0000_0000;

pub(crate) fn event() -> EventFd {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC).unwrap()
}

pub(crate) fn memfd(size: u64) -> OwnedFd {
    let fd = nix::sys::memfd::memfd_create(c"guest", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
    nix::unistd::ftruncate(&fd, size as i64).unwrap();
    fd
}

/// Words of a payload.
pub(crate) fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_ne_bytes()).collect()
}

pub(crate) fn wide(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_ne_bytes()).collect()
}

pub(crate) struct Raw {
    pub(crate) stream: UnixStream,
}

/// An answer: its payload and the descriptors that came with it.
pub(crate) struct Answer {
    pub(crate) payload: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

impl Answer {
    pub(crate) fn value(&self) -> u64 {
        u64::from_ne_bytes(self.payload[..8].try_into().unwrap())
    }
}

impl Raw {
    pub(crate) fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(60))).unwrap();
        Self { stream }
    }

    pub(crate) fn bytes(code: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = words(&[code, flags, payload.len() as u32]);
        bytes.extend_from_slice(payload);
        bytes
    }

    /// Sends a message as it is; false if the session was closed.
    pub(crate) fn send(
        &mut self,
        code: FrontendReq,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> bool {
        let bytes = Self::bytes(code.into(), flags, payload);
        self.send_bytes(&bytes, fds)
    }

    pub(crate) fn send_bytes(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        let fds: Vec<RawFd> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
        let control = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() { &[][..] } else { &control[..] };
        let fd = self.stream.as_raw_fd();
        sendmsg::<()>(fd, &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None).is_ok()
    }

    /// Sends bytes however slowly.
    pub(crate) fn dribble(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.stream.write_all(&[*byte]).unwrap();
        }
    }

    /// Reads an answer to `code`; `None` if the session was closed.
    pub(crate) fn answer(&mut self, code: FrontendReq) -> Option<Answer> {
        let mut header = [0; 12];
        let mut fds = Vec::new();
        let mut control = nix::cmsg_space!([RawFd; 4]);
        let mut got = 0;
        while got < 12 {
            let mut iov = [std::io::IoSliceMut::new(&mut header[got..])];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let fd = self.stream.as_raw_fd();
            let m = match nix::sys::socket::recvmsg::<()>(fd, &mut iov, Some(&mut control), flags) {
                Ok(m) => m,
                Err(nix::Error::ECONNRESET) => return None,
                Err(e) => panic!("no answer to {code:?}: {e}"),
            };
            for part in m.cmsgs().unwrap() {
                if let nix::sys::socket::ControlMessageOwned::ScmRights(raw) = part {
                    // SAFETY: just made for us.
                    fds.extend(raw.into_iter().map(|fd| unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) }));
                }
            }
            if m.bytes == 0 {
                return None;
            }
            got += m.bytes;
        }
        let word = |i: usize| u32::from_ne_bytes(header[i * 4..i * 4 + 4].try_into().unwrap());
        assert_eq!((word(0), word(1) & 7), (code.into(), 5), "an answer to {code:?}");
        let mut payload = vec![0; word(2) as usize];
        self.stream.read_exact(&mut payload).unwrap();
        Some(Answer { payload, fds })
    }

    /// Sends a message that is answered with a value.
    pub(crate) fn get(&mut self, code: FrontendReq) -> u64 {
        assert!(self.send(code, 1, &[], &[]));
        self.answer(code).expect("an answer").value()
    }

    /// Sends a message and asks for an acknowledgement: 0 is yes. `None`: the session was closed.
    pub(crate) fn ask(&mut self, code: FrontendReq, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Option<u64> {
        self.send(code, 9, payload, fds);
        self.answer(code).map(|a| a.value())
    }

    /// As [`Self::ask`], and it must be accepted.
    #[track_caller]
    pub(crate) fn must(&mut self, code: FrontendReq, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        assert_eq!(self.ask(code, payload, fds), Some(0), "{code:?}");
    }

    /// Whether the other side closed.
    pub(crate) fn is_closed(&mut self) -> bool {
        let mut byte = [0];
        match self.stream.read(&mut byte) {
            Ok(n) => n == 0,
            Err(e) => e.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }

    pub(crate) fn negotiate(&mut self, features: u64) {
        self.negotiate_protocol(features, SUPPORTED);
    }

    pub(crate) fn negotiate_protocol(&mut self, features: u64, protocol: ProtocolFeatures) {
        assert!(self.send(FrontendReq::SET_OWNER, 1, &[], &[]));
        let offered = self.get(FrontendReq::GET_FEATURES);
        assert_eq!(features & !offered, 0);
        let protocol = self.get(FrontendReq::GET_PROTOCOL_FEATURES) & protocol.bits();
        assert!(self.send(FrontendReq::SET_PROTOCOL_FEATURES, 1, &wide(&[protocol]), &[]));
        let features = features | features::VHOST_USER_PROTOCOL_FEATURES;
        self.must(FrontendReq::SET_FEATURES, &wide(&[features]), &[]);
    }

    pub(crate) fn memory(&mut self, size: u64) -> OwnedFd {
        let fd = memfd(size);
        let payload = [words(&[1, 0]), wide(&[0, size, USER, 0])].concat();
        self.must(FrontendReq::SET_MEM_TABLE, &payload, &[fd.as_fd()]);
        fd
    }

    /// Everything a ring of 256 needs, at page `index * 8`, and starts it.
    pub(crate) fn ring(&mut self, index: u32) -> (EventFd, EventFd) {
        let (call, kick) = (event(), event());
        self.set_up_ring(index, 256, 0);
        self.must(FrontendReq::SET_VRING_CALL, &wide(&[index.into()]), &[call.as_fd()]);
        self.must(FrontendReq::SET_VRING_KICK, &wide(&[index.into()]), &[kick.as_fd()]);
        (call, kick)
    }

    pub(crate) fn set_up_ring(&mut self, index: u32, size: u32, base: u32) {
        self.must(FrontendReq::SET_VRING_NUM, &words(&[index, size]), &[]);
        self.must(FrontendReq::SET_VRING_BASE, &words(&[index, base]), &[]);
        self.must(FrontendReq::SET_VRING_ADDR, &addresses(index, 0, 0), &[]);
    }
}

/// SET_VRING_ADDR of a ring of up to 256 at page `index * 8` of [`Raw::memory`].
pub(crate) fn addresses(index: u32, flags: u32, log: u64) -> Vec<u8> {
    let at = USER + u64::from(index) * 0x8000;
    [words(&[index, flags]), wide(&[at, at + 0x2000, at + 0x1000, log])].concat()
}
