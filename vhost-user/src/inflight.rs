//! The inflight region (vhost-user, "Inflight I/O tracking"): where a back end keeps, in memory that outlives it, what it was
//! doing. A packed ring writes its position there (see [`virtio::device::InflightArea`]); split rings have theirs in the used
//! ring, and only get the space that the protocol wants.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use virtio::device::{InflightArea, Layout};
use virtio::memory::HostRange;

use crate::mapping::{Mapping, MappingError};

/// Bytes of a queue's header, split and packed, and of each descriptor's state.
const SPLIT_HEADER: u64 = 16;
const SPLIT_STATE: u64 = 16;
const PACKED_HEADER: u64 = 32;
const PACKED_STATE: u64 = 32;
/// Each queue's part begins on a cache line.
const ALIGN: u64 = 64;

/// Why an inflight region was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InflightError {
    /// Not as many queues as there are, or a size that no ring has.
    #[error("{queues} queues of {size} descriptors are impossible, this port has {max} queues")]
    Shape {
        /// Queues asked for.
        queues: u16,
        /// Descriptors asked for.
        size: u16,
        /// Queues there are.
        max: usize,
    },
    /// Too few bytes for the queues.
    #[error("{given:#x} bytes are too few for {queues} queues of {size} descriptors ({needed:#x})")]
    TooSmall {
        /// Bytes given.
        given: u64,
        /// Queues.
        queues: u16,
        /// Descriptors.
        size: u16,
        /// Bytes needed.
        needed: u64,
    },
    /// It begins where a ring cannot write its words.
    #[error("offset {0:#x} is not a multiple of 8")]
    Misaligned(u64),
    /// It cannot be mapped.
    #[error(transparent)]
    Mapping(#[from] MappingError),
    /// The kernel has no memory for it.
    #[error("cannot make an inflight region: {0}")]
    Kernel(#[from] nix::Error),
}

/// Bytes of one queue's part.
fn part(layout: Layout, size: u16) -> u64 {
    let (header, state) = match layout {
        Layout::Split => (SPLIT_HEADER, SPLIT_STATE),
        Layout::Packed => (PACKED_HEADER, PACKED_STATE),
    };
    (header + state * u64::from(size)).next_multiple_of(ALIGN)
}

/// A region as GET and SET_INFLIGHT_FD describe it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Queues in it.
    pub(crate) queues: u16,
    /// Descriptors of each.
    pub(crate) size: u16,
    /// Layout of all.
    pub(crate) layout: Layout,
}

impl Shape {
    pub(crate) fn check(self, max: usize) -> Result<(), InflightError> {
        let possible = (1..=max).contains(&usize::from(self.queues)) && (1..=32_768).contains(&self.size);
        let Self { queues, size, .. } = self;
        if possible { Ok(()) } else { Err(InflightError::Shape { queues, size, max }) }
    }

    /// Bytes of the region.
    pub(crate) fn bytes(self) -> u64 {
        part(self.layout, self.size) * u64::from(self.queues)
    }
}

/// A new region, all zero, as a file to give away.
pub(crate) fn create(shape: Shape) -> Result<OwnedFd, InflightError> {
    let fd = memfd_create(c"inflight", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    nix::unistd::ftruncate(&fd, i64::try_from(shape.bytes()).map_err(|_| nix::Error::EINVAL)?)?;
    Ok(fd)
}

/// A region that the front end handed over.
pub(crate) struct Inflight {
    shape: Shape,
    mapping: Arc<Mapping>,
}

impl Inflight {
    /// Maps `bytes` of `file` from `offset` on.
    pub(crate) fn map(
        file: &OwnedFd,
        offset: u64,
        bytes: u64,
        shape: Shape,
        max: usize,
    ) -> Result<Self, InflightError> {
        shape.check(max)?;
        let needed = shape.bytes();
        if bytes < needed {
            let Shape { queues, size, .. } = shape;
            return Err(InflightError::TooSmall { given: bytes, queues, size, needed });
        }
        if !offset.is_multiple_of(8) {
            return Err(InflightError::Misaligned(offset));
        }
        let mapping = Mapping::new(file.as_fd(), offset, bytes, Arc::default())?;
        Ok(Self { shape, mapping: Arc::new(mapping) })
    }

    /// What it was made for.
    pub(crate) fn shape(&self) -> Shape {
        self.shape
    }

    /// The part of queue `index`, if there is one.
    pub(crate) fn area(&self, index: u16) -> Option<InflightArea> {
        let part = usize::try_from(part(self.shape.layout, self.shape.size)).ok()?;
        let offset = part.checked_mul(usize::from(index))?;
        if index >= self.shape.queues || offset.checked_add(part)? > self.mapping.size() {
            return None;
        }
        let range = HostRange { ptr: self.mapping.first().wrapping_add(offset), len: part, guest: 0 };
        Some(InflightArea { range, mapping: self.mapping.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACKED: Shape = Shape { queues: 4, size: 256, layout: Layout::Packed };

    #[test]
    fn each_queue_has_a_part_of_its_own_in_both_layouts() {
        for layout in [Layout::Split, Layout::Packed] {
            let shape = Shape { layout, ..PACKED };
            let fd = create(shape).unwrap();
            let region = Inflight::map(&fd, 0, shape.bytes(), shape, 4).unwrap();
            let areas: Vec<_> = (0..4).map(|i| region.area(i).unwrap().range).collect();
            for pair in areas.windows(2) {
                let [a, b] = pair else { unreachable!() };
                assert_eq!(a.ptr as usize + a.len, b.ptr as usize);
                assert!((b.ptr as usize).is_multiple_of(64));
            }
            assert!(region.area(4).is_none());
        }
        assert_eq!(PACKED.bytes(), 4 * (32 + 32 * 256 + 32));
    }

    #[test]
    fn impossible_shapes_sizes_and_offsets_are_refused() {
        let fd = create(PACKED).unwrap();
        for (queues, size) in [(0, 256), (5, 256), (u16::MAX, 256), (4, 0), (4, 32_769), (4, u16::MAX)] {
            let refused = Inflight::map(&fd, 0, 1 << 40, Shape { queues, size, ..PACKED }, 4);
            assert!(matches!(refused, Err(InflightError::Shape { .. })), "{queues} {size}");
        }
        let bytes = PACKED.bytes();
        assert!(matches!(Inflight::map(&fd, 0, bytes - 1, PACKED, 4), Err(InflightError::TooSmall { .. })));
        assert!(matches!(Inflight::map(&fd, 0, bytes + 1, PACKED, 4), Err(InflightError::Mapping(_))));
        assert!(matches!(Inflight::map(&fd, 4, bytes, PACKED, 4), Err(InflightError::Misaligned(4))));
        assert!(matches!(Inflight::map(&fd, u64::MAX - 7, bytes, PACKED, 4), Err(InflightError::Mapping(_))));
    }
}
