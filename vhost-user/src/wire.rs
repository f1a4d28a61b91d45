//! Messages as bytes on a socket (vhost-user, "Message Specification"): header, payload, descriptors.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

/// Bytes of a header: request, flags, size of the payload.
pub(crate) const HEADER: usize = 12;
/// Flags of a header: the only version there is.
pub(crate) const VERSION: u32 = 1;
/// Bits of the version.
pub(crate) const VERSION_MASK: u32 = 3;
/// This is an answer.
pub(crate) const REPLY: u32 = 4;
/// An answer is wanted.
pub(crate) const NEED_REPLY: u32 = 8;

/// Most descriptors that Linux lets a message carry (SCM_MAX_FD).
const MAX_DESCRIPTORS: usize = 253;

/// A message's bytes.
pub(crate) fn encode(code: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + payload.len());
    // Payloads are at most a page.
    for word in [code, VERSION | flags, payload.len() as u32] {
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    bytes.extend_from_slice(payload);
    bytes
}

/// Sends all of `bytes`, with `descriptors` at the first.
pub(crate) fn send(socket: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> nix::Result<()> {
    let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let attached = [ControlMessage::ScmRights(&raw)];
    let mut control = if raw.is_empty() { &[][..] } else { &attached[..] };
    let mut left = bytes;
    while !left.is_empty() {
        match sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(left)], control, MsgFlags::MSG_NOSIGNAL, None)
        {
            Ok(n) => {
                left = left.get(n..).unwrap_or_default();
                control = &[];
            }
            Err(nix::Error::EINTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Receives up to `bytes.len()` bytes, and takes every descriptor that came with them. Never waits.
pub(crate) fn receive(
    socket: &UnixStream,
    bytes: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
) -> nix::Result<usize> {
    let mut control = nix::cmsg_space!([RawFd; MAX_DESCRIPTORS]);
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let mut iov = [IoSliceMut::new(bytes)];
    let received = recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut control), flags)?;
    for part in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = part {
            // SAFETY: the kernel just made these descriptors for us, and nobody else knows them.
            descriptors.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok(received.bytes)
}
