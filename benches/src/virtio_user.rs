//! The ports that measuring tools use: our virtio-user driver, on a socket of any switch.

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use host::memory::Pages;
use pmd::virtio_user::{Buffer, OpenError, Options, QueuePair, SocketMode, VirtioUser};
use serde::Serialize;
use virtio::device::Layout;

use crate::endpoint::{Bytes, Endpoint, FrameBuffer};
use crate::frame;

/// Ring layouts, as a user names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Ring {
    /// Split rings.
    Split,
    /// Packed rings.
    Packed,
}

impl fmt::Display for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Ring::Split => "split",
            Ring::Packed => "packed",
        })
    }
}

impl FromStr for Ring {
    type Err = &'static str;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "split" => Ok(Ring::Split),
            "packed" => Ok(Ring::Packed),
            _ => Err("rings are split or packed"),
        }
    }
}

/// What a tool's port is like.
#[derive(Clone, Copy, Debug)]
pub struct PortOptions {
    /// Whether we open the socket, and the switch connects to it.
    pub listen: bool,
    /// Ring layout.
    pub ring: Ring,
    /// Entries of each ring.
    pub queue_size: u16,
    /// The largest frame, in bytes without FCS.
    pub largest: usize,
    /// How long to wait for the switch.
    pub timeout: Duration,
}

/// Opens the port of `side` (0 or 1) on a socket.
///
/// # Errors
/// See [`OpenError`].
pub fn open(path: &Path, side: u8, options: PortOptions) -> Result<VirtioUser, OpenError> {
    // 64 bytes lie before the frame. Frames of every size fit one buffer.
    let room = options.largest.clamp(frame::SMALLEST, frame::LARGEST) + 64;
    let wanted = Options {
        mode: if options.listen { SocketMode::Listen } else { SocketMode::Connect },
        layout: match options.ring {
            Ring::Split => Layout::Split,
            Ring::Packed => Layout::Packed,
        },
        queue_size: options.queue_size,
        mac: frame::mac(side, 0),
        // Both rings full, and a few bursts in hand.
        buffers: 2 * u32::from(options.queue_size) + 256,
        buffer_size: u32::try_from(room.next_multiple_of(1024).max(2048)).unwrap_or(16_384),
        pages: Pages::Auto,
        timeout: options.timeout,
        ..Options::default()
    };
    VirtioUser::open(path, wanted)
}

/// What people read of a port: ring layout, size, pages.
pub fn describe(options: PortOptions, device: &VirtioUser) -> Vec<(&'static str, String)> {
    vec![
        ("Rings", format!("{}, {} entries", options.ring, options.queue_size)),
        ("Memory", format!("rings and buffers in {}", device.pages())),
    ]
}

impl Endpoint for QueuePair {
    type Buffer = Buffer;

    #[inline(always)]
    fn receive(&mut self, into: &mut Vec<Buffer>, max: usize) -> usize {
        QueuePair::receive(self, into, max)
    }

    #[inline(always)]
    fn transmit(&mut self, from: &mut Vec<Buffer>) -> usize {
        QueuePair::transmit(self, from)
    }

    #[inline(always)]
    fn allocate(&mut self) -> Option<Buffer> {
        QueuePair::allocate(self)
    }

    #[inline(always)]
    fn free(&mut self, buffer: Buffer) {
        QueuePair::free(self, buffer);
    }

    #[inline(always)]
    fn frame(&self, buffer: &Buffer) -> impl Bytes {
        Shared { pair: self, buffer }
    }

    #[inline(always)]
    fn frame_mut(&mut self, buffer: &mut Buffer) -> impl FrameBuffer {
        Exclusive { pair: self, buffer }
    }
}

struct Shared<'p, 'b> {
    pair: &'p QueuePair,
    buffer: &'b Buffer,
}

struct Exclusive<'p, 'b> {
    pair: &'p mut QueuePair,
    buffer: &'b mut Buffer,
}

#[inline(always)]
fn load<const N: usize>(pair: &QueuePair, buffer: &Buffer, at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    let there = pair.capacity(buffer).saturating_sub(at).min(N);
    if there == N {
        pair.read(buffer, at, &mut bytes);
    } else if let Some(part) = bytes.get_mut(..there) {
        pair.read(buffer, at, part);
    }
    bytes
}

impl Bytes for Shared<'_, '_> {
    #[inline(always)]
    fn len(&self) -> usize {
        self.buffer.len()
    }

    #[inline(always)]
    fn load<const N: usize>(&self, at: usize) -> [u8; N] {
        load(self.pair, self.buffer, at)
    }
}

impl Bytes for Exclusive<'_, '_> {
    #[inline(always)]
    fn len(&self) -> usize {
        self.buffer.len()
    }

    #[inline(always)]
    fn load<const N: usize>(&self, at: usize) -> [u8; N] {
        load(self.pair, self.buffer, at)
    }
}

impl FrameBuffer for Exclusive<'_, '_> {
    #[inline(always)]
    fn set_len(&mut self, len: usize) {
        self.pair.set_len(self.buffer, len);
    }

    #[inline(always)]
    fn store<const N: usize>(&mut self, at: usize, bytes: [u8; N]) {
        if self.pair.capacity(self.buffer) >= at + N {
            self.pair.write(self.buffer, at, &bytes);
        }
    }
}
